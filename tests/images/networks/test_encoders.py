import functools
import math

import pytest
import torch

from mixscvi.images.networks import encoders
from mixscvi.images.networks.encoders import ConditionalEncoder, clamped_variance, make_encoder
from mixscvi.images.networks.layers import ConvTrunk, DenseTrunk, gate
from tensor_sizes import LargestTensor

TRUNKS = {
    "dense": functools.partial(DenseTrunk, image_shape=(4, 5), hidden=(6, 7)),
    "conv": functools.partial(ConvTrunk, image_shape=(4, 5), layers=((3, 3, 1), (2, 3, 2))),
}


def encoder_of(kind: str, component_encoder: str, trunk: str = "dense"):
    torch.manual_seed(0)
    kwargs = {"n_components": 4, "n_latent": 2, "component_encoder": component_encoder}
    if kind == "conditional":
        return ConditionalEncoder(TRUNKS[trunk], n_hidden=3, **kwargs).double()
    return make_encoder(TRUNKS[trunk], **kwargs).double()


def images(n: int = 3) -> torch.Tensor:
    return torch.rand(n, 1, 4, 5, dtype=torch.float64).round()


def test_log_variance_is_held_in_its_bounds():
    raw = torch.tensor([-99.0, -6.0, 0.5, 2.0, 99.0])
    expected = torch.tensor([-6.0, -6.0, 0.5, 2.0, 2.0]).exp()
    torch.testing.assert_close(clamped_variance(raw), expected)
    scale = make_encoder(TRUNKS["dense"], 2, 3)(torch.full((2, 1, 4, 5), 1e6)).component_scale
    assert math.exp(-3) * 0.999 <= scale.min() and scale.max() <= math.exp(1) * 1.001


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("component_encoder", ["separate", "shifted"])
@pytest.mark.parametrize("kind", ["upper", "conditional"])
def test_some_components_are_those_of_all(kind, component_encoder, trunk):
    encoder, x = encoder_of(kind, component_encoder, trunk), images()
    draws = (torch.randn(5, 3, 6, 2, dtype=torch.float64),) if kind == "conditional" else ()
    components = torch.tensor([2, 0])
    some, everything = encoder(x, *draws, components=components), encoder(x, *draws)
    torch.testing.assert_close(some.component_loc, everything.component_loc[..., components, :])
    torch.testing.assert_close(some.component_scale, everything.component_scale[..., components, :])


def test_codes_shift_features_and_gates():
    encoder, x = encoder_of("upper", "shifted"), images()
    shared = encoder.trunk(x)[:, 0]
    for a in range(4):
        hidden = gate(shared + encoder.heads.codes[a])
        loc = hidden @ encoder.heads.mean.weight[0].T + encoder.heads.mean.bias[0]
        torch.testing.assert_close(encoder(x).component_loc[:, a], loc)


def test_equal_codes_are_equal_components():
    encoder = encoder_of("upper", "shifted")
    encoder.heads.codes.data[:] = encoder.heads.codes.data[:1].clone()
    loc = encoder(images()).component_loc
    torch.testing.assert_close(loc, loc[:, :1].expand_as(loc))


@pytest.mark.parametrize("component_encoder", ["separate", "shifted"])
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


def test_draws_of_the_lower_level_in_parts_are_those_at_once(monkeypatch):
    """Values and gradients, whatever the parts: along L, along S, one by one."""
    encoder, x = encoder_of("conditional", "separate"), images()
    upper = torch.randn(4, 3, 5, 2, dtype=torch.float64).requires_grad_()
    drawn = torch.tensor([1, 0, 3, 2, 1])

    def flow(base: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return base.sinh(), base.cosh().log().sum(-1)

    def results(n_draws: int) -> list[torch.Tensor]:
        monkeypatch.setattr(encoders, "_ELEMENTS_AT_ONCE", n_draws * 3 * 4 * 6)
        generator = torch.Generator().manual_seed(0)
        results = encoder.draw(encoder.encode(x), upper, drawn, flow=flow, generator=generator)
        assert [tuple(result.shape) for result in results] == [
            (4, 3, 5, 2),
            (4, 3, 5),
            (4, 3, 5, 4),
        ]
        targets = (upper, *encoder.parameters())
        gradients = torch.autograd.grad(sum(result.sin().sum() for result in results), targets)
        return [*results, *gradients]

    whole = results(20)
    for n_draws in (11, 5, 2, 0):
        torch.testing.assert_close(results(n_draws), whole)


@pytest.mark.parametrize("component_encoder", ["separate", "shifted"])
def test_the_lower_level_holds_a_bounded_number_of_hidden_units(component_encoder):
    """200 components drawn from and evaluated: all at once they would be 200 x as many."""
    options = {"n_components": 200, "n_latent": 2, "component_encoder": component_encoder}
    encoder = ConditionalEncoder(TRUNKS["dense"], n_hidden=100, **options)
    x, upper, drawn = torch.zeros(5, 1, 4, 5), torch.zeros(1, 5, 200, 2), torch.arange(200)
    with LargestTensor() as record:
        _, _, log_prob = encoder.draw(
            encoder.encode(x), upper, drawn, flow=lambda base: (base, base.sum(-1)), generator=None
        )
        log_prob.mean().backward()
    assert log_prob.shape == (1, 5, 200, 200)
    assert record.numel <= encoders._ELEMENTS_AT_ONCE < 5 * 200 * 200 * 2 * 100


@pytest.mark.parametrize("component_encoder", ["separate", "shifted"])
def test_own_components_are_those_of_all(component_encoder):
    encoder, x = encoder_of("conditional", component_encoder), images()
    upper = torch.randn(3, 4, 2, dtype=torch.float64)
    everything = encoder(x, upper.unsqueeze(0))
    loc, scale = encoder.own(encoder.encode(x), upper)
    for a in range(4):
        torch.testing.assert_close(loc[:, a], everything.component_loc[0, :, a, a])
        torch.testing.assert_close(scale[:, a], everything.component_scale[0, :, a, a])
