import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mixscvi.engines import RayEngine
from mixscvi.images import BUDGETS, ImageData, RunConfig
from mixscvi.images.experiments import sweep as sweep_module
from mixscvi.images.experiments.sweep import run_once, sweep
from mixscvi.tables import read_rows


def test_presets_of_a_sweep_take_as_many_images_as_they_are_trained_on(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (120, 6, 5)).astype(np.uint8)
    np.save(tmp_path / "mine.npy", images)
    small = replace(BUDGETS["smoke"].training, max_epochs=1, n_test=7)
    monkeypatch.setitem(BUDGETS, "smoke", replace(BUDGETS["smoke"], pixelcnn_training=small))
    rows = sweep(
        tmp_path / "runs",
        presets=("pixelcnn", "vanilla"),
        components=(1,),
        seeds=1,
        budget="smoke",
        dataset=str(tmp_path / "mine.npy"),
    )
    assert {row["preset"]: row["n_images"] for row in rows} == {"pixelcnn": 7, "vanilla": 20}


@pytest.fixture
def swept(tmp_path):
    """A sweep of one run, to be called again."""
    gray = np.random.default_rng(0).random((80, 6, 5))
    data = ImageData.from_arrays(gray, n_validation=20, n_test=10, name="mine")

    def again(**kwargs):
        arguments = {"presets": ["vanilla"], "components": [2], "seeds": 1, "draws": 40}
        arguments |= {"data": data, "budget": "smoke", "results": tmp_path / "table-v0.2"}
        (row,) = sweep(tmp_path / "runs", **(arguments | kwargs))
        return row

    return again


def test_a_sweep_evaluates_with_as_many_draws_as_it_is_asked_for(tmp_path, swept):
    first = swept()
    assert (first["draws"], first["dataset"]) == (40, "mine")
    assert swept(draws=60)["draws"] == 60
    assert (tmp_path / "table-v0.2.csv").exists()


def test_a_sweep_survives_the_loss_of_its_costs(tmp_path, swept):
    first = swept()
    assert first["seconds"] is not None
    (tmp_path / "runs" / "vanilla-A2-seed0" / "cost.json").unlink()
    again = swept()
    assert again["seconds"] is None
    assert again | {"seconds": 0} == first | {"seconds": 0}


def test_a_sweep_evaluates_anew_what_was_trained_anew(tmp_path, swept):
    first = swept()
    folder = tmp_path / "runs" / "vanilla-A2-seed0"
    weights = torch.load(folder / "best.pt", weights_only=True)
    torch.save({name: value + 0.01 for name, value in weights.items()}, folder / "best.pt")
    assert swept()["nll"] != first["nll"]


def test_a_sweep_is_told_the_device(monkeypatch, swept):
    asked = []
    for name in ("train", "evaluate"):
        original = getattr(sweep_module, name)

        def recorded(*args, device, name=name, original=original, **kwargs):
            asked.append((name, device))
            return original(*args, device=device, **kwargs)

        monkeypatch.setattr(sweep_module, name, recorded)
    assert swept(device="cpu")["device"] == "cpu"
    assert asked == [("train", "cpu"), ("evaluate", "cpu")]


@pytest.mark.parametrize(("device", "evaluated_anew"), [("cpu", False), ("cuda", True)])
def test_a_sweep_evaluates_anew_what_was_evaluated_elsewhere(
    tmp_path, swept, device, evaluated_anew
):
    """The draws depend on the device."""
    first = swept(device="cpu")
    path = tmp_path / "runs" / "vanilla-A2-seed0" / "evaluation.json"
    elsewhere = json.loads(path.read_text()) | {"device": device, "nll": 7.0}
    path.write_text(json.dumps(elsewhere))
    assert swept(device="cpu")["nll"] == (first["nll"] if evaluated_anew else 7.0)


def test_a_sweep_by_adapted_proposals_keeps_the_encoders_evaluation(tmp_path, swept):
    first = swept()
    folder = tmp_path / "runs" / "vanilla-A2-seed0"
    before = (folder / "evaluation.json").read_bytes()
    adapted = swept(proposal="adapted")
    assert (first["proposal"], adapted["proposal"]) == ("encoder", "adapted")
    assert adapted["nll"] != first["nll"] == adapted["nll_encoder"]
    assert adapted["elbo"] == first["elbo"]
    assert adapted["evaluations"] > 500
    assert (folder / "evaluation.json").read_bytes() == before
    assert swept() == first


def test_a_sweep_reads_what_was_adapted(tmp_path, swept):
    swept(proposal="adapted")
    path = tmp_path / "runs" / "vanilla-A2-seed0" / "evaluation_adapted.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"nll": 7.0}))
    assert swept(proposal="adapted")["nll"] == 7.0
    assert swept(proposal="adapted", images=5)["nll"] != 7.0


def test_a_sweep_knows_evaluations_that_do_not_name_their_proposal(tmp_path, swept):
    """Those of earlier versions are the encoder's."""
    swept()
    folder = tmp_path / "runs" / "vanilla-A2-seed0"
    result = json.loads((folder / "evaluation.json").read_text())
    del result["proposal"]
    text = json.dumps(result | {"nll": 7.0})
    (folder / "evaluation.json").write_text(text)
    assert swept()["nll"] == 7.0
    (folder / "evaluation_adapted.json").write_text(text)
    assert swept(proposal="adapted")["nll"] != 7.0


def test_a_sweeps_models_are_scored_on_as_many_images_as_it_is_asked_for(tmp_path, swept):
    assert swept()["n_images"] == 10
    assert swept(images=4)["n_images"] == 4
    assert swept(images=4, proposal="adapted")["n_images"] == 4


