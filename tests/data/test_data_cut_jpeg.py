"""A JPEG whose coded data ends early is broken although it is closed with an end marker; sound ones are not."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import END, encoded, first_scans, scan_by_scan, scans, segment
from PIL import Image

from hpcm_scale.data.build import build_shards, examine
from hpcm_scale.data.images import EncodedImage, decode
from hpcm_scale.data.sources import Source, read_image
from hpcm_scale.errors import UserError
from hpcm_scale.tracking.progress import progress

KINDS = {
    f"{mode}{subsampling}{' progressive' * progressive}{' restarts' * (restarts > 0)}{' optimized' * optimize}": (
        mode,
        {
            "subsampling": subsampling,
            "progressive": progressive,
            "restart_marker_blocks": restarts,
            "optimize": optimize,
        },
    )
    for mode, subsampling, progressive, restarts, optimize in product(
        ("RGB", "L", "CMYK"), (0, 1, 2), (False, True), (0, 6), (False, True)
    )
    if mode == "RGB" or subsampling == 0
}
TRUNCATED = "broken image: image file is truncated"


@pytest.fixture(scope="module")
def photo(packaged_photos) -> Image.Image:
    with Image.open(packaged_photos[2]) as image:
        return image.convert("RGB").crop((100, 40, 331, 229))


def jpeg(photo: Image.Image, kind: str) -> bytes:
    mode, options = KINDS[kind]
    image = photo.convert(mode) if mode != "CMYK" else Image.merge(mode, (*photo.split(), photo.convert("L")))
    return encoded(image, "JPEG", quality=80, **options)


def closed(part: bytes) -> bytes:
    """A JPEG that was cut, with an end marker."""
    return part.rstrip(b"\xff") + END


def cuts(data: bytes) -> Iterator[bytes]:
    """A JPEG cut in every scan, short of its last 40 bytes, and closed."""
    starts = [at + 2 + int.from_bytes(data[at + 2 : at + 4], "big") for at in scans(data)]
    ends = [*(max(data.rfind(b"\xff\xc4", 0, at), 0) or at for at in scans(data)[1:]), len(data) - 2]
    for start, end in zip(starts, ends, strict=True):
        for part in (0.05, 0.5, 0.9):
            if start + part * (end - start) < end - 40:
                yield closed(data[: start + int(part * (end - start))])


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_with_an_end_marker_is_truncated(photo, kind):
    data = jpeg(photo, kind)
    decode(data)
    found = list(cuts(data))
    assert len(found) >= 3
    for part in found:
        with pytest.raises(ValueError, match=TRUNCATED):
            decode(part)


def test_a_file_with_a_scan_for_each_component(photo):
    data = scan_by_scan(photo)
    assert decode(data).size == photo.size
    for part in cuts(data):
        with pytest.raises(ValueError, match=TRUNCATED):
            decode(part)


@pytest.mark.parametrize("marker", [END, b"\xff\x01", b"\xff\x42", segment(0xFE, b"comment")])
def test_a_marker_amid_the_coded_data(photo, marker):
    """Behind it decoders show grey."""
    data = jpeg(photo, "RGB2")
    middle = len(data) * 2 // 3
    with pytest.raises(ValueError, match=TRUNCATED):
        decode(data[:middle] + marker + data[middle:])


def test_wherever_files_come_in(photo, tmp_path):
    whole = jpeg(photo, "RGB2")
    for name, data in {"cut.jpg": closed(whole[: len(whole) // 2]), "whole.jpg": whole}.items():
        (tmp_path / name).write_bytes(data)
    assert examine(Source(tmp_path / "cut.jpg", "cut.jpg", "cut", 1), min_side=0).startswith(TRUNCATED)
    with pytest.raises(UserError, match=TRUNCATED):
        read_image(tmp_path / "cut.jpg")
    built = build_shards([tmp_path], tmp_path / "out", min_side=0, shard_size=10**6, workers=1, progress=progress)
    assert built.index.keys == ["whole"]
    assert [row.partition(",")[0] for row in Path(built.report).read_text().splitlines()[1:]] == [
        str(tmp_path / "cut.jpg")
    ]


def test_crops_do_not_show_what_is_missing(photo):
    """In sets that were built before such files were refused; above the cut they are as before."""
    data = jpeg(photo, "RGB2")
    part = closed(data[: len(data) // 2])
    assert (np.asarray(EncodedImage(part).decode_box((0, 0, 60, 20))) == np.asarray(decode(data))[:20, :60]).all()
    with pytest.raises(ValueError, match=TRUNCATED):
        EncodedImage(part).decode_box((0, 120, 60, 180))


@pytest.mark.parametrize("kind", KINDS)
def test_oddities_of_whole_files(photo, kind):
    """Bytes behind the end; fill bytes, superfluous data and a restart marker before it; whole scans missing."""
    data = jpeg(photo, kind)
    body, expected = data[:-2], np.asarray(decode(data))
    for end in (END + b"junk" * 99, END + data, b"\xff\xff" + END, b"\0\0\0" + END, b"\xff\xd5" + END, b"\xff\0" + END):
        assert (np.asarray(decode(body + end)) == expected).all()
    if "progressive" in kind:
        for number in range(1, len(scans(data))):
            assert decode(first_scans(data, number)).size == photo.size


@settings(max_examples=50, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    quality=st.integers(1, 100),
    seed=st.integers(0, 99),
    flat=st.booleans(),
)
def test_no_whole_file_is_refused(kind, width, height, quality, seed, flat):
    mode, options = KINDS[kind]
    samples = np.random.default_rng(seed).integers(0, 256, (1, 1, 3) if flat else (height, width, 3), np.uint8)
    image = Image.fromarray(np.broadcast_to(samples, (height, width, 3)).copy()).convert(mode)
    assert decode(encoded(image, "JPEG", quality=quality, **options)).size == (width, height)
