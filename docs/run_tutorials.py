"""Run the tutorials again and write their outputs into the notebooks: ``make tutorials``.

python docs/run_tutorials.py                  # all
python docs/run_tutorials.py tutorials/4*     # some
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "tutorials"
TIMEOUT = 600  # seconds a cell


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
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.get("outputs", ()):
            # Other forms of a figure or table are never shown and only fill the file.
            data = output.get("data", {})
            if "image/png" in data or "text/html" in data:
                data.pop("text/plain", None)
    return notebook


def main(paths: list[str]) -> None:
    """Run notebooks, all by default."""
    for path in map(Path, paths or sorted(FOLDER.glob("*.ipynb"))):
        start = time.perf_counter()
        notebook = execute(nbformat.read(path, as_version=4))
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
