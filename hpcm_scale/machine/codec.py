"""Weights files as what encoders need: the codec, and the pre-editor in front of it where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from hpcm_scale.config.schema import ModelConfig, Precision
from hpcm_scale.machine.extractor import TokenExtractor
from hpcm_scale.machine.objective import reference_tokens
from hpcm_scale.machine.pre_editor import PreEditor
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.model.hpcm import HPCM, Coded, Noise
from hpcm_scale.model.weights import WeightsFile, codec_of, load_state, read_weights_file

# A codec with a pre-editor in front, as one module to train.


class MachineCodec(nn.Module):
    """Edits images, then codes them; called as `HPCM` is.

    Its state is that of `codec` and of `pre_editor`. The receiver whose tokens the pre-editor sees is no part of it,
    nor is a frozen codec: no optimizer and no checkpoint knows of them, but they move to other devices with it.
    """

    pre_editor: PreEditor | None

    def __init__(
        self,
        codec: HPCM,
        pre_editor: PreEditor | None = None,
        receiver: TokenExtractor | None = None,
        *,
        freeze_codec: bool = False,
    ) -> None:
        """`receiver`: whose tokens the pre-editor was built for; None if it sees the image alone."""
        super().__init__()
        if freeze_codec:
            self.__dict__["codec"] = codec.eval().requires_grad_(False)
        else:
            self.codec = codec
        self.pre_editor = pre_editor
        self.__dict__["receiver"] = receiver

    def forward(
        self,
        x: Tensor,
        noise: Noise | None = None,
        level: Tensor | None = None,
        tokens: dict[str, Tensor] | None = None,
    ) -> Coded:
        """Edit and code a batch of images; see `HPCM.forward` and `edit`. `x_hat` is that of the edited images."""
        return self.codec(self.edit(x, level, tokens), noise, level)

    def edit(self, x: Tensor, level: Tensor | float | None = None, tokens: dict[str, Tensor] | None = None) -> Tensor:
        """What is coded instead of the images (B, 3, H, W), which are fp32 in [0, 1]: of that shape, fp32, not clamped.

        Sides are any for the pre-editor, from 32 for the receiver. `level`: see `HPCM.mix`. `tokens`: the receiver's,
        if they are there already.
        """
        if self.pre_editor is None:
            return x
        if tokens is None and self.receiver is not None:
            tokens = reference_tokens(self.receiver, x)
        return self.pre_editor(x, tokens, self.codec.mix(level, len(x)))

    @property
    def config(self) -> ModelConfig:
        """The codec's."""
        return self.codec.config

    @property
    def precision(self) -> Precision:
        """The codec's."""
        return self.codec.precision

    def set_precision(self, precision: Precision) -> None:
        """Have codec and pre-editor compute in another precision."""
        self.codec.precision = precision
        if self.pre_editor is not None:
            self.pre_editor.precision = precision

    @property
    def multiple(self) -> int:
        """Sides of the input must be multiples of this many pixels."""
        return self.codec.multiple

    def latent_shapes(self, height: int, width: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Shapes (channels, rows, columns) of one image's y and z."""
        return self.codec.latent_shapes(height, width)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MachineCodec:
        """What moves this module moves those that it does not list."""
        super()._apply(fn, recurse)
        listed = set(self.children())
        for module in (self.codec, self.receiver):
            if module is not None and module not in listed:
                module._apply(fn, recurse)
        return self


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
