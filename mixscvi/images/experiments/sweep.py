"""Many runs, one table: presets x numbers of components x seeds."""

from __future__ import annotations

import itertools
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mixscvi.engines import Engine, sequential
from mixscvi.images.datasets import ImageData, load
from mixscvi.images.experiments.configs import Proposal, RunConfig, check_proposal
from mixscvi.images.experiments.devices import resolve_device
from mixscvi.images.experiments.evaluation import check_draws, evaluate
from mixscvi.images.experiments.report import (
    check_name,
    percent,
    sweep_figure,
    sweep_table,
    trusted,
    with_ending,
)
from mixscvi.images.experiments.runs import (
    check_images,
    check_same,
    evaluation_file,
    first_images,
    read_json,
    read_summary,
    run_data,
)
from mixscvi.images.experiments.training import train
from mixscvi.images.experiments.weights import load_run, weights_hash
from mixscvi.images.networks.configs import Preset
from mixscvi.system import check_folder, write_beside
from mixscvi.tables import run_missing

__all__ = ["run_once", "sweep"]

_RESULTS = (
    "nll",
    "nll_se",
    "nll_monte_carlo_se",
    "nll_iw_miselbo",
    "miselbo",
    "elbo",
    "jsd",
    "ess",
    "k_hat_median",
    "k_hat_above_0.7",
    "active_units",
    "draws",
    "n_images",
)
_TEXTS = ("dataset", "device", "machine", "python", "torch")
_MOST = 1e300  # of a number
# NaN of one image, or of a few draws; k-hat is infinite where one draw outweighs all others.
_UNKNOWN = ("nll_se", "nll_monte_carlo_se", "k_hat_median")
_COST = ("seconds", "device", "threads", "machine", "python", "torch")
_ADAPTED_RESULTS = ("nll_encoder", "k_hat_above_0.7_encoder", "evaluations")


def _configs(
    presets: Sequence[Preset], components: Sequence[int], seeds: int, **kwargs: Any
) -> list[RunConfig]:
    # Seeds outermost: an interrupted sweep has every preset once before any of them twice.
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    for name, values in (("presets", presets), ("components", components)):
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{name} must be one or more different values, got {[*values]}")
    return [
        RunConfig.from_preset(preset, n_components=n_components, seed=seed, **kwargs)
        for seed, preset, n_components in itertools.product(range(seeds), presets, components)
    ]


def sweep(
    folder: str | Path,
    *,
    presets: Sequence[Preset],
    components: Sequence[int] = (1, 2, 4),
    seeds: int = 3,
    results: str | Path | None = None,
    proposal: Proposal = "encoder",
    draws: int | None = None,
    images: int | None = None,
    data: ImageData | None = None,
    data_folder: str | Path | None = None,
    progress: Callable[[str], object] | None = None,
    failed: Callable[[str, Exception], object] | None = None,
    engine: Engine = sequential,
    command: str | None = None,
    device: torch.device | str | None = None,
    **kwargs: Any,
) -> list[dict[str, Any]]:
    """Train and evaluate every combination; runs that are finished are read, not run again.

    After each run, the table of all that are finished is written, as CSV, Markdown and figure. A
    run that fails does not keep the others from being made; the same call repeats it.

    Parameters
    ----------
    folder
        Where the runs go, a folder each.
    presets, components
        What to combine.
    seeds
        Number of seeds, from 0.
    results
        Path of the results without its ending; ``sweep`` in `folder` when ``None``, or
        ``sweep_adapted``.
    proposal, draws, images
        As in :func:`~mixscvi.images.experiments.evaluation.evaluate`, for all runs alike.
    data, data_folder
        As in :func:`~mixscvi.images.experiments.training.train`.
    progress
        Called with a line of text after each run.
    failed
        Called with the name and the exception of a run that has failed.
    engine
        Where the runs are made: here, one after the other, or side by side with a
        :class:`~mixscvi.engines.RayEngine`, whose machines must share `folder`. The images are sent
        to them.
    command
        The command that made the results, written below their table.
    device
        Where to train and evaluate; on the accelerator, if there is one, when ``None``.
    **kwargs
        Passed to :meth:`~mixscvi.images.experiments.configs.RunConfig.from_preset`: ``budget``,
        ``dataset``, ...

    Returns
    -------
    One row per run.

    Raises
    ------
    ValueError
        If an argument is none of its choices, or a run has fewer test images than `images`.
    ExceptionGroup
        The exceptions of the runs that failed, if any did: such as a ValueError where the folder
        holds a run of another configuration.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from mixscvi import images
    >>> gray = np.random.default_rng(0).random((80, 6, 6))
    >>> data = images.ImageData.from_arrays(gray, n_validation=20, n_test=10)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     rows = sweep(
    ...         folder, presets=["vanilla"], components=[1, 2], seeds=1, data=data, budget="smoke"
    ...     )
    >>> [(row["preset"], row["components"], row["seed"]) for row in rows]
    [('vanilla', 1, 0), ('vanilla', 2, 0)]
    """
    folder = Path(folder)
    usual = {"encoder": "sweep", "adapted": "sweep_adapted"}[check_proposal(proposal)]
    results = folder / usual if results is None else Path(results)
    configs = {
        f"{config.preset}-A{config.mixture.n_components}-seed{config.seed}": config
        for config in _configs(presets, components, seeds, **kwargs)
    }
    check_folder(folder, "output")
    check_folder(results.parent, "results")
    check_name(results, "results")
    if draws is not None:
        check_draws(draws)
    if engine is sequential:
        resolve_device(device)
    if data is None:  # whole: presets differ in how many images they take
        data = load(next(iter(configs.values())).dataset, data_folder)
    for config in configs.values():  # before the first run, not hours later
        first_images(run_data(config, data), images)

    runs = folder.absolute()
    runs.mkdir(parents=True, exist_ok=True)

    def run(name: str, config: RunConfig, device: torch.device | str | None) -> dict[str, Any]:
        if not runs.is_dir():
            raise FileNotFoundError(
                f"{runs} is not on {platform.node()}: the machines must share this folder"
            )
        return run_once(
            config,
            runs / name,
            data,
            proposal=proposal,
            draws=draws,
            images=images,
            device=device,
        )

    def report(name: str, rows: list[dict[str, Any]]) -> None:
        note = "" if command is None else f"\n`{command}`\n"
        write_beside(with_ending(results, ".md"), sweep_table(rows) + note)
        sweep_figure(rows, with_ending(results, ".png"))
        if progress is not None:
            row = rows[-1]
            progress(
                f"{row['dataset']} {name}: NLL {row['nll']:.2f} (k-hat < 0.7 for "
                f"{percent(trusted(row))} of the images), JSD {row['jsd']:.2f}"
            )

    return run_missing(
        configs,
        run,
        with_ending(results, ".csv"),
        device=device,
        report=report,
        failed=failed,
        engine=engine,
    )


