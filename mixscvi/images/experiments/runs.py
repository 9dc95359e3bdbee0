"""The folder of a run: what it holds, and how it is read.

A run is a folder:

| file | holds |
| --- | --- |
| config.json | the whole configuration |
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
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixscvi.checkpoint_file import read_checkpoint
from mixscvi.images.datasets import ImageData, load
from mixscvi.images.experiments.configs import Proposal, RunConfig
from mixscvi.images.files import content_hash
from mixscvi.images.networks.configs import MixtureConfig, ModelConfig, Sizes
from mixscvi.images.networks.vae import ImageVAE, count_parameters, seeded
from mixscvi.system import check_folder, write_beside

__all__ = [
    "build",
    "check_same",
    "evaluation_file",
    "finished_run_data",
    "first_images",
    "load_run",
    "parameter_counts",
    "prepare",
    "read_config",
    "read_json",
    "read_summary",
    "resolve_device",
    "run_data",
    "weights_hash",
]


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

    Raises
    ------
    MemoryError
        If it does not fit into memory.

    Examples
    --------
    >>> from mixscvi.images.experiments.configs import RunConfig
    >>> model = build(RunConfig.from_preset("vanilla", budget="smoke", n_components=4), (8, 8))
    >>> model.encoder.trunk.layers[0]
    StackedSparseLinear(n_components=4, n_in=64, n_out=24, bias=True)
    """
    mixture, sizes = config.mixture, config.sizes
    if config.objective == "iwae":
        sizes = _big_iwae_sizes(image_shape, config.model, mixture, sizes)
        mixture = MixtureConfig()
    try:
        with seeded(config.seed):
            return ImageVAE(
                image_shape,
                config.model,
                mixture,
                sizes,
                prior_has_own_encoder=config.ensemble,
            )
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise
        raise MemoryError(
            f"a model of n_components={mixture.n_components} with component_encoder="
            f"{mixture.component_encoder!r} and {sizes} does not fit into memory: choose fewer "
            "components, or component_encoder='shifted', which shares one encoder"
        ) from error


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
    if loaded and data.fingerprint("train", "validation") != summary["images"]:
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


def prepare(config: RunConfig, folder: Path, *, resume: bool) -> bool:
    """Make the folder of a run, and write the configuration into it.

    Parameters
    ----------
    config
        The run.
    folder
        Where it is recorded.
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
        If it holds an unfinished run of another configuration, or its ``config.json`` is damaged.
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
    folder.mkdir(parents=True, exist_ok=True)
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


def _absolute(dataset: str) -> str:
    return os.path.abspath(dataset) if dataset.endswith(".npy") else dataset


def resolve_device(device: torch.device | str | None = None) -> torch.device:
    """The given device; by default an accelerator if there is one.

    Raises
    ------
    ValueError
        If it is none that models are trained on, or this machine has none of its kind.

    Examples
    --------
    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if device is not None:
        return _checked_device(device)
    from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

    if MPSAccelerator.is_available():
        return torch.device("mps")
    return torch.device("cuda" if CUDAAccelerator.is_available() else "cpu")


def _checked_device(device: torch.device | str) -> torch.device:
    given = device
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be cpu, cuda, cuda:N or mps, got {given!r}") from error
    kinds = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
    }
    if device.type not in kinds:
        raise ValueError(f"device must be cpu, cuda, cuda:N or mps, got {str(given)!r}")
    here = kinds[device.type]
    if (device.index or 0) >= here:
        number = f"has {here} of them" if here else "has none, or torch's build cannot use it"
        raise ValueError(f"device={str(given)!r}, but this machine {number}: give device='cpu'")
    return device


def weights_hash(model: ImageVAE) -> str:
    """Hash of a model's weights."""
    return content_hash(*(value.cpu().numpy() for value in model.state_dict().values()))


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
        if not isinstance(summary.get(name), kind):
            raise ValueError(f"{path} must hold {name}, got {summary.get(name)!r}")
    return summary


