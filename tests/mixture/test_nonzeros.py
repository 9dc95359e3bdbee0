import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from compilers import not_compiled
from mixscvi import compiled
from mixscvi.mixture import nonzeros, sparse_kernels
from mixscvi.mixture.nonzeros import few_nonzeros, product_by_nonzeros


def few(normal, *shape):
    """Numbers of which fewer than a quarter are not zero."""
    x = normal(*shape)
    return x * (x > 1.2) if x.numel() > 40 else x * (x.abs() > 1.5)


@pytest.fixture(autouse=True)
def nothing_is_too_small(monkeypatch):
    monkeypatch.setattr(nonzeros, "_LEAST_WORK", 0)
    monkeypatch.setattr(nonzeros, "_WORK_PER_TASK", 1)


def by_nonzeros(x, table):
    rows = few_nonzeros(x, table)
    assert rows is not None
    return product_by_nonzeros(rows, table)


@pytest.fixture(params=["compiled", "not compiled any more"])
def whether_compiled(request, monkeypatch):
    """Non-zeros are found by numba; what follows must work if it fails from then on."""
    if request.param == "compiled":
        return
    find = few_nonzeros

    def found_and_lost(*args):
        rows = find(*args)
        monkeypatch.setattr(nonzeros, "_kernels", lambda: None)
        return rows

    monkeypatch.setitem(globals(), "few_nonzeros", found_and_lost)


@pytest.mark.usefixtures("whether_compiled")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n_out", [1, 31, 32, 50, 128, 129, 300])
@pytest.mark.parametrize("n_rows", [0, 1, 9, 70])
def test_product_by_nonzeros_is_the_product(normal, n_rows, n_out, dtype):
    x, table = few(normal, n_rows, 20), normal(20, n_out)
    got = by_nonzeros(x.to(dtype), table.to(dtype))
    assert got.dtype == dtype
    torch.testing.assert_close(got, (x @ table).to(dtype))


@pytest.mark.parametrize("n_threads", [1, 2, 5])
def test_a_row_does_not_depend_on_others_nor_on_threads(normal, n_threads):
    x, table = few(normal, 70, 200), normal(200, 300)
    alone = torch.cat([by_nonzeros(row.unsqueeze(0), table) for row in x])
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        assert torch.equal(by_nonzeros(x, table), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("n_rows", [0, 1, 9, 70])
def test_large_tables_are_read_once_to_the_same_sums(normal, n_rows, n_threads, dtype, monkeypatch):
    x, table = few(normal, n_rows, 200).to(dtype), normal(200, 320).to(dtype)
    by_row = by_nonzeros(x, table)
    monkeypatch.setattr(nonzeros, "_LARGE_TABLE", 0)
    monkeypatch.setattr(sparse_kernels, "sums_of_rows", None)
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        for of in (table, torch.cat((table, table), 1)[:, :320]):
            assert torch.equal(by_nonzeros(x, of), by_row)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("n_rows", "n_out"), [(20, 50), (1025, 64)])
def test_sums_that_are_left_to_be_taken_by_row(normal, n_rows, n_out, monkeypatch):
    x, table = few(normal, n_rows, 20), normal(20, n_out)
    monkeypatch.setattr(nonzeros, "_LARGE_TABLE", 0)
    monkeypatch.setattr(sparse_kernels, "sums_by_column", None)
    torch.testing.assert_close(by_nonzeros(x, table), x @ table)


@pytest.mark.parametrize("columns", [slice(3, 40), slice(0, 200, 2)])
def test_tables_of_any_strides(normal, columns):
    x, tables = few(normal, 9, 20), normal(20, 200)
    rows = few_nonzeros(x, tables)
    for table in (tables[:, columns], tables.T.contiguous().T):
        torch.testing.assert_close(product_by_nonzeros(rows, table), x @ table)
        assert (few_nonzeros(x, table) is not None) == (table.stride(1) == 1)


def test_the_last_numbers_are_found(normal):
    """With no more room than is needed, and one too few."""
    table = normal(8, 3)
    for n, found in ((8, True), (9, False)):
        x = torch.zeros(4, 8, dtype=torch.float64)
        x[-1], x[0, 0] = 1, float(n - 8)
        rows = few_nonzeros(x, table)
        assert (rows is not None) == found
        if found:
            torch.testing.assert_close(product_by_nonzeros(rows, table), x @ table)


@pytest.mark.usefixtures("whether_compiled")
def test_derivatives_of_the_product_by_nonzeros(normal):
    x, table = few(normal, 5, 7), normal(7, 3).requires_grad_()
    rows = few_nonzeros(x, table)
    torch.autograd.gradcheck(lambda table: product_by_nonzeros(rows, table), table)
    torch.autograd.gradgradcheck(lambda table: product_by_nonzeros(rows, table).pow(3), table)


