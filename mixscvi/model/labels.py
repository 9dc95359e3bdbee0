"""The data of a semi-supervised model: checked, split into minibatches, and trained on."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS, settings
from scvi.dataloaders import AnnDataLoader, SemiSupervisedDataLoader, SemiSupervisedDataSplitter
from scvi.module import Classifier
from scvi.nn import FCLayers
from scvi.train import SemiSupervisedTrainingPlan
from torch import Tensor
from torch.utils.data import DataLoader

from mixscvi.checks import check_boolean, check_mapping, check_number, check_positive_int
from mixscvi.model.distributed import SplitAlike, of_first_rank
from mixscvi.model.inputs import check_keywords
from mixscvi.model.training import WithoutSingleCellSteps
from mixscvi.warning import warn_user

if TYPE_CHECKING:
    from anndata import AnnData
    from lightning import LightningDataModule

__all__ = [
    "LabeledSplitter",
    "LabeledTrainingPlan",
    "LabeledWithoutSingleCells",
    "check_classifier",
    "check_label_prior",
    "check_labels",
    "check_module_labels",
    "known_labels",
]

# Arguments of scvi-tools' classifier that are those of the model's networks.
_OF_CLASSIFIER = (
    "n_input", "n_in", "n_out", "n_labels", "n_cat_list", "n_cont", "use_batch_norm",
    "use_layer_norm",
)  # fmt: skip
_NEAR_1 = 1e-4


def check_labels(
    adata: AnnData,
    labels_key: Any,
    unlabeled_category: Any,
    source_registry: Mapping[str, Any] | None,
) -> None:
    """Raise if a semi-supervised model cannot learn from labels, or does not know them.

    Categories without cells become labels, as in scvi-tools: a warning names them.

    Parameters
    ----------
    adata, labels_key, unlabeled_category
        As in :meth:`mixscvi.MixSCANVI.setup_anndata`.
    source_registry
        Of the model that the data are for, if there is one.

    Raises
    ------
    TypeError
        If a key is missing, or some labels are texts and others are not.
    ValueError
        If there are fewer than two labels, some that the model was not trained on, or the
        category of cells without a label would be coded as one.
    """
    if labels_key is None:
        raise TypeError("labels_key must name a column of adata.obs with labels, got None")
    if not isinstance(unlabeled_category, Hashable) or pd.isna(unlabeled_category):
        raise TypeError(
            "unlabeled_category must be the value of adata.obs[labels_key] in cells without a "
            f"label, such as 'Unknown', got {unlabeled_category!r}"
        )
    if not isinstance(adata.obs, pd.DataFrame) or labels_key not in adata.obs:
        return
    found = [y for y in adata.obs[labels_key].unique().tolist() if y != unlabeled_category]
    source = f"adata.obs[{labels_key!r}]"
    if source_registry is not None:
        state = source_registry["field_registries"][REGISTRY_KEYS.LABELS_KEY]["state_registry"]
        known = np.asarray(state["categorical_mapping"]).tolist()
        unknown = [y for y in found if y not in known]
        if unknown:
            raise ValueError(
                f"{source} has labels that the model was not trained on, {unknown}: replace them "
                f"by unlabeled_category={unlabeled_category!r}"
            )
    elif len(found) < 2:
        raise ValueError(
            f"{source} must have at least two labels beside unlabeled_category="
            f"{unlabeled_category!r}, got {found}"
        )
    else:
        _check_codes(adata.obs[labels_key], source, found, unlabeled_category)


def _check_codes(labels: pd.Series, source: str, found: list[Any], unlabeled_category: Any) -> None:
    """Raise if scvi-tools would code labels wrongly; warn if some have no cells."""
    if isinstance(unlabeled_category, str) != all(isinstance(y, str) for y in found):
        raise TypeError(
            f"unlabeled_category must be of the type of the labels in {source}, such as "
            f"{found[0]!r}, got {unlabeled_category!r}: convert them, as with .astype(str)"
        )
    if not isinstance(labels.dtype, pd.CategoricalDtype):
        return
    levels = labels.cat.categories.tolist()
    has_cells = {*found, *labels.unique()}
    remedy = f"remove what has none, {source} = {source}.cat.remove_unused_categories()"
    if unlabeled_category in levels[:-1] and unlabeled_category not in has_cells:
        # The code behind all labels says that there is none, and another would have it.
        raise ValueError(
            f"unlabeled_category={unlabeled_category!r} must be the last category of {source}, or "
            f"have cells: {remedy}"
        )
    empty = [y for y in levels if y not in has_cells and y != unlabeled_category]
    if empty:
        warn_user(
            f"{source} has categories without cells, {empty}. They become labels that predict may "
            f"name: {remedy}"
        )


def check_label_prior(y_prior: Any, n_labels: int) -> None:
    """Raise if the prior of the labels is none.

    Parameters
    ----------
    y_prior
        Probabilities of the labels, `(1, C)` or `(C,)`, or ``None``.
    n_labels
        How many there are, `C`.

    Raises
    ------
    TypeError, ValueError
        Saying what it must be.
    """
    if y_prior is None:
        return
    expected = f"y_prior must be a tensor of the probabilities of the {n_labels} labels, above 0"
    if not isinstance(y_prior, Tensor) or not y_prior.is_floating_point():
        raise TypeError(f"{expected}, got {y_prior!r:.60}")
    if y_prior.shape not in ((n_labels,), (1, n_labels)):
        raise ValueError(f"{expected}, got one of shape {tuple(y_prior.shape)}")
    if not ((y_prior > 0).all() and abs(float(y_prior.sum()) - 1) < _NEAR_1):
        raise ValueError(f"{expected}, that sum to 1, got {y_prior.flatten().tolist()!r:.60}")


def check_classifier(parameters: Any) -> None:
    """Raise if keywords of scvi-tools' classifier are none.

    Raises
    ------
    TypeError, ValueError
        Naming the first that is none.
    """
    if parameters is None:
        return
    check_mapping("classifier_parameters", parameters)
    taken = [name for name in parameters if name in _OF_CLASSIFIER]
    if taken:
        raise TypeError(
            f"classifier_parameters must not have {taken[0]!r}, which is that of the model, got "
            f"{parameters[taken[0]]!r:.60}"
        )
    check_keywords(parameters, (Classifier, FCLayers), argument="classifier_parameters")
    for name, value in parameters.items():
        shown = f"{name} of classifier_parameters"
        if name in ("n_hidden", "n_layers"):
            check_positive_int(shown, value, least=0)
        elif name == "dropout_rate":
            check_number(shown, value, least=0, most=1)
        elif name == "activation_fn":
            if not (value is None or callable(value)):
                raise TypeError(f"{shown} must be a class of torch's modules, got {value!r:.60}")
        elif name in ("logits", "bias", "use_activation", "inject_covariates"):
            check_boolean(shown, value)


def check_module_labels(
    registry: Mapping[str, Any],
    datamodule: LightningDataModule | None,
    unlabeled_category: Any = None,
    labels_key: str | None = None,
) -> None:
    """Raise if a semi-supervised model cannot be made of the registry of a data module.

    Parameters
    ----------
    registry, datamodule
        As in :class:`mixscvi.MixSCANVI`.
    unlabeled_category, labels_key
        Which they must be, if given.

    Raises
    ------
    ValueError
        Naming what is missing, or is not as it must be.
    """
    fields = registry.get("field_registries", {})
    for field in (REGISTRY_KEYS.LABELS_KEY, REGISTRY_KEYS.CAT_COVS_KEY):
        if "state_registry" not in fields.get(field, {}):
            raise ValueError(
                f"registry['field_registries'][{field!r}] must have a 'state_registry', as those "
                "of scvi-tools' data modules do"
            )
    state = fields[REGISTRY_KEYS.LABELS_KEY]["state_registry"]
    missing = [
        name
        for name in ("categorical_mapping", "original_key", "unlabeled_category")
        if state.get(name) is None
    ]
    if missing:
        raise ValueError(
            f"the labels of registry have no {', '.join(missing)}: give the data module the key of "
            "the labels, and the category of cells without"
        )
    found = state["unlabeled_category"]
    for name, given, there in (
        ("unlabeled_category", unlabeled_category, found),
        ("labels_key", labels_key, state["original_key"]),
    ):
        if given is not None and given != there:
            raise ValueError(f"{name} must be that of registry, {there!r}, got {given!r}")
    mapping = np.asarray(state["categorical_mapping"]).tolist()
    if len(known_labels(mapping, found)) < 2:
        raise ValueError(
            f"registry must have at least two labels beside {found!r} of cells without, got "
            f"{mapping}"
        )
    # Codes of labels are those of the classifier, and the code behind them says that there is none.
    if found in mapping[:-1]:
        raise ValueError(
            f"the labels of registry must end with {found!r}, of cells without, got {mapping}: the "
            "data module sorts them, so rename it there, to '~' or the like"
        )
    if datamodule is not None and getattr(datamodule, "labels_", None) is None:
        raise ValueError(
            f"datamodule must have the labels of its cells as labels_, and this "
            f"{type(datamodule).__name__} has none: make it with the key of the labels"
        )


def known_labels(mapping: np.ndarray, unlabeled_category: Any) -> list[Any]:
    """The labels of a registry, in the order of their codes, without that of unlabeled cells."""
    return [y for y in np.asarray(mapping).tolist() if y != unlabeled_category]


class LabeledLoader(SemiSupervisedDataLoader):
    """scvi-tools' loader of all cells and of those with labels, for several ranks as well.

    scvi-tools' own would end an epoch with the cells that have labels, shuffle alike in every
    epoch, and not share the cells with labels among the ranks after the first of them.
    """

    def __init__(self, *args: Any, distributed_sampler: bool = False, **kwargs: Any) -> None:
        self._shared = distributed_sampler
        super().__init__(*args, distributed_sampler=distributed_sampler, **kwargs)

    def subsample_labels(self) -> np.ndarray:
        """Choose cells with labels, the same ones on all ranks."""
        chosen = super().subsample_labels()
        return of_first_rank(chosen) if self._shared else chosen

    def resample_labels(self) -> None:
        """Choose other cells with labels."""
        if not self._shared:
            super().resample_labels()
            return
        self.dataloaders[1] = AnnDataLoader(
            self.adata_manager,
            indices=self.subsample_labels(),
            shuffle=self._shuffle,
            batch_size=self._batch_size,
            data_and_attributes=self.data_and_attributes,
            drop_last=self._drop_last,
            distributed_sampler=True,
            **self.data_loader_kwargs,
        )

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Go through all cells once, and through those with labels for as long."""
        if not self._shared:
            return super().__iter__()
        if self._shuffle:
            seed = of_first_rank(int(torch.randint(2**31, ())))
            for part in self.dataloaders:
                part.sampler.seed = seed
        cells, labeled = self.dataloaders
        return zip(cells, itertools.cycle(labeled), strict=False)


