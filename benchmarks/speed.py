"""What MixSCVI costs, as ratios to `scvi.model.SCVI` taken side by side in one run.

Every model trains once before it is timed; then all take turns. Times are medians over the rounds;
ratios are medians of each round's, so that drift of the machine falls on both alike. `train()` is
timed whole: loader, Lightning and optimizer included.

    python benchmarks/speed.py              # all parts: CSV files, figures, the README's lines
    python benchmarks/speed.py --part train --data pbmc4k
    python benchmarks/speed.py --part profile   # where a step's time goes: speed_profile.csv
    python benchmarks/speed.py --summary    # the table of ratios from the CSV
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from common import RESULTS, machine, read_counts

from mixscvi.system import write_beside
from mixscvi.tables import csv_text, markdown_table, read_rows

DATA: dict[str, tuple[str | None, int, int]] = {  # file, genes, epochs that are timed at once
    "pbmc4k": ("pbmc4k", 2000, 8),
    "cortex": ("cortex", 4172, 8),
    "pbmc3k": ("pbmc3k", 13656, 1),
    "synthetic": (None, 2000, 1),
}
SEED = 0  # of the synthetic counts, of weights, minibatches and draws
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
}


def synthetic_counts(n_cells: int, n_genes: int, *, nonzero: float = 0.1):
    """Sparse counts of eight clusters of cells, as many of them zero as in droplet data."""
    import anndata
    from scipy import sparse

    rng = np.random.default_rng(SEED)
    cluster = rng.integers(8, size=n_cells)
    share = rng.gamma(0.3, size=(8, n_genes)).astype(np.float32) + 0.02
    n_of_cell = rng.binomial(n_genes, nonzero, size=n_cells)
    indptr = np.concatenate(([0], n_of_cell.cumsum()))
    indices = np.empty(indptr[-1], np.int32)
    data = np.empty(indptr[-1], np.float32)
    for cell in range(n_cells):
        some = slice(indptr[cell], indptr[cell + 1])
        genes = rng.permutation(n_genes)[: n_of_cell[cell]]
        genes.sort()
        indices[some] = genes
        data[some] = 1 + rng.poisson(2 * share[cluster[cell], genes])
    counts = sparse.csr_matrix((data, indices, indptr), shape=(n_cells, n_genes))
    return anndata.AnnData(counts)


def read(name: str):
    """One of the data sets, or synthetic counts where it is none."""
    file, n_genes, _ = DATA[name]
    return read_counts(file, n_genes) if file else synthetic_counts(50_000, n_genes)


def make(adata, cls: str, **kwargs: Any):
    """A model of one of the two classes on registered data."""
    import scvi

    import mixscvi

    model_cls = mixscvi.MixSCVI if cls == "MixSCVI" else scvi.model.SCVI
    scvi.settings.seed = SEED
    model_cls.setup_anndata(adata)
    return model_cls(adata, **kwargs)


def made() -> dict[str, Any]:
    """Columns that say how a number was made."""
    return {"seed": SEED, **machine()}


def train(model, epochs: int) -> None:
    """Train further, as in a first training: scvi-tools leaves a trained module in eval mode."""
    model.module.train()
    model.train(max_epochs=epochs, enable_progress_bar=False)


def in_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, made in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            gc.collect()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


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
import speed
adata = speed.read({data!r})
model = speed.make(adata, {cls!r}, **{kwargs!r})
speed.train(model, 1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _in_a_process(code: str) -> str:
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return result.stdout.strip().splitlines()[-1]


def measure_memory(data: str) -> list[dict]:
    """Peak resident memory of a process that trains, in kilobytes."""
    folder = str(RESULTS.parent)
    figures = {
        name: [
            float(_in_a_process(_MEMORY.format(folder=folder, data=data, cls=cls, kwargs=kwargs)))
        ]
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
            seconds[name].append(float(_in_a_process(code.format(statement))))
    figures = {name: values[1:] for name, values in seconds.items()}
    return compared("import", "", {"import": "theirs"}, figures)


_PRODUCTS = (
    *("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm_"),
    *("mkldnn::_linear_pointwise", "sums of rows"),
)


_PARTS_OF_A_STEP = (
    *("matrix products", "likelihood kernel", "optimizer", "loader"),
    *("other operations of torch", "Python"),
)


def _part_of_a_step(event: str) -> str:
    """To what the time of one of the profiler's events belongs."""
    if event in _PRODUCTS:
        return "matrix products"
    if event == "likelihood kernel":
        return event
    if "adam" in event or "_foreach" in event:
        return "optimizer"
    if "DataLoader" in event:
        return "loader"
    return "other operations of torch" if "::" in event else "Python"  # of a step, and the profiler


