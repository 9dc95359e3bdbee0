from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixscvi.mixture import AmortizedEncoder, MixturePosterior, SeparateEncoder
from tensor_sizes import LargestTensor

assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)

ENCODERS = [SeparateEncoder, AmortizedEncoder]
VARIANTS = {
    "plain": {},
    "both norms": {"use_layer_norm": True},
    "no norm": {"use_batch_norm": False},
    "covariates": {"n_covariates": 2},
    "covariates, first layer": {"n_covariates": 2, "inject_covariates": False},
    "softplus": {"var_activation": F.softplus, "var_eps": 0.01},
}


@pytest.fixture
def make_encoder(scramble):
    def make(kind, n_components=4, **options):
        sizes = {"n_in": 6, "n_latent": 3, "n_hidden": 5, "dropout_rate": 0.0}
        return scramble(kind(n_components, **{**sizes, **options}).double())

    return make


def inputs_of(encoder, normal):
    n_covariates = encoder.trunk.n_covariates
    return normal(7, 6), normal(7, n_covariates) if n_covariates else None


def parameters_of(posterior):
    return posterior.component_loc, posterior.component_scale


def indexed(posterior, components):
    return [values[:, components] for values in parameters_of(posterior)]


def naive_head(hidden, heads, component):
    """Mean and scale of one component from its hidden units, `(B, n_hidden)`."""
    loc = hidden @ heads.mean.weight[component].T + heads.mean.bias[component]
    raw = hidden @ heads.var.weight[component].T + heads.var.bias[component]
    return loc, (heads.var_activation(raw) + heads.var_eps).sqrt()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_separate_encoder_is_a_loop(
    make_encoder, reference_mlp, normal, variant, n_layers, training
):
    encoder = make_encoder(SeparateEncoder, n_layers=n_layers, **VARIANTS[variant])
    encoder.train(training)
    trunks = [reference_mlp(encoder.trunk, a) for a in range(4)]
    x, covariates = inputs_of(encoder, normal)
    actual = torch.stack(parameters_of(encoder(x, covariates)))
    expected = torch.stack(
        [torch.stack(naive_head(trunks[a](x, covariates), encoder.heads, a)) for a in range(4)], 2
    )
    assert actual.shape == (2, 7, 4, 3)
    assert_close(actual, expected)
    weights = normal(*expected.shape)
    heads = list(encoder.heads.parameters())
    by_heads = torch.autograd.grad((weights * expected).sum(), heads, retain_graph=True)
    (weights * expected).sum().backward()
    encoder.zero_grad()
    (weights * actual).sum().backward()
    assert_close([parameter.grad for parameter in heads], list(by_heads))
    for layer, linear in enumerate(encoder.trunk.linears):
        own = [trunk.linears[layer] for trunk in trunks]
        assert_close(linear.weight.grad, torch.stack([part.weight.grad for part in own]))
        assert_close(linear.bias.grad, torch.stack([part.bias.grad for part in own]))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("n_layers", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_amortized_encoder_is_a_loop(
    make_encoder, reference_mlp, normal, variant, n_layers, training
):
    encoder = make_encoder(AmortizedEncoder, n_layers=n_layers, **VARIANTS[variant])
    encoder.train(training)
    trunk = reference_mlp(encoder.trunk, 0)
    x, covariates = inputs_of(encoder, normal)
    actual = torch.stack(parameters_of(encoder(x, covariates)))
    heads = encoder.heads
    hidden = trunk(x, covariates)
    modes = heads.modes.weight.view(heads.n_modes, 6, 5)
    expected = []
    for a in range(4):
        weight = heads.base.weight + sum(heads.codes[a, r] * modes[r] for r in range(heads.n_modes))
        raw = hidden @ weight.T + heads.base.bias + heads.offsets[a]
        scale = (heads.var_activation(raw[:, 3:]) + heads.var_eps).sqrt()
        expected.append(torch.stack((raw[:, :3], scale)))
    expected = torch.stack(expected, 2)
    assert actual.shape == (2, 7, 4, 3)
    assert_close(actual, expected)
    weights = normal(*expected.shape)
    shared = list(heads.parameters())
    by_shared = torch.autograd.grad((weights * expected).sum(), shared, retain_graph=True)
    (weights * expected).sum().backward()
    encoder.zero_grad()
    (weights * actual).sum().backward()
    assert_close([parameter.grad for parameter in shared], list(by_shared))
    for linear, single in zip(encoder.trunk.linears, trunk.linears, strict=True):
        assert_close(linear.weight.grad[0], single.weight.grad)
        # A batch norm takes a shift of its input away: compare on the scale of the others.
        torch.testing.assert_close(linear.bias.grad[0], single.bias.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("components", [[0, 1, 2, 3], [2, 0], [3]])
def test_components_in_evaluation(make_encoder, normal, kind, variant, components):
    encoder = make_encoder(kind, n_layers=2, **VARIANTS[variant]).eval()
    x, covariates = inputs_of(encoder, normal)
    whole = encoder(x, covariates)
    some = encoder(x, covariates, torch.tensor(components))
    assert isinstance(some, MixturePosterior)
    assert_close(list(parameters_of(some)), indexed(whole, components))


@pytest.mark.parametrize("kind", ENCODERS)
def test_components_in_training(make_encoder, normal, kind):
    """The batch norm of one component never looks at the others."""
    encoder = make_encoder(kind, n_layers=2).train()
    x, _ = inputs_of(encoder, normal)
    some = encoder(x, components=torch.tensor([2, 0]))
    assert_close(list(parameters_of(some)), indexed(encoder(x), [2, 0]))


def test_components_of_separate_encoder_leave_the_other_statistics(make_encoder, normal):
    encoder = make_encoder(SeparateEncoder).train()
    norm = encoder.trunk.batch_norms[0]
    before = norm.running_mean.clone().view(4, 5)
    encoder(normal(7, 6), components=torch.tensor([2, 0]))
    changed = (norm.running_mean.view(4, 5) != before).any(1)
    assert changed.tolist() == [True, False, True, False]


@pytest.mark.parametrize("kind", ENCODERS)
def test_gradient_reaches_what_ran_and_nothing_else(make_encoder, normal, kind):
    encoder = make_encoder(kind, n_layers=2, use_batch_norm=False, activation=nn.Tanh)
    q = encoder(normal(7, 6), components=torch.tensor([2, 0]))
    q.log_prob(normal(7, 3)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        reached = parameter.grad.reshape(len(parameter), -1).abs().sum(1) > 0
        expected = [True, False, True, False] if len(parameter) == 4 else [True] * len(parameter)
        assert reached.tolist() == expected, name


def test_codes_survive_batch_norm_when_one_component_runs(make_encoder, normal):
    encoder = make_encoder(AmortizedEncoder).train()
    x = normal(7, 6)
    first, second = (encoder(x, components=torch.tensor([a])).component_loc for a in (0, 1))
    assert (first - second).abs().max() > 1e-3


@pytest.mark.parametrize("code_scale", [0.0, 0.5, 3.0])
def test_code_scale_sets_how_far_components_begin_apart(make_encoder, normal, code_scale):
    encoder = AmortizedEncoder(300, 6, 3, n_hidden=5, code_scale=code_scale).double()
    codes = encoder.heads.codes
    assert codes.shape == (300, 16)
    assert codes.square().sum(1).mean().sqrt().item() == pytest.approx(code_scale, rel=0.1)
    spread = encoder(normal(7, 6)).component_loc.std(1)
    assert (spread > 0.01 * code_scale).all() if code_scale else (spread < 1e-12).all()


def test_dropout_masks_differ_between_separate_components(make_encoder, normal):
    encoder = make_encoder(SeparateEncoder, n_hidden=200, dropout_rate=0.5, use_batch_norm=False)
    for parameter in encoder.parameters():
        parameter.data[:] = parameter.data[:1].clone()  # all components alike
    x = normal(7, 6)
    loc = encoder.train()(x).component_loc
    for a in range(1, 4):
        assert (loc[:, 0] - loc[:, a]).abs().min() > 1e-6
    loc = encoder.eval()(x).component_loc
    assert_close(loc, loc[:, :1].expand_as(loc))


@pytest.mark.parametrize("kind", ENCODERS)
def test_missing_covariates(make_encoder, normal, kind):
    encoder = make_encoder(kind, n_covariates=2)
    with pytest.raises(ValueError, match=r"covariates must have shape \(B, 2\), got None"):
        encoder(normal(7, 6))


@pytest.mark.parametrize("kind", ENCODERS)
def test_state_dict_round_trip(make_encoder, normal, kind):
    encoder, other = (make_encoder(kind) for _ in range(2))
    x = normal(7, 6)
    encoder(x)
    other.load_state_dict(encoder.state_dict())
    assert_close(
        list(parameters_of(other.eval()(x))), list(parameters_of(encoder.eval()(x))), rtol=0, atol=0
    )


# Cost


@pytest.mark.parametrize("kind", ENCODERS)
def test_one_of_many_components_costs_one(kind):
    n_batch, n_in, n_hidden, n_components = 8, 20, 16, 400
    encoder = kind(n_components, n_in, 2, n_hidden=n_hidden).double()
    x = torch.ones(n_batch, n_in).double()
    with LargestTensor() as forward:
        q = encoder(x, components=torch.tensor([399]))
    assert q.component_loc.shape == q.component_scale.shape == (n_batch, 1, 2)
    # Nothing has both B and A in its shape. A separate component's batch norm writes into the
    # buffers of all; an amortized one sees A nowhere.
    one = n_hidden * 16 * 4
    assert forward.numel <= (one if kind is AmortizedEncoder else n_components * n_hidden)
    with LargestTensor() as backward:
        q.component_loc.sum().backward()
    if kind is AmortizedEncoder:
        assert backward.numel <= n_components * n_hidden  # the gradient of the codes
    with LargestTensor() as whole:
        encoder(x)
    per_component = 4 if kind is AmortizedEncoder else n_hidden  # 2 D, whatever the width
    assert whole.numel >= n_batch * n_components * per_component
    if kind is AmortizedEncoder:
        assert whole.numel < n_batch * n_components * n_hidden
