"""scvi-tools' own tests of SCVI, run with MixSCVI in its place.

    python benchmarks/parity.py --scvi-tests ../scvi-tools/tests             # those of the default
    python benchmarks/parity.py --scvi-tests ../scvi-tools/tests --suite tuning

The folder holds the tests of the version that is installed, as its source has them. One row per
test and number of components, in results/parity.csv; those of 0 components are of SCVI itself. A
failure must be one of `KNOWN`, by name and by message, or be SCVI's too: others are named at
the end, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from common import RESULTS

from mixscvi.system import write_beside
from mixscvi.tables import csv_text, markdown_table, read_rows

TABLE = RESULTS / "parity.csv"
# Options of scvi-tools' tests that run others than those of the default.
SUITES = {
    "default": [],
    "tuning": ["--autotune-tests"],
    "data loaders": ["--custom-dataloader-tests"],
    "optional": ["--optional"],
}
MODELS = {"4": "pass with A = 4", "1": "pass with A = 1", "0": "pass with SCVI"}
FAILURES = ("failed", "error")
KEY = ("scvi_tools", "suite", "components", "test")
OTHER_SUITE = re.compile(r"test not having a pytest\.mark|^need --+(autotune|custom|optional)")


class Known(NamedTuple):
    """Tests that may fail with a message, and why."""

    tests: tuple[str, ...]
    message: str
    reason: str


KNOWN = (
    Known(
        ("test_saving_and_loading",),
        "holds Python objects",
        "It loads files that hold Python objects, without a word. Here they need "
        "`allow_pickle=True`, as reading them can run any code.",
    ),
    Known(
        ("test_scvi_n_obs_error",),
        "DID NOT RAISE",
        "It expects that training on 129 cells raises, as the last minibatch has one. Here it "
        "trains.",
    ),
    Known(
        ("test_validate_unsupported_if_minified",),
        "The Evaluati.*The VAEMixin",
        "It expects the name of scvi-tools' class in a message; `get_marginal_ll` is of another "
        "here.",
    ),
    Known(
        ("test_hub_modelcardhelper",),
        "kwarg",
        "It lists all arguments of the model, and there are more.",
    ),
    Known(
        (
            "test_hub_model_init",
            "test_hub_model_load",
            "test_hub_model_save",
            "test_prep_scvi_hub_model",
        ),
        "Model class name MixSCVI not recognized",
        "scvi-tools writes model cards of its own classes alone, by their names.",
    ),
    Known(
        ("test_experiment_init_adata",),
        r"startswith .*\('scvi'\)",
        "It expects the name of a tuning to start with `scvi`; it starts with `mixscvi`.",
    ),
    Known(
        (
            "test_anncollection",
            "test_scanvi",
            "test_scanvi_with_external_indices",
            "test_scanvi_scarches_from_scvi",
            "test_scanvi_from_scvi",
            "test_validate_supported_if_minified_keep_count",
        ),
        "SCANVI has one Gaussian",
        "They make a SCANVI of the model. SCANVI has one Gaussian; with a mixture, an error says "
        "so and names `MixSCANVI`.",
    ),
    Known(
        ("test_scvi_online_update", "test_set_seed"),
        "no attribute 'fc_layers'",
        "They look at `z_encoder.encoder.fc_layers`. The weights of several encoders are in one "
        "stack, `z_encoder.encoder.trunk`.",
    ),
    Known(
        (
            "test_lamindb_dataloader_scvi_small",
            "test_lamindb_dataloader_scanvi_small",
            "test_lamindb_dataloader_scvi_small_with_covariates",
            "test_census_custom_dataloader_scvi",
            "test_census_custom_dataloader_scanvi",
            "test_census_custom_dataloader_scvi_with_covariates",
        ),
        r"Please install \['(lamindb|tiledbsoma)'\]",
        "They need lamindb or tiledbsoma, which were not installed.",
    ),
    Known(
        ("test_run_autotune_scvi_with_scib_adata",),
        "`local_mode` is no longer supported",
        "It gives Ray an argument that Ray has dropped.",
    ),
)


def run_tests(tests: Path, components: int, suite: str) -> list[dict[str, str]]:
    """Outcomes of the tests that use SCVI, in a process of its own."""
    sys.path.insert(0, str(tests.parent))
    from parity_plugin import users

    files = [
        str(path.relative_to(tests.parent))
        for path in sorted(tests.rglob("test_*.py"))
        if any(name.lower().startswith("test") for name in users(path))
    ]
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PARITY_COMPONENTS": str(components),
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "parity_plugin", "-W", "ignore"]
        command += ["-p", "no:cacheprovider", "--import-mode=importlib", "--tb=short"]
        command += ["--show-capture=no", f"--rootdir={tests.parent}", f"--basetemp={folder}/tmp"]
        command += ["--continue-on-collection-errors", f"--junitxml={report}", *SUITES[suite]]
        subprocess.run([*command, *files], cwd=tests.parent, env=environment, check=False)
        cases = ElementTree.parse(report).getroot().iter("testcase")
        names = {folder: "...", str(tests.parent): "...", sys.executable: "python"}
        rows = [outcome_of(case, names) for case in cases]
    return [row for row in rows if not OTHER_SUITE.search(row["message"])]


def outcome_of(case: ElementTree.Element, names: dict[str, str]) -> dict[str, str]:
    """A test's name, what became of it and what it says of it, without this machine's folders."""
    name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
    for outcome, tag in (("failed", "failure"), ("error", "error"), ("skipped", "skipped")):
        element = case.find(tag)
        if element is not None:
            message = " ".join((element.get("message") or "").split())
            for path, name_of_it in names.items():
                message = message.replace(path, name_of_it)
            return {"test": name, "outcome": outcome, "message": message[:160]}
    return {"test": name, "outcome": "passed", "message": ""}


def function_of(test: str) -> str:
    """The name of a test without its file and its parameters."""
    return test.partition("[")[0].rpartition("::")[2]


def reason_of(row: dict[str, str], with_scvi: str | None) -> str:
    """Why a test failed, given what SCVI's failure says; nothing if that is not known."""
    if row["outcome"] not in FAILURES:
        return ""
    for known in KNOWN:
        if function_of(row["test"]) in known.tests and re.search(known.message, row["message"]):
            return known.reason
    kind = row["message"].partition(":")[0]
    if with_scvi is not None and kind == with_scvi.partition(":")[0]:
        return f"It fails with SCVI, too: `{with_scvi}`"
    return ""


