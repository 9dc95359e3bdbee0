import gzip

import numpy as np
import pytest

from idx_files import idx, write_idx_files
from mixscvi.images import files
from mixscvi.images.datasets import load
from mixscvi.images.files import read_idx


@pytest.fixture
def array() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 4, 3)).astype(np.uint8)


def test_reads_plain_and_gzipped(tmp_path, array):
    (tmp_path / "a").write_bytes(idx(array))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array)))
    np.testing.assert_array_equal(read_idx(tmp_path / "a"), array)
    np.testing.assert_array_equal(read_idx(tmp_path / "a.gz"), array)


@pytest.mark.parametrize("name", ["images", "images.gz"])
def test_truncated_file_is_named_and_how_to_get_it(tmp_path, array, name):
    raw = idx(array) if name == "images" else gzip.compress(idx(array))
    (tmp_path / name).write_bytes(raw[:-20])
    with pytest.raises(ValueError, match=rf"{name} is a? ?truncated or damaged.*fetch it again"):
        read_idx(tmp_path / name)


@pytest.mark.parametrize(
    "raw", [b"", b"<html>", b"\0\0\x08\x03\0\0", b"\0\0\x08\x50" + 80 * b"\0\0\0\x01" + b"a"]
)
def test_no_idx_file(tmp_path, raw):
    (tmp_path / "page").write_bytes(raw)
    with pytest.raises(ValueError, match="page is"):
        read_idx(tmp_path / "page")


def test_missing_file_is_named_and_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte.*Fetch https://"):
        load("fashion-mnist", tmp_path)


def test_failed_fetch_names_the_file_and_the_way_around(monkeypatch):
    import pooch

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(pooch, "retrieve", fail)
    with pytest.raises(OSError, match="train-images.*--data-folder"):
        load("mnist")


def test_fetched_files_are_checked_by_hash(monkeypatch, tmp_path, array):
    import pooch

    asked = []

    def retrieve(url, known_hash, **kwargs):
        asked.append((url, known_hash))
        path = tmp_path / "file.gz"
        path.write_bytes(gzip.compress(idx(array if "images" in url else array[:, 0, 0])))
        return str(path)

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    with pytest.raises(
        ValueError, match="'mnist' must have more than 10000 training images.*got 6"
    ):
        load("mnist")
    assert len(asked) == 4
    assert all(
        url.endswith(".gz") and known.startswith("md5:") and len(known) == 36
        for url, known in asked
    )


def test_files_of_the_other_data_set_are_refused(monkeypatch, tmp_path):
    """Both data sets have files of the same names."""
    array = np.arange(20_000 * 2).reshape(20_000, 2, 1).astype(np.uint8)
    labels = array[:, 0, 0].copy()
    kinds = {"images": array, "labels": labels}
    write_idx_files(
        tmp_path, {file: kinds[part.split("_")[1]] for part, file in files._FILES.items()}
    )
    assert load("mnist", tmp_path).name == "mnist"
    digest = files.content_hash(labels)
    monkeypatch.setattr(files, "_CONTENTS", {digest: ("mnist", "test_labels")})
    with pytest.raises(ValueError, match="train-labels.*holds the test labels.*restore the names"):
        load("mnist", tmp_path)
    known = {digest: ("fashion-mnist", "test_labels")}
    monkeypatch.setattr(files, "_CONTENTS", known)
    match = (
        "train-labels.*holds the test labels of 'fashion-mnist', not the train labels of 'mnist'"
    )
    with pytest.raises(ValueError, match=match):
        load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("train-labels-idx1-ubyte", np.zeros(29), r"shape \(29,\) does not match the other"),
        ("t10k-images-idx3-ubyte", np.zeros((9, 4, 5)), r"\(9, 4, 5\) does not match the other"),
        ("t10k-images-idx3-ubyte", np.zeros(9), "must hold images, got"),
    ],
)
def test_files_that_do_not_go_together_are_named(tmp_path, file, content, match):
    arrays = {
        "train-images-idx3-ubyte": np.zeros((30, 4, 4)),
        "train-labels-idx1-ubyte": np.zeros(30),
        "t10k-images-idx3-ubyte": np.zeros((9, 4, 4)),
        "t10k-labels-idx1-ubyte": np.zeros(9),
    }
    write_idx_files(tmp_path, arrays | {file: content})
    with pytest.raises(ValueError, match=f"{file} .*{match}"):
        load("mnist", tmp_path)
