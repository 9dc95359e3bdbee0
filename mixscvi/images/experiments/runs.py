"""The folder of a run: what it holds, and how it is read.

A run is a folder:

| file | holds |
| --- | --- |
| config.json | the whole configuration |
| images.json | which images it is trained on, by their hash |
| last.ckpt | the state at the end of the last finished epoch, for resuming |
| best.pt | the weights with the best validation bound |
| log.csv | one row per epoch |
| summary.json | written last: a run is finished if it exists |
| evaluation.json, evaluation.csv | test likelihood by draws from the encoder's mixture |
| evaluation_adapted.json, .csv | the same by draws from proposals adapted to each image |
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from mixscvi.images.datasets import ImageData, load
from mixscvi.images.experiments.configs import Proposal, RunConfig
from mixscvi.images.networks.configs import MixtureConfig, ModelConfig, Sizes
from mixscvi.images.networks.vae import ImageVAE, count_parameters, seeded
from mixscvi.system import check_folder, naming_what_takes_memory, write_beside

__all__ = [
    "build",
    "check_images",
    "check_same",
    "evaluation_file",
    "finished_run_data",
    "first_images",
    "parameter_counts",
    "prepare",
    "read_config",
    "read_json",
    "read_summary",
    "run_data",
]

_IMAGES = "images.json"


def _n_encoder_parameters(
    image_shape: tuple[int, int], model: ModelConfig, mixture: MixtureConfig, sizes: Sizes
) -> int:
    # Only shapes are needed. The flow, whose masks need numbers, is no part of the encoders.
    with torch.device("meta"):
        vae = ImageVAE(image_shape, replace(model, n_flow_steps=0), mixture, sizes)
    return count_parameters(vae.encoder) + count_parameters(vae.lower_encoder)


def _big_iwae_sizes(
    image_shape: tuple[int, int], model: ModelConfig, mixture: MixtureConfig, sizes: Sizes
) -> Sizes:
    """Sizes whose encoder of one component has as many parameters as that of the mixture.

    Widths are integers, so the counts agree to within one unit of width.
    """
    target = _n_encoder_parameters(image_shape, model, mixture, sizes)
    low, high = 1.0, float(4 * mixture.n_components)
    for _ in range(20):
        middle = (low + high) / 2
        wide = replace(sizes, encoder_width=middle)
        few = _n_encoder_parameters(image_shape, model, MixtureConfig(), wide) < target
        low, high = (middle, high) if few else (low, middle)
    return replace(sizes, encoder_width=high)


def build(config: RunConfig, image_shape: tuple[int, int]) -> ImageVAE:
    """Make the model of a run, with weights drawn from its seed.

    Parameters
    ----------
    config
        The run.
    image_shape
        Height and width in pixels.

    Returns
    -------
    The model, on the CPU and in training mode.

    Raises
    ------
    MemoryError
        If it does not fit into memory.

    Examples
    --------
    >>> from mixscvi.images.experiments.configs import RunConfig
    >>> model = build(RunConfig.from_preset("vanilla", budget="smoke", n_components=4), (8, 8))
    >>> model.encoder.trunk.layers[0]
    StackedLinear(n_components=4, n_in=64, n_out=24, bias=True)
    """
    mixture, sizes = config.mixture, config.sizes
    if config.objective == "iwae":
        sizes = _big_iwae_sizes(image_shape, config.model, mixture, sizes)
        mixture = MixtureConfig()
    too_large = (
        f"a model of n_components={mixture.n_components} with component_encoder="
        f"{mixture.component_encoder!r} and {sizes} does not fit into memory: choose fewer "
        "components, or component_encoder='shifted', which shares one encoder"
    )
    with naming_what_takes_memory(too_large), seeded(config.seed):
        return ImageVAE(
            image_shape, config.model, mixture, sizes, prior_has_own_encoder=config.ensemble
        )


def run_data(
    config: RunConfig, data: ImageData | None = None, data_folder: str | Path | None = None
) -> ImageData:
    """The images of a run, given or loaded: as many of each part as its configuration says.

    Raises
    ------
    FileNotFoundError, ValueError, OSError
        As :func:`~mixscvi.images.datasets.load`.
    """
    data = load(config.dataset, data_folder) if data is None else data
    training = config.training
    return data.subset(training.n_train, training.n_validation, training.n_test)


def finished_run_data(
    folder: str | Path, data: ImageData | None = None, data_folder: str | Path | None = None
) -> ImageData:
    """The images of a finished run, or other images of the same size.

    Raises
    ------
    ValueError
        If their size differs, or the images that were loaded are not those of the training.
    """
    config, summary = read_config(folder), read_summary(folder)
    loaded = data is None
    data = run_data(config, data, data_folder)
    if list(data.image_shape) != summary["image_shape"]:
        raise ValueError(
            f"{folder} was trained on images of shape {tuple(summary['image_shape'])}, "
            f"got {data.image_shape}"
        )
    if loaded and _of_training(data) != summary["images"]:
        raise ValueError(
            f"{folder} was trained on other images than those of {config.dataset!r}: pass them "
            "as data=..., or pass their folder"
        )
    return data


def first_images(data: ImageData, n: int | None) -> ImageData:
    """The data with their first `n` test images; with all of them when ``None``.

    Raises
    ------
    ValueError
        If there are fewer.
    """
    if n is None:
        return data
    if not 1 <= n <= len(data.test):
        raise ValueError(
            f"images must be between 1 and the run's {len(data.test)} test images, got {n}"
        )
    return data.subset(None, None, n)


def prepare(config: RunConfig, folder: Path, data: ImageData, *, resume: bool) -> bool:
    """Make the folder of a run, and write into it the configuration and which images there are.

    Parameters
    ----------
    config
        The run.
    folder
        Where it is recorded.
    data
        The images of the run.
    resume
        Whether the folder may hold the same run, unfinished.

    Returns
    -------
    Whether the folder has a checkpoint to continue from.

    Raises
    ------
    FileExistsError
        If the folder holds a finished run, or an unfinished one and `resume` is off.
    NotADirectoryError
        If it is a file, or below one.
    ValueError
        If it holds an unfinished run of another configuration or on other images, or a file that
        says so is damaged.
    """
    check_folder(folder, "output")
    saved = folder / "config.json"
    if (folder / "summary.json").exists():
        raise FileExistsError(
            f"{folder} holds a finished run: choose another folder, or delete it first"
        )
    if saved.exists():
        if not resume:
            raise FileExistsError(
                f"{folder} holds an unfinished run: resume it (resume=True, --resume), choose "
                "another folder, or delete it first"
            )
        check_same(folder, config)
        check_images(folder, data)
    folder.mkdir(parents=True, exist_ok=True)
    write_beside(folder / _IMAGES, json.dumps({"images": _of_training(data)}) + "\n")
    write_beside(saved, config.to_json())
    return (folder / "last.ckpt").exists()


def evaluation_file(folder: str | Path, proposal: Proposal, ending: str = ".json") -> Path:
    """The file of a run's folder that holds its evaluation by a proposal."""
    stem = {"encoder": "evaluation", "adapted": "evaluation_adapted"}[proposal]
    return Path(folder) / f"{stem}{ending}"


