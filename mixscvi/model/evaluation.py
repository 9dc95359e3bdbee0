"""Likelihoods of a trained model, and diagnostics of its posteriors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from scvi.utils import unsupported_if_adata_minified
from torch import Tensor

from mixscvi.checks import check_choice, check_positive_int
from mixscvi.mixture import (
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
from mixscvi.module import FORMS

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["ComponentDiagnostics", "EvaluationMixin"]


class ComponentDiagnostics(NamedTuple):
    """What each component of each cell's posterior contributes."""

    elbo: np.ndarray
    """The component's ELBO as if it were the whole posterior, `(n, A)`, in nats."""
    specialization: np.ndarray
    """KL divergence of the component from the mixture, `(n, A)`, in nats; at most log A."""


class EvaluationMixin:
    """Methods of :class:`mixscvi.MixSCVI` that importance-sample its cells.

    The model provides ``module``, ``adata`` and ``_minibatches``.
    """

    def _importance_draws(
        self,
        n_mc_samples: int,
        n_mc_samples_per_pass: int | None,
        *minibatch_arguments: Any,
    ) -> Iterator[ImportanceDraws]:
        """Draws of each minibatch in turn; `n_mc_samples` in all per cell, rounded up."""
        check_positive_int("n_mc_samples", n_mc_samples)
        if n_mc_samples_per_pass is not None:
            check_positive_int("n_mc_samples_per_pass", n_mc_samples_per_pass)
        n_samples = -(-n_mc_samples // self.module.n_components)
        for tensors in self._minibatches(*minibatch_arguments):
            yield self.module.importance_draws(tensors, n_samples, n_mc_samples_per_pass)

    @torch.inference_mode()
    @unsupported_if_adata_minified
    def get_marginal_ll(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_mc_samples: int = 1_000,
        batch_size: int | None = None,
        return_mean: bool = True,
        dataloader: Iterator[dict[str, Tensor]] | None = None,
        data_loader_kwargs: dict | None = None,
        n_mc_samples_per_pass: int | None = None,
        form: Literal["siwae", "paper"] = "siwae",
        return_std_error: bool = False,
    ) -> float | Tensor | tuple[float, float] | tuple[Tensor, Tensor]:
        r"""Importance-sampled log-likelihood of the cells, with the mixture as proposal.

        Draws are stratified: as many from each component. Each cell is encoded once.

        Parameters
        ----------
        adata, indices, batch_size, dataloader, data_loader_kwargs
            As in :meth:`get_latent_mixture`.
        n_mc_samples
            Draws per cell in all, rounded up to a multiple of `A`.
        return_mean
            Whether to average over cells.
        n_mc_samples_per_pass
            Draws per cell that are decoded at once, which bounds the memory. By default as many
            as make about four million values.
        form
            ``"siwae"``: all draws inside the logarithm, consistent for log p(x).
            ``"paper"``: the average over components of the logarithm, as in the papers' tables;
            never larger, and below log p(x) for any number of draws if components specialize.
        return_std_error
            Whether to return the Monte-Carlo standard error as well; SIWAE form alone.

        Returns
        -------
        Log-likelihood in nats: the mean, or `(n,)` for ``return_mean=False``; with its standard
        error if asked for.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If `form` is unknown, a standard error is asked for with ``form="paper"`` or with
            fewer than two draws per component, or the data are bad.

        Examples
        --------
        >>> import mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> model.get_marginal_ll(indices=[0, 1, 2], n_mc_samples=20, return_mean=False).shape
        torch.Size([3])
        """
        check_choice("form", form, tuple(FORMS))
        if return_std_error and form != "siwae":
            raise ValueError(f"a standard error is available with form='siwae', got form={form!r}")
        values, errors = [], []
        for draws in self._importance_draws(
            n_mc_samples,
            n_mc_samples_per_pass,
            adata,
            indices,
            batch_size,
            dataloader,
            data_loader_kwargs,
        ):
            values.append(FORMS[form](draws.log_weights).cpu())
            if return_std_error:
                errors.append(siwae_standard_error(draws.log_weights).cpu())
        log_likelihood = torch.cat(values)
        if not return_std_error:
            return log_likelihood.mean().item() if return_mean else log_likelihood
        error = torch.cat(errors)
        if not return_mean:
            return log_likelihood, error
        return log_likelihood.mean().item(), error.square().sum().sqrt().item() / len(error)

    @torch.inference_mode()
    @unsupported_if_adata_minified
    def get_posterior_diagnostics(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        n_mc_samples: int = 1_000,
        batch_size: int | None = None,
        n_mc_samples_per_pass: int | None = None,
        dataloader: Iterator[dict[str, Tensor]] | None = None,
    ) -> pd.DataFrame:
        """How well each cell's posterior is covered, cell by cell.

        Parameters
        ----------
        adata, indices, batch_size, dataloader
            As in :meth:`get_latent_mixture`.
        n_mc_samples, n_mc_samples_per_pass
            As in :meth:`get_marginal_ll`; at least 25 draws.

        Returns
        -------
        Table indexed by cell (by number with a `dataloader`):

        - ``jensen_shannon_divergence``: between the components, in nats; from 0 (they coincide)
          to log A (they are disjoint);
        - ``effective_sample_size``: how many of the draws carry the weight;
        - ``pareto_k``: under 0.7, the likelihood and all importance-weighted results of the cell
          can be trusted;
        - ``log_likelihood``: SIWAE, in nats;
        - ``miselbo``: the average log-weight, in nats: what training maximizes with the default
          objective.

        Examples
        --------
        >>> import mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> model.get_posterior_diagnostics(indices=[0, 1, 2], n_mc_samples=100).shape
        (3, 5)
        """
        if check_positive_int("n_mc_samples", n_mc_samples) < 25:
            raise ValueError(f"n_mc_samples must be at least 25 for k-hat, got {n_mc_samples}")
        tables = []
        for draws in self._importance_draws(
            n_mc_samples, n_mc_samples_per_pass, adata, indices, batch_size, dataloader, None
        ):
            log_weights = draws.log_weights
            per_cell = log_weights.movedim(1, 0).flatten(1)
            columns = {
                "jensen_shannon_divergence": specialization(draws.log_own, draws.log_mixture).mean(
                    -1
                ),
                "effective_sample_size": effective_sample_size(per_cell),
                "pareto_k": pareto_k(per_cell),
                "log_likelihood": siwae(log_weights),
                "miselbo": miselbo(log_weights),
            }
            tables.append(
                pd.DataFrame({name: values.cpu().numpy() for name, values in columns.items()})
            )
        if dataloader is not None:
            return pd.concat(tables, ignore_index=True)
        obs_names = (self.adata if adata is None else adata).obs_names
        table = pd.concat(tables, ignore_index=True)
        table.index = obs_names if indices is None else obs_names[indices]
        return table

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
        elbos, specializations = [], []
        for draws in self._importance_draws(
            n_mc_samples, n_mc_samples_per_pass, adata, indices, batch_size, dataloader, None
        ):
            elbos.append(component_elbo(draws.log_joint, draws.log_own).cpu())
            specializations.append(specialization(draws.log_own, draws.log_mixture).cpu())
        return ComponentDiagnostics(torch.cat(elbos).numpy(), torch.cat(specializations).numpy())

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
        means = self.get_latent_representation(adata, indices, batch_size=batch_size)
        return active_units(torch.from_numpy(means), threshold).numpy()
