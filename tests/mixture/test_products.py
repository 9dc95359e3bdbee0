import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mixscvi.mixture.products import mostly_zero, product_by_nonzeros


def few_nonzeros(normal, *shape):
    x = normal(*shape)
    return x * (x.abs() > 1.5)


@pytest.mark.parametrize("n_rows", [0, 1, 9])
def test_product_by_nonzeros_is_the_product(normal, n_rows):
    x, table = few_nonzeros(normal, n_rows, 20), normal(20, 6)
    torch.testing.assert_close(product_by_nonzeros(x, table), x @ table)


def test_derivatives_of_the_product_by_nonzeros(normal):
    x, table = few_nonzeros(normal, 5, 7), normal(7, 3).requires_grad_()
    assert 0 < x.count_nonzero() < x.numel()
    torch.autograd.gradcheck(lambda table: product_by_nonzeros(x, table), table)
    torch.autograd.gradgradcheck(lambda table: product_by_nonzeros(x, table).pow(3), table)


def test_derivatives_by_function_transforms(normal):
    x, table = few_nonzeros(normal, 5, 7), normal(7, 3)
    actual = torch.func.grad(lambda table: product_by_nonzeros(x, table).square().sum())(table)
    torch.testing.assert_close(actual, 2 * x.T @ (x @ table))


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_tables_side_by_side_by_vmap(normal, in_dim):
    x, tables = few_nonzeros(normal, 5, 7), normal(4, 7, 3)
    product = torch.func.vmap(lambda table: product_by_nonzeros(x, table), in_dims=in_dim)
    torch.testing.assert_close(product(tables.movedim(0, in_dim)), x @ tables)


def test_jacobian_by_function_transforms(normal):
    """Reverse mode: a vmap over the gradients of the table."""
    x, table = few_nonzeros(normal, 5, 7), normal(7, 3)
    actual = torch.func.jacrev(lambda table: product_by_nonzeros(x, table).square())(table)
    expected = torch.func.jacrev(lambda table: (x @ table).square())(table)
    torch.testing.assert_close(actual, expected)


def test_a_compiled_product_is_the_dense_one(normal):
    """Traced without looking at the numbers, so that the same graph serves every input."""
    table, graphs = normal(20, 600), []

    def product(x: torch.Tensor) -> torch.Tensor:
        return product_by_nonzeros(x, table) if mostly_zero(x, table) else x @ table

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(product, backend=backend, fullgraph=True)
    for x in (few_nonzeros(normal, 9, 20), normal(9, 20), torch.zeros(9, 20).double()):
        torch.testing.assert_close(compiled(x), x @ table)
    assert len(graphs) == 1


def test_nan_is_not_taken_for_zero(normal):
    x, table = few_nonzeros(normal, 5, 7), normal(7, 3)
    x[2, 4] = torch.nan
    product = product_by_nonzeros(x, table)
    assert product.isnan().all(1).tolist() == [False, False, True, False, False]


def test_a_gradient_that_would_be_lost_is_refused(normal):
    with pytest.raises(ValueError, match="x must not need a gradient"):
        product_by_nonzeros(normal(5, 7).requires_grad_(), normal(7, 3))


def test_the_choice_is_not_made_where_numbers_must_not_matter():
    x, table = torch.eye(10), torch.ones(10, 600)
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(mostly_zero(x, table))
        return x @ table

    torch.func.vmap(function)(torch.stack((x, x)))
    with torch.autocast("cpu"):
        function(x)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        function(mode.from_tensor(x))
    function(x)
    assert seen == [False, False, False, True]


@pytest.mark.parametrize(
    ("x", "n_out", "expected"),
    [
        (torch.eye(10), 600, True),
        (torch.eye(10), 6, False),
        (torch.eye(10).requires_grad_(), 600, False),
        (torch.eye(10) + 1, 600, False),
        (torch.zeros(10, 10), 600, True),
        (torch.zeros(10, 10, device="meta"), 600, False),
    ],
    ids=["yes", "few columns", "gradient", "no zeros", "nothing else", "other device"],
)
def test_when_the_nonzeros_are_taken(x, n_out, expected):
    assert mostly_zero(x, torch.ones(10, n_out, device=x.device)) is expected
