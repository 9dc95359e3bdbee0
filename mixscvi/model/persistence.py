"""Saving, minification and query mapping."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import torch

from mixscvi.mixture import VampPrior

if TYPE_CHECKING:
    from anndata import AnnData
    from lightning import LightningDataModule
    from scvi.model import SCVI

__all__ = ["PersistenceMixin"]

_STORED_LOC, _STORED_VAR = "_mixscvi_component_loc", "_mixscvi_component_var"


class PersistenceMixin:
    """Methods of :class:`mixscvi.MixSCVI` that extend scvi-tools' of the same name."""

    @classmethod
    def load_query_data(
        cls,
        adata: AnnData | None = None,
        reference_model: str | SCVI | None = None,
        registry: dict | None = None,
        inplace_subset_query_vars: bool = False,
        accelerator: str = "auto",
        device: int | str = "auto",
        unfrozen: bool = False,
        freeze_dropout: bool = False,
        freeze_expression: bool = True,
        **kwargs,
    ) -> Self:
        """Map query cells onto a trained reference (scArches); see ``SCVI.load_query_data``.

        What scArches trains of scVI's encoder it trains of every component's: the weights of the
        covariates, and those of expression with ``freeze_expression=False``.
        """
        model = super().load_query_data(
            adata=adata,
            reference_model=reference_model,
            registry=registry,
            inplace_subset_query_vars=inplace_subset_query_vars,
            accelerator=accelerator,
            device=device,
            unfrozen=unfrozen,
            freeze_dropout=freeze_dropout,
            freeze_expression=freeze_expression,
            **kwargs,
        )
        prior = model.module.prior
        if isinstance(prior, VampPrior) and len(prior.pseudo_inputs.cat_logits):
            # The pseudo-cells are the reference's: none of them is of a batch that is new.
            prior.pseudo_inputs.hide_categories(_n_categories(reference_model))
        if not unfrozen:
            model.module.train_covariates_only(freeze_expression=freeze_expression)
        return model

    def minify_adata(
        self,
        minified_data_type: str = "latent_posterior_parameters",
        use_latent_qzm_key: str = "X_latent_qzm",
        use_latent_qzv_key: str = "X_latent_qzv",
    ) -> None:
        """Replace the counts by the posterior's parameters; see ``SCVI.minify_adata``.

        A mixture is not its mean and variance, so the parameters of all components are computed
        here and stored, `2 * A * D` numbers a cell; the two keys are read with one component
        alone.
        """
        if self.module.mixture.is_scvi:
            super().minify_adata(minified_data_type, use_latent_qzm_key, use_latent_qzv_key)
            return
        loc, scale = self.get_latent_mixture()
        original = self.adata
        original.obsm[_STORED_LOC] = loc.reshape(len(loc), -1)
        original.obsm[_STORED_VAR] = np.square(scale).reshape(len(loc), -1)
        try:
            super().minify_adata(minified_data_type, _STORED_LOC, _STORED_VAR)
        finally:
            for holder in (original, self.adata):
                holder.obsm.pop(_STORED_LOC, None)
                holder.obsm.pop(_STORED_VAR, None)

    def save(
        self,
        dir_path: str | os.PathLike,
        prefix: str | None = None,
        overwrite: bool = False,
        save_anndata: bool = False,
        save_kwargs: dict | None = None,
        legacy_mudata_format: bool = False,
        datamodule: LightningDataModule | None = None,
        **anndata_write_kwargs,
    ) -> None:
        """Save the model; see ``SCVI.save``.

        The folder is written beside `dir_path` and replaces it when complete, so an interrupt
        leaves what was there. Other files in an overwritten folder are kept.

        Raises
        ------
        ValueError
            If `dir_path` exists and `overwrite` is false, or is a file.
        """
        target = Path(dir_path)
        if target.exists() and not overwrite:
            raise ValueError(
                f"dir_path {str(target)!r} already exists: choose another, or overwrite=True"
            )
        if target.exists() and not target.is_dir():
            raise ValueError(f"dir_path {str(target)!r} is a file: choose a folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        complete, replaced = staging / "complete", staging / "replaced"
        try:
            super().save(
                str(complete),
                prefix=prefix,
                save_anndata=save_anndata,
                save_kwargs=save_kwargs,
                legacy_mudata_format=legacy_mudata_format,
                datamodule=datamodule,
                **anndata_write_kwargs,
            )
            if target.exists():
                _carry_over(target, complete)
                target.rename(replaced)
            complete.rename(target)
        finally:
            if replaced.exists() and not target.exists():
                replaced.rename(target)
            shutil.rmtree(staging)


def _carry_over(old: Path, new: Path) -> None:
    """Keep all other files of the old folder in the new one, linked where possible."""

    def link(source: str, destination: str) -> None:
        if Path(destination).exists():
            return
        try:
            os.link(source, destination)
        except OSError:
            shutil.copy2(source, destination)

    shutil.copytree(old, new, copy_function=link, dirs_exist_ok=True)


def _n_categories(reference_model: str | SCVI) -> list[int]:
    """Categories that the pseudo-cells of a reference know, covariate by covariate."""
    if isinstance(reference_model, str):
        stored = torch.load(
            Path(reference_model) / "model.pt", map_location="cpu", weights_only=False
        )
        state = stored["model_state_dict"]
    else:
        state = reference_model.module.state_dict()
    return [value.shape[-1] for name, value in state.items() if ".cat_logits." in name]
