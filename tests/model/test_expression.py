"""Expression under the exact posteriors, against quadrature with scvi-tools' own decoder."""

import copy

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scvi.module import VAE

from fitting import BATCH, COVARIATES, LEARN, fit, seeded
from mixscvi import MixSCVI
from mixscvi.model import adapted as adapted_module
from naive_module import in_double
from quadrature import integrate

CELLS = [7, 0, 5]
QUICK = {"n_mc_samples": 100, "adapt_kwargs": {"max_generations": 2}, "progress": False}
LABELED = {**COVARIATES, "labels_key": "label"}

VARIANTS = {
    "three components": (BATCH, {"n_components": 3}),
    "one component": (BATCH, {"n_components": 1}),
    "one component, reference": (BATCH, {"n_components": 1, "likelihood": "reference"}),
    "covariates, flow, mog": (COVARIATES, {"n_flow_steps": 1, "prior": "mog"}),
    "batch embeddings, vamp": (
        COVARIATES,
        {"prior": "vamp", "n_prior_components": 4, "batch_representation": "embedding"},
    ),
    "modeled library": (BATCH, {"use_observed_lib_size": False, "n_latent": 1}),
    "modeled library, flow": (
        COVARIATES,
        {"use_observed_lib_size": False, "n_latent": 1, "n_flow_steps": 1},
    ),
    "size factors": ({**BATCH, "size_factor_key": "factor"}, {}),
    "ln": (BATCH, {"latent_distribution": "ln"}),
    "ln, flow, nb": (
        BATCH,
        {"latent_distribution": "ln", "n_flow_steps": 1, "gene_likelihood": "nb"},
    ),
    "poisson": (COVARIATES, {"gene_likelihood": "poisson"}),
    "normal": (BATCH, {"gene_likelihood": "normal"}),
    "dispersion by batch": (BATCH, {"dispersion": "gene-batch"}),
    "dispersion by label": (LABELED, {"dispersion": "gene-label"}),
    "dispersion by cell": (BATCH, {"dispersion": "gene-cell"}),
    "scvi": (COVARIATES, None),
}


def make(make_adata, setup, kwargs, n_latent=2):
    """A model after a short training; with `kwargs` ``None`` one of scvi-tools."""
    if kwargs is None:
        trained = fit(scvi.model.SCVI, make_adata(), setup, train_kwargs=LEARN, n_latent=n_latent)
        return MixSCVI.from_scvi_model(trained)
    kwargs = {"n_components": 2, "n_latent": n_latent, **kwargs}
    return fit(MixSCVI, make_adata(), setup, train_kwargs=LEARN, **kwargs)


@pytest.fixture(scope="module")
def plain(make_adata):
    """A trained model; tests must leave it as it is."""
    return make(make_adata, BATCH, {})


@torch.no_grad()
def exact(model, cell):
    """What gives mean and standard deviation of a cell's expression, `(G,)` each."""
    module = in_double(copy.deepcopy(model.module))
    (tensors,) = model._make_data_loader(adata=model.adata, indices=[cell])
    tensors = {
        name: values.double() if values.is_floating_point() else values
        for name, values in tensors.items()
    }
    if module.dispersion in ("gene-batch", "gene-label"):
        module.px_r.data = module.px_r.data.float()  # scvi-tools' one-hot matrix is
    _, points, weights = integrate(module, tensors, 0)
    (heavy,) = torch.where(weights > 1e-10)
    points, weights = points[heavy], weights[heavy]
    assert len(points) > 20
    rows = {name: values.expand(len(points), -1) for name, values in tensors.items()}
    z, library = points[:, : module.n_latent], points[:, module.n_latent :]
    if module.use_observed_lib_size:
        library = rows["X"].sum(1, keepdim=True).log()
    drawn = {"z": module.z_encoder.z_transformation(z), "library": library}
    inputs = module._get_generative_input(rows, drawn)

    @torch.no_grad()
    def moments(key="scale", batches=(None,)):
        decoded = [VAE.generative(module, **inputs, transform_batch=batch) for batch in batches]
        values = torch.stack([one["px"].get_normalized(key) for one in decoded]).mean(0)
        mean = weights @ values
        return mean.numpy(), (weights @ (values - mean).square()).sqrt().numpy()

    return moments


def standardized(got, moments):
    """Errors of means of about 1,000 draws, some 300 of them effective."""
    mean, scale = moments
    return (got - mean) / (scale / 300**0.5 + 1e-5 * mean)


