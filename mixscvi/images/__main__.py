"""The command line: ``python -m mixscvi.images``, installed as ``mixscvi-images``."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mixscvi.images.experiments.configs import BudgetName, Proposal, RunConfig
from mixscvi.images.networks.configs import PRESETS, Preset
from mixscvi.images.networks.encoders import ComponentEncoder
from mixscvi.system import keep_freed_memory

if TYPE_CHECKING:
    from mixscvi.images.networks.vae import ImageVAE

EstimatorName = Literal["all_to_all", "some_to_all", "some_to_some"]
Run = Annotated[Path, tyro.conf.Positional]


@dataclass(kw_only=True)
class Device:
    """Where the model runs."""

    device: str | None = None
    """Where the model runs: cpu, cuda, mps; on the accelerator, if there is one, when not given."""


@dataclass(kw_only=True)
class Data:
    """Where the images come from."""

    data_folder: Path | None = None
    """Folder of the idx files, or its parent; downloaded when not given. Of a .npy file, the folder
    that it was moved to."""


@dataclass(kw_only=True)
class Scoring:
    """How runs are evaluated."""

    proposal: Proposal = "encoder"
    """What the draws come from: the encoder's mixture, or this adapted to each image's posterior,
    which costs more and gives likelihoods that can be trusted."""
    draws: int | None = None
    """Importance samples per image, of all components together; the budget's when not given."""
    images: int | None = None
    """Evaluate the first so many test images; all of the run's when not given."""


def _training_changes(
    max_epochs: int | None, warmup_epochs: int | None, train_images: int | None
) -> dict[str, int]:
    changes = {
        "max_epochs": max_epochs,
        "warmup_epochs": warmup_epochs,
        "n_train": train_images,
    }
    return {name: value for name, value in changes.items() if value is not None}


def _absolute(dataset: str) -> str:
    """The path of own images, so that the run finds them from whatever folder it is scored in."""
    return str(Path(dataset).absolute()) if dataset.endswith(".npy") else dataset


@dataclass
class Train(Data, Device):
    """Train a model: validation bound, early stopping, checkpoints, a CSV log."""

    output: Path
    """Folder of the run."""
    preset: Preset = "vanilla"
    """Model of the papers."""
    dataset: str = "mnist"
    """mnist, fashion-mnist, or a .npy file of (n, height, width) images."""
    components: int = 1
    """Components A."""
    sampled: int | None = None
    """Components S that a step draws from; when not given, all A with all_to_all, otherwise 1."""
    estimator: EstimatorName = "all_to_all"
    """Which components a step draws from, and which form the mixture in the denominator."""
    component_encoder: ComponentEncoder = "separate"
    """Separate encoders, or one whose last pre-activations are shifted by a code per component."""
    budget: BudgetName = "small"
    """Sizes of the networks, and how they are trained."""
    objective: Literal["miselbo", "iwae"] = "miselbo"
    """iwae: the control with one wider encoder and A importance samples."""
    ensemble: bool = False
    """The control with components trained separately against a frozen decoder."""
    max_epochs: int | None = None
    """Instead of the budget's."""
    warmup_epochs: int | None = None
    """Epochs of the KL's warm-up, instead of the budget's."""
    train_images: int | None = None
    """Images to train on at most, instead of the budget's; all where there are fewer."""
    seed: int = 0
    resume: bool = False
    """Continue an interrupted run."""

    def config(self) -> RunConfig:
        """The run's configuration."""
        return RunConfig.from_preset(
            self.preset,
            budget=self.budget,
            n_components=self.components,
            n_sampled=self.sampled,
            estimator=self.estimator,
            component_encoder=self.component_encoder,
            training=_training_changes(self.max_epochs, self.warmup_epochs, self.train_images),
            objective=self.objective,
            ensemble=self.ensemble,
            dataset=_absolute(self.dataset),
            seed=self.seed,
        )

    def run(self) -> None:
        """Train."""
        from mixscvi.images.experiments.runs import parameter_counts
        from mixscvi.images.experiments.training import train

        def show_parameters(model: ImageVAE) -> None:
            counts = ", ".join(f"{name} {n:,}" for name, n in parameter_counts(model).items())
            print("parameters:", counts, flush=True)

        train(
            self.config(),
            self.output,
            data_folder=self.data_folder,
            resume=self.resume,
            device=self.device,
            progress=sys.stdout.isatty(),
            on_start=show_parameters,
        )
        _show(json.loads((self.output / "summary.json").read_text()))


@dataclass
class Evaluate(Scoring, Data, Device):
    """Test NLL with standard errors, and diagnostics."""

    run_folder: Run
    """Folder of the run."""
    seed: int = 0

    def run(self) -> None:
        """Evaluate."""
        from mixscvi.images.experiments.evaluation import evaluate

        _show(
            evaluate(
                self.run_folder,
                proposal=self.proposal,
                draws=self.draws,
                images=self.images,
                data_folder=self.data_folder,
                seed=self.seed,
                device=self.device,
                progress=sys.stderr.isatty(),
            )
        )


@dataclass
class Probe(Data, Device):
    """Linear classification of the labels from the latents."""

    run_folder: Run
    """Folder of the run."""
    against: Path | None = None
    """Folder of a run with one component, whose posterior samples are the comparison."""
    seed: int = 0

    def run(self) -> None:
        """Probe."""
        from mixscvi.images.experiments.probe import probe

        _show(
            probe(
                self.run_folder,
                against=self.against,
                data_folder=self.data_folder,
                seed=self.seed,
                device=self.device,
            )
        )


