"""Saving and loading, without running what a file holds."""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import anndata
import numpy as np
import rich.pretty  # noqa: F401  # scvi-tools prints with it, and does not import it
from anndata._io.specs.registry import IORegistryError
from scvi import REGISTRY_KEYS
from scvi.data import AnnDataManager

from mixscvi.checkpoint_file import NOT_MADE, brief
from mixscvi.checks import check_anndata, check_boolean, check_mapping, check_path, check_text
from mixscvi.model.accelerators import check_device
from mixscvi.model.files import (
    StoredModel,
    data_file,
    put_in_place,
    read_model,
    staged,
    write_model,
)
from mixscvi.model.given import check_batches_of_adata, is_of_a_data_module, registry_of
from mixscvi.model.legacy import read_legacy
from mixscvi.model.surgery import freeze, n_columns
from mixscvi.model.training_arguments import check_data_module
from mixscvi.model.weights import warn_of_weights
from mixscvi.system import check_folder, naming_what_is_written, write_beside
from mixscvi.warning import warn_user

if TYPE_CHECKING:
    from anndata import AnnData
    from lightning import LightningDataModule

__all__ = ["PersistenceMixin", "check_class", "naming_the_file", "read_for"]


class PersistenceMixin:
    """Methods of :class:`mixscvi.MixSCVI` that read and write models."""

    _by_scvi_tools: ClassVar[str] = "SCVI"
    """Name of scvi-tools' model that this one is with one component."""

    surgery_: dict[str, Any] | None = None
    """What of the model does not train, if :meth:`load_query_data` made it."""

    def save(
        self,
        dir_path: str | os.PathLike[str],
        prefix: str | None = None,
        overwrite: bool = False,
        save_anndata: bool = False,
        save_kwargs: dict[str, Any] | None = None,
        legacy_mudata_format: bool = False,
        datamodule: LightningDataModule | None = None,
        **anndata_write_kwargs: Any,
    ) -> None:
        """Save the model; see ``SCVI.save``.

        The file holds tensors, numbers and texts alone, and :meth:`load` runs nothing of it. At
        any moment the folder has one whole model, the old or the new one; what a process leaves
        that is killed while saving, the next one clears. Other files in the folder are kept.

        Parameters
        ----------
        dir_path
            Folder for the model.
        prefix
            What the names of its files start with.
        overwrite
            Whether an existing folder may be written to.
        save_anndata
            Whether to save the data as well.
        save_kwargs
            Passed to :func:`torch.save`.
        legacy_mudata_format, datamodule
            As in ``SCVI.save``.
        **anndata_write_kwargs
            Passed to :meth:`anndata.AnnData.write_h5ad`.

        Raises
        ------
        ValueError
            If `dir_path` exists and `overwrite` is false, or is a file; or if `save_anndata` is
            true and the model holds no data.
        TypeError
            If an argument is of another type, or an attribute of the model whose name ends in
            ``_`` is an object that a file without code cannot hold.
        OSError
            If it cannot be written, as where the disk is full.
        """
        if prefix is not None:
            check_text("prefix", prefix)
        for name, value in (("overwrite", overwrite), ("save_anndata", save_anndata)):
            check_boolean(name, value)
        check_mapping("save_kwargs", save_kwargs or {})
        target = _free_folder("dir_path", dir_path, overwrite=overwrite)
        if self.adata is None and not registry_of(self):
            self._check_if_trained(warn=False)
            raise ValueError(
                "save() writes the genes, batches and covariates that the model was made for, but "
                "it was made without data: make it with adata, or with registry of its data module"
            )
        if datamodule is None and self.adata is None and is_of_a_data_module(registry_of(self)):
            raise ValueError(
                "save() needs datamodule, the data module that the model was made of, got None"
            )
        if save_anndata and self.adata is None:
            raise ValueError("save_anndata=True saves the model's data, but it holds none")
        if save_anndata and not hasattr(self.adata, "X"):
            raise ValueError(
                "save_anndata=True saves an AnnData, but the model's data are a collection, whose "
                "files are left where they are"
            )
        with naming_what_is_written(target), staged(target) as staging:
            complete, by_scvi = staging / "complete", staging / "scvi"
            complete.mkdir()
            super().save(
                str(by_scvi),
                prefix=prefix,
                legacy_mudata_format=legacy_mudata_format,
                datamodule=datamodule,
            )
            write_model(
                by_scvi / f"{prefix or ''}model.pt",
                complete / f"{prefix or ''}model.pt",
                data_id=staging.name if save_anndata else None,
                **(save_kwargs or {}),
            )
            if save_anndata:
                # The method of AnnData would back data on disk by the new file, which is moved.
                anndata.io.write_h5ad(
                    complete / f"{prefix or ''}adata.h5ad", self.adata, **anndata_write_kwargs
                )
            put_in_place(staging, target, prefix)

    @classmethod
    def load(
        cls,
        dir_path: str | os.PathLike[str],
        adata: AnnData | Literal[False] | None = None,
        accelerator: str = "auto",
        device: int | str = "auto",
        prefix: str | None = None,
        backup_url: str | None = None,
        datamodule: LightningDataModule | None = None,
        allowed_classes_names_list: list[str] | None = None,
        *,
        allow_pickle: bool = False,
        arguments: dict[str, Any] | None = None,
    ) -> Self:
        """Load a saved model, without running anything that its file holds; see ``SCVI.load``.

        Parameters
        ----------
        dir_path
            Folder of the model.
        adata
            Data set up like those it was trained on; by default those saved with it, if any.
            ``False`` for none.
        accelerator, device, datamodule, allowed_classes_names_list
            As in ``SCVI.load``.
        prefix
            What the names of its files start with.
        backup_url
            Where the model's file is fetched from if there is none in the folder.
        allow_pickle
            Whether the file may hold Python objects, as those of scvi-tools and of early versions
            of mixscvi do. Reading them can run any code: say so only of a file whose maker you
            trust, and :meth:`save` the model anew. One saved by :class:`scvi.model.SCVI` becomes
            a MixSCVI of one component.
        arguments
            Arguments of the model that a file cannot hold: a
            :class:`~mixscvi.mixture.Prior` or activation of the user's own, by name.

        Returns
        -------
        The model.

        Raises
        ------
        TypeError
            If an argument is of another type.
        ValueError
            If there is no such device; if the file is of a model of another class, or missing,
            truncated, damaged or tampered with, or holds Python objects
            and `allow_pickle` is false, naming it; if it leaves out arguments and they are not
            given; or if the data do not fit the model.

        Examples
        --------
        >>> import tempfile, mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.save(folder, overwrite=True)
        ...     mixscvi.MixSCVI.load(folder, adata).module.n_components
        2
        """
        if adata is not None and adata is not False:
            check_anndata(adata)
        check_device(accelerator, device)
        check_data_module(datamodule)
        if backup_url is not None:
            check_path("dir_path", dir_path)
            check_text("backup_url", backup_url)
            _fetch(backup_url, Path(dir_path) / f"{prefix or ''}model.pt")
        stored = read_for(
            cls, dir_path, prefix=prefix, allow_pickle=allow_pickle, arguments=arguments
        )
        check_class(
            cls,
            stored.attributes["registry_"],
            allowed_classes_names_list or (),
            source=str(stored.path),
        )
        noting: AbstractContextManager[None] = nullcontext()
        if adata is None:
            path = data_file(stored, prefix)
            adata, noting = _read_data(path), _noting_the_data(path)
        alone = None
        if adata is not False or accelerator != "cpu":
            alone = partial(
                cls.load,
                dir_path,
                False,
                "cpu",
                prefix=prefix,
                allowed_classes_names_list=allowed_classes_names_list,
                allow_pickle=allow_pickle,
                arguments=arguments,
            )
        # A data module, which may be at fault as well, is not to be done without.
        naming = naming_the_file(stored.path, alone) if datamodule is None else nullcontext()
        with naming, noting, stored.as_written_by_scvi(prefix) as folder:
            model = super().load(
                folder,
                adata=adata,
                accelerator=accelerator,
                device=device,
                prefix=prefix,
                datamodule=datamodule,
                allowed_classes_names_list=allowed_classes_names_list,
            )
            # What was frozen when a query was mapped stays so when it trains again.
            if model.surgery_ is not None:
                freeze(model.module, model.surgery_, n_columns(model.registry), by_scvi=True)
        registry = stored.attributes["registry_"]
        if model.adata is not None and is_of_a_data_module(registry):
            check_batches_of_adata(model.adata_manager.registry, registry)
        warn_of_weights(model.module, str(stored.path), "fetch it again, or train it anew")
        return model

    @staticmethod
    def load_registry(
        dir_path: str | os.PathLike[str], prefix: str | None = None, *, allow_pickle: bool = False
    ) -> dict:
        """Registry of a saved model; see ``SCVI.load_registry``.

        Parameters
        ----------
        dir_path, prefix, allow_pickle
            As in :meth:`load`.

        Returns
        -------
        What ``setup_anndata`` recorded of the data.

        Raises
        ------
        ValueError
            As :meth:`load`.
        """
        return read_model(dir_path, prefix, allow_pickle=allow_pickle).attributes["registry_"]

    @classmethod
    def view_setup_args(
        cls,
        dir_path: str | os.PathLike[str],
        prefix: str | None = None,
        *,
        allow_pickle: bool = False,
    ) -> None:
        """Print the arguments that set up the data of a saved model.

        Parameters
        ----------
        dir_path, prefix, allow_pickle
            As in :meth:`load`.

        Raises
        ------
        ValueError
            As :meth:`load`.
        """
        registry = cls.load_registry(dir_path, prefix, allow_pickle=allow_pickle)
        AnnDataManager.view_setup_method_args(registry)

    @classmethod
    def convert_legacy_save(
        cls,
        dir_path: str | os.PathLike[str],
        output_dir_path: str | os.PathLike[str],
        overwrite: bool = False,
        prefix: str | None = None,
        *,
        allow_pickle: bool = False,
        **save_kwargs: Any,
    ) -> None:
        """Convert a model saved before scvi-tools 0.15; see ``SCVI.convert_legacy_save``.

        What is written is what :meth:`save` writes, in one step, once it is known to load.

        Parameters
        ----------
        dir_path, output_dir_path, overwrite, prefix, **save_kwargs
            As in ``SCVI.convert_legacy_save``.
        allow_pickle
            Must be ``True``: such models are Python objects, and reading them can run any code.

        Raises
        ------
        FileNotFoundError
            If a file of the model is missing.
        ValueError
            If `allow_pickle` is not true, `output_dir_path` exists and `overwrite` is false, or a
            file is truncated, damaged, or does not belong to the others.
        TypeError
            If an attribute of the model is an object that a file without code cannot hold.
        """
        target = _free_folder("output_dir_path", output_dir_path, overwrite=overwrite)
        legacy = read_legacy(dir_path, prefix, allow_pickle=allow_pickle)
        with staged(target) as staging:
            complete, by_scvi = staging / "complete", staging / "scvi"
            complete.mkdir()
            legacy.write(staging / "legacy")
            name = f"{prefix or ''}model.pt"
            with legacy.describing():
                super().convert_legacy_save(str(staging / "legacy"), str(by_scvi), prefix=prefix)
            write_model(
                by_scvi / name,
                complete / name,
                data_id=None,
                var_names=legacy.var_names,
                model_name=cls._by_scvi_tools,
                **save_kwargs,
            )
            with legacy.describing():
                if not read_model(complete, prefix).left_out:
                    cls.load(complete, False, "cpu", prefix=prefix)
            put_in_place(staging, target, prefix)


