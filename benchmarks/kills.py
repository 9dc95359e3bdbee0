"""Processes that are killed at random moments, and what they leave.

Saves: a process saves a model over another one and is killed (SIGKILL) somewhere within the time
that a save takes. What the folder holds must then be one of the two models, whole and with its
own data, and the next save must clear what is left beside it.

Runs: a process trains with checkpoints, or makes a sweep or an evaluation of images by the command
``mixscvi-images``, and is killed somewhere within the time that this takes. After each kill all
files must load. The same call goes on, and may be killed as well, until one ends: then its numbers
must be those of a run that was never killed, and there must be no other files than its own.

    python benchmarks/kills.py --kills 50   # of each kind; writes results/kills.csv
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from common import RESULTS, machine

from mixscvi.checkpoint_io import read_checkpoint
from mixscvi.system import write_beside
from mixscvi.tables import csv_text, read_rows

SAVES = ("model", "model and data", "first save")
SECONDS = ("seconds",)  # columns of a sweep that are not its numbers


def make_models():
    """Two small models with data of their own."""
    import scvi

    import mixscvi

    models = []
    for seed in (0, 1):
        scvi.settings.seed = seed
        adata = mixscvi.datasets.pbmc68k()[seed::2].copy()
        mixscvi.MixSCVI.setup_anndata(adata)
        model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=32)
        model.train(max_epochs=1, accelerator="cpu", enable_progress_bar=False)
        models.append(model)
    return models


def save(model, target: Path, kind: str) -> None:
    model.save(target, overwrite=True, save_anndata=kind != "model")


def start_saving(model, target: Path, kind: str) -> int:
    """Save in a process of its own."""
    child = os.fork()
    if not child:
        try:
            save(model, target, kind)
        finally:
            os._exit(0)
    return child


def killed_while_saving(model, target: Path, kind: str, seconds: float) -> bool:
    """Save in a process that is killed after a while; whether it was before its end."""
    child = start_saving(model, target, kind)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def holds(target: Path, models, kind: str) -> int | None:
    """Which of the models a folder holds, whole; ``None`` if neither."""
    from mixscvi import MixSCVI

    try:
        loaded = MixSCVI.load(target, adata=False if kind == "model" else None, accelerator="cpu")
    except (OSError, ValueError) as error:
        print(f"lost: {error}")
        return None
    for which, model in enumerate(models):
        expected = model.module.state_dict()
        same = all(torch.equal(v, expected[k]) for k, v in loaded.module.state_dict().items())
        if same and kind != "model":
            same = np.array_equal(loaded.adata.obs_names, model.adata.obs_names)
        if same:
            return which
    return None


def kill_saves(kind: str, kills: int, models, rng: random.Random) -> dict:
    counts = dict.fromkeys(
        ("killed", "after_its_end", "old", "new", "nothing", "lost", "litter"), 0
    )
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "model")
        start = time.perf_counter()
        os.waitpid(start_saving(models[0], target, kind), 0)
        duration = time.perf_counter() - start
        while counts["killed"] < kills:
            if kind == "first save":
                shutil.rmtree(target, ignore_errors=True)
            else:
                save(models[0], target, kind)
                counts["litter"] += len(os.listdir(folder)) != 1
            if not killed_while_saving(models[1], target, kind, rng.uniform(0, duration)):
                counts["after_its_end"] += 1
                continue
            counts["killed"] += 1
            if kind == "first save" and not target.exists():
                counts["nothing"] += 1
            else:
                found = holds(target, models, kind)
                counts[{0: "old", 1: "new", None: "lost"}[found]] += 1
        save(models[0], target, kind)
        counts["litter"] += len(os.listdir(folder)) != 1
    return {"what": f"save, {kind}", "seconds": round(duration, 3), **counts}


def train(folder: Path, n_components: int) -> None:
    """Train with a checkpoint in each epoch, and save the model."""
    import scvi

    import mixscvi

    adata = mixscvi.datasets.pbmc68k()[::2].copy()
    mixscvi.MixSCVI.setup_anndata(adata)
    scvi.settings.seed = 0
    model = mixscvi.MixSCVI(adata, n_components=n_components, n_hidden=32)
    model.train(
        max_epochs=8,
        early_stopping=True,
        checkpoint_dir=folder / "checkpoint",
        checkpoint_every=1,
        accelerator="cpu",
        enable_progress_bar=False,
    )
    model.save(folder / "model", overwrite=True)


def sweep(folder: Path, images: Path) -> None:
    command = ["sweep", "--output", str(folder / "sweep"), "--budget", "smoke", "--seeds", "1"]
    command += ["--presets", "vanilla", "composite", "--components", "1", "2"]
    _images(*command, "--max-epochs", "4", "--dataset", str(images))


def evaluate(folder: Path, images: Path) -> None:
    if not (folder / "run").exists():
        beside = folder.with_name(f"{folder.name}-run")
        shutil.rmtree(beside, ignore_errors=True)  # a copy that was killed
        shutil.copytree(images.parent / "run", beside)
        beside.rename(folder / "run")
    _images("evaluate", str(folder / "run"), "--draws", "40000")


def _images(*command: str) -> None:
    from mixscvi.images.__main__ import main

    main([*command, "--device", "cpu"])


def work_of(images: Path) -> dict:
    """What is killed, by name."""
    return {
        "training, 1 component": lambda folder: train(folder, 1),
        "training, 4 components": lambda folder: train(folder, 4),
        "sweep": lambda folder: sweep(folder, images),
        "evaluation": lambda folder: evaluate(folder, images),
    }


def start_working(work, folder: Path) -> int:
    """Work in a process of its own, whose temporary files go into a folder."""
    child = os.fork()
    if not child:
        status = 1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.tempdir = str(folder / "tmp")
            Path(tempfile.tempdir).mkdir(exist_ok=True)
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            work(folder)
            status = 0
        finally:
            os._exit(status)
    return child


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def all_load(folder: Path) -> bool:
    """Whether every file in its place is whole; those beside their places may be anything."""
    for name in files_of(folder):
        path = folder / name
        if path.name.startswith(".partial.") or name.startswith(("tmp/", ".model.saving-")):
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix in (".ckpt", ".pt"):
                read_checkpoint(path)
            elif path.suffix == ".csv" and len(set(map(len, read_rows(path)))) > 1:
                raise ValueError(f"{path} has rows of different lengths")
        except (OSError, ValueError) as error:
            print(f"lost: {error}")
            return False
    return True


def numbers_of(folder: Path) -> dict:
    """All numbers that a run has come to."""
    numbers = {}
    for name in files_of(folder):
        path = folder / name
        if path.suffix == ".csv":
            rows = read_rows(path)
            numbers[name] = [{k: v for k, v in r.items() if k not in SECONDS} for r in rows]
        elif path.name.startswith("evaluation") and path.suffix == ".json":
            numbers[name] = json.loads(path.read_text())
        elif path.name == "model.pt":
            stored = read_checkpoint(path)
            history = stored["attr_dict"]["history_"]
            numbers[name] = str(history), *(v.tolist() for v in stored["model_state_dict"].values())
        elif path.name == "best.pt":
            numbers[name] = [value.tolist() for value in read_checkpoint(path).values()]
    return numbers


def kill_runs(name: str, work, kills: int, rng: random.Random) -> dict:
    counts = dict.fromkeys(("killed", "ended", "other_numbers", "lost", "litter"), 0)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        start = time.perf_counter()
        if os.waitpid(start_working(work, whole), 0)[1]:
            raise SystemExit(f"{name} failed without a kill")
        duration = time.perf_counter() - start
        numbers, files = numbers_of(whole), files_of(whole)
        killed = Path(folder, "killed")
        while counts["killed"] < kills or killed.exists():
            child = start_working(work, killed)
            time.sleep(rng.uniform(0, duration))
            if counts["killed"] < kills:
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            if os.WIFSIGNALED(status):
                counts["killed"] += 1
                counts["lost"] += not all_load(killed)
                continue
            counts["ended"] += 1
            counts["lost"] += status != 0
            counts["other_numbers"] += numbers_of(killed) != numbers
            if files_of(killed) != files:
                print("litter:", sorted(set(files_of(killed)) ^ set(files)))
                counts["litter"] += 1
            shutil.rmtree(killed)
    return {"what": name, "seconds": round(duration, 3), **counts}


def make_images(folder: Path) -> Path:
    """A file of small images, and a run on them that can be evaluated."""
    images = folder / "images.npy"
    write_beside(images, lambda path: np.save(path, np.random.default_rng(0).random((200, 6, 6))))

    def make_run(folder: Path) -> None:
        command = ["train", "--preset", "vanilla", "--components", "2", "--budget", "smoke"]
        _images(*command, "--dataset", str(images), "--output", str(images.parent / "run"))

    if os.waitpid(start_working(make_run, folder / "making"), 0)[1]:
        raise SystemExit("the run to be evaluated failed")
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", default="", help="kinds whose names start so; the others keep their rows"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    import mixscvi.images.experiments.sweep
    import mixscvi.model  # noqa: F401  # once, for all processes

    results = RESULTS / "kills.csv"
    rng, rows = random.Random(options.seed), read_rows(results)
    with tempfile.TemporaryDirectory() as folder:
        kinds = {f"save, {kind}": None for kind in SAVES} | work_of(make_images(Path(folder)))
        chosen = {name: work for name, work in kinds.items() if name.startswith(options.only)}
        # The processes of runs are forked before this one computes anything.
        for name, work in sorted(chosen.items(), key=lambda item: item[1] is None):
            if work is not None:
                row = kill_runs(name, work, options.kills, rng)
            else:
                row = kill_saves(name.removeprefix("save, "), options.kills, make_models(), rng)
            rows = [other for other in rows if other["what"] != name]
            rows.append(row | {"seed": options.seed} | machine())
            print(rows[-1], flush=True)
            write_beside(results, csv_text(rows))


if __name__ == "__main__":
    main()
