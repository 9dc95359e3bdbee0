import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from mixscvi.mixture import StackedMLP, nonzeros
from mixscvi.mixture.mostly_zero import MostlyZero, SparseRows
from mixscvi.mixture.nonzeros import few_nonzeros, product_by_nonzeros


@pytest.fixture
def dense(normal):
    x = normal(9, 20).abs()
    x = x * (x > 1.3)
    x[4] = 0
    return x.float()


def by_nonzeros(dense):
    row, column = dense.nonzero(as_tuple=True)
    starts = F.pad(row.bincount(minlength=len(dense)).cumsum(0), (1, 0))
    return MostlyZero(SparseRows(starts, column, dense[row, column]), dense.shape[1])


@pytest.fixture
def x(dense):
    return by_nonzeros(dense)


def test_it_looks_like_its_matrix(x, dense):
    assert isinstance(x, torch.Tensor)
    assert (x.shape, x.dtype, x.device, len(x), x.dim()) == (
        (9, 20),
        torch.float32,
        dense.device,
        9,
        2,
    )
    assert x.layout is torch.strided
    assert not x.requires_grad
    assert x.to("cpu", non_blocking=True) is x
    assert (x.numpy() == dense.numpy()).all()
    assert x.tolist() == dense.tolist()
    assert "n_nonzeros=" in repr(x)


FUNCTIONS = {
    "sum": lambda x: x.sum(),
    "sums of columns": lambda x: x.sum(0),
    "sums of both": lambda x: x.sum((0, 1)),
    "sums in double": lambda x: x.sum(1, dtype=torch.float64),
    "add": lambda x: 1 + x,
    "rows": lambda x: x[2:4],
    "places": lambda x: x[torch.tensor([3, 1])],
    "one axis more": lambda x: x.unsqueeze(1),
    "transpose": lambda x: x.T,
    "view": lambda x: x.view(-1),
    "product": lambda x: x @ torch.ones(20, 3),
    "beside another": lambda x: torch.cat((x, torch.ones(9, 2)), dim=-1),
    "twice": lambda x: torch.cat((x, x)),
    "double": lambda x: x.double(),
    "to": lambda x: x.to(torch.float64),
    "clone": lambda x: x.clone(),
    "copy": copy.deepcopy,
    "pickled": lambda x: pickle.loads(pickle.dumps(x)),
    "greater": lambda x: x > 0,
    "indices": lambda x: x.nonzero(),
    "item": lambda x: x.max().item(),
    "written elsewhere": lambda x: torch.ones(9, 20).add_(x),
    "softmax": lambda x: F.softmax(x, -1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_all_others_see_a_dense_matrix(x, dense, name):
    got, expected = FUNCTIONS[name](x), FUNCTIONS[name](dense)
    if isinstance(expected, torch.Tensor):
        assert type(got) is torch.Tensor
        assert torch.equal(got, expected)
    else:
        assert got == expected


def test_halves_under_autocast(x, dense):
    weight = torch.ones(3, 20)
    with torch.autocast("cpu"):
        assert few_nonzeros(x, weight.T.contiguous()) is None
        assert torch.equal(F.linear(x, weight), F.linear(dense, weight))


@pytest.mark.parametrize(
    "function",
    [
        torch.log1p,
        lambda x: x.log1p(),
        lambda x: x.detach(),
        lambda x: torch.cat((x,), dim=-1),
        lambda x: torch.cat([x], dim=0),
    ],
)
def test_what_is_done_to_the_nonzeros_alone(x, dense, function):
    got = function(x)
    assert isinstance(got, MostlyZero)
    assert got._dense is None
    assert x._dense is None
    assert torch.equal(got.dense(), function(dense))


@pytest.mark.parametrize("kwargs", [{"dim": 1}, {"dim": -1}, {"dim": 1, "keepdim": True}])
def test_sums_of_rows(x, dense, kwargs):
    got = x.sum(**kwargs)
    assert x._dense is None
    torch.testing.assert_close(got, dense.sum(**kwargs))
    assert got.flatten()[4] == 0  # of a row without non-zeros


WRITING = {
    "add": lambda x: x.add_(1),
    "zero": lambda x: x.zero_(),
    "clamp": lambda x: x.clamp_(max=1.5),
    "out": lambda x: torch.add(torch.ones(9, 20), 1, out=x),
    "list": lambda x: torch._foreach_mul_([x], 2),
    "columns": lambda x: x.__setitem__((slice(None), slice(0, 5)), 0),
    "row": lambda x: x[0].fill_(3),
    "mask": lambda x: x.__setitem__(x > 1.5, 0),
    "transpose": lambda x: x.T.add_(1),
    "numpy": lambda x: x.numpy().__setitem__(slice(0, 3), 7),
    "nothing": lambda x: x.numpy(),
}


@pytest.mark.parametrize("name", WRITING)
def test_what_is_written_to_it_is_seen(x, dense, name):
    """By those who take the non-zeros as by all others, and later writes as well."""
    views = [x[1], dense[1]]
    for _ in range(2):
        for matrix in (x, dense):
            WRITING[name](matrix)
        assert torch.equal(x + 0, dense)
        assert torch.equal(by_rows(x), dense)
        assert torch.equal(x.log1p().dense(), dense.log1p())
        torch.testing.assert_close(x.sum(1), dense.sum(1))
    for view in views:
        view.mul_(0.5)
    assert torch.equal(by_rows(x), dense)


def by_rows(x):
    return MostlyZero(x.rows, x.shape[1]).dense()


def test_a_matrix_without_nonzeros():
    x = by_nonzeros(torch.zeros(3, 4))
    assert torch.equal(x.sum(1), torch.zeros(3))
    assert torch.equal(x.log1p().dense(), torch.zeros(3, 4))
    table = torch.ones(4, 64)
    assert torch.equal(x @ table, torch.zeros(3, 64))


def test_gradients_of_others(x, dense):
    def gradients(x):
        weight = torch.ones(3, 20, requires_grad=True)
        F.linear(x, weight).square().sum().backward()
        return weight.grad

    assert torch.equal(gradients(x), gradients(dense))


@pytest.mark.parametrize("covariates", [False, True])
def test_a_first_layer_takes_the_nonzeros(x, dense, covariates, monkeypatch):
    monkeypatch.setattr(nonzeros, "_LEAST_WORK", 0)
    torch.manual_seed(0)
    mlp = StackedMLP(2, 20, n_hidden=64, n_covariates=2 * covariates, dropout_rate=0)

    def results(x):
        mlp.zero_grad()
        y = mlp(x, torch.ones(9, 2) if covariates else None)
        y.sum().backward()
        return [y.detach(), *(p.grad.clone() for p in mlp.parameters())]

    for got, expected in zip(results(x), results(dense), strict=True):
        assert torch.equal(got, expected)
    assert (x._dense is None) is not covariates


def test_a_matrix_of_many_nonzeros_is_left_to_the_dense_product(monkeypatch):
    monkeypatch.setattr(nonzeros, "_LEAST_WORK", 0)
    table = torch.ones(20, 3)
    for share, found in ((0.25, True), (0.3, False)):
        dense = torch.zeros(10, 20)
        dense.view(-1)[: int(share * 200)] = 1
        x = by_nonzeros(dense)
        rows = few_nonzeros(x, table)
        assert (rows is not None) is found
        if found:
            assert torch.equal(product_by_nonzeros(rows, table), dense @ table)
