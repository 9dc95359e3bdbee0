"""Arguments of the methods of a trained model: named, whichever method they are given to."""

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from scvi.model import SCVI

from fitting import BATCH, SMALL, fit
from mixscvi import MixSCANVI, MixSCVI

LABELS = {"labels_key": "label", "unlabeled_category": "type0", **BATCH}


@pytest.fixture(scope="module")
def models(make_adata):
    return (
        fit(MixSCVI, make_adata(), BATCH, n_components=2),
        fit(MixSCANVI, make_adata(), LABELS, n_components=2),
    )


WRONG = {
    "n_samples": (
        [0, 1.5, "2", None],
        ["get_likelihood_parameters", "get_feature_correlation_matrix"],
    ),
    "mc_samples": ([0, 2.5, None], ["get_latent_representation"]),
    "rna_size_factor": ([0, np.nan, "x"], ["get_feature_correlation_matrix"]),
    "correlation_type": (["kendall", None], ["get_feature_correlation_matrix"]),
    "transform_batch": (
        ["b7", [], ["b0", 7]],
        ["get_feature_correlation_matrix", "posterior_predictive_sample"],
    ),
    "gene_list": ([3, "gene0", []], ["posterior_predictive_sample", "get_normalized_expression"]),
    "dof": ([0, "x", np.nan], ["get_aggregated_posterior"]),
    "threshold": ([-1, "x", None], ["get_active_units"]),
    "adapt_kwargs": ([3, {"n_draw": 1}], ["get_adapted_posterior"]),
    "adata": ([3, pd.DataFrame()], ["get_elbo", "get_latent_mixture", "differential_expression"]),
    "dataloader": (
        [3, "cells", []],
        ["get_elbo", "get_latent_mixture", "get_normalized_expression", "get_latent_library_size"],
    ),
    "batch_size": ([0, None, "x"], ["differential_abundance"]),
    "num_cells_posterior": ([0, 1.5], ["differential_abundance"]),
}


def test_differential_abundance_takes_numbers_of_numpys(models):
    for model in models:
        if model.adata is not None and "latent" not in str(model.minified_data_type):
            model.differential_abundance(sample_key="batch", batch_size=np.int64(7))
            assert len(model.adata.obsm.pop("da_log_probs")) == len(model.adata)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_named(name, models):
    values, methods = WRONG[name]
    for value in values:
        for method in methods:
            for model in models:
                kwargs = {"groupby": "batch"} if method == "differential_expression" else {}
                kwargs |= {"sample_key": "batch"} if method == "differential_abundance" else {}
                with pytest.raises((TypeError, ValueError), match=rf"^{name}\b"):
                    getattr(model, method)(**kwargs, **{name: value})


def test_cells_that_are_not_there(models, make_adata):
    for model in models:
        for method in (model.get_elbo, model.get_latent_mixture, model.posterior_predictive_sample):
            with pytest.raises(ValueError, match=r"adata must have cells, got shape \(0, 20\)"):
                method(make_adata()[:0].copy())


@pytest.mark.parametrize("cls", [MixSCVI, MixSCANVI])
def test_a_model_without_data_says_so(cls, models, tmp_path):
    model = models[cls is MixSCANVI]
    model.save(tmp_path / "model")
    without = cls.load(tmp_path / "model", False)
    for method, kwargs in (
        ("get_elbo", {}),
        ("get_normalized_expression", {}),
        ("posterior_predictive_sample", {}),
        ("get_likelihood_parameters", {}),
        ("differential_abundance", {"sample_key": "batch"}),
        ("differential_expression", {"groupby": "batch"}),
        ("get_latent_representation", {}),
        ("minify_adata", {}),
    ):
        # Later versions of scvi-tools look for data themselves, in some methods.
        with pytest.raises(ValueError, match="the model holds n|Pass `adata` or"):
            getattr(without, method)(**kwargs)


