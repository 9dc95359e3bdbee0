"""What SCVI does, MixSCVI does; and what it does better on purpose."""

import warnings

import numpy as np
import pytest
import scvi
import torch
from scipy import sparse
from scvi.dataloaders import DataSplitter
from scvi.model import SCANVI, SCVI

from fitting import BATCH, SMALL, fit, seeded, train
from mixscvi import MixSCVI

KEYS = ("_scvi_latent_qzm", "_scvi_latent_qzv")


@pytest.mark.parametrize("n_components", [1, 3])
@pytest.mark.filterwarnings("ignore:Model was initialized without `adata`:UserWarning")
def test_a_model_without_data(n_components, make_adata):
    adata = make_adata()
    MixSCVI.setup_anndata(adata, batch_key="batch")
    manager = MixSCVI._get_most_recent_anndata_manager(adata)
    module = DataSplitter(manager, train_size=0.75, batch_size=32)
    module.n_vars, module.n_batch = adata.n_vars, 2
    model = MixSCVI(n_components=n_components, use_observed_lib_size=True, **SMALL)
    assert model.module is None
    assert model.adata is None
    with pytest.raises(ValueError, match="max_epochs"):
        model.train(datamodule=module)
    with pytest.raises(AttributeError, match="the model holds no data: give datamodule"):
        model.train()
    train(model, datamodule=module, max_epochs=1)
    assert model.module.n_components == n_components
    assert model.is_trained


METHODS_THAT_READ_CELLS = (
    "differential_expression",
    "get_active_units",
    "get_adapted_posterior",
    "get_component_diagnostics",
    "get_latent_representation",
    "get_marginal_ll",
    "get_posterior_diagnostics",
)


@pytest.mark.filterwarnings("ignore:Model was initialized without `adata`:UserWarning")
def test_a_model_without_data_says_what_it_lacks(make_adata, tmp_path):
    adata = make_adata()
    MixSCVI.setup_anndata(adata, batch_key="batch")
    manager = MixSCVI._get_most_recent_anndata_manager(adata)
    module = DataSplitter(manager, train_size=0.75, batch_size=32)
    module.n_vars, module.n_batch = adata.n_vars, 2
    model = MixSCVI(n_components=2, **SMALL)
    for name in METHODS_THAT_READ_CELLS:
        with pytest.raises(RuntimeError, match="untrained"):
            getattr(model, name)(adata)
    with pytest.raises(RuntimeError, match="untrained"):
        model.save(tmp_path / "model")
    train(model, datamodule=module, max_epochs=1)
    for name in METHODS_THAT_READ_CELLS:
        with pytest.raises(ValueError, match="made without data.*give dataloader"):
            getattr(model, name)(adata)
    with pytest.raises(ValueError, match="made without data"):
        model.save(tmp_path / "model", datamodule=module)
    assert not list(tmp_path.iterdir())
    latent = model.get_latent_representation(dataloader=module.train_dataloader())
    assert latent.shape == (len(model.train_indices), SMALL["n_latent"])


@pytest.mark.filterwarnings("ignore:Model was initialized without `adata`:UserWarning")
def test_a_model_without_data_keeps_all_its_arguments():
    model = MixSCVI(use_observed_lib_size=False)
    assert model._module_kwargs["use_observed_lib_size"] is False


@pytest.mark.parametrize("n_components", [1, 3])
def test_early_stopping_needs_validation_cells(n_components, make_adata):
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    model = MixSCVI(adata, n_components=n_components, **SMALL)
    with pytest.raises(ValueError, match="'elbo_validation', but no cells are held out"):
        train(model, train_size=1.0, early_stopping=True)


def test_external_indices(make_adata):
    adata = make_adata()
    parts = np.split(np.random.default_rng(0).permutation(adata.n_obs), [40, 60])
    model = fit(
        MixSCVI,
        adata,
        n_components=2,
        train_kwargs={"datasplitter_kwargs": {"external_indexing": parts}},
    )
    for got, expected in zip(
        (model.train_indices, model.validation_indices, model.test_indices), parts, strict=True
    ):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("n_components", [1, 3])
def test_every_training_is_in_training_mode(n_components, make_adata, tmp_path):
    adata = make_adata()
    model = fit(MixSCVI, adata, BATCH, n_components=n_components)
    model.save(tmp_path / "model")
    loaded = MixSCVI.load(tmp_path / "model", adata=adata, accelerator="cpu")
    query = make_adata(n_obs=40, seed=3, batches=("new",))
    mapped = MixSCVI.load_query_data(query, model, accelerator="cpu")
    for one in (model, loaded, mapped):
        modes = []
        handle = one.module.register_forward_pre_hook(lambda m, _, to=modes: to.append(m.training))
        train(one, max_epochs=1)
        handle.remove()
        assert modes
        assert all(modes)
        assert not one.module.training


def without_counts(adata, library=True):
    bare = adata.copy()
    if library:
        bare.obs["observed_lib_size"] = np.asarray(adata.X.sum(1)).ravel()
    bare.X = sparse.csr_matrix(bare.shape, dtype=np.float32)
    return bare


