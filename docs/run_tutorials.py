"""Run the tutorials again and write their outputs into the notebooks: ``make tutorials``.

python docs/run_tutorials.py                  # all
python docs/run_tutorials.py tutorials/4*     # some
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "tutorials"
TIMEOUT = 600  # seconds a cell


def merged(outputs: Iterable[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Outputs with what was printed in a row put together: where it was cut is chance."""
    kept: list[nbformat.NotebookNode] = []
    for output in outputs:
        if kept and output.output_type == kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run a notebook in place, where it lies, and leave nothing in it that changes by itself."""
    NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    ).execute()
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python", "pygments_lexer": "ipython3"},
    }
    for place, cell in enumerate(notebook.cells):
        cell.id = f"cell-{place}"
        cell.metadata = {}
        if cell.cell_type == "code":  # progress and warnings of where it ran
            cell.outputs = merged(out for out in cell.outputs if out.get("name") != "stderr")
        for output in cell.get("outputs", ()):
            # Other forms of a figure or table are never shown and only fill the file.
            data = output.get("data", {})
            if "image/png" in data or "text/html" in data:
                data.pop("text/plain", None)
    return notebook


def main(paths: list[str]) -> None:
    """Run notebooks, all by default."""
    os.environ.pop("MPLBACKEND", None)  # any but the notebook's own would leave out the figures
    for path in map(Path, paths or sorted(FOLDER.glob("*.ipynb"))):
        start = time.perf_counter()
        notebook = execute(nbformat.read(path, as_version=4))
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
