"""The benchmark that runs scvi-tools' own tests finds those of SCVI, and explains failures."""

import importlib
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def parity(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield importlib.import_module("parity")
    for name in ("parity", "parity_plugin", "common"):
        sys.modules.pop(name, None)


def test_tests_are_found_that_come_to_scvi(parity, tmp_path):
    users = importlib.import_module("parity_plugin").users
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "helpers.py").write_text("def train():\n    SCVI()\n\n\ndef other():\n    SCANVI()\n")
    path = folder / "test_some.py"
    path.write_text(
        "from scvi.model import SCVI\n"
        "from tests.helpers import other, train as fit\n"
        "MODELS = [SCVI]\n"
        "def make():\n    return scvi.model.SCVI()\n"
        "def model():\n    return make()\n"
        "def test_fixture(model):\n    pass\n"
        "def test_helper():\n    fit()\n"
        "@pytest.mark.parametrize('model_cls', MODELS)\ndef test_parameters(model_cls):\n    pass\n"
        "def test_by_name():\n    getattr(scvi.model, 'SCVI')\n"
        "class TestClass:\n    def test_in_it(self):\n        SCVI()\n"
        "def test_other():\n    other('SCVI is not meant')\n"
    )
    found = {name for name in users(path) if name.lower().startswith("test")}
    assert found == {"test_fixture", "test_helper", "test_parameters", "test_by_name", "TestClass"}


def row(message, test="tests.model.test_scvi::test_set_seed[1-5]", **values):
    run = {"scvi_tools": "1.5.1", "suite": "default", "components": "4"}
    return run | {"test": test, "outcome": "failed", "message": message} | values


def test_a_failure_is_explained_by_its_message(parity):
    rows = [
        row("AttributeError: 'SeparateEncoder' object has no attribute 'fc_layers'"),
        row("ValueError: something else"),
        row("", outcome="passed"),
        row("no attribute 'fc_layers'", test="tests.model.test_scvi::test_another"),
    ]
    reasons = [r["reason"] for r in parity.explained(rows)]
    assert sorted(bool(reason) for reason in reasons) == [False, False, False, True]
    assert "trunk" in max(reasons)


@pytest.mark.parametrize(
    ("message", "components", "explains"),
    [
        ("ModuleNotFoundError: No module named 'x'", "0", True),
        ("TypeError: x", "0", False),
        ("ModuleNotFoundError: No module named 'x'", "1", False),
    ],
)
def test_a_failure_of_scvi_explains_the_same_of_ours(parity, message, components, explains):
    ours = row("ModuleNotFoundError: No module named 'x'")
    rows = parity.explained([ours, row(message, components=components)])
    reason = next(r["reason"] for r in rows if r["components"] == "4")
    assert ("with SCVI, too" in reason) == explains


def test_outcomes_of_a_report(parity):
    element = parity.ElementTree.fromstring(
        '<testcase classname="tests.a" name="test_b[1]">'
        '<failure message="OSError: /somewhere/tmp/file&#10;is not there"/></testcase>'
    )
    assert parity.outcome_of(element, {"/somewhere": "..."}) == {
        "test": "tests.a::test_b[1]",
        "outcome": "failed",
        "message": "OSError: .../tmp/file is not there",
    }
    assert parity.function_of("tests.a::test_b[x::y]") == "test_b"


def test_every_failure_on_record_has_its_reason(parity):
    rows = parity.read_rows(parity.TABLE)
    assert {row["scvi_tools"] for row in rows} >= {"1.4.2", "1.5.1"}
    assert parity.explained(rows) == rows
    assert not [row for row in rows if row["outcome"] in parity.FAILURES and not row["reason"]]
