import math
from functools import partial

import pytest
import scipy.stats
import torch
from torch import nn

from mixscvi.mixture import StackedConv2d, StackedLinear, nonzeros
from mixscvi.mixture.layers import LinearByFeature

assert_close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-11)

SUBSETS = [[0, 1, 2, 3], [2, 0], [3]]


def copied(layer, reference, component):
    """Torch's layer with one component's weights, in double precision."""
    reference = reference.double()
    reference.weight.data.copy_(layer.weight[component])
    if reference.bias is not None:
        reference.bias.data.copy_(layer.bias[component])
    return reference


def input_of(x, component, own_input):
    return x[:, component] if own_input else x


# Linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("own_input", [False, True])
@pytest.mark.parametrize("n_components", [1, 4])
def test_stacked_linear_is_as_many_linears(normal, n_components, own_input, bias):
    layer = StackedLinear(n_components, 3, 5, bias=bias).double()
    singles = [
        copied(layer, nn.Linear(3, 5, bias=bias), component) for component in range(n_components)
    ]
    shape = (7, n_components, 3) if own_input else (7, 3)
    x = normal(*shape).requires_grad_()
    actual = layer(x)
    expected = torch.stack(
        [single(input_of(x, a, own_input)) for a, single in enumerate(singles)], 1
    )
    assert_close(actual, expected)
    weights = normal(*expected.shape)
    (by_input,) = torch.autograd.grad((weights * expected).sum(), x, retain_graph=True)
    (weights * expected).sum().backward()
    x.grad = None
    (weights * actual).sum().backward()
    assert_close(x.grad, by_input)
    assert_close(layer.weight.grad, torch.stack([single.weight.grad for single in singles]))
    if bias:
        assert_close(layer.bias.grad, torch.stack([single.bias.grad for single in singles]))
    else:
        assert layer.bias is None


@pytest.mark.parametrize("components", [*SUBSETS, [1, 1]])
@pytest.mark.parametrize("bias", [True, False])
def test_components_of_stacked_linear(normal, components, bias):
    layer = StackedLinear(4, 3, 5, bias=bias).double()
    index = torch.tensor(components)
    for x in (normal(7, 3), normal(7, 4, 3)):
        own = x if x.dim() == 2 else x[:, components]
        assert_close(layer(own, index), layer(x)[:, components])
    layer(normal(7, 3), index).square().sum().backward()
    reached = layer.weight.grad.flatten(1).abs().sum(1) > 0
    assert reached.tolist() == [a in components for a in range(4)]


def test_stacked_linear_starts_as_linear_does():
    layer, single = StackedLinear(20, 64, 32), nn.Linear(64, 640)
    for ours, torchs in ((layer.weight, single.weight), (layer.bias, single.bias)):
        assert ours.abs().max() <= 1 / math.sqrt(64)
        samples = ours.detach().flatten().numpy(), torchs.detach().flatten().numpy()
        assert scipy.stats.ks_2samp(*samples).pvalue > 1e-3
    assert not torch.equal(layer.weight[0], layer.weight[1])
    before = layer.weight.clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


# Linear with an input that is mostly zero


def a_share_of(x, share):
    """The entries of x but for a share of them, which are zero."""
    return x * (torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < share)


@pytest.mark.parametrize("components", [None, [2, 0], [3]])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("share", "n_out"), [(0.1, 700), (0.0, 700), (0.9, 700), (0.1, 50), (0.1, 5)], ids=str
)
def test_weights_by_feature_are_those_in_another_order(
    normal, share, n_out, bias, components, monkeypatch
):
    monkeypatch.setattr(nonzeros, "_LEAST_WORK", 0)
    torch.manual_seed(0)
    reference = StackedLinear(4, 30, n_out, bias=bias).double()
    torch.manual_seed(0)
    layer = StackedLinear(4, 30, n_out, bias=bias, by_feature=True).double()
    assert torch.equal(layer.weight, reference.weight)
    assert layer.weight.permute(2, 0, 1).is_contiguous()
    x, weights = a_share_of(normal(8, 30), share), normal(n_out)
    x[0] = 0  # whatever the share, a row without any non-zero is among them
    index = None if components is None else torch.tensor(components)
    results = []
    for module in (reference, layer):
        results.append(module(x, index))
        (results[-1].square() * weights).sum().backward()
    assert_close(*results)
    own = normal(8, 4 if components is None else len(components), 30)
    assert_close(layer(own, index), reference(own, index))
    assert_close(layer.weight.grad, reference.weight.grad)
    if bias:
        assert_close(layer.bias.grad, reference.bias.grad)
    if components is None:  # an optimizer finds both in one order
        assert layer.weight.grad.stride() == layer.weight.stride()


