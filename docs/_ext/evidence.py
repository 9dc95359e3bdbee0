"""Tables and figures of the evidence page, made from ``benchmarks/results/*.csv`` in every build.

A benchmark that has a ``summary`` speaks for itself; the rest are averaged here. A CSV that nobody
knows yet is averaged as it is, so that no result is left out.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mixscvi.images.experiments.report import sweep_figure, sweep_table
from mixscvi.pl.drawing import COLORS
from mixscvi.tables import markdown_table, mean_and_spread, read_rows

if TYPE_CHECKING:
    from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
BENCHMARKS, RESULTS = ROOT / "benchmarks", ROOT / "benchmarks" / "results"
FOLDER = "generated/evidence"
# Columns that say how a run was made, and identify no row of a table.
PROVENANCE = {
    *("python", "torch", "scvi_tools", "machine", "command", "threads", "seed", "rounds"),
    *("repeats", "bound", "loop_adam"),
}
PROPOSALS = {"encoder": "the encoder's mixture", "adapted": "adapted posteriors"}
DEMO = {
    "log_likelihood": ("held-out log-likelihood per cell", 2),
    "trusted": ("cells with k-hat < 0.7", 2),
    "ari": ("ARI", 3),
    "nmi": ("NMI", 3),
    "seconds": ("training (s)", 1),
}


def averages(frame: pd.DataFrame, digits: int = 3) -> str:
    """Mean and spread over seeds of every number, a row for each setting."""
    frame = frame.drop(columns=[name for name in frame if name in PROVENANCE - {"seed"}])
    numbers = [name for name in frame if frame[name].dtype.kind == "f"]
    settings = [name for name in frame if name not in (*numbers, "seed")]
    settings = [name for name in settings if frame[name].nunique(dropna=False) > 1] or settings[:1]
    rows = []
    for key, group in frame.groupby(settings, sort=False, dropna=False):
        row = dict(zip(settings, key if isinstance(key, tuple) else (key,), strict=True))
        row |= {name: spread(group[name].dropna(), digits) for name in numbers}
        rows.append(row)
    return markdown_table(rows)


def spread(values: pd.Series, digits: int) -> str:
    """Mean and spread as text; nothing of no values."""
    return mean_and_spread([*values], digits) if len(values) else ""


def demo() -> str:
    """The demo's runs, and the difference seed by seed."""
    runs = pd.read_csv(RESULTS / "demo_runs.csv")
    columns = {name: runs.pivot(index="seed", columns="model", values=name) for name in DEMO}
    first, second = runs["model"].unique()
    rows = []
    for name in (first, second, "difference"):
        row = {"": name}
        for column, (heading, digits) in DEMO.items():
            table = columns[column]
            values = table[second] - table[first] if name == "difference" else table[name]
            row[heading] = mean_and_spread([*values], digits, signed=name == "difference")
        rows.append(row)
    return markdown_table(rows)


def summary_of(module: str, *csv_names: str) -> Callable[[], str]:
    """What a benchmark says of its own results."""

    def text() -> str:
        function = importlib.import_module(module).summary
        if inspect.signature(function).parameters:
            return function(read_rows(RESULTS / csv_names[0]))
        return function()

    return text


def images(name: str, table: Callable[[list[dict[str, Any]]], str]) -> Callable[[], str]:
    """A table of image runs for each proposal, named by it: the encoder's, adapted posteriors."""

    def text() -> str:
        parts = []
        for ending in ("", "_adapted"):
            # Runs before there were adapted posteriors do not say.
            rows = [
                {"proposal": "encoder"} | row for row in read_rows(RESULTS / f"{name}{ending}.csv")
            ]
            for proposal in dict.fromkeys(row["proposal"] for row in rows):
                of = [row for row in rows if row["proposal"] == proposal]
                parts.append(f"NLL by draws from {PROPOSALS[proposal]}:\n\n{table(of)}")
        return "\n".join(parts)

    return text


def controls(rows: list[dict[str, Any]]) -> str:
    """The image models beside their controls."""
    return importlib.import_module("images_controls").table(rows)