class LabeledSplitter(SplitAlike, SemiSupervisedDataSplitter):
    """scvi-tools' splitter; several ranks split the cells alike."""

    def setup(self, stage: str | None = None) -> None:
        """Split the cells into training, validation and test."""
        super().setup(stage)
        if self.data_loader_class is SemiSupervisedDataLoader:
            self.data_loader_class = LabeledLoader


class LabeledWithoutSingleCells(LabeledSplitter):
    """A splitter without training minibatches of one cell.

    Batch normalization has no variance to divide by in such a minibatch, and training would stop.
    All cells, or those with labels, may leave a last minibatch of one: then all minibatches are
    made larger by a cell, or by as many as it takes.

    Raises
    ------
    ValueError
        If a single training cell has a label, or fewer than two for each rank.
    """

    def train_dataloader(self) -> DataLoader:
        """Minibatches of the training cells: all, and those with labels."""
        loader = super().train_dataloader()
        # The sampler gives each rank as many.
        counts = [
            math.ceil(len(part.indices) / self._n_ranks)
            for part in getattr(loader, "dataloaders", [loader])
        ]
        if counts[-1] == 1 and len(counts) > 1:
            found, ranks = len(loader.dataloaders[-1].indices), self._n_ranks
            what = "training cell has a label" if found == 1 else "training cells have labels"
            each = f", each of {ranks} processes" if ranks > 1 else ""
            raise ValueError(
                f"{found} {what}, and batch normalization needs two{each}: label more cells, give "
                "train_size=1.0, or use_batch_norm='none'"
            )
        if self.drop_last:
            return loader
        given = self.data_loader_kwargs.get("batch_size") or settings.batch_size
        batch_size = given
        while batch_size > 1 and any(n % batch_size == 1 for n in counts):
            batch_size += 1
        if batch_size == given:
            return loader
        self.data_loader_kwargs["batch_size"] = batch_size
        try:
            return super().train_dataloader()
        finally:  # a splitter may be set up again, for other cells
            self.data_loader_kwargs["batch_size"] = given


class LabeledTrainingPlan(WithoutSingleCellSteps, SemiSupervisedTrainingPlan):
    """scvi-tools' plan, which learns the labels of minibatches from any data module.

    scvi-tools passes the labels of such a minibatch on if the names of its tensors stand in one
    order, and has no other way to tell. The module takes the cells that have labels.
    """

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Loss of a minibatch."""
        return super().training_step(_and_labeled(batch), batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Metrics of a minibatch."""
        super().validation_step(_and_labeled(batch), batch_idx)


def _and_labeled(batch: Any) -> Any:
    """Minibatches of all cells and of those with labels, of which the first may be both."""
    return (batch, batch) if isinstance(batch, Mapping) else batch
