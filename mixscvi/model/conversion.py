"""A trained model of scvi-tools as a mixture of one component."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from scvi.model import SCVI
from scvi.module import VAE

from mixscvi.model.minified import WITHOUT_COUNTS
from mixscvi.module import ImportanceSampling

if TYPE_CHECKING:
    from anndata import AnnData
    from scvi.model.base import BaseModelClass

__all__ = ["ConversionMixin", "arguments_of", "check_convertible"]


class ConversionMixin:
    """What makes :class:`mixscvi.MixSCVI` out of other models."""

    @classmethod
    def from_scvi_model(cls, model: SCVI) -> Self:
        """A trained :class:`scvi.model.SCVI` as a MixSCVI of one component, without training.

        Its likelihoods, diagnostics and exact posteriors are then those of the trained model. The
        parameters are copied, and `model` can be used as before. All of them train if it trains
        again, also those that scArches had frozen.

        Parameters
        ----------
        model
            A trained model that holds its AnnData, with counts. The AnnData is registered for
            MixSCVI as well, with the same setup and the same codes of batches and covariates.

        Returns
        -------
        Model of the same AnnData, on the same device, with the same history and the same split
        into training, validation and test cells.

        Raises
        ------
        TypeError
            If `model` is not a :class:`scvi.model.SCVI` with scvi-tools' own module.
        RuntimeError
            If `model` is not trained.
        ValueError
            If `model` holds no AnnData, or one whose counts were replaced by minification.

        Examples
        --------
        >>> import mixscvi, scvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> scvi.model.SCVI.setup_anndata(adata)
        >>> model = scvi.model.SCVI(adata, n_hidden=16)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> mixture = mixscvi.MixSCVI.from_scvi_model(model)
        >>> mixture.get_latent_mixture().loc.shape
        (700, 1, 10)
        """
        check_convertible(model)
        registry, adata = model.registry, model.adata
        cls.setup_anndata(adata, source_registry=registry, **registry["setup_args"])
        converted = cls(adata, n_components=1, **arguments_of(model))
        converted.module.load_state_dict(model.module.state_dict())
        converted.to_device(model.device)
        converted.module.eval()
        for name in ("history_", "train_indices_", "validation_indices_", "test_indices_"):
            setattr(converted, name, getattr(model, name, None))
        converted.is_trained_ = True
        return converted


def arguments_of(model: BaseModelClass) -> dict[str, Any]:
    """The arguments that made a model, by name."""
    init = model.init_params_
    of_kwargs = {name: value for group in init["kwargs"].values() for name, value in group.items()}
    return {**init["non_kwargs"], **of_kwargs}


def check_convertible(
    model: Any, *, argument: str = "model", or_mixture: bool = False, needs_data: bool = True
) -> None:
    """Raise if a model cannot be converted.

    Parameters
    ----------
    model
        A trained model of scVI.
    argument
        What it is called in the message.
    or_mixture
        Whether it may be one of ours.
    needs_data
        Whether its AnnData is needed.
    """
    if not isinstance(model, SCVI):
        raise TypeError(f"{argument} must be a scvi.model.SCVI, got {type(model).__name__}")
    if not model.is_trained:
        raise RuntimeError(f"{argument} is not trained: call its train() first")
    if type(model.module) is not VAE and not (
        or_mixture and isinstance(model.module, ImportanceSampling)
    ):
        raise TypeError(
            f"{argument} must have scvi-tools' own module, scvi.module.VAE, got "
            f"{type(model).__name__} with {type(model.module).__name__}"
        )
    if not needs_data:
        return
    adata: AnnData | None = model.adata
    if adata is None:
        raise ValueError(f"{argument} holds no AnnData: load it with adata")
    if model.minified_data_type == WITHOUT_COUNTS:
        raise ValueError(
            f"{argument}'s data are minified without counts, which are needed: load it "
            "with the original data, or minify with 'latent_posterior_parameters_with_counts'"
        )
