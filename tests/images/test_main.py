import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

from idx_files import write_two_classes
from mixscvi.images.__main__ import Command, main
from mixscvi.images.experiments import runs
from mixscvi.tables import read_rows

SMOKE = ("--budget", "smoke", "--max-epochs", "1", "--train-images", "50")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Idx files of small images with two classes, that stand in for MNIST."""
    folder = tmp_path_factory.mktemp("data")
    write_two_classes(folder)
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
    main(["evaluate", run, "--draws", "60", "--proposal", "adapted", "--images", "7", *data])
    adapted = json.loads(capsys.readouterr().out)
    assert (adapted["proposal"], adapted["n_images"]) == ("adapted", 7)
    main(["train", "--output", one, "--dataset", "fashion-mnist", *SMOKE, *data])
    main(["probe", run, "--against", one, *data])
    main(["sample", run, "--images", "3"])
    main(["reconstruct", run, "--images", "4", *data])
    main(["curves", run, one, "--output", str(tmp_path / "run" / "curves")])
    for name in ("probe.json", "samples.png", "reconstructions.png", "curves.png", "curves.csv"):
        assert (tmp_path / "run" / name).stat().st_size > 0


def test_training_makes_its_model_once(tmp_path, folder, monkeypatch, capsys):
    """And once more when the best weights are read."""
    made, original = [], runs.ImageVAE.__init__

    def counted(self, *args, **kwargs):
        if torch.get_default_device().type != "meta":  # shapes alone, to be compared
            made.append(1)
        original(self, *args, **kwargs)

    monkeypatch.setattr(runs.ImageVAE, "__init__", counted)
    main(["train", "--output", str(tmp_path / "run"), *SMOKE, "--data-folder", str(folder)])
    assert capsys.readouterr().out.startswith("parameters: encoder ")
    assert len(made) == 2


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

    main([*arguments, "1", "2", "--proposal", "adapted", "--images", "6", "--draws", "50"])
    assert log.stat().st_mtime_ns == written
    rows = read_rows(tmp_path / "table.csv")
    assert {(row["proposal"], row["n_images"]) for row in rows} == {("adapted", "6")}
    assert re.search(
        r"vanilla-A2-seed1: NLL [0-9.]+ \(k-hat < 0.7 for \d+ % of the images\), JSD",
        capsys.readouterr().out,
    )


@pytest.mark.parametrize("engine", ["sequential", "ray"])
def test_a_sweep_with_a_failed_run_shows_it_and_fails(engine, tmp_path, ray_cluster, capsys):
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).random((80, 6, 5)))
    runs = tmp_path / "runs"
    arguments = ["sweep", "--output", str(runs), "--dataset", str(tmp_path / "mine.npy")]
    arguments += ["--presets", "vanilla", "--components", "1", "2", "--seeds", "1", *SMOKE]
    arguments += ["--engine", engine, "--device", "cpu"]
    (runs / "vanilla-A1-seed0").mkdir(parents=True)
    (runs / "vanilla-A1-seed0" / "config.json").write_text("{")
    with pytest.raises(SystemExit, match="1 of 2 runs failed"):
        main(arguments)
    shown = capsys.readouterr()
    assert "vanilla-A2-seed0: NLL" in shown.out
    assert shown.err.splitlines()[-1].startswith("vanilla-A1-seed0 failed: ValueError: ")
    (runs / "vanilla-A1-seed0" / "config.json").unlink()
    main(arguments)
    assert [row["components"] for row in read_rows(runs / "sweep.csv")] == ["1", "2"]


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


def test_images_of_the_users_own_are_found_from_another_folder(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    np.save("mine.npy", np.random.default_rng(0).random((80, 7, 4)))
    main(["train", "--output", "../run", "--dataset", "mine.npy", *SMOKE])
    monkeypatch.chdir(tmp_path / "there")
    evaluation = ["evaluate", "../run", "--draws", "40"]
    main(evaluation)
    # As earlier versions wrote it: relative to a folder that is not known.
    config = json.loads(Path("../run/config.json").read_text()) | {"dataset": "mine.npy"}
    Path("../run/config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=r"there is no file mine.npy .*--data-folder"):
        main(evaluation)
    main([*evaluation, "--data-folder", "../here"])
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "run" / "summary.json").unlink()
    main(["train", "--output", "../run", "--dataset", "mine.npy", *SMOKE, "--resume"])


def test_images_that_are_too_few_are_refused(tmp_path):
    np.save(tmp_path / "three.npy", np.random.default_rng(0).random((3, 7, 4)))
    arguments = ["train", "--output", str(tmp_path / "run"), *SMOKE, "--dataset"]
    with pytest.raises(SystemExit, match=r"three.npy holds no .* images: there are 3, .* least 60"):
        main([*arguments, str(tmp_path / "three.npy")])
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(tmp_path):
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).random((80, 7, 4)))
    arguments = ["train", "--output", str(tmp_path / "run"), *SMOKE, "--device", "cuda"]
    with pytest.raises(SystemExit, match="device='cuda', but this machine has none"):
        main([*arguments, "--dataset", str(tmp_path / "mine.npy")])
    assert not (tmp_path / "run").exists()


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
        (["train", "--output", "x", "--seed", "-1"], r"seed must be between 0 .*, got -1"),
        (["train", "--output", "file"], "output must be a folder, got 'file', and 'file' is a"),
        (["train", "--output", "file/x"], "output must be a folder, got 'file/x'"),
        (["train", "--output", "x", "--components", "100000000000"], "n_components=1000.* memory"),
        (["sweep", "--output", "x", "--results", "file/x"], "results must be a folder"),
        (["sweep", "--output", "x", "--draws", "1"], "draws must be at least 25 .*, got 1"),
        (["sweep", "--output", "x", "--draws", "1" + 14 * "0"], "draws=1.* do not fit into memory"),
        (["sweep", "--output", "x", "--device", "tpu"], "device must be cpu.* got 'tpu'"),
        (["curves", "--output", "x"], "run_folders must name at least one run"),
        (["sample", "run", "--images", "0"], "images must be at least 1, got 0"),
        (["reconstruct", "run", "--images", "-1"], "images must be at least 1, got -1"),
        (["evaluate", "run", "--seed", "-1"], "seed must be between 0"),
        (["probe", "run", "--seed", "-1"], "seed must be between 0"),
    ],
)
def test_errors_that_the_user_can_correct_end_in_one_line(tmp_path, monkeypatch, arguments, match):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    if {"file", "file/x", "100000000000", "1", "tpu"} & {*arguments}:
        np.save("mine.npy", np.random.default_rng(0).random((80, 6, 5)))
        arguments = [*arguments, "--dataset", "mine.npy", *SMOKE]
    with pytest.raises(SystemExit, match=f"mixscvi-images: .*{match}"):
        main(arguments)
    assert not (tmp_path / "x").exists()


def test_a_sweep_with_too_few_images_ends_in_one_line(tmp_path, folder):
    arguments = ["sweep", "--output", str(tmp_path / "x"), *SMOKE, "--data-folder", str(folder)]
    with pytest.raises(SystemExit, match="between 1 and the run's 20 test images, got 21"):
        main([*arguments, "--images", "21"])
    assert not (tmp_path / "x").exists()


RECORDED = ("images_sweep_mnist", "images_sweep_fashion_mnist", "images_vanilla_paper")


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_commands_are_still_commands(name):
    text = (Path(__file__).parents[2] / "benchmarks" / "results" / f"{name}.md").read_text()
    (command,) = re.findall("^`mixscvi-images (.+)`$", text, re.MULTILINE)
    parsed = tyro.cli(Command, args=shlex.split(command))
    assert parsed.results == Path("benchmarks/results") / name
