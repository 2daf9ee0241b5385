"""Parameter names of the public implementation (github.com/lyq133/LIC-HPCM) for ours."""

from __future__ import annotations

from hpcm_scale.config.schema import ModelConfig

PUBLISHED = {"68m": "HPCM_Base", "64m_phi": "HPCM_Base_PhiContext", "90m": "HPCM_Large", "1b": "HPCM_1B"}
"""The presets that the public implementation has too, and its names for them."""

_TRANSFORM_BLOCK = {"spatial": "branch.0.pconv", "expand": "branch.1", "reduce": "branch.3"}
_CONTEXT_BLOCK = {"spatial": "branch.0", "expand": "branch.1", "reduce": "branch.3"}
_FUSION = {"query": "conv_q", "key": "conv_k", "value": "conv_v", "skip": "conv_out"}


def public_name(name: str, config: ModelConfig) -> str:
    """The public implementation's name of our parameter `name`.

    The public 1B names its transforms by stage; the others number their layers as we do.
    """
    room, _, rest = name.partition(".")
    if room in ("g_a", "g_s", "h_a", "h_s"):
        index, _, leaf = rest.partition(".")
        return f"{_layer(room, int(index), config)}.{_leaf(leaf, _TRANSFORM_BLOCK)}"
    if room == "hyper_prior":
        return f"{rest}_hyper"
    part, _, rest = rest.partition(".")
    if part == "q":
        return f"adaptive_params_list.{rest.removesuffix('.weight')}"
    if part == "merge":
        return f"context_net.{rest}"
    if part == "fusion":
        level, layer, leaf = rest.split(".")
        return f"attn_s{int(level) + 1}.{_FUSION[layer]}.{leaf}"
    if part == "adaptors":
        level, index, leaf = rest.split(".", 2)
        block, _, inner = leaf.partition(".")
        leaf = f"{block}.{_leaf(inner, _CONTEXT_BLOCK)}" if inner else leaf
        return f"y_spatial_prior_adaptor_list_s{int(level) + 1}.{_rotated(level, index)}.{leaf}"
    return f"y_spatial_{part}.{_prior_layer(rest)}"


def _leaf(leaf: str, block: dict[str, str]) -> str:
    layer, _, parameter = leaf.partition(".")
    return f"{block[layer]}.{parameter}" if parameter else leaf  # a plain convolution has no layers


def _rotated(level: str, index: str) -> int:
    """The public adaptors of s2 and s3 are used in the order n−1, 0, 1, …"""
    count = {"0": 1, "1": 3, "2": 6}[level]
    return (int(index) - 1) % count


def _prior_layer(rest: str) -> str:
    half, index, leaf = rest.split(".", 2)
    branch = {"before": "branch_1", "after": "branch_2"}[half]
    return f"{branch}.{index}.{_leaf(leaf, _CONTEXT_BLOCK)}"


def _layer(room: str, index: int, config: ModelConfig) -> str:
    if config.stem_kernel == 4:
        return f"{room}.branch.{index}"
    if room.startswith("h_"):
        return f"{room}.{index}"
    counts = config.g_a_blocks if room == "g_a" else config.g_s_blocks
    for level, count in enumerate(counts):
        stage = level + 1 if room == "g_a" else 4 - level
        # g_a samples before the blocks of a stage, g_s after them.
        position = index - 1 if room == "g_a" else index
        if 0 <= position < count:
            return f"{room}.{room}_chunk{stage}.{position}"
        if index == (0 if room == "g_a" else count):
            return f"{room}.{room}_{'down' if room == 'g_a' else 'up'}{stage}"
        index -= count + 1
    raise AssertionError(f"{room} has no layer {index}")
