import subprocess
import sys
import warnings

import pytest
import torch
from numba import njit
from numba.core.errors import NumbaError
from torch._subclasses.fake_tensor import FakeTensorMode

from compilers import not_compiled
from mixscvi import compiled
from mixscvi.likelihoods import (
    eager,
    head_log_prob,
    kernels,
    logits_log_prob,
    native,
    zinb_log_prob,
)
from mixscvi.mixture.mostly_zero import MostlyZero, SparseRows

L, B, S, G = 1, 3, 2, 5


def draw_inputs():
    generator = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.ones(B, G), generator=generator)
    mu, logits = torch.rand(2, L, B, S, G, generator=generator)
    return x, mu.requires_grad_(), torch.rand(G, generator=generator).requires_grad_(), logits


def value_and_gradient(x, mu, theta, logits):
    value = zinb_log_prob(x, mu, theta, logits)
    return value, *torch.autograd.grad(value.sum(), (mu, theta))


@pytest.fixture
def fresh(monkeypatch):
    """As if numba had not failed yet, before the test and after it."""
    monkeypatch.setattr(compiled, "_failed", False)


def test_importing_the_likelihoods_does_not_import_numba():
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import mixscvi.likelihoods\n"
        "assert 'mixscvi.likelihoods.kernels' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("error", [NumbaError, AttributeError, EOFError, OSError, RuntimeError])
