"""How a run is trained and resumed.

All random numbers of an epoch come from generators seeded with the run's seed and the epoch's
number. A checkpoint at the end of an epoch therefore needs no generator states, and a resumed run
takes exactly the steps of an uninterrupted one. For this, and to write every file atomically,
logging and checkpoints are a callback of our own and not Lightning's.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor

from mixscvi.checkpoint_file import (
    check_counted,
    check_stopping,
    naming_what_is_not_restored,
    read_checkpoint,
)
from mixscvi.checkpoint_io import AtomicCheckpointIO
from mixscvi.images.datasets import ImageBatches, ImageData, epoch_seed
from mixscvi.images.experiments.configs import RunConfig
from mixscvi.images.experiments.death import warn_of_dead_components
from mixscvi.images.experiments.devices import resolve_device
from mixscvi.images.experiments.runs import (
    build,
    check_images,
    parameter_counts,
    prepare,
    run_data,
)
from mixscvi.images.experiments.weights import load_run, read_weights
from mixscvi.images.networks.configs import MixtureConfig
from mixscvi.images.networks.layers import DenseTrunk
from mixscvi.images.networks.priors import PseudoImages
from mixscvi.images.networks.vae import ImageVAE
from mixscvi.mixture import miselbo, siwae
from mixscvi.optimizers import check_restored_optimizer, fused
from mixscvi.system import write_beside
from mixscvi.tables import csv_text
from mixscvi.warning import warn_user

__all__ = ["ImageTraining", "train"]


class ImageTraining(lightning.LightningModule):
    """Training of one model by MISELBO, or by the objective of one of the two controls.

    Parameters
    ----------
    model
        The model.
    config
        The run.
    data
        The images.
    """

    def __init__(self, model: ImageVAE, config: RunConfig, data: ImageData) -> None:
        super().__init__()
        self.model, self.config = model, config
        batch_size = config.training.batch_size
        self.batches = ImageBatches(data.train, batch_size, config.seed)
        self.validation_batches = ImageBatches(data.validation, batch_size)
        self.train_bound: list[Tensor] = []

    def train_dataloader(self) -> ImageBatches:
        """Training minibatches, binarized again in each epoch."""
        return self.batches

    def val_dataloader(self) -> ImageBatches:
        """Validation minibatches."""
        return self.validation_batches

    @property
    def beta(self) -> float:
        """Weight of the KL term in this epoch."""
        return min(1.0, (self.current_epoch + 1) / max(1, self.config.training.warmup_epochs))

    def bound(
        self,
        x: Tensor,
        *,
        beta: float = 1.0,
        components: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The training objective of each image, `(B,)`, in nats."""
        n_samples = self.config.mixture.n_components if self.config.objective == "iwae" else 1
        draws = self.model.draw(x, n_samples, components, generator=generator)
        log_weights = self.model.log_weights(x, draws, beta=beta, apart=self.config.ensemble)
        return siwae(log_weights) if self.config.objective == "iwae" else miselbo(log_weights)

    def _generator(self, purpose: str, device: torch.device | str) -> torch.Generator:
        seed = epoch_seed(self.config.seed, self.current_epoch, purpose)
        return torch.Generator(device).manual_seed(seed)

    def on_train_epoch_start(self) -> None:
        """Seed the generators of the epoch."""
        self.batches.epoch = self.current_epoch
        self.noise = self._generator("noise", self.device)
        self.choice = self._generator("choice", "cpu")
        self.train_bound = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of a minibatch."""
        components = self.model.choose(self.choice)
        bound = self.bound(batch, beta=self.beta, components=components, generator=self.noise)
        loss = -bound.mean()
        self.train_bound.append(-loss.detach())
        return loss

    def on_validation_epoch_start(self) -> None:
        """Seed the noise of the validation: the same in every epoch, so that bounds compare."""
        self.noise_validation = torch.Generator(self.device).manual_seed(self.config.seed)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Add a minibatch to the validation bound."""
        bound = self.bound(batch, generator=self.noise_validation)
        self.log("validation_bound", bound.mean(), batch_size=len(batch), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on all parameters that are not frozen."""
        learned = [p for p in self.model.parameters() if p.requires_grad]
        return fused(torch.optim.Adam)(learned, lr=self.config.training.learning_rate)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Bring Adam's moments of an earlier version's weights into the shape of this one's."""
        versions = getattr(checkpoint["state_dict"], "_metadata", {})
        learned = [p for p in self.model.parameters() if p.requires_grad]
        (optimizer,) = checkpoint["optimizer_states"]
        for name, trunk in self.named_modules():
            if not isinstance(trunk, DenseTrunk):
                continue
            version = versions.get(name, {}).get("version")
            for i, parameter in enumerate(learned):
                if parameter is trunk.layers[0].weight and i in optimizer["state"]:
                    moments = optimizer["state"][i]
                    for key in ("exp_avg", "exp_avg_sq"):
                        moments[key] = trunk.of_this_version(moments[key], version)


_LOGGED = {"epoch", "kl_weight", "train_bound", "validation_bound"}


class _Recorder(Callback):
    """Writes log, best weights and checkpoint, in this order, at the end of every epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[dict[str, float]] = []
        self.best = float("-inf")
        self.stopped = False
        self.started = False

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "best": self.best, "stopped": self.stopped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name, kind in (("rows", list), ("best", float), ("stopped", bool)):
            if not isinstance(state_dict[name], kind):
                raise TypeError(f"{name} is {state_dict[name]!r:.40}")
            setattr(self, name, state_dict[name])
        for row in self.rows:
            if not isinstance(row, dict) or row.keys() != _LOGGED:
                raise ValueError(f"rows must have {', '.join(sorted(_LOGGED))}, got {row!r:.60}")

    def on_train_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        # A run that was interrupted after it had stopped early must not continue.
        trainer.should_stop = self.stopped
        for optimizer in trainer.optimizers:
            check_restored_optimizer(optimizer)
        check_stopping(trainer.early_stopping_callbacks)
        self.started = True
        if math.isfinite(self.best):  # the run goes on, and may end with these
            read_weights(self.folder / "best.pt")

    def on_train_epoch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, ImageTraining)
        bound = float(trainer.callback_metrics["validation_bound"])
        row = {
            "epoch": trainer.current_epoch,
            "kl_weight": pl_module.beta,
            "train_bound": float(torch.stack(pl_module.train_bound).mean()),
            "validation_bound": bound,
        }
        self.rows.append(row)
        self.stopped = trainer.should_stop
        if bound > self.best:
            self.best = bound
            weights = pl_module.model.state_dict()
            write_beside(self.folder / "best.pt", lambda path: torch.save(weights, path))
        write_beside(self.folder / "log.csv", csv_text(self.rows))
        trainer.save_checkpoint(self.folder / "last.ckpt")


class _Patience(EarlyStopping):
    """Early stopping that starts to count when the weight of the KL term has reached 1."""

    def on_validation_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule
    ) -> None:
        assert isinstance(pl_module, ImageTraining)
        if pl_module.beta == 1:
            super().on_validation_end(trainer, pl_module)


def _trained_alone(
    config: RunConfig, folder: Path, data: ImageData, device: torch.device, *, progress: bool
) -> ImageVAE:
    """The model of one component whose decoder the ensemble shares."""
    if (folder / "summary.json").exists():
        return load_run(folder)[1]
    alone = replace(config, ensemble=False, mixture=MixtureConfig())
    return train(alone, folder, data=data, resume=True, device=device, progress=progress)


def _freeze_generative_half(model: ImageVAE, alone: ImageVAE) -> None:
    """Copy all but the posterior's encoders from a trained model, and freeze the copies.

    The flow is frozen as well: components that learn a common flow learn from each other.
    """
    for name in ("decoder", "prior", "lower_prior", "flows"):
        if (part := getattr(model, name)) is not None:
            part.load_state_dict(getattr(alone, name).state_dict())
            part.requires_grad_(False)
    if model.prior_encoder is not None:
        model.prior_encoder.load_state_dict(alone.encoder.state_dict())
        model.prior_encoder.requires_grad_(False)


def _check_checkpoint(path: Path, max_epochs: int) -> dict[str, Any]:
    """What loops have counted, of the state of a run; raises a ValueError if it is none."""
    state = read_checkpoint(path)
    expected = {"epoch", "global_step", "loops", "callbacks", "optimizer_states", "state_dict"}
    if (
        not isinstance(state, dict)
        or not expected <= state.keys()
        or not isinstance(state["optimizer_states"], list)
        or len(state["optimizer_states"]) != 1  # Lightning restores as many as there are
    ):
        raise ValueError(f"{path} holds no state of a run: delete it to start the run anew")
    epochs = state["epoch"]
    if type(epochs) is not int or not 0 <= epochs <= max_epochs:
        raise ValueError(
            f"{path} is of epoch {epochs!r:.40}, of {max_epochs}: delete it to start the run anew"
        )
    return state["loops"]


def train(
    config: RunConfig,
    folder: str | Path,
    *,
    data: ImageData | None = None,
    data_folder: str | Path | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    progress: bool = False,
    on_start: Callable[[ImageVAE], object] | None = None,
) -> ImageVAE:
    """Train a model and record the run.

    Parameters
    ----------
    config
        The run.
    folder
        Folder to record it in. A finished run is never overwritten.
    data
        The images; ``config.dataset`` is loaded when ``None``.
    data_folder
        Folder of its idx files; they are downloaded when ``None``.
    resume
        Whether to continue an interrupted run from the end of its last finished epoch.
    device
        Where to train: cpu, cuda, mps; on the accelerator, if there is one, when ``None``.
    progress
        Whether to show a progress bar.
    on_start
        Called with the model before it is trained.

    Returns
    -------
    The model with the best validation bound, in evaluation mode, on the CPU.

    Raises
    ------
    FileExistsError
        If the folder holds a finished run, or an unfinished one and ``resume`` is off.
    ValueError
        If it holds a run of another configuration or on other images, a file of it is truncated,
        damaged or holds Python objects, or there is no such `device` here.
    FloatingPointError
        If no validation bound was finite.

    Warns
    -----
    UserWarning
        If components are dead (:func:`mixscvi.mixture.dead_components`).

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from mixscvi import images
    >>> gray = np.random.default_rng(0).random((80, 6, 6))
    >>> data = images.ImageData.from_arrays(gray, n_validation=20, n_test=10)
    >>> config = images.RunConfig.from_preset("vanilla", budget="smoke", n_components=2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model = images.train(config, folder, data=data)
    ...     result = images.evaluate(folder, data=data, draws=40)
    >>> model.mixture.n_components, result["draws"]
    (2, 40)
    """
    folder = Path(folder)
    training = config.training
    device = resolve_device(device)
    data = run_data(config, data, data_folder)
    model = build(config, data.image_shape)  # which may not fit, and then leaves no folder
    if config.ensemble:
        check_images(folder / "alone", data)
    checkpoint = folder / "last.ckpt" if prepare(config, folder, data, resume=resume) else None
    counted = None
    if checkpoint is not None:
        counted = _check_checkpoint(checkpoint, training.max_epochs)
    # For an ensemble, the run of its decoder warns.
    if not config.ensemble and training.max_epochs < training.warmup_epochs:
        warn_user(
            f"training for {training.max_epochs} epochs ends within the warm-up of the KL term, "
            f"{training.warmup_epochs} epochs: its weight does not reach 1"
        )
    if on_start is not None:
        on_start(model)
    if config.model.prior == "vamp":
        generator = torch.Generator().manual_seed(config.seed)
        size = (config.sizes.n_prior_components,)
        rows = torch.randint(len(data.train), size, generator=generator)
        pseudo_images = model.prior.pseudo_inputs
        assert isinstance(pseudo_images, PseudoImages)
        pseudo_images.start_from(data.train[rows])
    if config.ensemble:
        alone = _trained_alone(config, folder / "alone", data, device, progress=progress)
        _freeze_generative_half(model, alone)
    recorder = _Recorder(folder)
    with warnings.catch_warnings():
        # A run on a few minibatches is not a mistake, nor is one on the CPU.
        warnings.filterwarnings("ignore", message=".*(number of training batches|not used).*")
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer = lightning.Trainer(
            max_epochs=training.max_epochs,
            accelerator=device.type,
            devices=1 if device.index is None or device.type == "cpu" else [device.index],
            callbacks=[
                _Patience(
                    "validation_bound",
                    mode="max",
                    patience=training.patience,
                    check_on_train_epoch_end=False,
                ),
                recorder,
            ],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=progress,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
            plugins=[AtomicCheckpointIO()],
        )
        naming: AbstractContextManager[None] = nullcontext()
        if checkpoint is not None:
            naming = naming_what_is_not_restored(
                checkpoint,
                "the run",
                "Delete it to start the run anew",
                is_restored=lambda: recorder.started,
            )
        with naming:
            if counted is not None:
                own = trainer.fit_loop.state_dict()
                check_counted(counted["fit_loop"], own, "fit_loop")
                completed = counted["fit_loop"]["epoch_progress"]["current"]["completed"]
                if completed > training.max_epochs:
                    raise ValueError(f"{completed} epochs of {training.max_epochs} are completed")
            trainer.fit(ImageTraining(model, config, data), ckpt_path=checkpoint)
    if trainer.interrupted:  # older versions of Lightning return
        raise KeyboardInterrupt
    if not math.isfinite(recorder.best):
        raise FloatingPointError(
            f"the validation bound of {folder} was never finite: lower the learning rate "
            f"(now {training.learning_rate})"
        )
    summary = {
        "epochs": len(recorder.rows),
        "best_validation_bound": recorder.best,
        "image_shape": list(data.image_shape),
        "images": data.fingerprint("train", "validation"),
        "parameters": parameter_counts(model),
    }
    write_beside(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    trained = load_run(folder)[1]
    warn_of_dead_components(trained, data.validation, config.seed)
    return trained