@pytest.mark.parametrize(("setup", "kwargs"), VARIANTS.values(), ids=VARIANTS)
def test_expression_is_exact(setup, kwargs, make_adata):
    model = make(make_adata, setup, kwargs)
    options = {"n_samples": 2000, "weights": "adapted", "n_mc_samples": 2000, "progress": False}
    own = seeded(model.get_normalized_expression, indices=CELLS, batch_size=2, **options)
    genes = ["gene5", "gene2", "gene11"]
    moved = seeded(
        model.get_normalized_expression,
        indices=CELLS,
        transform_batch=["b1", "b0"],
        library_size="latent",
        gene_list=genes,
        **options,
    )
    assert list(moved.columns) == ["gene2", "gene5", "gene11"]
    for row, cell in enumerate(CELLS):
        moments = exact(model, cell)
        assert abs(standardized(own.to_numpy()[row], moments())).max() < 5
        chosen = [values[[2, 5, 11]] for values in moments("mu", [1, 0])]
        assert abs(standardized(moved.to_numpy()[row], chosen)).max() < 5


def test_the_encoders_expression_is_another(plain):
    """What the test above could not tell apart would not be worth its name."""
    encoder = seeded(plain.get_normalized_expression, indices=CELLS, n_samples=2000)
    errors = [
        standardized(row, exact(plain, cell)())
        for row, cell in zip(encoder.to_numpy(), CELLS, strict=True)
    ]
    assert np.abs(errors).max() > 10


def test_draws_have_the_exact_spread(plain):
    draws = seeded(
        plain.get_normalized_expression,
        indices=CELLS,
        n_samples=2000,
        return_mean=False,
        weights="adapted",
        library_size=1e4,
        n_mc_samples=4000,
        progress=False,
    )
    for of_cell, cell in zip(draws.transpose(1, 0, 2), CELLS, strict=True):
        mean, scale = exact(plain, cell)()
        np.testing.assert_allclose(of_cell.std(0), 1e4 * scale, rtol=0.25)
        assert abs(standardized(of_cell.mean(0), (1e4 * mean, 1e4 * scale))).max() < 5


def test_overall_draws_are_of_all_cells(plain):
    overall = seeded(
        plain.get_normalized_expression,
        indices=CELLS,
        n_samples_overall=3000,
        weights="adapted",
        return_numpy=True,
        batch_size=2,
        progress=False,
    )
    means, scales = np.array([exact(plain, c)() for c in CELLS]).swapaxes(0, 1)
    mean = means.mean(0)
    scale = np.sqrt((scales**2).mean(0) + means.var(0))
    np.testing.assert_allclose(overall.std(0), scale, rtol=0.2)
    assert abs(standardized(overall.mean(0), (mean, scale))).max() < 5
    blocks = overall.reshape(3, 1000, -1).mean(1)  # in random order
    assert abs(standardized(blocks, (mean, scale))).max() < 5


OPTIONS = {
    "default": {},
    "mean": {"n_samples": 4},
    "draws": {"n_samples": 4, "return_mean": False},
    "one draw": {"n_samples": 1, "return_mean": False},
    "numpy": {"n_samples": 4, "return_numpy": True},
    "genes": {"gene_list": ["gene3", "gene1"]},
    "genes, draws": {"gene_list": ["gene3", "gene1"], "n_samples": 4, "return_mean": False},
    "all cells": {"indices": None},
    "one batch": {"transform_batch": "b1"},
    "batches": {"transform_batch": ["b1", "b0"], "n_samples": 4},
    "library": {"library_size": 1e4},
    "latent library": {"library_size": "latent"},
    "overall": {"n_samples_overall": 8, "return_numpy": True, "return_mean": False},
    "minibatches": {"batch_size": 2, "data_loader_kwargs": {"drop_last": False}},
}


@pytest.mark.parametrize("kwargs", OPTIONS.values(), ids=OPTIONS)
def test_types_are_those_of_other_weights(kwargs, plain):
    """The arguments of scvi-tools, and the shapes and types that come of them."""
    kwargs = {"indices": np.array(CELLS), **kwargs}
    expected = seeded(plain.get_normalized_expression, weights="uniform", **kwargs)
    got = seeded(plain.get_normalized_expression, weights="adapted", **QUICK, **kwargs)
    assert type(got) is type(expected)
    assert got.shape == expected.shape
    if isinstance(got, pd.DataFrame):
        pd.testing.assert_index_equal(got.index, expected.index)
        pd.testing.assert_index_equal(got.columns, expected.columns)
        got, expected = got.to_numpy(), expected.to_numpy()
    assert got.dtype == expected.dtype
    ratio = got.sum(-1) / expected.sum(-1)  # of other draws, on the same scale
    assert (abs(np.log(ratio)) < np.log(3)).all()