@dataclass
class Sample(Device):
    """Draw images from the model, pixel by pixel with a PixelCNN."""

    run_folder: Run
    """Folder of the run."""
    images: int = 64
    """How many."""
    seed: int = 0

    def run(self) -> None:
        """Sample."""
        from mixscvi.images.experiments.pictures import sample

        print(sample(self.run_folder, n_images=self.images, seed=self.seed, device=self.device))


@dataclass
class Reconstruct(Data, Device):
    """Test images and, below, their reconstructions, one row for each component."""

    run_folder: Run
    """Folder of the run."""
    images: int = 8
    """How many."""
    seed: int = 0

    def run(self) -> None:
        """Reconstruct."""
        from mixscvi.images.experiments.pictures import reconstruct

        print(
            reconstruct(
                self.run_folder,
                n_images=self.images,
                data_folder=self.data_folder,
                seed=self.seed,
                device=self.device,
            )
        )


@dataclass
class Sweep(Scoring, Data, Device):
    """Train and evaluate presets x components x seeds; continues where it stopped."""

    output: Path
    """Folder of the runs."""
    results: Path | None = None
    """Path of the CSV, the table and the figure, without extension; OUTPUT/sweep if not given, or
    OUTPUT/sweep_adapted."""
    presets: tuple[Preset, ...] = tuple(PRESETS)
    components: tuple[int, ...] = (1, 2, 4)
    seeds: int = 3
    """Number of seeds, from 0."""
    dataset: str = "mnist"
    budget: BudgetName = "small"
    component_encoder: ComponentEncoder = "separate"
    max_epochs: int | None = None
    """Instead of the budget's."""
    warmup_epochs: int | None = None
    """Epochs of the KL's warm-up, instead of the budget's."""
    train_images: int | None = None
    """Images to train on at most, instead of the budget's; all where there are fewer."""
    engine: Literal["sequential", "ray"] = "sequential"
    """sequential: one run after the other, here. ray: side by side, as tasks of Ray, on machines
    that share OUTPUT."""
    ray_address: str | None = None
    """Cluster for engine ray; when not given, that of RAY_ADDRESS, else one on this machine."""
    cpus_per_run: float = 1
    """Processor cores of each run, with engine ray."""
    gpus_per_run: float | None = None
    """Accelerators of each run, with engine ray; one, if there are any, when not given."""

    command: tyro.conf.Suppress[str | None] = None

    def run(self) -> None:
        """Sweep."""
        from mixscvi.engines import RayEngine, sequential
        from mixscvi.images.experiments.report import sweep_table
        from mixscvi.images.experiments.sweep import sweep

        engine = sequential
        if self.engine == "ray":
            gpus = 0 if self.gpus_per_run is None and self.device == "cpu" else self.gpus_per_run
            engine = RayEngine(self.ray_address, cpus=self.cpus_per_run, gpus=gpus)
        rows = sweep(
            self.output,
            presets=self.presets,
            components=self.components,
            seeds=self.seeds,
            results=self.results,
            proposal=self.proposal,
            draws=self.draws,
            images=self.images,
            data_folder=self.data_folder,
            progress=lambda line: print(line, flush=True),
            failed=_show_failure,
            engine=engine,
            command=self.command,
            device=self.device,
            dataset=_absolute(self.dataset),
            budget=self.budget,
            component_encoder=self.component_encoder,
            training=_training_changes(self.max_epochs, self.warmup_epochs, self.train_images),
        )
        print(sweep_table(rows), end="")


@dataclass
class Curves:
    """Validation bounds of runs by epoch, as CSV and figure."""

    run_folders: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders of the runs, finished or not."""
    output: Path
    """Path of the CSV and the figure, without extension."""

    def run(self) -> None:
        """Draw."""
        from mixscvi.images.experiments.report import curves

        curves(self.run_folders, self.output)
        print(f"{self.output}.png")


def _show(result: dict[str, Any]) -> None:
    print(json.dumps(result, indent=2))


# Errors that the user can correct.
_EXPECTED = (OSError, ValueError, FloatingPointError, MemoryError)


def _show_failure(name: str, error: Exception) -> None:
    print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if not isinstance(error, _EXPECTED):
        traceback.print_exception(error)


Command = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Probe, tyro.conf.subcommand("probe")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Reconstruct, tyro.conf.subcommand("reconstruct")]
    | Annotated[Sweep, tyro.conf.subcommand("sweep")]
    | Annotated[Curves, tyro.conf.subcommand("curves")]
)


def main(arguments: list[str] | None = None) -> None:
    """Run a command; errors that the user can correct end in one line, without a traceback."""
    command = tyro.cli(
        Command,
        args=arguments,
        prog="mixscvi-images",
        description="Mixture posteriors in VAEs of binary images.",
    )
    if isinstance(command, Sweep):
        given = sys.argv[1:] if arguments is None else arguments
        command.command = shlex.join(["mixscvi-images", *given])
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    keep_freed_memory()
    try:
        command.run()
    except ExceptionGroup as failures:  # of a sweep, shown when they happened
        sys.exit(f"mixscvi-images: {failures.message}")
    except (*_EXPECTED, ImportError) as error:
        sys.exit(f"mixscvi-images: {error}")


if __name__ == "__main__":
    main()
