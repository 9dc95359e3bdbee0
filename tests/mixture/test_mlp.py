from functools import partial

import pytest
import torch
from torch import nn

from mixscvi.mixture import StackedMLP

assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)

SUBSETS = [[0, 1, 2, 3], [2, 0], [3]]

VARIANTS = {
    "batch norm": {},
    "layer norm": {"use_batch_norm": False, "use_layer_norm": True},
    "both norms": {"use_layer_norm": True},
    "no norm": {"use_batch_norm": False},
    "no bias": {"bias": False},
    "covariates": {"n_covariates": 2},
    "covariates, both norms": {"n_covariates": 2, "use_layer_norm": True},
    "covariates, first layer": {"n_covariates": 2, "inject_covariates": False},
}


@pytest.fixture
def make_mlp(scramble):
    def make(n_components, **options):
        options = {"n_in": 6, "n_hidden": 5, "dropout_rate": 0.0, **options}
        return scramble(StackedMLP(n_components, **options).double())

    return make


def statistics(norm):
    """Running mean and variance, by component."""
    return torch.stack((norm.running_mean, norm.running_var), -1)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("n_components", [1, 3])
def test_stacked_mlp_is_as_many_networks(
    make_mlp, reference_mlp, normal, n_components, variant, n_layers, training
):
    stack = make_mlp(n_components, n_layers=n_layers, **VARIANTS[variant]).train(training)
    singles = [reference_mlp(stack, a) for a in range(n_components)]
    x = normal(7, 6).requires_grad_()
    covariates = normal(7, stack.n_covariates) if stack.n_covariates else None
    for _ in range(2):  # a second step sees the running statistics that the first left
        actual = stack(x, covariates)
        expected = torch.stack([single(x, covariates) for single in singles], 1)
        assert actual.shape == (7, n_components, 5)
        assert_close(actual, expected)
    weights = normal(*expected.shape)
    (by_input,) = torch.autograd.grad((weights * expected).sum(), x, retain_graph=True)
    (weights * expected).sum().backward()
    x.grad = None
    (weights * actual).sum().backward()
    assert_close(x.grad, by_input)
    for layer, linear in enumerate(stack.linears):
        own = [single.linears[layer] for single in singles]
        assert_close(linear.weight.grad, torch.stack([part.weight.grad for part in own]))
        if linear.bias is not None:
            assert_close(linear.bias.grad, torch.stack([part.bias.grad for part in own]))
    for layer, norm in enumerate(stack.batch_norms):
        own = [single.norms[layer] for single in singles]
        assert_close(norm.weight.grad, torch.cat([part.weight.grad for part in own]))
        assert_close(norm.bias.grad, torch.cat([part.bias.grad for part in own]))
        assert_close(statistics(norm), torch.cat([statistics(part) for part in own]))
        assert norm.num_batches_tracked == own[0].num_batches_tracked == 2 * training


