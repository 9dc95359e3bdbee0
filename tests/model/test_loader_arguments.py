"""Arguments for loaders: named where they are none, or would give cells in another order."""

import numpy as np
import pytest
import torch

from fitting import SMALL, fit, train
from mixscvi import MixSCVI

CALLS = {
    "get_marginal_ll": lambda m, k: m.get_marginal_ll(n_mc_samples=4, data_loader_kwargs=k),
    "get_normalized_expression": lambda m, k: m.get_normalized_expression(data_loader_kwargs=k),
    "get_latent_mixture": lambda m, k: m.get_latent_mixture(**k),
    "get_latent_representation": lambda m, k: m.get_latent_representation(**k),
    "get_likelihood_parameters": lambda m, k: m.get_likelihood_parameters(**k),
}
WRONG = [
    ({"pin_memry": True}, TypeError, "takes no argument 'pin_memry', .* did you mean 'pin_memory'"),
    ({"shuffle": True}, TypeError, "must not have 'shuffle', got True"),
    ({"drop_last": True}, TypeError, "must not have 'drop_last'"),
    ({"sampler": [3]}, TypeError, "must not have 'sampler'"),
    ({"num_workers": "two"}, TypeError, "num_workers must be an integer"),
    ({"collate_fn": 3}, TypeError, "collate_fn must be a function, got 3"),
    ({"generator": 3}, TypeError, "generator must be a torch.Generator, got 3"),
    ({"timeout": -1}, ValueError, "timeout must be a finite number of at least 0"),
    ({"prefetch_factor": 2}, ValueError, "prefetch_factor=2 needs num_workers above 0"),
    ({"persistent_workers": True}, ValueError, "persistent_workers=True needs num_workers"),
]


@pytest.fixture(scope="module", params=[1, 2], ids=["A1", "A2"])
def model(request, make_adata):
    return fit(MixSCVI, make_adata(), n_components=request.param)


@pytest.mark.parametrize("method", CALLS)
@pytest.mark.parametrize(("given", "error", "what"), WRONG, ids=[[*one[0]][0] for one in WRONG])
def test_wrong_arguments_of_a_method(model, method, given, error, what):
    with pytest.raises(error, match=what):
        CALLS[method](model, given)


@pytest.mark.parametrize("method", CALLS)
def test_right_arguments_of_a_method(model, method):
    given = {"pin_memory": False, "collate_fn": None, "num_workers": 0, "worker_init_fn": print}
    given |= {"drop_last": False, "shuffle": False}  # as they are
    assert CALLS[method](model, given) is not None


@pytest.mark.parametrize(
    ("given", "error", "what"),
    [
        ({"shuffle": True}, TypeError, "must not have 'shuffle', which train"),
        ({"indices": [1]}, TypeError, "must not have 'indices', which train"),
        ({"adata_manager": 3}, TypeError, "must not have 'adata_manager', which train"),
        ({"data_and_attributes": ["X"]}, TypeError, "'data_and_attributes', which train"),
        ({"load_sparse_tensor": True}, TypeError, "must not have 'load_sparse_tensor'"),
        ({"batch_size": 3}, TypeError, "'batch_size', an argument of train"),
        ({"drop_last": "no"}, TypeError, "drop_last"),
        *WRONG[4:],
    ],
)
def test_arguments_of_the_splitter(model, given, error, what):
    with pytest.raises(error, match=what):
        train(model, datasplitter_kwargs=given)


@pytest.mark.parametrize("method", ["get_elbo", "get_reconstruction_error"])
def test_arguments_of_the_module(model, method):
    with pytest.raises(TypeError, match=rf"{method}\(\) takes no argument 'los_kwargs', .*'loss_k"):
        getattr(model, method)(los_kwargs={})
    assert getattr(model, method)(generative_kwargs={}) is not None


@pytest.mark.parametrize("weights", [None, "uniform", "importance", "adapted"])
def test_arguments_of_weights(model, weights):
    with pytest.raises(TypeError, match=r"expression\(\) takes no argument 'n_sample', got 25"):
        model.get_normalized_expression(weights=weights, n_sample=25)


def test_importance_weights_of_listed_cells(model):
    """SCVI takes arrays of positions alone here."""
    draws = model.get_normalized_expression(
        indices=[0, 1, 5], weights="importance", n_samples_overall=7, n_mc_samples=10
    )
    assert draws.shape == (7, 20)
    assert np.isfinite(draws).all()
    with pytest.raises(ValueError, match="weights='importance' needs adata"):
        model.get_normalized_expression(
            dataloader=[{"X": torch.ones(2, 20), "batch": torch.zeros(2, 1)}], weights="importance"
        )


@pytest.mark.parametrize("n", [3, 72, 200])
@pytest.mark.parametrize("weights", [None, "uniform"])
def test_draws_overall_are_an_array(model, n, weights):
    """SCVI fails to name so many rows by the cells."""
    draws = model.get_normalized_expression(n_samples_overall=n, weights=weights)
    assert isinstance(draws, np.ndarray)
    assert draws.shape == (n, 20)
    with pytest.warns(UserWarning, match="return_numpy=False has no cells to name"):
        model.get_normalized_expression(n_samples_overall=n, return_numpy=False)
    with pytest.raises(ValueError, match="n_samples_overall takes the place of n_samples"):
        model.get_normalized_expression(n_samples_overall=n, n_samples=2)


def test_too_few_draws_for_a_standard_error(model):
    n = 2 * model.module.n_components
    assert len(model.get_marginal_ll(n_mc_samples=n, return_std_error=True)) == 2
    with pytest.raises(ValueError, match="True needs two draws per component, .* got"):
        model.get_marginal_ll(n_mc_samples=n // 2, return_std_error=True)


@pytest.mark.parametrize(
    ("given", "error", "what"),
    [
        ({"checkpoint_dir": 3}, TypeError, "checkpoint_dir must be a path, got 3"),
        ({"val_check_interval": 1_000}, ValueError, "val_check_interval=1000 must be a number of"),
        ({"val_check_interval": 2.5}, ValueError, "val_check_interval must be a finite number"),
    ],
)
def test_arguments_of_training(model, given, error, what):
    with pytest.raises(error, match=what):
        train(model, **given)


class NoModule:
    def train_dataloader(self):
        return []


@pytest.mark.parametrize("given", [NoModule(), 3, "folder", torch.nn.Linear(2, 2)])
def test_data_modules_that_are_none(model, given):
    with pytest.raises(TypeError, match="datamodule must be a LightningDataModule, got"):
        train(model, datamodule=given)


def test_a_training_takes_its_own_batches(make_adata):
    """scvi-tools notes codes in the AnnData, where those of another model may have come since."""
    adata = make_adata()
    MixSCVI.setup_anndata(adata, batch_key="batch")
    model = MixSCVI(adata, n_components=2, **SMALL)
    MixSCVI.setup_anndata(adata)  # for another model: one batch
    train(model)
    codes = np.unique(model.adata_manager.get_from_registry("batch"))
    assert codes.tolist() == [0, 1]
