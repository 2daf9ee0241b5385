"""An image to bytes and back with one model."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import NamedTuple

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


class Latents(NamedTuple):
    """An image as the encoder's networks give it: the same at every level."""

    width: int
    """Of the image, in pixels."""
    height: int
    y: list[Tensor]
    """fp32, one packed tensor per step of the coding order."""
    z_symbols: np.ndarray
    z: bytes
    """Their stream."""
    hyper_parameters: Tensor
    """(1, 2M, H/16, W/16) fp32, of the padded image: what ẑ tells of y."""


class Encoded(NamedTuple):
    """A file, and what its decoder will have."""

    data: bytes
    y_hat: Tensor
    """(1, M, H/16, W/16) fp32, of the padded image."""
    shift_bits: float
    """What it costs that other devices can decode: the shifts' part of the file."""


class Codec:
    """Codes images with a model, in fp32, on the device that the model is on.

    On one device, with the same number of threads, the decoder reaches the encoder's ŷ to the bit. On another
    it reaches the same symbols, and pixels that differ by rounding.
    """

    def __init__(
        self,
        model: HPCM,
        tolerance: Tolerance = Tolerance(),  # noqa: B008
        edit: Callable[[Tensor], Callable[[float | None], Tensor]] | None = None,
    ) -> None:
        """`edit`: what a pre-editor makes of pixels, level for level (`machine.weights`); decoding does without."""
        self.model, self.tolerance, self.edit = model, tolerance, edit
        self.digest = digest(model)[:8]
        self._tile = tile_side(model.config)

    def compress(self, pixels: Tensor, level: int | None = None) -> bytes:
        """The `.hpcm` file of an image, uint8 (3, H, W), any size from 1×1.

        `level`: of a variable-rate model, 0 (smallest file) to 255; None at fixed rate.
        Raises UserError if the weights give latents that are no numbers, or beyond ±4 million, and if they have
        no such level.
        """
        return self.encode(pixels, level).data

    def encode(self, pixels: Tensor, level: int | None = None) -> Encoded:
        """`compress`, and what the decoder will have."""
        check_level(self.model.config.rate, level)
        return self.encoder(pixels)(level)

    def encoder(self, pixels: Tensor) -> Callable[[int | None], Encoded]:
        """What encodes an image at one level after the other: what is alike for all of them is worked out here."""
        if self.edit is None:
            return partial(self.encode_latents, self.latents(pixels))
        rate, means = self.model.config.rate, self.model.hyper_prior.means
        with _exact_arithmetic(means):
            edited = self.edit(pixels)

        def encode(level: int | None) -> Encoded:
            with _exact_arithmetic(means):
                x = edited(None if level is None else level_of_byte(rate, level))
            return self.encode_latents(self.latents(x), level)

        return encode

    @torch.inference_mode()
    def latents(self, pixels: Tensor) -> Latents:
        """What files of an image, uint8 or as fp32 from 0 to 1, (3, H, W), are made of, at any level."""
        model = self.model
        means = model.hyper_prior.means
        with _exact_arithmetic(means):
            y = self._analyse(pixels)
            z = model.h_a(y)
            z_symbols = _whole(symbols_of(z, means))
            hyper_parameters = model.h_s(self._z_hat(z_symbols, z.shape))
        writer = SymbolWriter()
        writer.write(z_symbols, self._z_tables(z.shape))
        height, width = pixels.shape[1:]
        return Latents(width, height, model.context.order.split(y), z_symbols, writer.bytes, hyper_parameters)

    @torch.inference_mode()
    def encode_latents(self, latents: Latents, level: int | None = None) -> Encoded:
        """The file of an image at a level, and what its decoder will have; raises as `compress` does."""
        model = self.model
        check_level(model.config.rate, level)
        steps: list[tuple[np.ndarray, Tensor]] = []
        with _exact_arithmetic(model.hyper_prior.means):
            mix, gains = self._gains(level)

            def quantize(step: int, scales: Tensor, means: Tensor) -> Tensor:
                symbols = symbols_of(latents.y[step], means, gains[step])
                steps.append((_whole(symbols), _of_symbols(scales, gains[step])))
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
        """The image in the bytes of a `.hpcm` file: uint8 (3, H, W), on the CPU.

        Raises UserError if the bytes are damaged, made with other weights, or cannot be decoded rightly here.
        """
        content = unpack(data)
        return self.picture(self.decode(content), content.height, content.width)

    @torch.inference_mode()
    def decode(self, content: Container) -> Tensor:
        """ŷ (1, M, H/16, W/16) fp32 of a file's content."""
        if content.digest != self.digest:
            raise UserError(
                f"it was made with the weights {content.digest.hex()}, and these are {self.digest.hex()}; "
                "decode it with the weights that it was made with"
            )
        model = self.model
        if (content.level is None) != (model.config.rate.levels == 1):
            rate = "fixed" if content.level is None else "variable"
            raise UserError(f"its header is that of a file of {rate} rate, unlike its weights; copy it again")
        _, z_shape = model.latent_shapes(*self._padded(content.height, content.width))
        _, z_rows, z_columns = z_shape
        least = z_rows * z_columns * least_bits(self._z_tables(model.hyper_prior.scales.shape))
        if 8 * len(content.z) < least:  # before anything is as large as the header asks
            size = f"{content.width}×{content.height}"
            raise UserError(f"it is too short for an image of {size}; copy it again from its source")
        read: list[np.ndarray] = []
        try:
            means = model.hyper_prior.means
            with _exact_arithmetic(means):
                mix, gains = self._gains(content.level)
                read.append(SymbolReader(content.z).read(self._z_tables((1, *z_shape))))
                z_hat = self._z_hat(read[0], (1, *z_shape))
                reader = SymbolReader(content.y)
                shifts = ShiftReader(reader)

                def code(step: int, scales: Tensor, means: Tensor) -> Tensor:
                    read.append(reader.read(shifts.tables(_of_symbols(scales, gains[step]))))
                    return value_of(_latent(read[-1], means), means, gains[step])

                y_hat = model.context.traverse_packed(model.h_s(z_hat), code, mix)
        except CorruptStream:
            raise UserError(_DESYNCHRONISED) from None
        if _checksum(*read) != content.symbols_checksum:
            raise UserError(_DESYNCHRONISED)
        return y_hat

    @torch.inference_mode()
    def picture(self, y_hat: Tensor, height: int, width: int) -> Tensor:
        """The image of ŷ: uint8 (3, height, width), on the CPU."""
        pixels = torch.empty(3, height, width, dtype=torch.uint8)

        def into(piece: Tensor, rows: slice, columns: slice) -> None:
            place = pixels[:, rows, columns]
            piece = piece[0, :, : place.shape[1], : place.shape[2]]
            place.copy_((piece.clamp(0, 1) * 255).round())

        with _exact_arithmetic(y_hat):
            synthesise(self.model.g_s, y_hat, self._tile, into)
        return pixels

    def _analyse(self, pixels: Tensor) -> Tensor:
        """y of an image whose last row and column are repeated until the model's sides are met."""
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
        """ẑ, in the memory format in which the networks are fastest."""
        means = self.model.hyper_prior.means
        z_hat = value_of(_latent(symbols, means.new_empty(shape)), means)
        return z_hat.contiguous(memory_format=torch.channels_last)

    def _gains(self, level: int | None) -> tuple[Tensor | None, list[Tensor | None]]:
        """What a level means: the mix of its rows, and the gains of what each step codes, packed as `Positions` says.

        They are the same in every cell: (8·offsets, 1, C, 1, 1), beside packed values.
        """
        context = self.model.context
        if level is None:
            return None, [None] * context.order.step_count
        mix = self.model.mix(level_of_byte(self.model.config.rate, level))
        gains = context.gains(mix).unflatten(1, (GROUPS, -1))
        steps = (step for scale in context.order.scales for step in scale.steps)
        return mix, [gains[:, step.group].transpose(0, 1) for step in steps]

    def _tolerance(self, gains: list[Tensor | None]) -> Tolerance:
        """Of the symbols' scales: a gain multiplies what devices differ by in the networks' output, too."""
        largest = 1.0 if gains[0] is None else max(gains[0].max().item(), 1.0)  # every step has all channels
        return replace(self.tolerance, absolute=largest * self.tolerance.absolute)

    def _padded(self, height: int, width: int) -> tuple[int, int]:
        multiple = self.model.multiple
        padded = height + -height % multiple, width + -width % multiple
        if math.prod(padded) > MOST_PIXELS:
            raise UserError(
                f"an image of {width}×{height} is more than .hpcm files hold: {MOST_PIXELS:,} pixels, "
                f"with sides rounded up to {multiple}; cut it"
            )
        return padded

    def _z_tables(self, shape: tuple[int, ...]) -> np.ndarray:
        """z's scales are weights, the same numbers on every device, and need no shifts."""
        return table_index(self.model.hyper_prior.scales).expand(shape).flatten().cpu().numpy()