def profile_training(data: str) -> list[dict]:
    """Where the time of a training step goes, in milliseconds and as shares."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from mixscvi import compiled

    adata, epochs = read(data), 2
    run = compiled.in_blocks

    def recorded_run(kernel: Any, *args: Any) -> bool:
        likelihoods = kernel.__module__.startswith("mixscvi.likelihoods")
        with record_function("likelihood kernel" if likelihoods else "sums of rows"):
            return run(kernel, *args)

    rows = []
    for name, cls, kwargs in (
        ("SCVI", "SCVI", {}),
        ("A = 1, ZINB", "MixSCVI", {"n_components": 1}),
        ("A = 4, all_to_all, separate", "MixSCVI", {"n_components": 4}),
    ):
        model = make(adata, cls, **kwargs)
        train(model, 2)
        compiled.in_blocks = recorded_run
        try:
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                train(model, epochs)
        finally:
            compiled.in_blocks = run
        n_steps = next(
            e.count for e in profiled.key_averages() if e.key.startswith("Optimizer.step")
        )
        parts = dict.fromkeys(_PARTS_OF_A_STEP, 0.0)
        for event in profiled.key_averages():
            parts[_part_of_a_step(event.key)] += event.self_cpu_time_total / 1000
        total = sum(parts.values())
        for part, value in parts.items():
            rows.append(
                {
                    "data": data,
                    "model": name,
                    "part": part,
                    "milliseconds": round(value / n_steps, 3),
                    "share": round(value / total, 3),
                }
            )
            print(rows[-1], flush=True)
    return rows


SCALING: dict[str, tuple[int, ...]] = {
    "components": (1, 4, 16, 64, 100, 400),
    "genes": (1_000, 2_000, 5_000, 10_000, 20_000),
    "cells": (1_000, 10_000, 50_000, 200_000),
}


def scaling(axis: str) -> list[dict]:
    """Seconds per epoch as one size grows; the others are 2000 genes, 4000 cells, A = 4."""
    rows = []
    for size in SCALING[axis]:
        n_cells = size if axis == "cells" else 4_000
        adata = synthetic_counts(n_cells, size if axis == "genes" else 2_000)
        models = {"SCVI": make(adata, "SCVI")}
        if axis == "components":
            amortized = {"n_components": size, "component_encoder": "amortized"}
            for estimator in ("some_to_some", "some_to_all"):
                models[f"MixSCVI, amortized, S = 1, {estimator}"] = make(
                    adata, "MixSCVI", **amortized, estimator=estimator
                )
            if size <= 16:
                models["MixSCVI, separate, all_to_all"] = make(adata, "MixSCVI", n_components=size)
        else:
            models["MixSCVI, A = 1"] = make(adata, "MixSCVI", n_components=1)
            models["MixSCVI, A = 4"] = make(adata, "MixSCVI", n_components=4)
        large = n_cells > 50_000
        if not large:
            for model in models.values():
                train(model, 1)
        calls = {name: lambda model=model: train(model, 1) for name, model in models.items()}
        for name, times in in_turns(calls, 1 if large else 3).items():
            seconds = statistics.median(times)
            rows.append(
                {"axis": axis, "size": size, "model": name, "seconds": float(f"{seconds:.4g}")}
            )
            print(rows[-1], flush=True)
    return rows


def draw_scaling(rows: list[dict], axis: str) -> None:
    """Seconds per epoch against the size, on logarithmic axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, StrMethodFormatter

    figure = Figure(figsize=(5, 4.4), layout="constrained")
    plot = figure.subplots()
    models = dict.fromkeys(row["model"] for row in rows)
    for place, model in enumerate(models):
        points = [
            (int(row["size"]), float(row["seconds"])) for row in rows if row["model"] == model
        ]
        color = "0.4" if model == "SCVI" else f"C{place - 1}"
        plot.plot(*zip(*points, strict=True), "o-", color=color, markersize=4, label=model)
    plot.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds per epoch")
    plot.set_title(
        {"components": "4,000 cells, 2,000 genes", "genes": "4,000 cells"}.get(axis, "2,000 genes")
    )
    for of in (plot.xaxis, plot.yaxis):
        of.set_major_locator(LogLocator(subs=(1, 2, 5)))
        of.set_major_formatter(StrMethodFormatter("{x:,g}"))
        of.set_minor_locator(LogLocator(subs=()))
    plot.xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.legend(loc="outside lower center", frameon=False, fontsize="small")
    write_beside(
        RESULTS / f"speed_{axis}.png",
        lambda partial: figure.savefig(partial, dpi=150, format="png"),
    )


def summary(rows: list[dict]) -> str:
    """The ratios as a table, one column per data set."""
    columns = [*dict.fromkeys(row["data"] for row in rows if row["part"] == "train")]
    lines = []
    for what in BOUNDS:
        of = {row["data"]: row for row in rows if row["what"] == what}
        if not of:
            continue
        line = {"time relative to SCVI's": what}
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


PARTS = ("import", "memory", "methods", "train", "profile", "scaling")


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
    readme = RESULTS.parents[1] / "README.md"
    text = readme.read_text(encoding="utf-8")
    profile = read_rows(RESULTS / "speed_profile.csv")
    write_beside(readme, with_readme_lines(text, read_rows(path), profile))
    for axis in (args.axis or SCALING) if args.part in (None, "scaling") else ():
        rows = [row | made() for row in scaling(axis)]
        write_beside(RESULTS / f"speed_{axis}.csv", csv_text(rows))
        draw_scaling(rows, axis)


if __name__ == "__main__":
    main()
