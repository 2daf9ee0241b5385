"""The codecs we are compared with: real files of an image, by the real libraries."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.baselines import BASELINES, Baseline, from_ycbcr, open_baseline, to_ycbcr
from hpcm_scale.evaluation.measures import peak_signal_to_noise

LIBRARIES = {"jxl": "imagecodecs", "hevc": "pillow_heif", "vvc": "imageio_ffmpeg"}
VERSIONS = {
    "jpeg": r"Pillow \d+\.\d.*, libjpeg\S* \d+.*4:2:0",
    "webp": r"Pillow \d+\.\d.*, libwebp \d+\.\d.*4:2:0",
    "avif": r"Pillow \d+\.\d.*, libavif \d+\.\d.*, aom v?\d+\.\d.*4:4:4",
    "jxl": r"imagecodecs \d+\.\d.*, libjxl \d+\.\d.*4:4:4",
    "hevc": r"pillow-heif \d+\.\d.*, libheif \d+\.\d.*, x265 \d+\.\d.*4:4:4",
    "vvc": r"imageio-ffmpeg \d+\.\d.*, ffmpeg \S*\d.*, VVenC \d+\.\d.*qpa 0.*4:2:0",
}


@pytest.fixture(scope="module", params=list(BASELINES))
def codec(request) -> Baseline:
    library = LIBRARIES.get(request.param)
    if library and importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: it is part of the extra `codecs`")
    return open_baseline(request.param)


@pytest.fixture(scope="module")
def photo(image_folder) -> torch.Tensor:
    return ImageSet(image_folder, limit=4).load(3)  # kodim04, a portrait


@pytest.fixture(scope="module")
def crop(shared, photo) -> torch.Tensor:
    return photo[:, 20:148, 50:210]  # of a real photograph: a hat of red mesh before a curtain


@pytest.mark.launch
def test_more_bits_and_more_quality_at_every_setting(codec, crop):
    coded = [codec.code(crop, setting) for setting in codec.settings]
    sizes = [one.bits for one in coded]
    quality = [peak_signal_to_noise(crop, one.decoded) for one in coded]
    assert 6 <= len(sizes) <= 8
    assert sizes == sorted(set(sizes))
    assert quality == sorted(set(quality))
    assert sizes[-1] > 4 * sizes[0] and quality[-1] > quality[0] + 8
    for one in coded:
        assert one.decoded.dtype == torch.uint8 and one.decoded.shape == crop.shape
        assert one.encode_seconds > 0 and one.decode_seconds > 0


def test_versions_settings_and_chroma_format_are_reported(codec):
    assert re.fullmatch(VERSIONS[codec.name], codec.description)
    assert "None" not in codec.description and "\n" not in codec.description
    assert len({codec.label(setting) for setting in codec.settings}) == len(codec.settings)


def test_labels():
    assert open_baseline("jpeg").label(50) == "quality 50"
    assert BASELINES["jxl"].label(BASELINES["jxl"], 2.5) == "distance 2.5"
    assert BASELINES["vvc"].label(BASELINES["vvc"], 32) == "QP 32"


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 35), (67, 33)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_any_size(codec, photo, size):
    """Height, width; what comes back is this image, not a neighbour: an error of half a pixel would show."""
    pixels = photo[:, 250 : 250 + size[0], 200 : 200 + size[1]]
    coded = codec.code(pixels, codec.settings[-1])
    assert coded.decoded.shape == pixels.shape
    assert peak_signal_to_noise(pixels, coded.decoded) > 30


def test_the_same_file_every_time(codec, crop):
    first, second = (codec.code(crop[:, :64, :64], codec.settings[2]) for _ in range(2))
    assert first.bits == second.bits and torch.equal(first.decoded, second.decoded)


def test_red_stays_red(codec):
    """Every change of colours and its inverse belong together: flat colours, nearly exact."""
    allowed = 8 if codec.name == "jxl" else 4
    for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 100, 50)]:
        pixels = torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand(3, 48, 64)
        decoded = codec.code(pixels, codec.settings[-1]).decoded
        assert (decoded.int() - pixels.int()).abs().max() <= allowed, colour


@pytest.mark.launch
@pytest.mark.parametrize(
    ("name", "setting", "bpp", "psnr"),
    [("avif", 50, 0.524, 35.10), pytest.param("vvc", 37, 0.204, 32.58, marks=pytest.mark.long)],
)
def test_known_points_of_kodim04(shared, photo, name, setting, bpp, psnr):
    """Measured elsewhere, with settings not all known: ours must be as good."""
    if name in LIBRARIES:
        pytest.importorskip(LIBRARIES[name])
    coded = open_baseline(name).code(photo, setting)
    rate = coded.bits / photo[0].numel()
    assert rate == pytest.approx(bpp, rel=0.03)
    assert psnr - 0.1 < peak_signal_to_noise(photo, coded.decoded) < psnr + 1


def test_ycbcr_there_and_back_loses_only_chroma_detail(crop):
    image = crop.permute(1, 2, 0).contiguous().numpy()
    height, width = image.shape[:2]
    picture = to_ycbcr(image)
    assert len(picture) == 3 * height * width
    assert peak_signal_to_noise(crop, torch.from_numpy(from_ycbcr(picture, height, width)).permute(2, 0, 1)) > 42
    grey = np.repeat(image[..., :1], 3, axis=2)
    assert np.array_equal(from_ycbcr(to_ycbcr(grey), height, width), grey)


def test_an_unknown_name():
    with pytest.raises(UserError, match="choose from jpeg, webp, avif, jxl, hevc, vvc") as error:
        open_baseline("bpg")
    assert (error.value.code, error.value.key) == ("unknown-baseline", "--against")


@pytest.mark.launch
def test_missing_libraries_are_named_with_their_mend():
    """In a process of its own, in which none can be imported; the codecs of Pillow work there."""
    program = (
        "import sys\n"
        f"for library in {list(LIBRARIES.values())}: sys.modules[library] = None\n"
        "from hpcm_scale.errors import UserError\n"
        "from hpcm_scale.evaluation.baselines import BASELINES, open_baseline\n"
        "for name in BASELINES:\n"
        "    try: print(name, open_baseline(name).description)\n"
        "    except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    lines = dict(zip(BASELINES, done.stdout.splitlines(), strict=True))
    for name, line in lines.items():
        if name in LIBRARIES:
            assert line.startswith(f"{name} needs the library {LIBRARIES[name]} (")
            assert line.endswith(f'); run `pip install "hpcm-scale[codecs]"`, or omit {name}')
        else:
            assert line.startswith(f"{name} Pillow ")


@pytest.mark.parametrize(("name", "side"), [("webp", 16384), ("jpeg", 65536)])
def test_an_image_too_large_for_a_format(name, side):
    codec = open_baseline(name)
    with pytest.raises(UserError, match=rf"^{name} .* {side}×1 pixels at quality 50 \(.+\)") as error:
        codec.code(torch.zeros(3, 1, side, dtype=torch.uint8), 50)
    assert error.value.code == "baseline-fails"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo Unknown encoder libvvenc >&2; exit 8", "ffmpeg failed with exit code 8: Unknown encoder libvvenc"),
        ("kill -9 $$", "ffmpeg failed with exit code -9: no message"),
        ("exit 0", "ffmpeg decoded 0 bytes instead of 3072"),
        ("exec sleep 600", "ffmpeg timed out after 1 seconds"),
    ],
    ids=["no encoder", "killed", "silent", "hangs"],
)
def test_a_bad_ffmpeg_gets_one_sentence(monkeypatch, tmp_path, script, reason):
    """A real program in ffmpeg's place, the way imageio-ffmpeg lets users choose their own."""
    pytest.importorskip("imageio_ffmpeg")
    if "600" in script:
        monkeypatch.setattr("hpcm_scale.evaluation.baselines.START_SECONDS", 1)
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!{shutil.which('sh')}\n{script}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))
    with pytest.raises(UserError) as error:
        open_baseline("vvc")
    assert f"({reason})" in str(error.value) and error.value.code == "no-vvc"