def test_tables_of_two_proposals_do_not_overwrite_each_other(tmp_path, swept):
    swept(results=None)
    swept(results=None, proposal="adapted")
    stems = [path.stem for path in (tmp_path / "runs").glob("sweep*")]
    assert sorted(stems) == 3 * ["sweep"] + 3 * ["sweep_adapted"]  # CSV, Markdown, figure


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"proposal": "x"}, r"proposal must be one of \['encoder', 'adapted'\], got 'x'"),
        ({"images": 11}, "images must be between 1 and the run's 10 test images, got 11"),
        ({"presets": ["vanilla", "flaw"]}, "preset must be one of .*'flaw'"),
        ({"components": [1, 1]}, r"components must be one or more different values, got \[1, 1\]"),
        ({"presets": []}, "presets must be one or more different values"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
    ],
)
def test_a_sweep_is_refused_before_its_first_run(tmp_path, swept, kwargs, match):
    with pytest.raises(ValueError, match=match):
        swept(**kwargs)
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_sweep_has_all_presets_once_before_any_of_them_twice():
    configs = sweep_module._configs(["vanilla", "flow"], [1, 2], 2, budget="smoke")
    assert [(c.seed, c.preset, c.mixture.n_components) for c in configs] == [
        (seed, preset, n) for seed in (0, 1) for preset in ("vanilla", "flow") for n in (1, 2)
    ]


def test_the_table_is_that_of_the_rows(tmp_path, swept):
    row = swept(command="mixscvi-images sweep", components=[2])
    (written,) = read_rows(tmp_path / "table-v0.2.csv")
    assert written == {name: str(value) for name, value in row.items()}
    assert {"nll", "nll_iw_miselbo", "miselbo", "device", "seconds"} < written.keys()
    text = (tmp_path / "table-v0.2.md").read_text()
    assert "NLL (IW-MISELBO)" in text and text.endswith("\n`mixscvi-images sweep`\n")


COST = ("seconds", "threads")


def test_ray_makes_the_same_table(tmp_path, swept_by, ray_cluster):
    swept_by(tmp_path / "here")
    swept_by(tmp_path / "there", engine=RayEngine())
    tables = [read_rows(tmp_path / name / "sweep.csv") for name in ("here", "there")]
    assert [row["components"] for row in tables[0]] == ["1", "2"]
    for here, there in zip(*tables, strict=True):
        for column in here.keys() - set(COST):
            assert here[column] == there[column] or float(here[column]) == pytest.approx(
                float(there[column]), rel=1e-4
            ), column


@pytest.mark.parametrize("engine", ["sequential", "ray"])
def test_a_failed_run_is_repeated_alone(engine, tmp_path, swept_by, ray_cluster):
    kwargs = {} if engine == "sequential" else {"engine": RayEngine()}
    broken = tmp_path / "runs" / "vanilla-A1-seed0"
    broken.mkdir(parents=True)
    (broken / "config.json").write_text("{")
    told = []
    with pytest.raises(ExceptionGroup, match=r"1 of 2 runs failed \(vanilla-A1-seed0\)"):
        swept_by(tmp_path / "runs", failed=lambda *args: told.append(args), **kwargs)
    ((name, error),) = told
    assert name == "vanilla-A1-seed0"
    assert isinstance(error, ValueError)
    assert [row["components"] for row in read_rows(tmp_path / "runs" / "sweep.csv")] == ["2"]
    log = tmp_path / "runs" / "vanilla-A2-seed0" / "log.csv"
    written = log.stat().st_mtime_ns

    (broken / "config.json").unlink()
    rows = swept_by(tmp_path / "runs", **kwargs)
    assert [row["components"] for row in rows] == [1, 2]
    assert log.stat().st_mtime_ns == written


def test_machines_that_do_not_share_the_folder_are_told(tmp_path, swept_by):
    """As on another machine, the folder is gone where the run is made."""

    def elsewhere(run, configurations):
        (tmp_path / "runs").rename(tmp_path / "moved")
        yield from sweep_module.sequential(run, configurations)

    with pytest.raises(ExceptionGroup) as raised:
        swept_by(tmp_path / "runs", engine=elsewhere)
    assert all("must share this folder" in str(error) for error in raised.value.exceptions)


@pytest.fixture
def swept_by():
    """A sweep of two runs, by some engine, into some folder."""
    gray = np.random.default_rng(0).random((80, 6, 5))
    data = ImageData.from_arrays(gray, n_validation=20, n_test=10, name="mine")
    arguments = {"presets": ["vanilla"], "components": [1, 2], "seeds": 1, "draws": 40}
    arguments |= {"data": data, "budget": "smoke", "device": "cpu"}
    return lambda folder, **kwargs: sweep(folder, **arguments, **kwargs)


def test_a_folder_of_another_run_is_refused(tmp_path):
    gray = np.random.default_rng(0).random((80, 6, 5))
    data = ImageData.from_arrays(gray, n_validation=20, n_test=10)
    config = RunConfig.from_preset("vanilla", budget="smoke", training={"max_epochs": 1})
    run_once(config, tmp_path, data, draws=30)
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        run_once(replace(config, seed=1), tmp_path, data, draws=30)


def test_a_run_on_other_images_is_not_taken_for_one_on_these(tmp_path, swept):
    first = swept()
    gray = np.random.default_rng(1).random((80, 6, 5))
    others = ImageData.from_arrays(gray, n_validation=20, n_test=10, name="mine")
    with pytest.raises(ExceptionGroup) as raised:
        swept(data=others)
    assert "holds a run on other images, 'mine' has changed" in str(raised.value.exceptions[0])
    assert swept() == first
