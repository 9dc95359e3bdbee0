"""Likelihoods of a trained model, and diagnostics of its posteriors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from scvi.utils import unsupported_if_adata_minified
from torch import Tensor

from mixscvi.checks import check_choice, check_number, check_positive_int
from mixscvi.mixture import (
    Adapted,
    ImportanceDraws,
    active_units,
    component_elbo,
    effective_sample_size,
    miselbo,
    pareto_k,
    siwae,
    siwae_standard_error,
    specialization,
)
from mixscvi.mixture.diagnostics import LEAST_FOR_K
from mixscvi.model.adapted import (
    check_enough_for_k,
    columns_of_cells,
    warn_of_adapted_tails,
    warn_of_encoder_tails,
)
from mixscvi.model.gathering import gather, gather_columns
from mixscvi.module import FORMS

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["ComponentDiagnostics", "EvaluationMixin"]

_PROPOSALS = ("encoder", "adapted")


class ComponentDiagnostics(NamedTuple):
    """What each component of each cell's posterior contributes.

    Examples
    --------
    >>> import numpy as np
    >>> of = ComponentDiagnostics(elbo=np.zeros((6, 4)), specialization=np.full((6, 4), 0.2))
    >>> of.elbo.argmax(1)  # each cell's best component
    array([0, 0, 0, 0, 0, 0])
    """

    elbo: np.ndarray
    """The component's ELBO as if it were the whole posterior, `(n, A)`, in nats."""
    specialization: np.ndarray
    """KL divergence of the component from the mixture, `(n, A)`, in nats; at most log A."""