def step_time() -> str:
    """A step's share of the loop's over components."""
    paths = sorted(RESULTS.glob("images_step_time*.csv"))
    frame = pd.concat([pd.read_csv(path) for path in paths]).fillna({"loop_adam": "default"})
    keys = ["preset", "component_encoder", "dataset", "loop", "loop_adam"]
    frame["setting"] = frame["budget"] + " sizes, " + frame["threads"].astype(str) + " core(s)"
    table = frame.pivot_table(index=keys, columns="setting", values="ratio", sort=False)
    names = {"component_encoder": "components", "loop_adam": "Adam of the loop"}
    table = table.round(2).reset_index().astype(str).replace("nan", "").rename(columns=names)
    return markdown_table(table.to_dict("records"))


def speed_profile() -> str:
    """Milliseconds of a training step, and their share, by part and model."""
    frame = pd.read_csv(RESULTS / "speed_profile.csv")
    lines = [
        {
            "": f"{model} ({data})",
            **{row.part: f"{row.milliseconds:.1f} ({row.share:.0%})" for row in rows.itertuples()},
        }
        for (data, model), rows in frame.groupby(["data", "model"], sort=False)
    ]
    return markdown_table(lines)


def speed_scaling() -> str:
    """Seconds of an epoch, a table for each of what it grows with and a column for each model."""
    tables = []
    for axis in ("components", "genes", "cells"):
        frame = pd.read_csv(RESULTS / f"speed_{axis}.csv")
        table = frame.pivot_table(index="size", columns="model", values="seconds", sort=False)
        table = table.map(lambda value: "" if pd.isna(value) else f"{value:.2f}")
        table.index = [f"{size:,}" for size in table.index]
        tables.append(markdown_table(table.rename_axis(axis).reset_index().to_dict("records")))
    return "\n".join(tables)


def likelihoods() -> str:
    """Milliseconds of the likelihoods, a column per method."""
    frame = pd.read_csv(RESULTS / "likelihoods.csv")
    keys = ["data", "n_genes", "n_components", "task"]
    table = frame.pivot_table(index=keys, columns="method", values="median_ms", sort=False)
    table = table.round(1).reset_index().astype(str).replace("nan", "")
    names = {"n_components": "A", "n_genes": "genes"}
    return markdown_table(table.rename(columns=names).to_dict("records"))


def adaptation() -> str:
    """What adaptation reaches, with headings in words."""
    heading, rest = summary_of("adaptation")().split("\n", 1)
    return heading.replace("_", " ") + "\n" + rest


def mcmc() -> str:
    """Adapted posteriors against Hamiltonian Monte Carlo, over cells."""
    frame = pd.read_csv(RESULTS / "mcmc.csv")
    columns = {
        "mean_rms_errors": "means: root mean square of the latents",
        "mean_most_errors": "means: the latent furthest apart",
        "sd_rms_errors": "standard deviations: root mean square of the latents",
        "sd_most_errors": "standard deviations: the latent furthest apart",
        "r_hat": "largest split R-hat of the chains",
    }
    digits = {"r_hat": 3}
    return markdown_table(
        [
            {
                f"{len(frame)} cells": text,
                "average": f"{frame[name].mean():.{digits.get(name, 2)}f}",
                "least": f"{frame[name].min():.{digits.get(name, 2)}f}",
                "most": f"{frame[name].max():.{digits.get(name, 2)}f}",
            }
            for name, text in columns.items()
        ]
    )


def out_of_core() -> str:
    """Memory and time of training from disk, a column per number of cells."""
    frame = pd.read_csv(RESULTS / "out_of_core.csv")
    names = {
        "A4": "A = 4, on disk",
        "A1": "A = 1, on disk",
        "scvi": "SCVI, on disk",
        "A4-memory": "A = 4, in memory",
        "annbatch": "A = 4, annbatch",
    }
    lines = []
    for way, rows in frame.groupby("way", sort=False):
        line = {"": names[way]}
        for cells in sorted(frame["cells"].unique()):
            line[f"{cells:,} cells"] = ""
            for row in rows[rows["cells"] == cells].itertuples():
                memory = row.peak_after_embedding_mb - row.peak_before_mb
                line[f"{cells:,} cells"] = (
                    f"{memory} MB, {row.ms_per_cell_train:.2f} ms, {row.ms_per_cell_embed:.2f} ms"
                )
        lines.append(line)
    return markdown_table(lines)


