import itertools

import pytest
import torch

from mixscvi.images.networks.configs import ModelConfig, Sizes
from mixscvi.images.networks.decoders import BernoulliDecoder, PixelCNNDecoder, make_decoder


def decoder_of(kind: str, image_shape: tuple[int, int], n_layers: int = 4):
    torch.manual_seed(0)
    if kind == "bernoulli":
        return BernoulliDecoder(2, image_shape, hidden=(5,)).double()
    return PixelCNNDecoder(2, image_shape, n_hidden=5, n_layers=n_layers, n_channels=6).double()


@pytest.mark.parametrize("kind", ["bernoulli", "pixelcnn"])
def test_probabilities_of_all_images_of_a_lattice_sum_to_one(kind):
    decoder = decoder_of(kind, (3, 3))
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=9)), dtype=torch.float64)
    z = torch.randn(2, 1, 3, 2, dtype=torch.float64).expand(2, 512, 3, 2)
    total = decoder.log_prob(images.view(512, 1, 3, 3), z).logsumexp(1)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-12, rtol=0)


@pytest.mark.parametrize("n_layers", [2, 3, 6])
def test_a_logit_sees_only_the_pixels_before_it(n_layers):
    decoder = decoder_of("pixelcnn", (4, 5), n_layers)
    z = torch.randn(1, 1, 1, 2, dtype=torch.float64)

    def logits(pixels):
        return decoder.logits(pixels.view(1, 1, 4, 5), z).flatten()

    jacobian = torch.autograd.functional.jacobian(logits, torch.rand(20, dtype=torch.float64))
    assert jacobian.triu().abs().max() == 0
    assert (jacobian.diagonal(-1) != 0).any()
    # With enough layers the last logit sees the first pixel.
    assert n_layers < 6 or jacobian[-1, 0] != 0


@pytest.mark.parametrize("kind", ["bernoulli", "pixelcnn"])
def test_all_draws_in_one_call_are_those_one_by_one(kind):
    decoder = decoder_of(kind, (4, 3))
    x = torch.rand(3, 1, 4, 3, dtype=torch.float64).round()
    z = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    together = decoder.log_prob(x, z)
    for l, b, s in itertools.product(range(2), range(3), range(4)):  # noqa: E741
        one = decoder.log_prob(x[b : b + 1], z[l, b, s].view(1, 1, 1, 2))
        torch.testing.assert_close(together[l, b, s], one.squeeze())


def test_log_prob_is_the_bernoulli_one():
    decoder = decoder_of("bernoulli", (4, 3))
    x = torch.rand(3, 1, 4, 3, dtype=torch.float64).round()
    z = torch.randn(2, 3, 4, 2, dtype=torch.float64)
    bernoulli = torch.distributions.Bernoulli(logits=decoder.logits(z))
    expected = bernoulli.log_prob(x.flatten(1)[None, :, None]).sum(-1)
    torch.testing.assert_close(decoder.log_prob(x, z), expected)


def test_samples_have_the_probabilities_of_the_likelihood():
    decoder = decoder_of("pixelcnn", (2, 2))
    with torch.no_grad():
        decoder.last.weight.mul_(8)
        z = torch.randn(1, 2, dtype=torch.float64)
        images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).double()
        expected = decoder.log_prob(
            images.view(16, 1, 2, 2), z.view(1, 1, 1, 2).expand(1, 16, 1, 2)
        ).exp()
        drawn = decoder.sample(z.expand(20_000, 2), torch.Generator().manual_seed(0))
    index = (drawn.flatten(1) @ torch.tensor([8.0, 4, 2, 1]).double()).long()
    frequency = torch.bincount(index, minlength=16) / len(index)
    torch.testing.assert_close(frequency.double(), expected.flatten(), atol=0.015, rtol=0)


@pytest.mark.parametrize("n_levels", [1, 2])
@pytest.mark.parametrize(
    ("name", "kind"), [("bernoulli", BernoulliDecoder), ("pixelcnn", PixelCNNDecoder)]
)
def test_the_decoder_that_is_named_takes_all_levels(name, kind, n_levels):
    sizes = Sizes(n_latent=3, hidden=(5, 4), pixelcnn_layers=2, pixelcnn_channels=6)
    decoder = make_decoder((4, 3), ModelConfig(decoder=name, n_levels=n_levels), sizes)
    assert type(decoder) is kind
    x, z = torch.zeros(2, 1, 4, 3), torch.zeros(1, 2, 1, 3 * n_levels)
    assert decoder.log_prob(x, z).shape == (1, 2, 1)
