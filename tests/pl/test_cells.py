import numpy as np
import pytest

from mixscvi import pl
from mixscvi.model import AdaptedPosterior, LatentMixture


def of_draws(draws):
    return AdaptedPosterior(*[None] * 8, draws)


def test_a_matching_encoder_covers_the_draws():
    rng = np.random.default_rng(0)
    scale = np.array([3.0, 1.0, 0.1])
    loc = np.array([5.0, -2.0, 1.0])
    draws = loc + scale * rng.normal(size=(4000, 1, 3))
    axes = pl.posterior(of_draws(draws), LatentMixture(loc[None, None], scale[None, None]))
    (ellipse,) = axes.patches
    # Units are standard deviations along the first axis; an ellipse is two of them to each side.
    assert ellipse.get_center() == pytest.approx((0, 0), abs=0.1)
    sides = sorted((ellipse.get_width(), ellipse.get_height()))
    assert sides == pytest.approx([4 / 3, 4], rel=0.05)
    points = axes.collections[0].get_offsets()
    assert points[:, 0].std() == pytest.approx(1, rel=0.01)
    inside = ellipse.contains_points(axes.transData.transform(points))
    assert inside.mean() == pytest.approx(1 - np.exp(-2), abs=0.03)


def test_every_component_is_an_ellipse_of_its_cell():
    rng = np.random.default_rng(1)
    draws = rng.normal(size=(50, 2, 4))
    encoder = LatentMixture(rng.normal(size=(2, 3, 4)), np.ones((2, 3, 4)))
    first, second = (pl.posterior(of_draws(draws), encoder, cell) for cell in (0, -1))
    assert len(first.patches) == len(second.patches) == 3
    assert not np.allclose(first.patches[0].get_center(), second.patches[0].get_center())


def test_what_does_not_fit_is_named():
    encoder = LatentMixture(np.zeros((2, 1, 3)), np.ones((2, 1, 3)))
    with pytest.raises(ValueError, match="by n_draws"):
        pl.posterior(of_draws(None), encoder)
    with pytest.raises(ValueError, match=r"\(9, 2, 4\) and means of shape \(2, 1, 3\)"):
        pl.posterior(of_draws(np.zeros((9, 2, 4))), encoder)
    with pytest.raises(TypeError, match="position of one of the 2 cells, got 'AAC'"):
        pl.posterior(of_draws(np.zeros((9, 2, 3))), encoder, "AAC")
    with pytest.raises(IndexError, match="cell=2, but there are 2 cells"):
        pl.posterior(of_draws(np.zeros((9, 2, 3))), encoder, 2)
