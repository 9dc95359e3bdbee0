import pytest
import torch

from mixscvi.images.networks.configs import ModelConfig, Sizes
from mixscvi.images.networks.encoders import clamped_variance
from mixscvi.images.networks.layers import gate
from mixscvi.images.networks.priors import ConditionalPrior, PseudoImages, make_prior
from mixscvi.mixture import GaussianMixture, StandardNormal, VampPrior

SIZES = Sizes(n_latent=3, n_prior_components=5)


@pytest.mark.parametrize(
    ("name", "kind"), [("normal", StandardNormal), ("mog", GaussianMixture), ("vamp", VampPrior)]
)
def test_the_prior_that_is_named(name, kind):
    prior = make_prior((4, 6), ModelConfig(prior=name), SIZES)
    assert type(prior) is kind
    if name == "mog":
        assert prior.loc.shape == (5, 3)
    if name == "vamp":
        assert prior.pseudo_inputs().shape == (5, 1, 4, 6)


def test_pseudo_images_start_at_the_images_given_and_are_learned():
    pseudo = PseudoImages(5, (4, 6))
    images = torch.rand(5, 1, 4, 6)
    images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    pseudo.start_from(images)
    torch.testing.assert_close(pseudo(), 0.05 + 0.9 * images)
    pseudo().sum().backward()
    assert (pseudo.logits.grad > 0).all()


def test_conditional_prior_is_a_gated_layer_and_heads():
    torch.manual_seed(0)
    prior = ConditionalPrior(3, 7).double()
    upper = torch.randn(9, 3, dtype=torch.float64)
    q = prior(upper)
    assert q.batch_shape == (9,) and q.n_components == 1
    hidden = gate(upper @ prior.hidden.weight[0].T + prior.hidden.bias[0])
    mean, var = (
        hidden @ head.weight[0].T + head.bias[0] for head in (prior.heads.mean, prior.heads.var)
    )
    torch.testing.assert_close(q.component_loc[:, 0], mean)
    torch.testing.assert_close(q.component_scale[:, 0].square(), clamped_variance(var))
