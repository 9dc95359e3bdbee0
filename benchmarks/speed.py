"""What MixSCVI costs, as ratios to `scvi.model.SCVI` taken side by side in one run.

Every model trains once before it is timed; then all take turns. Times are medians over the rounds;
ratios are medians of each round's, so that drift of the machine falls on both alike. `train()` is
timed whole: loader, Lightning and optimizer included.

    python benchmarks/speed.py              # all parts: CSV files, the README's lines
    python benchmarks/speed.py --part train --data pbmc4k
    python benchmarks/speed.py --part profile   # where a step's time goes: speed_profile.csv
    python benchmarks/speed.py --summary    # the table of ratios from the CSV
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from typing import Any

import numpy as np
from common import RESULTS
from scaling import SCALING, scaling
from step_profile import profile_training
from timed_models import DATA, in_turns, made, make, read, train

from mixscvi.system import write_beside
from mixscvi.tables import csv_text, markdown_table, read_rows

SOME = {"n_sampled_components": 1, "n_components": 100, "component_encoder": "amortized"}
SCVI_ZINB, SCVI_NB = "SCVI", "SCVI, NB"
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {  # compared with, arguments
    "A = 1, ZINB": (SCVI_ZINB, {"n_components": 1}),
    "A = 1, NB": (SCVI_NB, {"n_components": 1, "gene_likelihood": "nb"}),
    "A = 4, all_to_all, separate": (SCVI_ZINB, {"n_components": 4}),
    "A = 4, S = 1, some_to_some, separate": (
        SCVI_ZINB,
        {"n_components": 4, "estimator": "some_to_some"},
    ),
    "A = 100, S = 1, some_to_some, amortized": (SCVI_ZINB, {**SOME, "estimator": "some_to_some"}),
    "A = 100, S = 1, some_to_all, amortized": (SCVI_ZINB, {**SOME, "estimator": "some_to_all"}),
}
BOUNDS = {  # what was asked for; for cortex where that differs
    "A = 1, ZINB": {"cortex": 0.5, "": 0.4},
    "A = 1, NB": {"": 0.4},
    "A = 4, all_to_all, separate": {"cortex": 1.0, "": 0.9},
    "A = 4, S = 1, some_to_some, separate": {"": 0.5},
    "A = 100, S = 1, some_to_some, amortized": {"": 0.5},
    "A = 100, S = 1, some_to_all, amortized": {"": 0.6},
    "get_latent_representation, A = 4": {"": 1.3},
    "get_marginal_ll, A = 4, equal draws": {"": 0.2},
    "decoder and log-likelihood, no gradient": {"": 0.25},
    "peak memory of training, A = 4": {"": 1.3},
    "import": {"": 1.05},
    "first training of 700 cells, A = 1": {"": 1.0},
    "first training of 700 cells, A = 4": {"": 1.0},
}


def compared(
    part: str, data: str, pairs: dict[str, str], rounds: dict[str, list[float]]
) -> list[dict]:
    """A row for each thing compared with SCVI's."""
    rows = []
    for what, reference in pairs.items():
        bounds = BOUNDS[what]
        ours, theirs = rounds[what], rounds[reference]
        ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
        rows.append(
            {
                "part": part,
                "data": data,
                "what": what,
                "value": float(f"{statistics.median(ours):.4g}"),
                "scvi": float(f"{statistics.median(theirs):.4g}"),
                "ratio": round(statistics.median(ratios), 3),
                "bound": bounds.get(data, bounds[""]),
            }
        )
        print({key: rows[-1][key] for key in ("data", "what", "ratio", "bound")}, flush=True)
    return rows


def time_training(data: str, rounds: int) -> list[dict]:
    """`train()` of all models."""
    adata, epochs = read(data), DATA[data][2]
    models = {
        SCVI_ZINB: make(adata, "SCVI"),
        SCVI_NB: make(adata, "SCVI", gene_likelihood="nb"),
        **{name: make(adata, "MixSCVI", **kwargs) for name, (_, kwargs) in TRAINED.items()},
    }
    for model in models.values():
        train(model, 1)
    calls = {name: lambda model=model: train(model, epochs) for name, model in models.items()}
    pairs = {name: reference for name, (reference, _) in TRAINED.items()}
    return compared("train", data, pairs, in_turns(calls, rounds))


