"""Minified data, and queries mapped to a reference."""

import numpy as np
import pytest
import torch

from fitting import BATCH, WORKING, fit, seeded, train
from mixscvi import MixSCVI

MINIFIED = ["latent_posterior_parameters", "latent_posterior_parameters_with_counts"]


@pytest.mark.parametrize("kwargs", WORKING.values(), ids=WORKING)
@pytest.mark.parametrize("kind", MINIFIED)
def test_minify(kind, kwargs, make_adata, tmp_path):
    adata = make_adata()
    counts = adata.X.copy()
    model = fit(MixSCVI, adata, BATCH, n_components=3, **kwargs)
    mixture = model.get_latent_mixture()

    def observe():
        return [
            model.get_latent_representation(),
            model.get_latent_representation(representation="parameters"),
            seeded(model.get_normalized_expression, n_samples=3, return_numpy=True),
            seeded(model.posterior_predictive_sample, n_samples=2).todense(),
        ]

    before = observe()
    model.minify_adata(minified_data_type=kind)
    assert model.minified_data_type == kind
    after = observe()
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.get_latent_mixture().scale, mixture.scale, rtol=1e-5)
    np.testing.assert_array_equal(adata.X, counts)
    if kind == MINIFIED[0]:
        assert model.adata.X.sum() == 0
        with pytest.raises(ValueError, match="minified"):
            model.get_marginal_ll()
        with pytest.raises(ValueError, match="minified"):
            model.get_elbo()
    else:
        np.testing.assert_array_equal(np.asarray(model.adata.X), counts)

    model.save(tmp_path / "model", save_anndata=True)
    loaded = MixSCVI.load(tmp_path / "model", accelerator="cpu")
    np.testing.assert_allclose(loaded.get_latent_representation(), before[0], atol=1e-5)

    model.minify_adata(minified_data_type=kind)  # as when a cell of a notebook runs again
    for one, other in zip(after, observe(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    if kind == MINIFIED[0]:
        with pytest.raises(ValueError, match="which minification has taken away already"):
            model.minify_adata(minified_data_type=MINIFIED[1])


def test_minify_takes_the_usual_recipe(make_adata):
    """scvi-tools' tutorial stores mean and variance first; a mixture is more than those."""
    model = fit(MixSCVI, make_adata(), n_components=3)
    mixture = model.get_latent_mixture()
    mean, variance = model.get_latent_representation(return_dist=True)
    model.adata.obsm["X_latent_qzm"], model.adata.obsm["X_latent_qzv"] = mean, variance
    model.minify_adata()
    np.testing.assert_allclose(model.get_latent_mixture().loc, mixture.loc, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.get_latent_representation(), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("encode_covariates", [False, True])
@pytest.mark.parametrize("component_encoder", ["separate", "amortized"])
def test_query_data(encode_covariates, component_encoder, make_adata):
    kwargs = {"encode_covariates": encode_covariates, "component_encoder": component_encoder}
    reference = make_adata()
    model = fit(MixSCVI, reference, BATCH, n_components=3, n_layers=2, **kwargs)
    latent = model.get_latent_representation()
    old = {name: value.clone() for name, value in model.module.state_dict().items()}

    query = make_adata(n_obs=40, seed=3, batches=("new",))
    mapped = MixSCVI.load_query_data(query, model, accelerator="cpu", freeze_batchnorm_decoder=True)
    start = {name: value.clone() for name, value in mapped.module.state_dict().items()}
    train(mapped, plan_kwargs={"weight_decay": 0.0})
    assert np.isfinite(mapped.get_latent_representation()).all()
    assert mapped.get_latent_representation().shape == (40, 3)

    moved = set()
    for name, parameter in mapped.module.named_parameters():
        known = old[name]
        kept = parameter[tuple(slice(n) for n in known.shape)]
        assert torch.equal(kept, known), name
        if not torch.equal(parameter, start[name]):
            moved.add(name)
    assert any(name.startswith("decoder") for name in moved)
    assert any(name.startswith("z_encoder") for name in moved) == encode_covariates
    # The reference keeps its place, so query and reference can be shown together.
    np.testing.assert_allclose(mapped.get_latent_representation(make_adata()), latent, atol=1e-5)
    np.testing.assert_array_equal(model.get_latent_representation(), latent)


@pytest.mark.parametrize("n_components", [1, 3])
def test_the_encoder_learns_a_query_of_one_batch(n_components, make_adata):
    """Normalized by its own statistics, a minibatch of one batch would hide what the batch adds."""
    kwargs = {"encode_covariates": True, "n_components": n_components}
    model = fit(MixSCVI, make_adata(), BATCH, **kwargs)
    query = make_adata(n_obs=40, seed=3, batches=("new",))
    mapped = MixSCVI.load_query_data(query, model, accelerator="cpu")
    encoder = mapped.module.z_encoder
    start = {name: value.clone() for name, value in encoder.named_parameters()}
    train(mapped, plan_kwargs={"lr": 0.1, "weight_decay": 0.0})
    moved = [(p.detach() - start[name]).abs().max() for name, p in encoder.named_parameters()]
    assert max(moved) > 0.01


@pytest.mark.parametrize(
    "options",
    [
        {"component_encoder": "separate"},
        {"component_encoder": "amortized", "batch_representation": "embedding"},
        {"prior": "vamp", "n_prior_components": 6},
        {"n_components": 1, "dropout_rate": 0.1},
    ],
    ids=["separate", "embedding", "vamp", "one"],
)
@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"freeze_dropout": True, "freeze_expression": False},
        {"freeze_decoder_first_layer": False, "freeze_batchnorm_encoder": False},
        {"unfrozen": True},
    ],
    ids=["default", "expression", "decoder", "unfrozen"],
)
def test_a_loaded_query_trains_what_it_trained_before(flags, options, make_adata, tmp_path):
    options = {"n_components": 3, "encode_covariates": True, "n_layers": 2} | options
    reference = fit(MixSCVI, make_adata(), BATCH, **options)
    query = make_adata(n_obs=40, seed=3, batches=("new",))
    mapped = MixSCVI.load_query_data(query, reference, accelerator="cpu", **flags)
    mapped.save(tmp_path / "mapped")
    loaded = MixSCVI.load(tmp_path / "mapped", query.copy(), accelerator="cpu")
    loaded.save(tmp_path / "again")
    again = MixSCVI.load(tmp_path / "again", query.copy(), accelerator="cpu")
    start = mapped.module.state_dict()
    before = {name: value.clone() for name, value in start.items()}
    for model in (mapped, loaded, again):
        seeded(train, model, plan_kwargs={"weight_decay": 0.0})
    moved = 0
    for name, value in mapped.module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], value), name
        assert torch.equal(again.module.state_dict()[name], value), name
        moved += not torch.equal(value, before[name])
    assert 0 < moved
    if not flags:
        assert moved < len(before) / 2


