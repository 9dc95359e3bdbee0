"""Pages of the documentation, and the code on them."""

import ast
import importlib
import re
import types
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *DOCS.glob("*.md"), *DOCS.glob("user_guide/*.md")]
PYTHON = ("python", "{code-block} python", "{code-cell} ipython3")


def by_stem(path):
    return path.stem


def blocks_of(path, *languages):
    """Code of a Markdown page."""
    named = "|".join(re.escape(language) for language in languages)
    pattern = rf"^```(?:{named})\n(.*?)^```$"
    return re.findall(pattern, path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(codes, name, given=()):
    """Run pieces of code one after the other, in one namespace."""
    import matplotlib.pyplot as plt

    namespace = {"__name__": name, **dict(given)}
    with warnings.catch_warnings():  # a tutorial may change the filters
        for code in codes:
            exec(compile(code, name, "exec"), namespace)
            plt.close("all")
    return namespace


def missing_names(code):
    """Names that a piece of code imports from this package and that are not there."""
    modules, missing = {}, []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mixscvi"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if hasattr(module, alias.name):
                    modules[alias.asname or alias.name] = getattr(module, alias.name)
                else:
                    missing.append(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("mixscvi"):
                    importlib.import_module(alias.name)
                    modules["mixscvi"] = importlib.import_module("mixscvi")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if isinstance(module, types.ModuleType) and not hasattr(module, node.attr):
                missing.append(f"{module.__name__}.{node.attr}")
    return missing