def run_once(
    config: RunConfig,
    folder: str | Path,
    data: ImageData,
    *,
    proposal: Proposal = "encoder",
    draws: int | None = None,
    images: int | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Train and evaluate one run, unless it is finished already.

    Parameters
    ----------
    config
        The run.
    folder
        Where it is recorded.
    data
        The images, of which the run takes as many as its configuration says.
    proposal, draws, images
        As in :func:`~mixscvi.images.experiments.evaluation.evaluate`.
    device
        Where to train and evaluate; on the accelerator, if there is one, when ``None``.

    Returns
    -------
    Columns that identify the run, averages over the test images and cost; ``seconds`` is
    ``None`` if it took more than one call.

    Raises
    ------
    ValueError
        If the folder holds a run of another configuration or on other images, or as `evaluate`
        does.
    """
    folder = Path(folder)
    cost_file = folder / "cost.json"
    untouched = not (folder / "config.json").exists()
    started = time.perf_counter()
    if not (folder / "summary.json").exists():
        train(config, folder, data=data, resume=True, device=device)
    else:
        check_same(folder, config)
        check_images(folder, run_data(config, data))
    evaluated = first_images(run_data(config, data), images)
    if not _is_evaluated(folder, config, evaluated, proposal, draws, device):
        evaluate(folder, proposal=proposal, data=evaluated, draws=draws, device=device)
    # Left by a process that was killed after it had written the result.
    evaluation_file(folder, proposal, ".partial.pt").unlink(missing_ok=True)
    if not cost_file.exists():
        # The time of a run that was continued in a second process is unknown.
        seconds = round(time.perf_counter() - started, 3) if untouched else None
        cost = {
            "seconds": seconds,
            "device": str(resolve_device(device)),
            "threads": torch.get_num_threads(),
            "machine": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": torch.__version__,
        }
        write_beside(cost_file, json.dumps(cost) + "\n")
    result = read_json(evaluation_file(folder, proposal))
    names = _RESULTS + (_ADAPTED_RESULTS if proposal == "adapted" else ())
    summary = read_summary(folder)
    return {
        **_values(result, ["dataset"], evaluation_file(folder, proposal)),
        "preset": config.preset,
        "budget": config.budget,
        "components": config.mixture.n_components,
        "estimator": config.mixture.estimator,
        "component_encoder": config.mixture.component_encoder,
        "seed": config.seed,
        "proposal": proposal,
        **_values(result, names, evaluation_file(folder, proposal)),
        "epochs": summary["epochs"],
        "validation_bound": summary["best_validation_bound"],
        "parameters": summary["parameters"]["total"],
        **_values(read_json(cost_file), _COST, cost_file),
    }


def _values(values: dict[str, Any], names: Sequence[str], path: Path) -> dict[str, Any]:
    """Some values of a file; a ValueError names those that it lacks."""
    if missing := [name for name in names if name not in values]:
        raise ValueError(f"{path} lacks {', '.join(missing)}: delete it to have it made anew")
    for name in names:
        value, kind = values[name], str if name in _TEXTS else (int, float)
        good = isinstance(value, kind) and not isinstance(value, bool)
        if isinstance(value, (int, float)) and name not in _UNKNOWN:
            good = good and abs(value) <= _MOST
        if not good and not (value is None and name == "seconds"):  # of a run that was continued
            raise ValueError(
                f"{path} must hold a {'text' if kind is str else 'number'} as {name}, got "
                f"{value!r:.40}: delete it to have it made anew"
            )
    return {name: values[name] for name in names}


def _is_evaluated(
    folder: Path,
    config: RunConfig,
    data: ImageData,
    proposal: Proposal,
    draws: int | None,
    device: torch.device | str | None,
) -> bool:
    """Whether these weights were evaluated so: images, proposal, draws, device, seed 0."""
    path = evaluation_file(folder, proposal)
    if not path.exists():
        return False
    # Earlier versions knew the encoder's proposal alone, and did not name it.
    result = {"proposal": "encoder"} | read_json(path)
    wanted = config.draws if draws is None else draws
    identity = {
        "proposal": proposal,
        "seed": 0,
        "weights": weights_hash(load_run(folder)[1]),
        "images": data.fingerprint("test"),
        "device": resolve_device(device).type,
    }
    (draws,) = _values(result, ["draws"], path).values()
    return identity.items() <= result.items() and 0 <= draws - wanted < config.mixture.n_components
