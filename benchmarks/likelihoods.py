"""Time of the count likelihoods, with and without the linear layers they follow.

    python benchmarks/likelihoods.py

What is compared is interleaved: each round times every method once. Methods: scvi-tools'
distributions under autograd; the eager tensor operations; the same with the dense terms under
torch.compile; the compiled kernels. `products` are the matrix products alone, the floor of the
tasks that start at hidden units. Times are in milliseconds; `cpu` counts all threads.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import tyro
from common import RESULTS, machine
from scvi.distributions import ZeroInflatedNegativeBinomial
from torch import Tensor

from mixscvi.likelihoods import eager, head_log_prob, native, zinb_log_prob
from mixscvi.system import keep_freed_memory, write_beside

BATCH, HIDDEN = 128, 128
# genes, share of counts that are not zero, mean count, inverse dispersion of the simulated counts
DATA = {"pbmc4k": (2000, 0.10, 0.15), "cortex": (4172, 0.55, 4.0), "pbmc3k": (13656, 0.06, 0.09)}


@dataclass
class Case:
    """Counts, parameters of the likelihood, and hidden units with the layers that make them."""

    x: Tensor
    mu: Tensor
    theta: Tensor
    zi_logits: Tensor
    hidden: Tensor
    scale: torch.nn.Linear
    dropout: torch.nn.Linear
    log_library: Tensor

    @classmethod
    def simulate(cls, n_genes: int, density: float, mean: float, n_components: int) -> Case:
        rng = np.random.default_rng(0)
        # Zero inflation makes up for what the mean count leaves above the wanted density.
        size = 0.5
        kept = min(1.0, density / (1 - (1 + mean / size) ** -size))
        rates = rng.gamma(size, mean / size, (BATCH, n_genes))
        counts = rng.poisson(rates) * (rng.random(rates.shape) < kept)
        shape = (1, BATCH, n_components)
        torch.manual_seed(0)
        return cls(
            x=torch.tensor(counts, dtype=torch.float32),
            mu=torch.rand(*shape, n_genes).mul(3).requires_grad_(),
            theta=torch.randn(n_genes).exp().requires_grad_(),
            zi_logits=torch.randn(*shape, n_genes).requires_grad_(),
            hidden=torch.rand(*shape, HIDDEN).requires_grad_(),
            scale=torch.nn.Linear(HIDDEN, n_genes),
            dropout=torch.nn.Linear(HIDDEN, n_genes),
            log_library=torch.full(shape, float(np.log(n_genes))),
        )

    def scvi(self, mu: Tensor, zi_logits: Tensor) -> Tensor:
        px = ZeroInflatedNegativeBinomial(
            mu=mu, theta=self.theta, zi_logits=zi_logits, validate_args=False
        )
        with warnings.catch_warnings():  # scvi-tools checks the counts regardless
            warnings.simplefilter("ignore")
            return px.log_prob(self.x[:, None]).sum(-1)

    def mean_of_hidden(self) -> Tensor:
        return self.log_library.exp().unsqueeze(-1) * self.scale(self.hidden).softmax(-1)

    def backward(self, value: Tensor) -> None:
        parameters = (self.mu, self.theta, self.zi_logits, self.hidden)
        for parameter in (*parameters, *self.scale.parameters(), *self.dropout.parameters()):
            parameter.grad = None
        value.mean().backward()

    def products(self, with_gradients: bool) -> None:
        rows = self.hidden.detach().flatten(0, -2)
        for layer in (self.scale, self.dropout):
            weight = layer.weight.detach()
            out = rows @ weight.t()
            if with_gradients:
                out.t() @ rows
                out @ weight


def methods(case: Case, compiled: Callable) -> dict[tuple[str, str], Callable[[], object]]:
    def of_parameters(log_prob: Callable, dense_terms: Callable | None = None):
        def run() -> None:
            usual, eager.dense_terms = eager.dense_terms, dense_terms or eager.dense_terms
            case.backward(log_prob(case.x, case.mu, case.theta, case.zi_logits))
            eager.dense_terms = usual

        return run

    def head() -> Tensor:
        scale, dropout = case.scale, case.dropout
        return head_log_prob(
            *(case.x, case.hidden, scale.weight, scale.bias, case.log_library, case.theta),
            *(dropout.weight, dropout.bias),
        )

    def scvi_head() -> Tensor:
        return case.scvi(case.mean_of_hidden(), case.dropout(case.hidden))

    def without_gradients(function: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(function)

    return {
        ("likelihood", "scvi-tools"): of_parameters(lambda x, mu, theta, zi: case.scvi(mu, zi)),
        ("likelihood", "eager"): of_parameters(eager.log_prob),
        ("likelihood", "torch.compile"): of_parameters(eager.log_prob, compiled),
        ("likelihood", "kernel"): of_parameters(zinb_log_prob),
        ("head", "scvi-tools"): lambda: case.backward(scvi_head()),
        ("head", "kernel"): lambda: case.backward(head()),
        ("head", "products"): lambda: case.products(True),
        ("evaluation", "scvi-tools"): without_gradients(scvi_head),
        ("evaluation", "kernel"): without_gradients(head),
        ("evaluation", "products"): lambda: case.products(False),
    }


def main(
    rounds: int = 20,
    threads: int = 2,
    only: Annotated[tuple[str, ...], tyro.conf.arg(help="data sets")] = tuple(DATA),
) -> None:
    torch.set_num_threads(threads)
    keep_freed_memory()
    compiled = torch.compile(eager.dense_terms, dynamic=True)
    rows = []
    for data in only:
        for n_components in (1, 4):
            case = Case.simulate(*DATA[data], n_components)
            timed = methods(case, compiled)
            seconds = {key: [] for key in timed}
            for repeat in range(rounds + 2):
                for key, function in timed.items():
                    wall, cpu = time.perf_counter(), time.process_time()
                    function()
                    now = (time.perf_counter() - wall, time.process_time() - cpu)
                    if repeat > 1:
                        seconds[key].append(now)
            for (task, method), times in seconds.items():
                wall, cpu = 1e3 * np.array(times).T
                rows.append(
                    {
                        "data": data,
                        "n_genes": DATA[data][0],
                        "nonzero": (case.x > 0).float().mean().item(),
                        "n_components": n_components,
                        "task": task,
                        "method": method,
                        "min_ms": wall.min(),
                        "median_ms": np.median(wall),
                        "median_cpu_ms": np.median(cpu),
                        "rounds": rounds,
                        "threads": threads,
                        **machine(),
                    }
                )
                print({key: rows[-1][key] for key in list(rows[-1])[:9]}, flush=True)
    text = pd.DataFrame(rows).to_csv(index=False, float_format="%.4g")
    write_beside(RESULTS / "likelihoods.csv", text)


if __name__ == "__main__":
    assert native.usable(torch.zeros(1)), "numba is missing"
    tyro.cli(main)