def test_masks_new_data_and_loaders(plain, make_adata):
    mask = np.zeros(plain.adata.n_obs, dtype=bool)
    mask[CELLS] = True
    kwargs = {"weights": "adapted", "batch_size": 2, **QUICK}
    given = seeded(plain.get_normalized_expression, indices=sorted(CELLS), **kwargs)
    masked = seeded(plain.get_normalized_expression, indices=mask, **kwargs)
    pd.testing.assert_frame_equal(masked, given)
    new = seeded(plain.get_normalized_expression, make_adata(), indices=sorted(CELLS), **kwargs)
    pd.testing.assert_frame_equal(new, given)
    loader = plain._make_data_loader(adata=plain.adata, indices=sorted(CELLS), batch_size=2)
    del kwargs["batch_size"]
    own = seeded(plain.get_normalized_expression, dataloader=loader, **kwargs)
    np.testing.assert_array_equal(own, given.to_numpy())
    overall = plain.get_normalized_expression(dataloader=loader, n_samples_overall=9, **kwargs)
    assert overall.shape == (9, 20)


def test_draws_as_a_table_are_refused_as_in_scvi(plain):
    with pytest.warns(UserWarning, match="return_numpy"):
        draws = plain.get_normalized_expression(
            indices=CELLS, n_samples=2, return_mean=False, return_numpy=False, weights="adapted",
            **QUICK,
        )  # fmt: skip
    assert draws.shape == (2, 3, 20)


@pytest.mark.parametrize("mode", ["vanilla", "change"])
@pytest.mark.parametrize("batch_correction", [False, True])
def test_differential_expression(mode, batch_correction, plain):
    groups = {"idx1": [7, 0], "idx2": [5, 3, 8]}
    kwargs = {"mode": mode, "batch_correction": batch_correction, "silent": True, **groups}
    uniform = seeded(plain.differential_expression, **kwargs)
    table = seeded(plain.differential_expression, weights="adapted", **kwargs)
    pd.testing.assert_index_equal(table.columns, uniform.columns)
    assert set(table.index) == set(uniform.index)
    assert "_scvi_temp_de" not in plain.adata.obs
    batches = [0, 1] if batch_correction else [None]
    for name, cells in (("scale1", groups["idx1"]), ("scale2", groups["idx2"])):
        moments = np.array([exact(plain, c)(batches=batches) for c in cells])
        mean = moments[:, 0].mean(0)
        spread = np.sqrt((moments[:, 1] ** 2).mean(0) + moments[:, 0].var(0))
        got = table.loc[plain.adata.var_names, name].to_numpy()
        assert abs(standardized(got, (mean, spread))).max() < 6


def test_differential_expression_adapts_each_cell_once(plain, monkeypatch):
    adapted = []
    adapt = plain.module.adapt

    def counted(tensors, **options):
        adapted.append(len(tensors["X"]))
        return adapt(tensors, **options)

    monkeypatch.setattr(plain.module, "adapt", counted)
    table = plain.differential_expression(
        groupby="label",
        weights="adapted",
        batch_correction=True,
        n_samples_overall=2000,
        silent=True,
        importance_weighting_kwargs=QUICK,
    )
    assert len(table) == 3 * 20
    assert sum(adapted) == plain.adata.n_obs


def test_filtered_cells_and_positional_arguments(plain):
    arguments = (None, "label", ["type0"], "type1", None, None, "change", 0.25, 16)
    table = plain.differential_expression(
        *arguments,
        weights="adapted",
        filter_outlier_cells=True,
        silent=True,
        n_samples_overall=100,
        importance_weighting_kwargs=QUICK,
    )
    assert (table["comparison"] == "type0 vs type1").all()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weights": "exact"}, "weights must be one of"),
        ({"n_samples": 0}, "n_samples"),
        ({"n_samples": 2, "n_samples_overall": 8}, "takes the place of n_samples"),
        ({"n_samples_overall": 0}, "n_samples_overall"),
        ({"n_mc_samples": 24}, "n_mc_samples must be at least 25"),
        ({"adapt_kwargs": {"n_final": 3}}, "adapt_kwargs must not hold 'n_final'"),
        (
            {"transform_batch": "b7"},
            "transform_batch must be of the model's batches, 'b0', 'b1', got 'b7'",
        ),
        ({"transform_batch": "b1", "dataloader": [{}], "indices": None}, "needs adata"),
    ],
)
def test_bad_arguments(kwargs, message, plain):
    with pytest.raises(ValueError, match=message):
        plain.get_normalized_expression(**{"indices": CELLS, "weights": "adapted", **kwargs})


