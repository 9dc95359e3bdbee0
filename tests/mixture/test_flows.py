from functools import partial

import pytest
import torch
from torch.distributions import TransformedDistribution
from zuko.flows import MaskedAutoregressiveTransform

from mixscvi.mixture import InverseAutoregressiveFlow

assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)

SIZES = [(1, 1), (1, 2), (2, 1), (3, 2), (4, 3)]


def make_flow(n_latent, n_steps):
    return InverseAutoregressiveFlow(n_latent, n_steps, hidden_features=(16, 16)).double()


def jacobian(function, points):
    """Jacobian of a function of single points, `(n, D, D)`."""
    return torch.stack([torch.autograd.functional.jacobian(function, point) for point in points])


@pytest.mark.parametrize(("n_latent", "n_steps"), SIZES)
def test_log_det_is_that_of_the_jacobian(normal, n_latent, n_steps):
    flow = make_flow(n_latent, n_steps)
    z0 = normal(6, n_latent)
    z, log_det = flow(z0)
    assert z.shape == (6, n_latent) and log_det.shape == (6,)
    slopes = jacobian(lambda point: flow(point)[0], z0)
    assert_close(log_det, torch.linalg.slogdet(slopes).logabsdet)
    assert log_det.abs().min() > 1e-4  # no volume-preserving map would pass


@pytest.mark.parametrize(("n_latent", "n_steps"), SIZES)
def test_inverse_round_trip(normal, n_latent, n_steps):
    flow = make_flow(n_latent, n_steps)
    z0 = 2 * normal(6, n_latent)
    z, log_det = flow(z0)
    assert (z - z0).abs().max() > 1e-3
    back, log_det_at_back = flow.inverse(z)
    assert_close(back, z0)
    assert_close(log_det_at_back, log_det)
    forth, _ = flow(flow.inverse(z0)[0])
    assert_close(forth, z0)
    slopes = jacobian(lambda point: flow.inverse(point)[0], z)
    assert_close(-torch.linalg.slogdet(slopes).logabsdet, log_det)


@pytest.mark.parametrize(("n_latent", "n_steps"), SIZES)
def test_leading_axes_are_a_batch(normal, n_latent, n_steps):
    flow = make_flow(n_latent, n_steps)
    z0 = normal(2, 3, 4, n_latent)
    for function in (flow, flow.inverse):
        z, log_det = function(z0)
        flat, flat_log_det = function(z0.flatten(0, 2))
        assert_close(z, flat.view_as(z0))
        assert_close(log_det, flat_log_det.view(2, 3, 4))


@pytest.mark.parametrize(("n_latent", "n_steps"), SIZES)
def test_gradient_reaches_every_parameter(normal, n_latent, n_steps):
    flow = make_flow(n_latent, n_steps)
    z0 = normal(20, n_latent).requires_grad_()
    z, log_det = flow(z0)
    (z.square().sum() + log_det.sum()).backward()
    assert z0.grad.abs().min() > 0
    for name, parameter in flow.named_parameters():
        assert parameter.grad is not None, name
        # The one dimension of D = 1 depends on no other: its weights are masked, its bias is not.
        if n_latent > 1 or name.endswith("bias"):
            assert parameter.grad.any() or n_latent == 1, name


def test_orders_alternate(normal):
    """Step 1 looks at the dimensions before, step 2 at those after, step 3 as step 1."""
    flow = InverseAutoregressiveFlow(4, 3, hidden_features=(64, 64)).double()
    lower = torch.ones(4, 4).tril().bool()
    for index, step in enumerate(flow.steps):
        depends = (jacobian(step(), normal(20, 4)).abs() > 1e-12).any(0)
        assert torch.equal(depends, lower.T if index % 2 else lower)
    everything = jacobian(lambda point: flow(point)[0], normal(5, 4)).abs() > 1e-12
    assert everything.any(0).all()


def test_steps_are_composed_in_order(normal):
    flow = make_flow(3, 2)
    z0 = normal(5, 3)
    first, second = (step() for step in flow.steps)
    z, log_det = flow(z0)
    between = first(z0)
    assert_close(z, second(between))
    assert_close(
        log_det,
        first.log_abs_det_jacobian(z0, between) + second.log_abs_det_jacobian(between, z),
    )


@pytest.mark.parametrize("n_steps", [1, 2])
def test_density_integrates_to_one(make_posterior, n_steps):
    q0 = make_posterior(2, 2)
    flow = make_flow(2, n_steps)
    axis = torch.linspace(-15, 15, 301, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    z0, log_det = flow.inverse(grid)
    log_prob = (q0.log_prob(z0) - log_det).detach()
    total = log_prob.exp().sum().item() * (axis[1] - axis[0]).item() ** 2
    assert total == pytest.approx(1.0, abs=1e-4)
    q = TransformedDistribution(q0, [flow.transform])
    assert_close(q.log_prob(grid).detach(), log_prob)


def test_state_dict_round_trip(normal):
    flow, other = make_flow(3, 2), make_flow(3, 2)
    z0 = normal(5, 3)
    assert not torch.allclose(other(z0)[0], flow(z0)[0])
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other(z0)[0], flow(z0)[0])


@pytest.mark.parametrize(("n_latent", "n_steps"), SIZES)
def test_weights_and_names_are_those_of_saved_models(n_latent, n_steps):
    """Runs were recorded with steps that were made one by one."""
    torch.manual_seed(0)
    state = InverseAutoregressiveFlow(n_latent, n_steps, hidden_features=(7, 5)).state_dict()
    torch.manual_seed(0)
    expected = {}
    for step in range(n_steps):
        order = torch.arange(n_latent)
        made = MaskedAutoregressiveTransform(
            n_latent, order=order.flip(0) if step % 2 else order, hidden_features=(7, 5)
        )
        expected |= {f"steps.{step}.{name}": value for name, value in made.state_dict().items()}
    assert [*state] == [*expected]
    assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_hidden_features():
    flow = InverseAutoregressiveFlow(3, 2, hidden_features=(7, 11))
    assert len(flow.steps) == 2
    widths = {parameter.shape[0] for parameter in flow.steps[0].parameters()}
    assert widths == {7, 11, 6}


@pytest.mark.parametrize("n_steps", [0, -1])
def test_a_flow_needs_a_step(n_steps):
    with pytest.raises(ValueError, match=f"n_steps must be at least 1, got {n_steps}"):
        InverseAutoregressiveFlow(3, n_steps)