def test_a_compiler_that_fails_is_named_once(error, fresh, monkeypatch):
    expected = value_and_gradient(*draw_inputs())
    monkeypatch.setattr(kernels, "rows", not_compiled(error("no such instruction\nand more")))
    with pytest.warns(RuntimeWarning, match=rf"numba.*{error.__name__}: no such instruction\)"):
        first = value_and_gradient(*draw_inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = value_and_gradient(*draw_inputs())
    for got, again, wanted in zip(first, second, expected, strict=True):
        torch.testing.assert_close(got, wanted)
        assert torch.equal(got, again)


def test_code_that_numba_does_not_take_is_named(fresh):
    with pytest.warns(RuntimeWarning, match=r"TypingError: No implementation of function"):
        assert compiled.attempt(njit(lambda x: x + "text"), 1) is None


def test_colors_are_no_part_of_the_cause(fresh):
    error = RuntimeError("\x1b[1m\x1b[31mno such instruction\x1b[0m")
    with pytest.warns(RuntimeWarning, match=r"\(RuntimeError: no such instruction\)$"):
        compiled._give_up(error)


def test_a_library_that_does_not_load_is_named(fresh, monkeypatch):
    def fail(name):
        exec("raise OSError('no shared object file')", {"__name__": "llvmlite.binding"})

    monkeypatch.setattr(compiled, "_import", fail)
    with pytest.warns(RuntimeWarning, match=r"OSError: no shared object file\)"):
        zinb_log_prob(*draw_inputs())


def test_a_head_whose_compiler_fails_falls_back(fresh, monkeypatch):
    x, *_, theta, _ = draw_inputs()
    hidden, weight, bias = torch.randn(L, B, S, 4), torch.randn(G, 4), torch.randn(G)
    given = (x, hidden, weight, bias, torch.tensor(2.0), theta, weight.flip(0), bias.flip(0))
    expected = head_log_prob(*given)

    monkeypatch.setattr(kernels, "rows", not_compiled(NumbaError("no")))
    with pytest.warns(RuntimeWarning, match="numba"):
        torch.testing.assert_close(head_log_prob(*given), expected)


def test_a_compiler_that_fails_after_the_forward_pass_leaves_the_gradients(fresh, monkeypatch):
    x, *_, theta, _ = draw_inputs()
    theta = theta.detach().requires_grad_()
    hidden, weight, bias = torch.randn(L, B, S, 4), torch.randn(G, 4), torch.randn(G)
    weights = torch.rand(L, B, S)  # rows that do not count alike need another pass

    def value():
        return head_log_prob(x, hidden, weight, bias, torch.tensor(2.0), theta, equal_rows=True)

    (expected,) = torch.autograd.grad(value(), theta, weights)
    failing = value()
    monkeypatch.setattr(kernels, "rows", not_compiled(NumbaError("no")))
    with pytest.warns(RuntimeWarning, match="numba"):
        (got,) = torch.autograd.grad(failing, theta, weights)
    torch.testing.assert_close(got, expected)


def test_missing_numba_is_named_once(fresh, monkeypatch):
    def fail(name):
        raise ImportError("No module named 'numba'")

    monkeypatch.setattr(compiled, "_import", fail)
    with pytest.warns(RuntimeWarning, match="No module named 'numba'"):
        zinb_log_prob(*draw_inputs())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zinb_log_prob(*draw_inputs())


def test_a_mistake_of_ours_is_not_hidden(fresh, monkeypatch):
    def fail(*args):
        raise TypeError("wrong argument")

    monkeypatch.setattr(kernels, "rows", fail)
    with pytest.raises(TypeError, match="wrong argument"):
        zinb_log_prob(*draw_inputs())


def test_threads_without_openmp(monkeypatch):
    tasks, done = [(i,) for i in range(20)], []
    monkeypatch.setattr(compiled, "_openmp_parallel", lambda: None)
    compiled.run_tasks(done.append, tasks, 3)
    assert sorted(done) == list(range(20))


@pytest.mark.parametrize("openmp", [True, False])
def test_an_error_in_a_thread_reaches_the_caller(openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(compiled, "_openmp_parallel", lambda: None)

    def fail(task):
        raise OSError(f"task {task}")

    with pytest.raises(OSError, match="task"):
        compiled.run_tasks(fail, [(1,), (2,), (3,)], 2)


@pytest.mark.parametrize("n_cells", [1, 3, 200])
@pytest.mark.parametrize("n_draws", [1, 7, 5000])
@pytest.mark.parametrize("n_threads", [1, 2, 16])
def test_tasks_cover_every_row_once(n_cells, n_draws, n_threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    covered = torch.zeros(n_cells, n_draws, dtype=torch.int)
    tasks = native._tasks(n_cells, n_draws, 2000)
    assert [number for *_, number in tasks] == list(range(len(tasks)))
    for first_cell, last_cell, first_draw, last_draw, _ in tasks:
        covered[first_cell:last_cell, first_draw:last_draw] += 1
    assert (covered == 1).all()
    assert n_cells * n_draws < 1000 or len(tasks) >= n_threads


def test_what_the_kernels_do_not_take():
    x, mu, theta, logits = draw_inputs()
    assert native.usable(x, mu, theta, logits)
    assert not native.usable(x, mu.double(), theta, logits)
    assert not native.usable(x.bfloat16(), mu.bfloat16())
    assert not native.usable(x.to("meta"), mu.to("meta"))
    with FakeTensorMode():
        assert not native.usable(torch.ones(2), torch.ones(2))


def test_under_vmap_and_grad():
    x, mu, theta, logits = (value.detach() for value in draw_inputs())

    def loss(cell, rate, logit):
        return zinb_log_prob(cell[None], rate[None, None], theta, logit[None, None]).sum()

    gradient = torch.func.vmap(torch.func.grad(loss, argnums=1))(x, mu[0], logits[0])
    mu.requires_grad_()
    (expected,) = torch.autograd.grad(zinb_log_prob(x, mu, theta, logits).sum(), mu)
    torch.testing.assert_close(gradient, expected[0])


@pytest.mark.parametrize("device", ["cuda", "meta"])
@pytest.mark.parametrize("theta_shape", [(G,), (B, 1, G), (L, B, S, G)])
def test_on_fake_accelerators(theta_shape, device):
    # On fakes of "cuda" a build of torch without it aborts wherever gradients are recorded.
    with_grad = device == "meta"
    with FakeTensorMode(), torch.set_grad_enabled(with_grad):
        x = torch.ones(B, G, device=device)
        theta = torch.ones(theta_shape, device=device, requires_grad=with_grad)
        hidden = torch.ones(L, B, S, 4, device=device)
        weight, bias = torch.ones(G, 4, device=device), torch.ones(G, device=device)
        library = torch.ones(B, 1, device=device)
        value = head_log_prob(x, hidden, weight, bias, library, theta, weight, bias)
        if with_grad:
            value.sum().backward()
    assert value.shape == (L, B, S)
    assert value.device.type == device
    assert not with_grad or theta.grad.device.type == device


def test_the_eager_terms_compile_to_one_graph():
    x, mu, theta, logits = (value.detach() for value in draw_inputs())
    compiled = torch.compile(eager.dense_terms, fullgraph=True, backend="eager")
    expected = eager.dense_terms(x, mu, theta, logits, True)
    for got, wanted in zip(compiled(x, mu, theta, logits, True), expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (4, 5)])
def test_counts_of_other_cells_or_genes_are_refused(shape):
    logits, log_library = torch.zeros(1, 3, 2, 5), torch.zeros(1, 3, 2)
    nothing = torch.empty(0, dtype=torch.int64)
    rows = SparseRows(torch.zeros(shape[0] + 1, dtype=torch.int64), nothing, torch.empty(0))
    for x in (torch.zeros(shape), MostlyZero(rows, shape[1])):
        with pytest.raises(ValueError, match=r"counts must .* \(B, G\) = \(3, 5\)"):
            logits_log_prob(x, logits, log_library, torch.ones(5))


@pytest.mark.parametrize("shape", [(4,), (1,), (1, 1, 5), (3, 5), (1, 3, 1, 5), (2, 3, 2, 5)])
def test_dispersions_of_other_shapes_are_refused(shape):
    """The kernels would read what lies beyond them in memory."""
    x, logits, log_library = torch.ones(3, 5), torch.zeros(1, 3, 2, 5), torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match=r"theta must .* \(B, 1, G\) = \(3, 1, 5\)"):
        logits_log_prob(x, logits, log_library, torch.ones(shape))
    if len(shape) > 2:
        with pytest.raises(ValueError, match=r"zi_logits must .* = \(1, 3, 2, 5\)"):
            logits_log_prob(x, logits, log_library, torch.ones(5), torch.ones(shape))