@pytest.mark.parametrize("cls", [MixSCVI, MixSCANVI])
def test_what_no_model_is_made_of(cls, make_adata):
    with pytest.raises(TypeError, match="adata must be an AnnData, got int"):
        cls(3)
    with pytest.raises(TypeError, match="registry must be that of a data module, got 3"):
        cls(registry=3)
    with pytest.raises(ValueError, match=r"registry must have 'field_registries', got \[\]"):
        cls(registry={})


FLAGS = ("early_stopping", "shuffle_set_split", "enable_progress_bar", "detect_anomaly")
TRAINED = {
    "n_samples_per_label": [0, -1, 2.5, "x"],
    **dict.fromkeys(FLAGS, ["no", 2]),
    "load_sparse_tensor": ["x"],
    "datamodule": [3, "x"],
    "check_val_every_n_epoch": [-1, "x", 1.5],
    "log_every_n_steps": [-1, "x"],
    "accumulate_grad_batches": [0, "x", None],
    "max_steps": [-5, "x"],
    "min_epochs": [-1, "x"],
    "early_stopping_patience": [-1, "x"],
    "early_stopping_mode": ["x"],
    "early_stopping_min_delta": ["x", np.nan],
    "limit_train_batches": [-1, "x", 1.5],
    "overfit_batches": [1, 0.5],
    "gradient_clip_val": [-1, "a"],
    "gradient_clip_algorithm": ["x"],
    "callbacks": [3, [3]],
    "logger": [3, "x"],
    "max_time": [3],
    "deterministic": ["x"],
    "default_root_dir": [3],
    "ckpt_path": [3],
    "datasplitter_kwargs": [3, "x"],
    "plan_kwargs": [3, "x"],
    "plan_config": [3],
    "trainer_config": [3],
}
OF_PLAN = {
    "lr": [-1, "x", np.nan],
    "weight_decay": ["x"],
    "classification_ratio": ["x", -3],
    "optimizer": ["x"],
    "optimizer_creator": [3],
    "n_epochs_kl_warmup": [-1, "x"],
    "lr_factor": [1, "x"],
    "lr_patience": [-1, 1.5],
    "max_kl_weight": ["x", -1],
    "reduce_lr_on_plateau": ["x"],
}
OF_SPLITTER = {"num_workers": [-1, "x"], "drop_last": ["x"], "pin_memory": ["x"]}


@pytest.fixture(scope="module")
def untrained(make_adata):
    made = []
    for cls, setup in ((MixSCVI, BATCH), (MixSCANVI, LABELS)):
        adata = make_adata()
        cls.setup_anndata(adata, **setup)
        made.append(cls(adata, n_components=2, **SMALL))
    return made


@pytest.mark.parametrize("name", [*TRAINED, *OF_PLAN, *OF_SPLITTER])
def test_training(name, untrained):
    for model in untrained:
        of = {"n_samples_per_label": MixSCANVI, "load_sparse_tensor": MixSCVI}
        if not isinstance(model, of.get(name, object)) or (
            name == "classification_ratio" and isinstance(model, MixSCVI)
        ):
            continue
        for value in (TRAINED | OF_PLAN | OF_SPLITTER)[name]:
            kwargs = {name: value}
            if name in OF_PLAN:
                kwargs = {"plan_kwargs": kwargs}
            if name in OF_SPLITTER:
                kwargs = {"datasplitter_kwargs": kwargs}
            with pytest.raises((TypeError, ValueError), match=f"^{name} must be"):
                model.train(max_epochs=1, **kwargs)
        assert not model.is_trained


