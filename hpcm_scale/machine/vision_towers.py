"""Pretrained vision towers, such as CLIP, SigLIP and DINOv2, from the libraries transformers and open_clip."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpcm_scale.errors import UserError
from hpcm_scale.machine.extractor import TokenExtractor, resized
from hpcm_scale.machine.packages import first_sentence, required


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
