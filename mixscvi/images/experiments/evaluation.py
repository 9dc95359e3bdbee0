"""Test likelihood and diagnostics of a run, streamed over images and draws."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution
from tqdm.auto import tqdm

from mixscvi.checkpoint_file import read_checkpoint
from mixscvi.images.datasets import ImageData, epoch_seed
from mixscvi.images.experiments.configs import Proposal, check_proposal, check_seed
from mixscvi.images.experiments.devices import resolve_device
from mixscvi.images.experiments.runs import evaluation_file, finished_run_data, first_images
from mixscvi.images.experiments.weights import load_run, weights_hash
from mixscvi.images.networks.adapting import adapt_images
from mixscvi.images.networks.vae import EncodedImages, ImageVAE
from mixscvi.mixture import (
    ImportanceDraws,
    active_units,
    component_elbo,
    effective_sample_size,
    importance_weighted_miselbo,
    miselbo,
    pareto_k,
    siwae,
    siwae_standard_error,
    specialization,
)
from mixscvi.mixture.diagnostics import LEAST_FOR_K
from mixscvi.system import physical_memory, write_beside
from mixscvi.tables import csv_text

__all__ = ["check_draws", "evaluate", "image_statistics"]

# Draws that the networks see at a time, of all images and components together.
_ROWS = 1000
# Draws kept until the statistics of their images are computed: three log-densities each.
_DRAWS = 2**20
_BYTES_A_DRAW = 24  # three log-densities, which are kept in double precision
_IMAGES = 50
_SAVE_EVERY = 50  # blocks
# What is known of every image, with any proposal.
_STATISTICS = {"siwae", "siwae_se", "iw_miselbo", "miselbo", "elbo", "jsd", "ess", "k_hat", "mean"}
_OF_ADAPTED = {"evaluations", "siwae_encoder", "k_hat_encoder"}


def image_statistics(
    draws: ImportanceDraws, *, computed_in: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Bounds and diagnostics of every image from draws of every component.

    Parameters
    ----------
    draws
        Log-densities, each `(L, B, A)`, with at least 25 draws per image.
    computed_in
        Type that the log-densities were computed in, if they were cast since: Pareto k-hat takes
        log-weights for equal that differ by its rounding.

    Returns
    -------
    `(B,)` each, in nats but for ``ess`` (draws) and ``k_hat``.

    Examples
    --------
    >>> import torch
    >>> statistics = image_statistics(ImportanceDraws(*torch.randn(3, 10, 7, 4)))
    >>> list(statistics)
    ['siwae', 'siwae_se', 'iw_miselbo', 'miselbo', 'elbo', 'jsd', 'ess', 'k_hat']
    """
    log_weights = draws.log_weights
    rows = log_weights.transpose(0, 1).flatten(1)
    unknown = torch.full_like(rows[:, 0], torch.nan)
    return {
        "siwae": siwae(log_weights),
        "siwae_se": siwae_standard_error(log_weights) if len(log_weights) > 1 else unknown,
        "iw_miselbo": importance_weighted_miselbo(log_weights),
        "miselbo": miselbo(log_weights),
        "elbo": component_elbo(draws.log_joint, draws.log_own).mean(-1),
        "jsd": specialization(draws.log_own, draws.log_mixture).mean(-1),
        "ess": effective_sample_size(rows),
        "k_hat": pareto_k(rows, computed_in=computed_in),
    }


def check_draws(draws: int) -> int:
    """The number of draws of an image, if it is enough, and not too many to be kept."""
    if draws < LEAST_FOR_K:
        raise ValueError(f"draws must be at least {LEAST_FOR_K} for Pareto k-hat, got {draws}")
    memory = physical_memory()
    if memory is not None and draws * _BYTES_A_DRAW > memory:
        raise MemoryError(f"draws={draws} of an image do not fit into memory: choose fewer")
    return draws


