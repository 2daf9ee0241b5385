"""Prior networks narrower than 3M channels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_models import images, loss_and_gradients, small

from hpcm_scale.coding.codec import Codec
from hpcm_scale.config.checks import check_model
from hpcm_scale.errors import UserError
from hpcm_scale.model.hpcm import HPCM
from hpcm_scale.model.parameters import learning_rate_factor, on_meta, parameters_by_part, parametrise

NARROW = replace(small(), context_channels=12)


def test_only_the_context_model_shrinks():
    wide, narrow = (parameters_by_part(on_meta(config)) for config in (small(), NARROW))
    assert narrow["context"] < wide["context"]
    assert all(narrow[part] == wide[part] for part in wide if part != "context")
    assert parameters_by_part(on_meta(replace(small(), context_channels=3 * 16))) == wide


def test_it_trains_and_codes():
    torch.manual_seed(0)
    model = HPCM(NARROW)
    _, gradients = loss_and_gradients(model, images(1))
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    pixels = (255 * images(1)[0]).to(torch.uint8)
    codec = Codec(model.eval())
    with torch.no_grad():
        expected = model(images(1).mul(255).to(torch.uint8).float() / 255).x_hat[0]
    decoded = codec.decompress(codec.compress(pixels)).float() / 255
    assert torch.allclose(decoded, expected.clamp(0, 1), atol=0.51 / 255 + 1e-4)


def test_mup_compares_with_the_base():
    """Of 3·24 channels."""
    model = on_meta(replace(NARROW, context_channels=36))
    parametrise(model)
    assert learning_rate_factor(model.get_parameter("context.prior_s3.before.0.expand.weight")) == 2


def test_adaptors_with_blocks_are_refused():
    with pytest.raises(UserError) as refused:
        check_model(replace(NARROW, adaptor_blocks=[1, 0, 0]))
    assert refused.value.code == "adaptor-blocks-and-context-channels"
