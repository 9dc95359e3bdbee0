"""The likelihoods compiled as for an accelerator, on the CPU."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mixscvi import compiled
from mixscvi.likelihoods import nb_log_prob, one_kernel, zinb_log_prob

G = 5


@pytest.fixture
def compiling(monkeypatch):
    """Take the CPU for an accelerator, and every size for a large one; yields a counter of graphs.

    The counter has what comes after dynamo trace and cut the graphs, without making machine code.
    """
    monkeypatch.setattr(compiled, "_failed", True)  # no kernel of numba
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(one_kernel, "_DEVICES", ("cpu",))
    monkeypatch.setattr(one_kernel, "_LEAST_ELEMENTS", 1)
    monkeypatch.setattr(one_kernel, "_BACKEND", counter)
    monkeypatch.setattr(one_kernel, "_failed", False)
    one_kernel._compile.cache_clear()
    torch._dynamo.reset()
    # scvi-tools' compiled training plans turn it on for the whole process; torch then logs itself.
    with torch._dynamo.config.patch(suppress_errors=False):
        yield counter
    one_kernel._compile.cache_clear()
    torch._dynamo.reset()


def draw(n_cells, n_draws, theta_shape):
    """Counts, and parameters that take gradients."""
    generator = torch.Generator().manual_seed(n_cells)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    x = torch.poisson(2 * rand(n_cells, G).detach(), generator=generator)
    of_draws = (1, n_cells, n_draws, G)
    shape = {"gene": (G,), "cell": (n_cells, 1, G), "draw": of_draws}[theta_shape]
    return x, rand(*of_draws), rand(*shape), rand(*of_draws)


def value_and_gradients(x, mean, theta, zi_logits):
    parameters = [mean, theta] if zi_logits is None else [mean, theta, zi_logits]
    value = (zinb_log_prob if zi_logits is not None else nb_log_prob)(x, *parameters)
    weights = torch.arange(1.0, value.numel() + 1, dtype=value.dtype).view(value.shape)
    return value, *torch.autograd.grad((weights * value).sum(), parameters)


@pytest.mark.parametrize("zero_inflated", [True, False])
@pytest.mark.parametrize("theta_shape", ["gene", "cell", "draw"])
def test_one_graph_serves_all_sizes(theta_shape, zero_inflated, compiling, monkeypatch):
    for n_cells, n_draws in ((7, 4), (5, 4), (3, 2), (6, 9)):
        inputs = draw(n_cells, n_draws, theta_shape)
        if not zero_inflated:
            inputs = (*inputs[:3], None)
        got = value_and_gradients(*inputs)
        with monkeypatch.context() as patch:
            patch.setattr(one_kernel, "_DEVICES", ())
            expected = value_and_gradients(*inputs)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert compiling.frame_count == 1


def test_values_alone_are_not_compiled(compiling):
    with torch.no_grad():
        zinb_log_prob(*draw(4, 3, "gene"))
    assert compiling.frame_count == 0


@pytest.mark.parametrize("name", ["_LEAST_ELEMENTS", "_DEVICES"])
def test_what_does_not_pay_is_not_compiled(name, compiling, monkeypatch):
    inputs = draw(4, 3, "gene")
    n_elements = inputs[1].numel()
    value = {"_LEAST_ELEMENTS": n_elements + 1, "_DEVICES": ("cuda",)}[name]
    monkeypatch.setattr(one_kernel, name, value)
    value_and_gradients(*inputs)
    assert compiling.frame_count == 0
    monkeypatch.setattr(one_kernel, "_LEAST_ELEMENTS", n_elements)
    monkeypatch.setattr(one_kernel, "_DEVICES", ("cpu",))
    value_and_gradients(*inputs)
    assert compiling.frame_count == 1


def test_under_vmap_nothing_is_compiled(compiling):
    x, mean, theta, zi_logits = draw(4, 3, "gene")

    def loss(mean):
        return zinb_log_prob(x, mean, theta, zi_logits).sum()

    gradient = torch.func.vmap(torch.func.grad(loss))(mean.unsqueeze(0).detach())
    (expected,) = torch.autograd.grad(loss(mean), mean)
    torch.testing.assert_close(gradient[0], expected)


def test_a_compiler_that_fails_is_named_once(compiling, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no such instruction\nand more")

    expected = value_and_gradients(*draw(4, 3, "gene"))
    assert compiling.frame_count == 1
    torch._dynamo.reset()
    one_kernel._compile.cache_clear()
    monkeypatch.setattr(one_kernel, "_BACKEND", broken)
    with pytest.warns(RuntimeWarning, match=r"RuntimeError: no such instruction\)"):
        first = value_and_gradients(*draw(4, 3, "gene"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = value_and_gradients(*draw(4, 3, "gene"))
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second, expected)


def test_an_error_of_ours_is_not_hidden(compiling):
    x, mean, theta, zi_logits = draw(4, 3, "gene")
    with pytest.raises(RuntimeError, match="size"):
        zinb_log_prob(x[:, :2], mean, theta, zi_logits)


def test_the_compiler_is_not_imported_before_it_is_needed():
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import mixscvi.likelihoods\n"
        "assert not [name for name in set(sys.modules) - before if '_dynamo' in name]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
