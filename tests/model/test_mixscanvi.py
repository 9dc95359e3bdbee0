"""MixSCANVI: with one component SCANVI, with several its methods; made of trained models."""

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from scvi.model import SCANVI, SCVI

from fitting import BATCH, SMALL, assert_same_history, assert_same_state, fit, seeded, train
from mixscvi import MixSCANVI, MixSCVI

UNLABELED = "unlabeled"
SETUP = {"labels_key": "label", "unlabeled_category": UNLABELED}
WITH_BATCH = {**SETUP, **BATCH}
COVARIATES = {
    **WITH_BATCH,
    "categorical_covariate_keys": ["donor"],
    "continuous_covariate_keys": ["age", "depth"],
}
# Validation, so that its metrics are compared too.
VALIDATED = {"max_epochs": 3, "check_val_every_n_epoch": 1}
LEARN = {"max_epochs": 25, "plan_kwargs": {"lr": 1e-2, "n_epochs_kl_warmup": 1}}


@pytest.fixture
def make_labeled(make_adata):
    def make(unlabeled="b1", **kwargs):
        adata = make_adata(**kwargs)
        adata.obs["type"] = adata.obs["label"]
        adata.obs["label"] = adata.obs["label"].where(adata.obs["batch"] != unlabeled, UNLABELED)
        return adata

    return make


@pytest.fixture(autouse=True)
def quiet():
    """scvi-tools announces every semi-supervised training."""
    verbosity = scvi.settings.verbosity
    scvi.settings.verbosity = 40
    yield
    scvi.settings.verbosity = verbosity


CONFIGURATIONS = {
    "zinb, dense": ({}, SETUP, {}),
    "zinb, gene-batch, sparse": ({"sparse": True}, WITH_BATCH, {"dispersion": "gene-batch"}),
    "nb, 2 layers, linear classifier": (
        {},
        WITH_BATCH,
        {"gene_likelihood": "nb", "n_layers": 2, "linear_classifier": True},
    ),
    "poisson, layer": (
        {"layer": "counts", "sparse": True},
        {**SETUP, "layer": "counts"},
        {"gene_likelihood": "poisson"},
    ),
    "encoded covariates": ({}, COVARIATES, {"encode_covariates": True}),
    "modeled library": ({}, WITH_BATCH, {"use_observed_lib_size": False}),
    "all labeled": ({"unlabeled": None}, {**WITH_BATCH, "size_factor_key": "factor"}, {}),
}


@pytest.fixture(params=CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def configuration(request):
    return request.param


def test_one_component_is_scanvi(configuration, make_labeled, tmp_path):
    data, setup, kwargs = configuration
    adata = make_labeled(**data)
    kwargs = {**kwargs, "train_kwargs": VALIDATED}
    ours = fit(MixSCANVI, adata, setup, n_components=1, likelihood="reference", **kwargs)
    theirs = fit(SCANVI, adata, setup, **kwargs)
    assert_same_history(ours, theirs)
    assert_same_state(ours, theirs)
    assert {"train_accuracy", "validation_accuracy"} <= set(ours.history)
    for arguments in ({}, {"indices": [5, 1]}, {"use_posterior_mean": False}):
        got, expected = (seeded(m.predict, **arguments) for m in (ours, theirs))
        assert got.dtype == expected.dtype
        assert np.array_equal(got, expected)
        got, expected = (seeded(m.predict, soft=True, **arguments) for m in (ours, theirs))
        pd.testing.assert_frame_equal(got, expected, check_exact=True)
    for method in ("get_latent_representation", "get_elbo"):
        got, expected = (np.asarray(seeded(getattr(m, method))) for m in (ours, theirs))
        assert np.array_equal(got, expected)
    got, expected = (seeded(m.get_normalized_expression, return_numpy=True) for m in (ours, theirs))
    assert np.array_equal(got, expected)

    theirs.save(tmp_path / "scanvi")
    with pytest.raises(ValueError, match="allow_pickle=True"):
        MixSCANVI.load(tmp_path / "scanvi", adata=adata)
    loaded = MixSCANVI.load(tmp_path / "scanvi", adata=adata, allow_pickle=True)
    assert loaded.module.n_components == 1
    np.testing.assert_array_equal(loaded.predict(soft=True), theirs.predict(soft=True))


def test_one_component_is_scanvi_to_rounding(configuration, make_labeled):
    data, setup, kwargs = configuration
    adata = make_labeled(**data)
    kwargs = {**kwargs, "train_kwargs": VALIDATED}
    ours = fit(MixSCANVI, adata, setup, n_components=1, **kwargs)
    theirs = fit(SCANVI, adata, setup, **kwargs)
    assert set(ours.history) == set(theirs.history)
    for name, value in ours.module.state_dict().items():
        expected = theirs.module.state_dict()[name]
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=2e-5, msg=name)
    np.testing.assert_allclose(ours.predict(soft=True), theirs.predict(soft=True), atol=1e-4)