_PRECISIONS = (
    torch.backends,
    torch.backends.cuda.matmul,
    torch.backends.cudnn.conv,
    torch.backends.mkldnn.matmul,
    torch.backends.mkldnn.conv,
)
_DESYNCHRONISED = (
    "it cannot be decoded rightly on this device: its symbols do not come out as they were coded; "
    "decode it on the CPU, in fp32, or copy it again from its source"
)


def _of_symbols(scales: Tensor, gain: Tensor | None) -> Tensor:
    """The scales (n,) fp32 of the symbols themselves."""
    return (scales if gain is None else scales * gain).float().flatten()


def _whole(symbols: Tensor) -> np.ndarray:
    """Rounded values as integers (n,), in order."""
    if not symbols.abs().max() <= LARGEST_SYMBOL:  # false for what is no number, too
        raise UserError(f"these weights give latents beyond ±{LARGEST_SYMBOL:,}; their training has diverged")
    return symbols.flatten().cpu().numpy().astype(np.int32)


def _latent(symbols: np.ndarray, like: Tensor) -> Tensor:
    """Integers (n,) as values of the shape, dtype and device of `like`."""
    return torch.from_numpy(symbols).to(like).reshape(like.shape)


def _checksum(*symbols: np.ndarray) -> int:
    checksum = 0
    for part in symbols:
        checksum = zlib.crc32(part.astype("<i4").tobytes(), checksum)
    return checksum


@contextmanager
def _exact_arithmetic(x: Tensor) -> Iterator[None]:
    """fp32 is fp32 on the device of `x`, and the same every time, whatever the caller has set for training."""
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
