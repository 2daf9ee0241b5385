"""Curves: how images are coded and measured, which weights make one curve, what a model costs."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from hpcm_scale.coding.codec import Codec
from hpcm_scale.config.compose import compose_model
from hpcm_scale.data.sources import ImageSet
from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.baselines import open_baseline
from hpcm_scale.evaluation.curves import baseline_curve, model_curve, read_weights
from hpcm_scale.evaluation.estimate import evaluate
from hpcm_scale.evaluation.measures import Estimated, peak_signal_to_noise
from hpcm_scale.evaluation.runners import code_images, estimate_runner, file_runner
from hpcm_scale.model.weights import load_weights, save_weights
from hpcm_scale.objective import RateDistortionObjective
from hpcm_scale.tasks import load_encoder
from hpcm_scale.training.costs import size_row

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def weights(save_untrained) -> str:
    return save_untrained("plain")


@pytest.fixture(scope="module")
def one_image(small_images) -> ImageSet:
    return ImageSet(small_images.folder, limit=1)


@pytest.mark.launch
def test_files_are_measured_on_what_their_bytes_decode_to(weights, small_images):
    encoder = load_encoder(weights)
    seen = []
    measured = code_images("files", file_runner(encoder, CPU), small_images, watch=lambda *look: seen.append(look))
    assert [image.name for image in measured] == small_images.names
    codec = Codec(load_weights(weights)[0])
    for i, (image, (_, index, pixels, decoded, watched)) in enumerate(zip(measured, seen, strict=True)):
        assert index == i and watched is image and torch.equal(pixels, small_images.load(i))
        data = codec.compress(pixels)
        assert image.bits == 8 * len(data) and image.bpp == 8 * len(data) / (image.width * image.height)
        assert torch.equal(decoded, codec.decompress(data))
        assert image.psnr == peak_signal_to_noise(pixels, decoded)
        assert image.encode_seconds > 0 and image.decode_seconds > 0
    assert [image.ms_ssim is None for image in measured] == [True, True, False]


def test_an_estimate_has_the_numbers_of_the_training(weights, small_images):
    encoder = load_encoder(weights)
    measured = code_images("estimates", estimate_runner(encoder, CPU, 0.013), small_images)
    journal = evaluate(
        encoder.module,
        small_images,
        multiple=encoder.codec.multiple,
        objective=RateDistortionObjective(0.013),
        device=CPU,
    )
    for image, expected in zip(measured, journal.images, strict=True):
        assert isinstance(image, Estimated) and image.encode_seconds is image.decode_seconds is None
        found = asdict(image)
        known = {"name": expected.name, "width": expected.width, "height": expected.height} | expected.measures()
        assert {key: found[key] for key in known} == {
            key: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value for key, value in known.items()
        }
        assert image.bits == pytest.approx(image.bpp * image.width * image.height)


def test_an_estimate_without_a_lambda_has_no_loss(weights, small_images):
    measured = code_images("estimates", estimate_runner(load_encoder(weights), CPU, None), small_images)
    assert all(image.loss is None and image.mse > 0 for image in measured)


@pytest.mark.launch
def test_files_are_near_their_estimates(weights, small_images):
    files, estimates = (
        model_curve(read_weights([weights])[0], small_images, device=CPU, estimate=estimate).points[0].images
        for estimate in (False, True)
    )
    for file, estimated in zip(files, estimates, strict=True):
        assert file.bits == pytest.approx(estimated.bits, rel=0.03)  # untrained: many symbols beyond the tables
        assert file.psnr == pytest.approx(estimated.psnr, abs=0.01)


def test_another_codec_is_measured_alike(small_images):
    jpeg = open_baseline("jpeg")
    images = code_images("jpeg", partial(jpeg.code, setting=50), small_images)
    for i, image in enumerate(images):
        pixels, file = small_images.load(i), BytesIO()
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        picture.save(file, "JPEG", quality=50, subsampling="4:2:0", optimize=True)
        decoded = torch.from_numpy(np.array(Image.open(file)).transpose(2, 0, 1).copy())
        assert image.bits == 8 * len(file.getvalue())
        assert image.psnr == peak_signal_to_noise(pixels, decoded)


def test_a_curve_of_another_codec(small_images):
    jpeg = open_baseline("jpeg")
    asked = []
    curve = baseline_curve(jpeg, small_images, watch=lambda name, *_: asked.append(name))
    assert (curve.name, curve.label, curve.codec, curve.rate) == ("jpeg", "jpeg 4:2:0", jpeg.description, "files")
    assert list(dict.fromkeys(asked)) == [f"jpeg 4:2:0 {jpeg.label(setting)}" for setting in jpeg.settings]
    rates = [point.mean["bpp"] for point in curve.points]
    assert rates == sorted(rates) and len(rates) == len(jpeg.settings)
    assert all(point.weights is None and point.kmac_per_pixel is None for point in curve.points)


def test_several_lambdas_make_one_curve_in_order_of_rate(save_untrained, one_image):
    """Untrained, so the rate does not follow λ: the order is the measured one."""
    paths = [save_untrained(f"many{seed}", lmbda=seed / 100, seed=seed) for seed in (1, 2, 3)]
    other = save_untrained("other", preset="micro")
    first, second = read_weights([paths[0], other, *paths[1:]])
    assert [weights.path for weights in first] == paths and [weights.path for weights in second] == [other]
    asked = []
    curve = model_curve(first, one_image, device=CPU, estimate=True, watch=lambda name, *_: asked.append(name))
    assert asked == ["hpcm nano λ = 0.01", "hpcm nano λ = 0.02", "hpcm nano λ = 0.03"]  # in the order named
    assert (curve.name, curve.rate) == ("hpcm nano", "estimated")
    assert "210,719 parameters" in curve.codec and f"torch {torch.__version__.partition('+')[0]}" in curve.codec
    rates = [point.mean["bpp"] for point in curve.points]
    assert rates == sorted(rates) and len(set(rates)) == 3
    for point in curve.points:
        assert point.setting == f"λ = {point.facts['lmbda']:g}"
        assert paths.index(point.weights) == round(point.facts["lmbda"] * 100) - 1


def test_weights_without_a_lambda_are_named_by_their_file(save_untrained):
    ((weights,),) = read_weights([save_untrained("imported", lmbda=None)])
    assert [setting.label for setting in weights.settings] == ["imported"]


@pytest.mark.launch
def test_weights_trained_for_ms_ssim_are_a_curve_of_their_own(save_untrained, weights, small_images, tmp_path):
    model, facts = load_weights(save_untrained("trained_for_ms_ssim", lmbda=8.73))
    path = str(tmp_path / "ms_ssim.safetensors")
    save_weights(path, model.state_dict(), model.config, facts | {"distortion": "ms_ssim"})
    (mse,), (ms_ssim,) = read_weights([weights, path])
    assert (mse.curve, ms_ssim.curve) == ("hpcm nano", "hpcm nano ms-ssim")
    with pytest.raises(UserError, match="trained for MSE and for MS-SSIM") as error:
        read_weights([f"mine={weights}", f"mine={path}"])
    assert (error.value.code, error.value.key) == ("weights-of-two-curves", "--weights")
    (point,) = model_curve([ms_ssim], small_images, device=CPU, estimate=True).points
    assert [image.loss is None for image in point.images] == [True, True, False]  # MS-SSIM is not defined there
    large = point.images[2]
    assert large.loss == pytest.approx(8.73 * (1 - large.ms_ssim) + large.bpp, rel=1e-3)  # of pixels, unrounded


def test_curves_that_mean_nothing_are_refused(save_untrained, weights):
    changed = save_untrained("changed", lmbda=0.05, adaptor_blocks=(1, 1, 1))
    again = save_untrained("again", seed=1)
    for paths, code, reason in (
        ((weights, weights), "duplicate-weights", r"--weights lists .* twice"),
        ((weights, again), "weights-of-two-curves", "hpcm nano, but both have λ = 0.013"),
        ((weights, changed), "weights-of-two-curves", "hpcm nano, but have different architectures"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            read_weights(paths)
        assert error.value.code == code


def test_costs_are_those_of_the_table_of_sizes(save_untrained, one_image):
    (group,) = read_weights([save_untrained("costs_micro", preset="micro")])
    (point,) = model_curve(group, one_image, device=CPU, estimate=True).points
    assert point.kmac_per_pixel == size_row(compose_model("micro")).kmac_per_pixel


def test_in_a_pipe_each_setting_has_a_line(small_images, capsys):
    codec = open_baseline("jpeg")
    baseline_curve(codec, small_images)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(codec.settings)
    for setting, line in zip(codec.settings, lines, strict=True):
        assert f"{codec.label(setting)}: 3/3 images in " in line
