"""A codec with a pre-editor in front, as one module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from hpcm_scale.config.schema import Precision
from hpcm_scale.machine.extractor import TokenExtractor
from hpcm_scale.machine.objective import reference_tokens
from hpcm_scale.machine.pre_editor import PreEditor
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.model.hpcm import HPCM, Coded, Noise
from hpcm_scale.model.weights import WeightsFile, load_state
from hpcm_scale.tasks import Encoder


class MachineCodec(nn.Module):
    """Edits images, then codes them; has the forward pass and the precision of `HPCM`.

    Its submodules are `codec` and `pre_editor`. The receiver, and the codec if frozen, are not registered, so that
    optimizers and checkpoints exclude them, but they move to other devices with the module.
    """

    codec: HPCM
    pre_editor: PreEditor | None
    receiver: TokenExtractor | None

    def __init__(
        self,
        codec: HPCM,
        pre_editor: PreEditor | None = None,
        receiver: TokenExtractor | None = None,
        *,
        freeze_codec: bool = False,
    ) -> None:
        """`receiver`: its tokens are an input of the pre-editor; None if that sees only the image."""
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
        """Edit and code a batch of images; see `HPCM.forward` and `edit`. `x_hat` reconstructs the edited images."""
        return self.codec(self.edit(x, level, tokens), noise, level)

    def edit(self, x: Tensor, level: Tensor | float | None = None, tokens: dict[str, Tensor] | None = None) -> Tensor:
        """The edited images, fp32, not clamped, of images (B, 3, H, W) fp32 in [0, 1].

        With a receiver, sides are from 32 pixels. `level`: see `HPCM.mix`. `tokens`: the receiver's, if known already.
        """
        if self.pre_editor is None:
            return x
        if tokens is None and self.receiver is not None:
            tokens = reference_tokens(self.receiver, x)
        return self.pre_editor(x, tokens, self.codec.mix(level, len(x)))

    @property
    def precision(self) -> Precision:
        """See `HPCM`."""
        return self.codec.precision

    @precision.setter
    def precision(self, precision: Precision) -> None:
        self.codec.precision = precision
        if self.pre_editor is not None:
            self.pre_editor.precision = precision

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MachineCodec:
        """Also applies to the modules that are not registered."""
        super()._apply(fn, recurse)
        registered = set(self.children())
        for module in (self.codec, self.receiver):
            if module is not None and module not in registered:
                module._apply(fn, recurse)
        return self


def encoder(file: WeightsFile, codec: HPCM) -> Encoder:
    """A codec with the pre-editor of its weights file, in evaluation mode; see `TaskPlugin.encoder`."""
    assert file.pre_editor is not None
    config = file.pre_editor.config
    seen = receiver(config.tokens) if config.tokens else None
    pre_editor = PreEditor(config, seen and seen.token_channels, file.config.rate.levels)
    load_state(pre_editor, file.pre_editor.state, file.path)
    module = MachineCodec(codec, pre_editor, seen).eval()
    return Encoder(codec, module, partial(_edit, module))


@torch.inference_mode()
def _edit(module: MachineCodec, pixels: Tensor) -> Callable[[float | None], Tensor]:
    """See `tasks.Edit`."""
    device = next(module.parameters()).device
    x = (pixels[None].to(device) / 255).contiguous(memory_format=torch.channels_last)
    tokens = module.receiver(x) if module.receiver else None

    @torch.inference_mode()
    def edited(level: float | None) -> Tensor:
        return module.edit(x, level, tokens)[0]

    return edited