def _is_state(state: Any) -> bool:
    """Whether what a file holds is the finished part of an evaluation."""
    if not isinstance(state, dict) or not {"key", "done", "blocks"} <= state.keys():
        return False
    key, done, blocks = state["key"], state["done"], state["blocks"]
    if not (isinstance(key, dict) and isinstance(done, list) and isinstance(blocks, list)):
        return False
    return (
        all(isinstance(value, (str, int)) for value in key.values())
        and all(isinstance(group, dict) and group.keys() == done[0].keys() for group in done)
        and all(group.keys() - _OF_ADAPTED == _STATISTICS for group in done)
        and all(_are_numbers(v, 2 if k == "mean" else 1) for g in done for k, v in g.items())
        and all(len({len(value) for value in group.values()}) == 1 for group in done)
        and len({group["mean"].shape[1] for group in done}) < 2
        and all(isinstance(block, tuple) and len(block) == 3 for block in blocks)
        and all(_are_numbers(value, 3) for block in blocks for value in block)
        and all(len({value.shape for value in block}) == 1 for block in blocks)
    )


def _are_numbers(values: Any, n_dims: int) -> bool:
    return isinstance(values, Tensor) and values.dim() == n_dims and values.is_floating_point()


class _State:
    """The finished part of an evaluation, in a file, so that it can be continued."""

    def __init__(self, path: Path, key: dict[str, Any]) -> None:
        self.path, self.key = path, key
        self.done: list[dict[str, Tensor]] = []
        self.blocks: list[ImportanceDraws] = []
        if path.exists():
            state = read_checkpoint(path)
            if not _is_state(state):
                raise ValueError(f"{path} holds no unfinished evaluation: delete it to start anew")
            if state["key"] == key:
                self.done = state["done"]
                self.blocks = [ImportanceDraws(*block) for block in state["blocks"]]

    def save(self) -> None:
        blocks = [tuple(block) for block in self.blocks]
        state = {"key": self.key, "done": self.done, "blocks": blocks}
        write_beside(self.path, lambda path: torch.save(state, path))


