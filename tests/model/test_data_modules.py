"""Cells from data modules: of the user's own, and of annbatch."""

import warnings
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import pandas as pd
import pytest
import scvi
import torch
from lightning import LightningDataModule
from scvi.dataloaders import DataSplitter

from fitting import SMALL, assert_same_state, train
from mixscvi import MixSCANVI, MixSCVI


class Blocks(LightningDataModule):
    """Minibatches of a matrix, as a user might write them."""

    def __init__(self, adata, registry, labels=None, size=20):
        super().__init__()
        codes = torch.as_tensor(adata.obs["batch"].cat.codes.to_numpy().copy()).long()[:, None]
        label_codes = torch.zeros_like(codes)
        if labels is not None:
            self.labels_ = labels
            mapping = registry["field_registries"]["labels"]["state_registry"]
            mapping = mapping["categorical_mapping"].tolist()
            label_codes = torch.tensor([[mapping.index(label)] for label in labels])
        self.parts = [
            {"X": x, "batch": batch, "labels": y}
            for x, batch, y in zip(
                torch.as_tensor(adata.X).split(size),
                codes.split(size),
                label_codes.split(size),
                strict=True,
            )
        ]
        self.registry = registry
        self.n_obs, self.n_vars = adata.shape
        self.n_batch, self.n_labels, self.n_samples = 2, 1, 0
        self.batch_labels, self.label_keys = np.array(["b0", "b1"]), None

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.parts, batch_size=None, shuffle=True)

    def inference_dataloader(self):
        return torch.utils.data.DataLoader(self.parts, batch_size=None)


def of_data_module(registry, **labels):
    """The registry of an AnnData as scvi-tools' data modules write theirs."""
    fields = {
        f"extra_{kind}_covs": {
            "data_registry": {},
            "state_registry": {},
            "summary_stats": {f"n_extra_{kind}_covs": 0},
        }
        for kind in ("categorical", "continuous")
    }
    return {
        **registry,
        "setup_method_name": "setup_datamodule",
        "field_registries": {**registry["field_registries"], **fields},
    }


# Of scvi-tools 1.5, and of Lightning.
of_data_modules = [
    pytest.mark.filterwarnings("ignore:.*after custom Dataloader:UserWarning"),
    pytest.mark.filterwarnings("ignore:SCANVI sampler is not available:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*no `val_dataloader`:UserWarning:lightning"),
]


def marked(test):
    for mark in of_data_modules:
        test = mark(test)
    return test


@marked
@pytest.mark.parametrize("n_components", [1, 4])
def test_a_data_module_with_a_registry(make_adata, n_components, tmp_path):
    adata = make_adata()
    adata.obs["batch"] = adata.obs["batch"].astype("category")
    MixSCVI.setup_anndata(adata, batch_key="batch")
    registry = of_data_module(MixSCVI(adata, **SMALL).registry)
    module = Blocks(adata, registry)
    scvi.settings.seed = 0
    model = MixSCVI(registry=registry, n_components=n_components, **SMALL)
    model.train(
        max_epochs=2,
        datamodule=module,
        accelerator="cpu",
        enable_progress_bar=False,
        logger=None,
    )
    latents = model.get_latent_representation(dataloader=module.inference_dataloader())
    assert latents.shape == (adata.n_obs, SMALL["n_latent"])
    elbo = model.get_elbo(dataloader=module.inference_dataloader())
    assert np.isfinite(float(elbo))
    likelihood = model.get_marginal_ll(
        dataloader=module.inference_dataloader(), n_mc_samples=10, return_mean=False
    )
    assert likelihood.shape == (adata.n_obs,)
    expression = model.get_normalized_expression(dataloader=module.inference_dataloader())
    np.testing.assert_allclose(expression.sum(1), 1, rtol=1e-4)
    with pytest.raises(ValueError, match=r"save\(\) needs datamodule, .* got None"):
        model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="dataloader"):
        model.get_latent_representation(make_adata(sparse=True))
    model.save(tmp_path / "model", datamodule=module)
    loaded = MixSCVI.load(tmp_path / "model", adata=False)
    again = loaded.get_latent_representation(dataloader=module.inference_dataloader())
    np.testing.assert_array_equal(again, latents)