def kills() -> str:
    """What was killed, and what was lost."""
    frame = pd.read_csv(RESULTS / "kills.csv")
    return markdown_table(
        [
            {
                "": row.what,
                "killed": str(row.killed),
                "files lost or damaged": str(row.lost),
                "left over": str(row.litter),
                "ended": "" if pd.isna(row.ended) else f"{row.ended:.0f}",
                "with other numbers": ""
                if pd.isna(row.other_numbers)
                else f"{row.other_numbers:.0f}",
            }
            for row in frame.itertuples()
        ]
    )


def toy_targets() -> str:
    """The mixtures fitted to densities of the plane."""
    frame = pd.read_csv(ROOT / "docs" / "figures" / "toy_targets.csv")
    frame = frame.rename(
        columns={
            "n_components": "A",
            "kl_to_target": "KL to the target (nats)",
            "jensen_shannon_divergence": "divergence of the components (nats)",
        }
    )
    frame["A"] = frame["A"].astype(str)
    frame["training"] = frame["training"].replace({"joint": "together", "independent": "apart"})
    return averages(frame)


# Name of a piece of the page: the tables that it shows, and what makes it.
PIECES: dict[str, tuple[tuple[str, ...], Callable[[], str]]] = {
    "demo": (("demo_runs.csv",), demo),
    "held_out": (("held_out_*.csv",), summary_of("held_out")),
    "label_transfer": (("label_transfer.csv",), summary_of("label_transfer")),
    "adaptation": (("adaptation.csv",), adaptation),
    "mcmc": (("mcmc.csv",), mcmc),
    "features": (("features_*.csv",), summary_of("features")),
    "distributed": (("distributed.csv",), summary_of("distributed")),
    "kills": (("kills.csv",), kills),
    "parity": (("parity.csv",), summary_of("parity")),
    "out_of_core": (("out_of_core.csv",), out_of_core),
    "speed": (("speed.csv",), summary_of("speed", "speed.csv")),
    "speed_profile": (("speed_profile.csv",), speed_profile),
    "speed_scaling": (
        tuple(f"speed_{axis}.csv" for axis in ("components", "genes", "cells")),
        speed_scaling,
    ),
    "likelihoods": (("likelihoods.csv",), likelihoods),
    "step_time": (("images_step_time*.csv",), step_time),
    "toy_targets": ((), toy_targets),
    **{
        f"{piece}_{data}": (
            (f"images_{piece}_{data}*.csv",),
            images(f"images_{piece}_{data}", table),
        )
        for piece, table in (("sweep", sweep_table), ("controls", controls))
        for data in ("mnist", "fashion_mnist")
    },
    "paper": (("images_vanilla_paper*.csv",), images("images_vanilla_paper", sweep_table)),
}


def rest(known: Iterable[str]) -> str:
    """A section of all tables that no piece shows, if there are any.

    A benchmark's own summary stands once; tables without one are averaged.
    """
    shown = {path for pattern in known for path in RESULTS.glob(pattern)}
    texts = {}
    for path in sorted(set(RESULTS.glob("*.csv")) - shown):
        module = path.stem.partition("_")[0]
        own = summarizes_itself(module)
        name = module if own else path.stem
        if name not in texts:
            text = summary_of(module)() if own else averages(pd.read_csv(path))
            texts[name] = f"### {name.replace('_', ' ')}\n\n{as_markdown(text)}"
    if not texts:
        return ""
    title = "## Other results\n\nWhat no section above shows, averaged as it stands."
    return "\n".join((f"{title}\n", *texts.values()))


