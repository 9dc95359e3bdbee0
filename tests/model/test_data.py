"""Training minibatches: scvi-tools' own, made faster."""

import functools
import itertools
import warnings
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from numba import typeof
from numba.core.dispatcher import Dispatcher
from scipy import sparse
from scvi.dataloaders import AnnDataLoader, DataSplitter
from scvi.train import TrainingPlan

from compilers import not_compiled
from fitting import SMALL, fit, seeded
from mixscvi import MixSCVI, compiled, csr, csr_kernels
from mixscvi.likelihoods import kernels, log_prob
from mixscvi.mixture import nonzeros, sparse_kernels
from mixscvi.mixture.mostly_zero import MostlyZero
from mixscvi.model.data import LeanDataSplitter
from mixscvi.model.loaders import LeanDataLoader
from mixscvi.model.training import LeanTrainingPlan


def registered(convert, n_cells=53, mean=0.4):
    rng = np.random.default_rng(0)
    counts = rng.poisson(mean, (n_cells, 17)).astype(np.float32)
    counts[:, 0] += 1
    obs = pd.DataFrame(
        {
            "batch": rng.choice(["a", "b"], n_cells),
            "donor": rng.choice(["x", "y", "z"], n_cells),
            "age": rng.normal(size=n_cells),
            "size": rng.uniform(1, 2, n_cells),
        },
        index=[f"cell{i}" for i in range(n_cells)],
    )
    adata = anndata.AnnData(convert(counts), obs=obs)
    MixSCVI.setup_anndata(
        adata,
        batch_key="batch",
        categorical_covariate_keys=["donor"],
        continuous_covariate_keys=["age"],
        size_factor_key="size",
    )
    return MixSCVI(adata, n_hidden=8).adata_manager


def minibatches(splitter_cls, manager, *, plan=None, **kwargs):
    splitter = splitter_cls(
        manager, train_size=0.8, batch_size=10, shuffle_set_split=False, **kwargs
    )
    splitter.setup()
    splitter.trainer = None if plan is None else SimpleNamespace(lightning_module=plan)
    torch.manual_seed(3)
    loader = splitter.train_dataloader()
    return loader, [*loader, *loader], torch.rand(())


def few_counts(convert, **kwargs):
    return registered(convert, mean=0.1, **kwargs)


KINDS = {
    "csr": sparse.csr_matrix,
    "integers": lambda x: sparse.csr_matrix(x.astype(np.int64)),
    "doubles": lambda x: sparse.csr_matrix(x.astype(np.float64)),
    "dense": np.asarray,
    "dense integers": lambda x: x.astype(np.uint16),
    "csc": sparse.csc_matrix,
}


@pytest.mark.filterwarnings("ignore:Training will be faster")
@pytest.mark.parametrize("kind", KINDS)
def test_minibatches_are_those_of_scvi_tools(kind):
    manager = registered(KINDS[kind])
    loader, ours, random = minibatches(LeanDataSplitter, manager)
    assert (loader._lean is None) == (kind == "csc")
    _, theirs, expected_random = minibatches(DataSplitter, manager)
    assert random == expected_random
    assert len(ours) == len(theirs) == 2 * 5
    for got, expected in zip(ours, theirs, strict=True):
        assert got.keys() == expected.keys()
        for key in expected:
            assert got[key].dtype == expected[key].dtype
            assert torch.equal(got[key], expected[key]), key
    assert not torch.equal(ours[0]["X"], ours[5]["X"])  # shuffled in every epoch


@pytest.mark.parametrize("kind", ["csr", "integers", "doubles"])
def test_minibatches_by_their_nonzeros(kind):
    manager = few_counts(KINDS[kind])
    plan = SimpleNamespace(takes_nonzeros=True)
    _, ours, random = minibatches(LeanDataSplitter, manager, plan=plan)
    _, theirs, expected_random = minibatches(DataSplitter, manager)
    assert random == expected_random
    for got, expected in zip(ours, theirs, strict=True):
        assert isinstance(got["X"], MostlyZero)
        assert got["X"].dtype == torch.float32
        for key in expected:
            assert torch.equal(torch.as_tensor(got[key] + 0), expected[key]), key


