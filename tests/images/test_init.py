import subprocess
import sys

import pytest

from mixscvi import images


def test_the_package_imports_no_training():
    code = (
        "import sys, mixscvi.images; print({'lightning', 'matplotlib', 'pandas'} & {*sys.modules})"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout == "set()\n"


def test_configurations_are_made_without_training():
    code = (
        "import sys; from mixscvi.images import RunConfig, build; print('lightning' in sys.modules)"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert output.stdout == "False\n"


def test_every_public_name_is_there():
    assert dir(images) == sorted(images.__all__)
    assert all(getattr(images, name) is not None for name in images.__all__)
    named = [name for names in images._MODULES.values() for name in names]
    assert sorted(named) == sorted(images.__all__)


def test_another_name_is_not():
    with pytest.raises(AttributeError, match="'mixscvi.images' has no attribute 'evaluation'"):
        _ = images.evaluation