ALL = {"train_size": 1.0}
EPOCHLY = {"check_val_every_n_epoch": 1}
PLATEAU = {"reduce_lr_on_plateau": True}
LOGGED = ".* must be a metric that is logged, one of elbo_train, elbo_validation, .*, got"
HELD_OUT = "'elbo_validation', but no cells are held out for validation"


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"accelerator": "foo"}, "accelerator='foo' is no setting to train with here: .*cpu"),
        ({"devices": "x"}, "devices='x' is no setting to train with here"),
        ({"devices": 0}, "devices=0 is no setting to train with here"),
        ({"precision": "x"}, "precision='x' is no setting to train with here: .*bf16-mixed"),
        ({"strategy": "foo"}, "strategy='foo' is no setting to train with here"),
        ({"max_time": "x", "devices": 1}, "devices=1, max_time='x' are no settings to train with"),
        ({"plan_kwargs": {"optimizer": "Custom"}}, "optimizer='Custom' needs optimizer_creator"),
        ({"plan_config": {"lrr": 1}}, "plan_kwargs of train.* takes no argument 'lrr', got 1"),
        ({"datasplitter_kwargs": {"foo": 1}}, "datasplitter_kwargs of train.* no argument 'foo'"),
        ({"datasplitter_kwargs": {"batch_size": 9}}, "must not have 'batch_size', an argument of"),
        ({"drop_last": True}, r"train\(\) takes no argument 'drop_last', got True"),
        ({"limit_train_batches": 0.01}, "limit_train_batches=0.01 must be a number of minibatches"),
        ({"limit_val_batches": 0.01, **EPOCHLY}, "limit_val_batches=0.01 must be a number of"),
        ({"ckpt_path": "no.ckpt"}, "ckpt_path='no.ckpt' must be a checkpoint"),
        ({"ckpt_path": "."}, "ckpt_path='.' must be a checkpoint"),
        ({"early_stopping": True, "early_stopping_monitor": "elbo"}, f"early_st{LOGGED} 'elbo'"),
        (
            {"enable_checkpointing": True, "checkpointing_monitor": "x"},
            f"checkpointing{LOGGED} 'x'",
        ),
        ({"callbacks": [EarlyStopping("x")]}, f"monitor of EarlyStopping{LOGGED} 'x'"),
        ({"plan_kwargs": {**PLATEAU, "lr_scheduler_metric": "x"}}, f"lr_scheduler{LOGGED} 'x'"),
        ({"plan_kwargs": PLATEAU, **ALL}, f"lr_scheduler_metric watches {HELD_OUT}"),
        (
            {"plan_kwargs": PLATEAU, "check_val_every_n_epoch": 2},
            "after each epoch, got check_val_every_n_epoch=2: choose 1",
        ),
        ({"early_stopping": True, "limit_val_batches": 0}, f"_monitor watches {HELD_OUT}"),
        (
            {**EPOCHLY, **ALL},
            "check_val_every_n_epoch=1 asks for validation, but no cells are held",
        ),
    ],
)
def test_how_to_train(kwargs, expected, untrained):
    for model in untrained:
        before = [value.clone() for value in model.module.state_dict().values()]
        with pytest.raises((TypeError, ValueError, OSError), match=expected):
            model.train(max_epochs=1, **kwargs)
        assert not model.is_trained
        assert all(map(torch.equal, before, model.module.state_dict().values()))


CELLS = np.arange(72)
SPLITS = {
    "no list": (CELLS, "external_indexing must be a list of up to three arrays"),
    "four": ([CELLS, None, None, None], "external_indexing must be a list of up to three arrays"),
    "lists": ([CELLS.tolist()], r"external_indexing\[0\] must be an array of positions"),
    "a mask": ([CELLS < 60, CELLS >= 60], r"external_indexing\[0\] must be an array of positions"),
    "out of range": ([CELLS + 1], r"external_indexing\[0\] must be below the 72 cells, got 72"),
    "from the end": ([CELLS - 1], r"external_indexing\[0\] must be positions from 0, got -1"),
    "overlap": ([CELLS[:60], CELLS[59:]], r"\[1\] must have no cell of .*\[0\], got 59 in both"),
    "twice": ([np.append(CELLS, 3)], r"external_indexing\[0\] must have each cell once, got 3"),
    "missing": ([CELLS[:40], CELLS[50:]], "external_indexing .* 72 cells, but lacks 10, first 40"),
    "none": ([CELLS[:0]], r"external_indexing\[0\] must choose at least one cell, got none"),
}


@pytest.mark.parametrize(("indexing", "expected"), SPLITS.values(), ids=SPLITS)
def test_cells_split_from_outside(indexing, expected, untrained):
    for model in untrained:
        with pytest.raises((TypeError, ValueError, IndexError), match=expected):
            model.train(max_epochs=1, datasplitter_kwargs={"external_indexing": indexing})


