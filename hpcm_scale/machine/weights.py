"""Weights files as what encoders need: the codec, and the pre-editor in front of it where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hpcm_scale.machine.machine_codec import MachineCodec
from hpcm_scale.machine.pre_editor import PreEditor
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.weights import WeightsFile, codec_of, load_state, read_weights_file

Edit = Callable[[Tensor], Callable[[float | None], Tensor]]
"""Pixels, uint8 (3, H, W), to what gives for a level (None at fixed rate) what is coded in their stead: fp32 (3, H, W).

So an image that is coded at several levels is looked at once.
"""


def load_machine_codec(path: str | Path) -> MachineCodec:
    """The codec of a weights file and its pre-editor, if it has one; on the CPU and in evaluation mode.

    Raises UserError for a file that is none or does not fit, and where the receiver whose tokens the pre-editor sees
    cannot be had. Decoding needs the codec alone: `model.weights.load_weights`.
    """
    file = read_weights_file(path)
    codec = codec_of(file)
    if file.pre_editor is None:
        return MachineCodec(codec).eval()
    return _with_pre_editor(file, codec).eval()


def _with_pre_editor(file: WeightsFile, codec: HPCM) -> MachineCodec:
    config = file.pre_editor.config
    seen = receiver(config.tokens) if config.tokens else None
    pre_editor = PreEditor(config, seen and seen.token_channels, file.config.rate.levels)
    load_state(pre_editor, file.pre_editor.state, file.path)
    return MachineCodec(codec, pre_editor, seen)


def edit_of(machine_codec: MachineCodec) -> Edit | None:
    """What its pre-editor does to an image before it is coded; None where there is none."""
    if machine_codec.pre_editor is None:
        return None

    @torch.inference_mode()
    def edit(pixels: Tensor) -> Callable[[float | None], Tensor]:
        device = next(machine_codec.parameters()).device
        x = (pixels[None].to(device) / 255).contiguous(memory_format=torch.channels_last)
        tokens = machine_codec.receiver(x) if machine_codec.receiver else None

        @torch.inference_mode()
        def edited(level: float | None) -> Tensor:
            return machine_codec.edit(x, level, tokens)[0]

        return edited

    return edit