def explained(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows with the reasons of failures, in order."""
    with_scvi = {
        (row["scvi_tools"], row["suite"], row["test"]): row["message"]
        for row in rows
        if row["components"] == "0" and row["outcome"] in FAILURES
    }
    return [
        row
        | {"reason": reason_of(row, with_scvi.get((row["scvi_tools"], row["suite"], row["test"])))}
        for row in sorted(rows, key=lambda row: [row[name] for name in KEY])
    ]


def counts(ran: list[dict[str, str]]) -> list[dict[str, str]]:
    """How many tests ran and passed, by version and suite."""
    lines = []
    for run in sorted({(row["scvi_tools"], row["suite"]) for row in ran}):
        of_run = [row for row in ran if (row["scvi_tools"], row["suite"]) == run]
        line = {"scvi-tools": run[0], "tests": run[1], "run": ""}
        for components, heading in MODELS.items():
            outcomes = [row["outcome"] for row in of_run if row["components"] == components]
            line[heading] = str(outcomes.count("passed")) if outcomes else "not run"
            line["run"] = str(len(outcomes)) if outcomes else line["run"]
        lines.append(line)
    return lines


def failures(ran: list[dict[str, str]]) -> list[dict[str, str]]:
    """The tests that fail with MixSCVI, those of one reason in a line."""
    of_test: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in ran:
        if row["outcome"] in FAILURES and row["components"] != "0":
            of_test.setdefault((function_of(row["test"]), row["reason"]), []).append(row)
    lines: dict[tuple, list[str]] = {}
    for (test, reason), rows in of_test.items():
        components = ", ".join(sorted({row["components"] for row in rows}))
        versions = ", ".join(sorted({row["scvi_tools"] for row in rows}))
        lines.setdefault((components, versions, reason), []).append(f"`{test}`")
    return [
        {
            "reason": reason or "**not known**",
            "tests": ", ".join(tests),
            "A": components,
            "scvi-tools": versions,
        }
        for (components, versions, reason), tests in sorted(lines.items(), reverse=True)
    ]


def summary() -> str:
    """How many tests pass, and each failure with its reason."""
    ran = [row for row in read_rows(TABLE) if row["outcome"] != "skipped"]
    return (
        f"{markdown_table(counts(ran))}\nEach failure, and why it stays:\n\n"
        f"{markdown_table(failures(ran))}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scvi-tests", type=Path, required=True, help="scvi-tools' folder tests")
    parser.add_argument("--suite", choices=SUITES, default="default")
    parser.add_argument(
        "--components", type=int, nargs="*", default=[0, 1, 4], help="none: only explain"
    )
    options = parser.parse_args()
    tests = options.scvi_tests.resolve(strict=True)
    for components in options.components:
        run = dict(zip(KEY, (version("scvi-tools"), options.suite, str(components)), strict=False))
        new = [
            run | row | {"reason": "", "torch": version("torch")}
            for row in run_tests(tests, components, options.suite)
        ]
        others = [row for row in read_rows(TABLE) if not run.items() <= row.items()]
        write_beside(TABLE, csv_text(explained(others + new)))
        print(run, Counter(row["outcome"] for row in new), flush=True)
    rows = explained(read_rows(TABLE))
    write_beside(TABLE, csv_text(rows))
    unexplained = [row for row in rows if row["outcome"] in FAILURES and not row["reason"]]
    for row in unexplained:
        print("not explained:", *(row[name] for name in (*KEY, "outcome", "message")))
    sys.exit(bool(unexplained))


if __name__ == "__main__":
    main()