def time_methods(data: str, rounds: int) -> list[dict]:
    """What is called on a trained model."""
    import torch
    from scvi import REGISTRY_KEYS

    from mixscvi.module import decode

    adata = read(data)
    scvi_model, ours = make(adata, "SCVI"), make(adata, "MixSCVI", n_components=4)
    for model in (scvi_model, ours):
        train(model, 1)
    cells = np.arange(128)
    tensors = next(iter(ours._make_data_loader(adata=adata, indices=cells, batch_size=128)))
    x, n_draws = tensors[REGISTRY_KEYS.X_KEY], 16
    draw = {"z": torch.randn(n_draws, 128, 10), "library": x.sum(1, keepdim=True).log()}
    library = draw["library"].expand(n_draws, 128, 1)

    @torch.inference_mode()
    def their_decoder():
        inputs = scvi_model.module._get_generative_input(tensors, draw | {"library": library})
        for layer in range(n_draws):  # its own way with several draws costs more
            one = inputs | {"z": inputs["z"][layer], "library": library[layer]}
            scvi_model.module.generative(**one)["px"].log_prob(x).sum(-1)

    @torch.inference_mode()
    def our_decoder():
        inputs = ours.module._get_generative_input(tensors, draw)
        decode(ours.module, **inputs).log_prob(x)

    def marginal(model):
        return model.get_marginal_ll(indices=cells, n_mc_samples=400)

    calls = {
        "their latents": scvi_model.get_latent_representation,
        "get_latent_representation, A = 4": ours.get_latent_representation,
        "their marginal": lambda: marginal(scvi_model),
        "get_marginal_ll, A = 4, equal draws": lambda: marginal(ours),
        "their decoder": their_decoder,
        "decoder and log-likelihood, no gradient": our_decoder,
    }
    for call in calls.values():
        call()
    names = list(calls)
    pairs = dict(zip(names[1::2], names[::2], strict=True))
    return compared("methods", data, pairs, in_turns(calls, rounds))


_MEMORY = """
import resource, sys, warnings, logging
warnings.simplefilter("ignore"); logging.disable(logging.WARNING)
sys.path.insert(0, {folder!r})
from timed_models import make, read, train
train(make(read({data!r}), {cls!r}, **{kwargs!r}), 1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


_FIRST = """
import logging, time, warnings
warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import scvi
import mixscvi
adata = mixscvi.datasets.pbmc68k()
cls = {cls}
cls.setup_anndata(adata)
model = cls(adata, **{kwargs!r})
start = time.perf_counter()
model.train(enable_progress_bar=False)
print(time.perf_counter() - start)
"""


def _in_a_process(code: str, **environment: str) -> float:
    """The number that a program prints last."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, capture_output=True, text=True, check=True, env=os.environ | environment
    )
    return float(result.stdout.split()[-1])