def test_ways_to_train_that_scvi_has(untrained):
    """Not refused, though they are of several types."""
    for model in untrained:
        n_epochs = {"max_epochs": 1, "enable_progress_bar": False}
        for kwargs in (
            {"devices": "1", "precision": "32-true", "callbacks": [], "logger": False},
            {"max_time": {"hours": 1}, "limit_train_batches": 1.0, "deterministic": False},
            {"datasplitter_kwargs": {"drop_last": True, "num_workers": 0}, "batch_size": 20},
            {"datasplitter_kwargs": {"external_indexing": [CELLS[:50], CELLS[50:], None]}},
            {"plan_kwargs": {"n_epochs_kl_warmup": None, "n_steps_kl_warmup": 10}},
            {"trainer_config": {"gradient_clip_val": 1}, "plan_config": {"lr": 0.01}},
            {**EPOCHLY, "gradient_clip_val": 1, "max_steps": 2},
            {
                "early_stopping": True,
                "early_stopping_monitor": "train_loss_epoch",
                "plan_kwargs": {"on_step": True},
            },
            {"callbacks": [LogsItsOwn()], "early_stopping": True, "early_stopping_monitor": "own"},
            {**EPOCHLY, **ALL, "limit_val_batches": 0},
        ):
            model.train(**{**n_epochs, **kwargs})
        assert model.is_trained


class LogsItsOwn(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("own", 1.0)


@pytest.mark.parametrize("cls", [MixSCVI, MixSCANVI])
def test_all_metrics_that_are_logged_may_be_watched(cls, untrained, make_adata):
    model = untrained[cls is MixSCANVI]
    model.train(max_epochs=1, enable_progress_bar=False, **EPOCHLY)
    metrics = [*model.trainer.callback_metrics]
    assert len(metrics) >= 10
    for metric in metrics:
        stopping = {"early_stopping": True, "early_stopping_monitor": metric}
        model.train(max_epochs=1, enable_progress_bar=False, **stopping)
        assert metric in model.trainer.callback_metrics
    with pytest.raises(ValueError, match="one of " + ", ".join(sorted(metrics))):
        model.train(max_epochs=1, early_stopping=True, early_stopping_monitor="x")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.parametrize("cls", [MixSCVI, MixSCANVI])
def test_checkpoints_of_lightning(cls, untrained, tmp_path, monkeypatch):
    """Training goes on from them, and nothing that they hold is run."""
    model = untrained[cls is MixSCANVI]
    training = {"max_epochs": 2, "enable_progress_bar": False}
    writer = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    model.train(**training, enable_checkpointing=True, callbacks=[writer])
    model.train(**training, ckpt_path=tmp_path / "epoch=0.ckpt")
    assert model.trainer.current_epoch == 2
    assert len(model.history["elbo_train"]) == 2 + 1  # one epoch was left

    torch.save({"state_dict": Payload()}, tmp_path / "crafted.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    monkeypatch.chdir(tmp_path)
    for name, expected in (("crafted", "holds Python objects"), ("text", "is truncated, or no")):
        with pytest.raises(ValueError, match=rf"{name}\.ckpt {expected}"):
            model.train(**training, ckpt_path=f"{name}.ckpt")
    assert not (tmp_path / "ran").exists()


class Payload:
    def __reduce__(self):
        return open, ("ran", "w")


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"y_prior": [0.5, 0.5]}, "y_prior must be a tensor of the probabilities of the 2 labels"),
        ({"y_prior": torch.ones(1, 3) / 3}, r"2 labels, above 0, got one of shape \(1, 3\)"),
        ({"y_prior": torch.ones(1, 2)}, "above 0, that sum to 1, got"),
        ({"y_prior": torch.tensor([-1.0, 2.0])}, "above 0, that sum to 1, got"),
        ({"linear_classifier": "x"}, "linear_classifier must be True or False, got 'x'"),
        ({"classifier_parameters": 3}, "classifier_parameters must be a dictionary"),
        ({"classifier_parameters": {"n_hiden": 3}}, "classifier_parameters .*'n_hidden'"),
        ({"classifier_parameters": {"n_labels": 3}}, "must not have 'n_labels', which is that of"),
        ({"classifier_parameters": {"n_layers": -1}}, "n_layers of classifier_parameters must be"),
        ({"classifier_parameters": {"dropout_rate": 5}}, "dropout_rate of classifier_parameters"),
        ({"classifier_parameters": {"activation_fn": 3}}, "activation_fn of classifier_param"),
        ({"classifier_parameters": {"logits": "x"}}, "logits of classifier_parameters must be"),
        ({"datamodule": 3}, "datamodule must be a LightningDataModule, got 3"),
    ],
)
def test_what_labels_are_learned_with(kwargs, expected, make_adata, models):
    adata = make_adata()
    MixSCANVI.setup_anndata(adata, **LABELS)
    for n_components in (1, 2):
        with pytest.raises((TypeError, ValueError), match=expected):
            MixSCANVI(adata, n_components=n_components, **kwargs)
    with pytest.raises((TypeError, ValueError), match=expected):
        MixSCANVI.from_scvi_model(models[0], "type0", "label", **kwargs)


