"""The arguments of a model and of its data, checked before anything is made of them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy import sparse
from scvi import REGISTRY_KEYS
from scvi.module import VAE
from scvi.nn import DecoderSCVI, Embedding, Encoder, FCLayers

from mixscvi.checks import (
    check_boolean,
    check_categories,
    check_choice,
    check_column,
    check_compressed,
    check_genes,
    check_mapping,
    check_numbers,
    check_positive_int,
    warn_of_repeated,
)

__all__ = [
    "as_list",
    "check_dispersion",
    "check_keywords",
    "check_known_categories",
    "check_network",
    "check_setup",
    "take_sparse_array",
]

# Arguments of scVI's networks that the model takes from the data.
_OF_DATA = {
    "n_input", "n_batch", "n_labels", "n_continuous_cov", "n_cats_per_cov", "use_size_factor_key",
    "library_log_means", "library_log_vars",
}  # fmt: skip

# Arguments that are True or False.
_FLAGS = (
    "use_observed_lib_size", "encode_covariates", "deeply_inject_covariates", "linear_classifier",
)  # fmt: skip

# What further arguments are passed on to.
_MADE_OF = {
    "extra_encoder_kwargs": (Encoder, FCLayers),
    "extra_decoder_kwargs": (DecoderSCVI, FCLayers),
    "batch_embedding_kwargs": (Embedding,),
}


def check_setup(
    adata: AnnData,
    *,
    layer: str | None,
    batch_key: str | None,
    labels_key: str | None,
    size_factor_key: str | None,
    categorical_covariate_keys: Sequence[str] | None,
    continuous_covariate_keys: Sequence[str] | None,
    allow_missing_labels: bool = False,
    source_registry: Mapping[str, Any] | None = None,
    extend_categories: bool = False,
    **of_transfer: Any,
) -> None:
    """Raise if data cannot be registered with these arguments of ``setup_anndata``.

    Parameters
    ----------
    adata, layer, batch_key, labels_key, size_factor_key, categorical_covariate_keys, \
    continuous_covariate_keys
        As in :meth:`mixscvi.MixSCVI.setup_anndata`.
    allow_missing_labels
        Whether the labels may be missing, as those of a query.
    source_registry
        Of the model that the data are for, if there is one.
    extend_categories
        Whether they may have categories that it was not trained on.
    **of_transfer
        What else scvi-tools takes for data of a model.

    Raises
    ------
    TypeError
        If an argument is of another type, or counts or covariates are no numbers.
    KeyError
        If there is no such layer or column.
    ValueError
        If there are no genes, no counts, or categories are missing in cells; or if genes or
        categories are not those of the model.

    Warns
    -----
    UserWarning
        If cells or genes have the same name.
    """
    if not isinstance(adata, AnnData):
        raise TypeError(f"adata must be an AnnData, got {type(adata).__name__}")
    if isinstance(adata.obs, pd.DataFrame):  # annotation in files is not read here
        _check_matrix(adata, layer)
        take_sparse_array(adata, layer)
        if allow_missing_labels and labels_key not in adata.obs:
            labels_key = None
        _check_columns(
            adata.obs,
            {"batch_key": batch_key, "labels_key": labels_key, "size_factor_key": size_factor_key},
            categorical_covariate_keys,
            continuous_covariate_keys,
        )
    if source_registry is None and isinstance(adata.obs, pd.DataFrame):
        warn_of_repeated(adata.obs_names, source="adata.obs_names")
        warn_of_repeated(adata.var_names, source="adata.var_names")
    if source_registry is not None:
        check_known_categories(adata, source_registry, extend_categories=extend_categories)
        trained_on = source_registry["field_registries"][REGISTRY_KEYS.X_KEY]["state_registry"]
        check_genes(adata.var_names, trained_on["column_names"])


def take_sparse_array(adata: AnnData, layer: str | None) -> None:
    """Hold counts that are a sparse array as the matrix of the same values.

    scvi-tools takes SciPy's sparse matrices alone.

    Parameters
    ----------
    adata
        Cells.
    layer
        Layer with the counts; ``X`` if ``None``.
    """
    x = getattr(adata, "X", None)
    if layer is not None:  # a collection's layers are read from files, not replaced
        x = adata.layers.get(layer) if isinstance(adata.layers, Mapping) else None
    if isinstance(x, sparse.sparray) and not adata.is_view:
        matrix = sparse.csr_matrix(x)
        if layer is None:
            adata.X = matrix
        else:
            adata.layers[layer] = matrix


def _check_matrix(adata: AnnData, layer: str | None) -> None:
    # A collection of files passes for an AnnData, and has layers that can only be asked for.
    layers = [*adata.layers.keys()]
    if layer is None and not hasattr(adata, "X"):
        raise ValueError(f"layer must name the counts of a collection, one of {layers}, got None")
    if layer is not None and layer not in layers:
        raise KeyError(f"layer={layer!r} is not in adata.layers, which has {layers}")
    x, source = (
        (adata.X, "adata.X") if layer is None else (adata.layers[layer], f"adata.layers[{layer!r}]")
    )
    if x is None:
        raise ValueError(f"adata.X is empty: give the layer that holds the counts, {layers}")
    if not adata.n_vars:
        raise ValueError(f"adata must have genes, got shape {adata.shape}")
    if not adata.n_obs:
        raise ValueError(f"adata must have cells, got shape {adata.shape}")
    check_compressed(x, source)
    for i, part in enumerate(getattr(adata, "adatas", ())):  # of a collection
        of_part = part.X if layer is None else part.layers[layer]
        check_compressed(of_part, f"{source} of part {i}")
    check_numbers(x, adata.obs_names, adata.var_names, source=source)


def _check_columns(
    obs: pd.DataFrame,
    single: Mapping[str, str | None],
    categorical_covariate_keys: Sequence[str] | None,
    continuous_covariate_keys: Sequence[str] | None,
) -> None:
    for argument, key in single.items():
        if key is not None:
            check_column(obs, key, argument=argument, numeric=argument == "size_factor_key")
    for argument, keys, numeric in (
        ("categorical_covariate_keys", categorical_covariate_keys, False),
        ("continuous_covariate_keys", continuous_covariate_keys, True),
    ):
        if keys is None:
            continue
        if isinstance(keys, str) or not isinstance(keys, Iterable):
            raise TypeError(f"{argument} must be a list of columns, got {keys!r}")
        keys = [*keys]
        for key in keys:
            if not isinstance(key, str):
                raise TypeError(f"{argument} must hold names of columns, got {key!r}")
            if keys.count(key) > 1:
                raise ValueError(f"{argument} names {key!r} {keys.count(key)} times")
            check_column(obs, key, argument=argument, numeric=numeric)


def check_known_categories(
    adata: AnnData, registry: Mapping[str, Any], *, extend_categories: bool = False
) -> None:
    """Raise if cells are of batches, labels or covariates that a model was not trained on.

    Columns that `adata` lacks are left to scvi-tools.

    Parameters
    ----------
    adata
        Cells.
    registry
        Of the model.
    extend_categories
        Whether there may be new ones, of the same type.

    Raises
    ------
    ValueError
        Naming the column, the categories and the first offending cells.
    TypeError
        If new categories are of another type, so that they have no common order.
    """
    if not isinstance(adata.obs, pd.DataFrame):
        return
    fields = registry["field_registries"]
    known: dict[str, Any] = {}
    for field in (REGISTRY_KEYS.BATCH_KEY, REGISTRY_KEYS.LABELS_KEY):
        state = fields.get(field, {}).get("state_registry", {})
        if "categorical_mapping" in state and "original_key" in state:
            known[state["original_key"]] = state["categorical_mapping"]
    known |= (
        fields.get(REGISTRY_KEYS.CAT_COVS_KEY, {}).get("state_registry", {}).get("mappings", {})
    )
    for key, categories in known.items():
        if key in adata.obs and not key.startswith("_scvi"):
            column = adata.obs[key]
            check_column(adata.obs, key, argument="adata")
            values = pd.Index(categories).tolist()
            if not extend_categories:
                check_categories(column, values, source=f"adata.obs[{key!r}]")
                continue
            try:
                np.unique(np.array([*values, *column.unique()], dtype=object))
            except TypeError as error:
                raise TypeError(
                    f"adata.obs[{key!r}] is {column.unique().tolist()[0]!r} in "
                    f"{str(adata.obs_names[0])!r}, but the model was trained on {values[0]!r} and "
                    "the like: convert it to the same type"
                ) from error


def check_network(
    *,
    n_hidden: Any,
    n_latent: Any,
    n_layers: Any,
    dropout_rate: Any,
    dispersion: Any,
    gene_likelihood: Any,
    latent_distribution: Any,
    further: Mapping[str, Any],
    networks: Sequence[Callable[..., Any]] = (VAE,),
) -> None:
    """Raise if an argument that describes scVI's networks is not one.

    `further` arguments must be among those of `networks`. Of their values those are looked at that
    scVI takes for another value, without a word, or fails with in the middle of something.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.
    """
    for name, value in (("n_hidden", n_hidden), ("n_latent", n_latent), ("n_layers", n_layers)):
        check_positive_int(name, value)
    if isinstance(dropout_rate, bool) or not isinstance(dropout_rate, (int, float, np.number)):
        raise TypeError(f"dropout_rate must be a number from 0 to 1, got {dropout_rate!r}")
    if not 0 <= dropout_rate <= 1:
        raise ValueError(f"dropout_rate must be a number from 0 to 1, got {dropout_rate!r}")
    check_choice("dispersion", dispersion, ("gene", "gene-batch", "gene-label", "gene-cell"))
    check_choice("gene_likelihood", gene_likelihood, ("zinb", "nb", "poisson", "normal"))
    check_choice("latent_distribution", latent_distribution, ("normal", "ln"))
    _check_known(further, networks)
    for name in ("use_batch_norm", "use_layer_norm"):
        if further.get(name, False) is not False:  # which scVI takes for "none"
            check_choice(name, further[name], ("encoder", "decoder", "none", "both"))
    if "batch_representation" in further:
        value = further["batch_representation"]
        check_choice("batch_representation", value, ("one-hot", "embedding"))
    for name in _FLAGS:
        if name in further:
            check_boolean(name, further[name])
    activation = further.get("var_activation")
    if activation is not None and not callable(activation):
        raise TypeError(f"var_activation must be a function of tensors, got {activation!r}")
    for name in ("extra_encoder_kwargs", "extra_decoder_kwargs", "batch_embedding_kwargs"):
        check_mapping(name, further.get(name) or {})
    for name, made_of in _MADE_OF.items():
        check_keywords(further.get(name), made_of, argument=name)


def check_dispersion(module: Any, what: str) -> None:
    """Raise if `what` needs the dispersion of a negative binomial, which a model lacks."""
    likelihood = getattr(module, "gene_likelihood", None)
    if likelihood in ("poisson", "normal"):
        raise ValueError(
            f"{what} needs the dispersion of a negative binomial, gene_likelihood='zinb' or 'nb', "
            f"and the model has gene_likelihood={likelihood!r}"
        )


def as_list(keys: Sequence[str] | None) -> list[str] | None:
    """Columns as a list: pandas takes a tuple for the name of one."""
    return None if keys is None else [*keys]


def _check_known(further: Mapping[str, Any], networks: Sequence[Callable[..., Any]]) -> None:
    """Raise if there are arguments that no network has, or that are taken from the data."""
    known = _names_taken_by(networks)
    for name, value in further.items():
        if name in _OF_DATA:
            raise TypeError(f"{name} is taken from the data, got {value!r}: leave it out")
        if name not in known:
            others = sorted(known - _OF_DATA)
            raise TypeError(f"there is no argument {name!r}, got {value!r}: expected {others}")


def check_keywords(
    given: Any, of: Iterable[Callable[..., Any]], *, argument: str, further: Iterable[str] = ()
) -> None:
    """Raise if keywords are passed on to where nothing takes them.

    Parameters
    ----------
    given
        The keywords, with their values; what is no mapping is left to whom it is for.
    of
        Functions and classes, one of which must take each.
    argument
        What passes them on.
    further
        Names that are taken besides.

    Raises
    ------
    TypeError
        Naming the first that nothing takes, and what it may have been meant for.

    Examples
    --------
    >>> def fit(max_epochs, lr): ...
    >>> check_keywords({"lr": 0.1}, [fit], argument="train()")
    >>> check_keywords({"max_epoch": 2}, [fit], argument="train()")
    Traceback (most recent call last):
    ...
    TypeError: train() takes no argument 'max_epoch', got 2: did you mean 'max_epochs'?
    """
    if not isinstance(given, Mapping):
        return
    known = _names_taken_by(of) | {*further}
    for name, value in given.items():
        if name not in known:
            alike = difflib.get_close_matches(str(name), known, n=1)
            meant = f": did you mean {alike[0]!r}?" if alike else ""
            raise TypeError(f"{argument} takes no argument {name!r}, got {value!r:.60}{meant}")


def _names_taken_by(functions: Iterable[Callable[..., Any]]) -> set[str]:
    """Names of the parameters of functions, and of classes and those that they inherit from."""
    makers: list[Callable[..., Any]] = []
    for function in functions:
        if isinstance(function, type):
            makers += [
                vars(base)["__init__"] for base in function.__mro__ if "__init__" in vars(base)
            ]
        else:
            makers.append(function)
    return {
        parameter.name
        for maker in makers
        for parameter in inspect.signature(maker).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    } - {"self"}