@pytest.mark.parametrize("kind", ["csr", "dense"])
@pytest.mark.parametrize("n_components", [1, 3])
def test_nothing_is_compiled_anew_for_a_short_minibatch(kind, n_components, monkeypatch):
    """Nor in a later epoch: functions see arguments of the same types."""
    monkeypatch.setattr(nonzeros, "_LEAST_WORK", 0)
    kinds, sizes = {}, set()

    def spied(run):
        def call(function, *args):
            # Not of what is done after training, without gradients.
            if isinstance(function, Dispatcher) and not torch.is_inference_mode_enabled():
                types = tuple(map(typeof, args if run is attempt else args[1:]))
                kinds.setdefault(function, set()).add(types)
            return run(function, *args)

        return call

    attempt, step = compiled.attempt, LeanTrainingPlan.training_step
    monkeypatch.setattr(compiled, "in_blocks", spied(compiled.in_blocks))
    monkeypatch.setattr(compiled, "attempt", spied(attempt))

    def spied_step(self, batch, batch_idx):
        sizes.add(len(batch["X"]))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(LeanTrainingPlan, "training_step", spied_step)
    # 3 cells are too few for a table of log-gamma terms.
    adata = few_counts(KINDS[kind], n_cells=47).adata.copy()
    fit(MixSCVI, adata, n_components=n_components, train_kwargs={"train_size": 35 / 47})
    assert sizes == {32, 3}
    assert len(kinds) > 3
    for function, seen in kinds.items():
        assert len(seen) == 1, function


def unsorted(counts):
    matrix = sparse.csr_matrix(counts)
    for start, stop in itertools.pairwise(matrix.indptr):
        for array in (matrix.indices, matrix.data):
            array[start:stop] = array[start:stop][::-1]
    matrix.has_sorted_indices = False
    return matrix


@pytest.mark.parametrize(
    ("manager", "takes_nonzeros"),
    [
        (lambda: registered(sparse.csr_matrix), True),
        (lambda: few_counts(unsorted), True),
        (lambda: few_counts(np.asarray), True),
        (lambda: few_counts(sparse.csr_matrix), False),
    ],
    ids=["many nonzeros", "unsorted", "dense", "not asked for"],
)
def test_counts_that_stay_dense(manager, takes_nonzeros):
    plan = SimpleNamespace(takes_nonzeros=takes_nonzeros)
    _, ours, _ = minibatches(LeanDataSplitter, manager(), plan=plan)
    _, theirs, _ = minibatches(DataSplitter, manager())
    for got, expected in zip(ours, theirs, strict=True):
        assert type(got["X"]) is torch.Tensor
        assert torch.equal(got["X"], expected["X"])


@pytest.mark.parametrize("kwargs", [{"n_components": 1}, {"n_components": 3}])
@pytest.mark.parametrize("setup", [{}, {"batch_key": "batch", "size_factor_key": "size"}])
def test_training_on_nonzeros_is_training_on_dense_counts(kwargs, setup, monkeypatch):
    """The same sums are taken of the same numbers; matrix products may round by memory's layout."""
    monkeypatch.setattr(nonzeros, "_LEAST_WORK", 0)
    seen = []
    forward = LeanTrainingPlan.training_step

    def spied(self, batch, batch_idx):
        seen.append(type(batch["X"]))
        return forward(self, batch, batch_idx)

    monkeypatch.setattr(LeanTrainingPlan, "training_step", spied)
    weights = []
    for convert in (sparse.csr_matrix, np.asarray):
        adata = few_counts(convert).adata.copy()
        model = fit(MixSCVI, adata, setup, **kwargs)
        weights.append(model.module.state_dict())
    sparse_weights, dense_weights = weights
    for name, expected in dense_weights.items():
        torch.testing.assert_close(sparse_weights[name], expected)
    half = len(seen) // 2
    assert set(seen[:half]) == {MostlyZero}
    assert set(seen[half:]) == {torch.Tensor}