def test_labels_with_a_prior_of_their_own(make_adata):
    for prior in (torch.tensor([0.2, 0.8]), torch.tensor([[0.2, 0.8]])):
        adata = make_adata()
        model = fit(MixSCANVI, adata, LABELS, n_components=2, y_prior=prior)
        assert np.isfinite(model.get_marginal_ll(n_mc_samples=10, n_mc_samples_per_pass=5))


def test_cells_chosen_by_a_tuple(models):
    for model in models:
        names = model.adata.obs_names[[3, 5]].tolist()
        tables = (
            model.get_normalized_expression(indices=(3, 5)),
            model.get_posterior_diagnostics(indices=(3, 5), n_mc_samples=30),
            model.get_posterior_diagnostics(
                indices=(3, 5), n_mc_samples=30, proposal="adapted", progress=False
            ),
        )
        assert [table.index.tolist() for table in tables] == [names] * 3
    assert models[1].predict(indices=(3, 5), soft=True).index.tolist() == names


COMPARED = {
    "all cells": (
        {"idx1": "batch in ['b0', 'b1']"},
        "idx1 chooses all 72 cells, which leaves none to compare with",
    ),
    "one group": ({"groupby": "one"}, "groupby='one' chooses all 72 cells"),
    "the group of all": ({"groupby": "one", "group1": "a"}, "group1='a' chooses all 72 cells"),
    "no group": ({"groupby": "batch", "group1": []}, "group1 must name at least one value"),
    "the same cells": ({"idx1": [0, 1], "idx2": [1, 0]}, "idx2 must not hold all cells of idx1"),
    "batch": (
        {"batch_correction": True, "batchid1": ["b7"], "batchid2": ["b0"]},
        "batchid1 must be of the model's batches, 'b0', 'b1', got 'b7'",
    ),
    "batch as text": ({"batch_correction": True, "batchid1": "b0"}, "batchid1 must be a list"),
    "batch alone": ({"batchid2": ["b0"]}, "batchid2=.* needs batch_correction=True"),
    "delta": ({"mode": "change", "delta": -1}, "delta must be a finite number of at least 0"),
    "pseudocounts": ({"mode": "change", "pseudocounts": "x"}, "pseudocounts must be a finite"),
    "fdr": ({"mode": "change", "fdr_target": 5}, "fdr_target must be .* from 0 to 1, got 5"),
    "test": ({"mode": "change", "test_mode": "one"}, "test_mode must be one of 'two', 'three'"),
    "function": ({"mode": "change", "change_fn": "ratio"}, "change_fn must be a function"),
    "domain": ({"mode": "change", "m1_domain_fn": 3}, "m1_domain_fn must be a function"),
    "levels": ({"mode": "change", "cred_interval_lvls": [2.0]}, "cred_interval_lvls must be"),
    "draws": ({"n_samples_overall": 0}, "n_samples_overall must be an integer of at least 1"),
}


