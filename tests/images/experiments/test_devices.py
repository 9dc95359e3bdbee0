import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator

from mixscvi.images.experiments.devices import resolve_device


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(False, False, "cpu"), (True, False, "cuda"), (False, True, "mps")],
)
def test_the_device_is_what_lightning_chooses(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(CUDAAccelerator, "is_available", staticmethod(lambda: cuda))
    monkeypatch.setattr(MPSAccelerator, "is_available", staticmethod(lambda: mps))
    assert resolve_device().type == expected
    assert resolve_device("cpu") == torch.device("cpu")
