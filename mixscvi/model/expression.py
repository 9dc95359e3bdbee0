"""Expression of the genes, decoded from the encoder's or from the exact posteriors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS
from scvi.model import SCVI
from scvi.model._utils import _get_batch_code_from_category
from torch import Tensor

from mixscvi.checks import (
    check_choice,
    check_library_size,
    check_positive_int,
)
from mixscvi.model.adapted import resample, warn_of_adapted_tails
from mixscvi.model.data import MINIFY_UNS_KEY
from mixscvi.model.inputs import check_dispersion, check_keywords
from mixscvi.model.minified import WITHOUT_COUNTS
from mixscvi.warning import warn_user

if TYPE_CHECKING:
    from anndata import AnnData

    from mixscvi.module.adapting import Adaptation

__all__ = ["DrawsOfCells", "ExpressionMixin"]

_WEIGHTS = ("uniform", "importance", "adapted")
_KEPT = 100  # draws of each cell
_ELEMENTS_AT_ONCE = 2**22  # decoded values


class DrawsOfCells(dict[int, Tensor]):
    """Draws `(n_draws, D)` from the exact posteriors of cells that were adapted, by position.

    `D` is that of the encoder's space. ``pareto_k`` holds one value for each cell.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pareto_k: dict[int, float] = {}

    def add(self, cells: Sequence[int], draws: Tensor, pareto_k: Tensor) -> None:
        """Keep draws `(n_draws, B, D)` of these cells."""
        self.update(zip(cells, draws.cpu().unbind(1), strict=True))
        self.pareto_k.update(zip(cells, pareto_k.tolist(), strict=True))

    def one_of(self, cell: int) -> Tensor:
        """One of a cell's draws at random, `(D,)`."""
        return self[cell][np.random.randint(len(self[cell]))]


