"""Minibatches of the user's own that a model cannot use."""

import warnings

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, Trainer

from fitting import BATCH, SMALL, fit, train
from mixscvi import MixSCVI

# scvi-tools 1.5 says of its own defaults that they are redundant beside a loader.
pytestmark = pytest.mark.filterwarnings("ignore:Using .* after custom Dataloader:UserWarning")

METHODS = {
    "get_latent_representation": {},
    "get_latent_mixture": {},
    "get_elbo": {},
    "get_reconstruction_error": {},
    "get_marginal_ll": {"n_mc_samples": 4},
    "get_normalized_expression": {},
    "get_likelihood_parameters": {},
    "posterior_predictive_sample": {},
}


def with_value(x, value, row=5):
    x = x.clone()
    x[row] = value
    return x


WRONG = {  # what becomes of a good minibatch, the error, what it says
    "genes": (lambda b: b | {"X": b["X"][:, :9]}, ValueError, r"\(B, 20\).*got \(36, 9\)"),
    "one cell": (lambda b: b | {"X": b["X"][0]}, ValueError, r"\(B, 20\).*got \(20,\)"),
    "precision": (lambda b: b | {"X": b["X"].double()}, TypeError, "float32, got torch.float64"),
    "arrays": (lambda b: b | {"X": b["X"].numpy()}, TypeError, "tensors, got 'X' of ndarray"),
    "no batch": (
        lambda b: {k: v for k, v in b.items() if k != "batch"},
        KeyError,
        r"must have 'batch', got \['X', 'labels'\]",
    ),
    "no dictionary": (lambda b: b["X"], TypeError, "dictionary of tensors, got a Tensor"),
    "shape": (lambda b: b | {"batch": b["batch"][:, 0]}, ValueError, r"\(36, 1\), got \(36,\)"),
    "batch": (lambda b: b | {"batch": b["batch"] + 7}, ValueError, "from 0 to 1 .* 7 to 8"),
    "negative": (lambda b: b | {"X": with_value(b["X"], -1)}, ValueError, "raw counts.* row 5"),
    "NaN": (lambda b: b | {"X": with_value(b["X"], np.nan)}, ValueError, "finite .* row 5"),
    "empty": (lambda b: b | {"X": with_value(b["X"], 0)}, ValueError, "at least one .* row 5"),
}


@pytest.fixture(scope="module", params=[1, 2], ids=["A1", "A2"])
def model(request, make_adata):
    return fit(MixSCVI, make_adata(), BATCH, n_components=request.param)


def minibatches(model):
    adata = model.adata
    batch = torch.as_tensor((adata.obs["batch"] == "b1").to_numpy().copy()).long()[:, None]
    x = torch.as_tensor(adata.X)
    return [
        {"X": x[rows], "batch": batch[rows], "labels": torch.zeros(36, 1)}
        for rows in (slice(0, None, 2), slice(1, None, 2))
    ]


@pytest.mark.parametrize("method", [*METHODS][::2])
@pytest.mark.parametrize("wrong", WRONG)
def test_the_second_minibatch_is_wrong(model, method, wrong):
    change, error, what = WRONG[wrong]
    first, second = minibatches(model)
    with pytest.raises(error, match=f"minibatch 1 of dataloader .*{what}"):
        getattr(model, method)(dataloader=[first, change(second)], **METHODS[method])


@pytest.mark.parametrize("method", METHODS)
def test_none_at_all(model, method):
    with pytest.raises(ValueError, match="dataloader must give minibatches, got none"):
        getattr(model, method)(dataloader=iter([]), **METHODS[method])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("kind", "dtype"), [(list, torch.float32), (iter, torch.int32), (iter, torch.uint8)]
)
def test_good_ones_pass(model, method, kind, dtype):
    given = [part | {"X": part["X"].to(dtype)} for part in minibatches(model)]
    assert getattr(model, method)(dataloader=kind(given), **METHODS[method]) is not None


def test_labels_are_missed_where_they_are_needed(model):
    given = [{k: v for k, v in part.items() if k != "labels"} for part in minibatches(model)]
    assert model.get_latent_representation(dataloader=given).shape == (72, 3)
    with pytest.raises(KeyError, match="minibatches of dataloader must have 'labels', got"):
        model.get_elbo(dataloader=given)