def test_a_linear_layer_by_feature_is_the_layer(normal, monkeypatch):
    monkeypatch.setattr(nonzeros, "_LEAST_WORK", 0)
    reference = torch.nn.Linear(30, 50).double()
    layer = LinearByFeature(reference)
    assert isinstance(layer, torch.nn.Linear)
    x = a_share_of(normal(8, 30), 0.1)
    for module in (reference, layer):
        module(x).square().sum().backward()
    assert_close(layer(x), reference(x))
    assert layer(normal(2, 8, 30)).shape == (2, 8, 50)
    assert_close(layer.weight.grad, reference.weight.grad)
    assert layer.weight.grad.stride() == layer.weight.stride() == (1, 50)
    assert list(layer.state_dict()) == list(reference.state_dict())


def test_inputs_of_weights_by_feature_can_have_a_gradient(normal):
    layer = StackedLinear(4, 30, 700, by_feature=True).double()
    x = a_share_of(normal(8, 30), 0.1).requires_grad_()
    torch.autograd.gradcheck(lambda x: layer(x).square().sum(-1), x)


# Convolution

CONVOLUTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 2, "padding": 2, "dilation": 3},
    {"kernel_size": 1, "stride": 3},
]


@pytest.mark.parametrize("sizes", CONVOLUTIONS)
@pytest.mark.parametrize("own_input", [False, True])
@pytest.mark.parametrize("n_components", [1, 4])
@pytest.mark.parametrize("n_in", [1, 2])
def test_stacked_conv2d_is_as_many_convolutions(normal, n_in, n_components, own_input, sizes):
    layer = StackedConv2d(n_components, n_in, 3, **sizes).double()
    singles = [
        copied(layer, nn.Conv2d(n_in, 3, **sizes), component) for component in range(n_components)
    ]
    shape = (5, n_components, n_in, 7, 6) if own_input else (5, n_in, 7, 6)
    x = normal(*shape).requires_grad_()
    actual = layer(x)
    expected = torch.stack(
        [single(input_of(x, a, own_input)) for a, single in enumerate(singles)], 1
    )
    assert_close(actual, expected)
    weights = normal(*expected.shape)
    (by_input,) = torch.autograd.grad((weights * expected).sum(), x, retain_graph=True)
    (weights * expected).sum().backward()
    x.grad = None
    (weights * actual).sum().backward()
    assert_close(x.grad, by_input)
    assert_close(layer.weight.grad, torch.stack([single.weight.grad for single in singles]))
    assert_close(layer.bias.grad, torch.stack([single.bias.grad for single in singles]))


@pytest.mark.parametrize("components", [None, [2, 0]])
def test_stacked_conv2d_of_one_channel_is_the_same_whether_it_is_learned(normal, components):
    """Products with patches, for learned images, and convolutions are the same function."""
    layer = StackedConv2d(4, 1, 3, kernel_size=3, stride=2, padding=1).double()
    index = None if components is None else torch.tensor(components)
    x = normal(5, 1, 7, 6)
    assert_close(layer(x.clone().requires_grad_(), index), layer(x, index))


@pytest.mark.parametrize("components", [*SUBSETS, [1, 1]])
def test_components_of_stacked_conv2d(normal, components):
    layer = StackedConv2d(4, 2, 3, kernel_size=3, padding=1).double()
    index = torch.tensor(components)
    for x in (normal(5, 2, 7, 6), normal(5, 4, 2, 7, 6)):
        own = x if x.dim() == 4 else x[:, components]
        assert_close(layer(own, index), layer(x)[:, components])
    layer(normal(5, 2, 7, 6), index).square().sum().backward()
    for parameter in layer.parameters():
        reached = parameter.grad.flatten(1).abs().sum(1) > 0
        assert reached.tolist() == [a in components for a in range(4)]


def test_stacked_conv2d_starts_as_conv2d_does():
    layer, single = StackedConv2d(20, 4, 8, kernel_size=3), nn.Conv2d(4, 160, 3)
    for ours, torchs in ((layer.weight, single.weight), (layer.bias, single.bias)):
        assert ours.abs().max() <= 1 / math.sqrt(4 * 9)
        samples = ours.detach().flatten().numpy(), torchs.detach().flatten().numpy()
        assert scipy.stats.ks_2samp(*samples).pvalue > 1e-3


def test_reprs():
    linear = StackedLinear(3, 5, 2, bias=False)
    assert repr(linear) == "StackedLinear(n_components=3, n_in=5, n_out=2, bias=False)"
    conv = StackedConv2d(3, 1, 8, kernel_size=3, stride=2)
    assert repr(conv) == (
        "StackedConv2d(n_components=3, in_channels=1, out_channels=8, kernel_size=3, stride=2)"
    )