def check_same(folder: str | Path, config: RunConfig) -> None:
    """Raise a ValueError if the folder of a run holds one of another configuration.

    The file of own images may be named relative to any folder.
    """
    stored = read_config(folder)
    one, other = (asdict(replace(c, dataset=_absolute(c.dataset))) for c in (stored, config))
    different = [name for name, value in one.items() if other[name] != value]
    if different:
        raise ValueError(
            f"{folder} holds a run of another configuration: its config.json differs in "
            f"{', '.join(different)}"
        )


def check_images(folder: str | Path, data: ImageData) -> None:
    """Raise a ValueError if a run, finished or not, is one on other images than `data`."""
    path = Path(folder) / _IMAGES
    if (Path(folder) / "summary.json").exists():
        known = read_summary(folder)["images"]
    elif path.exists():
        known = read_json(path).get("images")
    else:  # an unfinished run of an earlier version, which did not note it
        return
    if known != _of_training(data):
        raise ValueError(
            f"{folder} holds a run on other images, {data.name!r} has changed or is another: give "
            "those of the run, choose another folder, or delete it first"
        )


def _of_training(data: ImageData) -> str:
    return data.fingerprint("train", "validation")


def _absolute(dataset: str) -> str:
    return os.path.abspath(dataset) if dataset.endswith(".npy") else dataset


def parameter_counts(model: ImageVAE) -> dict[str, int]:
    """Parameters of each part, and of the whole."""
    counts = {name: count_parameters(part) for name, part in model.named_children()}
    return {name: n for name, n in counts.items() if n} | {"total": count_parameters(model)}


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file; a ValueError names the file if it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is truncated or damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(values).__name__}")
    return values


def read_config(folder: str | Path) -> RunConfig:
    """The configuration of a run, finished or not.

    Raises
    ------
    FileNotFoundError
        If the folder holds no run.
    ValueError
        If the file is damaged, or does not describe a run of this version.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no run (config.json is missing)")
    text = json.dumps(read_json(path))
    try:
        return RunConfig.from_json(text)
    except KeyError as error:
        raise ValueError(f"{path} does not describe a run: {error} is missing") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not describe a run: {error}") from error


def read_summary(folder: str | Path) -> dict[str, Any]:
    """The summary of a finished run.

    Raises
    ------
    FileNotFoundError
        If the folder holds no finished run.
    ValueError
        If the file is damaged, or is no summary.
    """
    path = Path(folder) / "summary.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no finished run (summary.json is missing)")
    summary = read_json(path)
    shape = summary.get("image_shape")
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(isinstance(n, int) and n > 0 for n in shape)
    ):
        raise ValueError(f"{path} must hold an image_shape of two numbers, got {shape!r}")
    for name, kind in {
        "epochs": int,
        "best_validation_bound": float,
        "images": str,
        "parameters": dict,
    }.items():
        if type(summary.get(name)) is not kind:
            raise ValueError(f"{path} must hold {name}, got {summary.get(name)!r}")
    if not math.isfinite(summary["best_validation_bound"]):
        bound = summary["best_validation_bound"]
        raise ValueError(f"{path} must hold a finite best_validation_bound, got {bound}")
    counts = {"epochs": summary["epochs"], "total": None, **summary["parameters"]}
    for name, count in counts.items():
        if type(count) is not int or not 0 <= count < 2**63:
            raise ValueError(f"{path} must hold {name} as a count, got {count!r:.40}")
    return summary
