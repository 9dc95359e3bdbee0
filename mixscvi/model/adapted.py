"""Exact posteriors of the cells, by adaptive importance sampling."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from scvi import settings
from scvi.utils import unsupported_if_adata_minified
from torch import Tensor
from tqdm.auto import tqdm

from mixscvi.checks import check_mapping, check_positive_int
from mixscvi.mixture import Adapted, adapt
from mixscvi.mixture.diagnostics import LEAST_FOR_K
from mixscvi.model.gathering import gather_columns
from mixscvi.model.inputs import check_keywords
from mixscvi.warning import warn_user

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = [
    "AdaptedMixin",
    "AdaptedPosterior",
    "check_enough_for_k",
    "columns_of_cells",
    "resample",
    "warn_of_adapted_tails",
    "warn_of_encoder_tails",
]

_LARGEST_K = 0.7
_SHARE_TO_WARN_OF = 0.1
_OF_PROPOSAL = ("weights", "loc", "scale_tril")
_OF_CELLS = ("pareto_k", "log_likelihood", "standard_error", "n_evaluations")
_FIXED = ("generator", "n_final", "rows_per_call")  # what other arguments say

_ABOUT_NORMAL = (
    "gene_likelihood='normal' makes posteriors that are narrow and far apart: adaptation may miss "
    "the highest mode, also where k-hat is below 0.7, and log-likelihoods be off by many nats. "
    "Compare runs of two seeds, or model counts by 'zinb', 'nb' or 'poisson'"
)


class AdaptedPosterior(NamedTuple):
    """Weighted mixtures of Student's t distributions that match the exact posteriors of `n` cells.

    They are over the encoder's space: ahead of the flow, where there is one, and with the log
    library size as last dimension, where it is modeled, which `D` counts.

    Examples
    --------
    See :meth:`mixscvi.MixSCVI.get_adapted_posterior`, which returns it:

    >>> AdaptedPosterior._fields[:4]
    ('weights', 'loc', 'scale_tril', 'dof')
    """

    weights: np.ndarray
    """Weights of the components, `(n, K)`."""
    loc: np.ndarray
    """Centers of the components, `(n, K, D)`."""
    scale_tril: np.ndarray
    """Lower triangular factors of the scale matrices, `(n, K, D, D)`, which are fitted to the
    posterior. As a distribution a component is wider, with covariance ``dof / (dof - 2)`` times its
    scale matrix, so that its tails cover the posterior's: take moments from ``draws``."""
    dof: int
    """Degrees of freedom of all components."""
    pareto_k: np.ndarray
    """Tail index of the importance weights, `(n,)`: above 0.7, do not trust the
    rest. Below it, a mode that no draw met can still be missing."""
    log_likelihood: np.ndarray
    """log p(x) in nats, `(n,)`."""
    standard_error: np.ndarray
    """Monte-Carlo standard error of ``log_likelihood`` in nats, `(n,)`."""
    n_evaluations: np.ndarray
    """Decoder evaluations spent, `(n,)`; one with its gradient counts as three."""
    draws: np.ndarray | None
    """Draws from the exact posteriors, behind the flow and ahead of the map to the simplex of
    ``latent_distribution="ln"``, `(n_draws, n, D)`."""


