from collections.abc import Callable

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mixscvi.mixture import products


@pytest.fixture(params=["product", "sums of rows"])
def first_layer(request, monkeypatch):
    """Both ways in which a dense encoder multiplies images; small ones do not reach the second."""
    if request.param == "sums of rows":
        monkeypatch.setattr(products, "_LEAST_COLUMNS", 0)
        monkeypatch.setattr(products, "_MOST_NONZERO", 1.0)


class LargestTensor(TorchDispatchMode):
    """Records the most elements that a result of an operation has in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                held = value.untyped_storage().nbytes() // value.element_size()
                self.numel = max(self.numel, held)
        return result


@pytest.fixture
def largest_tensor() -> Callable[[], LargestTensor]:
    return LargestTensor
