from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mixscvi.mixture import CodedHeads, Encoder, GaussianHeads, ShiftedHeads, StackedMLP
from mixscvi.mixture import heads as heads_file
from tensor_sizes import LargestTensor

assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)


def parameters_of(posterior):
    return posterior.component_loc, posterior.component_scale


def gate(h):
    return F.glu(h, -1)


def naive_head(hidden, heads, component):
    """Mean and scale of one component from its hidden units, `(B, n_hidden)`."""
    loc = hidden @ heads.mean.weight[component].T + heads.mean.bias[component]
    raw = hidden @ heads.var.weight[component].T + heads.var.bias[component]
    return loc, (heads.var_activation(raw) + heads.var_eps).sqrt()


@pytest.mark.parametrize("components", [None, [2, 0]])
def test_heads_are_a_loop(normal, components):
    heads = GaussianHeads(4, 5, 3).double()
    chosen = list(range(4)) if components is None else components
    hidden = normal(7, len(chosen), 5).requires_grad_()
    index = None if components is None else torch.tensor(components)
    actual = torch.stack(parameters_of(heads(hidden, index)))
    expected = torch.stack(
        [torch.stack(naive_head(hidden[:, s], heads, a)) for s, a in enumerate(chosen)], 2
    )
    assert_close(actual, expected)
    assert heads.var_activation is torch.exp and heads.var_eps == 1e-4
    weights = normal(*expected.shape)
    targets = (hidden, *heads.parameters())
    assert_close(
        torch.autograd.grad((weights * actual).sum(), targets),
        torch.autograd.grad((weights * expected).sum(), targets),
    )


@pytest.mark.parametrize("n_sampled", [1, 6])
def test_one_pair_of_heads_serves_all_components(normal, n_sampled):
    heads = GaussianHeads(1, 5, 3, var_activation=F.softplus, var_eps=0.5).double()
    hidden = normal(7, n_sampled, 5).requires_grad_()
    q = heads(hidden)
    assert q.batch_shape == (7,) and q.n_components == n_sampled
    actual = torch.stack(parameters_of(q))
    expected = torch.stack(
        [torch.stack(naive_head(hidden[:, s], heads, 0)) for s in range(n_sampled)], 2
    )
    assert_close(actual, expected)
    weights = normal(*expected.shape)
    targets = (hidden, *heads.parameters())
    assert_close(
        torch.autograd.grad((weights * actual).sum(), targets),
        torch.autograd.grad((weights * expected).sum(), targets),
    )


def test_least_variance(normal):
    heads = GaussianHeads(2, 5, 3, var_eps=0.04).double()
    heads.var.bias.data.fill_(-1000.0)
    assert_close(
        heads(normal(7, 2, 5)).component_scale, torch.full((7, 2, 3), 0.2, dtype=torch.float64)
    )


HEADS = {
    "own": lambda: GaussianHeads(4, 5, 3),
    "own, gated": lambda: GaussianHeads(4, 5, 3, activation=gate),
    "coded": lambda: CodedHeads(4, 5, 3),
    "shifted": lambda: ShiftedHeads(4, 10, 5, 3, activation=gate),
}


@pytest.mark.parametrize("components", [[0, 1, 2, 3], [2, 0], [3]])
@pytest.mark.parametrize("name", HEADS)
def test_an_encoder_of_any_heads_restricts_them(normal, name, components):
    heads = HEADS[name]().double()
    n_out = 10 if "gated" in name or name == "shifted" else 5
    trunk = StackedMLP(1 if heads.share_trunk else 4, 6, n_hidden=n_out, dropout_rate=0.0).double()
    encoder = Encoder(trunk, heads).eval()
    assert encoder.n_components == 4
    x = normal(7, 6)
    whole, some = encoder(x), encoder(x, None, torch.tensor(components))
    for values, expected in zip(parameters_of(some), parameters_of(whole), strict=True):
        assert_close(values, expected[:, components])
    assert not torch.equal(whole.component_loc[:, 0], whole.component_loc[:, 1])


def test_shifted_heads_are_a_loop(normal):
    heads = ShiftedHeads(4, 10, 5, 3, activation=gate, var_activation=F.softplus).double()
    t = normal(7, 1, 10).requires_grad_()
    actual = torch.stack(parameters_of(heads(t)))
    expected = torch.stack(
        [torch.stack(naive_head(gate(t[:, 0] + code), heads, 0)) for code in heads.codes], 2
    )
    assert_close(actual, expected)
    weights, targets = normal(*expected.shape), (t, *heads.parameters())
    assert_close(
        torch.autograd.grad((weights * actual).sum(), targets),
        torch.autograd.grad((weights * expected).sum(), targets),
    )


def test_shifted_heads_of_an_input_for_each_component(normal):
    heads = ShiftedHeads(4, 10, 5, 3, activation=gate).double()
    t = normal(7, 4, 10)
    together = heads(t)
    for a in range(4):
        alone = heads(t[:, a : a + 1], torch.tensor([a]))
        assert_close(together.component_loc[:, a], alone.component_loc[:, 0])


@pytest.mark.parametrize("n_inputs", [1, 5])
@pytest.mark.parametrize("components", [None, [3, 0, 4, 6, 2]])
def test_components_in_parts_are_those_at_once(normal, monkeypatch, n_inputs, components):
    """Values and gradients, of one input for all and of one for each."""
    heads = ShiftedHeads(7 if components else 5, 10, 5, 3, activation=gate).double()
    t = normal(7, n_inputs, 10).requires_grad_()
    index = None if components is None else torch.tensor(components)

    def results(n_components: int) -> list[torch.Tensor]:
        monkeypatch.setattr(heads_file, "_ELEMENTS_AT_ONCE", 7 * 10 * n_components)
        values = parameters_of(heads(t, index))
        assert all(value.shape == (7, 5, 3) for value in values)
        loss = sum(value.sin().sum() for value in values)
        return [*values, *torch.autograd.grad(loss, (t, *heads.parameters()))]

    whole = results(5)
    for n_components in (4, 2, 0):
        assert_close(results(n_components), whole)


def test_memory_is_bounded_however_many_components():
    heads = ShiftedHeads(400, 600, 300, 2, activation=gate)
    t = torch.zeros(100, 1, 600, requires_grad=True)
    with LargestTensor() as record:
        heads(t).component_loc.sum().backward()
    assert record.numel <= heads_file._ELEMENTS_AT_ONCE < 100 * 400 * 600


def test_the_weights_of_a_seed_are_those_that_runs_were_recorded_with():
    """Codes first, then the heads."""
    torch.manual_seed(0)
    heads = ShiftedHeads(3, 8, 4, 2, activation=gate)
    torch.manual_seed(0)
    codes = 0.5 * torch.randn(3, 8)
    plain = GaussianHeads(1, 4, 2)
    assert torch.equal(heads.codes, codes)
    for ours, theirs in zip((heads.mean, heads.var), (plain.mean, plain.var), strict=True):
        assert torch.equal(ours.weight, theirs.weight) and torch.equal(ours.bias, theirs.bias)
