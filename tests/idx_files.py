"""Idx files that stand in for MNIST's."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim])
        + b"".join(n.to_bytes(4, "big") for n in array.shape)
        + array.astype(np.uint8).tobytes()
    )


def write_idx_files(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        (folder / name).write_bytes(idx(array))