def test_values_that_other_likelihoods_take(make_adata):
    adata = make_adata()
    normal = fit(MixSCVI, adata, BATCH, n_components=2, gene_likelihood="normal")
    given = [part | {"X": part["X"] - 0.5} for part in minibatches(normal)]
    assert np.isfinite(normal.get_latent_representation(dataloader=given)).all()
    adata = make_adata()
    adata.obs["size"] = 1.0
    sized = fit(MixSCVI, adata, {**BATCH, "size_factor_key": "size"}, n_components=2)
    given = [part | {"X": with_value(part["X"], 0)} for part in minibatches(sized)]
    assert np.isfinite(sized.get_latent_representation(dataloader=given)).all()


class Given(LightningDataModule):
    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def train_dataloader(self):
        return torch.utils.data.DataLoader(self.parts, batch_size=None)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize(
    "wrong", sorted(WRONG.keys() - {"arrays"})
)  # which torch's loader converts
def test_a_data_module_is_looked_at_before_it_is_trained_on(model, wrong):
    change, error, what = WRONG[wrong]
    parts = minibatches(model)
    untrained = MixSCVI(model.adata, n_components=2, **SMALL)
    before = {k: v.clone() for k, v in untrained.module.state_dict().items()}
    with pytest.raises(error, match=f"first minibatch of datamodule .*{what}"):
        train(untrained, datamodule=Given([change(part) for part in parts]), train_size=None)
    after = untrained.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_every_minibatch_of_a_data_module_is_looked_at(model):
    """One NaN would make all weights NaN."""
    parts = minibatches(model)
    parts[-1] = parts[-1] | {"X": with_value(parts[-1]["X"], float("nan"))}
    untrained = MixSCVI(model.adata, n_components=2, **SMALL)
    expected = f"minibatch {len(parts) - 1} of epoch 0 of datamodule must have finite counts"
    with pytest.raises(ValueError, match=expected):
        train(untrained, datamodule=Given(parts), train_size=None)
    assert all(value.isfinite().all() for value in untrained.module.state_dict().values())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_a_data_module_of_values_that_are_no_counts_is_warned_of(model):
    parts = [part | {"X": part["X"].log1p()} for part in minibatches(model)]
    untrained = MixSCVI(model.adata, n_components=2, **SMALL)
    with warnings.catch_warnings(record=True) as told:  # Lightning has others to tell
        warnings.simplefilter("always")
        train(untrained, datamodule=Given(parts), train_size=None)
    expected = "the first minibatch of datamodule has values that are no whole numbers"
    assert [str(warning.message).startswith(expected) for warning in told].count(True) == 1


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
@pytest.mark.parametrize("on_step", [False, True])
def test_among_several_processes_a_minibatch_of_one_cell_is_not_left_out(
    model, on_step, monkeypatch
):
    """All take their steps together: it is normalized by the statistics before it."""
    parts = minibatches(model)
    alone = {name: value[:1] for name, value in parts[0].items()}
    sizes = []
    for world_size in (1, 2):
        untrained = MixSCVI(model.adata, n_components=2, **SMALL)
        steps, forward = [], untrained.module.forward

        def noted(tensors, *args, steps=steps, forward=forward, **kwargs):
            steps.append(len(tensors["X"]))
            return forward(tensors, *args, **kwargs)

        monkeypatch.setattr(untrained.module, "forward", noted)
        monkeypatch.setattr(Trainer, "world_size", world_size)
        train(
            untrained,
            datamodule=Given([*parts, alone]),
            train_size=None,
            plan_kwargs={"on_step": on_step, "on_epoch": True},
        )
        sizes.append(set(steps))
        assert all(value.isfinite().all() for value in untrained.module.state_dict().values())
        assert untrained.module.training is False
    assert 1 not in sizes[0]
    assert 1 in sizes[1]


def test_a_loader_that_was_made_anew_for_several_processes(model, monkeypatch):
    """Lightning puts a sampler of cells into scvi-tools' loader, which wants one of minibatches."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    parts = [{name: value[None] for name, value in part.items()} for part in minibatches(model)]
    expected = r"got \(1, 36, 20\)\. Lightning made .*use_distributed_sampler=False to train"
    with pytest.raises(ValueError, match=expected):
        model.get_latent_representation(dataloader=parts)