@pytest.mark.parametrize("how", ["compiled", "wrapped", "not"])
def test_parts_that_the_user_compiles_see_dense_counts(how):
    model = MixSCVI(few_counts(sparse.csr_matrix).adata, n_components=2, **SMALL)
    if how == "compiled":
        model.module.z_encoder.compile(backend="eager")
    elif how == "wrapped":
        model.module.z_encoder = torch.compile(model.module.z_encoder, backend="eager")
    assert LeanTrainingPlan(model.module).takes_nonzeros is (how == "not")


@pytest.mark.parametrize("likelihood", ["zinb", "nb", "poisson"])
def test_size_factors_leave_the_likelihood_compiled(likelihood, monkeypatch):
    calls = []
    evaluate = log_prob.evaluate
    monkeypatch.setattr(
        log_prob,
        "evaluate",
        lambda x, *args, **kw: calls.append(type(x)) or evaluate(x, *args, **kw),
    )
    adata = few_counts(sparse.csr_matrix).adata.copy()
    setup = {"size_factor_key": "size"}
    fit(MixSCVI, adata, setup, n_components=2, gene_likelihood=likelihood)
    assert MostlyZero in calls


@pytest.mark.parametrize(
    ("model_kwargs", "train_kwargs"),
    [
        ({"likelihood": "reference"}, {}),
        ({}, {"plan_kwargs": {"compile": True, "compile_kwargs": {"backend": "eager"}}}),
    ],
    ids=["as scvi-tools", "compiled"],
)
def test_who_takes_no_nonzeros_gets_dense_counts(model_kwargs, train_kwargs, monkeypatch):
    seen = []
    forward = TrainingPlan.training_step

    def spied(self, batch, batch_idx):
        seen.append(type(batch["X"]))
        return forward(self, batch, batch_idx)

    monkeypatch.setattr(TrainingPlan, "training_step", spied)
    lean = LeanTrainingPlan.training_step
    monkeypatch.setattr(
        LeanTrainingPlan,
        "training_step",
        lambda *args: seen.append(type(args[1]["X"])) or lean(*args),
    )
    adata = few_counts(sparse.csr_matrix).adata.copy()
    fit(
        MixSCVI,
        adata,
        n_components=1,
        train_kwargs={"max_epochs": 1, **train_kwargs},
        **model_kwargs,
    )
    assert set(seen) == {torch.Tensor}


def twice(counts):
    matrix = sparse.csr_matrix(counts)
    assert matrix.has_canonical_format  # remembered, and then no longer true of the copy
    again = sparse.csr_matrix(
        (np.repeat(matrix.data, 2), np.repeat(matrix.indices, 2), 2 * matrix.indptr),
        shape=matrix.shape,
    )
    again.has_canonical_format = True
    return again


@pytest.mark.parametrize("takes_nonzeros", [False, True])
def test_entries_of_one_place_are_added_up(takes_nonzeros):
    plan = SimpleNamespace(takes_nonzeros=takes_nonzeros)
    _, ours, _ = minibatches(LeanDataSplitter, few_counts(twice), plan=plan)
    _, theirs, _ = minibatches(DataSplitter, few_counts(lambda x: sparse.csr_matrix(2 * x)))
    for got, expected in zip(ours, theirs, strict=True):
        assert torch.equal(got["X"], expected["X"])


@pytest.mark.filterwarnings("ignore:Sparse")
def test_other_loaders_are_left_alone():
    manager = registered(sparse.csr_matrix)
    loader, *_ = minibatches(LeanDataSplitter, manager, load_sparse_tensor=True)
    assert loader._lean is None
    loader, *_ = minibatches(LeanDataSplitter, manager)
    assert loader._lean is not None


def test_loaders_of_the_methods_give_the_same_minibatches():
    manager = registered(sparse.csr_matrix)
    cells = [3, -1, 7]
    ours = next(iter(LeanDataLoader(manager, indices=cells, batch_size=8)))
    theirs = next(iter(AnnDataLoader(manager, indices=cells, batch_size=8)))
    for key in theirs:
        assert torch.equal(ours[key], theirs[key])


def test_nothing_is_compiled_where_numba_is_not(monkeypatch):
    monkeypatch.setattr(compiled, "_failed", True)
    loader, ours, _ = minibatches(LeanDataSplitter, registered(sparse.csr_matrix))
    _, theirs, _ = minibatches(DataSplitter, registered(sparse.csr_matrix))
    assert loader._lean is None
    assert torch.equal(ours[0]["X"], theirs[0]["X"])