def time_first(rounds: int) -> list[dict]:
    """Seconds of `train()` as it is, of 700 cells, where nothing was compiled before."""
    models = {
        "theirs": ("scvi.model.SCVI", {}),
        "first training of 700 cells, A = 1": ("mixscvi.MixSCVI", {"n_components": 1}),
        "first training of 700 cells, A = 4": ("mixscvi.MixSCVI", {"n_components": 4}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, (cls, kwargs) in models.items():
            with tempfile.TemporaryDirectory() as empty:
                code = _FIRST.format(cls=cls, kwargs=kwargs)
                seconds[name].append(_in_a_process(code, NUMBA_CACHE_DIR=empty))
    pairs = dict.fromkeys([name for name in models if name != "theirs"], "theirs")
    return compared("first", "", pairs, seconds)


def measure_memory(data: str) -> list[dict]:
    """Peak resident memory of a process that trains, in kilobytes."""
    folder = str(RESULTS.parent)
    figures = {
        name: [_in_a_process(_MEMORY.format(folder=folder, data=data, cls=cls, kwargs=kwargs))]
        for name, cls, kwargs in (
            ("theirs", "SCVI", {}),
            ("peak memory of training, A = 4", "MixSCVI", {"n_components": 4}),
        )
    }
    pairs = {"peak memory of training, A = 4": "theirs"}
    return compared("memory", data, pairs, figures)


def time_import(rounds: int) -> list[dict]:
    """Seconds until the class can be used, each time in a process of its own."""
    code = "import time; s = time.perf_counter(); {}; print(time.perf_counter() - s)"
    statements = {
        "theirs": "from scvi.model import SCVI",
        "import": "import mixscvi; mixscvi.MixSCVI",
    }
    seconds: dict[str, list[float]] = {name: [] for name in statements}
    for _ in range(rounds + 1):
        for name, statement in statements.items():
            seconds[name].append(_in_a_process(code.format(statement)))
    figures = {name: values[1:] for name, values in seconds.items()}
    return compared("import", "", {"import": "theirs"}, figures)


def summary(rows: list[dict]) -> str:
    """The ratios as a table, one column per data set."""
    columns = [*dict.fromkeys(row["data"] for row in rows if row["part"] == "train")]
    lines = []
    for what in BOUNDS:
        of = {row["data"]: row for row in rows if row["what"] == what}
        if not of:
            continue
        line = {"relative to SCVI's": what}
        for data in columns:
            row = of.get(data) or (of.get("") if data == columns[0] else None)
            line[data] = f"{float(row['ratio']):.2f}" if row else ""
        lines.append(line)
    return markdown_table(lines)


def readme_lines(rows: list[dict], profile: list[dict]) -> dict[str, str]:
    """The README's lines about speed, by what they begin with."""

    def ratios(what: str) -> str:
        of = [float(row["ratio"]) for row in rows if row["what"].startswith(what)]
        return f"**{min(of):.2f} to {max(of):.2f}**"

    def share(model: str) -> str:
        (of,) = {
            row["share"]
            for row in profile
            if row["part"] == "matrix products" and row["model"].startswith(model)
        }
        return f"{float(of):.0%}".replace("%", " %")

    time_of, products = "| time of [`train()`]", "| matrix products in a training step |"
    return {
        time_of: f"{time_of}(docs/user_guide/speed.md) | 1 | {ratios('A = 1,')} (`A` = 1), "
        f"{ratios('A = 4, all_to_all')} (`A` = 4) |",
        products: f"{products} {share('SCVI')} | {share('A = 1,')} (`A` = 1), "
        f"{share('A = 4,')} (`A` = 4) |",
    }


def with_readme_lines(text: str, rows: list[dict], profile: list[dict]) -> str:
    """The README with its lines about speed as the results have them."""
    new = readme_lines(rows, profile)
    lines = [
        next((line for start, line in new.items() if old.startswith(start)), old)
        for old in text.splitlines()
    ]
    return "\n".join(lines) + "\n"


PARTS = ("first", "import", "memory", "methods", "train", "profile", "scaling")


def main() -> None:
    """Measure what is asked for, and replace those rows of the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=[*PARTS])
    parser.add_argument("--data", choices=DATA, action="append")
    parser.add_argument("--axis", choices=SCALING, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    path = RESULTS / "speed.csv"
    if args.summary:
        print(summary(read_rows(path)), end="")
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    parts = {
        "first": [lambda: time_first(args.rounds)],
        "import": [lambda: time_import(args.rounds)],
        "memory": [lambda: measure_memory("pbmc3k")],
        "methods": [lambda: time_methods("pbmc4k", args.rounds)],
        "train": [lambda d=d: time_training(d, args.rounds) for d in args.data or DATA],
    }
    for part, measurements in parts.items():
        for measure in measurements if args.part in (None, part) else ():
            new = [row | made() for row in measure()]
            replaced = {(row["data"], row["what"]) for row in new}
            old = [row for row in read_rows(path) if (row["data"], row["what"]) not in replaced]
            write_beside(path, csv_text(old + new))
    if args.part in (None, "profile"):
        new = [row | made() for data in args.data or ("pbmc4k",) for row in profile_training(data)]
        replaced = {row["data"] for row in new}
        profiles = RESULTS / "speed_profile.csv"
        old = [row for row in read_rows(profiles) if row["data"] not in replaced]
        write_beside(profiles, csv_text(old + new))
    if args.part in (None, "train", "profile"):
        readme = RESULTS.parents[1] / "README.md"
        text = readme.read_text(encoding="utf-8")
        profile = read_rows(RESULTS / "speed_profile.csv")
        write_beside(readme, with_readme_lines(text, read_rows(path), profile))
    for axis in (args.axis or SCALING) if args.part in (None, "scaling") else ():
        rows = [row | made() for row in scaling(axis)]
        write_beside(RESULTS / f"speed_{axis}.csv", csv_text(rows))


if __name__ == "__main__":
    main()
