import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, Normal

from mixscvi.images.networks import adapting
from mixscvi.images.networks.adapting import adapt_images
from mixscvi.images.networks.configs import MixtureConfig, ModelConfig, Sizes
from mixscvi.images.networks.vae import ImageVAE

MODELS = {
    "one level": ModelConfig(),
    "flow": ModelConfig(n_flow_steps=2),
    "mog prior": ModelConfig(prior="mog"),
    "vamp prior": ModelConfig(prior="vamp"),
    "pixelcnn": ModelConfig(decoder="pixelcnn"),
    "two levels": ModelConfig(n_levels=2, prior="vamp"),
    "two levels, flow": ModelConfig(n_levels=2, n_flow_steps=2),
    "composite": ModelConfig("conv", 2, 2, "vamp", "pixelcnn"),
}


def model_of(config: ModelConfig, n_components: int = 3, component_encoder="separate") -> ImageVAE:
    """A model of two dimensions, of all levels together."""
    sizes = Sizes(
        n_latent=2 // config.n_levels,
        hidden=(5, 4),
        conv_layers=((3, 3, 2), (2, 3, 1)),
        n_prior_components=3,
        flow_hidden=(6,),
        pixelcnn_layers=2,
        pixelcnn_channels=3,
    )
    torch.manual_seed(0)
    mixture = MixtureConfig(n_components, component_encoder=component_encoder)
    model = ImageVAE((4, 4), config, mixture, sizes).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def images(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 4, 4, dtype=torch.float64, generator=generator).round()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@torch.no_grad()
def naive_log_joint(model: ImageVAE, x: Tensor, z: Tensor) -> Tensor:
    """log p(x, z) of one image `(1, height, width)` and points of z, `(M, 2)`."""
    levels = z.split(model.sizes.n_latent, -1)
    log_prob = model.prior_distribution().log_prob(levels[0])
    if len(levels) == 2:
        given = model.lower_prior(levels[0])
        conditional = Normal(given.component_loc[:, 0], given.component_scale[:, 0])
        log_prob = log_prob + Independent(conditional, 1).log_prob(levels[1])
    x = x.expand(len(z), *x.shape)
    if model.config.decoder == "pixelcnn":
        logits = model.decoder.logits(x, z[None, :, None])[0, :, 0]
    else:
        logits = model.decoder.logits(z)
    pixels = torch.distributions.Bernoulli(logits=logits).log_prob(x.flatten(1))
    return log_prob + pixels.sum(-1)


def integrate(model: ImageVAE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x) by the rectangle rule, and the posterior: points `(M, 2)` and their weights."""
    axis = torch.arange(-10.0, 10.0, 0.2, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    log_joint = naive_log_joint(model, x, points)
    return log_joint.logsumexp(0) + 2 * math.log(0.2), points, log_joint.softmax(0)


def handed_over(model, x, monkeypatch, **options):
    """What reaches the core: log-joint, start and options."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(adapting, "adapt", lambda *args, **kwargs: seen.append((args, kwargs)))
        adapt_images(model, x, **options)
    (((log_joint, start), kwargs),) = seen
    return log_joint, start, kwargs


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("component_encoder", ["separate", "shifted"])
def test_log_joint_is_the_naive_one(config, component_encoder, monkeypatch):
    """With the determinant of the Jacobian itself."""
    model, x = model_of(config, component_encoder=component_encoder), images(4)
    log_joint, start, _ = handed_over(model, x, monkeypatch)
    draws = start.sample((3,), generator())  # (N, B, 2)
    got = log_joint(draws, torch.arange(4))
    assert got.shape == (3, 4)

    def push(base: Tensor) -> Tensor:
        parts = base.split(model.sizes.n_latent, -1)
        if not model.flows:
            return base
        return torch.cat([flow(part)[0] for flow, part in zip(model.flows, parts, strict=True)], -1)

    for n in range(3):
        for image in range(4):
            base = draws[n, image]
            jacobian = torch.autograd.functional.jacobian(push, base)
            expected = naive_log_joint(model, x[image], push(base).detach()[None])[0]
            expected = expected + torch.linalg.slogdet(jacobian)[1]
            torch.testing.assert_close(got[n, image].detach(), expected)
    some = torch.tensor([0, 3])
    torch.testing.assert_close(log_joint(draws[:, some], some), got[:, some])


def test_the_start_is_the_encoders_mixture(monkeypatch):
    model, x = model_of(MODELS["flow"]), images(4)
    _, start, options = handed_over(model, x, monkeypatch, n_final=77)
    posterior = model.encoder(x)
    torch.testing.assert_close(start.component_loc, posterior.component_loc)
    torch.testing.assert_close(start.component_scale, posterior.component_scale)
    assert options == {"generator": None, "n_final": 77, "rows_per_call": 2**23 // 16}


@pytest.mark.parametrize("name", ["two levels", "two levels, flow"])
def test_the_lower_level_starts_at_the_mean_of_the_upper(name, monkeypatch):
    model, x = model_of(MODELS[name]), images(4)
    _, start, _ = handed_over(model, x, monkeypatch)
    upper = model.encoder(x)
    z = upper.component_loc
    if model.flows:
        z = model.flows[0](z)[0]
    conditional = model.lower_encoder(x, z[None])  # (1, B, A) x A
    for a in range(3):
        torch.testing.assert_close(start.component_loc[:, a, :1], upper.component_loc[:, a])
        torch.testing.assert_close(start.component_scale[:, a, :1], upper.component_scale[:, a])
        own = conditional.component_loc[0, :, a, a], conditional.component_scale[0, :, a, a]
        torch.testing.assert_close(start.component_loc[:, a, 1:], own[0])
        torch.testing.assert_close(start.component_scale[:, a, 1:], own[1])


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("n_components", [1, 3])
def test_likelihoods_and_posteriors_are_exact(config, n_components):
    model, x = model_of(config, n_components), images(5)
    adapted = adapt_images(model, x, generator=generator(), n_final=3000)
    trusted = adapted.converged.nonzero().flatten()
    assert len(trusted) >= 2  # random weights give some posteriors that no trained model has
    levels, _ = model.push_forward(adapted.draws)
    z, weights = torch.cat(levels, -1), adapted.log_weights.softmax(0)
    for image in trusted:
        exact, points, exact_weights = integrate(model, x[image])
        error = adapted.standard_error[image]
        assert error < 0.05
        assert (adapted.log_likelihood[image] - exact).abs() < 5 * error + 1e-3
        mean = exact_weights @ points
        variance = exact_weights @ (points - mean).square()
        n_effective = 1 / weights[:, image].square().sum()
        got = weights[:, image] @ z[:, image]
        assert ((got - mean).abs() < 5 * (variance / n_effective).sqrt() + 1e-3).all()


def test_encoding_and_prior_may_be_given():
    model, x = model_of(MODELS["composite"]), images(3)
    given = {"encoded": model.encode(x), "prior": model.prior_distribution()}
    expected = adapt_images(model, x, generator=generator(), n_final=50)
    got = adapt_images(model, x, generator=generator(), n_final=50, **given)
    torch.testing.assert_close(got.log_weights, expected.log_weights)


def test_parameters_take_no_gradient():
    model = model_of(MODELS["composite"])
    adapt_images(model, images(2), n_final=25, max_generations=1)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_inference_mode_is_refused():
    model = model_of(MODELS["one level"])
    with pytest.raises(RuntimeError, match="inference_mode"), torch.inference_mode():
        adapt_images(model, images(2))
