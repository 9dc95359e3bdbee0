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
DRAWING = re.compile(r"plt\.subplots|\bpl\.\w+\(")
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
    for cell in cells:
        if DRAWING.search("".join(cell["source"])):
            shown = {kind for output in cell["outputs"] for kind in output.get("data", {})}
            assert "image/png" in shown, "a figure is missing: " + "".join(cell["source"])


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
        function = value.__init__ if inspect.isclass(value) else value
        if inspect.isfunction(function) and not is_wrapped(function):
            assert unnamed_parameters(function, text) == [], name
        if not inspect.isclass(value):
            assert says_what_it_returns(value, text), name


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_method_names_its_parameters_and_what_it_returns(module):
    for name, value in public_names(module).items():
        for method, function in inspect.getmembers_static(value, is_method_of_ours):
            function = getattr(function, "__func__", function)
            text = inspect.cleandoc(function.__doc__ or "")  # its own, not that of a base
            assert text, f"{name}.{method} says nothing"
            assert unnamed_parameters(function, text) == [], f"{name}.{method}"
            assert says_what_it_returns(function, text), f"{name}.{method}"


def test_what_a_docstring_lacks_is_found():
    def method(self, draws: int, *, seed: int = 0) -> float:
        """Draw.

        Parameters
        ----------
        draws
            How many.

        Raises
        ------
        ValueError
            If seed is negative.
        """

    text = inspect.getdoc(method)
    assert unnamed_parameters(method, text) == ["seed"]
    assert not says_what_it_returns(method, text)
    assert says_what_it_returns(method, f"{text}\n\nReturns\n-------\nTheir mean.")


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


def is_method_of_ours(member):
    """Whether a member of a class is a public method that this package defines."""
    function = getattr(member, "__func__", member)
    return (
        inspect.isfunction(function)
        and not function.__name__.startswith("_")
        and function.__module__.startswith("mixscvi")
        and not is_wrapped(function)
    )


def section(text, title):
    """A section of a docstring; nothing if there is none."""
    found = re.search(rf"^{title}\n-+\n(.*?)(?=^\w+\n-+\n|\Z)", text, re.DOTALL | re.MULTILINE)
    return found[1] if found else ""


def unnamed_parameters(function, text):
    """Parameters that a docstring does not name; those passed on as they are need no names."""
    code = inspect.unwrap(function).__code__  # a signature may be another's
    given = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    lines = re.findall(r"^\S.*$", section(text, "Parameters"), re.MULTILINE)
    named = set(re.findall(r"\w+", " ".join(lines)))
    return [name for name in given if name not in named | {"self", "cls"}]


def says_what_it_returns(function, text):
    returned = inspect.signature(function).return_annotation
    said = section(text, "Returns") or section(text, "Yields")
    return said != "" or returned in (None, "None", inspect.Signature.empty)


def says_what_it_raises(function, text):
    if not inspect.isfunction(function) or function.__code__.co_filename == "<string>":
        return True  # what a dataclass makes by itself raises nothing
    raised = [node for node in ast.walk(parsed(function)) if isinstance(node, ast.Raise)]
    called = " ".join(ast.unparse(node.exc).partition("(")[0] for node in raised if node.exc)
    said = text.partition("Raises\n------")[2].partition("\nExamples\n")[0]
    return not raised or (said != "" and all(e in said for e in re.findall(r"\w+Error", called)))


def parsed(function):
    return ast.parse(textwrap.dedent(inspect.getsource(function)))