def summarizes_itself(module: str) -> bool:
    """Whether a benchmark has a summary of all its results, which needs no argument."""
    if not (BENCHMARKS / f"{module}.py").exists():
        return False
    summary = getattr(importlib.import_module(module), "summary", None)
    return summary is not None and not inspect.signature(summary).parameters


def as_markdown(text: str) -> str:
    """A summary as part of a page: its title goes, its headings sink by two levels."""
    if not re.search(r"^(\||#)", text, re.MULTILINE):
        return f"```text\n{text.rstrip()}\n```\n"
    lines = [line for line in text.splitlines() if not re.match(r"# ", line)]
    text = "\n".join(re.sub(r"^(##+) ", r"##\1 ", line) for line in lines).strip()
    return "\n".join(map(unbroken, text.splitlines())) + "\n"


def unbroken(line: str) -> str:
    """A line whose numbers, if it is a table's, stay with their signs, units and intervals."""
    line = line.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    if not line.startswith("|"):
        return line
    line = line.replace(
        "k-hat < ", "k\N{NON-BREAKING HYPHEN}hat\N{NO-BREAK SPACE}<\N{NO-BREAK SPACE}"
    )
    line = re.sub(r"(?<=\d) (?=%)", "\N{NO-BREAK SPACE}", line)
    return re.sub(r"(?<=\[)([-+.\d]+), (?=[-+.\d]+\])", "\\1,\N{NO-BREAK SPACE}", line)


def draw(folder: Path) -> None:
    """The figures."""
    from matplotlib.figure import Figure

    for data in ("mnist", "fashion_mnist"):
        rows = read_rows(RESULTS / f"images_sweep_{data}_adapted.csv")
        sweep_figure(rows, folder / f"sweep_{data}.png")
    for axis in ("components", "genes", "cells"):
        draw_scaling = importlib.import_module("scaling").draw_scaling
        draw_scaling(read_rows(RESULTS / f"speed_{axis}.csv"), axis, folder / f"speed_{axis}.png")
    rows = read_rows(RESULTS / "out_of_core.csv")
    importlib.import_module("out_of_core").draw(rows, folder / "out_of_core.png")

    log = pd.read_csv(RESULTS / "images_vanilla_paper_curves.csv")
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for place, (n_components, runs) in enumerate(log.groupby("components")):
        for seed, run in runs.groupby("seed"):
            label = f"A = {n_components}" if seed == runs["seed"].min() else None
            axes.plot(run["epoch"] + 1, run["validation_bound"], color=COLORS[place], label=label)
    axes.set(xlabel="epoch", ylabel="bound on validation images (nats)", ylim=(-105, -90))
    axes.legend(frameon=False)
    figure.savefig(folder / "paper_curves.png", dpi=120)

    toys = pd.read_csv(ROOT / "docs" / "figures" / "toy_targets.csv")
    figure = Figure(figsize=(7, 3), layout="constrained")
    for axes, (target, runs) in zip(figure.subplots(1, 2), toys.groupby("target"), strict=True):
        for color, (way, of) in zip(COLORS, runs.groupby("training"), strict=False):
            means = of.groupby("n_components")["kl_to_target"].mean()
            label = f"trained {'together' if way == 'joint' else 'apart'}"
            axes.plot(means, "o-", color=color, label=label)
        axes.set(title=target, xlabel="components A", xticks=means.index, xscale="log")
        axes.set_xticks(means.index, [str(n) for n in means.index], minor=False)
        axes.minorticks_off()
        axes.set_ylabel("KL to the target (nats)")
    axes.legend(frameon=False)
    figure.savefig(folder / "toy_targets.png", dpi=120)


def write(app: Sphinx) -> None:
    """Write all pieces where the evidence page includes them from."""
    sys.path.insert(0, str(BENCHMARKS))
    folder = Path(app.srcdir, FOLDER)
    folder.mkdir(parents=True, exist_ok=True)
    pieces = {name: as_markdown(piece()) for name, (_, piece) in PIECES.items()}
    pieces["rest"] = rest(pattern for patterns, _ in PIECES.values() for pattern in patterns)
    for name, text in pieces.items():
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    draw(folder)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register."""
    app.connect("builder-inited", write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
