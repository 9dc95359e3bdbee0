import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from idx_files import write_idx_files
from mixscvi.images import BUDGETS, ImageData
from mixscvi.images.__main__ import main
from mixscvi.images.experiments import sweep as sweep_module
from mixscvi.images.experiments.sweep import sweep

SMOKE = ("--budget", "smoke", "--max-epochs", "1", "--train-images", "50")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Idx files of small images with two classes, in the place of MNIST."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    for part, n in (("train", 10_200), ("t10k", 30)):
        labels = rng.integers(0, 2, n)
        images = rng.integers(0, 256, (n, 6, 5)) // (1 + labels)[:, None, None]
        files = {f"{part}-labels-idx1-ubyte": labels, f"{part}-images-idx3-ubyte": images}
        write_idx_files(folder, files)
    return folder


def test_every_command(tmp_path, folder, capsys):
    data = ("--data-folder", str(folder))
    run, one = str(tmp_path / "run"), str(tmp_path / "one")
    composite = ("--preset", "composite", "--dataset", "fashion-mnist", "--components", "3")
    main(["train", "--output", run, *composite, "--estimator", "some_to_all", *SMOKE, *data])
    output = capsys.readouterr().out
    assert output.startswith("parameters: encoder ")
    summary = json.loads(output[output.index("{") :])
    assert summary["epochs"] == 1

    main(["evaluate", run, "--draws", "60", *data])
    assert json.loads(capsys.readouterr().out)["draws"] == 60
    main(["train", "--output", one, "--dataset", "fashion-mnist", *SMOKE, *data])
    main(["probe", run, "--against", one, *data])
    main(["sample", run, "--images", "3"])
    main(["reconstruct", run, "--images", "4", *data])
    main(["curves", run, one, "--output", str(tmp_path / "run" / "curves")])
    for name in ("probe.json", "samples.png", "reconstructions.png", "curves.png", "curves.csv"):
        assert (tmp_path / "run" / name).stat().st_size > 0


def test_sweep_goes_on_where_it_stopped(tmp_path, folder, capsys):
    arguments = ["sweep", "--output", str(tmp_path / "runs"), "--results", str(tmp_path / "table")]
    arguments += ["--presets", "vanilla", "flow", "--seeds", "2", *SMOKE]
    arguments += ["--data-folder", str(folder), "--components"]
    main([*arguments, "1"])
    log = tmp_path / "runs" / "vanilla-A1-seed0" / "log.csv"
    written = log.stat().st_mtime_ns
    first = (tmp_path / "table.csv").read_text().splitlines()
    assert len(first) == 1 + 2 * 2

    main([*arguments, "1", "2"])
    assert log.stat().st_mtime_ns == written
    rows = (tmp_path / "table.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 2 * 2
    assert set(first) <= set(rows)
    table = (tmp_path / "table.md").read_text().splitlines()
    assert len(table) == 2 + 4 + 2
    assert table[-1].startswith("`mixscvi-images sweep --output ")
    assert (tmp_path / "table.png").stat().st_size > 0
    assert "vanilla-A2-seed1: NLL" in capsys.readouterr().out


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


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
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


@pytest.mark.parametrize("control", [("--objective", "iwae"), ("--ensemble",)])
def test_controls(tmp_path, folder, control, capsys):
    run = str(tmp_path / "run")
    data = ("--data-folder", str(folder))
    main(["train", "--output", run, "--components", "2", *control, *SMOKE, *data])
    main(["evaluate", run, "--draws", "50", *data])
    assert '"nll"' in capsys.readouterr().out


def test_images_of_the_users_own(tmp_path):
    images = np.random.default_rng(0).random((80, 7, 4))
    np.save(tmp_path / "mine.npy", images)
    run = str(tmp_path / "run")
    main(["train", "--output", run, "--dataset", str(tmp_path / "mine.npy"), *SMOKE])
    main(["evaluate", run, "--draws", "40"])
    main(["sample", run, "--images", "2"])


def test_resume(tmp_path, folder):
    arguments = ["train", "--output", str(tmp_path), *SMOKE, "--data-folder", str(folder)]
    main(arguments)
    weights = torch.load(tmp_path / "best.pt", weights_only=True)
    (tmp_path / "summary.json").unlink()
    main([*arguments, "--resume"])
    again = torch.load(tmp_path / "best.pt", weights_only=True)
    assert all(torch.equal(weights[key], again[key]) for key in weights)


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_resumed_after_sigkill_is_uninterrupted(tmp_path, folder):
    """A process killed in the middle of an epoch, then resumed, ends in the same bits."""
    arguments = ["train", "--preset", "flow", "--components", "2", "--estimator", "some_to_all"]
    arguments += ["--budget", "smoke", "--max-epochs", "12", "--train-images", "1000"]
    arguments += ["--data-folder", str(folder), "--output"]
    command = [sys.executable, "-m", "mixscvi.images", *arguments, str(tmp_path / "killed")]
    # Bits depend on the number of threads.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while process.poll() is None and not (tmp_path / "killed" / "last.ckpt").exists():
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "summary.json").exists()

    main([*arguments, str(tmp_path / "killed"), "--resume"])
    main([*arguments, str(tmp_path / "whole")])
    for name in ("log.csv", "summary.json"):
        killed, whole = ((tmp_path / run / name).read_text() for run in ("killed", "whole"))
        assert killed == whole
    killed, whole = (
        torch.load(tmp_path / run / "best.pt", weights_only=True) for run in ("killed", "whole")
    )
    assert all(torch.equal(killed[key], whole[key]) for key in whole)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["evaluate", "nowhere"], "nowhere holds no finished run"),
        (["train", "--output", "x", "--dataset", "mnits"], "'mnits'"),
        (["train", "--output", "x", "--data-folder", "nowhere"], "train-images-idx3-ubyte"),
        (["train", "--output", "x", "--sampled", "2"], "n_sampled must be between"),
    ],
)
def test_what_the_user_can_mend_ends_in_one_line(tmp_path, monkeypatch, arguments, match):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"mixscvi-images: .*{match}"):
        main(arguments)
    assert not (tmp_path / "x").exists()
