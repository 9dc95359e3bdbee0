"""The documentation is whole: tutorials have run, links lead somewhere, every name is said."""

import ast
import dataclasses
import enum
import importlib
import inspect
import json
import re
import textwrap

import pytest

from pages import DOCS, PAGES, ROOT, by_stem, missing_names, run

TUTORIALS = sorted((ROOT / "tutorials").glob("*.ipynb"))
QUICKEST = ("2_how_sure_is_it", "4_your_own_vae")
PUBLIC = (
    "mixscvi",
    "mixscvi.datasets",
    "mixscvi.engines",
    "mixscvi.images",
    "mixscvi.likelihoods",
    "mixscvi.mixture",
    "mixscvi.model",
    "mixscvi.module",
    "mixscvi.pl",
    "mixscvi.system",
)


def cells_of(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_missing_names_are_found():
    code = "import mixscvi\nfrom mixscvi import pl, MixSCVY\npl.volcanoes\nmixscvi.datasets"
    assert missing_names(code) == ["mixscvi.MixSCVY", "mixscvi.pl.volcanoes"]


@pytest.mark.parametrize("path", TUTORIALS, ids=by_stem)
def test_tutorials_import_what_exists_and_have_run(path):
    cells = cells_of(path)
    assert missing_names("\n".join("".join(cell["source"]) for cell in cells)) == []
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert "error" not in {output["output_type"] for output in outputs}
    assert path.stat().st_size < 1_000_000


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICKEST)
def test_the_quickest_tutorials_run(name, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: None)
    run(["".join(cell["source"]) for cell in cells_of(ROOT / "tutorials" / f"{name}.ipynb")], name)


@pytest.mark.parametrize("path", PAGES, ids=by_stem)
def test_links_to_files_are_not_broken(path):
    for target in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("generated/"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(module):
    reference = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"^(?:   |\.\. py:data:: )([\w.]+)$", reference, re.MULTILINE))
    assert set(public_names(module)) - listed == set()


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_an_example_and_names_its_parameters(module):
    for name, value in public_names(module).items():
        if not callable(value):  # a dictionary
            continue
        text = inspect.getdoc(value)
        assert ">>>" in text, f"{name} has no example"
        # fields of tuples and configurations, and names of enumerations, have words of their own
        if dataclasses.is_dataclass(value) or hasattr(value, "_fields") or is_enum(value):
            continue
        if getattr(value, "_is_protocol", False):
            continue
        if "*args, **kwargs" in text:  # as scvi-tools says
            continue
        given = inspect.signature(value.__init__ if inspect.isclass(value) else value).parameters
        named = set(re.findall(r"\w+", " ".join(re.findall(r"^[\w*, \\\n]+$", text, re.MULTILINE))))
        assert set(given) - named - {"self", "args", "kwargs"} == set(), name


@pytest.mark.parametrize("module", PUBLIC)
def test_what_public_names_raise_is_said(module):
    for name, value in public_names(module).items():
        if not inspect.isclass(value):
            assert says_what_it_raises(value, inspect.getdoc(value)), name
            continue
        for method, function in inspect.getmembers(value, inspect.isfunction):
            if not function.__module__.startswith("mixscvi") or is_wrapped(function):
                continue
            if method in ("__init__", "__post_init__"):
                assert says_what_it_raises(function, inspect.getdoc(value)), name
            elif not method.startswith("_"):
                text = inspect.getdoc(getattr(value, method))
                assert says_what_it_raises(function, text), f"{name}.{method}"


def public_names(module):
    """Names that a module offers, less the modules among them, which have pages of their own."""
    source = importlib.import_module(module)
    names = {name: getattr(source, name) for name in source.__all__ if name != "__version__"}
    return {name: value for name, value in names.items() if not inspect.ismodule(value)}


def is_enum(value):
    return inspect.isclass(value) and issubclass(value, enum.Enum)


def is_wrapped(function):
    """Whether a method is one of scvi-tools', which says what it does."""
    return not inspect.unwrap(function).__module__.startswith("mixscvi")


def says_what_it_raises(function, text):
    if not inspect.isfunction(function) or function.__code__.co_filename == "<string>":
        return True  # what a dataclass makes by itself raises nothing
    raised = [node for node in ast.walk(parsed(function)) if isinstance(node, ast.Raise)]
    called = " ".join(ast.unparse(node.exc).partition("(")[0] for node in raised if node.exc)
    said = text.partition("Raises\n------")[2].partition("\nExamples\n")[0]
    return not raised or (said != "" and all(e in said for e in re.findall(r"\w+Error", called)))


def parsed(function):
    return ast.parse(textwrap.dedent(inspect.getsource(function)))
