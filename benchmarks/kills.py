"""Saves that are killed at random moments, and what they leave.

A process saves a model over another one and is killed (SIGKILL) somewhere within the time that
a save takes. What the folder holds must then be one of the two models, whole and with its own
data, and the next save must clear what is left beside it.

    python benchmarks/kills.py --kills 200   # writes results/kills.csv
"""

from __future__ import annotations

import argparse
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

from mixscvi.system import write_beside
from mixscvi.tables import csv_text

KINDS = ("model", "model and data", "first save")


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


def run(kind: str, kills: int, models, rng: random.Random) -> dict:
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
    return {"what": kind, "save_seconds": round(duration, 3), **counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    models, rng = make_models(), random.Random(options.seed)
    rows = []
    for i, kind in enumerate(KINDS):
        share = options.kills * (i + 1) // len(KINDS) - options.kills * i // len(KINDS)
        rows.append(run(kind, share, models, rng) | {"seed": options.seed} | machine())
        print(rows[-1])
    write_beside(RESULTS / "kills.csv", csv_text(rows))


if __name__ == "__main__":
    main()