@pytest.mark.parametrize("components", SUBSETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_components_of_stacked_mlp_in_evaluation(make_mlp, normal, variant, components):
    stack = make_mlp(4, n_layers=2, **VARIANTS[variant]).eval()
    x = normal(7, 6)
    covariates = normal(7, stack.n_covariates) if stack.n_covariates else None
    before = {name: value.clone() for name, value in stack.state_dict().items()}
    actual = stack(x, covariates, torch.tensor(components))
    assert_close(actual, stack(x, covariates)[:, components])
    assert all(torch.equal(value, before[name]) for name, value in stack.state_dict().items())


@pytest.mark.parametrize("components", SUBSETS)
@pytest.mark.parametrize("n_layers", [1, 3])
def test_components_of_stacked_mlp_in_training(
    make_mlp, reference_mlp, normal, n_layers, components
):
    """Batch norm takes and leaves the statistics of the components that run, and only those."""
    stack = make_mlp(4, n_layers=n_layers, use_layer_norm=True).train()
    singles = [reference_mlp(stack, a) for a in range(4)]
    before = [statistics(norm).clone().view(4, 5, 2) for norm in stack.batch_norms]
    for _ in range(3):
        x = normal(7, 6)
        actual = stack(x, components=torch.tensor(components))
        expected = torch.stack([singles[a](x) for a in components], 1)
        assert_close(actual, expected)
    weights = normal(*expected.shape)
    (weights * actual).sum().backward()
    (weights * expected).sum().backward()
    for layer, norm in enumerate(stack.batch_norms):
        after = statistics(norm).view(4, 5, 2)
        assert norm.num_batches_tracked == 3
        weight_grad, bias_grad = norm.weight.grad.view(4, 5), norm.bias.grad.view(4, 5)
        for a in range(4):
            own = singles[a].norms[layer]
            assert_close(after[a], statistics(own))
            if a in components:
                assert not torch.isclose(after[a], before[layer][a], rtol=0, atol=1e-5).all()
                assert_close(weight_grad[a], own.weight.grad)
                assert_close(bias_grad[a], own.bias.grad)
                assert_close(
                    stack.linears[layer].weight.grad[a], singles[a].linears[layer].weight.grad
                )
            else:
                assert torch.equal(after[a], before[layer][a])
                assert not weight_grad[a].any() and not bias_grad[a].any()
                assert not stack.linears[layer].weight.grad[a].any()


def test_a_subset_and_the_whole_leave_the_same_statistics(make_mlp, normal):
    whole, parts = make_mlp(4).train(), make_mlp(4).train()
    parts.load_state_dict(whole.state_dict())
    x = normal(7, 6)
    whole(x)
    for components in ([2, 0], [1, 3]):
        parts(x, components=torch.tensor(components))
    assert_close(statistics(whole.batch_norms[0]), statistics(parts.batch_norms[0]))


def test_another_activation(make_mlp, normal):
    stack = make_mlp(2, use_batch_norm=False, activation=nn.Tanh)
    x = normal(7, 6)
    assert_close(stack(x), stack.linears[0](x).tanh())


@pytest.mark.parametrize("n_layers", [1, 2])
def test_dropout_masks_differ_between_components(n_layers):
    stack = StackedMLP(
        3, 4, n_hidden=400, n_layers=n_layers, dropout_rate=0.25, use_batch_norm=False
    ).double()
    for parameter in stack.parameters():
        parameter.data.zero_()
    stack.linears[-1].bias.data.fill_(3.0)
    hidden = stack(torch.zeros(50, 4).double())
    dropped = hidden == 0
    # What remains is scaled up; each component drops its own quarter, independently of the others.
    assert_close(hidden[~dropped], torch.full_like(hidden[~dropped], 3.0 / 0.75))
    shares = dropped.double().mean((0, 2))
    torch.testing.assert_close(shares, torch.full((3,), 0.25).double(), rtol=0, atol=0.02)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        both = (dropped[:, a] & dropped[:, b]).double().mean().item()
        assert both == pytest.approx(0.25**2, abs=0.01)
    assert not (stack.eval()(torch.zeros(50, 4).double()) == 0).any()


@pytest.mark.parametrize(
    ("options", "injected"),
    [
        ({}, [False, False]),
        ({"n_covariates": 2}, [True, True]),
        ({"n_covariates": 2, "inject_covariates": False}, [True, False]),
    ],
)
def test_injects_into(options, injected):
    stack = StackedMLP(2, 6, n_hidden=5, n_layers=2, **options)
    assert [stack.injects_into(layer) for layer in range(2)] == injected
    widths = [linear.n_in for linear in stack.linears]
    assert widths == [6 + 2 * injected[0], 5 + 2 * injected[1]]


def test_covariates_move_the_networks_only_where_they_enter(make_mlp, normal):
    x, covariates = normal(7, 6), normal(7, 2).requires_grad_()
    stack = make_mlp(2, n_layers=2, n_covariates=2, activation=nn.Tanh).eval()
    (gradient,) = torch.autograd.grad(stack(x, covariates).sum(), covariates)
    assert (gradient != 0).all()
    stack.linears[0].weight.data[..., -2:] = 0
    (gradient,) = torch.autograd.grad(stack(x, covariates).sum(), covariates)
    assert (gradient != 0).all()
    stack.linears[1].weight.data[..., -2:] = 0
    (gradient,) = torch.autograd.grad(stack(x, covariates).sum(), covariates)
    assert not gradient.any()


@pytest.mark.parametrize("freeze_first_layer", [True, False])
@pytest.mark.parametrize("inject_covariates", [True, False])
def test_train_covariates_only(make_mlp, normal, inject_covariates, freeze_first_layer):
    stack, free = (
        make_mlp(
            3, n_layers=2, n_covariates=2, inject_covariates=inject_covariates, activation=nn.Tanh
        )
        for _ in range(2)
    )
    free.load_state_dict(stack.state_dict())
    stack.train_covariates_only(freeze_first_layer=freeze_first_layer)
    x, covariates, weights = normal(7, 6), normal(7, 2), normal(7, 3, 5)
    for network in (stack, free):
        (weights * network.eval()(x, covariates)).sum().backward()
    for layer, (linear, reference) in enumerate(zip(stack.linears, free.linears, strict=True)):
        if layer == 0 and not freeze_first_layer:
            assert_close(linear.weight.grad, reference.weight.grad)
            assert_close(linear.bias.grad, reference.bias.grad)
        elif stack.injects_into(layer):
            assert_close(linear.weight.grad[..., -2:], reference.weight.grad[..., -2:])
            assert linear.weight.grad[..., -2:].all() and not linear.weight.grad[..., :-2].any()
            assert linear.bias.grad is None
        else:
            assert linear.weight.grad is None and linear.bias.grad is None
    assert all(parameter.grad is None for parameter in stack.batch_norms.parameters())


def test_state_dict_round_trip(make_mlp, normal):
    stack, other = (make_mlp(3, n_layers=2, n_covariates=2) for _ in range(2))
    x, covariates = normal(7, 6), normal(7, 2)
    stack(x, covariates)
    other.load_state_dict(stack.state_dict())
    assert torch.equal(other.eval()(x, covariates), stack.eval()(x, covariates))


def test_missing_covariates(make_mlp, normal):
    with pytest.raises(ValueError, match=r"covariates must have shape \(B, 2\), got None"):
        make_mlp(3, n_covariates=2)(normal(7, 6))


def test_a_subset_needs_torch_batch_norm(make_mlp, normal):
    stack = make_mlp(3)
    stack.batch_norms[0] = nn.SyncBatchNorm(15).double().eval()
    assert stack.eval()(normal(7, 6)).shape == (7, 3, 5)
    with pytest.raises(TypeError, match="BatchNorm1d.*got SyncBatchNorm"):
        stack(normal(7, 6), components=torch.tensor([1]))