class ReadOnce(Blocks):
    """As a stream: each minibatch comes once, and becomes a dictionary on its way to the device."""

    def train_dataloader(self):
        yield from [list(part.items()) for part in self.parts]

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return super().transfer_batch_to_device(dict(batch), device, dataloader_idx)


@marked
@pytest.mark.parametrize("kind", [Blocks, ReadOnce])
def test_pseudo_cells_start_as_cells_of_a_data_module(make_adata, kind):
    adata = make_adata()
    adata.obs["batch"] = adata.obs["batch"].astype("category")
    MixSCVI.setup_anndata(adata, batch_key="batch")
    module = kind(adata, of_data_module(MixSCVI(adata, **SMALL).registry))
    if kind is ReadOnce:
        loader = iter(module.train_dataloader())
        module.train_dataloader = lambda: loader
    # No more than the smallest minibatch has, which may be the first.
    model = MixSCVI(registry=module.registry, prior="vamp", n_prior_components=10, **SMALL)
    model.train(
        max_epochs=1,
        datamodule=module,
        plan_kwargs={"lr": 0.0},
        accelerator="cpu",
        enable_progress_bar=False,
    )
    assert len(model.history["elbo_train"]) == 1
    assert (model.dead_components_ is None) == (kind is ReadOnce)
    with torch.no_grad():
        start, *_ = model.module.prior.pseudo_inputs()
    distance = (start[:, None] - torch.as_tensor(adata.X).log1p()).abs().amax(-1)
    assert distance.amin(1).max() < 0.01
    assert len(distance.argmin(1).unique()) == 10


@pytest.fixture
def labeled(make_adata):
    """Cells of which some have labels, their registry, and a data module."""
    adata = make_adata()
    adata.obs["batch"] = adata.obs["batch"].astype("category")
    adata.obs["type"] = adata.obs["label"]
    adata.obs["label"] = adata.obs["label"].where(adata.obs["batch"] != "b1", "unknown")
    setup = {"batch_key": "batch", "labels_key": "label"}
    MixSCANVI.setup_anndata(adata, **setup, unlabeled_category="unknown")
    registry = of_data_module(MixSCANVI(adata, **SMALL).registry)
    return adata, registry, Blocks(adata, registry, adata.obs["label"].to_numpy())


TO_LEARN = {"max_epochs": 60, "plan_kwargs": {"lr": 1e-2, "n_epochs_kl_warmup": 1}}


@marked
@pytest.mark.parametrize(
    "options", [{"n_components": 1, "likelihood": "reference"}, {}], ids=["one", "four"]
)
def test_labels_are_learned_from_a_data_module(labeled, options, tmp_path):
    adata, registry, module = labeled
    scvi.settings.seed = 0
    model = MixSCANVI(registry=registry, datamodule=module, **options, **SMALL)
    model.train(datamodule=module, **TO_LEARN, accelerator="cpu", enable_progress_bar=False)
    loader = module.inference_dataloader
    # Its minibatches bring the names of their tensors in no certain order, and have labels.
    accuracy = (model.predict(dataloader=loader()) == adata.obs["type"]).mean()
    assert accuracy > 0.9
    soft = model.predict(dataloader=loader(), soft=True)
    assert sorted(soft.columns) == ["type0", "type1", "type2"]
    latents = model.get_latent_representation(dataloader=loader())
    assert latents.shape == (adata.n_obs, SMALL["n_latent"])
    assert np.isfinite(float(model.get_elbo(dataloader=loader())))
    model.save(tmp_path / "model", datamodule=module)
    loaded = MixSCANVI.load(tmp_path / "model", adata=False)
    np.testing.assert_array_equal(loaded.get_latent_representation(dataloader=loader()), latents)
    pd.testing.assert_frame_equal(loaded.predict(dataloader=loader(), soft=True), soft)


