"""Arguments for loaders: named where they are none, or would give cells in another order."""

import pytest

from fitting import fit, train
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
