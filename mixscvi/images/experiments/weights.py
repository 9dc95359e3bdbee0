"""The weights of a run, which are read without trusting its files."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixscvi.checkpoint_file import read_checkpoint
from mixscvi.images.experiments.configs import RunConfig
from mixscvi.images.experiments.runs import build, read_config, read_summary
from mixscvi.images.files import content_hash
from mixscvi.images.networks.vae import ImageVAE

__all__ = ["load_run", "read_weights", "weights_hash"]

# Whole numbers are of orders, truth values of masks.
_NUMBERS = (torch.float32, torch.float64, torch.int64, torch.bool)


def load_run(folder: str | Path, device: torch.device | str = "cpu") -> tuple[RunConfig, ImageVAE]:
    """Configuration and best model of a finished run, in evaluation mode, on a device.

    Nothing that the files hold is run: they are JSON and tensors, and are read as such.

    Parameters
    ----------
    folder
        Where the run is recorded.
    device
        Where the model is to be.

    Returns
    -------
    The configuration of the run, and its model.

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
    weights = read_weights(path)
    _check_sizes(folder, config, summary["image_shape"], weights)
    model = build(config, tuple(summary["image_shape"]))
    for name, own in model.state_dict().items():
        if name in weights and weights[name].is_floating_point() != own.is_floating_point():
            raise ValueError(f"{path} holds {name} of the type {weights[name].dtype}, no weights")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit the model of config.json: another version of mixscvi wrote it, "
            "or one of the two was changed. Train again, or use that version"
        ) from error
    return config, model.to(device).eval()


def _check_sizes(
    folder: Path, config: RunConfig, image_shape: list[int], weights: dict[str, Tensor]
) -> None:
    """Raise if the files of a run describe a larger model than its weights are of.

    Making it would take all memory there is, before its weights were found not to fit. Files of
    MixSCVI are looked at by other names, in what scvi-tools stores: see `mixscvi.model.sizes`.
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


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a run, by name.

    Raises
    ------
    FileNotFoundError
        If the file is missing.
    ValueError
        If it is damaged, or holds other values.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path}, the weights of the run, is missing: delete the folder to train anew"
        )
    weights = read_checkpoint(path)
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in weights.items()
    ):
        raise ValueError(f"{path} must hold the weights of a model by name, and holds other values")
    versions = getattr(weights, "_metadata", {})  # of the modules, as torch stores them
    if not isinstance(versions, dict) or not all(isinstance(v, dict) for v in versions.values()):
        raise ValueError(f"{path} must hold versions of modules by name, got {versions!r}")
    for name, value in weights.items():
        if value.dtype not in _NUMBERS:
            raise ValueError(f"{path} holds {name} of the type {value.dtype}, no weights")
        if not value.isfinite().all():
            raise ValueError(f"{path} holds values of {name} that are not finite")
    # Earlier versions had the codes in the encoders, not in their heads.
    for name in [*weights]:
        weights[re.sub(r"encoder\.codes$", "encoder.heads.codes", name)] = weights.pop(name)
    return weights


def weights_hash(model: ImageVAE) -> str:
    """Hash of a model's weights, in the order in which they lie in memory."""
    arrays = (value.cpu().numpy() for value in model.state_dict().values())
    return content_hash(*(np.ravel(array, order="K") for array in arrays))
