"""What a training step costs as components are added: time and peak memory, in one run.

Steps of all models are interleaved, so that drift of the machine falls on all alike; quote the
ratio to the same network with one component.

    python benchmarks/cost_of_components.py    # writes results/cost_of_components.csv
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings

import torch
from common import RESULTS, machine, read_counts
from torch.utils._python_dispatch import TorchDispatchMode

from mixscvi.system import write_beside
from mixscvi.tables import csv_text

AMORTIZED = {"component_encoder": "amortized"}
MODELS = {
    "scVI": (1, 1, {}),
    "A = S = 1": (1, 1, AMORTIZED),
    "A = 400, S = 1, some_to_some": (400, 1, {**AMORTIZED, "estimator": "some_to_some"}),
    "A = 400, S = 1, some_to_all": (400, 1, {**AMORTIZED, "estimator": "some_to_all"}),
    "A = 4, all_to_all, separate": (4, 4, {}),
    "A = 4, all_to_all, amortized": (4, 4, AMORTIZED),
    "A = 4, S = 1, some_to_some, separate": (4, 1, {"estimator": "some_to_some"}),
}


class _LargestOutput(TorchDispatchMode):
    """Records the most elements that an operation returns."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.untyped_storage().nbytes() // 4)
        return out


def main() -> None:
    """Time all models step by step."""
    import scvi

    from mixscvi import MixSCVI
    from mixscvi.mixture import StandardNormal

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--data", default="pbmc4k")
    parser.add_argument("--genes", type=int, default=2000)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    adata = read_counts(args.data, args.genes)
    MixSCVI.setup_anndata(adata)
    steps, largest, times = {}, {}, {name: [] for name in MODELS}
    for name, (n_components, n_sampled, kwargs) in MODELS.items():
        scvi.settings.seed = 0
        if name != "scVI":  # a prior object keeps one component off scVI's own path
            kwargs = {**kwargs, "prior": StandardNormal(10)}
        model = MixSCVI(adata, n_components=n_components, n_sampled_components=n_sampled, **kwargs)
        batch = next(iter(model._make_data_loader(adata, batch_size=128)))
        module = model.module.train()
        optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, eps=0.01, weight_decay=1e-6)

        def step(module=module, optimizer=optimizer, batch=batch) -> float:
            start = time.perf_counter()
            optimizer.zero_grad()
            module(batch)[2].loss.backward()
            optimizer.step()
            return time.perf_counter() - start

        step()
        steps[name] = step
        with _LargestOutput() as record:
            module(batch)
        largest[name] = record.largest
    for _ in range(args.steps):
        for name, step in steps.items():
            times[name].append(step())
    rows = []
    base = {name: statistics.median(times[name]) for name in ("scVI", "A = S = 1")}
    for name, (n_components, n_sampled, _) in MODELS.items():
        median = statistics.median(times[name])
        row = {
            "model": name,
            "n_components": n_components,
            "n_sampled_components": n_sampled,
            "data": f"{args.data}, {adata.n_vars} genes, batch 128",
            "milliseconds": float(f"{1e3 * median:.6g}"),
            "ratio_to_one_component": float(f"{median / base['A = S = 1']:.6g}"),
            "ratio_to_scvi": float(f"{median / base['scVI']:.6g}"),
            "largest_tensor_elements": largest[name],
        }
        rows.append(row | machine())
        print({key: row[key] for key in row if key != "data"}, flush=True)
    write_beside(RESULTS / "cost_of_components.csv", csv_text(rows))


if __name__ == "__main__":
    main()