@pytest.mark.parametrize("n_components", [1, 3])
@pytest.mark.parametrize("fails", ["import", "likelihoods", "products", "rows"])
def test_a_model_trains_where_numba_fails(fails, n_components, monkeypatch):
    """To the same weights, with one warning."""
    monkeypatch.setattr(nonzeros, "_LEAST_WORK", 0)
    monkeypatch.setattr(compiled, "_failed", False)

    def results():
        adata = few_counts(sparse.csr_matrix).adata.copy()
        model = fit(MixSCVI, adata, n_components=n_components)
        log_px = seeded(model.get_marginal_ll, n_mc_samples=6, return_mean=False)
        return {"log p(x)": log_px, **model.module.state_dict()}

    expected = results()
    cause = RuntimeError("no room for code")
    if fails == "import":
        monkeypatch.setattr(compiled, "_import", functools.partial(fail, ImportError(*cause.args)))
    else:
        module, name = {
            "likelihoods": (kernels, "rows"),
            "products": (sparse_kernels, "sums_of_rows"),
            "rows": (csr_kernels, "copy_rows"),
        }[fails]
        monkeypatch.setattr(module, name, not_compiled(cause))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = results()
    assert ["no room for code" in str(warning.message) for warning in caught].count(True) == 1
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5, msg=name)


def fail(error, *args):
    raise error


def test_a_matrix_with_entries_beyond_its_columns_is_refused():
    indptr, indices, data = np.array([0, 1]), np.array([5], np.int32), np.ones(1, np.float32)
    with pytest.raises(IndexError, match="3 columns"):
        csr.dense_rows(np.array([0]), indptr, indices, data, 3, np.float32)
    with pytest.raises(IndexError, match=r"\[0, 1\)"):
        csr.dense_rows(np.array([1]), indptr, indices, data, 6, np.float32)


CONFIGURATIONS = {
    "normal": {"gene_likelihood": "normal"},
    "nb": {"gene_likelihood": "nb"},
    "poisson": {"gene_likelihood": "poisson"},
    "gene-cell": {"dispersion": "gene-cell"},
    "gene-batch": {"dispersion": "gene-batch"},
    "without logarithm": {"log_variational": False},
    "library": {"use_observed_lib_size": False},
    "covariates": {"encode_covariates": True},
    "embedding": {"batch_representation": "embedding", "encode_covariates": True},
    "simplex": {"latent_distribution": "ln"},
    "vamp": {"n_components": 2, "prior": "vamp", "n_prior_components": 5},
    "library of two": {"n_components": 2, "use_observed_lib_size": False},
    "covariates of two": {"n_components": 2, "encode_covariates": True},
    "one of three": {"n_components": 3, "estimator": "some_to_some"},
    "amortized": {"n_components": 3, "component_encoder": "amortized"},
    "layer norm": {"use_layer_norm": "both", "use_batch_norm": "none"},
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_model_trains_on_nonzeros(name, monkeypatch):
    monkeypatch.setattr(nonzeros, "_LEAST_WORK", 0)
    setup = {"batch_key": "batch", "continuous_covariate_keys": ["age"]}
    weights = [
        fit(
            MixSCVI,
            few_counts(convert).adata.copy(),
            setup,
            train_kwargs={"max_epochs": 1},
            **{"n_components": 1, **CONFIGURATIONS[name]},
        ).module.state_dict()
        for convert in (sparse.csr_matrix, np.asarray)
    ]
    for key, expected in weights[1].items():
        torch.testing.assert_close(weights[0][key], expected)


@pytest.mark.parametrize("n_components", [1, 2])
def test_training_in_halves_sees_dense_counts(n_components):
    adata = few_counts(sparse.csr_matrix).adata.copy()
    half = {"precision": "bf16-mixed"}
    model = fit(MixSCVI, adata, n_components=n_components, train_kwargs=half)
    assert np.isfinite(model.history["elbo_train"].to_numpy(dtype=float)).all()
