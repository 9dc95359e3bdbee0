"""The latents of a trained model."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import scvi
import torch
from scvi.model import SCVI
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    Normal,
    StudentT,
    TransformedDistribution,
)

from mixscvi.checks import check_choice, check_column, check_number, check_positive_int
from mixscvi.model.gathering import gather
from mixscvi.model.loader_arguments import check_loader_arguments
from mixscvi.module.signatures import signed_as
from mixscvi.warning import warn_user

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["LatentMixture", "LatentsMixin"]

# Encoded at once by default: the encoders' weights are then read less often.
_CELLS_AT_ONCE = 512


def _cells_at_once(batch_size: int | None) -> int:
    return max(scvi.settings.batch_size, _CELLS_AT_ONCE) if batch_size is None else batch_size


class LatentMixture(NamedTuple):
    """Parameters of each cell's mixture posterior.

    Examples
    --------
    The mean of a mixture is that of its component means:

    >>> import numpy as np
    >>> posterior = LatentMixture(loc=np.zeros((6, 4, 10)), scale=np.ones((6, 4, 10)))
    >>> posterior.loc.mean(1).shape
    (6, 10)
    """

    loc: np.ndarray
    """Component means, `(n, A, D)`."""
    scale: np.ndarray
    """Component standard deviations, `(n, A, D)`."""


class LatentsMixin:
    """Methods of :class:`mixscvi.MixSCVI` that give its latents.

    The model provides ``module``, ``device``, ``_minibatches``, ``_given`` and
    ``_warn_of_dead_components``.
    """

    @torch.inference_mode()
    def get_latent_mixture(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dataloader: Iterator[dict[str, Tensor]] | None = None,
        **data_loader_kwargs: Any,
    ) -> LatentMixture:
        """Means and standard deviations of every component of every cell's posterior.

        With a flow they are those of the base mixture, before the flow.

        Parameters
        ----------
        adata
            AnnData set up like the training data; by default the training data.
        indices
            Cells to use; all by default.
        batch_size
            Cells per minibatch; by default ``scvi.settings.batch_size``, but at least 512.
        dataloader
            Minibatches of the user's own, instead of `adata`; `indices` and `batch_size` are
            then ignored, as in scvi-tools.
        **data_loader_kwargs
            Passed to the data loader.

        Returns
        -------
        Named arrays ``loc`` and ``scale``, each `(n, A, D)`.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If the genes are not those trained on, or the counts are bad.

        Examples
        --------
        >>> import mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> model.get_latent_mixture().scale.shape
        (700, 2, 10)
        """
        minibatches = self._minibatches(
            adata, indices, _cells_at_once(batch_size), dataloader, data_loader_kwargs
        )
        posteriors = map(self.module.posterior, minibatches)
        return LatentMixture(*gather((q.component_loc, q.component_scale) for q in posteriors))

    @torch.inference_mode()
    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        give_mean: bool = True,
        mc_samples: int = 5_000,
        batch_size: int | None = None,
        return_dist: bool = False,
        dataloader: Iterator[dict[str, Tensor]] | None = None,
        representation: Literal["mean", "components", "parameters"] = "mean",
        **data_loader_kwargs: Any,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Latent representation of the cells.

        Parameters
        ----------
        adata, indices, batch_size, dataloader, **data_loader_kwargs
            As in :meth:`get_latent_mixture`.
        give_mean
            Whether to return the mean of the mixture, or a draw from it.
        mc_samples
            Draws behind the mean, where it has no closed form: with a flow or the logistic normal
            latent. They are stratified over the components and come from a seeded generator, so
            the result repeats.
        return_dist
            Whether to return mean and variance of the mixture, the pair of `(n, D)`.
        representation
            ``"mean"``: `(n, D)`, for neighbors and UMAP. ``"components"``: all component means,
            `(n, A * D)`. ``"parameters"``: all component means, then all component variances,
            `(n, 2 * A * D)`, the features that the mixture papers classify. The latter two are
            those of the base mixture if there is a flow.

        Returns
        -------
        Array of the shape above.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        ValueError
            If `representation` is unknown or is at odds with `give_mean` and `return_dist`, the
            genes are not those trained on, or the counts are bad.

        Warns
        -----
        UserWarning
            Once, if components were found dead after training, which spoil the mean.

        Examples
        --------
        >>> import mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> model.get_latent_representation(representation="parameters").shape
        (700, 40)
        """
        check_choice("representation", representation, ("mean", "components", "parameters"))
        check_positive_int("mc_samples", mc_samples)
        self._warn_of_dead_components()
        if representation != "mean":
            if return_dist or not give_mean:
                raise ValueError(
                    f"representation={representation!r} is neither a draw nor a distribution: "
                    f"got give_mean={give_mean}, return_dist={return_dist}"
                )
            loc, scale = self.get_latent_mixture(
                adata, indices, batch_size, dataloader, **data_loader_kwargs
            )
            loc = loc.reshape(len(loc), -1)
            if representation == "components":
                return loc
            return np.concatenate([loc, np.square(scale).reshape(len(loc), -1)], axis=1)

        if self.module is None:
            self._check_if_trained(warn=False)
        module = self.module
        if module.mixture.is_scvi or not (give_mean or return_dist):
            check_loader_arguments(data_loader_kwargs)
            return super().get_latent_representation(
                adata,
                indices=indices,
                give_mean=give_mean,
                mc_samples=mc_samples,
                batch_size=batch_size,
                return_dist=return_dist,
                dataloader=self._given(dataloader),
                **data_loader_kwargs,
            )
        minibatches = self._minibatches(
            adata, indices, _cells_at_once(batch_size), dataloader, data_loader_kwargs
        )
        n_kept = 2 if return_dist else 1
        gathered = gather(
            module.latent_moments(tensors, mc_samples, on_simplex=not return_dist)[:n_kept]
            for tensors in minibatches
        )
        return gathered if return_dist else gathered[0]  # type: ignore[return-value]

    def get_importance_weights(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        qz: Distribution,
        px: Distribution,
        zs: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> np.ndarray:
        """As in scvi-tools, with this model's prior, flow and mixture posterior.

        scvi-tools scores draws under a standard normal prior and divides by the density that it
        asks of `qz`, which is therefore corrected for this model's prior.

        Parameters
        ----------
        adata, indices
            As in :meth:`get_latent_mixture`.
        qz, px
            Distributions that the module's ``inference`` and ``generative`` returned.
        zs
            Draws of z, `(L, B, D)`.
        *args, **kwargs
            As in ``SCVI.get_importance_weights``.

        Returns
        -------
        Weights of the draws, `(n, L)`, as in ``SCVI.get_importance_weights``.
        """
        cells = None if indices is None else np.asarray(indices)  # which scvi-tools takes some of
        if cells is not None and cells.dtype == bool:
            cells = np.flatnonzero(cells)
        qz = self.module.as_importance_density(qz)
        return super().get_importance_weights(adata, cells, qz, px, zs, *args, **kwargs)

    @torch.inference_mode()
    def get_aggregated_posterior(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        dof: float | None = 3.0,
    ) -> Distribution:
        """Mixture of the posteriors of all cells: `n * A` components, under the flow if any.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_mixture`; `indices` that choose no cell are taken for all
            cells, as scvi-tools takes them, with a warning.
        dof
            Degrees of freedom of Student's t components; ``None`` for Gaussians.

        Returns
        -------
        Distribution with event shape `(D,)`.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        TypeError, ValueError
            If `dof` is not a number above zero, the genes are not those trained on, or the counts
            are bad.

        Examples
        --------
        >>> import mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> model.get_aggregated_posterior().sample((3,)).shape
        torch.Size([3, 10])
        """
        if dof is not None:
            check_number("dof", dof, above=0)
        if indices is not None and np.size(indices) == 0:
            warn_user("indices choose no cell: all cells are aggregated, as scvi-tools does")
            indices = None
        loc, scale = (
            torch.from_numpy(part).flatten(0, 1).to(self.device)
            for part in self.get_latent_mixture(adata, indices, batch_size)
        )
        components = Normal(loc, scale) if dof is None else StudentT(dof, loc, scale)
        aggregated = MixtureSameFamily(
            Categorical(logits=torch.zeros(len(loc), device=self.device)),
            Independent(components, 1),
        )
        if self.module.flow is None:
            return aggregated
        return TransformedDistribution(aggregated, [self.module.flow.transform])

    @signed_as(SCVI.differential_abundance)
    def differential_abundance(self, *args: Any, **kwargs: Any) -> Any:
        """Log density of each cell's latent mean among the cells of each sample.

        Written to ``adata.obsm["da_log_probs"]``, by cell and sample; see
        ``SCVI.differential_abundance``. The density is :meth:`get_aggregated_posterior` of the
        sample's cells.

        Parameters
        ----------
        *args, **kwargs
            As in scvi-tools.

        Raises
        ------
        KeyError
            If `sample_key` is no column of ``adata.obs``, or is not given.
        TypeError, ValueError
            If the sample of a cell is missing, an argument is out of range, or `adata` is a
            collection without ``obsm``.
        """
        bound = inspect.signature(SCVI.differential_abundance).bind(self, *args, **kwargs)
        given = bound.arguments
        if "batch_size" in given:
            given["batch_size"] = check_positive_int("batch_size", given["batch_size"])
        if given.get("num_cells_posterior") is not None:
            check_positive_int("num_cells_posterior", given["num_cells_posterior"])
        if given.get("dof") is not None:
            check_number("dof", given["dof"], above=0)
        if given.get("dataloader") is None:
            adata = self._validate_anndata(given.get("adata"))
            key = given.get("sample_key")
            if key is None:
                raise KeyError("sample_key must be the name of a column of adata.obs, got None")
            if isinstance(adata.obs, pd.DataFrame):
                check_column(adata.obs, key, argument="sample_key")
            elif key not in adata.obs:
                columns = [*adata.obs.columns]
                raise KeyError(f"sample_key={key!r} is no column of adata.obs, which has {columns}")
            if adata.obsm is None:
                raise ValueError(
                    "differential_abundance writes to adata.obsm, which this collection lacks: "
                    "make it with AnnCollection(..., join_obsm='inner') of parts that have an "
                    "obsm, or give adata"
                )
        return super().differential_abundance(*bound.args[1:], **bound.kwargs)
