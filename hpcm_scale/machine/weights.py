"""The pre-editor of a weights file, ready to stand in front of a codec."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpcm_scale.machine.extractor import TokenExtractor
from hpcm_scale.machine.machine_codec import MachineCodec
from hpcm_scale.machine.pre_editor import PreEditor
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.weights import WeightsFile, codec_of, load_state

Edit = Callable[[Tensor, float | None], Tensor]
"""Pixels, uint8 (3, H, W), and the level of a variable-rate model, to what is coded in their stead: fp32 in [0, 1]."""


def codec_and_edit(file: WeightsFile) -> tuple[HPCM, Edit | None]:
    """The codec of a weights file, and what edits images in front of it where the file has a pre-editor.

    Both on the CPU, the edit follows the codec to where that is moved. Raises UserError for files that do not fit, and
    where the receiver whose tokens the pre-editor sees cannot be had.
    """
    codec = codec_of(file)
    if file.pre_editor is None:
        return codec, None
    tokens = file.pre_editor.config.tokens
    seen = receiver(tokens) if tokens else None
    pre_editor = build_pre_editor(file, seen)
    machine_codec = MachineCodec(codec, pre_editor, seen).eval()

    @torch.inference_mode()
    def edit(pixels: Tensor, level: float | None) -> Tensor:
        device = next(codec.parameters()).device
        x = pixels[None].to(device) / 255
        edited = machine_codec.to(device).edit(x.contiguous(memory_format=torch.channels_last), level)
        return edited[0]

    return codec, edit


def build_pre_editor(file: WeightsFile, seen: TokenExtractor | None) -> PreEditor:
    """The pre-editor of a weights file that has one, fp32."""
    pre_editor = PreEditor(file.pre_editor.config, seen and seen.token_channels, file.config.rate.levels)
    load_state(pre_editor, file.pre_editor.state, file.path)
    return pre_editor
