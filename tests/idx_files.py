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


def write_two_classes(folder: Path) -> None:
    """Small images with two classes."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 10_200), ("t10k", 30)):
        labels = rng.integers(0, 2, n)
        images = rng.integers(0, 256, (n, 6, 5)) // (1 + labels)[:, None, None]
        files = {f"{part}-labels-idx1-ubyte": labels, f"{part}-images-idx3-ubyte": images}
        write_idx_files(folder, files)


def write_idx_files(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    for name, array in arrays.items():
        (folder / name).write_bytes(idx(array))
