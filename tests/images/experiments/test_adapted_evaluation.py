"""Evaluation by proposals that are adapted to each image."""

import json

import numpy as np
import pytest
import torch

from image_runs import rows_of, run, small_data
from mixscvi.images import ImageData, evaluate
from mixscvi.images.experiments import evaluation
from mixscvi.images.networks import adapting


@pytest.fixture(scope="module")
def data() -> ImageData:
    return small_data()


ADAPTED = {
    "nll",
    "nll_se",
    "nll_monte_carlo_se",
    "ess",
    "k_hat_median",
    "k_hat_above_0.7",
    "proposal",
}


@pytest.mark.parametrize("preset", ["vanilla", "flow", "vamp", "hierarchical", "composite"])
def test_adapted_beside_the_encoders(tmp_path, data, preset):
    """It has files of its own; of the encoder's mixture it says what that one's evaluation says."""
    of_encoder = evaluate(run(tmp_path, data, preset), data=data, draws=51)
    before = {path: path.read_bytes() for path in tmp_path.glob("evaluation.*")}
    adapted = evaluate(tmp_path, data=data, draws=51, proposal="adapted")
    assert {path: path.read_bytes() for path in before} == before
    assert json.loads((tmp_path / "evaluation_adapted.json").read_text()) == adapted
    assert not list(tmp_path.glob("*.partial.pt"))
    assert (of_encoder["proposal"], adapted["proposal"]) == ("encoder", "adapted")
    new = {"nll_encoder", "k_hat_above_0.7_encoder", "evaluations"}
    assert adapted.keys() - of_encoder.keys() == new
    changed = {name for name in of_encoder if adapted[name] != of_encoder[name]}
    # Of few images, as many may be trusted by chance.
    assert changed | {"k_hat_above_0.7"} == ADAPTED
    assert adapted["nll_encoder"] == of_encoder["nll"]
    assert adapted["k_hat_above_0.7_encoder"] == of_encoder["k_hat_above_0.7"]
    assert adapted["evaluations"] > 2 * 250


def test_adapted_and_encoders_draws_tell_one_likelihood(tmp_path, data):
    """In so few dimensions both are good."""
    run(tmp_path, data, "hierarchical")
    evaluate(tmp_path, data=data, draws=20_000)
    evaluate(tmp_path, data=data, draws=2000, proposal="adapted")
    plain, adapted = rows_of(tmp_path), rows_of(tmp_path, "adapted")
    error = np.hypot(plain["siwae_se"], adapted["siwae_se"])
    assert error.max() < 0.05
    assert (np.abs(plain["siwae"] - adapted["siwae"]) < 5 * error).all()


def test_an_images_likelihood_does_not_depend_on_its_group(tmp_path, data, monkeypatch):
    run(tmp_path, data, "flow")
    evaluate(tmp_path, data=data, draws=500, proposal="adapted")
    whole = rows_of(tmp_path, "adapted")
    monkeypatch.setattr(evaluation, "_IMAGES", 1)
    evaluate(tmp_path, data=data, draws=500, proposal="adapted")
    alone = rows_of(tmp_path, "adapted")
    assert (whole["siwae"] != alone["siwae"]).any()
    error = np.hypot(whole["siwae_se"], alone["siwae_se"])
    assert (np.abs(whole["siwae"] - alone["siwae"]) < 5 * error).all()


def test_the_draws_of_adapted_proposals_depend_on_the_seed_alone(tmp_path, data):
    run(tmp_path, data, "composite")
    first = evaluate(tmp_path, data=data, draws=50, proposal="adapted")
    torch.rand(5)
    assert evaluate(tmp_path, data=data, draws=50, proposal="adapted") == first
    other = evaluate(tmp_path, data=data, draws=50, proposal="adapted", seed=1)
    assert other["nll"] != first["nll"]


@pytest.mark.parametrize("proposal", ["encoder", "adapted"])
def test_groups_of_images_have_draws_of_their_own(tmp_path, monkeypatch, proposal):
    gray = np.random.default_rng(0).integers(0, 2, (44, 3, 3)).astype(float)
    data = ImageData.from_arrays(np.concatenate((gray, gray[-6:])), n_validation=10, n_test=12)
    assert data.test[:6].equal(data.test[6:])
    monkeypatch.setattr(evaluation, "_IMAGES", 6)
    evaluate(run(tmp_path, data), data=data, draws=50, proposal=proposal)
    siwae = rows_of(tmp_path, proposal)["siwae"]
    assert (siwae[:6] != siwae[6:]).all()


def test_shares_are_of_images_above_the_threshold():
    n = 4
    names = ("siwae", "siwae_se", "iw_miselbo", "miselbo", "elbo", "jsd", "ess", "siwae_encoder")
    images = dict.fromkeys((*names, "evaluations"), torch.zeros(n)) | {
        "mean": torch.zeros(n, 2),
        "k_hat": torch.tensor([0.1, 0.69, 0.7, 0.2]),
        "k_hat_encoder": torch.tensor([torch.nan, 0.8, torch.inf, 0.2]),
    }
    averages = evaluation._averages(images)
    assert averages["k_hat_above_0.7"] == 0.25
    assert averages["k_hat_above_0.7_encoder"] == 0.75


def test_no_such_proposal(tmp_path, data):
    with pytest.raises(ValueError, match=r"proposal must be one of \['encoder', 'adapted'\].*'x'"):
        evaluate(run(tmp_path, data), data=data, proposal="x")


@pytest.mark.parametrize("when", [1, 2, 3])
def test_continued_adaptation_is_uninterrupted(tmp_path, data, monkeypatch, when):
    run(tmp_path, data, "composite")
    monkeypatch.setattr(evaluation, "_IMAGES", 5)
    whole = evaluate(tmp_path, data=data, draws=60, proposal="adapted")
    of_images = rows_of(tmp_path, "adapted")
    original, calls = evaluation.adapt_images, []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == when:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(evaluation, "adapt_images", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, data=data, draws=60, proposal="adapted")
    assert when == 1 or (tmp_path / "evaluation_adapted.partial.pt").exists()
    # The other proposal's evaluation in between continues nothing of this one's.
    evaluate(tmp_path, data=data, draws=60)
    assert evaluate(tmp_path, data=data, draws=60, proposal="adapted") == whole
    for name, values in rows_of(tmp_path, "adapted").items():
        np.testing.assert_array_equal(values, of_images[name])
    # What was done was not done again.
    assert len(calls) == 3 + 1


def test_memory_of_adaptation_is_bounded(tmp_path, data, monkeypatch):
    """However many draws there are, the decoder sees a fixed number at once."""
    run(tmp_path, data, "composite")
    monkeypatch.setattr(adapting, "_ELEMENTS_AT_ONCE", 100 * 9 * 4)  # pixels, channels
    rows, original = [], evaluation.adapt_images

    def adapt_images(model, x, **kwargs):
        decode = model.decoder.log_prob
        monkeypatch.setattr(
            model.decoder, "log_prob", lambda x, z: rows.append(z[..., 0].numel()) or decode(x, z)
        )
        return original(model, x, **kwargs)

    monkeypatch.setattr(evaluation, "adapt_images", adapt_images)
    evaluate(tmp_path, data=data, draws=2000, proposal="adapted")
    assert max(rows) <= 100
    assert sum(rows) > 12 * 2000
