import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator

from image_runs import rows_of, run, small_data
from mixscvi.images import ImageData, RunConfig, evaluate, load_run, train
from mixscvi.images.experiments import evaluation, runs
from mixscvi.images.experiments.evaluation import image_statistics
from mixscvi.mixture import ImportanceDraws
from tensor_sizes import LargestTensor


@pytest.fixture(scope="module")
def data() -> ImageData:
    return small_data()


def killed_at_first_save(folder, data, monkeypatch):
    """Evaluate with 100 draws until something is saved."""
    original = evaluation._State.save

    def killed(self):
        original(self)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation._State, "save", killed)
        with pytest.raises(RuntimeError, match="killed"):
            evaluate(folder, data=data, draws=100)


@pytest.mark.parametrize("proposal", ["encoder", "adapted"])
@pytest.mark.parametrize("preset", ["vanilla", "composite"])
def test_the_likelihood_is_one(tmp_path, preset, proposal):
    """On a 3 x 3 lattice the evaluated p(x) of all 512 images sum to 1."""
    pixels = np.array(list(itertools.product([0.0, 1.0], repeat=9))).reshape(512, 3, 3)
    data = ImageData.from_arrays(np.concatenate((pixels[:60], pixels)), n_validation=10, n_test=512)
    config = RunConfig.from_preset(preset, budget="smoke", n_components=2)
    training = replace(config.training, max_epochs=1, n_test=None)
    train(replace(config, training=training), tmp_path, data=data)
    result = evaluate(tmp_path, data=data, draws=200, proposal=proposal)
    rows = rows_of(tmp_path, proposal)
    p = np.exp(rows["siwae"])
    assert len(p) == result["n_images"] == 512
    error = np.sqrt(np.sum((p * rows["siwae_se"]) ** 2))
    assert error < 0.02
    assert p.sum() == pytest.approx(1, abs=4 * error)


def test_what_it_writes_and_returns(tmp_path, data):
    result = evaluate(run(tmp_path, data), data=data, draws=51)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == result
    assert result["draws"] == 52  # as many for each component
    assert result["n_images"] == 12
    assert -result["nll"] > -result["nll_iw_miselbo"] > result["miselbo"] > result["elbo"]
    assert result["miselbo"] - result["elbo"] == pytest.approx(result["jsd"])
    assert 0 < result["nll_monte_carlo_se"] < result["nll_se"]
    assert 1 <= result["ess"] <= 52
    assert not (tmp_path / "evaluation.partial.pt").exists()


@pytest.mark.parametrize("proposal", ["encoder", "adapted"])
def test_the_first_images_alone(tmp_path, data, monkeypatch, proposal):
    """With the draws that they have among all, but for a group that ends earlier."""
    run(tmp_path, data)
    monkeypatch.setattr(evaluation, "_IMAGES", 4)
    evaluate(tmp_path, data=data, draws=50, proposal=proposal)
    whole = rows_of(tmp_path, proposal)
    few = evaluate(tmp_path, data=data, draws=50, proposal=proposal, images=8)
    assert few["n_images"] == 8
    np.testing.assert_array_equal(rows_of(tmp_path, proposal)["siwae"], whole["siwae"][:8])


@pytest.mark.parametrize("n", [0, 13])
def test_images_that_a_run_does_not_have(tmp_path, data, n):
    run(tmp_path, data)
    with pytest.raises(ValueError, match=f"images must be between 1 and the run's 12 .*, got {n}"):
        evaluate(tmp_path, data=data, draws=50, images=n)


def test_progress_is_shown_if_asked_for(tmp_path, data, capsys):
    folder = run(tmp_path, data)
    capsys.readouterr()
    silent = evaluate(folder, data=data, draws=51)
    assert capsys.readouterr().err == ""
    assert evaluate(folder, data=data, draws=51, progress=True) == silent
    n = len(data.test)
    assert f"{n}/{n}" in capsys.readouterr().err


