"""The loss stays on one device, on fakes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from naive_module import COMBINATIONS, COVARIATES, make_module, make_tensors

DEVICE_CASES = COMBINATIONS | {
    "zinb, library, gene-batch": {
        "gene_likelihood": "zinb",
        "use_observed_lib_size": False,
        "dispersion": "gene-batch",
    },
    "poisson, embedding": {"gene_likelihood": "poisson", "batch_representation": "embedding"},
    "normal, gene-label, 2 samples": {
        "gene_likelihood": "normal",
        "dispersion": "gene-label",
        "n_samples": 2,
    },
    "gene-cell, ln": {"dispersion": "gene-cell", "latent_distribution": "ln"},
    "one component, gene-batch": {"n_components": 1, "dispersion": "gene-batch"},
    "one component, library": {"n_components": 1, "use_observed_lib_size": False},
}


@pytest.fixture(autouse=True)
def unvalidated(monkeypatch):
    """A fake has no values for scvi-tools' distributions to check, if another test turned it on."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)


def loss_on_fakes(module, *, device="meta", left_behind=()):
    """Run the loss on fakes on another device, some parameters left on the CPU.

    "meta" is another device than the CPU to every operation, and takes gradients. On fakes of
    "cuda" a build of torch without it aborts, in batch normalization's training and wherever
    gradients are recorded, so those run the loss alone.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    def fake(value, device=device):
        empty = torch.empty(value.shape, dtype=value.dtype, device=device)
        return torch.nn.Parameter(empty) if isinstance(value, torch.nn.Parameter) else empty

    parts = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    tensors = make_tensors(module, 6)
    shape_env = ShapeEnv(allow_dynamic_output_shape_ops=True)
    with FakeTensorMode(shape_env=shape_env):
        parts = {
            name: fake(value, "cpu" if name in left_behind else device)
            for name, value in parts.items()
        }
        tensors = {name: fake(value) for name, value in tensors.items()}
        with torch.set_grad_enabled(device == "meta"):
            _, _, losses = torch.func.functional_call(module, parts, (tensors,))
        if device == "meta":
            losses.loss.backward()
    gradients = {name: part.grad for name, part in parts.items() if part.grad is not None}
    return losses, gradients


@pytest.mark.parametrize(
    ("name", "training"),
    [(name, True) for name in DEVICE_CASES]
    + [(name, False) for name in DEVICE_CASES if "," in name or name.endswith("vamp-2")],
)
def test_loss_keeps_to_one_device(name, training):
    kwargs = DEVICE_CASES[name]
    module = make_module(**{"gene_likelihood": "nb", **COVARIATES, **kwargs}).train(training)
    losses, gradients = loss_on_fakes(module)
    assert any(name.startswith("z_encoder") for name in gradients)
    assert {gradient.device.type for gradient in gradients.values()} == {"meta"}
    assert losses.loss.device.type == "meta"
    assert losses.loss.shape == ()
    assert losses.reconstruction_loss["reconstruction_loss"].shape == (6,)
    for term in losses.kl_local.values():
        assert term.device.type == "meta"
        assert term.shape == (6,)


@pytest.mark.parametrize("name", DEVICE_CASES)
def test_loss_runs_on_cuda_fakes(name):
    kwargs = DEVICE_CASES[name]
    module = make_module(**{"gene_likelihood": "zinb", **COVARIATES, **kwargs}).eval()
    losses, _ = loss_on_fakes(module, device="cuda")
    assert losses.loss.device.type == "cuda"
    assert losses.reconstruction_loss["reconstruction_loss"].shape == (6,)
    assert {term.device.type for term in losses.kl_local.values()} == {"cuda"}


@pytest.mark.parametrize("name", ["prior.loc", "prior.log_scale", "px_r"])
def test_fakes_tell_mixed_devices(name):
    module = make_module(prior="mog", **COVARIATES)
    with pytest.raises(RuntimeError, match="device"):
        loss_on_fakes(module, left_behind=(name,))


class _Operations(TorchDispatchMode):
    """Names of all operations."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        out = function(*args, **(kwargs or {}))
        if "copy" in str(function) and isinstance(out, torch.Tensor):
            moved = {tensor.device for tensor in (*args, out) if isinstance(tensor, torch.Tensor)}
            if len(moved) > 1 and not (kwargs or {}).get("non_blocking"):
                self.names.add(f"{function} that waits, from {args[0].device} to {out.device}")
        return out


WAITS = (
    *("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal."),
    "that waits",
)


@pytest.mark.parametrize("name", DEVICE_CASES)
def test_a_training_step_never_waits_for_the_device(name, monkeypatch):
    """No operation of loss and backward needs a value, or a size that depends on values."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)
    module = make_module(**{"gene_likelihood": "zinb", **COVARIATES, **DEVICE_CASES[name]})
    with _Operations() as operations:
        loss_on_fakes(module.train())
    assert not [name for name in operations.names if any(wait in name for wait in WAITS)]
    assert any("bmm" in name or "mm" in name for name in operations.names)


@pytest.mark.parametrize("kwargs", [{}, {"n_components": 1}, {"gene_likelihood": "nb"}])
def test_loss_under_autocast_is_finite(kwargs):
    module = make_module(**kwargs).train()
    with torch.autocast("cpu", torch.bfloat16):
        _, _, losses = module(make_tensors(module, 16))
    losses.loss.backward()
    assert losses.loss.isfinite()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", DEVICE_CASES)
def test_single_precision_stays_single(name):
    """Some accelerators know no double precision."""
    module = make_module(**{"gene_likelihood": "zinb", **COVARIATES, **DEVICE_CASES[name]})

    class _Types(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for one in out if isinstance(out, (tuple, list)) else (out,):
                assert not isinstance(one, torch.Tensor) or one.dtype != torch.float64, function
            return out

    with _Types():
        loss_on_fakes(module.train())
