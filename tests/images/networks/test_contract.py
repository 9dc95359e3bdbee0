"""Every combination of parts must pass this one test."""

import io
import itertools

import pytest
import torch

from mixscvi.images.networks.configs import MixtureConfig, ModelConfig, Sizes
from mixscvi.images.networks.vae import ImageVAE
from mixscvi.mixture import miselbo

TINY = Sizes(
    n_latent=2,
    hidden=(5, 4),
    conv_layers=((3, 3, 2), (2, 3, 1)),
    n_prior_components=3,
    flow_hidden=(6,),
    pixelcnn_layers=2,
    pixelcnn_channels=3,
)
PARTS = [
    ModelConfig(*choices)
    for choices in itertools.product(
        ["dense", "conv"], [0, 2], [1, 2], ["normal", "mog", "vamp"], ["bernoulli", "pixelcnn"]
    )
]
MIXTURES = [
    MixtureConfig(3, 3 if estimator == "all_to_all" else 2, estimator, component_encoder)
    for estimator in ("all_to_all", "some_to_all", "some_to_some")
    for component_encoder in ("separate", "shifted")
]


def name(parts: ModelConfig) -> str:
    return "-".join(str(choice) for choice in vars(parts).values())


def loss_of(model: ImageVAE, x: torch.Tensor, components: torch.Tensor | None) -> torch.Tensor:
    draws = model.draw(x, 1, components, generator=torch.Generator().manual_seed(2))
    return -miselbo(model.log_weights(x, draws, beta=0.5)).mean()


@pytest.mark.parametrize(
    "mixture", MIXTURES, ids=lambda mixture: f"{mixture.estimator}-{mixture.component_encoder}"
)
@pytest.mark.parametrize("parts", PARTS, ids=name)
def test_contract(parts, mixture):
    def make(seed: int) -> ImageVAE:
        torch.manual_seed(seed)
        return ImageVAE((6, 5), parts, mixture, TINY)

    model = make(0)
    x = torch.rand(3, 1, 6, 5, generator=torch.Generator().manual_seed(1)).round()
    components = model.choose(torch.Generator().manual_seed(0))
    loss = loss_of(model, x, components)
    assert loss.isfinite()

    # Over all choices of a step, gradients reach every parameter.
    subsets = [None]
    if components is not None:
        subsets = [torch.tensor(pair) for pair in ([0, 1], [2, 0])]
    sum(loss_of(model, x, subset) for subset in subsets).backward()
    missed = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert missed == []
    assert all(p.grad.isfinite().all() for p in model.parameters())

    same, other = loss_of(make(0), x, components), loss_of(make(1), x, components)
    assert torch.equal(same, loss) and not torch.equal(other, loss)

    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = make(1)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(loss_of(loaded, x, components), loss)

    with torch.no_grad():
        n_draws = model.importance_draws(x, 4)
        assert n_draws.log_weights.shape == (4, 3, 3)
        loc, scale = model.component_parameters(model.encode(x))
        assert loc.shape == scale.shape == (3, 3, parts.n_levels * 2)
        assert model.sample(2).shape == (2, 1, 6, 5)