def load_run(folder: str | Path, device: torch.device | str = "cpu") -> tuple[RunConfig, ImageVAE]:
    """Configuration and best model of a finished run, in evaluation mode, on a device.

    Nothing that the files hold is run: they are JSON and tensors, and are read as such.

    Parameters
    ----------
    folder
        Where the run is recorded.
    device
        Where the model is to be.

    Raises
    ------
    FileNotFoundError
        If there is no finished run, or its weights are missing.
    ValueError
        If a file is truncated, damaged or holds Python objects, or the weights do not fit the
        model, as those of another version may not.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from mixscvi import images
    >>> gray = np.random.default_rng(0).random((80, 6, 6))
    >>> data = images.ImageData.from_arrays(gray, n_validation=20, n_test=10)
    >>> config = images.RunConfig.from_preset("vanilla", budget="smoke", n_components=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     trained = images.train(config, folder, data=data)
    ...     config, model = images.load_run(folder)
    >>> config.preset, model.mixture.n_components
    ('vanilla', 2)
    """
    folder = Path(folder)
    summary = read_summary(folder)
    config = read_config(folder)
    path = folder / "best.pt"
    if not path.exists():
        raise FileNotFoundError(f"{path}, the weights of the run, is missing")
    weights = _weights(path)
    _check_sizes(folder, config, summary["image_shape"], weights)
    model = build(config, tuple(summary["image_shape"]))
    expected = {name: value.shape for name, value in model.state_dict().items()}
    if expected != {name: value.shape for name, value in weights.items()}:
        raise ValueError(
            f"{path} does not fit the model of config.json: another version of mixscvi wrote it, "
            "or one of the two was changed. Train again, or use that version"
        )
    model.load_state_dict(weights)
    return config, model.to(device).eval()


def _check_sizes(
    folder: Path, config: RunConfig, image_shape: list[int], weights: dict[str, Tensor]
) -> None:
    """Raise if the files of a run describe a larger model than its weights are of.

    Making it would take all memory there is, before its weights were found not to fit.
    """
    n_weights = sum(value.numel() for value in weights.values())
    path = folder / "config.json"
    model, sizes = config.model, asdict(config.sizes)
    sizes |= {"n_components": config.mixture.n_components, "n_flow_steps": model.n_flow_steps}
    layers = ["hidden"]
    layers += ["conv_layers"] * (model.encoder == "conv")
    layers += ["flow_hidden"] * (model.n_flow_steps > 0)
    limits = [
        *((path, name, sizes[name], n_weights) for name in ("n_latent", "encoder_width")),
        (path, "n_components", sizes["n_components"], n_weights),
        (path, "n_flow_steps", model.n_flow_steps, len(weights)),
        *((path, name, max(np.ravel(sizes[name]), default=0), n_weights) for name in layers),
        *((path, f"len({name})", len(sizes[name]), len(weights)) for name in layers),
        (folder / "summary.json", "image_shape", math.prod(image_shape), n_weights),
    ]
    if model.prior != "normal":
        limits.append((path, "n_prior_components", sizes["n_prior_components"], n_weights))
    if model.decoder == "pixelcnn":
        limits.append((path, "pixelcnn_layers", sizes["pixelcnn_layers"], len(weights)))
        limits.append((path, "pixelcnn_channels", sizes["pixelcnn_channels"], n_weights))
    if model.n_flow_steps:
        flow = (sizes["n_latent"], *sizes["flow_hidden"], 2 * sizes["n_latent"])
        pairs = zip(flow[:-1], flow[1:], strict=True)
        limits.append((path, "flow_hidden", max(a * b for a, b in pairs), n_weights))
    for file, name, value, limit in limits:
        if value > limit:
            given = sizes.get(name, value) if name != "image_shape" else image_shape
            raise ValueError(
                f"{file} was tampered with, or is of another run: its {name}={given!r} is of a "
                f"larger model than best.pt, which has {n_weights} weights in {len(weights)} "
                "tensors"
            )
    # Shapes alone. The flow, whose masks need numbers, was looked at above.
    try:
        with torch.device("meta"):
            without_flow = replace(config, model=replace(config.model, n_flow_steps=0))
            shapes = build(without_flow, (image_shape[0], image_shape[1])).state_dict()
    except RuntimeError as error:  # a number of elements that no integer holds
        raise ValueError(f"{path} describes no model that can be made: {error}") from error
    if sum(value.numel() for value in shapes.values()) > n_weights:
        raise ValueError(
            f"{path} was tampered with, or is of another run: its sizes are of a larger model than "
            f"best.pt, which has {n_weights} weights"
        )


def _weights(path: Path) -> dict[str, Tensor]:
    weights = read_checkpoint(path)
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"{path} must hold the weights of a model by name, and holds other values")
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{path} holds values of {name} that are not finite")
    # Earlier versions had the codes in the encoders, not in their heads.
    return {re.sub(r"encoder\.codes$", "encoder.heads.codes", k): v for k, v in weights.items()}
