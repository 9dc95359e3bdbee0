"""The documentation runs: its examples, the quickest tutorials, and what the others import."""

import ast
import dataclasses
import enum
import importlib
import inspect
import json
import re
import textwrap
import types
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS, TUTORIALS = ROOT / "docs", sorted((ROOT / "tutorials").glob("*.ipynb"))
PAGES = [ROOT / "README.md", *DOCS.glob("*.md"), *DOCS.glob("user_guide/*.md")]
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


def by_stem(path):
    return path.stem


def cells_of(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def blocks_of(path, language):
    """Code of a Markdown page."""
    pattern = rf"^```{re.escape(language)}\n(.*?)^```$"
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


@pytest.mark.slow
def test_the_example_of_an_own_vae_runs():
    codes = blocks_of(DOCS / "user_guide" / "own_vae.md", "{code-cell} ipython3")
    namespace = run(codes, "own_vae")
    assert (namespace["adapted"].pareto_k < 0.7).float().mean() > 0.9


@pytest.mark.parametrize("path", PAGES, ids=by_stem)
def test_code_on_pages_is_python_and_imports_what_exists(path):
    for language in ("python", "{code-cell} ipython3"):
        for code in blocks_of(path, language):
            assert missing_names(code) == []


# Blocks that need what a test has not; what they do is tested in the places named.
ELSEWHERE = {
    'strategy="ddp"': "test_distributed.py",
    "run_autotune": "test_autotune.py",
    "setup_annbatch": "test_out_of_core.py",
}


@pytest.fixture
def for_pages(monkeypatch, tmp_path):
    """What pages take for granted, small: cells of the reader's own, and models of them."""
    import scvi

    from mixscvi import MixSCANVI, MixSCVI, datasets

    def few(**kwargs):
        adata = whole[::12].copy()
        adata.layers["counts"] = adata.X.copy()
        adata.obs["batch"] = [str(i % 2) for i in range(adata.n_obs)]
        adata.obs["cell_type"] = (
            adata.obs["cell_type"].astype(str).where(adata.obs["batch"] == "0", "Unknown")
        )
        return adata

    def shortened(train):
        return lambda self, **kwargs: train(
            self, **{**kwargs, "max_epochs": 2, "enable_progress_bar": False}
        )

    whole = datasets.pbmc68k()
    monkeypatch.setattr(datasets, "pbmc68k", few)
    for model in (MixSCVI, MixSCANVI):
        monkeypatch.setattr(model, "train", shortened(model.train))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    adata = few()
    adata.write("cells.h5ad")
    scvi.model.SCVI.setup_anndata(adata)
    trained = scvi.model.SCVI(adata)
    trained.train(max_epochs=2, enable_progress_bar=False)
    model = MixSCVI.from_scvi_model(trained)
    return {
        "adata": adata,
        "trained": trained,
        "scvi_model": trained,
        "model": model,
        "held_out": range(5),
    }


@pytest.mark.slow
@pytest.mark.parametrize("path", [page for page in PAGES if blocks_of(page, "python")], ids=by_stem)
def test_the_code_on_pages_runs(path, for_pages):
    if path.stem == "images":
        pytest.skip("its data are downloaded: test_training.py runs the same on made up ones")
    codes = [
        code for code in blocks_of(path, "python") if not any(mark in code for mark in ELSEWHERE)
    ]
    with warnings.catch_warnings():  # of few cells, hardly trained
        warnings.simplefilter("ignore", UserWarning)
        run(codes, path.stem, for_pages)


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
    raises = any(isinstance(node, ast.Raise) for node in ast.walk(parsed(function)))
    return not raises or "Raises\n------" in text


def parsed(function):
    return ast.parse(textwrap.dedent(inspect.getsource(function)))
