"""Encode images to `.hpcm` files and decode them, with one model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hpcm_scale.coding.container import MOST_PIXELS, Container, pack, unpack
from hpcm_scale.coding.tiling import analyse, synthesise, tile_side
from hpcm_scale.entropy.range_coder import (
    LARGEST_SYMBOL,
    CorruptStream,
    SymbolReader,
    SymbolWriter,
    least_bits,
    table_index,
)
from hpcm_scale.entropy.shifts import ShiftReader, Tolerance, choose_shifts, shifted_tables, write_head, write_step
from hpcm_scale.errors import UserError
from hpcm_scale.model.coding_order import GROUPS
from hpcm_scale.model.hpcm import HPCM, symbols_of, value_of
from hpcm_scale.model.layers import full_precision
from hpcm_scale.model.variable_rate import check_level, level_of_byte
from hpcm_scale.model.weights import digest
from hpcm_scale.tasks import Edit


class _Latents(NamedTuple):
    """The latents of an image; they do not depend on the level."""

    width: int
    """Width of the image, in pixels."""
    height: int
    y: list[Tensor]
    """fp32, one packed tensor per step of the coding order."""
    z_symbols: np.ndarray
    """(n,) int32."""
    z: bytes
    """The stream of z."""
    hyper_parameters: Tensor
    """h_s(ẑ), (1, 2M, H/16, W/16) fp32, of the padded image."""


class Encoded(NamedTuple):
    """A file and its ŷ."""

    data: bytes
    y_hat: Tensor
    """(1, M, H/16, W/16) fp32, of the padded image."""
    shift_bits: float
    """Bits of the scale shifts, the cost of decoding on other devices."""


class Codec:
    """Encoder and decoder of one model, in fp32 on the device of the model.

    On the same device with the same number of threads, decoder and encoder have the same ŷ to the bit. On another
    device they have the same symbols, and pixels differ only by rounding.
    """

    def __init__(
        self,
        model: HPCM,
        tolerance: Tolerance = Tolerance(),  # noqa: B008
        edit: Edit | None = None,
    ) -> None:
        """`edit`: the pre-editor of `tasks.Encoder`, from pixels to a function of the level; not for decoding."""
        self.model, self.tolerance, self.edit = model, tolerance, edit
        self.digest = digest(model)[:8]
        self._tile = tile_side(model.config)

    def compress(self, pixels: Tensor, level: int | None = None) -> bytes:
        """Encode an image, uint8 (3, H, W), any size from 1×1, to a `.hpcm` file.

        `level`: 0 (smallest file) to 255 for a variable-rate model; None at fixed rate. Raises UserError if the image
        is too large, if latents are not finite or beyond ±4 million, or for a level that does not go with the weights.
        """
        return self.encode(pixels, level).data

    def encode(self, pixels: Tensor, level: int | None = None) -> Encoded:
        """`compress`, with ŷ."""
        check_level(self.model.config.rate, level)
        return self.encoder(pixels)(level)

    def encoder(self, pixels: Tensor) -> Callable[[int | None], Encoded]:
        """A function that encodes an image at a level; work common to all levels is done once, here."""
        if self.edit is None:
            return partial(self._encode, self._latents(pixels))
        rate, means = self.model.config.rate, self.model.hyper_prior.means
        with _exact_arithmetic(means):
            edited = self.edit(pixels)

        def encode(level: int | None) -> Encoded:
            with _exact_arithmetic(means):
                x = edited(None if level is None else level_of_byte(rate, level))
            return self._encode(self._latents(x), level)

        return encode

    @torch.inference_mode()
    def _latents(self, pixels: Tensor) -> _Latents:
        """The latents of an image (3, H, W), uint8 or fp32 in [0, 1]."""
        model = self.model
        means = model.hyper_prior.means
        with _exact_arithmetic(means):
            y = self._analyse(pixels)
            z = model.h_a(y)
            z_symbols = _integers(symbols_of(z, means))
            hyper_parameters = model.h_s(self._z_hat(z_symbols, z.shape))
        writer = SymbolWriter()
        writer.write(z_symbols, self._z_tables(z.shape))
        height, width = pixels.shape[1:]
        return _Latents(width, height, model.context.order.split(y), z_symbols, writer.bytes, hyper_parameters)

    @torch.inference_mode()
    def _encode(self, latents: _Latents, level: int | None) -> Encoded:
        model = self.model
        check_level(model.config.rate, level)
        steps: list[tuple[np.ndarray, Tensor]] = []
        with _exact_arithmetic(model.hyper_prior.means):
            mix, gains = self._gains(level)

            def quantize(step: int, scales: Tensor, means: Tensor) -> Tensor:
                symbols = symbols_of(latents.y[step], means, gains[step])
                steps.append((_integers(symbols), _symbol_scales(scales, gains[step])))
                return value_of(symbols, means, gains[step])

            y_hat = model.context.traverse_packed(latents.hyper_parameters, quantize, mix)
        shifts = choose_shifts([scales for _, scales in steps], self._tolerance(gains))
        writer = SymbolWriter()
        write_head(writer, shifts)
        for step, (symbols, scales) in enumerate(steps):
            write_step(writer, shifts, step)
            writer.write(symbols, shifted_tables(scales, shifts.block_bits, shifts.choices[step]))
        content = Container(
            digest=self.digest,
            width=latents.width,
            height=latents.height,
            z=latents.z,
            y=writer.bytes,
            symbols_checksum=_checksum(latents.z_symbols, *(symbols for symbols, _ in steps)),
            level=level,
        )
        return Encoded(pack(content), y_hat, shifts.bits())

    def decompress(self, data: bytes) -> Tensor:
        """Decode a `.hpcm` file to its image, uint8 (3, H, W) on the CPU.

        Raises UserError if the file is damaged, was encoded with other weights, or cannot be decoded on this device.
        """
        content = unpack(data)
        return self.reconstruct(self.decode(content), content.height, content.width)

    @torch.inference_mode()
    def decode(self, content: Container) -> Tensor:
        """ŷ (1, M, H/16, W/16) fp32 of a parsed file. Raises UserError as `decompress` does."""
        if content.digest != self.digest:
            raise UserError(
                "other-weights",
                "--weights",
                f"it was encoded with the weights {content.digest.hex()}, but these are {self.digest.hex()}; decode "
                "it with the weights used for encoding",
            )
        model = self.model
        if (content.level is None) != (model.config.rate.levels == 1):
            rate = "fixed" if content.level is None else "variable"
            raise UserError(
                "header-rate",
                "",
                f"its header is damaged: it is that of a {rate}-rate model, unlike these weights; copy it again "
                "from its source",
            )
        _, z_shape = model.latent_shapes(*self._padded(content.height, content.width))
        _, z_rows, z_columns = z_shape
        least = z_rows * z_columns * least_bits(self._z_tables(model.hyper_prior.scales.shape))
        if 8 * len(content.z) < least:  # before allocating for the size in the header
            size = f"{content.width}×{content.height}"
            raise UserError(
                "stream-too-short", "", f"it is too short for an image of {size}; copy it again from its source"
            )
        read: list[np.ndarray] = []
        with suppress(CorruptStream), _exact_arithmetic(model.hyper_prior.means):
            mix, gains = self._gains(content.level)
            read.append(SymbolReader(content.z).read(self._z_tables((1, *z_shape))))
            z_hat = self._z_hat(read[0], (1, *z_shape))
            reader = SymbolReader(content.y)
            shifts = ShiftReader(reader)

            def code(step: int, scales: Tensor, means: Tensor) -> Tensor:
                read.append(reader.read(shifts.tables(_symbol_scales(scales, gains[step]))))
                return value_of(_values(read[-1], means), means, gains[step])

            y_hat = model.context.traverse_packed(model.h_s(z_hat), code, mix)
            if _checksum(*read) == content.symbols_checksum:
                return y_hat
        raise UserError(
            "wrong-symbols",
            "",
            "it cannot be decoded on this device: the decoded symbols are not those that were encoded; decode it on "
            "the CPU, in fp32, or copy it again from its source",
        )

    @torch.inference_mode()
    def reconstruct(self, y_hat: Tensor, height: int, width: int) -> Tensor:
        """The image of ŷ, uint8 (3, height, width) on the CPU."""
        pixels = torch.empty(3, height, width, dtype=torch.uint8)

        def into(piece: Tensor, rows: slice, columns: slice) -> None:
            place = pixels[:, rows, columns]
            piece = piece[0, :, : place.shape[1], : place.shape[2]]
            place.copy_((piece.clamp(0, 1) * 255).round())

        with _exact_arithmetic(y_hat):
            synthesise(self.model.g_s, y_hat, self._tile, into)
        return pixels

    def _analyse(self, pixels: Tensor) -> Tensor:
        """y of an image, padded to multiples of `model.multiple` by repeating its last row and column."""
        parameter = next(self.model.parameters())
        height, width = pixels.shape[1:]

        def piece(rows: slice, columns: slice) -> Tensor:
            row = torch.arange(rows.start, rows.stop).clamp(max=height - 1)
            column = torch.arange(columns.start, columns.stop).clamp(max=width - 1)
            image = pixels[:, row][:, :, column][None].to(parameter.device)
            image = (image if image.is_floating_point() else image / 255).to(parameter.dtype)
            return image.contiguous(memory_format=torch.channels_last)

        return analyse(self.model.g_a, piece, self._padded(height, width), self._tile)

    def _z_hat(self, symbols: np.ndarray, shape: tuple[int, ...]) -> Tensor:
        """ẑ of symbols, channels-last."""
        means = self.model.hyper_prior.means
        z_hat = value_of(_values(symbols, means.new_empty(shape)), means)
        return z_hat.contiguous(memory_format=torch.channels_last)

    def _gains(self, level: int | None) -> tuple[Tensor | None, list[Tensor | None]]:
        """The mix of a level (`HPCM.mix`), and for each step the gains, (8·offsets, 1, C, 1, 1), for packed values."""
        context = self.model.context
        if level is None or context.gains is None:
            return None, [None] * context.order.step_count
        mix = self.model.mix(level_of_byte(self.model.config.rate, level))
        gains = context.gains(mix).unflatten(1, (GROUPS, -1))
        steps = (step for scale in context.order.scales for step in scale.steps)
        return mix, [gains[:, step.group].transpose(0, 1) for step in steps]

    def _tolerance(self, gains: list[Tensor | None]) -> Tolerance:
        """Tolerance of the scales of symbols: gains multiply the differences between devices as well."""
        largest = 1.0 if gains[0] is None else max(gains[0].max().item(), 1.0)  # every step has all channels
        return replace(self.tolerance, absolute=largest * self.tolerance.absolute)

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        multiple = self.model.multiple
        padded = height + -height % multiple, width + -width % multiple
        if math.prod(padded) > MOST_PIXELS:
            raise UserError(
                "image-too-large",
                "",
                f"an image of {width}×{height} exceeds the {MOST_PIXELS:,} pixels of an .hpcm file, with sides rounded "
                f"up to multiples of {multiple}; crop it",
            )
        return padded

    def _z_tables(self, shape: tuple[int, ...]) -> np.ndarray:
        """Tables of z, (n,) integers; its scales are weights, equal on all devices, and need no shifts."""
        return table_index(self.model.hyper_prior.scales).expand(shape).flatten().cpu().numpy()


_PRECISIONS: tuple[Any, ...] = (
    torch.backends,
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.mkldnn.matmul,  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.mkldnn.conv,  # pyright: ignore[reportAttributeAccessIssue]
)


def _symbol_scales(scales: Tensor, gain: Tensor | None) -> Tensor:
    """Scales (n,) fp32 of symbols, from those of latents."""
    return (scales if gain is None else scales * gain).float().flatten()


def _integers(symbols: Tensor) -> np.ndarray:
    """Rounded values as int32 (n,)."""
    if not symbols.abs().max() <= LARGEST_SYMBOL:  # also true for nan
        raise UserError(
            "latents-out-of-range",
            "--weights",
            f"these weights give latents beyond ±{LARGEST_SYMBOL:,}: their training has diverged; use others",
        )
    return symbols.flatten().cpu().numpy().astype(np.int32)


def _values(symbols: np.ndarray, like: Tensor) -> Tensor:
    """Integers (n,) with the shape, dtype and device of `like`."""
    return torch.from_numpy(symbols).to(like).reshape(like.shape)


def _checksum(*symbols: np.ndarray) -> int:
    checksum = 0
    for part in symbols:
        checksum = zlib.crc32(part.astype("<i4").tobytes(), checksum)
    return checksum


@contextmanager
def _exact_arithmetic(x: Tensor) -> Generator[None]:
    """Exact, deterministic fp32 on the device of `x`, regardless of the settings of training."""
    cudnn = torch.backends.cudnn
    before = [place.fp32_precision for place in _PRECISIONS]
    benchmark, deterministic = cudnn.benchmark, cudnn.deterministic
    try:
        for place in _PRECISIONS:
            place.fp32_precision = "ieee"
        cudnn.benchmark, cudnn.deterministic = False, True
        with full_precision(x):
            yield
    finally:
        for place, precision in zip(_PRECISIONS, before, strict=True):
            place.fp32_precision = precision
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