@pytest.mark.parametrize(("kwargs", "expected"), COMPARED.values(), ids=COMPARED)
def test_comparisons(kwargs, expected, models):
    for model in models:
        model.adata.obs["one"] = "a"
        before = [*model.adata.obs]
        if not kwargs.keys() & {"groupby", "idx1"}:
            kwargs = {**kwargs, "groupby": "batch"}
        with pytest.raises((TypeError, ValueError), match=expected):
            model.differential_expression(**kwargs, silent=True)
        assert [*model.adata.obs] == before


def test_samples_of_cells_must_be_known(models):
    model = models[0]
    model.adata.obs["sample"] = np.where(np.arange(72) % 3, "s", None)
    with pytest.raises(ValueError, match=r"sample_key: adata.obs\['sample'\] is missing .*'cell0'"):
        model.differential_abundance(sample_key="sample")
    with pytest.raises(TypeError, match="sample_key must be the name of a column"):
        model.differential_abundance(sample_key=["batch"])
    with pytest.raises(KeyError, match="sample_key must be the name of a column"):
        model.differential_abundance(sample_key=None)


def test_queries(models, make_adata):
    reference = models[0]
    for wrong in (3, None, MixSCVI):
        with pytest.raises(TypeError, match="reference_model must be a model or the folder of one"):
            MixSCVI.load_query_data(make_adata(), wrong)
        with pytest.raises(TypeError, match="reference_model must be a model or the folder of one"):
            MixSCVI.prepare_query_anndata(make_adata(), wrong)
        with pytest.raises(TypeError, match="adata must be an AnnData"):
            MixSCVI.prepare_query_anndata(wrong, reference)
    query = make_adata(n_obs=30, seed=3)
    query.obs["batch"] = np.arange(30) % 2
    with pytest.raises(TypeError, match=r"adata.obs\['batch'\] is 0 in 'cell0', but .* on 'b0'"):
        MixSCVI.load_query_data(query, reference)


def test_models_of_another_class(models, make_adata, tmp_path):
    adata, query = make_adata(), make_adata(n_obs=30, seed=3)
    SCVI.setup_anndata(adata, **BATCH)
    mixscvi, mixscanvi = models
    mixscvi.save(tmp_path / "model")
    for cls, reference, expected in (
        (MixSCVI, SCVI(adata), "another class, SCVI, .* make one of it with MixSCVI.from_scvi_m"),
        (MixSCANVI, mixscvi, "another class, MixSCVI, .* with MixSCANVI.from_scvi_model"),
        (MixSCVI, mixscanvi, "reference_model is of another class, MixSCANVI, and not a MixSCVI$"),
        (MixSCANVI, tmp_path / "model", r"model\.pt is of another class, MixSCVI, and not a "),
    ):
        with pytest.raises(ValueError, match=expected):
            cls.load_query_data(query.copy(), reference)
    with pytest.raises(ValueError, match=r"model\.pt is of another class, MixSCVI, and not a "):
        MixSCANVI.load(tmp_path / "model", make_adata())


QUERIED = {
    "adata": [3],
    "arguments": [3, "x"],
    "allow_pickle": ["no", None],
    "accelerator": ["foo"],
    "device": ["x", 1.5],
}
LOADED = QUERIED | {"dir_path": [3, None], "prefix": [3], "backup_url": [3], "datamodule": [3]}


@pytest.mark.parametrize("name", LOADED)
def test_loading(name, models, make_adata, tmp_path):
    models[0].save(tmp_path / "model")
    of_device = {"accelerator": "device='auto': there is no such", "device": "there is no such"}
    for value in LOADED[name]:
        given = {"dir_path": tmp_path / "model", "adata": make_adata(), name: value}
        with pytest.raises((TypeError, ValueError), match=of_device.get(name, f"^{name} must be")):
            MixSCVI.load(**given)
        if name in QUERIED:
            given["reference_model"] = given.pop("dir_path")
            with pytest.raises((TypeError, ValueError), match=of_device.get(name, f"^{name} must")):
                MixSCVI.load_query_data(**given)


