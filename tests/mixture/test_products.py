import pytest
import torch

from mixscvi.mixture import products
from mixscvi.mixture.products import linear, product_with_transpose

needs_onednn = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)


def _strided(t, layout):
    if layout == "rows":
        return t.contiguous()
    if layout == "columns":
        return t.T.contiguous().T
    return torch.stack((t, t), -1)[..., 0]


@pytest.fixture
def single(normal):
    """Standard normal numbers of a shape, in single precision."""
    return lambda *shape: normal(*shape).float()


@pytest.fixture
def onednn(monkeypatch):
    """Every product is left to oneDNN; how many were."""
    calls = []
    monkeypatch.setattr(products, "_is_intel", lambda: False)
    operator = torch.ops.mkldnn._linear_pointwise

    def counted(*args):
        calls.append(args)
        return operator(*args)

    monkeypatch.setattr(products, "_LEAST_MULTIPLICATIONS", 0)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return calls


@needs_onednn
@pytest.mark.parametrize("y_layout", ["rows", "columns", "gaps"])
@pytest.mark.parametrize("x_layout", ["rows", "columns", "gaps"])
@pytest.mark.parametrize(("n", "k", "m"), [(7, 5, 3), (3, 5, 40), (40, 5, 3), (1, 1, 1)])
def test_product_by_onednn_is_the_product(single, onednn, n, k, m, x_layout, y_layout):
    x, y = _strided(single(n, k), x_layout), _strided(single(m, k), y_layout)
    expected = (x.double() @ y.double().T).float()
    torch.testing.assert_close(product_with_transpose(x, y), expected)
    assert len(onednn) == 1


@needs_onednn
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_derivatives_of_the_product_by_onednn(single, onednn):
    x, y, weights = single(7, 5), single(3, 5), single(7, 3)

    def value(x, y):
        return (product_with_transpose(x, y).tanh() * weights).sum()

    def plain(x, y):
        return ((x @ y.T).tanh() * weights).sum()

    def hessian(f, argnums):
        return torch.func.jacrev(torch.func.jacrev(f, argnums), argnums)

    for derivative in (torch.func.grad, hessian):
        ours = derivative(value, argnums=(0, 1))(x, y)
        torch.testing.assert_close(ours, derivative(plain, argnums=(0, 1))(x, y))
    tangents = (single(7, 5), single(3, 5))
    for some in ((0, 1), (0,), (1,)):
        primals = (x, y)

        def of_some(f, *given, some=some, primals=primals):
            args = list(primals)
            for i, arg in zip(some, given, strict=True):
                args[i] = arg
            return f(*args)

        given = tuple(primals[i] for i in some), tuple(tangents[i] for i in some)
        ours = torch.func.jvp(lambda *a: of_some(value, *a), *given)  # noqa: B023
        theirs = torch.func.jvp(lambda *a: of_some(plain, *a), *given)  # noqa: B023
        torch.testing.assert_close(ours, theirs)
    assert onednn


@needs_onednn
def test_a_linear_layer_by_onednn(single, onednn):
    x, weight, bias = (t.requires_grad_() for t in (single(7, 5), single(3, 5), single(3)))
    cotangent = single(7, 3)
    ours = torch.autograd.grad(linear(x, weight, bias), (x, weight, bias), cotangent)
    assert len(onednn) == 3
    theirs = torch.autograd.grad(
        torch.nn.functional.linear(x, weight, bias), (x, weight, bias), cotangent
    )
    torch.testing.assert_close(ours, theirs)
    # What is not asked for is not computed.
    torch.autograd.grad(linear(x.detach(), weight), weight, cotangent)
    assert len(onednn) == 5


@needs_onednn
def test_products_side_by_side_by_vmap(single, onednn):
    x, y = single(4, 7, 5), single(3, 5, 4)
    ours = torch.vmap(product_with_transpose, (0, 2))(x, y)
    torch.testing.assert_close(ours, torch.einsum("bnk,mkb->bnm", x, y))
    ours = torch.vmap(product_with_transpose, (0, None))(x, y[..., 0])
    torch.testing.assert_close(ours, x @ y[..., 0].T)


@needs_onednn
def test_large_products_are_left_to_onednn(monkeypatch, onednn):
    monkeypatch.setattr(products, "_LEAST_MULTIPLICATIONS", 8 * 4 * 2)
    product_with_transpose(torch.ones(8, 4), torch.ones(2, 4))
    assert len(onednn) == 1
    with monkeypatch.context() as without:
        without.setattr(torch.backends.mkldnn, "enabled", False)
        product_with_transpose(torch.ones(8, 4), torch.ones(2, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert product_with_transpose(torch.ones(8, 4), torch.ones(2, 4)).dtype == torch.bfloat16
        assert linear(torch.ones(8, 4), torch.ones(2, 4)).dtype == torch.bfloat16
    product_with_transpose(torch.ones(8, 4).double(), torch.ones(2, 4).double())
    product_with_transpose(torch.ones(8, 4), torch.ones(1, 4))
    product_with_transpose(torch.ones(8, 4, device="meta"), torch.ones(2, 4, device="meta"))
    torch.compile(product_with_transpose, backend="eager", fullgraph=True)(
        torch.ones(8, 4), torch.ones(2, 4)
    )
    assert len(onednn) == 1


def test_products_are_left_to_intels_library_on_its_processors(single, onednn, monkeypatch):
    product_with_transpose(torch.ones(8, 4), torch.ones(2, 4))
    assert len(onednn) == 1
    monkeypatch.setattr(products, "_is_intel", lambda: True)
    product_with_transpose(torch.ones(8, 4), torch.ones(2, 4))
    assert len(onednn) == 1


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
@pytest.mark.parametrize("library", [True, False])
def test_the_processor_is_known_by_its_vendor(vendor, library, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: library)
    monkeypatch.setattr(products, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(products.platform, "processor", lambda: f"Family 6, {vendor}")
    is_intel = products._is_intel.__wrapped__
    assert is_intel() == (library and vendor == "GenuineIntel")
    (tmp_path / "cpuinfo").write_text(f"vendor_id : {vendor}")
    monkeypatch.setattr(products.platform, "processor", lambda: "")
    assert is_intel() == (library and vendor == "GenuineIntel")
