"""Distances from components: by the kernel, by products, one by one."""

import numpy as np
import pytest
import torch
from numba import NumbaError

from compilers import not_compiled
from mixscvi import compiled
from mixscvi.mixture import distance_kernels, distances
from mixscvi.mixture.distances import squared_distances


def drawn(n, b, k, d, dtype=torch.float64):
    value = torch.randn(n, b, d, dtype=dtype)
    inverse = torch.randn(b, k, d, d).double().tril()
    return value, torch.randn(b, d).double(), inverse, torch.randn(b, k, d).double()


def one_by_one(value, center, inverse, whitened):
    n, b, k = len(value), *inverse.shape[:2]
    out = np.empty((n, b, k))
    for i, cell, component in np.ndindex(n, b, k):
        z = (value[i, cell].double() - center[cell]).numpy()
        y = inverse[cell, component].numpy() @ z - whitened[cell, component].numpy()
        out[i, cell, component] = y @ y
    return torch.from_numpy(out)


@pytest.fixture(params=["kernel", "products"])
def path(request, monkeypatch):
    if request.param == "products":
        monkeypatch.setattr(distances, "_kernels", lambda *tensors: None)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (63, 2, 3, 4), (65, 1, 2, 7), (130, 3, 1, 10)])
def test_each_is_the_length_of_its_vector(path, shape, dtype):
    torch.manual_seed(0)
    inputs = drawn(*shape, dtype=dtype)
    got = squared_distances(*inputs)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, one_by_one(*inputs), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n_threads", [1, 2])
def test_bits_depend_on_nothing_that_shares_the_call(n_threads, monkeypatch):
    value, *parameters = drawn(200, 5, 3, 6)
    whole = squared_distances(value, *parameters)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    monkeypatch.setattr(distances, "_WORK_PER_TASK", 1)
    assert torch.equal(squared_distances(value, *parameters), whole)
    some = squared_distances(value[7:80, 2:4], *(part[2:4] for part in parameters))
    assert torch.equal(some, whole[7:80, 2:4])


def test_nothing_of_nothing(path):
    value, *parameters = drawn(4, 2, 3, 5)
    assert squared_distances(value[:0], *parameters).shape == (0, 2, 3)
    none = [part[:0] for part in parameters]
    assert squared_distances(value[:, :0], *none).shape == (4, 0, 3)


def test_gradients_are_those_of_the_products():
    inputs = [tensor.requires_grad_() for tensor in drawn(5, 2, 3, 4)]
    with torch.no_grad():
        inputs[2].copy_(inputs[2].tril())
    assert torch.autograd.gradcheck(squared_distances, inputs)
    with torch.no_grad():
        without = squared_distances(*inputs)
    torch.testing.assert_close(squared_distances(*inputs), without)


def test_a_compiler_that_fails_leaves_the_products(monkeypatch):
    inputs = drawn(5, 2, 3, 4)
    expected = squared_distances(*inputs)
    monkeypatch.setattr(compiled, "_failed", False)
    monkeypatch.setattr(distance_kernels, "squared_distances", not_compiled(NumbaError("no")))
    with pytest.warns(RuntimeWarning, match="numba"):
        torch.testing.assert_close(squared_distances(*inputs), expected)