def test_expression_needs_training_and_counts(make_adata):
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    untrained = MixSCVI(adata, n_components=2)
    for method in (untrained.get_normalized_expression, untrained.differential_expression):
        with pytest.raises(RuntimeError, match="train"):
            method(weights="adapted")
    model = fit(MixSCVI, adata, n_components=2)
    whole = make_adata()
    model.minify_adata()
    for kwargs in ({}, {"n_samples_overall": 5}, {"adata": whole}):
        with pytest.raises(ValueError, match="weights='adapted' needs the cells' counts"):
            model.get_normalized_expression(weights="adapted", **kwargs)
    with pytest.raises(ValueError, match="weights='adapted' needs the cells' counts"):
        model.differential_expression(idx1=[0], idx2=[1], weights="adapted", all_stats=False)
    assert model.get_normalized_expression(weights="uniform").shape == adata.shape
    other = fit(MixSCVI, whole, n_components=2)
    with pytest.raises(ValueError, match="weights='adapted' needs the cells' counts"):
        other.get_normalized_expression(model.adata, weights="adapted")


def test_data_minified_with_counts(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=2, train_kwargs=LEARN)
    options = {"indices": CELLS, "n_samples": 50, "weights": "adapted", "progress": False}
    before = seeded(model.get_normalized_expression, **options)
    model.minify_adata(minified_data_type="latent_posterior_parameters_with_counts")
    after = seeded(model.get_normalized_expression, **options)
    np.testing.assert_allclose(after.to_numpy(), before.to_numpy(), rtol=1e-3)


def test_inference_mode_and_interrupts(plain):
    kwargs = {"indices": CELLS, "weights": "adapted", **QUICK}
    before = seeded(plain.get_normalized_expression, **kwargs)
    with torch.inference_mode():
        inside = seeded(plain.get_normalized_expression, **kwargs)
    pd.testing.assert_frame_equal(inside, before)

    def loader():
        yield from plain._make_data_loader(adata=plain.adata, indices=CELLS)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plain.get_normalized_expression(dataloader=loader(), weights="adapted", **QUICK)
    pd.testing.assert_frame_equal(seeded(plain.get_normalized_expression, **kwargs), before)


def test_cells_that_cannot_be_trusted_are_told_of_once(plain, monkeypatch):
    monkeypatch.setattr(adapted_module, "_LARGEST_K", -100.0)
    calls = {
        "draws": lambda: plain.get_normalized_expression(indices=CELLS, weights="adapted", **QUICK),
        "overall": lambda: plain.get_normalized_expression(
            indices=CELLS, weights="adapted", n_samples_overall=5, **QUICK
        ),
        "differences": lambda: plain.differential_expression(
            idx1=[0], idx2=[1], weights="adapted", silent=True, importance_weighting_kwargs=QUICK
        ),
        "likelihood": lambda: plain.get_marginal_ll(indices=CELLS, proposal="adapted", **QUICK),
    }
    for name, call in calls.items():
        with pytest.warns(UserWarning, match="for 100% of the cells") as warned:
            call()
        assert len(warned) == 1, name
        assert warned[0].filename == __file__, name


def test_progress_bars(plain, capsys):
    options = {name: value for name, value in QUICK.items() if name != "progress"}
    groups = {"idx1": [0], "idx2": [1], "n_samples_overall": 10, "weights": "adapted"}
    plain.get_normalized_expression(indices=CELLS, weights="adapted", **options)
    assert "3/3" in capsys.readouterr().err
    plain.differential_expression(**groups, importance_weighting_kwargs=options)
    assert "Adapting" in capsys.readouterr().err
    plain.differential_expression(**groups, silent=True, importance_weighting_kwargs=options)
    assert capsys.readouterr().err == ""