def test_progress_of_a_continued_evaluation_starts_where_it_was(tmp_path, data, monkeypatch):
    monkeypatch.setattr(evaluation, "_IMAGES", 5)
    bars = []
    killed_at_first_save(run(tmp_path, data), data, monkeypatch)

    class Bar(evaluation.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(evaluation, "tqdm", Bar)
    evaluate(tmp_path, data=data, draws=100, progress=True)
    (bar,) = bars
    assert (bar.initial, bar.n, bar.total) == (5, 12, 12)


def test_one_component_has_one_form_and_no_divergence(tmp_path, data):
    result = evaluate(run(tmp_path, data, n_components=1), data=data, draws=30)
    assert result["nll"] == pytest.approx(result["nll_iw_miselbo"])
    assert result["jsd"] == pytest.approx(0)


def test_streamed_in_any_number_of_blocks(tmp_path, data, monkeypatch):
    """Blocks have seeds of their own, so only the expectation is the same; one block is exact."""
    run(tmp_path, data)
    whole = evaluate(tmp_path, data=data, draws=4000)
    monkeypatch.setattr(evaluation, "_ROWS", 600)
    blocks = evaluate(tmp_path, data=data, draws=4000)
    assert blocks["nll"] != whole["nll"]
    assert blocks["nll"] == pytest.approx(whole["nll"], abs=5 * whole["nll_monte_carlo_se"])


@pytest.mark.parametrize("when", [1, 4, 7])
def test_continued_is_uninterrupted(tmp_path, data, monkeypatch, when):
    run(tmp_path, data, "composite")
    monkeypatch.setattr(evaluation, "_IMAGES", 5)
    monkeypatch.setattr(evaluation, "_ROWS", 100)
    monkeypatch.setattr(evaluation, "_SAVE_EVERY", 1)
    whole = evaluate(tmp_path, data=data, draws=60)
    original, calls = evaluation.ImageVAE.importance_draws, []

    def killed(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == when:
            raise RuntimeError("killed")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(evaluation.ImageVAE, "importance_draws", killed)
    with pytest.raises(RuntimeError, match="killed"):
        evaluate(tmp_path, data=data, draws=60)
    assert when == 1 or (tmp_path / "evaluation.partial.pt").exists()
    assert evaluate(tmp_path, data=data, draws=60) == whole
    # What was done was not done again.
    assert len(calls) == 8 + 1


def test_another_number_of_draws_starts_anew(tmp_path, data):
    run(tmp_path, data)
    expected = evaluate(tmp_path, data=data, draws=40)
    torch.save(
        {"key": {"n_samples": 7}, "done": [], "blocks": []}, tmp_path / "evaluation.partial.pt"
    )
    assert evaluate(tmp_path, data=data, draws=40) == expected


def test_other_test_images_start_anew(tmp_path, data, monkeypatch):
    other = replace(data, test=1 - data.test)
    run(tmp_path, data)
    expected = evaluate(tmp_path, data=other, draws=100)
    monkeypatch.setattr(evaluation, "_IMAGES", 5)
    killed_at_first_save(tmp_path, data, monkeypatch)
    monkeypatch.undo()
    assert (tmp_path / "evaluation.partial.pt").exists()
    assert evaluate(tmp_path, data=other, draws=100) == expected


def test_images_that_are_not_the_runs_are_refused(tmp_path, data, monkeypatch):
    """A run on arrays that keeps the default name of a data set, and one on other sizes."""
    run(tmp_path, data)
    same_size = replace(data, train=1 - data.train, name="mnist")
    monkeypatch.setattr(runs, "load", lambda *args: same_size)
    with pytest.raises(ValueError, match="trained on other images than those of 'mnist'"):
        evaluate(tmp_path, draws=100)
    wide = ImageData.from_arrays(np.zeros((50, 3, 4)), n_validation=10, n_test=12)
    with pytest.raises(ValueError, match=r"images of shape \(3, 3\), got \(3, 4\)"):
        evaluate(tmp_path, data=wide, draws=100)


def test_too_few_draws(tmp_path, data):
    run(tmp_path, data)
    with pytest.raises(ValueError, match="draws must be at least 25"):
        evaluate(tmp_path, data=data, draws=24)


def test_statistics_against_plain_formulas():
    torch.manual_seed(0)
    joint, own, mixture = torch.randn(3, 20, 5, 2, dtype=torch.float64)
    statistics = image_statistics(ImportanceDraws(joint, own, mixture))
    weights = (joint - mixture).exp()
    torch.testing.assert_close(statistics["siwae"], weights.mean((0, 2)).log())
    torch.testing.assert_close(statistics["iw_miselbo"], weights.mean(0).log().mean(-1))
    torch.testing.assert_close(statistics["elbo"], (joint - own).mean((0, 2)))
    torch.testing.assert_close(statistics["jsd"], (own - mixture).mean((0, 2)))
    ess = weights.sum((0, 2)) ** 2 / (weights**2).sum((0, 2))
    torch.testing.assert_close(statistics["ess"], ess)


def test_evaluation_is_in_evaluation_mode_and_leaves_the_run_alone(tmp_path, data):
    run(tmp_path, data)
    before = (tmp_path / "best.pt").read_bytes()
    first = evaluate(tmp_path, data=data, draws=30)
    torch.rand(5)
    assert evaluate(tmp_path, data=data, draws=30) == first
    assert (tmp_path / "best.pt").read_bytes() == before
    assert not load_run(tmp_path)[1].training


@pytest.mark.parametrize(("preset", "width"), [("vanilla", 3), ("composite", 2 * 10)])
def test_memory_is_bounded_however_many_components(tmp_path, data, preset, width):
    """A block of 1000 draws, their densities under all components, and nothing larger."""
    n_components = 200
    run(tmp_path, data, preset, n_components, component_encoder="shifted")
    with LargestTensor() as record:
        result = evaluate(tmp_path, data=data, draws=200)
    assert (result["draws"], result["n_images"]) == (200, 12)
    # Of a draw and a component: D differences, or the lower level's hidden units.
    assert record.numel <= 1000 * n_components * width


@pytest.mark.parametrize("proposal", ["encoder", "adapted"])
@pytest.mark.parametrize("component_encoder", ["separate", "shifted"])
def test_images_are_encoded_once_however_many_draws(
    tmp_path, data, monkeypatch, component_encoder, proposal
):
    """Both levels of each group of images, and the prior's pseudo-images once."""
    run(tmp_path, data, "composite", component_encoder=component_encoder)
    monkeypatch.setattr(evaluation, "_IMAGES", 5)
    encoded = []

    def load_counted(*args):
        config, model = load_run(*args)
        for name in ("encoder", "lower_encoder"):
            trunk = getattr(model, name).trunk
            trunk.register_forward_pre_hook(
                lambda _, inputs, name=name: encoded.append((name, len(inputs[0])))
            )
        return config, model

    monkeypatch.setattr(evaluation, "load_run", load_counted)
    evaluate(tmp_path, data=data, draws=3000, proposal=proposal)
    groups = [(name, n) for name in ("encoder", "lower_encoder") for n in (5, 5, 2)]
    assert sorted(encoded) == sorted([("encoder", 4), *groups])


def test_up_to_twenty_components_are_evaluated_as_ever():
    """Groups of 50 images: the draws of recorded evaluations depend on it."""
    at_once = evaluation._images_at_once
    assert at_once(1, 5000) == at_once(4, 1250) == at_once(20, 250) == 50
    assert (at_once(200, 25), at_once(5000, 1)) == (5, 1)
    assert at_once(4, 25_000) == 2**20 // 100_000
    assert at_once(4, 10**9) == 1


@pytest.mark.parametrize("estimator", ["all_to_all", "some_to_some"])
def test_components_in_turn_are_all_of_them(tmp_path, data, monkeypatch, estimator):
    """Fewer rows than components: the mixture is of all, and every component is drawn from."""
    run(tmp_path, data, n_components=5, estimator=estimator)
    whole = evaluate(tmp_path, data=data, draws=2000)
    monkeypatch.setattr(evaluation, "_ROWS", 2)
    monkeypatch.setattr(evaluation, "_SAVE_EVERY", 10**9)
    drawn, original = [], evaluation.ImageVAE.importance_draws

    def importance_draws(self, x, n_samples, *, components, **kwargs):
        drawn.append((len(x), n_samples, components.tolist()))
        return original(self, x, n_samples, components=components, **kwargs)

    monkeypatch.setattr(evaluation.ImageVAE, "importance_draws", importance_draws)
    one = replace(data, test=data.test[:1])
    turns = evaluate(tmp_path, data=one, draws=2000)
    assert turns["draws"] == 2000
    assert drawn == [(1, 1, [0, 1]), (1, 1, [2, 3]), (1, 1, [4])] * 400
    monkeypatch.undo()
    whole = evaluate(tmp_path, data=one, draws=2000)
    for name in ("nll", "elbo", "jsd"):
        assert turns[name] == pytest.approx(whole[name], abs=0.2)
    assert turns["nll"] == pytest.approx(whole["nll"], abs=6 * whole["nll_monte_carlo_se"])


KEY = {
    "weights",
    "images",
    "proposal",
    "n_samples",
    "seed",
    "rows",
    "images_at_once",
    "device",
    "dtype",
    "torch",
}


@pytest.mark.parametrize("name", sorted(KEY))
def test_what_the_result_depends_on_starts_it_anew(tmp_path, data, monkeypatch, name):
    run(tmp_path, data)
    expected = evaluate(tmp_path, data=data, draws=100)
    monkeypatch.setattr(evaluation, "_IMAGES", 5)
    killed_at_first_save(tmp_path, data, monkeypatch)
    monkeypatch.undo()
    path = tmp_path / "evaluation.partial.pt"
    state = torch.load(path, weights_only=True)
    assert state["key"].keys() == KEY
    state["key"]["images_at_once"] = 50
    state["key"][name] = "another"
    torch.save(state, path)
    assert evaluate(tmp_path, data=data, draws=100) == expected


@pytest.mark.parametrize("n", [-1, 1, 60])
def test_a_part_of_other_images_is_refused(n, tmp_path, data, monkeypatch):
    run(tmp_path, data)
    monkeypatch.setattr(evaluation, "_IMAGES", 5)
    killed_at_first_save(tmp_path, data, monkeypatch)
    path = tmp_path / "evaluation.partial.pt"
    state = torch.load(path, weights_only=True)
    statistics = {name: torch.zeros(5 + n) for name in evaluation._STATISTICS}
    statistics["mean"] = torch.zeros(5 + n, 3)
    draws = (torch.zeros(2, 5 + n, 1),) * 3
    for changes in ({"done": [statistics], "blocks": []}, {"done": [], "blocks": [draws]}):
        torch.save(state | changes, path)
        with pytest.raises(ValueError, match=r"no unfinished evaluation of \d+ images: delete"):
            evaluate(tmp_path, data=data, draws=100)


STATISTICS = {name: torch.zeros(5) for name in sorted(evaluation._STATISTICS)}
STATISTICS["mean"] = torch.zeros(5, 3)
DAMAGED = {
    "means of other widths": {"done": [STATISTICS, STATISTICS | {"mean": torch.zeros(5, 2)}]},
    "means of one dimension": {"done": [STATISTICS | {"mean": torch.zeros(5)}]},
    "statistics that are none": {"done": [STATISTICS | {"siwae": torch.ones(5) > 0}]},
    "complex numbers": {"done": [STATISTICS | {"k_hat": torch.ones(5, dtype=torch.complex64)}]},
    "others": {"done": [STATISTICS | {"image": torch.zeros(5)}]},
    "a tensor as key": {"key": {"seed": torch.zeros(2)}},
    "statistics are missing": {"done": [{"siwae": torch.zeros(5)}]},
    "draws of other shapes": {"blocks": [tuple(torch.zeros(2, n, 1) for n in (5, 5, 4))]},
    "draws without components": {"blocks": [(torch.zeros(2, 5),) * 3]},
}


@pytest.mark.parametrize("changes", DAMAGED.values(), ids=DAMAGED)
def test_a_part_that_is_damaged_is_refused(changes, tmp_path, data, monkeypatch):
    run(tmp_path, data)
    monkeypatch.setattr(evaluation, "_IMAGES", 5)
    killed_at_first_save(tmp_path, data, monkeypatch)
    path = tmp_path / "evaluation.partial.pt"
    torch.save(torch.load(path, weights_only=True) | changes, path)
    with pytest.raises(ValueError, match=r"partial\.pt holds no unfinished evaluation: delete it"):
        evaluate(tmp_path, data=data, draws=100)


def test_other_weights_start_it_anew(tmp_path, data, monkeypatch):
    """As when a run is trained again in the same folder."""
    run(tmp_path, data)
    monkeypatch.setattr(evaluation, "_IMAGES", 5)
    killed_at_first_save(tmp_path, data, monkeypatch)
    weights = torch.load(tmp_path / "best.pt", weights_only=True)
    torch.save({name: value + 0.1 for name, value in weights.items()}, tmp_path / "best.pt")
    assert (tmp_path / "evaluation.partial.pt").exists()
    continued = evaluate(tmp_path, data=data, draws=100)
    assert continued == evaluate(tmp_path, data=data, draws=100)


def test_it_runs_where_training_would(tmp_path, data, monkeypatch):
    """On the accelerator, which need not exist, unless another device is named."""
    run(tmp_path, data)
    asked = []

    def load_on(folder, device):
        asked.append(torch.device(device).type)
        return load_run(folder, "cpu")

    monkeypatch.setattr(evaluation, "load_run", load_on)
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: True))
    with pytest.raises((RuntimeError, AssertionError), match="CUDA|NVIDIA"):
        evaluate(tmp_path, data=data, draws=100)
    evaluate(tmp_path, data=data, draws=100, device="cpu")
    assert asked == ["cuda", "cpu"]