@pytest.mark.parametrize("n", ["x", 1.5, None, -1, 10**6])
def test_embeddings_that_a_file_freezes_are_those_that_there_are(n, make_adata, tmp_path):
    reference = fit(MixSCVI, make_adata(), BATCH, batch_representation="embedding")
    query = make_adata(n_obs=40, seed=3, batches=("new",))
    mapped = MixSCVI.load_query_data(query, reference, accelerator="cpu")
    mapped.surgery_["embeddings"] = dict.fromkeys(mapped.surgery_["embeddings"], n)
    mapped.save(tmp_path / "mapped")
    with pytest.raises(ValueError, match=r"model\.pt was tampered with.*number of categories"):
        MixSCVI.load(tmp_path / "mapped", query, accelerator="cpu")


def test_query_data_from_a_saved_reference(make_adata, tmp_path):
    model = fit(MixSCVI, make_adata(), BATCH, n_components=3, prior="mog", n_flow_steps=1)
    model.save(tmp_path / "model")
    query = make_adata(n_obs=40, seed=3, batches=("new",))
    mapped = MixSCVI.load_query_data(query, str(tmp_path / "model"), accelerator="cpu")
    train(mapped, plan_kwargs={"weight_decay": 0.0})
    state = mapped.module.state_dict()
    for name, value in model.module.state_dict().items():
        if name.startswith(("prior", "flow")):
            assert torch.equal(state[name], value), name
    assert np.isfinite(mapped.get_marginal_ll(n_mc_samples=30))


def test_minified_data_train_the_decoder_alone(make_adata):
    model = fit(MixSCVI, make_adata(), n_components=3)
    model.minify_adata(minified_data_type=MINIFIED[1])
    before = {name: p.detach().clone() for name, p in model.module.named_parameters()}
    plan = {"update_only_decoder": True, "weight_decay": 0.0}
    train(model, max_epochs=1, plan_kwargs=plan)
    moved = {
        name for name, p in model.module.named_parameters() if not torch.equal(p, before[name])
    }
    assert moved
    assert all(name.startswith(("decoder", "px_r")) for name in moved)


def test_new_batches_leave_the_prior_of_the_reference(make_adata):
    adata = make_adata()
    options = {"prior": "vamp", "n_prior_components": 6, "encode_covariates": True}
    setup = {"batch_key": "batch"}
    model = fit(MixSCVI, adata, setup, n_components=2, **options)
    query = make_adata(seed=3)
    query.obs["batch"] = "new"
    mapped = MixSCVI.load_query_data(query, model)
    _, before = model.module.prior.pseudo_inputs()
    _, after = mapped.module.prior.pseudo_inputs()
    assert after.shape[1] == before.shape[1] + 1
    torch.testing.assert_close(after[:, :-1], before)
    assert (after[:, -1] == 0).all()


@pytest.mark.parametrize("saved", [False, True])
def test_a_query_trains_whole_with_the_prior_of_the_reference(saved, make_adata, tmp_path):
    """Weight decay reaches all of a VampPrior's parameters, also those of batches it lacks."""
    options = {"prior": "vamp", "n_prior_components": 6, "encode_covariates": True}
    model = fit(MixSCVI, make_adata(), {"batch_key": "batch"}, n_components=2, **options)
    query = make_adata(seed=3)
    query.obs["batch"] = "new"
    reference = model
    if saved:
        reference = str(tmp_path / "reference")
        model.save(reference)
    mapped = MixSCVI.load_query_data(query, reference, unfrozen=True)
    train(mapped, max_epochs=4, plan_kwargs={"weight_decay": 1e-3})
    for name, parameter in mapped.module.named_parameters():
        assert parameter.isfinite().all(), name
    _, weights = mapped.module.prior.pseudo_inputs()
    assert (weights[:, -1] == 0).all()
    assert np.isfinite(mapped.get_latent_representation()).all()
    mapped.save(tmp_path / "mapped")
    again = MixSCVI.load(tmp_path / "mapped", adata=query)
    assert torch.equal(again.module.prior.pseudo_inputs()[1], weights)


@pytest.mark.parametrize("n_components", [1, 3])
def test_minified_data_without_counts_train_nothing(n_components, make_adata):
    model = fit(MixSCVI, make_adata(), n_components=n_components)
    model.minify_adata()
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    with pytest.raises(ValueError, match=r"train\(\) needs the cells' counts"):
        train(model, max_epochs=1)
    for name, value in model.module.state_dict().items():
        assert torch.equal(value, before[name]), name
