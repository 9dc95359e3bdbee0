"""Minified data: latent posteriors in place of counts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from anndata import AnnData
from scipy import sparse
from scvi import REGISTRY_KEYS

from mixscvi.model.gathering import gather
from mixscvi.model.rows import is_on_disk
from mixscvi.warning import warn_user

if TYPE_CHECKING:
    from scvi.data import AnnDataManager

__all__ = ["WITHOUT_COUNTS", "MinifiedMixin", "counts_are_gone"]

_STORED_LOC, _STORED_VAR = "_mixscvi_component_loc", "_mixscvi_component_var"
# Where scvi-tools looks for the posteriors of data that come without counts.
_LATENT_KEYS = ("_scvi_latent_qzm", "_scvi_latent_qzv")
WITHOUT_COUNTS = "latent_posterior_parameters"
# Where it notes which data they are.
_SCVI_UUID_KEY = "_scvi_uuid"


class MinifiedMixin:
    """Methods of :class:`mixscvi.MixSCVI` that minify data, in place of scvi-tools' own."""

    def minify_adata(
        self,
        minified_data_type: str = WITHOUT_COUNTS,
        use_latent_qzm_key: str = "X_latent_qzm",
        use_latent_qzv_key: str = "X_latent_qzv",
    ) -> None:
        """Replace the counts by the posterior's parameters; see ``SCVI.minify_adata``.

        A mixture is not its mean and variance, so the parameters of all components are computed
        here and stored, `2 * A * D` numbers a cell. The two keys are read if there are such with
        one component, and of data whose counts are gone already. Those hold all components,
        `(n, A * D)` each, or the mean and variance of each cell, `(n, D)`: then its posterior is
        taken to be one Gaussian.

        Data that are minified already stay as they are, library sizes included.

        The minified data are in memory. Counts on disk stay in their file, which the model no
        longer reads.

        Parameters
        ----------
        minified_data_type
            As in ``SCVI.minify_adata``.
        use_latent_qzm_key, use_latent_qzv_key
            Columns of ``adata.obsm`` with means and variances: `(n, A * D)` or `(n, D)`.

        Raises
        ------
        ValueError
            If the model holds no data; or if counts are to be kept with the data that are on disk,
            or gone, or if they are a collection's.

        Warns
        -----
        UserWarning
            If the counts are gone, and with them what is needed for expression at its scale.

        Examples
        --------
        >>> import mixscvi, scvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> before = model.get_latent_mixture()
        >>> scvi.settings.verbosity = 30  # warnings, and not what is registered
        >>> model.minify_adata()
        >>> scvi.settings.verbosity = 20
        >>> error = abs(model.get_latent_mixture().loc - before.loc).max()
        >>> model.adata.X.nnz, bool(error < 1e-5)
        (0, True)
        """
        if self.adata is None:
            raise ValueError(
                "minify_adata() needs data, and the model holds none: load it with some"
            )
        if is_on_disk(self.adata_manager):
            with self._annotation_in_memory(minified_data_type):
                self.minify_adata(minified_data_type, use_latent_qzm_key, use_latent_qzv_key)
            return
        minified = self.minified_data_type == WITHOUT_COUNTS
        if minified and minified_data_type != WITHOUT_COUNTS:
            raise ValueError(
                f"minified_data_type={minified_data_type!r} keeps the counts, which minification "
                f"has taken away already: choose {WITHOUT_COUNTS!r}, which changes nothing"
            )
        gone = counts_are_gone(self.adata_manager)
        library = self.adata.obs.get(self._OBSERVED_LIB_SIZE_KEY)
        self._minify(minified_data_type, use_latent_qzm_key, use_latent_qzv_key, gone=gone)
        if (gone or minified) and library is not None:  # scvi-tools sums counts that are zero
            self.adata.obs[self._OBSERVED_LIB_SIZE_KEY] = library

    def _minify(
        self,
        minified_data_type: str,
        use_latent_qzm_key: str,
        use_latent_qzv_key: str,
        *,
        gone: bool,
    ) -> None:
        stored = use_latent_qzm_key in self.adata.obsm and use_latent_qzv_key in self.adata.obsm
        if gone and not stored:
            use_latent_qzm_key, use_latent_qzv_key = _LATENT_KEYS
        if gone or (stored and self.module.mixture.is_scvi):
            if gone:
                self._warn_of_what_is_gone(use_latent_qzm_key)
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

    @contextmanager
    def _annotation_in_memory(self, minified_data_type: str) -> Iterator[None]:
        """Have data on disk replaced by their annotation and latents, for them to be minified."""
        on_disk, manager = self.adata, self.adata_manager
        if minified_data_type != WITHOUT_COUNTS:
            raise ValueError(
                f"minified_data_type={minified_data_type!r} copies the counts, which are on disk: "
                f"choose {WITHOUT_COUNTS!r}"
            )
        if not hasattr(on_disk, "X"):
            raise ValueError(
                "minify_adata() needs an AnnData, but the model's data are a collection: keep what "
                "get_latent_mixture() returns"
            )
        (library,) = gather(
            (tensors[REGISTRY_KEYS.X_KEY].sum(1),) for tensors in self._make_data_loader(on_disk)
        )
        loc, scale = self.get_latent_mixture()
        empty = sparse.csr_matrix(on_disk.shape, dtype=np.float32)
        annotation = AnnData(
            empty,
            obs=on_disk.obs.copy(),
            var=on_disk.var.copy(),
            uns={key: value for key, value in on_disk.uns.items() if key != _SCVI_UUID_KEY},
            obsm={
                **on_disk.obsm,
                _LATENT_KEYS[0]: loc.reshape(len(loc), -1),
                _LATENT_KEYS[1]: np.square(scale).reshape(len(loc), -1),
            },
            layers=dict.fromkeys(on_disk.layers, empty),
        )
        annotation.obs[self._OBSERVED_LIB_SIZE_KEY] = library
        self._register_manager_for_instance(manager.transfer_fields(annotation))
        self._adata = annotation
        self._adata_manager = self.get_anndata_manager(annotation, required=True)
        try:
            yield
        except BaseException:
            self._adata, self._adata_manager = on_disk, manager
            raise
        for key in _LATENT_KEYS:
            del self.adata.obsm[key]

    def _warn_of_what_is_gone(self, latent_key: str) -> None:
        """Say what data without counts lack."""
        width, n_latent = self.adata.obsm[latent_key].shape[1], self.module.n_latent
        n_components = self.module.n_components
        if width not in (n_latent, n_components * n_latent):
            raise ValueError(
                f"adata.obsm[{latent_key!r}] must have n_latent={n_latent} columns, or "
                f"n_components * n_latent={n_components * n_latent}, got {width}"
            )
        if width < n_components * n_latent:
            warn_user(
                f"adata has no counts, and adata.obsm[{latent_key!r}] has one mean a cell: its "
                f"posterior is taken to be one Gaussian, not {n_components}"
            )
        if self._OBSERVED_LIB_SIZE_KEY not in self.adata.obs:
            warn_user(
                f"adata has no counts, and no library sizes in obs"
                f"[{self._OBSERVED_LIB_SIZE_KEY!r}]: expression at the scale of counts is zero"
            )


def counts_are_gone(manager: AnnDataManager) -> bool:
    """Whether data hold latent posteriors in place of their counts, and are not minified yet."""
    obsm = manager.adata.obsm
    if obsm is None or not all(key in obsm for key in _LATENT_KEYS):  # collections may have none
        return False
    if REGISTRY_KEYS.MINIFY_TYPE_KEY in manager.data_registry:
        return False
    x = manager.get_from_registry(REGISTRY_KEYS.X_KEY)
    return sparse.issparse(x) and x.nnz == 0
