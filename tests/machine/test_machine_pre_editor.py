"""The pre-editor begins by editing nothing, hears tokens and level, and takes images of any size."""

from __future__ import annotations

import pytest
import torch

from hpcm_scale.compute.tracker import forward_flops
from hpcm_scale.config.schema import Checkpointing, Precision, PreEditorConfig
from hpcm_scale.machine.pre_editor import PreEditor, Stage
from hpcm_scale.model.layers import ResidualBlock
from hpcm_scale.model.parameters import kmac_per_pixel, parameter_count
from hpcm_scale.model.variable_rate import mix_of

CHANNELS = {"stride8": 12, "head.last": 20}
LEVELS = 3
SMALL = PreEditorConfig(channels=[8, 8, 16])


def images(count: int, height: int = 32, width: int = 48) -> torch.Tensor:
    x = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))
    return x.contiguous(memory_format=torch.channels_last)


def seen(count: int, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(count, 9, channels, generator=generator) for layer, channels in CHANNELS.items()}


def levels(*values: float) -> torch.Tensor:
    return mix_of(torch.tensor(values, dtype=torch.float32), LEVELS)


def built(**options) -> PreEditor:
    torch.manual_seed(0)
    return PreEditor(SMALL, CHANNELS, LEVELS, **options)


def after_learning(editor: PreEditor) -> PreEditor:
    """With weights in the places that start at zero."""
    with torch.no_grad():
        for parameter in editor.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return editor


@pytest.mark.parametrize("precision", Precision)
@pytest.mark.parametrize(("channels", "count"), [(None, 1), (None, LEVELS), (CHANNELS, 1), (CHANNELS, LEVELS)])
def test_it_starts_as_the_identity_and_learns_everywhere(channels, count, precision):
    """Bit for bit; the first step reaches the last layer, and the third all others."""
    torch.manual_seed(0)
    editor = PreEditor(SMALL, channels, count, precision=precision)
    x, tokens = images(LEVELS), seen(LEVELS) if channels else None
    mix = levels(0, 1, 2) if count > 1 else None
    assert torch.equal(editor(x, tokens, mix), x)
    optimizer = torch.optim.Adam(editor.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        edited = editor(x, tokens, mix)
        (edited - x.flip(3)).square().mean().backward()
        assert all(parameter.grad is not None for parameter in editor.parameters())
        optimizer.step()
    silent = [name for name, parameter in editor.named_parameters() if not parameter.grad.any()]
    assert silent == [] and edited.dtype == torch.float32 and not torch.equal(edited, x)


def test_tokens_and_levels_matter_each_to_its_image():
    editor, x = after_learning(built()), images(2)
    plain = editor(x, seen(2), levels(0, 1))
    other = {layer: torch.stack([tokens[0], -tokens[1]]) for layer, tokens in seen(2).items()}
    for changed in (editor(x, other, levels(0, 1)), editor(x, seen(2), levels(0, 2))):
        torch.testing.assert_close(changed[0], plain[0])
        assert (changed[1] - plain[1]).abs().max() > 1e-3
    shuffled = {layer: 7 * tokens.flip(1) for layer, tokens in seen(2).items()}  # neither order nor unit matters
    torch.testing.assert_close(editor(x, shuffled, levels(0, 1)), plain, atol=1e-4, rtol=1e-4)


def test_a_level_between_two_is_heard_between_them():
    condition = built().condition
    tokens = seen(3)
    linear = condition.of_level(levels(1, 1.5, 2))
    torch.testing.assert_close(linear[1], (linear[0] + linear[2]) / 2)
    assert condition(tokens, levels(1, 1.5, 2)).shape == (3, condition.of_level.out_features)


@pytest.mark.parametrize(("height", "width"), [(40, 56), (33, 71), (1, 5)])
def test_images_of_any_size(height, width):
    editor, x = after_learning(built()), images(1, height, width)
    edited = editor(x, seen(1), levels(1))
    assert edited.shape == x.shape and edited.isfinite().all()
    rows, columns = -height % 8, -width % 8
    padded = torch.nn.functional.pad(x, (0, columns, 0, rows), mode="replicate")
    expected = editor(padded, seen(1), levels(1))[:, :, :height, :width]
    torch.testing.assert_close(edited, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("precision", Precision)
def test_channels_stay_last_and_gradients_reach_the_image(precision):
    editor, x, formats = after_learning(built(precision=precision)), images(2).requires_grad_(), set()
    for module in editor.modules():
        if isinstance(module, (ResidualBlock, Stage)):
            module.register_forward_hook(
                lambda _, inputs, output: formats.update(
                    tensor.is_contiguous(memory_format=torch.channels_last) for tensor in (inputs[0], output)
                )
            )
    edited = editor(x, seen(2), levels(0, 2))
    (10 * edited - 5).square().sum().backward()  # numbers beyond [0, 1] count, too
    assert formats == {True} and edited.is_contiguous(memory_format=torch.channels_last)
    assert (x.grad != 0).all()


def test_bf16_is_near_and_computing_again_changes_nothing():
    results = {}
    for precision in Precision:
        for checkpoint in Checkpointing:
            editor = after_learning(built(precision=precision, activation_checkpointing=checkpoint))
            edited = editor(images(1), seen(1), levels(1))
            edited.square().sum().backward()
            gradients = torch.cat([parameter.grad.flatten() for parameter in editor.parameters()])
            results[precision, checkpoint] = edited.detach(), gradients
        for checkpoint in (Checkpointing.blocks, Checkpointing.steps):
            for again, kept in zip(results[precision, checkpoint], results[precision, Checkpointing.none], strict=True):
                assert torch.equal(again, kept)
    exact, reduced = (results[precision, Checkpointing.none][0] for precision in (Precision.fp32, Precision.bf16))
    assert 0 < (exact - reduced).abs().max() < 0.05 * (exact - images(1)).abs().max()


def test_what_it_was_not_built_for_is_refused():
    x = images(1)
    with pytest.raises(ValueError, match="only the image"):
        PreEditor(SMALL, None, 1)(x, seen(1))
    with pytest.raises(ValueError, match="no level"):
        PreEditor(SMALL, CHANNELS, 1)(x, seen(1), levels(1))
    with pytest.raises(ValueError, match="stride8"):
        built()(x, None, levels(1))


def test_its_cost_is_known_without_its_memory():
    """A small part of the codec: 68m takes 918.6 kMAC per pixel."""
    with torch.device("meta"):
        editor = PreEditor(PreEditorConfig(), None, 1)
    kmac = kmac_per_pixel(forward_flops(editor, torch.empty(1, 3, 256, 256, device="meta")), 256)
    assert 3 < kmac < 5 and parameter_count(editor) == 80_011
