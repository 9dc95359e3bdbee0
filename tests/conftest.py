import os
from pathlib import Path

import pytest


def find_data_folder() -> Path | None:
    """The folder named by ``MIXSCVI_DATA``, else ``../shared/data`` if there is one.

    A folder that is named but missing is an error and no reason to skip.
    """
    named = os.environ.get("MIXSCVI_DATA")
    if named:
        folder = Path(named)
        if not folder.is_dir():
            raise NotADirectoryError(f"MIXSCVI_DATA names no folder: {named!r}")
        return folder
    for root in (Path(__file__).parents[1], Path.cwd()):
        folder = root.parent / "shared" / "data"
        if folder.is_dir():
            return folder
    return None


@pytest.fixture(scope="session")
def data_folder() -> Path:
    folder = find_data_folder()
    if folder is None:
        pytest.skip("no data folder: set MIXSCVI_DATA, or have ../shared/data")
    return folder