class _Decoding:
    """From draws of cells to the expression that is asked for."""

    genes: np.ndarray | slice = slice(None)
    batches: Sequence[int | None] = (None,)

    def __init__(self, module: Adaptation, library_size: float | Literal["latent"]) -> None:
        self.module = module
        self.key, self.factor = "mu", 1.0
        if library_size != "latent":
            self.key, self.factor = "scale", library_size

    def __call__(self, tensors: dict[str, Tensor], draws: Tensor) -> np.ndarray:
        """Expression `(..., B, G)` of draws `(..., B, D)`, averaged over batches."""
        total = 0.0
        for batch in self.batches:
            px = self.module.likelihood_of_adapted(tensors, draws, batch)
            total = total + px.get_normalized(self.key)[..., self.genes].cpu()
        return (self.factor / len(self.batches) * total).numpy()

    def mean(self, tensors: dict[str, Tensor], draws: Tensor) -> np.ndarray:
        """Mean expression `(B, G)` of draws `(n, B, D)`, some at a time."""
        at_once = max(1, _ELEMENTS_AT_ONCE // tensors[REGISTRY_KEYS.X_KEY].numel())
        return sum(self(tensors, some).sum(0) for some in draws.split(at_once)) / len(draws)


class ExpressionMixin:
    """Methods of :class:`mixscvi.MixSCVI` that decode expression.

    The model provides ``module``, ``adata``, ``_minibatches``, ``_check_arguments``,
    ``_known_batches``, ``_given`` and ``_adaptations``.
    """

    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        transform_batch: Sequence[float | str] | float | str | None = None,
        gene_list: Sequence[str] | None = None,
        library_size: float | Literal["latent"] = 1,
        n_samples: int = 1,
        n_samples_overall: int | None = None,
        weights: Literal["uniform", "importance", "adapted"] | None = None,
        batch_size: int | None = None,
        return_mean: bool = True,
        return_numpy: bool | None = None,
        silent: bool = True,
        dataloader: Iterator[dict[str, Tensor]] | None = None,
        data_loader_kwargs: dict[str, Any] | None = None,
        **importance_weighting_kwargs: Any,
    ) -> np.ndarray | pd.DataFrame:
        r"""Expression frequencies of the genes, decoded from draws of the posterior.

        Parameters
        ----------
        adata, indices, batch_size, dataloader, data_loader_kwargs
            As in :meth:`get_latent_mixture`.
        transform_batch
            Batch or batches to decode all cells as, instead of their own; an average over several.
        gene_list
            Genes to return; all by default.
        library_size
            Counts that a cell's frequencies are scaled to; ``"latent"`` for its own library size
            or size factor, and draws of it where it is modeled.
        n_samples
            Draws per cell.
        n_samples_overall
            Draws in all, from cells chosen at random with replacement, instead of `n_samples`.
        weights
            ``"uniform"``, and ``None``: draws of the encoder's posterior as they are.
            ``"importance"``: those of `n_samples_overall` are chosen by scvi-tools' importance
            weights, which favor draws that explain many cells. ``"adapted"``: draws from the exact
            posterior p(z | x) of each cell, by adaptive importance sampling, resampled in
            proportion to their importance weights; it needs the cells' counts, and
            some two to three thousand decoder evaluations a cell, more with many latents.
        return_mean
            Whether to average over the draws of each cell.
        return_numpy
            Whether to return an array instead of a table; by default for draws alone.
        silent
            Whether to hide the progress bar over `transform_batch`.
        **importance_weighting_kwargs
            With ``weights="adapted"``, `n_mc_samples`, `n_mc_samples_per_pass`, `adapt_kwargs` and
            `progress` as in :meth:`get_adapted_posterior`. Otherwise those of
            :meth:`get_importance_weights`.

        Returns
        -------
        Table `(n, G)` by cell and gene: of one draw, or of the mean over `n_samples`. With
        ``return_mean=False``, an array `(n_samples, n, G)`; with `n_samples_overall`, an array
        `(n_samples_overall, G)`.

        Raises
        ------
        RuntimeError
            With ``weights="adapted"``, if the model is not trained; otherwise that is a warning, as
            in scvi-tools.
        TypeError
            If `n_samples`, `n_samples_overall` or `library_size` is no number.
        ValueError
            If `weights` is unknown, an argument is out of range, no gene is of a name, or with
            ``weights="adapted"`` the counts were replaced by minification, or with
            ``weights="importance"`` the likelihood is no negative binomial.

        Warns
        -----
        UserWarning
            With ``weights="adapted"``, if more than a tenth of the cells have a k-hat above 0.7.

        Examples
        --------
        >>> import mixscvi, scvi
        >>> scvi.settings.seed = 0
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16, n_latent=2)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> model.get_normalized_expression(
        ...     indices=[0, 1, 2], n_samples=25, weights="adapted", progress=False
        ... ).shape
        (3, 765)
        """
        # As scvi-tools, which lets untrained models decode with a warning.
        self._check_if_trained(warn=weights != "adapted")
        if weights is not None:
            check_choice("weights", weights, _WEIGHTS)
        self._check_arguments(
            {
                "gene_list": gene_list,
                "n_samples": n_samples,
                "transform_batch": transform_batch,
                "dataloader": dataloader,
                "data_loader_kwargs": data_loader_kwargs,
            }
        )
        taken_by = [
            self._adapted_expression if weights == "adapted" else SCVI.get_importance_weights
        ]
        check_keywords(
            importance_weighting_kwargs, taken_by, argument="get_normalized_expression()"
        )
        if weights == "importance":
            check_dispersion(self.module, "weights='importance'")
            if dataloader is not None:
                raise ValueError("weights='importance' needs adata, got a dataloader")
        if n_samples_overall is not None:
            check_positive_int("n_samples_overall", n_samples_overall)
            if n_samples != 1:
                raise ValueError(
                    "n_samples_overall takes the place of n_samples, got "
                    f"n_samples_overall={n_samples_overall} and n_samples={n_samples}"
                )
            if return_numpy is False:
                warn_user("return_numpy=False has no cells to name with n_samples_overall")
            return_numpy = True
        dataloader = self._given(dataloader)
        check_library_size(library_size)
        if isinstance(indices, tuple):  # of which pandas takes each for an axis
            indices = list(indices)
        if weights == "adapted":
            with torch.inference_mode(False):  # which scvi-tools samples differences in
                return self._adapted_expression(
                    adata,
                    indices,
                    transform_batch,
                    gene_list,
                    library_size,
                    n_samples,
                    n_samples_overall,
                    return_mean,
                    return_numpy,
                    (batch_size, dataloader, data_loader_kwargs),
                    **importance_weighting_kwargs,
                )
        return super().get_normalized_expression(
            adata=adata,
            indices=indices,
            transform_batch=transform_batch,
            gene_list=gene_list,
            library_size=library_size,
            n_samples=n_samples,
            n_samples_overall=n_samples_overall,
            weights=weights,
            batch_size=batch_size,
            return_mean=return_mean,
            return_numpy=return_numpy,
            silent=silent,
            dataloader=dataloader,
            data_loader_kwargs=data_loader_kwargs,
            **importance_weighting_kwargs,
        )

    def _adapted_expression(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        transform_batch: Sequence[float | str] | float | str | None,
        gene_list: Sequence[str] | None,
        library_size: float | Literal["latent"],
        n_samples: int,
        n_samples_overall: int | None,
        return_mean: bool,
        return_numpy: bool | None,
        loading: tuple[int | None, Iterator[dict[str, Tensor]] | None, dict[str, Any] | None],
        *,
        n_mc_samples: int = 1_000,
        n_mc_samples_per_pass: int | None = None,
        adapt_kwargs: dict[str, Any] | None = None,
        progress: bool | None = None,
        known_draws: DrawsOfCells | None = None,
    ) -> np.ndarray | pd.DataFrame:
        """Expression of draws from the exact posteriors; see :meth:`get_normalized_expression`."""
        self._check_counts(adata)
        dataloader = loading[1]
        decoding = _Decoding(self.module, library_size)
        if gene_list is not None:
            decoding.genes = np.isin(self.get_var_names(), list(gene_list))
        data, cells = None, None
        if dataloader is None:
            data = self._validate_anndata(adata)
            decoding.batches = _get_batch_code_from_category(
                self.get_anndata_manager(data, required=True), transform_batch
            )
            given = np.arange(data.n_obs) if indices is None else np.asarray(indices)
            cells = np.flatnonzero(given) if given.dtype == bool else given
        elif transform_batch is not None:
            raise ValueError(
                f"transform_batch needs adata, got a dataloader and {transform_batch!r}"
            )
        budget = (n_mc_samples, n_mc_samples_per_pass, adapt_kwargs, progress)
        if n_samples_overall is not None and cells is not None:
            some = np.random.choice(cells, n_samples_overall)
            n_per_cell = n_samples_overall // len(cells) + 1
            return self._expression_of_cells(
                some, n_per_cell, decoding, known_draws, budget, data, loading
            )

        minibatches, pareto_k = [], []
        for tensors, adapted in self._adaptations(*budget, adata, cells, *loading):
            draws = resample(adapted, n_samples)
            minibatches.append(
                decoding.mean(tensors, draws) if return_mean else decoding(tensors, draws)
            )
            pareto_k.append(adapted.pareto_k.numpy(force=True))
        warn_of_adapted_tails(np.concatenate(pareto_k))
        expression = np.concatenate(minibatches, axis=-2)
        if n_samples == 1 and not return_mean:
            expression = expression[0]
        if n_samples_overall is not None:
            return expression[np.random.choice(len(expression), n_samples_overall)]
        if expression.ndim == 3 and return_numpy is False:
            warn_user(
                "return_numpy=False is for one draw or the mean: draws are returned as an array"
            )
        if return_numpy or expression.ndim == 3 or data is None:
            return expression
        names = data.var_names[slice(None) if gene_list is None else decoding.genes]
        return pd.DataFrame(expression, columns=names, index=data.obs_names[cells])

    def _expression_of_cells(
        self,
        cells: np.ndarray,
        n_per_cell: int,
        decoding: _Decoding,
        known_draws: DrawsOfCells | None,
        budget: tuple,
        adata: AnnData,
        loading: tuple,
    ) -> np.ndarray:
        """Expression of one draw for each entry of `cells`, which may repeat.

        `known_draws` has what other calls have adapted, and is added to; whether its cells can be
        trusted is then for its owner to say.
        """
        draws = DrawsOfCells() if known_draws is None else known_draws
        missing = [cell for cell in np.unique(cells) if len(draws.get(cell, ())) < n_per_cell]
        if missing:
            n_kept, start = max(n_per_cell, _KEPT), 0
            for _, adapted in self._adaptations(*budget, adata, missing, *loading):
                stop = start + len(adapted.pareto_k)
                draws.add(missing[start:stop], resample(adapted, n_kept), adapted.pareto_k)
                start = stop
        if known_draws is None:
            warn_of_adapted_tails(np.array(list(draws.pareto_k.values())))
        chosen = torch.stack([draws.one_of(cell) for cell in cells])
        minibatches, start = [], 0
        for tensors in self._minibatches(adata, cells, *loading):
            stop = start + len(tensors[REGISTRY_KEYS.X_KEY])
            minibatches.append(decoding(tensors, chosen[start:stop]))
            start = stop
        return np.concatenate(minibatches)

    def _check_counts(self, adata: AnnData | None) -> None:
        """Raise if the counts of the cells are gone."""
        kinds = [self.minified_data_type]
        if adata is not None:
            kinds.append(adata.uns.get(MINIFY_UNS_KEY))
        if WITHOUT_COUNTS in kinds:
            raise ValueError(
                "weights='adapted' needs the cells' counts, which minification has replaced: "
                "choose weights='uniform', or minify with "
                "'latent_posterior_parameters_with_counts'"
            )
