"""A pytest plugin that puts MixSCVI in SCVI's place in scvi-tools' own tests.

``PARITY_COMPONENTS`` says with how many components; with 0, SCVI stays what it is. Only tests that
use SCVI run: those whose code names it, or names a function, fixture or class whose code does.
"""

from __future__ import annotations

import ast
import os
from functools import cache
from pathlib import Path

import pytest
import scvi.model

import mixscvi

NAME = "SCVI"


def pytest_configure(config):
    """Replace the class before any test is imported."""
    components = int(os.environ["PARITY_COMPONENTS"])
    replacement = mixscvi.MixSCVI  # imported in any case: all runs see the same modules
    if components:
        replacement.__init__.__kwdefaults__["n_components"] = components
        scvi.model.SCVI = replacement


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Leave out the tests that do not use SCVI."""
    using = [item for item in items if _test_of(item) in users(item.path)]
    others = [item for item in items if item not in set(using)]
    items[:] = using
    config.hook.pytest_deselected(items=others)


def _test_of(item) -> str:
    return item.cls.__name__ if item.cls else item.function.__name__


@cache
def users(path: Path) -> frozenset[str]:
    """Names of a file's functions, classes and variables whose code comes to SCVI."""
    defined: dict[str, set[str]] = {}
    found = {NAME}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom):
            source = _test_module(path, node.module or "")
            used = users(source) if source else frozenset()
            found |= {alias.asname or alias.name for alias in node.names if alias.name in used}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = _names(node)
        elif isinstance(node, ast.Assign):
            defined |= {name: _names(node.value) for t in node.targets for name in _names(t)}
    while more := {name for name, names in defined.items() if names & found} - found:
        found |= more
    return frozenset(found)


def _names(node: ast.AST) -> set[str]:
    """All names that stand in a piece of code: those of fixtures are arguments."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            names.add(part.id)
        elif isinstance(part, ast.Attribute):
            names.add(part.attr)
        elif isinstance(part, ast.arg):
            names.add(part.arg)
        elif isinstance(part, ast.alias):
            names.add(part.name)
        elif isinstance(part, ast.Constant) and part.value == NAME:
            names.add(NAME)
    return names


def _test_module(path: Path, module: str) -> Path | None:
    """The file of a module of the tests, if it is one."""
    if not module.startswith("tests."):
        return None
    root = next(folder for folder in path.parents if folder.name == "tests").parent
    file = root.joinpath(*module.split(".")).with_suffix(".py")
    return file if file.exists() else None
