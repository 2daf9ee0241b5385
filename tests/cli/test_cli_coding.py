"""`hpcm encode` and `hpcm decode` on real files of every kind, and one line for every mistake."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hpcm_scale.coding.codec import Codec
from hpcm_scale.config.compose import compose_model
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.weights import load_weights, save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[Path]:
    """The weights files of two seeded nanos."""
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = HPCM(compose_model("nano"))
        paths.append(tmp_path_factory.mktemp("run") / "weights.safetensors")
        save_weights(paths[-1], model.state_dict(), model.config, {})
    return paths


@pytest.fixture(scope="module")
def codecs(weights) -> list[Codec]:
    return [Codec(load_weights(path)[0]) for path in weights]


@pytest.fixture(scope="module")
def photo(image_folder) -> np.ndarray:
    """A crop of an image, uint8 (60, 90, 3)."""
    with Image.open(image_folder / "kodim23.png") as image:
        return np.asarray(image.convert("RGB"))[200:260, 300:390]


def picture(path: Path) -> np.ndarray:
    """The pixels of a PNG that `hpcm decode` wrote, uint8 (H, W, 3)."""
    with Image.open(path) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        return np.asarray(image)


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def saved(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    with BytesIO() as handle:
        Image.fromarray(pixels).save(handle, kind, **options)
        return handle.getvalue()


def png16(samples: np.ndarray, transparent: int | None = None) -> bytes:
    """A 16-bit PNG, grey or colour, which Pillow cannot write in colour; `transparent`: a grey that is no colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2 * (samples.ndim - 2), 0, 0, 0))]
    if transparent is not None:
        parts.append(chunk(b"tRNS", struct.pack(">H", transparent)))
    return b"\x89PNG\r\n\x1a\n" + b"".join([*parts, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")])


def grey(photo: np.ndarray) -> tuple[bytes, np.ndarray]:
    return saved(photo[..., 1]), photo[..., [1, 1, 1]]


def palette(photo: np.ndarray) -> tuple[bytes, np.ndarray]:
    colours = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(photo[..., 0])
    image.putpalette(colours.tobytes())
    assert image.mode == "P"
    with BytesIO() as handle:
        image.save(handle, "PNG")
        return handle.getvalue(), colours[photo[..., 0]]


def black_and_white(photo: np.ndarray) -> tuple[bytes, np.ndarray]:
    return saved(photo[..., 1] > 127), np.repeat((photo[..., 1:2] > 127) * np.uint8(255), 3, axis=2)


def grey_of_16_bits(photo: np.ndarray) -> tuple[bytes, np.ndarray]:
    samples = photo[..., 1].astype(np.uint16) * 256 + photo[..., 0]
    return saved(samples), photo[..., [1, 1, 1]]


def colour_of_16_bits(photo: np.ndarray) -> tuple[bytes, np.ndarray]:
    return png16(photo.astype(np.uint16) * 256 + 255 - photo), photo


def cmyk(photo: np.ndarray) -> tuple[bytes, np.ndarray]:
    """A JPEG as printers make them; Pillow's formula for RGB."""
    with BytesIO() as handle:
        Image.fromarray(photo).convert("CMYK").save(handle, "JPEG", quality=98)
        image = Image.open(handle)
        assert image.mode == "CMYK"
        expected = np.asarray(image.convert("RGB"))
        assert np.abs(expected.astype(int) - photo).mean() < 6
        return handle.getvalue(), expected


def rotated(photo: np.ndarray) -> tuple[bytes, np.ndarray]:
    """A camera held upright: EXIF orientation 6, to be turned a quarter clockwise."""
    exif = Image.Exif()
    exif[0x112] = 6
    return saved(photo, exif=exif), np.rot90(photo, -1)


def opaque(photo: np.ndarray) -> tuple[bytes, np.ndarray]:
    """An alpha channel that hides nothing."""
    return saved(np.dstack([photo, np.full(photo.shape[:2], 255, np.uint8)])), photo


def webp(photo: np.ndarray) -> tuple[bytes, np.ndarray]:
    return saved(photo, "WEBP", lossless=True), photo


KINDS = [grey, palette, black_and_white, grey_of_16_bits, colour_of_16_bits, cmyk, rotated, opaque, webp]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image(kind, run, weights, codecs, photo, tmp_path):
    """It is coded as the RGB picture that it shows, and comes back as that."""
    data, shown = kind(photo)
    source, coded, back = (tmp_path / name for name in ("photo.png", "photo.hpcm", "back.png"))
    source.write_bytes(data)
    code, out, err = run("encode", source, coded, "--weights", weights[0], "--device", "cpu")
    assert (code, err) == (0, "")
    size = len(coded.read_bytes())
    bpp = 8 * size / (shown.shape[0] * shown.shape[1])
    assert out == f"{source}: {size:,} bytes, {bpp:.4f} bits per pixel, in {coded}\n"
    expected = codecs[0].compress(tensor(shown))
    assert coded.read_bytes() == expected
    code, out, err = run("decode", coded, back, "--weights", weights[0], "--device", "cpu")
    assert (code, err) == (0, "") and out == f"{coded}: decoded to {back}\n"
    assert (tensor(picture(back)) == codecs[0].decompress(expected)).all()
    assert picture(back).shape == shown.shape


def half_hidden(photo: np.ndarray) -> tuple[bytes, np.ndarray]:
    """The left part is transparent, the middle half so; the grey of the background is 0x80."""
    alpha = np.full((*photo.shape[:2], 1), 255, np.uint8)
    alpha[:, :30], alpha[:, 30:60] = 0, 51
    shown = np.rint(photo + (0x80 - photo.astype(float)) * (1 - alpha / 255)).astype(np.uint8)
    return saved(np.dstack([photo, alpha])), shown


def no_colour(photo: np.ndarray) -> tuple[bytes, np.ndarray]:
    """16-bit grey of which one value, and not its neighbours in the high byte, stands for nothing."""
    samples = photo[..., 1].astype(np.uint16) * 256 + 7
    hidden = np.zeros(photo.shape[:2], bool)
    hidden[10:20, 10:50] = True
    samples[hidden] = 0x4321
    samples[25:30] = 0x4322
    shown = np.where(hidden, 0x80, samples >> 8).astype(np.uint8)
    return png16(samples, transparent=0x4321), np.dstack([shown] * 3)


@pytest.mark.parametrize("kind", [half_hidden, no_colour])
def test_transparency_is_never_lost_silently(kind, run, weights, codecs, photo, tmp_path):
    data, shown = kind(photo)
    source, coded = tmp_path / "layer.png", tmp_path / "layer.hpcm"
    source.write_bytes(data)
    code, out, err = run("encode", source, coded, "--weights", weights[0], "--device", "cpu")
    assert (
        code == 2
        and out == ""
        and err
        == (
            f"hpcm: {source}: it has transparent pixels, which .hpcm files do not store; "
            "choose their background with --background\n"
        )
    )
    assert list(tmp_path.iterdir()) == [source]
    arguments = ("--weights", weights[0], "--device", "cpu", "--background", "#808080")
    code, _, err = run("encode", source, coded, *arguments)
    assert (code, err) == (0, "")
    found = codecs[0].decompress(coded.read_bytes())
    expected = codecs[0].decompress(codecs[0].compress(tensor(shown)))
    assert (found.int() - expected.int()).abs().max() <= 1  # Pillow rounds halves otherwise
    hidden = tmp_path / "white.hpcm"
    run("encode", source, hidden, *arguments[:-1], "white")
    assert hidden.read_bytes() != coded.read_bytes()


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_thin_images(size, run, weights, photo, tmp_path):
    source, coded, back = (tmp_path / name for name in ("photo.png", "photo.hpcm", "back.png"))
    source.write_bytes(saved(np.resize(photo, (*size, 3))))
    for command, files in (("encode", (source, coded)), ("decode", (coded, back))):
        code, _, err = run(command, *files, "--weights", weights[0], "--device", "cpu")
        assert (code, err) == (0, "")
    assert picture(back).shape == (*size, 3)


@pytest.fixture
def folder(photo, tmp_path) -> Path:
    """Three photos, one of them in a folder of its own, and an empty folder."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    (folder / "a.png").write_bytes(saved(photo))
    (folder / "b.v2.JPG").write_bytes(saved(photo[:, :40], "JPEG"))
    (folder / "more" / "a.webp").write_bytes(saved(photo[:20], "WEBP"))
    (folder / "empty").mkdir()
    return folder


def below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def test_folders(run, weights, codecs, photo, folder, tmp_path):
    coded, back = tmp_path / "new" / "coded", tmp_path / "back"
    (folder / "notes.txt").write_text("no image")
    code, out, err = run("encode", folder, coded, "--weights", weights[0], "--device", "cpu")
    left_out = f"hpcm: {folder}: skipped files that are not a JPEG, PNG or WebP image (1): notes.txt\n"
    assert (code, err) == (0, left_out)
    assert below(coded) == ["a.hpcm", "b.v2.hpcm", "more/a.hpcm"]
    files = [(coded / name).read_bytes() for name in below(coded)]
    size = sum(map(len, files))
    rate = 8 * size / (5400 + 2400 + 1800)
    assert out == f"3 images of {folder}: {size:,} bytes, {rate:.4f} bits per pixel, in {coded}\n"
    code, out, err = run("decode", coded, back, "--weights", weights[0], "--device", "cpu")
    assert (code, err) == (0, "") and out == f"3 files of {coded}: decoded to {back}\n"
    assert below(back) == ["a.png", "b.v2.png", "more/a.png"]
    assert [picture(back / name).shape[:2] for name in below(back)] == [(60, 90), (60, 40), (20, 90)]
    assert (tensor(picture(back / "a.png")) == codecs[0].decompress(codecs[0].compress(tensor(photo)))).all()


def test_a_folder_never_overwrites(run, weights, folder, tmp_path):
    """Decoded beside the originals, pictures would take their places."""
    coded = tmp_path / "coded"
    assert run("encode", folder, coded, "--weights", weights[0], "--device", "cpu")[0] == 0
    before = {name: (folder / name).read_bytes() for name in below(folder)}
    for path in below(coded):
        (folder / path).write_bytes((coded / path).read_bytes())
    code, out, err = run("decode", folder, folder, "--weights", weights[0], "--device", "cpu")
    assert (code, out) == (2, "") and err.count("\n") == 2
    assert f"{folder}: skipped files that are not a .hpcm file (3): a.png, b.v2.JPG, more/a.webp\n" in err
    assert err.endswith("photos/a.png would be overwritten; choose a new folder, or remove them\n")
    assert {name: (folder / name).read_bytes() for name in before} == before
    code, out, err = run("encode", folder, coded, "--weights", weights[0], "--device", "cpu")
    assert code == 2 and "a.hpcm and 2 more would be overwritten" in err


def test_what_is_broken_does_not_stop_the_others(run, weights, folder, tmp_path):
    whole = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "more" / "0 empty.jpg").write_bytes(b"")
    coded, back = tmp_path / "coded", tmp_path / "back"
    code, out, err = run("encode", folder, coded, "--weights", weights[0], "--device", "cpu")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("hpcm: 2 of 5 files failed (")
    assert err.endswith("); correct the causes and repeat the command for them, the others are written\n")
    assert re.search(r"cannot read \S+/photos/cut\.png \(broken image: .+\); replace or remove it", err)
    assert "more/0 empty.jpg (not a JPEG, PNG or WebP image)" in err
    assert below(coded) == ["a.hpcm", "b.v2.hpcm", "more/a.hpcm"]
    data = (coded / "a.hpcm").read_bytes()
    (coded / "a.hpcm").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (coded / "z.hpcm").write_bytes(b"")
    code, out, err = run("decode", coded, back, "--weights", weights[0], "--device", "cpu")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("hpcm: 2 of 4 files failed (")
    assert err.endswith("); correct the causes and repeat the command for them, the others are written\n")
    assert f"{coded / 'a.hpcm'}: its stream of y is damaged" in err
    assert f"{coded / 'z.hpcm'}: it is not an .hpcm file" in err
    assert below(back) == ["b.v2.png", "more/a.png"]


def test_an_old_file_outlives_a_failure(run, weights, photo, tmp_path):
    source, coded, back = (tmp_path / name for name in ("photo.png", "photo.hpcm", "back.png"))
    source.write_bytes(saved(photo)[:-50])
    coded.write_bytes(b"what was there")
    back.write_bytes(b"this too")
    assert run("encode", source, coded, "--weights", weights[0], "--device", "cpu")[0] == 2
    assert run("decode", coded, back, "--weights", weights[0], "--device", "cpu")[0] == 2
    assert coded.read_bytes() == b"what was there" and back.read_bytes() == b"this too"
    assert len(list(tmp_path.iterdir())) == 3


def test_wrong_weights_are_reported_with_both_digests(run, weights, codecs, photo, tmp_path):
    coded = tmp_path / "photo.hpcm"
    coded.write_bytes(codecs[0].compress(tensor(photo)))
    code, out, err = run("decode", coded, tmp_path / "back.png", "--weights", weights[1], "--device", "cpu")
    assert (
        code == 2
        and out == ""
        and err
        == (
            f"hpcm: {coded}: it was encoded with the weights {codecs[0].digest.hex()}, but these are "
            f"{codecs[1].digest.hex()}; decode it with the weights used for encoding\n"
        )
    )
    assert list(tmp_path.iterdir()) == [coded]


MISTAKES: dict[str, tuple[str, Callable[[Path], tuple], str]] = {
    "no photo": ("encode", lambda t: (t / "nowhere.png", t / "a.hpcm"), "there is no file or folder"),
    "no file": ("decode", lambda t: (t / "nowhere.hpcm", t / "a.png"), "there is no file or folder"),
    "no photos": ("encode", lambda t: (t / "photos" / "empty", t / "out"), "there is no JPEG, PNG or WebP image in"),
    "no files": ("decode", lambda t: (t / "photos", t / "out"), "there is no .hpcm file in"),
    "suffix": ("encode", lambda t: (t / "photos" / "a.png", t / "out.png"), "out.png does not have the suffix .hpcm;"),
    "picture's suffix": ("decode", lambda t: (t / "a.hpcm", t / "out.jpg"), "out.jpg does not have the suffix .png;"),
    "folder": ("encode", lambda t: (t / "photos" / "a.png", t / "photos"), "is a folder; give the .hpcm file to write"),
    "no folder": ("encode", lambda t: (t / "photos", t / "a.hpcm"), "a file; give a folder to write to"),
    "broken link": ("encode", lambda t: (t / "photos", t / "link"), "a dangling link; give a folder to write to"),
    "photo": ("decode", lambda t: (t / "photos" / "a.png", t / "out.png"), "it is not an .hpcm file; give one written"),
    "not a photo": ("encode", lambda t: (t / "a.hpcm", t / "out.hpcm"), "not a JPEG, PNG or WebP image"),
    "no place": ("encode", lambda t: (t / "photos" / "a.png", t / "a.hpcm" / "out.hpcm"), "cannot write"),
    "no place for a picture": ("decode", lambda t: (t / "good.hpcm", t / "a.hpcm" / "out.png"), "cannot write"),
    "no weights": ("encode", lambda t: (t / "photos", t / "out", "--weights", t / "none"), "there are no weights at"),
    "damaged weights": ("decode", lambda t: (t / "a.hpcm", t / "out.png", "--weights", t / "a.hpcm"), "not a readable"),
    "colour": ("encode", lambda t: (t / "photos", t / "out", "--background", "mauvish"), "--background mauvish is not"),
    "device": ("decode", lambda t: (t / "a.hpcm", t / "out.png", "--device", "abacus"), "--device abacus cannot be"),
    "nothing": ("encode", lambda t: (), "the following arguments are required: source, target"),
    "half": ("decode", lambda t: (t / "a.hpcm",), "the following arguments are required: target"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(mistake, run, weights, codecs, photo, folder, tmp_path):
    command, arguments, message = MISTAKES[mistake]
    (tmp_path / "a.hpcm").write_bytes(b"nonsense")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "good.hpcm").write_bytes(codecs[0].compress(tensor(photo)))
    before = below(tmp_path)
    code, out, err = run(command, "--weights", weights[0], "--device", "cpu", *arguments(tmp_path))
    assert code == 2 and out == ""
    assert err.startswith("hpcm: ") and message in err and err.count("\n") == 1
    assert below(tmp_path) == before and not (tmp_path / "out").exists()


def test_names_that_would_clash(run, weights, photo, folder, tmp_path):
    (folder / "a.jpeg").write_bytes(saved(photo, "JPEG"))
    code, out, err = run("encode", folder, tmp_path / "coded", "--weights", weights[0], "--device", "cpu")
    assert (
        code == 2
        and out == ""
        and err
        == (
            f"hpcm: {folder / 'a.jpeg'} and {folder / 'a.png'} would both be written to "
            f"{tmp_path / 'coded' / 'a.hpcm'}; "
            "rename one of them\n"
        )
    )
    assert not (tmp_path / "coded").exists()


@pytest.mark.parametrize("command", ["encode", "decode"])
def test_weights_must_be_named(command, run, tmp_path):
    code, out, err = run(command, tmp_path / "a", tmp_path / "b")
    assert code == 2 and out == "" and "the following arguments are required: --weights" in err


@pytest.mark.launch
def test_in_a_pipe_there_is_one_line(weights, folder, fork_server, tmp_path):
    """As typed, with another program reading: no bar, no warning; also not of what is imported."""
    coded, options = tmp_path / "coded", ("--weights", str(weights[0]), "--device", "cpu")
    command = [Path(sys.executable).with_name("hpcm"), "encode", folder, coded, *options]
    encoded = subprocess.run(command, capture_output=True, text=True, timeout=400)
    words = ["decode", str(coded), str(tmp_path / "back"), *options]
    decoding = fork_server.start("hpcm_scale.cli", words, cwd=tmp_path, env=os.environ)
    written = [(encoded.returncode, encoded.stdout, encoded.stderr), (decoding.wait(400), *decoding.communicate())]
    for code, out, err in written:
        assert (code, err) == (0, "") and out.count("\n") == 1 and out.startswith("3 ")
    assert below(tmp_path / "back") == ["a.png", "b.v2.png", "more/a.png"]