def _images_at_once(n_components: int, n_samples: int) -> int:
    """Number of images whose draws stay within both bounds."""
    most = min(_IMAGES, _ROWS // n_components, _DRAWS // (n_components * n_samples))
    return max(1, most)


def _evaluate_images(
    model: ImageVAE,
    prior: Distribution,
    x: Tensor,
    encoded: EncodedImages,
    n_samples: int,
    seeds: tuple[int, int],
    state: _State,
) -> dict[str, Tensor]:
    """Statistics of a group of images; its draws come in blocks, each with a seed of its own."""
    n_components = model.mixture.n_components
    size = max(1, _ROWS // (len(x) * n_components))
    # Components beyond that number are drawn from one part after the other.
    parts: tuple[Tensor | None, ...] = (None,)
    if len(x) * n_components > _ROWS:
        parts = torch.arange(n_components).split(max(1, _ROWS // len(x)))
    blocks = [(start, part) for start in range(0, n_samples, size) for part in parts]
    for block in range(len(state.blocks), len(blocks)):
        start, part = blocks[block]
        generator = torch.Generator(x.device).manual_seed(epoch_seed(*seeds, f"block {block}"))
        draws = model.importance_draws(
            x,
            min(size, n_samples - start),
            encoded=encoded,
            prior=prior,
            components=part,
            generator=generator,
        )
        # Sums of some hundred terms: in double precision they lose nothing more.
        state.blocks.append(ImportanceDraws(*(values.cpu().double() for values in draws)))
        if (block + 1) % _SAVE_EVERY == 0:
            state.save()
    merged = ImportanceDraws(
        *(
            torch.cat(
                [
                    torch.cat(values[i : i + len(parts)], -1)
                    for i in range(0, len(blocks), len(parts))
                ]
            )
            for values in zip(*state.blocks, strict=True)
        )
    )
    loc, _ = model.component_parameters(encoded)
    return image_statistics(merged, computed_in=loc.dtype) | {"mean": loc.mean(1).cpu()}


def _adapted_statistics(
    model: ImageVAE,
    prior: Distribution,
    x: Tensor,
    encoded: EncodedImages,
    n_draws: int,
    seeds: tuple[int, int],
) -> dict[str, Tensor]:
    """What draws from the adapted proposals of a group of images say, `(B,)` each."""
    adapted = adapt_images(
        model,
        x,
        encoded=encoded,
        prior=prior,
        generator=torch.Generator(x.device).manual_seed(epoch_seed(*seeds, "adapted")),
        n_final=n_draws,
    )
    statistics = {
        "siwae": adapted.log_likelihood,
        "siwae_se": adapted.standard_error,
        "ess": effective_sample_size(adapted.log_weights.mT),
        "k_hat": adapted.pareto_k,
        "evaluations": adapted.n_evaluations.double(),
    }
    return {name: values.cpu() for name, values in statistics.items()}


@torch.no_grad()
def evaluate(
    folder: str | Path,
    *,
    proposal: Proposal = "encoder",
    draws: int | None = None,
    images: int | None = None,
    data: ImageData | None = None,
    data_folder: str | Path | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate the best model of a finished run on its test images.

    Draws are streamed: the networks see 1000 at a time, however many components and draws there
    are, with the log-densities of each under all components. Three log-densities of every draw are
    kept for up to 50 images, or as few as keep them below 2**20 draws; beyond that, a single image
    is evaluated at a time. An adaptation bounds its memory itself.

    An interrupted evaluation continues from the last block of draws, or group of adapted images,
    that was saved, to the same result; it starts anew if anything that the result depends on has
    changed. It writes ``evaluation.json`` and ``evaluation.csv`` (one row per image) into the run's
    folder; with adapted proposals, ``evaluation_adapted.json`` and ``.csv``.

    Parameters
    ----------
    folder
        The run.
    proposal
        ``"encoder"``: draws are from the encoder's mixture. Where k-hat is above 0.7, which it is
        for most images, the NLL is an upper bound in effect. ``"adapted"``: the encoder's mixture
        is first adapted to the exact posterior of each image
        (:func:`~mixscvi.images.networks.adapting.adapt_images`), for a few thousand decoder
        evaluations per image.
    draws
        Importance samples per image, of all components together (rounded up to as many for
        each); the budget's number when ``None``. With adapted proposals as many of each kind:
        fresh draws from the adapted proposal, and draws from the encoder's mixture.
    images
        Evaluate the first so many test images; all of the run's when ``None``.
    data
        The images, if the run was trained on arrays; or other images of the same size.
    data_folder
        Folder of the idx files; they are downloaded when ``None``.
    seed
        Seed of the draws.
    device
        Where the model runs; on the accelerator, if there is one, when ``None``.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Averages over the test images, in nats: ``nll`` (SIWAE, consistent) and ``nll_iw_miselbo``
    (importance-weighted MISELBO, the papers' form, averaged over components outside the
    logarithm), each with its standard error over images (``_se``), and for ``nll`` that of the
    draws (``nll_monte_carlo_se``); ``miselbo`` (the average log-weight), ``elbo`` (mean over
    components), ``jsd``; ``ess`` (draws), ``k_hat_median``, ``k_hat_above_0.7`` (share
    of images), ``active_units`` and what was evaluated.

    With adapted proposals, ``nll``, its standard errors, ``ess`` and k-hat are of draws from these;
    the rest describes the encoder's mixture, as do ``nll_encoder`` and ``k_hat_above_0.7_encoder``.
    ``evaluations`` is how often the decoder was evaluated per image for ``nll``, on average; once
    with its gradient counts as three times.

    Raises
    ------
    FileNotFoundError
        If the folder holds no finished run.
    ValueError
        If there is no such proposal, `draws` are fewer than Pareto k-hat needs, there are fewer
        test images than `images`, or they are not those of the run; if a file of the run is
        truncated, damaged or holds Python objects, or there is no such `device` here.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from mixscvi import images
    >>> gray = np.random.default_rng(0).random((80, 6, 6))
    >>> data = images.ImageData.from_arrays(gray, n_validation=20, n_test=10)
    >>> config = images.RunConfig.from_preset("flow", budget="smoke", n_components=4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = images.train(config, folder, data=data)
    ...     result = images.evaluate(folder, data=data, draws=50)
    ...     adapted = images.evaluate(folder, data=data, draws=50, proposal="adapted")
    >>> result["draws"], result["nll"] < -result["elbo"]  # 13 of each of four components
    (52, True)
    >>> adapted["proposal"], adapted["nll_encoder"] == result["nll"]
    ('adapted', True)
    """
    folder, proposal = Path(folder), check_proposal(proposal)
    check_seed(seed)
    device = resolve_device(device)
    config, model = load_run(folder, device)
    model.requires_grad_(False)
    data = first_images(finished_run_data(folder, data, data_folder), images)
    n_components = model.mixture.n_components
    n_samples = math.ceil(check_draws(config.draws if draws is None else draws) / n_components)
    images_at_once = _images_at_once(n_components, n_samples)
    identity = {"weights": weights_hash(model), "images": data.fingerprint("test")}
    key = identity | {
        "proposal": proposal,
        "n_samples": n_samples,
        "seed": seed,
        "rows": _ROWS,
        "images_at_once": images_at_once,
        "device": device.type,
        "dtype": str(next(model.parameters()).dtype),
        "torch": str(torch.__version__),
    }
    state = _State(evaluation_file(folder, proposal, ".partial.pt"), key)
    done = sum(len(group["siwae"]) for group in state.done)
    with tqdm(initial=done, total=len(data.test), unit="image", disable=not progress) as bar:
        groups = data.test.split(images_at_once)
        n_done = [len(group["siwae"]) for group in state.done]
        n_begun = [block.log_joint.shape[1] for block in state.blocks]
        if n_done != [len(group) for group in groups[: len(n_done)]] or any(
            n != len(group) for group in groups[len(n_done) :][:1] for n in n_begun
        ):
            raise ValueError(
                f"{state.path} holds no unfinished evaluation of {len(data.test)} images: delete "
                "it to start anew"
            )
        prior = model.prior_distribution()
        for group in range(len(state.done), len(groups)):
            x = groups[group].to(device)
            encoded, seeds = model.encode(x), (seed, group)
            statistics = _evaluate_images(model, prior, x, encoded, n_samples, seeds, state)
            if proposal == "adapted":
                of_encoder = {f"{name}_encoder": statistics[name] for name in ("siwae", "k_hat")}
                n_draws = n_samples * n_components
                statistics |= of_encoder | _adapted_statistics(
                    model, prior, x, encoded, n_draws, seeds
                )
            state.done.append(statistics)
            state.blocks = []
            state.save()
            bar.update(len(groups[group]))
    names = list(state.done[0])
    by_image = {name: torch.cat([done[name] for done in state.done]) for name in names}
    result = (
        _averages(by_image)
        | identity
        | {
            "proposal": proposal,
            "draws": n_samples * n_components,
            "n_images": len(data.test),
            "dataset": data.name,
            "seed": seed,
            "device": device.type,
        }
    )
    columns = {name: values.tolist() for name, values in by_image.items() if values.dim() == 1}
    rows = [
        {"image": image, **dict(zip(columns, row, strict=True))}
        for image, row in enumerate(zip(*columns.values(), strict=True))
    ]
    write_beside(evaluation_file(folder, proposal, ".csv"), csv_text(rows))
    write_beside(evaluation_file(folder, proposal), json.dumps(result, indent=2) + "\n")
    state.path.unlink()
    return result


def _averages(images: dict[str, Tensor]) -> dict[str, Any]:
    n = len(images["siwae"])

    def standard_error(values: Tensor) -> float:
        return float(values.std() / math.sqrt(n)) if n > 1 else math.nan

    def untrusted(k_hat: Tensor) -> float:
        return float((~(k_hat < 0.7)).double().mean())

    averages = {
        "nll": -float(images["siwae"].mean()),
        "nll_se": standard_error(images["siwae"]),
        "nll_monte_carlo_se": float(images["siwae_se"].square().sum().sqrt() / n),
        "nll_iw_miselbo": -float(images["iw_miselbo"].mean()),
        "nll_iw_miselbo_se": standard_error(images["iw_miselbo"]),
        "miselbo": float(images["miselbo"].mean()),
        "elbo": float(images["elbo"].mean()),
        "jsd": float(images["jsd"].mean()),
        "ess": float(images["ess"].mean()),
        "k_hat_median": float(images["k_hat"].median()),
        "k_hat_above_0.7": untrusted(images["k_hat"]),
        "active_units": int(active_units(images["mean"]).sum()),
    }
    if "evaluations" in images:
        averages |= {
            "nll_encoder": -float(images["siwae_encoder"].mean()),
            "k_hat_above_0.7_encoder": untrusted(images["k_hat_encoder"]),
            "evaluations": float(images["evaluations"].mean()),
        }
    return averages
