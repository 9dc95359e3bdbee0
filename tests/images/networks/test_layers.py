import pytest
import torch
import torch.nn.functional as F

from image_runs import of_version_1
from mixscvi.images.networks import layers
from mixscvi.images.networks.layers import ConvTrunk, DenseTrunk, MaskedConv2d, gate
from tensor_sizes import LargestTensor


@pytest.mark.parametrize("kind", ["A", "B"])
@pytest.mark.parametrize("kernel_size", [3, 5, 7])
def test_masked_convolution_is_the_masked_full_kernel(kind, kernel_size):
    torch.manual_seed(0)
    layer = MaskedConv2d(2, 3, kernel_size=kernel_size, kind=kind).double()
    reach = kernel_size // 2
    full = torch.zeros(3, 2, kernel_size, kernel_size, dtype=torch.float64)
    full[:, :, : reach + 1] = (layer.weight * layer.mask).detach()
    assert full[:, :, reach, reach + (kind == "B") :].abs().max() == 0
    x = torch.randn(4, 2, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.conv2d(x, full, layer.bias, padding=reach))


def test_kernel_size_must_be_odd():
    with pytest.raises(ValueError, match="kernel_size must be odd, got 4"):
        MaskedConv2d(1, 1, kernel_size=4, kind="A")


def test_gate():
    h = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(gate(h), h[:, :4] * h[:, 4:].sigmoid())


def test_dense_trunk_against_a_loop():
    torch.manual_seed(0)
    trunk = DenseTrunk(3, (4, 5), hidden=(6, 7)).double()
    x = torch.randn(2, 1, 4, 5, dtype=torch.float64)
    for a, y in enumerate(trunk(x).unbind(1)):
        first, second = trunk.layers
        h = x.flatten(1) @ first.weight[a].T + first.bias[a]
        h = h[:, :6] * h[:, 6:].sigmoid()
        torch.testing.assert_close(y, h @ second.weight[a].T + second.bias[a])


@pytest.mark.parametrize("versions", [True, False])
@pytest.mark.parametrize(
    ("n_components", "image_shape", "hidden"),
    [(3, (4, 5), (6, 7)), (1, (2, 2), (3, 2)), (4, (2, 2), (2, 3))],
    ids=["unequal sizes", "some equal", "all equal"],
)
def test_states_of_earlier_dense_trunks_are_read(n_components, image_shape, hidden, versions):
    torch.manual_seed(0)
    trunk = DenseTrunk(n_components, image_shape, hidden)
    if not versions and n_components == 4:
        pytest.skip("without a version, nothing tells")
    earlier = of_version_1(trunk.state_dict(), versions=versions)
    stored = earlier["layers.0.weight"].clone()
    for state in (earlier, trunk.state_dict(), dict(trunk.state_dict())):
        loaded = DenseTrunk(n_components, image_shape, hidden)
        loaded.load_state_dict(state)
        for ours, theirs in zip(loaded.parameters(), trunk.parameters(), strict=True):
            assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
    assert torch.equal(earlier["layers.0.weight"], stored)  # what is read is left as it is


@pytest.mark.parametrize("image_shape", [(8, 8), (9, 6)])
def test_conv_trunk_against_a_loop(image_shape):
    torch.manual_seed(0)
    trunk = ConvTrunk(3, image_shape, layers=((4, 5, 1), (2, 3, 2))).double()
    x = torch.randn(2, 1, *image_shape, dtype=torch.float64)
    y = trunk(x)
    assert y.shape == (2, 3, 2 * trunk.n_hidden)
    for a in range(3):
        first, second = trunk.layers
        h = F.conv2d(x, first.weight[a], first.bias[a], padding=2)
        h = h[:, :4] * h[:, 4:].sigmoid()
        h = F.conv2d(h, second.weight[a], second.bias[a], stride=2, padding=1)
        torch.testing.assert_close(y[:, a], h.flatten(1))


@pytest.mark.parametrize(
    "trunk",
    [DenseTrunk(4, (4, 5), (6, 7)), ConvTrunk(4, (4, 5), ((3, 3, 1), (2, 3, 2)))],
    ids=["dense", "conv"],
)
def test_some_components_are_those_of_all(trunk):
    x = torch.randn(2, 1, 4, 5)
    components = torch.tensor([3, 1])
    torch.testing.assert_close(trunk(x, components=components), trunk(x)[:, components])


@pytest.mark.parametrize(
    ("make_trunk", "n_units"),
    [
        (lambda: ConvTrunk(4, (4, 5), ((3, 3, 1), (2, 3, 2))), 6 * 4 * 5),  # of twice 3 channels
        (lambda: DenseTrunk(4, (4, 5), (26, 7)), 2 * 26),
    ],
    ids=["conv", "dense"],
)
def test_images_in_parts_are_those_at_once(monkeypatch, make_trunk, n_units):
    torch.manual_seed(0)
    trunk = make_trunk().double()
    assert trunk.n_units == n_units
    x = torch.rand(60, 1, 4, 5, dtype=torch.float64).requires_grad_()

    def results() -> list[torch.Tensor]:
        y = trunk(x)
        return [y, *torch.autograd.grad(y.sin().sum(), (x, *trunk.parameters()))]

    whole = results()
    bound = 25 * 4 * n_units  # 25 images of four components, and more than the weights
    monkeypatch.setattr(layers, "_ELEMENTS_AT_ONCE", bound)
    torch.testing.assert_close(results(), whole)
    with LargestTensor() as record:
        trunk(x)
    assert record.numel <= bound