class EvaluationMixin:
    """Methods of :class:`mixscvi.MixSCVI` that importance-sample its cells.

    The model provides ``module``, ``adata``, ``_check_if_trained``, ``_minibatches``, ``_names_of``
    and ``_adaptations``.
    """

    def _importance_draws(
        self,
        n_mc_samples: int,
        n_mc_samples_per_pass: int | None,
        *minibatch_arguments: Any,
    ) -> Iterator[ImportanceDraws]:
        """Draws of each minibatch in turn; `n_mc_samples` in all per cell, rounded up.

        What is wrong with the arguments is said at once.
        """
        check_positive_int("n_mc_samples", n_mc_samples)
        if n_mc_samples_per_pass is not None:
            check_positive_int("n_mc_samples_per_pass", n_mc_samples_per_pass)
        n_samples = self._n_per_component(n_mc_samples)
        return (
            self.module.importance_draws(tensors, n_samples, n_mc_samples_per_pass)
            for tensors in self._minibatches(*minibatch_arguments)
        )

    def _n_per_component(self, n_mc_samples: int) -> int:
        self._check_if_trained(warn=False)  # one without data has no module before
        return -(-n_mc_samples // self.module.n_components)

    @unsupported_if_adata_minified
    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_mc_samples: int = 1_000,
        batch_size: int | None = None,
        return_mean: bool = True,
        dataloader: Iterator[dict[str, Tensor]] | None = None,
        data_loader_kwargs: dict[str, Any] | None = None,
        n_mc_samples_per_pass: int | None = None,
        form: Literal["siwae", "iw_miselbo"] = "siwae",
        return_std_error: bool = False,
        *,
        proposal: Literal["encoder", "adapted"] = "encoder",
        adapt_kwargs: dict[str, Any] | None = None,
        progress: bool | None = None,
    ) -> np.float64 | Tensor | tuple[np.float64, np.float64] | tuple[Tensor, Tensor]:
        r"""Importance-sampled log-likelihood of the cells, with a mixture as proposal.

        With ``proposal="encoder"`` the draws are the encoder's, as many from each component: fast,
        and in effect a lower bound where the encoder does not cover the exact posterior, by an
        amount that depends on the model. To compare models, use ``proposal="adapted"``: the
        encoder's mixture is first adapted to each cell's exact posterior.

        Parameters
        ----------
        adata, indices, batch_size, dataloader, data_loader_kwargs
            As in :meth:`get_latent_mixture`.
        n_mc_samples
            Draws per cell in all: from the encoder's components, rounded up to a multiple of `A`;
            or afresh from the adapted proposal, at least 25.
        return_mean
            Whether to average over cells.
        n_mc_samples_per_pass
            Draws per cell that are decoded at once, which bounds the memory. By default as many
            as make some four million values (eight, with the adapted proposal).
        form
            ``"siwae"``: all draws inside the logarithm, consistent for log p(x); its exponential
            is unbiased. ``"iw_miselbo"``: the average over components of the logarithm, as in the
            papers' tables; never larger, and below log p(x) for any number of draws if components
            specialize. With the encoder's proposal alone.
        return_std_error
            Whether to return the Monte-Carlo standard error as well; SIWAE form alone.
        proposal
            ``"encoder"`` or ``"adapted"``; see :meth:`get_posterior_diagnostics` for how far
            either can be trusted.
        adapt_kwargs, progress
            As in :meth:`get_adapted_posterior`; with the adapted proposal alone.

        Returns
        -------
        Log-likelihood in nats: the mean as a NumPy scalar, as scvi-tools returns it, or a tensor
        `(n,)` for ``return_mean=False``; with its standard error, likewise, if asked for.

        Raises
        ------
        RuntimeError
            If the model is not trained, or with the adapted proposal in torch's inference mode.
        ValueError
            If `form` or `proposal` is unknown or they do not go together, a standard error is
            asked for with ``form="iw_miselbo"`` or with fewer than two draws per component, or the
            data are bad.

        Warns
        -----
        UserWarning
            If the proposal has a k-hat above 0.7 in more than a tenth of the cells (the encoder's
            with 25 draws or more), or is adapted under ``gene_likelihood="normal"``.

        Examples
        --------
        >>> import mixscvi, scvi
        >>> scvi.settings.seed = 0
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16, n_latent=2)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> cells = {"indices": [0, 1, 2], "return_mean": False}
        >>> model.get_marginal_ll(**cells, n_mc_samples=20).shape
        torch.Size([3])
        >>> model.get_marginal_ll(**cells, proposal="adapted", progress=False).shape
        torch.Size([3])
        """
        check_choice("form", form, tuple(FORMS))
        check_choice("proposal", proposal, _PROPOSALS)
        if return_std_error and form != "siwae":
            raise ValueError(f"a standard error is available with form='siwae', got form={form!r}")
        minibatches = (adata, indices, batch_size, dataloader, data_loader_kwargs)
        if proposal == "adapted":
            if form != "siwae":
                raise ValueError(f"form={form!r} is the encoder's: got proposal='adapted'")
            adaptations = self._adaptations(
                n_mc_samples, n_mc_samples_per_pass, adapt_kwargs, progress, *minibatches
            )
            columns = gather_columns(
                {
                    "log_likelihood": adapted.log_likelihood.to(adapted.draws.dtype),
                    "standard_error": adapted.standard_error.to(adapted.draws.dtype),
                    "pareto_k": adapted.pareto_k,
                }
                for _, adapted in adaptations
            )
            warn_of_adapted_tails(columns["pareto_k"])
        else:
            self._check_unused(adapt_kwargs=adapt_kwargs, progress=progress)
            check_positive_int("n_mc_samples", n_mc_samples)
            if return_std_error and self._n_per_component(n_mc_samples) < 2:
                raise ValueError(
                    "return_std_error=True needs two draws per component, n_mc_samples of at least "
                    f"{2 * self.module.n_components}, got {n_mc_samples}"
                )
            measures = {"log_likelihood": FORMS[form]}
            if return_std_error:
                measures["standard_error"] = siwae_standard_error
            all_draws = self._importance_draws(n_mc_samples, n_mc_samples_per_pass, *minibatches)
            if self._n_per_component(n_mc_samples) * self.module.n_components >= LEAST_FOR_K:
                measures["pareto_k"] = lambda log_weights: pareto_k(_by_cell(log_weights))
            columns = gather_columns(
                {name: measure(draws.log_weights) for name, measure in measures.items()}
                for draws in all_draws
            )
            if "pareto_k" in columns:
                warn_of_encoder_tails(columns["pareto_k"])
        log_likelihood = torch.from_numpy(columns["log_likelihood"])
        if not return_std_error:
            return _mean(log_likelihood) if return_mean else log_likelihood
        error = torch.from_numpy(columns["standard_error"])
        if not return_mean:
            return log_likelihood, error
        return _mean(log_likelihood), np.sqrt(_mean(error.square()) / len(error))

    @unsupported_if_adata_minified
    def get_posterior_diagnostics(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_mc_samples: int = 1_000,
        batch_size: int | None = None,
        n_mc_samples_per_pass: int | None = None,
        dataloader: Iterator[dict[str, Tensor]] | None = None,
        *,
        proposal: Literal["encoder", "adapted"] = "encoder",
        adapt_kwargs: dict[str, Any] | None = None,
        progress: bool | None = None,
    ) -> pd.DataFrame:
        """How well each cell's posterior is covered, cell by cell.

        Parameters
        ----------
        adata, indices, batch_size, dataloader
            As in :meth:`get_latent_mixture`.
        n_mc_samples, n_mc_samples_per_pass, proposal, adapt_kwargs, progress
            As in :meth:`get_marginal_ll`; at least 25 draws.

        Returns
        -------
        Table indexed by cell (by number with a `dataloader`):

        - ``jensen_shannon_divergence``: between the encoder's components, in nats; from 0 (they
          coincide) to log A (they are disjoint);
        - ``effective_sample_size``: how many of the draws carry the weight;
        - ``pareto_k``: above 0.7, trust neither the likelihood nor other importance-weighted
          results of the cell; below it, a mode that no draw met can still be missing;
        - ``log_likelihood``: SIWAE, in nats;

        and with the encoder's proposal

        - ``miselbo``: the average log-weight, in nats: what training maximizes with the default
          objective;

        with the adapted one

        - ``standard_error``: of the log-likelihood, in nats;
        - ``n_evaluations``: decoder evaluations spent on the cell; one with its gradient counts
          as three.

        Raises
        ------
        RuntimeError
            If the model is not trained, or with the adapted proposal in torch's inference mode.
        ValueError
            If `proposal` is unknown, there are fewer than 25 draws, or the data are bad.

        Warns
        -----
        UserWarning
            If more than a tenth of the cells have a k-hat above 0.7, or if the proposal is adapted
            under ``gene_likelihood="normal"``.

        Examples
        --------
        >>> import mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16, n_latent=4)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> model.get_posterior_diagnostics(indices=[0, 1, 2], n_mc_samples=100).shape
        (3, 5)
        >>> adapted = model.get_posterior_diagnostics(
        ...     indices=[0, 1, 2], proposal="adapted", progress=False
        ... )
        >>> list(adapted.columns[:3])
        ['jensen_shannon_divergence', 'effective_sample_size', 'pareto_k']
        """
        check_choice("proposal", proposal, _PROPOSALS)
        check_enough_for_k(n_mc_samples)
        minibatches = (adata, indices, batch_size, dataloader)
        if proposal == "adapted":
            adaptations = self._adaptations(
                n_mc_samples, n_mc_samples_per_pass, adapt_kwargs, progress, *minibatches
            )
            n_per_component = self._n_per_component(n_mc_samples)
            columns = gather_columns(
                self._of_adapted(tensors, adapted, n_per_component)
                for tensors, adapted in adaptations
            )
            warn_of_adapted_tails(columns["pareto_k"])
        else:
            self._check_unused(adapt_kwargs=adapt_kwargs, progress=progress)
            all_draws = self._importance_draws(
                n_mc_samples, n_mc_samples_per_pass, *minibatches, None
            )
            columns = gather_columns(map(_of_encoder, all_draws))
            warn_of_encoder_tails(columns["pareto_k"])
        table = pd.DataFrame(columns)
        if dataloader is None:
            table.index = self._names_of(adata, indices)
        return table

    @torch.no_grad()
    def _of_adapted(
        self, tensors: dict[str, Tensor], adapted: Adapted, n_per_component: int
    ) -> dict[str, Tensor]:
        """Diagnostics of a minibatch and its adapted proposals."""
        posterior = self.module.posterior(tensors)
        return {
            "jensen_shannon_divergence": posterior.jensen_shannon_divergence(n_per_component),
            "effective_sample_size": effective_sample_size(adapted.log_weights.mT),
            **columns_of_cells(adapted),
        }

    @staticmethod
    def _check_unused(**arguments: Any) -> None:
        for name, value in arguments.items():
            if value is not None:
                raise ValueError(f"{name} is for proposal='adapted', got {name}={value!r}")

    @torch.inference_mode()
    @unsupported_if_adata_minified
    def get_component_diagnostics(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_mc_samples: int = 1_000,
        batch_size: int | None = None,
        n_mc_samples_per_pass: int | None = None,
        dataloader: Iterator[dict[str, Tensor]] | None = None,
    ) -> ComponentDiagnostics:
        """Each component's own ELBO, and its divergence from the mixture.

        Parameters
        ----------
        adata, indices, batch_size, dataloader
            As in :meth:`get_latent_mixture`.
        n_mc_samples, n_mc_samples_per_pass
            As in :meth:`get_marginal_ll`.

        Returns
        -------
        Named arrays ``elbo`` and ``specialization``, each `(n, A)`, in nats. The mean of their
        sum over components is MISELBO.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        TypeError, ValueError
            If a number of draws is not a positive integer, the genes are not those trained on, or
            the counts are bad or were replaced by minification.

        Examples
        --------
        >>> import mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> model.get_component_diagnostics(indices=[0, 1, 2], n_mc_samples=100).elbo.shape
        (3, 2)
        """
        all_draws = self._importance_draws(
            n_mc_samples, n_mc_samples_per_pass, adata, indices, batch_size, dataloader, None
        )
        return ComponentDiagnostics(
            *gather(
                (
                    component_elbo(draws.log_joint, draws.log_own),
                    specialization(draws.log_own, draws.log_mixture),
                )
                for draws in all_draws
            )
        )

    def get_active_units(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        threshold: float = 0.01,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Which latent dimensions vary over the cells.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_mixture`.
        threshold
            Least variance of the posterior mean (Burda et al. 2016).

        Returns
        -------
        Booleans, `(D,)`.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        TypeError, ValueError
            If `threshold` is not a number of at least zero, the genes are not those trained on, or
            the counts are bad.

        Examples
        --------
        >>> import mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> model.get_active_units().shape
        (10,)
        """
        check_number("threshold", threshold, least=0)
        means = self.get_latent_representation(adata, indices, batch_size=batch_size)
        return active_units(torch.from_numpy(means), threshold).numpy()


def _of_encoder(draws: ImportanceDraws) -> dict[str, Tensor]:
    """Diagnostics of a minibatch and draws of its encoder's posteriors."""
    per_cell = _by_cell(draws.log_weights)
    return {
        "jensen_shannon_divergence": specialization(draws.log_own, draws.log_mixture).mean(-1),
        "effective_sample_size": effective_sample_size(per_cell),
        "pareto_k": pareto_k(per_cell),
        "log_likelihood": siwae(draws.log_weights),
        "miselbo": miselbo(draws.log_weights),
    }


def _by_cell(log_weights: Tensor) -> Tensor:
    """Log-weights `(L, B, A)` as `(B, L * A)`."""
    return log_weights.movedim(1, 0).flatten(1)


def _mean(values: Tensor) -> np.float64:
    """Mean over cells, of the type that scvi-tools returns."""
    return np.float64(values.double().mean().item())
