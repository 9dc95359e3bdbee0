"""Labels of the cells, by the classifier of a trained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import Tensor

from mixscvi.checks import check_boolean, check_mapping
from mixscvi.model.gathering import gather

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["PredictionMixin"]


class PredictionMixin:
    """The method of :class:`mixscvi.MixSCANVI` that predicts labels.

    The model provides ``module``, ``adata``, ``_minibatches``, ``_names_of`` and
    ``_label_mapping``.
    """

    def predict(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        soft: bool = False,
        batch_size: int | None = None,
        use_posterior_mean: bool = True,
        ig_interpretability: bool = False,
        ig_args: dict[str, Any] | None = None,
        dataloader: Iterator[dict[str, Tensor]] | None = None,
    ) -> np.ndarray | pd.DataFrame | tuple[np.ndarray | pd.DataFrame, pd.DataFrame]:
        r"""Labels of the cells.

        Probabilities are those of the classifier, averaged over the components of a cell's
        posterior: :math:`\frac{1}{A} \sum_a q(y \mid z_a)`.

        Parameters
        ----------
        adata, indices, batch_size, dataloader
            As in :meth:`get_latent_mixture`.
        soft
            Whether to return the probabilities of all labels, or the most probable label.
        use_posterior_mean
            Whether :math:`z_a` is the mean of component `a` (ahead of the flow, if there is one,
            and then sent through it), or a draw from it, which makes predictions random.
        ig_interpretability, ig_args
            Whether to attribute predictions to genes by integrated gradients, and how; as in
            :meth:`scvi.model.SCANVI.predict`. It needs the package captum.

        Returns
        -------
        Labels `(n,)`; or a table `(n, C)` of probabilities by cell (by number with a `dataloader`)
        and label. With attributions, the pair of it and a table of genes.

        Raises
        ------
        RuntimeError
            If the model is not trained.
        TypeError
            If a flag is not True or False, or `ig_args` no dictionary.
        ValueError
            If the genes are not those trained on, or the counts are bad.

        Examples
        --------
        >>> import mixscvi, scvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> labels = adata.obs["cell_type"].astype(str)
        >>> adata.obs["label"] = labels.where([i % 2 == 0 for i in range(700)], "Unknown")
        >>> mixscvi.MixSCANVI.setup_anndata(adata, "label", unlabeled_category="Unknown")
        >>> model = mixscvi.MixSCANVI(adata, n_components=2, n_hidden=16)
        >>> scvi.settings.verbosity = 30  # warnings, and not that it trains
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> scvi.settings.verbosity = 20
        >>> model.predict(indices=[0, 1, 2]).shape
        (3,)
        >>> model.predict(soft=True).shape  # a column for each label but the unlabeled category
        (700, 10)
        """
        flags = {
            "soft": soft,
            "use_posterior_mean": use_posterior_mean,
            "ig_interpretability": ig_interpretability,
        }
        for name, value in flags.items():
            check_boolean(name, value)
        check_mapping("ig_args", ig_args or {})
        if ig_interpretability:
            self._check_if_trained(warn=False)
            return super().predict(
                adata,
                indices,
                soft,
                batch_size,
                use_posterior_mean,
                ig_interpretability,
                ig_args,
                dataloader,
            )
        minibatches = self._minibatches(adata, indices, batch_size, dataloader, None)
        (table,) = gather((self._probabilities(part, use_posterior_mean),) for part in minibatches)
        labels = np.asarray(self._label_mapping)[: table.shape[1]]
        if not soft:
            return np.array(labels[table.argmax(1)].tolist())
        names = None
        if dataloader is None:
            names = self._names_of(adata, indices)
        return pd.DataFrame(table, columns=labels, index=names)

    def _probabilities(self, tensors: dict[str, Tensor], use_posterior_mean: bool) -> Tensor:
        scores = self.module.classify(
            **self.module._get_inference_input(tensors), use_posterior_mean=use_posterior_mean
        )
        return scores.softmax(-1) if self.module.classifier.logits else scores