@marked
def test_a_pretrained_model_of_a_data_module(labeled):
    adata, registry, module = labeled
    scvi.settings.seed = 0
    counts = MixSCVI(registry={**registry, "model_name": "MixSCVI"}, n_components=2, **SMALL)
    counts.train(datamodule=module, max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ValueError, match="scvi_model holds no AnnData"):
        MixSCANVI.from_scvi_model(counts, "unknown")
    with pytest.raises(ValueError, match="unlabeled_category must be that of registry, 'unknown'"):
        MixSCANVI.from_scvi_model(counts, "none", datamodule=module)
    model = MixSCANVI.from_scvi_model(counts, "unknown", datamodule=module)
    assert model.module.n_components == 2
    state = counts.module.state_dict()
    for name, value in model.module.state_dict().items():
        assert name not in state or torch.equal(value, state[name]), name
    model.train(datamodule=module, max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    predicted = model.predict(dataloader=module.inference_dataloader())
    assert set(predicted) <= {"type0", "type1", "type2"}


@marked
def test_data_modules_that_labels_cannot_be_learned_from_are_named(labeled):
    adata, registry, module = labeled
    fields = registry["field_registries"]

    def of_labels(**changed):
        state = fields["labels"]["state_registry"] | changed
        return registry | {
            "field_registries": fields | {"labels": fields["labels"] | {"state_registry": state}}
        }

    mapping = fields["labels"]["state_registry"]["categorical_mapping"]
    for bad, message in {
        "no labels": (of_labels(categorical_mapping=None), "have no categorical_mapping"),
        "not the last": (
            of_labels(categorical_mapping=np.roll(mapping, 1)),
            r"must end with 'unknown', of cells without, got \['unknown', 'type0'",
        ),
        "one label": (of_labels(categorical_mapping=mapping[-2:]), "at least two labels"),
        "no field": (
            registry | {"field_registries": {k: v for k, v in fields.items() if k != "labels"}},
            r"\['labels'\] must have a 'state_registry'",
        ),
    }.values():
        with pytest.raises(ValueError, match=message):
            MixSCANVI(registry=bad, datamodule=module, **SMALL)
    with pytest.raises(ValueError, match="Blocks has none: make it with the key of the labels"):
        MixSCANVI(registry=registry, datamodule=Blocks(adata, registry), **SMALL)
    with pytest.raises(ValueError, match="give adata, or the registry of a data module"):
        MixSCANVI(**SMALL)
    with pytest.raises(ValueError, match="use_observed_lib_size=False takes its library priors"):
        MixSCANVI(registry=registry, use_observed_lib_size=False, **SMALL)
    model = MixSCANVI(registry=registry, datamodule=module, **SMALL)
    with pytest.raises(ValueError, match="max_epochs must be given with datamodule"):
        model.train(datamodule=module)
    with pytest.raises(AttributeError, match="the model holds no data: give datamodule"):
        model.train(max_epochs=1)


def annbatch_version():
    try:
        return tuple(int(part) for part in version("annbatch").split(".")[:2])
    except PackageNotFoundError:
        return None


def with_annbatch(test):
    for mark in (
        pytest.mark.skipif(
            not hasattr(MixSCVI, "setup_annbatch"), reason="scvi-tools reads annbatch from 1.5 on"
        ),
        pytest.mark.skipif(
            annbatch_version() != (0, 2),
            reason="scvi-tools 1.5 reads annbatch 0.2: install mixscvi[annbatch]",
        ),
        pytest.mark.filterwarnings("ignore"),  # of zarr, anndata and pandas
    ):
        test = mark(test)
    return test


@with_annbatch
@pytest.mark.parametrize("n_components", [1, 4])
def test_annbatch(make_adata, n_components, tmp_path):
    make_adata(sparse=True).write_h5ad(tmp_path / "cells.h5ad")
    module = MixSCVI.setup_annbatch(
        collection_path=str(tmp_path / "cells.zarr"),
        paths=[str(tmp_path / "cells.h5ad")],
        batch_key="batch",
        batch_size=12,  # of which none is left with a single cell
        chunk_size=6,
        preload_nchunks=2,
        preload_to_gpu=False,
    )
    model = MixSCVI(registry=module.registry, n_components=n_components, **SMALL)
    model.train(
        max_epochs=2,
        train_size=1.0,
        datamodule=module,
        accelerator="cpu",
        enable_progress_bar=False,
        logger=None,
    )
    latents = model.get_latent_representation(dataloader=module.inference_dataloader())
    assert latents.shape == (72, SMALL["n_latent"])
    assert np.isfinite(latents).all()
    with pytest.raises(ValueError, match=r"save\(\) needs datamodule, .* got None"):
        model.save(tmp_path / "model")
    with pytest.raises(ValueError, match="dataloader"):
        model.get_latent_representation(make_adata(sparse=True))
    model.save(tmp_path / "model", datamodule=module)
    loaded = MixSCVI.load(tmp_path / "model", adata=False)
    again = loaded.get_latent_representation(dataloader=module.inference_dataloader())
    np.testing.assert_array_equal(again, latents)


@with_annbatch
@pytest.mark.parametrize("prior", ["normal", "vamp"])
def test_annbatch_draws_from_the_seed_and_goes_on_to_the_very_weights(make_adata, prior, tmp_path):
    make_adata(sparse=True).write_h5ad(tmp_path / "cells.h5ad")

    def module():
        return MixSCVI.setup_annbatch(
            collection_path=str(tmp_path / "cells.zarr"),
            paths=[str(tmp_path / "cells.h5ad")],
            batch_key="batch",
            rebuild=False,
            batch_size=12,
            chunk_size=6,
            preload_nchunks=2,
            preload_to_gpu=False,
        )

    module()  # written: that draws random numbers as well

    def trained(max_epochs, **checkpoints):
        cells = module()
        scvi.settings.seed = 0
        model = MixSCVI(registry=cells.registry, n_components=2, prior=prior, **SMALL)
        first = []
        model.module.register_forward_pre_hook(
            lambda module, args: first.append(args[0]["X"]) if module.training else None
        )
        model.train(
            max_epochs=max_epochs,
            datamodule=cells,
            accelerator="cpu",
            enable_progress_bar=False,
            logger=None,
            **checkpoints,
        )
        return model, first

    whole, minibatches = trained(4)
    assert not minibatches[0].equal(minibatches[6])  # of the second epoch
    assert_same_state(trained(4)[0], whole)
    folder = {"checkpoint_dir": tmp_path / "checkpoints", "checkpoint_every": 1}
    trained(2, **folder)
    assert_same_state(trained(4, **folder)[0], whole)


@with_annbatch
def test_loaders_of_the_users_own_around_annbatchs(make_adata, tmp_path):
    make_adata(sparse=True).write_h5ad(tmp_path / "cells.h5ad")
    module = MixSCVI.setup_annbatch(
        collection_path=str(tmp_path / "cells.zarr"),
        paths=[str(tmp_path / "cells.h5ad")],
        batch_key="batch",
        batch_size=12,
        chunk_size=6,
        preload_nchunks=2,
        preload_to_gpu=False,
    )
    make = module.train_dataloader
    module.train_dataloader = lambda: torch.utils.data.DataLoader(make(), batch_size=None)
    model = MixSCVI(registry=module.registry, n_components=2, **SMALL)
    model.train(
        max_epochs=1,
        datamodule=module,
        accelerator="cpu",
        enable_progress_bar=False,
        logger=None,
    )
    assert model.is_trained


@with_annbatch
@pytest.mark.parametrize("cls", [MixSCVI, MixSCANVI])
def test_annbatch_with_a_last_minibatch_of_one_cell(make_adata, cls, tmp_path):
    adata = make_adata(sparse=True)[:61].copy()
    adata.obs["label"] = adata.obs["label"].where(adata.obs["batch"] != "b1", "unknown")
    adata.write_h5ad(tmp_path / "cells.h5ad")
    labels = {"labels_key": "label", "unlabeled_category": "unknown"} if cls is MixSCANVI else {}
    module = cls.setup_annbatch(
        collection_path=str(tmp_path / "cells.zarr"),
        paths=[str(tmp_path / "cells.h5ad")],
        batch_key="batch",
        batch_size=12,
        chunk_size=6,
        preload_nchunks=2,
        preload_to_gpu=False,
        **labels,
    )
    with_labels = {"datamodule": module} if labels else {}
    scvi.settings.seed = 0
    model = cls(registry=module.registry, n_components=2, **with_labels, **SMALL)
    sizes = []
    model.module.register_forward_pre_hook(
        lambda module, args: sizes.append(len(args[0]["X"])) if module.training else None
    )
    model.train(
        max_epochs=2,
        train_size=1.0,
        datamodule=module,
        accelerator="cpu",
        enable_progress_bar=False,
        logger=None,
    )
    assert sizes == [12] * 10  # the last cell of each epoch is left out
    latents = model.get_latent_representation(dataloader=module.inference_dataloader())
    assert latents.shape == (61, SMALL["n_latent"])
    assert np.isfinite(latents).all()
    if labels:
        predicted = model.predict(dataloader=module.inference_dataloader())
        assert set(predicted) <= {"type0", "type1", "type2"}


@with_annbatch
@pytest.mark.parametrize("key", ["batch", "age"])
def test_annbatch_with_missing_annotation(make_adata, key, tmp_path):
    """scvi-tools makes a batch of them."""
    adata = make_adata(sparse=True)
    adata.obs[key] = adata.obs[key].where(adata.obs_names != adata.obs_names[3])
    adata.write_h5ad(tmp_path / "cells.h5ad")
    more = {} if key == "batch" else {"continuous_covariate_keys": [key]}
    module = MixSCVI.setup_annbatch(
        collection_path=str(tmp_path / "cells.zarr"),
        paths=[str(tmp_path / "cells.h5ad")],
        batch_key="batch",
        batch_size=12,
        chunk_size=6,
        preload_nchunks=2,
        preload_to_gpu=False,
        **more,
    )
    model = MixSCVI(registry=module.registry, n_components=2, **SMALL)
    expected = f"column '{key}' of datamodule has missing values in 1 of 72 cells, first: "
    with pytest.raises(ValueError, match=expected):
        model.train(max_epochs=1, datamodule=module, accelerator="cpu", logger=None)


@pytest.fixture
def cells_and_registry(make_adata):
    adata = make_adata()
    adata.obs["batch"] = adata.obs["batch"].astype("category")
    MixSCVI.setup_anndata(adata, batch_key="batch")
    return adata, MixSCVI(adata, **SMALL).registry


@marked
def test_genes_of_another_order(cells_and_registry):
    adata, registry = cells_and_registry
    model = MixSCVI(registry=registry, n_components=2, **SMALL)
    genes = registry["field_registries"]["X"]["state_registry"]["column_names"].tolist()
    module = Blocks(adata, registry)
    for others, expected in (
        ([genes[0], genes[2], genes[1], *genes[3:]], f"'{genes[1]}' at 1, got '{genes[2]}'"),
        (genes[1:], f"the model's {len(genes)} genes, got {len(genes) - 1}"),
    ):
        module.registry = {"field_registries": {"X": {"state_registry": {"column_names": others}}}}
        with pytest.raises(ValueError, match=expected):
            model.train(max_epochs=1, datamodule=module, accelerator="cpu", logger=None)


@pytest.mark.filterwarnings("ignore:Model was initialized without `adata`:UserWarning")
def test_a_checkpoint_of_other_minibatches_is_named(make_adata, tmp_path):
    adata = make_adata()
    MixSCVI.setup_anndata(adata, batch_key="batch")
    manager = MixSCVI._get_most_recent_anndata_manager(adata)
    for batch_size, max_epochs in ((32, 1), (32, 2), (64, 3)):
        module = DataSplitter(manager, train_size=0.75, batch_size=batch_size)
        module.n_vars, module.n_batch = adata.n_vars, 2
        scvi.settings.seed = 0
        model = MixSCVI(n_components=2, **SMALL)
        given = {"datamodule": module, "max_epochs": max_epochs, "checkpoint_dir": tmp_path}
        if batch_size == 32:
            train(model, **given)
            assert len(model.history["elbo_train"]) == max_epochs
            continue
        with pytest.raises(ValueError, match=r"training.ckpt.*an epoch has \d minibatches there"):
            train(model, **given)


@marked
def test_genes_that_cannot_be_compared_are_warned_of(cells_and_registry):
    adata, registry = cells_and_registry
    for names, warned in (
        (range(adata.n_vars), False),
        ([f"E{i}" for i in range(adata.n_vars)], True),
    ):
        module = Blocks(adata, registry)
        others = {"X": {"state_registry": {"column_names": [*names]}}}
        module.registry = {"field_registries": others}
        model = MixSCVI(registry=registry, n_components=2, **SMALL)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.train(max_epochs=1, datamodule=module, accelerator="cpu", logger=None)
        assert any("cannot be told" in str(w.message) for w in caught) == warned


@marked
@pytest.mark.parametrize("n_components", [1, 2])
def test_minibatches_for_validation_are_looked_at(cells_and_registry, n_components):
    adata, registry = cells_and_registry

    class HeldOut(Blocks):
        def val_dataloader(self):
            bad = {**self.parts[0], "X": torch.full_like(self.parts[0]["X"], torch.nan)}
            return torch.utils.data.DataLoader([self.parts[0], bad], batch_size=None)

    model = MixSCVI(registry=registry, n_components=n_components, **SMALL)
    with pytest.raises(ValueError, match=r"minibatch 1 .*for validation .*finite counts"):
        model.train(
            max_epochs=1,
            datamodule=HeldOut(adata, registry),
            check_val_every_n_epoch=1,
            accelerator="cpu",
            logger=None,
        )


@marked
def test_a_refused_checkpoint_leaves_the_model_as_it_was(cells_and_registry, tmp_path):
    adata, registry = cells_and_registry

    def made():
        scvi.settings.seed = 0
        return MixSCVI(registry=registry, n_components=2, **SMALL)

    given = {"checkpoint_dir": tmp_path, "accelerator": "cpu", "logger": None}
    made().train(max_epochs=1, datamodule=Blocks(adata, registry, size=20), **given)
    model, untouched = made(), made()
    with pytest.raises(ValueError, match="is of another training: an epoch has"):
        model.train(max_epochs=2, datamodule=Blocks(adata, registry, size=10), **given)
    assert_same_state(model, untouched)


@marked
def test_a_model_of_a_data_module_takes_an_anndata_of_its_batches_alone(make_adata, tmp_path):
    adata = make_adata()
    adata.obs["batch"] = adata.obs["batch"].astype("category")
    MixSCVI.setup_anndata(adata, batch_key="batch")
    registry = of_data_module(MixSCVI(adata, **SMALL).registry)
    module = Blocks(adata, registry)
    model = MixSCVI(registry=registry, n_components=2, **SMALL)
    model.train(max_epochs=1, datamodule=module, accelerator="cpu", logger=None)
    model.save(tmp_path / "model", datamodule=module)
    assert MixSCVI.load(tmp_path / "model", adata).adata is adata
    other = make_adata()
    other.obs["batch"] = other.obs["batch"].map({"b0": "z", "b1": "a"})
    MixSCVI.setup_anndata(other, batch_key="batch")
    with pytest.raises(ValueError, match="batches of the model, 'b0', 'b1', got 'a', 'z'"):
        MixSCVI.load(tmp_path / "model", other)
