import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixscvi.checks import check_path
from mixscvi.images.experiments.report import check_name
from mixscvi.system import (
    check_folder,
    naming_what_is_written,
    naming_what_takes_memory,
    write_beside,
)


def test_a_failing_writer_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "table.csv"
    write_beside(path, "old")

    def fail(beside):
        beside.write_text("half of the n")
        raise RuntimeError("no space left")

    with pytest.raises(RuntimeError, match="no space left"):
        write_beside(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the faults of Linux")
def test_freed_memory_is_kept_where_the_c_library_can():
    """Large blocks that are freed and asked for again are not faulted in anew."""
    script = """
import resource, torch
from mixscvi.system import keep_freed_memory

def faults(n_blocks):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n_blocks):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults(50)
handed_back = faults(20)
known = keep_freed_memory()
faults(50)
print(known, handed_back, faults(20))
"""
    output = subprocess.check_output([sys.executable, "-c", script], text=True)
    known, handed_back, kept = output.split()
    if known == "False":
        pytest.skip("this C library has no such setting")
    assert int(kept) < int(handed_back) / 5


@pytest.mark.parametrize("n", [10**13, 10**18, 10**30])
def test_sizes_that_no_memory_holds_are_named(n):
    with pytest.raises(MemoryError, match="choose fewer"), naming_what_takes_memory("choose fewer"):
        torch.empty(n, 16)
    for other in (TypeError("of another kind"), RuntimeError("of another kind")):
        with pytest.raises(type(other), match="another"), naming_what_takes_memory("choose fewer"):
            raise other


def test_paths_that_no_file_has():
    for check in (lambda: check_folder("a\0b", "output"), lambda: check_path("output", "a\0b")):
        with pytest.raises(ValueError, match="output must be a path, got .*null character"):
            check()
    with pytest.raises(ValueError, match=r"results must be a path of files.* got '\.'"):
        check_name(Path(), "results")


@pytest.mark.parametrize("error", [RuntimeError("unexpected pos"), OSError(28, "No space left")])
def test_what_is_not_written_is_named(error):
    expected = r"model\.pt could not be written, is the disk full\? \(.*(pos|No space)"
    with pytest.raises(OSError, match=expected), naming_what_is_written("model.pt"):
        raise error
    own = PermissionError(13, "Permission denied", "folder")
    with pytest.raises(PermissionError, match="denied: 'folder'"), naming_what_is_written("a"):
        raise own
