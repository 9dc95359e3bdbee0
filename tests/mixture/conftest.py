from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from mixscvi.mixture import MixturePosterior, StackedMLP


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Modules draw their first parameters from torch's default generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def normal(generator) -> Callable[..., Tensor]:
    """Standard normal numbers of a shape, in double precision."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    return draw


@pytest.fixture
def make_posterior(normal, generator) -> Callable[..., MixturePosterior]:
    """A posterior of random parameters, `(B, A, D)`, that require a gradient."""

    def make(*shape: int, spread: float = 1.0) -> MixturePosterior:
        loc = spread * normal(*shape)
        scale = 0.5 + torch.rand(shape, dtype=torch.float64, generator=generator)
        return MixturePosterior(loc.requires_grad_(), scale.requires_grad_())

    return make


@pytest.fixture
def scramble(generator) -> Callable[[nn.Module], nn.Module]:
    """Give batch norms weights and running statistics that are not those of the start."""

    def apply(module: nn.Module) -> nn.Module:
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d):
                for values in (part.weight, part.bias, part.running_mean, part.running_var):
                    values.data.uniform_(0.5, 1.5, generator=generator)
        return module

    return apply


class ReferenceMLP(nn.Module):
    """One network of a `StackedMLP`: torch's own layers, with its weights copied."""

    def __init__(self, stack: StackedMLP, component: int) -> None:
        super().__init__()
        self.n_covariates, self.inject = stack.n_covariates, stack.inject_covariates
        self.layers, self.linears, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for index, stacked in enumerate(stack.linears):
            linear = nn.Linear(stacked.n_in, stacked.n_out, bias=stacked.bias is not None).double()
            linear.weight.data.copy_(stacked.weight[component])
            if stacked.bias is not None:
                linear.bias.data.copy_(stacked.bias[component])
            self.linears.append(linear)
            layer = nn.Sequential(linear)
            if len(stack.batch_norms):
                own = slice(component * stacked.n_out, (component + 1) * stacked.n_out)
                norm = nn.BatchNorm1d(stacked.n_out, momentum=0.01, eps=0.001).double()
                for name in ("weight", "bias", "running_mean", "running_var"):
                    stacked_values = getattr(stack.batch_norms[index], name)
                    getattr(norm, name).data.copy_(stacked_values[own])
                self.norms.append(norm)
                layer.append(norm)
            if isinstance(stack.layer_norm, nn.LayerNorm):
                layer.append(nn.LayerNorm(stacked.n_out, elementwise_affine=False))
            layer.append(nn.ReLU())
            self.layers.append(layer)
        self.train(stack.training)

    def forward(self, x: Tensor, covariates: Tensor | None = None) -> Tensor:
        for index, layer in enumerate(self.layers):
            if self.n_covariates and (index == 0 or self.inject):
                x = torch.cat((x, covariates), -1)
            x = layer(x)
        return x


@pytest.fixture
def reference_mlp() -> type[ReferenceMLP]:
    return ReferenceMLP