@pytest.mark.parametrize("n_components", [1, 3])
def test_data_whose_counts_are_gone(n_components, make_adata, tmp_path):
    adata = make_adata()
    model = fit(MixSCVI, adata, BATCH, n_components=n_components)
    mean = model.get_latent_representation()
    expression = seeded(model.get_likelihood_parameters)["mean"]
    loc, scale = model.get_latent_mixture()
    bare = without_counts(adata)
    for key, value in zip(KEYS, (loc, scale**2), strict=True):
        bare.obsm[key] = value.reshape(len(value), -1)
    model.save(tmp_path / "model")
    loaded = MixSCVI.load(tmp_path / "model", adata=bare, accelerator="cpu")
    with pytest.raises(ValueError, match=r"call minify_adata\(\) first"):
        loaded.get_latent_representation()
    loaded.minify_adata(use_latent_qzm_key=KEYS[0], use_latent_qzv_key=KEYS[1])
    np.testing.assert_allclose(loaded.get_latent_representation(), mean, atol=1e-5)
    np.testing.assert_allclose(
        seeded(loaded.get_likelihood_parameters)["mean"], expression, rtol=1e-4, atol=1e-5
    )


def test_data_whose_counts_are_gone_with_moments_alone(make_adata, tmp_path):
    adata = make_adata()
    model = fit(MixSCVI, adata, BATCH, n_components=3)
    mean, variance = model.get_latent_representation(return_dist=True)
    bare = without_counts(adata, library=False)
    bare.obsm[KEYS[0]], bare.obsm[KEYS[1]] = mean, variance
    model.save(tmp_path / "model")
    loaded = MixSCVI.load(tmp_path / "model", adata=bare, accelerator="cpu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded.minify_adata(use_latent_qzm_key=KEYS[0], use_latent_qzv_key=KEYS[1])
    said = " ".join(str(warning.message) for warning in caught)
    assert "one Gaussian, not 3" in said
    assert "no library sizes in obs['observed_lib_size']" in said
    np.testing.assert_allclose(loaded.get_latent_representation(), mean, atol=1e-5)
    bare.obsm[KEYS[0]] = mean[:, :2]
    again = MixSCVI.load(tmp_path / "model", adata=bare, accelerator="cpu")
    with pytest.raises(ValueError, match=r"n_latent=3 columns, or .*=9, got 2"):
        again.minify_adata(use_latent_qzm_key=KEYS[0], use_latent_qzv_key=KEYS[1])


@pytest.mark.parametrize("likelihood", ["fused", "reference"])
def test_scanvi_takes_one_component(likelihood, make_adata):
    adata = make_adata()
    setup = {"batch_key": "batch", "labels_key": "label"}
    model = fit(MixSCVI, adata, setup, n_components=1, likelihood=likelihood)
    scanvi = SCANVI.from_scvi_model(model, unlabeled_category="unknown")
    ours = model.module.state_dict()
    shared = [name for name in scanvi.module.state_dict() if name in ours]
    assert len(shared) > 10
    assert all(torch.equal(scanvi.module.state_dict()[name], ours[name]) for name in shared)
    train(scanvi, max_epochs=1)
    assert len(scanvi.predict()) == adata.n_obs


def test_scanvi_of_a_mixture_is_an_error_that_names_it(make_adata):
    adata = make_adata()
    model = fit(MixSCVI, adata, {"labels_key": "label"}, n_components=3)
    with pytest.raises(TypeError, match="SCANVI has one Gaussian .*n_components=3"):
        SCANVI.from_scvi_model(model, unlabeled_category="unknown")


ENCODERS = ["separate", "amortized"]


@pytest.mark.parametrize("component_encoder", ENCODERS)
@pytest.mark.parametrize("prior", ["normal", "mog", "vamp"])
@pytest.mark.parametrize("batches", [("n0",), ("b1", "n0", "n1")], ids=["one new", "several"])
def test_surgery_after_save_and_load(batches, prior, component_encoder, make_adata, tmp_path):
    """What scArches freezes stays frozen, twice over."""
    options = {"prior": prior, "n_prior_components": 5, "encode_covariates": True}
    model = fit(
        MixSCVI,
        make_adata(),
        BATCH,
        n_components=2,
        component_encoder=component_encoder,
        **options,
    )
    reference = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    model.save(tmp_path / "reference")
    query = make_adata(n_obs=40, seed=3, batches=batches)
    mapped = MixSCVI.load_query_data(query, tmp_path / "reference", accelerator="cpu")
    train(mapped, plan_kwargs={"weight_decay": 0.0})
    mapped.save(tmp_path / "mapped")
    again = MixSCVI.load_query_data(
        make_adata(n_obs=30, seed=4, batches=("last",)), tmp_path / "mapped", accelerator="cpu"
    )
    train(again, plan_kwargs={"weight_decay": 0.0})
    for name, parameter in again.module.named_parameters():
        if name.endswith(("bias", "px_r")) or ".1." in name:
            continue
        known = reference[name]
        moves = ("decoder",) if prior == "vamp" else ("decoder", "z_encoder")
        if len(batches) > 1 and name.startswith(moves):
            known = known[..., : known.shape[-1] - 2]  # the batch of the query's that is known
        kept = parameter[tuple(slice(n) for n in known.shape)]
        assert torch.equal(kept, known), name
    assert np.isfinite(again.get_latent_representation()).all()
    assert np.isfinite(again.get_marginal_ll(n_mc_samples=4))


@pytest.mark.parametrize("n_components", [1, 3])
@pytest.mark.parametrize("batches", [("only",), ("b0", "b1")], ids=["one batch", "two batches"])
def test_the_reference_keeps_its_place_before_training(batches, n_components, make_adata):
    """With further covariates too, whose weights scvi-tools gives to the new batch."""
    adata = make_adata(batches=batches)
    setup = {"batch_key": "batch", "categorical_covariate_keys": ["donor", "label"]}
    options = {"encode_covariates": True, "n_layers": 2}
    model = fit(MixSCVI, adata, setup, n_components=n_components, **options)
    query = make_adata(n_obs=40, seed=3, batches=("new", "newer"))
    query.obs["donor"] = "other"
    mapped = MixSCVI.load_query_data(query, model, accelerator="cpu")
    mapped.is_trained_ = True
    other = make_adata(batches=batches)
    np.testing.assert_allclose(
        mapped.get_latent_representation(other), model.get_latent_representation(), atol=1e-5
    )
    np.testing.assert_allclose(
        seeded(mapped.get_likelihood_parameters, other)["mean"],
        seeded(model.get_likelihood_parameters)["mean"],
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.parametrize("saved", [False, True])
def test_a_vamp_prior_of_one_batch_takes_a_query_with_another(saved, make_adata, tmp_path):
    setup = {"batch_key": "batch", "categorical_covariate_keys": ["donor"]}
    options = {"prior": "vamp", "n_prior_components": 5, "encode_covariates": True}
    model = fit(MixSCVI, make_adata(batches=("only",)), setup, n_components=2, **options)
    reference = model
    if saved:
        reference = tmp_path / "reference"
        model.save(reference)
    query = make_adata(n_obs=40, seed=3, batches=("new",))
    mapped = MixSCVI.load_query_data(query, reference, accelerator="cpu")
    before, after = (m.module.prior.pseudo_inputs() for m in (model, mapped))
    torch.testing.assert_close(after[0], before[0])
    torch.testing.assert_close(after[1], torch.tensor([[1.0, 0.0]]).expand(5, 2))
    torch.testing.assert_close(after[2], before[2])
    train(mapped, max_epochs=2)
    assert np.isfinite(mapped.get_latent_representation()).all()
    assert np.isfinite(mapped.get_marginal_ll(n_mc_samples=4))


@pytest.mark.parametrize("encode_covariates", [False, True])
def test_surgery_with_batch_embeddings(encode_covariates, make_adata, tmp_path):
    options = {"batch_representation": "embedding", "encode_covariates": encode_covariates}
    model = fit(MixSCVI, make_adata(), BATCH, n_components=2, **options)
    name = "_embeddings_dict.batch.weight"
    known = model.module.state_dict()[name].clone()
    model.save(tmp_path / "reference")
    query = make_adata(n_obs=40, seed=3, batches=("new",))
    mapped = MixSCVI.load_query_data(query, tmp_path / "reference", accelerator="cpu")
    start = mapped.module.state_dict()[name].clone()
    train(mapped, plan_kwargs={"weight_decay": 0.0})
    table = mapped.module.state_dict()[name]
    assert torch.equal(table[:2], known)
    assert not torch.equal(table[2:], start[2:])
    assert mapped.get_latent_representation().shape == (40, 3)


@pytest.mark.parametrize("n_components", [1, 4])
@pytest.mark.parametrize("kwargs", [{}, {"prior": "mog", "n_flow_steps": 1}], ids=["", "flow"])
def test_predictive_samples_of_minified_data_are_the_same(n_components, kwargs, make_adata):
    model = fit(MixSCVI, make_adata(), BATCH, n_components=n_components, **kwargs)
    before = seeded(model.posterior_predictive_sample, n_samples=3).todense()
    shape = model.get_latent_mixture().loc.shape
    model.minify_adata()
    assert model.get_latent_mixture().loc.shape == shape
    after = seeded(model.posterior_predictive_sample, n_samples=3).todense()
    np.testing.assert_array_equal(after, before)


def test_a_second_training_differs_from_scvis_on_purpose(make_adata):
    """SCVI's second training is in evaluation mode; put into training mode, it is ours."""
    adata = make_adata()
    ours = fit(MixSCVI, adata, n_components=1, likelihood="reference")
    theirs = fit(SCVI, adata)
    theirs.module.train()
    for model in (ours, theirs):
        scvi.settings.seed = 3
        train(model, max_epochs=1)
    np.testing.assert_array_equal(
        ours.get_latent_representation(), theirs.get_latent_representation()
    )