@pytest.mark.parametrize(
    "name",
    [
        "unfrozen", "freeze_dropout", "freeze_expression", "freeze_classifier",
        "freeze_batchnorm_encoder", "inplace_subset_query_vars",
    ],
)  # fmt: skip
def test_what_of_a_query_is_frozen(name, models, make_adata):
    for model in models:
        with pytest.raises(TypeError, match=f"^{name} must be True or False, got 'no'"):
            type(model).load_query_data(make_adata(), model, **{name: "no"})


def test_queries_of_nothing(models):
    with pytest.raises(
        TypeError, match=r"load_query_data\(\) takes no argument 'unfrozn', got 1:.*"
    ):
        MixSCVI.load_query_data(models[0].adata.copy(), models[0], unfrozn=1)
    with pytest.raises(ValueError, match="give adata, the cells of the query, or the registry"):
        MixSCVI.load_query_data(None, models[0])
    with pytest.raises(TypeError, match="registry must be that of a data module, got 3"):
        MixSCVI.load_query_data(None, models[0], registry=3)


def test_saving(models, tmp_path):
    given = {
        "dir_path": [3, None],
        "prefix": [3],
        "overwrite": ["no"],
        "save_anndata": ["no"],
        "save_kwargs": [3],
    }
    for model in models:
        for name, values in given.items():
            for value in values:
                with pytest.raises(TypeError, match=f"^{name} must be"):
                    model.save(**{"dir_path": tmp_path / "model", name: value})
    assert not list(tmp_path.iterdir())


def test_predictions(models):
    for name, value in (("soft", "x"), ("use_posterior_mean", "x"), ("ig_args", 3)):
        with pytest.raises(TypeError, match=f"^{name} must be"):
            models[1].predict(**{name: value})


def test_a_query_or_labels_of_other_genes(models, make_adata, tmp_path):
    models[0].save(tmp_path / "model")
    other = make_adata(seed=3)
    other.var_names = [f"ENSG{i}" for i in range(20)]
    for reference in (models[0], tmp_path / "model"):
        with pytest.raises(ValueError, match=r"none of the reference's 20 genes.*'gene0'.*'ENSG0'"):
            MixSCVI.prepare_query_anndata(other, reference)
    with pytest.raises(ValueError, match="adata has 20 genes that are not the 20"):
        MixSCANVI.from_scvi_model(models[0], "type0", "label", adata=other)
    with pytest.raises(ValueError, match=r"adata must have cells, got shape \(0, 20\)"):
        MixSCVI.load_query_data(make_adata()[:0].copy(), models[0])


def test_folders_and_addresses_that_are_none(models, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"dir_path must be a folder.*file' is a file"):
        models[0].save(tmp_path / "file" / "model")
    with pytest.raises(OSError, match=r"model\.pt could not be fetched from backup_url='nowhere'"):
        MixSCVI.load(tmp_path / "model", False, backup_url="nowhere")
    assert not list((tmp_path / "model").iterdir())


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_a_query_with_names_of_cells_that_repeat(models, make_adata, tmp_path):
    models[0].save(tmp_path / "model")
    query = make_adata(n_obs=30, seed=3)
    query.obs_names = ["cell"] * 30
    for reference in (models[0], tmp_path / "model"):
        MixSCVI.prepare_query_anndata(query.copy(), reference)  # nothing has to be added
        with pytest.raises(ValueError, match="adata.obs_names must be unique to be matched"):
            MixSCVI.prepare_query_anndata(query[:, 3:].copy(), reference)


def test_labels_that_are_none(make_adata):
    adata = make_adata()
    for value in (["type0"], {}, np.nan, None):
        with pytest.raises(TypeError, match="unlabeled_category must be the value of"):
            MixSCANVI.setup_anndata(adata, "label", unlabeled_category=value)
    adata.obs = pd.concat([adata.obs, adata.obs[["label"]]], axis=1)
    with pytest.raises(ValueError, match="labels_key='label' is of 2 columns of adata.obs"):
        MixSCANVI.setup_anndata(adata, "label", unlabeled_category="type0")