class AdaptedMixin:
    """Methods of :class:`mixscvi.MixSCVI` that adapt the encoder's posteriors to the exact ones.

    The model provides ``module``, ``adata``, ``_minibatches`` and ``_names_of``.
    """

    def _adaptations(
        self,
        n_mc_samples: int,
        n_mc_samples_per_pass: int | None,
        adapt_kwargs: dict[str, Any] | None,
        progress: bool | None,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        batch_size: int | None,
        dataloader: Iterator[dict[str, Tensor]] | None = None,
        data_loader_kwargs: dict[str, Any] | None = None,
    ) -> Iterator[tuple[dict[str, Tensor], Adapted]]:
        """Each minibatch in turn, with the adapted proposals of its cells.

        What is wrong with the arguments is said at once.
        """
        check_enough_for_k(n_mc_samples)
        if n_mc_samples_per_pass is not None:
            check_positive_int("n_mc_samples_per_pass", n_mc_samples_per_pass)
        if adapt_kwargs is not None:
            check_mapping("adapt_kwargs", adapt_kwargs)
        check_keywords(adapt_kwargs, [adapt], argument="adapt_kwargs")
        for name in _FIXED:
            if name in (adapt_kwargs or {}):
                raise ValueError(
                    f"adapt_kwargs must not hold {name!r}: n_mc_samples is the number of final "
                    "draws, n_mc_samples_per_pass bounds the memory, scvi.settings.seed seeds"
                )
        minibatches = self._minibatches(adata, indices, batch_size, dataloader, data_loader_kwargs)
        if self.module.gene_likelihood == "normal":
            warn_user(_ABOUT_NORMAL)
        n_cells = None
        if dataloader is None:
            n_cells = len(self._names_of(adata, indices))
        if progress is None:
            progress = settings.verbosity <= logging.INFO
        options = {
            "draws_per_pass": n_mc_samples_per_pass,
            "n_final": n_mc_samples,
            **(adapt_kwargs or {}),
        }
        bar = tqdm(total=n_cells, desc="Adapting posteriors", unit="cell", disable=not progress)
        return self._adaptations_of(minibatches, options, bar)

    def _adaptations_of(
        self, minibatches: Iterator[dict[str, Tensor]], options: Mapping[str, Any], bar: tqdm
    ) -> Iterator[tuple[dict[str, Tensor], Adapted]]:
        with bar:
            for tensors in minibatches:
                adapted = self.module.adapt(tensors, **options)
                yield tensors, adapted
                bar.update(len(adapted.pareto_k))

    @unsupported_if_adata_minified
    def get_adapted_posterior(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_mc_samples: int = 1_000,
        batch_size: int | None = None,
        n_mc_samples_per_pass: int | None = None,
        dataloader: Iterator[dict[str, Tensor]] | None = None,
        *,
        n_draws: int | None = None,
        adapt_kwargs: dict[str, Any] | None = None,
        progress: bool | None = None,
    ) -> AdaptedPosterior:
        r"""The exact posterior of each cell, as a mixture of Student's t distributions.

        The encoder's mixture is adapted to p(z | x) by :func:`mixscvi.mixture.adapt`, with the
        trained decoder and prior, and cell by cell: what the encoder has not learned about a cell
        does not matter. Maps and clusters are usually better served by
        :meth:`get_latent_representation`, which the encoder smooths.

        Parameters
        ----------
        adata, indices, batch_size, dataloader
            As in :meth:`get_latent_mixture`.
        n_mc_samples
            Fresh draws per cell from its adapted proposal, at least 25: they give the
            log-likelihood, its standard error, k-hat and `draws`.
        n_mc_samples_per_pass
            Draws per cell that are decoded at once, which bounds the memory. By default as many
            as make about eight million values.
        n_draws
            Draws from the exact posterior to return: the fresh draws, resampled with replacement
            in proportion to their importance weights. Ask for fewer than `n_mc_samples`: a cell
            has no more distinct ones, and about its effective sample size count. None by default.
        adapt_kwargs
            Passed to :func:`mixscvi.mixture.adapt`: ``n_draws`` and ``max_generations`` are the
            budget, ``k_threshold`` says when to stop; ``standard_error``, in nats, has cells drawn
            from until their log p(x) is as exact.
        progress
            Whether to show a progress bar; by default unless ``scvi.settings.verbosity`` is above
            ``logging.INFO``.

        Returns
        -------
        Named arrays by cell. The mixtures live ahead of the flow, where there is one, and have
        the log library size as last dimension, where it is modeled; `draws` are behind the flow.

        Raises
        ------
        RuntimeError
            If the model is not trained, or in torch's inference mode, which forbids gradients.
        ValueError
            If an argument is out of range, the data are bad, or their counts were replaced by
            minification.

        Warns
        -----
        UserWarning
            If more than a tenth of the cells have a ``pareto_k`` above 0.7, or if
            ``gene_likelihood="normal"``.

        Examples
        --------
        >>> import mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16, n_latent=4)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> posterior = model.get_adapted_posterior(
        ...     indices=[0, 1, 2], n_mc_samples=100, n_draws=20, progress=False
        ... )
        >>> posterior.loc.shape, posterior.scale_tril.shape, posterior.draws.shape
        ((3, 5, 4), (3, 5, 4, 4), (20, 3, 4))
        """
        if n_draws is not None:
            check_positive_int("n_draws", n_draws)
        adaptations = self._adaptations(
            n_mc_samples,
            n_mc_samples_per_pass,
            adapt_kwargs,
            progress,
            adata,
            indices,
            batch_size,
            dataloader,
        )
        columns: dict[str, Any] = gather_columns(
            self._columns_of(adapted, n_draws) for _, adapted in adaptations
        )
        draws = columns.pop("draws", None)
        if draws is not None:
            draws = np.ascontiguousarray(draws.swapaxes(0, 1))
        dof = int(columns.pop("dof")[0])
        posterior = AdaptedPosterior(**columns, dof=dof, draws=draws)
        warn_of_adapted_tails(posterior.pareto_k)
        return posterior

    def _columns_of(self, adapted: Adapted, n_draws: int | None) -> dict[str, Tensor]:
        """Results of a minibatch, cells first."""
        columns = {name: getattr(adapted.proposal, name) for name in _OF_PROPOSAL}
        columns |= columns_of_cells(adapted)
        # The tails are never Gaussian, and those of all cells are alike.
        columns["dof"] = torch.full_like(adapted.n_evaluations, cast(int, adapted.proposal.dof))
        if n_draws is not None:
            draws = self.module.adapted_latents(resample(adapted, n_draws))
            columns["draws"] = draws.transpose(0, 1)
        return columns