def test_columns_are_found_once_and_only_for_a_gradient(normal, monkeypatch):
    seen, find = [], nonzeros._transpose
    monkeypatch.setattr(nonzeros, "_transpose", lambda *args: seen.append(1) or find(*args))
    x, table = few(normal, 5, 7), normal(7, 3)
    rows = few_nonzeros(x, table)
    product_by_nonzeros(rows, table)
    assert not seen
    for _ in range(2):
        product_by_nonzeros(rows, table.requires_grad_()).sum().backward()
    assert len(seen) == 1


def test_derivatives_by_function_transforms(normal):
    x, table = few(normal, 5, 7), normal(7, 3)
    rows = few_nonzeros(x, table)
    actual = torch.func.grad(lambda table: product_by_nonzeros(rows, table).square().sum())(table)
    torch.testing.assert_close(actual, 2 * x.T @ (x @ table))


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_tables_side_by_side_by_vmap(normal, in_dim):
    x, tables = few(normal, 5, 7), normal(4, 7, 3)
    rows = few_nonzeros(x, tables[0])
    product = torch.func.vmap(lambda table: product_by_nonzeros(rows, table), in_dims=in_dim)
    torch.testing.assert_close(product(tables.movedim(0, in_dim)), x @ tables)


def test_jacobian_by_function_transforms(normal):
    """Reverse mode: a vmap over the gradients of the table."""
    x, table = few(normal, 5, 7), normal(7, 3)
    rows = few_nonzeros(x, table)
    actual = torch.func.jacrev(lambda table: product_by_nonzeros(rows, table).square())(table)
    expected = torch.func.jacrev(lambda table: (x @ table).square())(table)
    torch.testing.assert_close(actual, expected)


def test_a_compiled_product_is_the_dense_one(normal):
    """Traced without looking at the numbers, so that the same graph serves every input."""
    table, graphs = normal(20, 600), []

    def product(x: torch.Tensor) -> torch.Tensor:
        rows = few_nonzeros(x, table)
        return x @ table if rows is None else product_by_nonzeros(rows, table)

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    compiled = torch.compile(product, backend=backend, fullgraph=True)
    for x in (few(normal, 9, 20), normal(9, 20), torch.zeros(9, 20).double()):
        torch.testing.assert_close(compiled(x), x @ table)
    assert len(graphs) == 1


def test_nan_is_not_taken_for_zero(normal):
    x, table = few(normal, 5, 7), normal(7, 3)
    x[2, 4] = torch.nan
    assert by_nonzeros(x, table).isnan().all(1).tolist() == [False, False, True, False, False]


def test_the_choice_is_not_made_where_numbers_must_not_matter():
    x, table = torch.eye(10), torch.ones(10, 600)
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(few_nonzeros(x, table) is not None)
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
        (torch.eye(200), 600, True),
        (torch.eye(200), 6, False),
        (torch.eye(200).requires_grad_(), 600, False),
        (torch.eye(200) + 1, 600, False),
        (torch.eye(200).double(), 600, False),
        (torch.eye(200).bfloat16(), 600, False),
        (torch.zeros(200, 200), 600, True),
        (torch.zeros(200, 200, device="meta"), 600, False),
    ],
    ids=["yes", "small", "gradient", "no zeros", "types", "halves", "nothing else", "device"],
)
def test_when_the_nonzeros_are_taken(x, n_out, expected, monkeypatch):
    monkeypatch.setattr(nonzeros, "_LEAST_WORK", 2**23)
    half = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    table = torch.ones(200, n_out, device=x.device, dtype=half)
    assert (few_nonzeros(x, table) is not None) is expected


def test_dense_products_where_nothing_can_be_compiled(monkeypatch):
    monkeypatch.setattr(compiled, "_failed", False)

    def fail(name):
        raise ImportError("No module named 'numba'")

    monkeypatch.setattr(compiled, "_import", fail)
    with pytest.warns(RuntimeWarning, match="No module named 'numba'"):
        assert few_nonzeros(torch.eye(10), torch.ones(10, 10)) is None


def test_a_kernel_that_fails_is_named(normal, monkeypatch):
    x, table = few(normal, 5, 7), normal(7, 3)
    for name in ("sums_of_rows", "find_nonzeros"):
        monkeypatch.setattr(compiled, "_failed", False)
        rows = few_nonzeros(x, table)
        with monkeypatch.context() as failing, pytest.warns(RuntimeWarning, match="no room"):
            failing.setattr(sparse_kernels, name, not_compiled(OSError("no room")))
            if name == "sums_of_rows":
                torch.testing.assert_close(product_by_nonzeros(rows, table), x @ table)
            else:
                assert few_nonzeros(x, table) is None
    monkeypatch.setattr(compiled, "_failed", False)
