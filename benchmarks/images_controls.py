"""Joint training against its controls on real images: the dense model at the `small` budget.

Four models with the same data, decoder and number of epochs: one component; four components
trained jointly by MISELBO; four trained apart against the frozen decoder of the first; and one
component with an encoder of as many parameters as the four have, trained with four importance
samples ("big IWAE"). All are scored with the same number of draws, and their latents classified
linearly: means and variances of the components, against as many posterior samples of one.

    python benchmarks/images_controls.py --dataset mnist   # resumes runs/images-controls-mnist
    python benchmarks/images_controls.py --dataset mnist --proposal adapted   # the same models
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

from common import RESULTS, data_folder

from mixscvi.images.datasets import load
from mixscvi.images.experiments.configs import Proposal, RunConfig
from mixscvi.images.experiments.probe import probe
from mixscvi.images.experiments.report import percent, trusted, with_ending
from mixscvi.images.experiments.sweep import run_once
from mixscvi.system import write_beside
from mixscvi.tables import markdown_table, mean_and_spread, run_missing

MODELS: dict[str, dict[str, Any]] = {
    "A = 1": {},
    "joint, A = 4": {"n_components": 4},
    "apart, A = 4": {"n_components": 4, "ensemble": True},
    "big IWAE, L = 4": {"n_components": 4, "objective": "iwae"},
}
COLUMNS = {
    "elbo": "ELBO",
    "jsd": "JSD",
    "accuracy_parameters": "accuracy, parameters",
    "accuracy_samples": "accuracy, samples",
}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, one line per model."""
    lines = []
    for model in MODELS:
        group = [row for row in rows if row["model"] == model]
        if not group:
            continue
        line: dict[str, Any] = {
            "model": model,
            "seeds": len(group),
            "proposal": group[0]["proposal"],
            "NLL": mean_and_spread([float(row["nll"]) for row in group]),
            "k-hat < 0.7": percent(fmean(trusted(row) for row in group)),
        }
        for name, title in COLUMNS.items():
            digits = 3 if name.startswith("accuracy") else 2
            line[title] = mean_and_spread([float(row[name]) for row in group], digits)
        line["parameters"] = f"{int(group[0]['parameters']):,}"
        lines.append(line)
    return markdown_table(lines)


def main() -> None:
    """Run what is missing, and write the table anew after each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", default="mnist", choices=["mnist", "fashion-mnist"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--proposal", default="encoder", choices=get_args(Proposal))
    parser.add_argument("--images", type=int, help="score the first so many test images")
    parser.add_argument("--device", help="the accelerator, if there is one, when not given")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder = Path("runs") / f"images-controls-{arguments.dataset}"
    results = RESULTS / f"images_controls_{arguments.dataset.replace('-', '_')}"
    command = shlex.join(["python", "benchmarks/images_controls.py", *sys.argv[1:]])
    data = load(arguments.dataset, data_folder() / "images")
    runs = {
        f"{model.split(',')[0].replace(' ', '').replace('=', '')}-seed{seed}": (
            model,
            RunConfig.from_preset(
                "vanilla", budget="small", dataset=arguments.dataset, seed=seed, **kwargs
            ),
        )
        for seed in range(arguments.seeds)
        for model, kwargs in MODELS.items()
    }

    def run(name: str, chosen: tuple[str, RunConfig], device: str | None) -> dict[str, Any]:
        model, config = chosen
        row = run_once(
            config,
            folder / name,
            data,
            proposal=arguments.proposal,
            images=arguments.images,
            device=device,
        )
        alone = folder / f"A1-seed{config.seed}"
        accuracy = probe(folder / name, against=alone, data=data, device=device)
        identity = {
            "model": model,
            "accuracy_parameters": accuracy["parameters"],
            "accuracy_samples": accuracy["samples"],
        }
        return identity | row | {"command": command}

    def report(name: str, rows: list[dict[str, Any]]) -> None:
        write_beside(with_ending(results, ".md"), f"{table(rows)}\n`{command}`\n")
        row = rows[-1]
        print(
            f"{name}: NLL {row['nll']:.2f} (k-hat < 0.7 for {percent(trusted(row))} of the "
            f"images), JSD {row['jsd']:.2f}",
            flush=True,
        )

    path = with_ending(results, ".csv")
    rows = run_missing(runs, run, path, device=arguments.device, report=report)
    print(table(rows), end="")


if __name__ == "__main__":
    main()