OPTIONS = {
    "separate": {},
    "amortized, some-to-all": {"component_encoder": "amortized", "estimator": "some_to_all"},
    "some-to-some": {"estimator": "some_to_some", "n_sampled_components": 2},
    "flow": {"n_flow_steps": 1},
    "2 samples": {"n_samples": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_three_components(options, make_labeled, tmp_path):
    adata = make_labeled(sparse=True)
    model = fit(MixSCANVI, adata, WITH_BATCH, n_components=3, train_kwargs=VALIDATED, **options)
    reference = fit(SCANVI, make_labeled(), WITH_BATCH, train_kwargs=VALIDATED)
    assert set(model.history) == set(reference.history)
    for key, values in model.history.items():
        assert np.isfinite(values.to_numpy(dtype=float)).all(), key

    soft, hard = model.predict(soft=True), model.predict()
    assert sorted(soft.columns) == ["type0", "type1", "type2"]
    assert soft.index.equals(adata.obs_names)
    np.testing.assert_allclose(soft.sum(axis=1), 1, rtol=1e-5)
    assert np.array_equal(hard, soft.idxmax(axis=1))
    cells = np.array([7, 0, 3])
    np.testing.assert_allclose(model.predict(indices=cells, soft=True), soft.iloc[cells], rtol=1e-4)
    mask = np.arange(len(adata)) < 4
    np.testing.assert_allclose(model.predict(indices=mask, soft=True), soft[mask], rtol=1e-4)
    one, other = (model.predict(soft=True, use_posterior_mean=False) for _ in range(2))
    assert (one.to_numpy() != other.to_numpy()).any()
    loader = model._make_data_loader(adata, batch_size=30)
    from_loader = model.predict(dataloader=loader, soft=True)
    np.testing.assert_allclose(from_loader, soft, rtol=1e-4)
    assert from_loader.index.equals(pd.RangeIndex(len(adata)))

    loc, scale = model.get_latent_mixture()
    assert loc.shape == (len(adata), 3, 3)
    if not options.get("n_flow_steps"):
        with torch.no_grad():
            scores = model.module.classifier(torch.from_numpy(loc).flatten(0, 1)).softmax(-1)
        mean = scores.view(len(adata), 3, 3).mean(1)
        np.testing.assert_allclose(soft, mean, rtol=1e-4)

    elbo = np.asarray(seeded(model.get_elbo, return_mean=False))
    log_px = seeded(model.get_marginal_ll, return_mean=False, n_mc_samples=600).numpy()
    assert (log_px - elbo).mean() > 0
    adapted = model.get_posterior_diagnostics(indices=[0, 1, 2], proposal="adapted", progress=False)
    assert np.isfinite(adapted["log_likelihood"]).all()
    np.testing.assert_allclose(adapted["log_likelihood"], log_px[:3], atol=2)
    expression = model.get_normalized_expression(
        indices=[0, 1], n_samples=25, weights="adapted", progress=False, return_numpy=True
    )
    np.testing.assert_allclose(expression.sum(1), 1, rtol=1e-3)
    table = model.differential_expression(groupby="type", mode="change", silent=True)
    assert len(table) == 3 * adata.n_vars
    assert "n_components: 3" in model._model_summary_string

    model.save(tmp_path / "model", save_anndata=True)
    for given in (None, make_labeled(sparse=True), False):
        loaded = MixSCANVI.load(tmp_path / "model", adata=given, accelerator="cpu")
        assert_same_state(loaded, model)
        cells = make_labeled() if given is False else None
        np.testing.assert_allclose(loaded.predict(cells, soft=True), soft, rtol=1e-4)


@pytest.mark.parametrize("n_components", [1, 3])
def test_labels_are_learned(n_components, make_labeled):
    adata = make_labeled(n_obs=240)
    pretrained = fit(MixSCVI, adata, BATCH, n_components=n_components, n_hidden=32, n_latent=4,
                     train_kwargs={**LEARN, "max_epochs": 15})  # fmt: skip
    model = MixSCANVI.from_scvi_model(pretrained, UNLABELED, labels_key="label")
    assert model.was_pretrained
    train(model, **LEARN)
    unlabeled = np.flatnonzero(adata.obs["label"] == UNLABELED)
    predicted = model.predict(indices=unlabeled)
    assert (predicted == adata.obs["type"].iloc[unlabeled]).mean() > 0.85
    # What it is sure of is right more often than chance would have it.
    confidence = model.predict(indices=unlabeled, soft=True).max(axis=1)
    assert confidence.mean() > 0.6


SOURCES = {
    "three components": {"n_components": 3},
    "one component": {"n_components": 1},
    "one component, reference": {"n_components": 1, "likelihood": "reference"},
    "flow": {"n_components": 2, "n_flow_steps": 1},
    "gene-batch, 2 layers": {"n_components": 2, "n_layers": 2, "dispersion": "gene-batch"},
}


@pytest.mark.parametrize("kwargs", SOURCES.values(), ids=SOURCES)
def test_from_a_trained_mixture(kwargs, make_labeled):
    adata = make_labeled()
    pretrained = fit(MixSCVI, adata, BATCH, **kwargs)
    before = {name: value.clone() for name, value in pretrained.module.state_dict().items()}
    model = MixSCANVI.from_scvi_model(pretrained, UNLABELED, "label", linear_classifier=True)
    state = model.module.state_dict()
    for name, value in before.items():
        assert torch.equal(state[name], value), name
    assert model.module.n_components == kwargs["n_components"]
    assert model.module.mixture.likelihood == kwargs.get("likelihood", "fused")
    assert not model.is_trained
    train(model)
    for name, value in pretrained.module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert len(model.predict()) == len(adata)


def test_from_a_model_of_scvi_tools(make_labeled):
    adata = make_labeled()
    pretrained = fit(SCVI, adata, {**BATCH, "labels_key": "label"})
    ours = seeded(MixSCANVI.from_scvi_model, pretrained, UNLABELED, likelihood="reference")
    theirs = seeded(SCANVI.from_scvi_model, pretrained, UNLABELED)
    assert_same_state(ours, theirs)
    for model in (ours, theirs):
        seeded(train, model, **VALIDATED)
    assert_same_history(ours, theirs)
    assert_same_state(ours, theirs)


def test_from_other_cells(make_labeled):
    pretrained = fit(MixSCVI, make_labeled(), BATCH, n_components=2)
    cells = make_labeled(n_obs=48)
    model = MixSCANVI.from_scvi_model(pretrained, UNLABELED, "label", adata=cells)
    assert model.adata is cells
    with pytest.raises(ValueError, match=r"other categories of batch .*\['b0'\] and \['b0', 'b1'"):
        MixSCANVI.from_scvi_model(
            pretrained, UNLABELED, "label", adata=make_labeled(batches=("b0",))
        )


def test_what_cannot_be_pretrained(make_labeled):
    adata = make_labeled()
    setup = {**BATCH, "labels_key": "label"}
    MixSCVI.setup_anndata(adata, **setup)
    with pytest.raises(RuntimeError, match="scvi_model is not trained"):
        MixSCANVI.from_scvi_model(MixSCVI(adata, n_components=2), UNLABELED)
    with pytest.raises(TypeError, match=r"scvi_model must be a scvi.model.SCVI, got int"):
        MixSCANVI.from_scvi_model(3, UNLABELED)
    vamp = fit(MixSCVI, adata, setup, n_components=2, prior="vamp", n_prior_components=3)
    with pytest.raises(ValueError, match="prior='vamp', which the labels would replace"):
        MixSCANVI.from_scvi_model(vamp, UNLABELED)
    logistic = fit(MixSCVI, adata, setup, n_components=2, latent_distribution="ln")
    with pytest.raises(ValueError, match="latent_distribution must be 'normal' .*'ln'"):
        MixSCANVI.from_scvi_model(logistic, UNLABELED)
    without = fit(MixSCVI, adata, BATCH, n_components=2)
    with pytest.raises(TypeError, match="labels_key must name a column"):
        MixSCANVI.from_scvi_model(without, UNLABELED)
    with pytest.warns(UserWarning, match="n_hidden is that of scvi_model, 12, and stays"):
        model = MixSCANVI.from_scvi_model(without, UNLABELED, "label", n_hidden=7)
    assert model.module.classifier.classifier[-1].in_features == 12
    without.minify_adata()
    with pytest.raises(ValueError, match="scvi_model's data are minified without counts"):
        MixSCANVI.from_scvi_model(without, UNLABELED, "label")


def test_scanvi_of_a_mixture_says_what_to_use(make_labeled):
    model = fit(MixSCVI, make_labeled(), {"labels_key": "label"}, n_components=3)
    with pytest.raises(TypeError, match=r"n_components=3.*use mixscvi.MixSCANVI.from_scvi_model"):
        SCANVI.from_scvi_model(model, unlabeled_category=UNLABELED)


def test_bad_input(make_labeled):
    adata = make_labeled()
    with pytest.raises(KeyError, match="no_such_column"):
        MixSCANVI.setup_anndata(adata, "no_such_column", UNLABELED)
    with pytest.raises(TypeError, match="unlabeled_category must be the value"):
        MixSCANVI.setup_anndata(adata, "label", None)
    adata.obs["one"] = np.where(adata.obs["label"] == UNLABELED, UNLABELED, "type0")
    with pytest.raises(ValueError, match=r"at least two labels .*\['type0'\]"):
        MixSCANVI.setup_anndata(adata, "one", UNLABELED)
    adata.obs["gaps"] = adata.obs["label"].where(np.arange(len(adata)) != 4)
    with pytest.raises(ValueError, match="cell4"):
        MixSCANVI.setup_anndata(adata, "gaps", UNLABELED)
    MixSCANVI.setup_anndata(adata, **WITH_BATCH)
    with pytest.raises(TypeError, match="MixSCANVI has no argument 'prior'"):
        MixSCANVI(adata, prior="vamp")
    with pytest.raises(ValueError, match=r"dispersion='gene-label' .* 36 cells are 'unlabeled'"):
        MixSCANVI(adata, dispersion="gene-label")
    with pytest.raises(ValueError, match="n_components must be an integer of at least 1"):
        MixSCANVI(adata, n_components=0)
    with pytest.raises(RuntimeError, match="untrained model"):
        MixSCANVI(adata).predict()
    negative = make_labeled()
    negative.X[3, 2] = -1
    MixSCANVI.setup_anndata(negative, **WITH_BATCH)
    with pytest.raises(ValueError, match="cell3"):
        MixSCANVI(negative)
    model = fit(MixSCANVI, adata, WITH_BATCH, n_components=2)
    bare = make_labeled()
    del bare.obs["label"]
    with pytest.raises(KeyError, match=r"no column 'label' .* adata.obs\['label'\] = 'unlabeled'"):
        model.predict(bare)
    foreign = make_labeled()
    foreign.obs["label"] = "typeX"
    with pytest.raises(ValueError, match="typeX"):
        model.predict(foreign)


@pytest.mark.filterwarnings("ignore:Last batch will have a small size", "ignore:Category 0")
@pytest.mark.parametrize("n_components", [1, 2])
def test_no_training_minibatch_is_a_single_cell(n_components, make_labeled):
    """65 cells in minibatches of 32 would leave one; of 33 labeled cells, too."""
    adata = make_labeled(n_obs=65)
    model = fit(MixSCANVI, adata, WITH_BATCH, n_components=n_components,
                train_kwargs={"train_size": 1.0})  # fmt: skip
    assert np.isfinite(model.history["elbo_train"].to_numpy(dtype=float)).all()
    lonely = make_labeled(n_obs=64)
    lonely.obs["label"] = UNLABELED
    lonely.obs.iloc[3, lonely.obs.columns.get_loc("label")] = "type0"
    lonely.obs.iloc[4, lonely.obs.columns.get_loc("label")] = "type1"
    MixSCANVI.setup_anndata(lonely, **WITH_BATCH)
    model = MixSCANVI(lonely, n_components=n_components, n_hidden=8)
    splits = [np.setdiff1d(np.arange(64), [4]), np.array([4]), np.array([], dtype=int)]
    with pytest.raises(ValueError, match="1 training cell has a label"):
        train(model, datasplitter_kwargs={"external_indexing": splits})


@pytest.mark.parametrize("n_components", [1, 3])
@pytest.mark.parametrize(
    "kind", ["latent_posterior_parameters", "latent_posterior_parameters_with_counts"]
)
def test_minified_data(kind, n_components, make_labeled, tmp_path):
    model = fit(MixSCANVI, make_labeled(), WITH_BATCH, n_components=n_components)
    before = model.predict(soft=True)
    latents = model.get_latent_representation()
    samples = seeded(model.posterior_predictive_sample, n_samples=2).todense()
    model.minify_adata(kind)
    after = seeded(model.posterior_predictive_sample, n_samples=2).todense()
    np.testing.assert_array_equal(after, samples)
    np.testing.assert_allclose(model.predict(soft=True), before, rtol=1e-4)
    np.testing.assert_allclose(model.get_latent_representation(), latents, atol=1e-5)
    assert model.predict(soft=True, use_posterior_mean=False).shape == before.shape
    model.save(tmp_path / "model", save_anndata=True)
    loaded = MixSCANVI.load(tmp_path / "model", accelerator="cpu")
    np.testing.assert_allclose(loaded.predict(soft=True), before, rtol=1e-4)
    if kind == "latent_posterior_parameters":
        with pytest.raises(ValueError, match="minified"):
            model.get_marginal_ll()


@pytest.mark.parametrize("n_components", [1, 3])
@pytest.mark.parametrize("labels", ["none", "some", "all of one"])
@pytest.mark.parametrize("saved", [False, True])
def test_queries(saved, labels, n_components, make_labeled, make_adata, tmp_path):
    adata = make_labeled()
    reference = fit(MixSCANVI, adata, COVARIATES, n_components=n_components, encode_covariates=True)
    before = reference.predict(soft=True)
    query = make_adata(n_obs=40, seed=3, batches=("b1", "new"))
    known = query.obs["label"]
    if labels == "none":
        query.obs["label"] = UNLABELED
    elif labels == "some":
        query.obs["label"] = known.where(np.arange(40) < 10, UNLABELED)
    else:
        query.obs["label"] = "type1"
    source = reference
    if saved:
        reference.save(tmp_path / "reference")
        source = tmp_path / "reference"
    model = MixSCANVI.load_query_data(query, source)
    assert model.module.n_labels == model.n_labels == 3
    # Cells of known batches have the labels that the reference gave them.
    model.is_trained_ = True
    np.testing.assert_allclose(model.predict(adata, soft=True), before, rtol=1e-3, atol=1e-5)
    model.is_trained_ = False
    frozen = {
        name: value.clone()
        for name, value in model.module.named_parameters()
        if not value.requires_grad
    }
    assert {"classifier", "encoder_z2_z1"} <= {name.split(".")[0] for name in frozen}
    trained = {name for name, value in model.module.named_parameters() if value.requires_grad}
    assert any(name.startswith("z_encoder") for name in trained)
    model.save(tmp_path / "mapped")
    again = MixSCANVI.load(tmp_path / "mapped", query)
    for one in (model, again):
        train(one, max_epochs=1, plan_kwargs={"weight_decay": 0.0})
        for name, value in frozen.items():
            assert torch.equal(one.module.get_parameter(name), value), name
    soft = model.predict(soft=True)
    assert soft.shape == (40, 3)
    free = MixSCANVI.load_query_data(query, source, freeze_classifier=False)
    assert free.module.get_parameter("classifier.classifier.1.weight").requires_grad


def test_labels_without_cells(make_labeled):
    """They are labels, as in scvi-tools, and a warning says how to be rid of them."""
    adata = make_labeled()
    labels = adata.obs["label"].astype("category")
    adata.obs["label"] = labels.cat.set_categories(["gone", *labels.cat.categories, "never"])
    found = [y for y in labels.cat.categories if y != UNLABELED]
    expected = r"adata.obs\['label'\] has categories without cells, \['gone', 'never'\]\. .*unused"
    with pytest.warns(UserWarning, match=expected):
        MixSCANVI.setup_anndata(adata, **WITH_BATCH)
    model = MixSCANVI(adata, n_components=2, **SMALL)
    train(model)
    assert {*model.predict(soft=True)} == {*found, "gone", "never"}
    adata.obs["label"] = adata.obs["label"].cat.remove_unused_categories()
    model = fit(MixSCANVI, adata, WITH_BATCH, n_components=2)
    assert {*model.predict(soft=True)} == {*found}


def test_the_category_of_no_label_without_cells(make_labeled):
    """scvi-tools takes the last of the labels for it where it is a category before them."""
    adata = make_labeled(unlabeled=None)
    labels = adata.obs["label"].astype("category")
    names = labels.cat.categories.tolist()
    adata.obs["label"] = labels.cat.set_categories([*names, UNLABELED])
    model = fit(MixSCANVI, adata, WITH_BATCH, n_components=2)
    assert [*model.predict(soft=True)] == names
    adata.obs["label"] = labels.cat.set_categories([UNLABELED, *names])
    with pytest.raises(ValueError, match=r"='unlabeled' must be the last category of .*unused"):
        MixSCANVI.setup_anndata(adata, **WITH_BATCH)


@pytest.mark.parametrize("as_category", [False, True])
def test_labels_that_are_numbers(as_category, make_labeled):
    adata = make_labeled(unlabeled=None)
    numbers = adata.obs["label"].astype("category").cat.codes.astype(int)
    adata.obs["label"] = numbers.astype("category") if as_category else numbers
    with pytest.raises(TypeError, match=r"must be of the type of the labels .* 'unlabeled'"):
        MixSCANVI.setup_anndata(adata, **WITH_BATCH)
    model = fit(MixSCANVI, adata, WITH_BATCH | {"unlabeled_category": -1}, n_components=2)
    assert [*model.predict(soft=True)] == sorted(numbers.unique())
    adata.obs["label"] = numbers.astype(str)
    with pytest.raises(TypeError, match=r"must be of the type of the labels .* got -1"):
        MixSCANVI.setup_anndata(adata, **WITH_BATCH | {"unlabeled_category": -1})


def test_query_with_other_labels(make_labeled, make_adata):
    reference = fit(MixSCANVI, make_labeled(), WITH_BATCH, n_components=2)
    query = make_adata(batches=("new",))
    query.obs["label"] = "typeX"
    with pytest.raises(ValueError, match=r"\['typeX'\]: replace them by .*'unlabeled'"):
        MixSCANVI.load_query_data(query, reference)
    del query.obs["label"]
    with pytest.warns(UserWarning, match="Missing labels key label"):
        model = MixSCANVI.load_query_data(query, reference)
    assert (model.adata.obs["label"] == UNLABELED).all()


def test_dead_components_are_looked_for(make_labeled):
    model = fit(MixSCANVI, make_labeled(), WITH_BATCH, n_components=2)
    assert model.dead_components_ == {}


@pytest.mark.parametrize("n_components", [1, 3])
def test_minified_data_with_counts_train_the_encoder(n_components, make_labeled):
    """Labels are learned by the encoder, as without minification."""
    adata = make_labeled()
    model = fit(MixSCANVI, adata, SETUP, n_components=n_components)
    labeled = np.flatnonzero(adata.obs["label"] != UNLABELED)[:30]
    batch = next(iter(model._make_data_loader(adata=adata, indices=labeled)))
    model.module.eval()
    expected = [value.detach() for value in model.module.classification_loss(batch)]
    model.minify_adata("latent_posterior_parameters_with_counts")
    batch = next(iter(model._make_data_loader(adata=model.adata, indices=labeled)))
    losses = model.module.classification_loss(batch)
    for value, before in zip(losses, expected, strict=True):
        torch.testing.assert_close(value, before)
    losses[0].backward()
    gradients = [p.grad for p in model.module.z_encoder.parameters() if p.grad is not None]
    assert any(gradient.abs().max() > 0 for gradient in gradients)
    train(model, max_epochs=1)
    model.minify_adata()
    with pytest.raises(ValueError, match=r"train\(\) needs the cells' counts"):
        train(model, max_epochs=1)
