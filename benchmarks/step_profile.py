"""Where the time of a training step goes."""

from __future__ import annotations

from functools import partial
from typing import Any

from timed_models import in_turns, make, read, train

_PRODUCTS = (
    *("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm_"),
    *("mkldnn::_linear_pointwise", "sums of rows"),
)


_FEW, _MANY = 2, 22  # epochs

_PARTS_OF_A_STEP = (
    *("matrix products", "likelihood kernel", "optimizer", "loader"),
    *("other operations of torch", "Python"),
)


def _part_of_a_step(event: str) -> str:
    """To what the time of one of the profiler's events belongs."""
    if event in _PRODUCTS:
        return "matrix products"
    if event == "likelihood kernel":
        return event
    if "adam" in event or "_foreach" in event:
        return "optimizer"
    if "DataLoader" in event:
        return "loader"
    return "other operations of torch" if "::" in event else "Python"


def _milliseconds_of_a_step(model: Any, steps_per_epoch: float) -> float:
    """Of a training's steps alone, without what begins and ends it, and without a profiler."""
    calls = {"few": partial(train, model, _FEW), "many": partial(train, model, _MANY)}
    seconds = in_turns(calls, rounds=1)
    return 1000 * (seconds["many"][0] - seconds["few"][0]) / (_MANY - _FEW) / steps_per_epoch


def profile_training(data: str) -> list[dict]:
    """Where the time of a training step goes, in milliseconds and as shares.

    Operations are timed by torch's profiler, which makes Python slower: Python is what they leave
    of the time that a step takes without it.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    from mixscvi import compiled

    adata = read(data)
    run = compiled.in_blocks

    def recorded_run(kernel: Any, *args: Any) -> bool:
        likelihoods = kernel.__module__.startswith("mixscvi.likelihoods")
        with record_function("likelihood kernel" if likelihoods else "sums of rows"):
            return run(kernel, *args)

    rows = []
    for name, cls, kwargs in (
        ("SCVI", "SCVI", {}),
        ("A = 1, ZINB", "MixSCVI", {"n_components": 1}),
        ("A = 4, all_to_all, separate", "MixSCVI", {"n_components": 4}),
    ):
        model = make(adata, cls, **kwargs)
        train(model, _FEW)
        compiled.in_blocks = recorded_run
        try:
            with profile(activities=[ProfilerActivity.CPU]) as profiled:
                train(model, _FEW)
        finally:
            compiled.in_blocks = run
        n_steps = next(
            e.count for e in profiled.key_averages() if e.key.startswith("Optimizer.step")
        )
        parts = dict.fromkeys(_PARTS_OF_A_STEP, 0.0)
        for event in profiled.key_averages():
            parts[_part_of_a_step(event.key)] += event.self_cpu_time_total / 1000
        total = _milliseconds_of_a_step(model, n_steps / _FEW)
        parts["Python"] = 0.0
        parts = {part: value / n_steps for part, value in parts.items()}
        parts["Python"] = total - sum(parts.values())
        for part, value in parts.items():
            rows.append(
                {
                    "data": data,
                    "model": name,
                    "part": part,
                    "milliseconds": round(value, 3),
                    "share": round(value / total, 3),
                }
            )
            print(rows[-1], flush=True)
    return rows
