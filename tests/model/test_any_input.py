"""Whatever is given: it trains, or an error of ours says what is wrong with it."""

import traceback
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from fitting import SMALL, train
from mixscvi import MixSCVI

hypothesis = pytest.importorskip("hypothesis", reason="of the group test")
st = hypothesis.strategies

FORMATS = {
    "dense": np.asarray,
    "fortran": np.asfortranarray,
    "csr": sparse.csr_matrix,
    "csc": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "coo": sparse.coo_matrix,
}
TYPES = ["float32", "float64", "int32", "int64", "uint8", "uint16", "bool", "object", "str"]
COLUMNS = ["text", "number", "categorical", "bool", "missing", "mixed", "float", "absent"]


def column(kind, n_obs):
    number = np.arange(n_obs) % 2
    if kind == "missing":
        return np.where(number == 1, np.nan, number + 1.0)
    if kind == "mixed":
        return np.array([("a", 1)[i] for i in number], dtype=object)
    return {
        "text": np.where(number == 1, "a", "b"),
        "number": number,
        "categorical": pd.Categorical(np.where(number == 1, "a", "b"), categories=["z", "b", "a"]),
        "bool": number == 1,
        "float": number + 0.5,
    }[kind]


@st.composite
def data(draw):
    """AnnData of any shape, type and content, and what it is registered and trained with."""
    n_obs, n_vars = draw(st.integers(0, 9)), draw(st.integers(0, 4))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    x = rng.poisson(2.0, (n_obs, n_vars)).astype(float)
    if draw(st.booleans()) and n_vars:
        x[:, 0] += 1
    spoiled = draw(st.sampled_from([None, None, None, -1, np.nan, np.inf, 0.5]))
    if spoiled is not None and x.size:
        x[n_obs // 2, n_vars // 2] = spoiled
    kind = draw(st.sampled_from(TYPES))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        x = x.astype(kind)
    layout = draw(st.sampled_from(list(FORMATS)))
    if kind not in ("object", "str"):
        x = FORMATS[layout](x)
    adata = anndata.AnnData(shape=(n_obs, n_vars))
    adata.obs_names = [f"cell{i // 2 if draw(st.booleans()) else i}" for i in range(n_obs)]
    kwargs = {"layer": "counts"}
    try:
        adata.layers["counts"] = x
    except ValueError:  # anndata takes no such format
        hypothesis.reject()
    for argument in ("batch_key", "labels_key", "categorical_covariate_keys"):
        of = draw(st.sampled_from([None, None, *COLUMNS]))
        if of is not None:
            name = f"{argument} {of}"
            kwargs[argument] = [name] if argument.endswith("keys") else name
            if of != "absent":
                adata.obs[name] = column(of, n_obs)
    of = draw(st.sampled_from([None, None, "number", "float", "text", "missing", "bool"]))
    if of is not None:
        adata.obs["continuous"] = column(of, n_obs)
        kwargs["continuous_covariate_keys"] = ["continuous"]
    model_kwargs = {
        "n_components": draw(st.sampled_from([1, 2])),
        "gene_likelihood": draw(st.sampled_from(["zinb", "nb", "poisson", "normal"])),
        "encode_covariates": draw(st.booleans()),
        "prior": draw(st.sampled_from(["normal", "vamp"])),
    }
    return adata, kwargs, model_kwargs


OURS = (KeyError, IndexError, MemoryError, TypeError, ValueError)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(case=data())
def test_anything_trains_or_is_an_error_of_ours(case):
    adata, setup_kwargs, model_kwargs = case
    try:
        MixSCVI.setup_anndata(adata, **setup_kwargs)
        model = MixSCVI(adata, **SMALL, **model_kwargs, n_prior_components=3)
        train(model, max_epochs=1, train_size=1.0)
    except OURS as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        assert "mixscvi" in last.split("site-packages")[-1], f"{type(error).__name__}: {error}"
        assert any(
            name in str(error) for name in ("adata", "cells", "covariate", "_key", "train()")
        ), error
        return
    latent = model.get_latent_representation()
    assert latent.shape == (adata.n_obs, 3)
    assert np.isfinite(latent).all()
