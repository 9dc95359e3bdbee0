import math
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributions import Independent, Normal

from mixscvi.images.experiments.configs import BUDGETS, RunConfig
from mixscvi.images.experiments.runs import build
from mixscvi.images.networks.configs import PRESETS, MixtureConfig, ModelConfig, Sizes
from mixscvi.images.networks.vae import ImageVAE, count_parameters
from mixscvi.mixture import layers, miselbo, nonzeros
from mixscvi.mixture.nonzeros import product_by_nonzeros

TINY = Sizes(
    n_latent=2,
    hidden=(5, 4),
    conv_layers=((3, 3, 2), (2, 3, 1)),
    n_prior_components=3,
    flow_hidden=(6,),
    pixelcnn_layers=2,
    pixelcnn_channels=3,
)


def model_of(parts: ModelConfig, mixture: MixtureConfig) -> ImageVAE:
    torch.manual_seed(0)
    model = ImageVAE((4, 4), parts, mixture, TINY).double().eval()
    # Heads and flow that start near a standard normal would hide mistakes.
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def images(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 4, 4, dtype=torch.float64, generator=generator).round()


def gaussian(loc: torch.Tensor, scale: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    return Independent(Normal(loc, scale), 1).log_prob(z)


def log_det(flow, z0: torch.Tensor) -> torch.Tensor:
    """log |det df/dz0| from the Jacobian itself."""
    jacobian = torch.autograd.functional.jacobian(lambda base: flow(base)[0], z0)
    return torch.linalg.slogdet(jacobian)[1]


@pytest.mark.parametrize("component_encoder", ["separate", "shifted"])
@pytest.mark.parametrize("n_flow_steps", [0, 2])
@pytest.mark.parametrize("n_levels", [1, 2])
@pytest.mark.usefixtures("first_layer")
def test_densities_against_a_loop_over_components(n_levels, n_flow_steps, component_encoder):
    """Each q_j by itself, at draws pulled back through the inverse of the flow."""
    parts = ModelConfig(n_levels=n_levels, n_flow_steps=n_flow_steps)
    model = model_of(parts, MixtureConfig(3, component_encoder=component_encoder))
    x = images(2)
    draws = model.draw(x, 2, generator=torch.Generator().manual_seed(0))
    posterior = model.encoder(x)
    for l in range(2):  # noqa: E741
        for b in range(2):
            for s in range(3):
                upper, lower = (
                    draws.z[l, b, s].split(2) if n_levels == 2 else (draws.z[l, b, s], None)
                )
                for j in range(3):
                    base = model.flows[0].inverse(upper)[0].detach() if n_flow_steps else upper
                    expected = gaussian(
                        posterior.component_loc[b, j], posterior.component_scale[b, j], base
                    )
                    if n_flow_steps:
                        expected = expected - log_det(model.flows[0], base)
                    if n_levels == 2:
                        conditional = model.lower_encoder(x[b : b + 1], upper.view(1, 1, 1, 2))
                        base = model.flows[1].inverse(lower)[0].detach() if n_flow_steps else lower
                        expected = expected + gaussian(
                            conditional.component_loc[0, 0, 0, j],
                            conditional.component_scale[0, 0, 0, j],
                            base,
                        )
                        if n_flow_steps:
                            expected = expected - log_det(model.flows[1], base)
                    torch.testing.assert_close(
                        draws.cross_log_prob[l, b, s, j], expected, rtol=1e-6, atol=1e-6
                    )
                torch.testing.assert_close(
                    draws.own_log_prob[l, b, s], draws.cross_log_prob[l, b, s, s]
                )


def test_hierarchy_mixes_the_joint_densities_and_not_the_levels():
    model = model_of(ModelConfig(n_levels=2), MixtureConfig(3))
    x = images(2)
    draws = model.draw(x)
    joint = draws.cross_log_prob.exp().mean(-1).log()
    log_p = model.decoder.log_prob(x, draws.z) + draws.log_prior
    torch.testing.assert_close(model.log_weights(x, draws), log_p - joint)


def test_hierarchical_prior_is_the_product_of_both_levels():
    model = model_of(ModelConfig(n_levels=2), MixtureConfig(2))
    draws = model.draw(images(3))
    upper, lower = draws.z.split(2, dim=-1)
    given = model.lower_prior(upper.flatten(0, 2))
    expected = gaussian(torch.zeros(2), torch.ones(2), upper)
    expected = expected + gaussian(
        given.component_loc[:, 0], given.component_scale[:, 0], lower.flatten(0, 2)
    ).view_as(expected)
    torch.testing.assert_close(draws.log_prior, expected)


def test_vamp_prior_is_the_mixture_over_pseudo_images_and_components():
    model = model_of(ModelConfig(prior="vamp"), MixtureConfig(2))
    z = torch.randn(5, 2, dtype=torch.float64)
    pseudo = model.prior.pseudo_inputs()
    assert pseudo.shape == (3, 1, 4, 4)
    assert 0 < pseudo.min() and pseudo.max() < 1
    posterior = model.encoder(pseudo)
    loc, scale = posterior.component_loc, posterior.component_scale
    terms = [gaussian(loc[k, a], scale[k, a], z) for k in range(3) for a in range(2)]
    expected = torch.stack(terms).logsumexp(0) - math.log(6)
    torch.testing.assert_close(model.prior_distribution().log_prob(z), expected)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.usefixtures("first_layer")
def test_an_image_does_not_change_another_ones_likelihood(preset):
    model = model_of(PRESETS[preset], MixtureConfig(2)).train()
    x = images(4)

    def densities(rows: torch.Tensor) -> list[torch.Tensor]:
        draws = model.draw(rows, generator=torch.Generator().manual_seed(0))
        return [part[:, 0] for part in (*draws, model.log_weights(rows, draws))]

    others = torch.cat((x[:1], 1 - x[1:]))
    for with_x, with_others in zip(densities(x), densities(others), strict=True):
        torch.testing.assert_close(with_x, with_others)

    # By itself: the same parameters, and at the same latents the same likelihood.
    for batched, alone in zip(
        model.component_parameters(model.encode(x)),
        model.component_parameters(model.encode(x[:1])),
        strict=True,
    ):
        torch.testing.assert_close(batched[:1], alone)
    z = model.draw(x).z
    torch.testing.assert_close(
        model.decoder.log_prob(x, z)[:, :1], model.decoder.log_prob(x[:1], z[:, :1])
    )


@pytest.mark.parametrize("n_levels", [1, 2])
def test_some_to_all_is_unbiased_over_its_choices(n_levels):
    """The expectation over the choice, with common noise, is the value of all components."""
    model = model_of(ModelConfig(n_levels=n_levels), MixtureConfig(3, 1, "some_to_all"))
    x = images(2)
    n_draws = 20_000
    everything = model.draw(x, n_draws, generator=torch.Generator().manual_seed(0))
    log_weights = model.log_weights(x, everything)
    exact = miselbo(log_weights)
    error = (2 * log_weights.var(0).sum(-1) / n_draws).sqrt() / 3
    some = []
    for a in range(3):
        generator = torch.Generator().manual_seed(a + 1)
        draws = model.draw(x, n_draws, torch.tensor([a]), generator=generator)
        assert draws.cross_log_prob.shape == (n_draws, 2, 1, 3)
        some.append(miselbo(model.log_weights(x, draws)))
    assert ((torch.stack(some).mean(0) - exact).abs() < 4 * error).all()


def test_some_to_some_encodes_only_the_chosen():
    model = model_of(ModelConfig(n_levels=2, n_flow_steps=1), MixtureConfig(4, 2, "some_to_some"))
    x, components = images(3), torch.tensor([3, 1])
    draws = model.draw(x, 1, components, generator=torch.Generator().manual_seed(0))
    assert draws.cross_log_prob.shape == (1, 3, 2, 2)
    all_to_all = model_of(ModelConfig(n_levels=2, n_flow_steps=1), MixtureConfig(4))
    # Component 3 is in the first place, so only the others' gradients are zero.
    model.log_weights(x, draws).sum().backward()
    gradient = model.encoder.heads.mean.weight.grad.abs().amax((1, 2))
    assert (gradient > 0).tolist() == [False, True, False, True]
    assert model.state_dict().keys() == all_to_all.state_dict().keys()


@pytest.mark.parametrize("component_encoder", ["separate", "shifted"])
@pytest.mark.parametrize("preset", ["vanilla", "composite"])
def test_big_iwae_has_as_many_encoder_parameters(preset, component_encoder):
    config = RunConfig.from_preset(
        preset, budget="small", n_components=4, component_encoder=component_encoder
    )

    def n_encoder(objective: str) -> int:
        model = build(replace(config, objective=objective), (28, 28))
        return count_parameters(model.encoder) + count_parameters(model.lower_encoder)

    assert n_encoder("iwae") == pytest.approx(n_encoder("miselbo"), rel=0.05)


def put_on_cuda(model: torch.nn.Module) -> None:
    """Replace parameters and buffers by fakes on a device that need not exist."""
    for module in model.modules():
        for key, value in module._parameters.items():
            if value is not None:
                fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                module._parameters[key] = torch.nn.Parameter(fake)
        for key, value in module._buffers.items():
            module._buffers[key] = torch.empty(value.shape, dtype=value.dtype, device="cuda")


def test_composite_at_the_papers_size_runs_on_cuda_fakes():
    model = ImageVAE((28, 28), PRESETS["composite"], MixtureConfig(4), BUDGETS["paper"].sizes)
    # Autograd on such fakes asks for a real device.
    with_grad = torch.cuda.is_available()
    with FakeTensorMode(), torch.set_grad_enabled(with_grad):
        put_on_cuda(model)
        x = torch.empty(100, 1, 28, 28, device="cuda")
        bound = miselbo(model.log_weights(x, model.draw(x, components=model.choose())))
        if with_grad:
            bound.mean().backward()
            assert {p.grad.device.type for p in model.parameters()} == {"cuda"}
    assert bound.device.type == "cuda" and bound.shape == (100,)
    assert 4_000_000 < count_parameters(model) < 50_000_000


@pytest.mark.parametrize("estimator", ["all_to_all", "some_to_all", "some_to_some"])
def test_sums_of_rows_are_reached_and_change_nothing(estimator, monkeypatch):
    sizes = BUDGETS["small"].sizes
    mixture = MixtureConfig(
        4, estimator=estimator, n_sampled=None if estimator == "all_to_all" else 3
    )
    torch.manual_seed(0)
    model = ImageVAE((28, 28), PRESETS["vanilla"], mixture, sizes).double()
    x = (torch.rand(9, 1, 28, 28) < 0.1).double()
    components = model.choose(torch.Generator().manual_seed(0))
    calls = []

    def counted(x, table):
        calls.append(table.shape)
        return product_by_nonzeros(x, table)

    monkeypatch.setattr(nonzeros, "_LEAST_WORK", 0)
    monkeypatch.setattr(layers, "product_by_nonzeros", counted)

    def results() -> list[torch.Tensor]:
        model.zero_grad()
        draws = model.draw(x, components=components, generator=torch.Generator().manual_seed(0))
        bound = miselbo(model.log_weights(x, draws))
        bound.sum().backward()
        return [bound.detach(), *(p.grad.clone() for p in model.encoder.parameters())]

    by_rows = results()
    assert calls == [(784, (3 if estimator == "some_to_some" else 4) * 2 * sizes.hidden[0])]
    monkeypatch.setattr(layers, "few_nonzeros", lambda x, table: None)
    for ours, dense in zip(by_rows, results(), strict=True):
        torch.testing.assert_close(ours, dense)
    assert len(calls) == 1


def test_a_wide_dense_model_runs_on_fakes():
    with FakeTensorMode():
        model = ImageVAE((28, 28), PRESETS["vanilla"], MixtureConfig(4), BUDGETS["paper"].sizes)
        x = torch.empty(10, 1, 28, 28)
        assert model.log_weights(x, model.draw(x)).shape == (1, 10, 4)


def test_sample_is_a_function_of_the_seed_and_leaves_the_global_one_alone():
    model = model_of(PRESETS["composite"], MixtureConfig(2))
    before = torch.random.get_rng_state()
    first, second, other = (model.sample(20, seed) for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert first.shape == (20, 1, 4, 4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_seeds_of_accelerators_are_left_alone(monkeypatch):
    """Building and sampling on the CPU neither read nor write the state of any GPU."""

    def touched(*args, **kwargs):
        raise AssertionError("a GPU's generator was touched")

    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, touched)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = RunConfig.from_preset("composite", budget="smoke", n_components=2)
    before = torch.random.get_rng_state()
    first, second = (build(config, (4, 4)) for _ in range(2))
    assert torch.equal(first.sample(3), second.sample(3))
    assert torch.equal(torch.random.get_rng_state(), before)


# Sums over the weights of seed 3 and over the means of five images, recorded before encoders were
# built of trunk and heads.
RECORDED = {
    ("vanilla", "separate"): (-12.288357562922101, -123.76177978515625),
    ("vanilla", "shifted"): (3.264755972457351, -128.26205444335938),
    ("composite", "separate"): (149.29102691453227, -128.3794403076172),
    ("composite", "shifted"): (158.9072233800107, -129.73753356933594),
}


@pytest.mark.parametrize(("preset", "component_encoder"), RECORDED)
def test_the_weights_of_a_seed_are_those_of_recorded_runs(preset, component_encoder):
    config = RunConfig.from_preset(
        preset, budget="smoke", n_components=3, component_encoder=component_encoder, seed=3
    )
    model = build(config, (6, 6))
    weights = sum(float(value.double().sum()) for value in model.state_dict().values())
    x = (torch.arange(5 * 36).view(5, 1, 6, 6) % 3 == 0).float()
    with torch.no_grad():
        draws = model.draw(x, 2, generator=torch.Generator().manual_seed(0))
        bound = float(miselbo(model.log_weights(x, draws)).sum())
    expected = RECORDED[preset, component_encoder]
    assert (weights, bound) == pytest.approx(expected, rel=1e-6)