def columns_of_cells(adapted: Adapted) -> dict[str, Tensor]:
    """What is one number for each of `B` cells, `(B,)`, in the order of tables."""
    return {name: getattr(adapted, name) for name in _OF_CELLS}


def check_enough_for_k(n_mc_samples: int) -> None:
    """Raise if there are too few draws per cell for k-hat."""
    if check_positive_int("n_mc_samples", n_mc_samples) < LEAST_FOR_K:
        raise ValueError(
            f"n_mc_samples must be at least {LEAST_FOR_K} for k-hat, got {n_mc_samples}"
        )


def warn_of_encoder_tails(pareto_k: np.ndarray) -> None:
    """Warn if the encoder's proposal cannot be trusted in more than a tenth of the cells."""
    share = _share_untrusted(pareto_k)
    if share > _SHARE_TO_WARN_OF:
        warn_user(
            f"the encoder's posterior is no good proposal for {share:.0%} of the cells (k-hat "
            f"above {_LARGEST_K}): their log-likelihood is in effect a lower bound, by how much "
            'depends on the model. Call this with proposal="adapted" to compare models.'
        )


def warn_of_adapted_tails(pareto_k: np.ndarray) -> None:
    """Warn if the adapted proposals cannot be trusted in more than a tenth of the cells."""
    share = _share_untrusted(pareto_k)
    if share > _SHARE_TO_WARN_OF:
        warn_user(
            f"for {share:.0%} of the cells the adapted proposal is no good one either (k-hat above "
            f"{_LARGEST_K}): what is made of them is approximate. Larger `n_draws` and "
            "`max_generations` in adapt_kwargs may help; "
            'get_posterior_diagnostics(proposal="adapted") names the cells.'
        )


def _share_untrusted(pareto_k: np.ndarray) -> float:
    """Share of cells whose k-hat is above 0.7 or NaN."""
    return (~(pareto_k <= _LARGEST_K)).mean().item()


def resample(adapted: Adapted, n_draws: int) -> Tensor:
    """Draws `(n_draws, B, D)` with replacement, in proportion to their importance weights.

    Parameters
    ----------
    adapted
        Has the draws and log-weights of `B` cells.
    n_draws
        Draws per cell.
    """
    weights = adapted.log_weights.softmax(0).mT  # (B, N)
    chosen = torch.multinomial(weights, n_draws, replacement=True).mT
    return adapted.draws.gather(0, chosen.unsqueeze(-1).expand(-1, -1, adapted.draws.shape[-1]))