def _free_folder(name: str, path: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The absolute path of a folder that may be written to; `name` is of the argument."""
    check_path(name, path)
    folder = Path(os.path.abspath(path))
    check_folder(folder.parent, name)
    if folder.exists() and not overwrite:
        raise ValueError(f"{name} {str(path)!r} already exists: choose another, or overwrite=True")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{name} {str(path)!r} is a file: choose a folder")
    return folder


def read_for(
    cls: type[Any],
    folder: str | os.PathLike[str],
    *,
    prefix: str | None = None,
    allow_pickle: bool = False,
    arguments: dict[str, Any] | None = None,
) -> StoredModel:
    """Read a model to make one of `cls`: what scvi-tools' own saved has one component."""
    stored = read_model(folder, prefix, allow_pickle=allow_pickle)
    stored.give(arguments or {})
    registry, init = stored.attributes["registry_"], stored.attributes["init_params_"]
    given = init.get("non_kwargs", init)
    if registry.get("model_name") == cls._by_scvi_tools and "n_components" not in given:
        registry["model_name"] = cls.__name__
        given["n_components"] = 1
    if registry.get("setup_method_name", "setup_anndata") == "setup_anndata":
        _complete(registry, stored.var_names)
    return stored


def check_class(
    cls: type[Any], registry: Mapping[str, Any], allowed: Collection[str] = (), *, source: str
) -> None:
    """Raise if a model is of a class that cannot be made into another.

    Parameters
    ----------
    cls
        The other class.
    registry
        Of the model.
    allowed
        Names of classes that are taken for it.
    source
        What holds the model.

    Raises
    ------
    ValueError
        Naming both classes, and what makes one of the other, if something does.
    """
    name = registry.get("model_name", cls.__name__)
    if name == cls.__name__ or name in allowed:
        return
    how = ""
    if name == "SCVI" or (name == "MixSCVI" and cls._by_scvi_tools == "SCANVI"):
        how = f": make one of it with {cls.__name__}.from_scvi_model"
    raise ValueError(f"{source} is of another class, {name}, and not a {cls.__name__}{how}")


def _complete(registry: dict[str, Any], var_names: Any) -> None:
    """Add what earlier versions of scvi-tools did not note of data, and later ones look for."""
    registry["setup_args"].setdefault(f"{REGISTRY_KEYS.SIZE_FACTOR_KEY}_key", None)
    fields = registry["field_registries"]
    for name in (REGISTRY_KEYS.CAT_COVS_KEY, REGISTRY_KEYS.CONT_COVS_KEY):
        empty = {"data_registry": {}, "state_registry": {}, "summary_stats": {f"n_{name}": 0}}
        fields.setdefault(name, empty)
    if REGISTRY_KEYS.X_KEY in fields and var_names is not None:
        of_genes = fields[REGISTRY_KEYS.X_KEY]["state_registry"]
        of_genes.setdefault("column_names", np.asarray(var_names))


@contextmanager
def naming_the_file(path: Path, load_alone: Callable[[], object] | None = None) -> Iterator[None]:
    """Name the file of a model that cannot be made.

    Parameters
    ----------
    path
        The file.
    load_alone
        Loads the model without what else may be at fault, as data are. It raises if the file is.
        ``None``: nothing else may.
    """
    try:
        yield
    except NOT_MADE as error:
        if load_alone is not None:
            load_alone()
            # What a file says of data is looked at with data alone; errors of ours name these.
            if isinstance(error, ValueError) or "adata" in str(error):
                error.add_note(f"while making the model that {path} describes")
                raise
            if notes := getattr(error, "__notes__", ()):  # of the file that the data are of
                raise ValueError(
                    f"{path} describes a model that can be made, but not with its data "
                    f"({brief(error)}): {'; '.join(notes)}"
                ) from error
        what = "the model that it describes cannot be made"
        if str(error).startswith("Error(s) in loading state_dict"):
            what = "its weights are not those of the model it describes"
        raise ValueError(
            f"{path} was tampered with, or is of another version or class: {what} ({brief(error)})"
        ) from error


@contextmanager
def _noting_the_data(path: Path) -> Iterator[None]:
    """Have errors name the file that the data were read from."""
    try:
        yield
    except NOT_MADE as error:
        error.add_note(f"adata was read from {path}")
        raise


def _fetch(url: str, path: Path) -> None:
    """Fetch a file, if it is not there."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "mixscvi"})
        with urllib.request.urlopen(request) as answer:
            write_beside(path, lambda beside: beside.write_bytes(answer.read()))
    except (OSError, ValueError) as error:  # there is no answer, or it is no address
        raise OSError(f"{path} could not be fetched from backup_url={url!r} ({error})") from error


def _read_data(path: Path) -> AnnData | Literal[False]:
    if not path.is_file():
        warn_user(
            f"{path.parent} holds no data, and no adata was given: the model is loaded without"
        )
        return False
    try:
        return anndata.read_h5ad(path)
    except (IORegistryError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is truncated or damaged ({error}): fetch it again") from error
