import functools
import math

import pytest
import torch

from mixscvi.images.encoders import ConditionalEncoder, ImageEncoder, clamped_variance
from mixscvi.images.networks import ConvTrunk, DenseTrunk, gate

TRUNKS = {
    "dense": functools.partial(DenseTrunk, image_shape=(4, 5), hidden=(6, 7)),
    "conv": functools.partial(ConvTrunk, image_shape=(4, 5), layers=((3, 3, 1), (2, 3, 2))),
}


def encoder_of(kind: str, component_encoder: str, trunk: str = "dense"):
    torch.manual_seed(0)
    kwargs = {"n_components": 4, "n_latent": 2, "component_encoder": component_encoder}
    if kind == "conditional":
        return ConditionalEncoder(TRUNKS[trunk], n_hidden=3, **kwargs).double()
    return ImageEncoder(TRUNKS[trunk], **kwargs).double()


def images(n: int = 3) -> torch.Tensor:
    return torch.rand(n, 1, 4, 5, dtype=torch.float64).round()


def test_log_variance_is_held_in_its_bounds():
    raw = torch.tensor([-99.0, -6.0, 0.5, 2.0, 99.0])
    expected = torch.tensor([-6.0, -6.0, 0.5, 2.0, 2.0]).exp()
    torch.testing.assert_close(clamped_variance(raw), expected)
    scale = ImageEncoder(TRUNKS["dense"], 2, 3)(torch.full((2, 1, 4, 5), 1e6)).component_scale
    assert math.exp(-3) * 0.999 <= scale.min() and scale.max() <= math.exp(1) * 1.001


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("component_encoder", ["separate", "amortized"])
@pytest.mark.parametrize("kind", ["upper", "conditional"])
def test_some_components_are_those_of_all(kind, component_encoder, trunk):
    encoder, x = encoder_of(kind, component_encoder, trunk), images()
    draws = (torch.randn(5, 3, 6, 2, dtype=torch.float64),) if kind == "conditional" else ()
    components = torch.tensor([2, 0])
    some, everything = encoder(x, *draws, components=components), encoder(x, *draws)
    torch.testing.assert_close(some.component_loc, everything.component_loc[..., components, :])
    torch.testing.assert_close(some.component_scale, everything.component_scale[..., components, :])


def test_codes_shift_features_and_gates():
    encoder, x = encoder_of("upper", "amortized"), images()
    shared = encoder.trunk(x)[:, 0]
    for a in range(4):
        hidden = gate(shared + encoder.codes[a])
        loc = hidden @ encoder.heads.mean.weight[0].T + encoder.heads.mean.bias[0]
        torch.testing.assert_close(encoder(x).component_loc[:, a], loc)


def test_equal_codes_are_equal_components():
    encoder = encoder_of("upper", "amortized")
    encoder.codes.data[:] = encoder.codes.data[:1].clone()
    loc = encoder(images()).component_loc
    torch.testing.assert_close(loc, loc[:, :1].expand_as(loc))


@pytest.mark.parametrize("component_encoder", ["separate", "amortized"])
def test_conditional_encoder_by_rows(component_encoder):
    """All draws at once are the draws one by one, each with its own image."""
    encoder, x = encoder_of("conditional", component_encoder), images()
    draws = torch.randn(5, 3, 6, 2, dtype=torch.float64)
    together = encoder(x, draws)
    assert together.component_loc.shape == (5, 3, 6, 4, 2)
    for b in range(3):
        one = encoder(x[b : b + 1], draws[4:5, b : b + 1, 2:3])
        torch.testing.assert_close(together.component_loc[4, b, 2], one.component_loc[0, 0, 0])
        torch.testing.assert_close(together.component_scale[4, b, 2], one.component_scale[0, 0, 0])
