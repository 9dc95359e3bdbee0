"""A trained model of the counts, as the start of a semi-supervised one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self, cast

from scvi import REGISTRY_KEYS
from scvi.model import SCVI

from mixscvi.checks import check_anndata, check_genes
from mixscvi.model.base import check_made_of
from mixscvi.model.conversion import arguments_of, check_convertible
from mixscvi.model.labels import check_module_labels
from mixscvi.model.mixscvi import MixSCVI
from mixscvi.model.training_arguments import check_data_module
from mixscvi.warning import warn_user

if TYPE_CHECKING:
    from anndata import AnnData
    from lightning import LightningDataModule

__all__ = ["PretrainedMixin"]

# Of scANVI's module, below z: what a pretrained model does not have.
_NEW = ("classifier.", "encoder_z2_z1.", "decoder_z1_z2.", "y_prior")


class PretrainedMixin:
    """What makes :class:`mixscvi.MixSCANVI` out of trained models."""

    @classmethod
    def from_scvi_model(
        cls,
        scvi_model: MixSCVI | SCVI,
        unlabeled_category: str,
        labels_key: str | None = None,
        adata: AnnData | None = None,
        registry: dict[str, Any] | None = None,
        *,
        datamodule: LightningDataModule | None = None,
        **kwargs: Any,
    ) -> Self:
        """Start from a trained :class:`mixscvi.MixSCVI`, or :class:`scvi.model.SCVI`.

        Posterior and decoder start as trained; labels, classifier and what stands below z start
        anew. The parameters are copied, and `scvi_model` can be used as before.

        Parameters
        ----------
        scvi_model
            A trained model with a standard normal prior, which the labels replace.
        unlabeled_category
            Value of the labels in cells without one.
        labels_key
            Column of ``obs`` with the labels; by default that which `scvi_model` was set up with.
        adata
            Cells to use, with the same genes, batches and covariates; by default those of
            `scvi_model`.
        registry, datamodule
            Registry of a data module and the module, instead of `adata`: that which `scvi_model`
            was trained on, or another of the same genes, batches and covariates.
        **kwargs
            Further arguments of the model, such as `linear_classifier`.

        Returns
        -------
        The model, to be trained.

        Raises
        ------
        TypeError
            If `scvi_model` is of another class, or there is no key of labels.
        RuntimeError
            If `scvi_model` is not trained.
        ValueError
            If it has another prior, holds no data with counts, or genes, batches or covariates of
            `adata` are not those that it was trained on; or if the labels of a data module are
            not those that a model can be trained on.

        Warns
        -----
        UserWarning
            If an argument is that of `scvi_model` already, which stays.

        Examples
        --------
        >>> import mixscvi, scvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> labels = adata.obs["cell_type"].astype(str)
        >>> adata.obs["label"] = labels.where([i % 2 == 0 for i in range(700)], "Unknown")
        >>> mixscvi.MixSCVI.setup_anndata(adata, labels_key="label")
        >>> pretrained = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
        >>> pretrained.train(max_epochs=1, enable_progress_bar=False)
        >>> model = mixscvi.MixSCANVI.from_scvi_model(pretrained, unlabeled_category="Unknown")
        >>> model.module.n_components
        2
        """
        check_convertible(
            scvi_model,
            argument="scvi_model",
            or_mixture=True,
            needs_data=datamodule is None and registry is None,
        )
        arguments = arguments_of(scvi_model)
        if isinstance(scvi_model, MixSCVI):
            prior = arguments.pop("prior")
            arguments.pop("n_prior_components")
            if prior != "normal":
                raise ValueError(
                    f"scvi_model has prior={prior!r}, which the labels would replace: train it "
                    "with prior='normal'"
                )
        else:
            arguments["n_components"] = 1
        if arguments.get("latent_distribution") == "normal":
            del arguments["latent_distribution"]
        for name in [name for name in kwargs if name in arguments]:
            del kwargs[name]
            warn_user(f"{name} is that of scvi_model, {arguments[name]!r}, and stays")
        check_data_module(datamodule)
        if registry is not None:
            check_made_of(None, registry)
        if datamodule is not None or registry is not None:
            registry = cast(Any, datamodule).registry if registry is None else registry
            check_module_labels(registry, datamodule, unlabeled_category, labels_key)
            model = cls(None, registry, datamodule=datamodule, **arguments, **kwargs)
        else:
            adata = scvi_model.adata if adata is None else adata
            check_anndata(adata)
            check_genes(adata.var_names, scvi_model.get_var_names())
            setup = dict(scvi_model.registry["setup_args"])
            setup["labels_key"] = labels_key if labels_key is not None else setup["labels_key"]
            cls.setup_anndata(
                adata, unlabeled_category=unlabeled_category, use_minified=False, **setup
            )
            model = cls(adata, **arguments, **kwargs)
        _check_same_categories(model.registry, scvi_model.registry)
        model._load_pretrained(scvi_model)
        return model

    def _load_pretrained(self, scvi_model: SCVI) -> None:
        """Take the weights of a model of the same posterior and decoder."""
        missing, unexpected = self.module.load_state_dict(
            scvi_model.module.state_dict(), strict=False
        )
        foreign = [name for name in missing if not name.startswith(_NEW)] + unexpected
        if foreign:
            raise ValueError(f"scvi_model does not have the weights of this model, first {foreign}")
        self.to_device(scvi_model.device)
        self.was_pretrained = True


def _check_same_categories(registry: dict[str, Any], trained_on: dict[str, Any]) -> None:
    """Raise if batches or covariates have other codes than in the pretrained model."""
    for field, key in (
        (REGISTRY_KEYS.BATCH_KEY, "categorical_mapping"),
        (REGISTRY_KEYS.CAT_COVS_KEY, "mappings"),
    ):
        ours, theirs = (
            r["field_registries"].get(field, {}).get("state_registry", {}).get(key)
            for r in (registry, trained_on)
        )
        ours, theirs = (
            {name: list(values) for name, values in of.items()}
            if isinstance(of, dict)
            else list(of if of is not None else ())
            for of in (ours, theirs)
        )
        if ours != theirs:
            raise ValueError(
                f"adata has other categories of {field} than scvi_model was trained on, {ours} "
                f"and {theirs}: give cells of each of these, as all that it was trained on, or "
                "those of a reference and its query together"
            )
