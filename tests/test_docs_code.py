"""Every piece of code on a page runs, as who reads the page would run it; commands are parsed."""

import re
import shlex
import tomllib
import warnings

import pytest
import tyro

from idx_files import write_two_classes
from pages import DOCS, PAGES, PYTHON, ROOT, blocks_of, by_stem, missing_names, run

# What a page takes for granted beside `adata`, cells of the reader's own.
GIVEN = {
    "README": ("trained",),
    "choosing": ("model",),
    "exact_posteriors": ("model", "scvi_model"),
}
# Blocks that need what a test has not; what they do is tested in the places named.
ELSEWHERE = {
    'strategy="ddp"': "distributed_training.py",
    "run_autotune": "model/test_autotune.py",
    "setup_annbatch": "model/test_data_modules.py",
    "huggingface_hub": "model/test_files.py",
}
WIDEST = 86  # characters that stand beside both sidebars of the site


@pytest.mark.slow
def test_the_example_of_an_own_vae_runs():
    codes = blocks_of(DOCS / "user_guide" / "own_vae.md", "{code-cell} ipython3")
    namespace = run(codes, "own_vae")
    assert (namespace["adapted"].pareto_k < 0.7).float().mean() > 0.9


@pytest.mark.parametrize("path", PAGES, ids=by_stem)
def test_code_on_pages_is_python_and_imports_what_exists(path):
    for code in blocks_of(path, *PYTHON):
        assert missing_names(code) == []


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=by_stem)
def test_code_on_pages_is_not_cut_off(path):
    lines = "".join(blocks_of(path, *PYTHON, "bash")).splitlines()
    assert [line for line in lines if len(line) > WIDEST and path.stem != "README"] == []


@pytest.fixture(scope="module")
def few():
    """Cells of the reader's own, some without a label."""
    from mixscvi import datasets

    adata = datasets.pbmc68k()[::12].copy()
    adata.layers["counts"] = adata.X.copy()
    adata.obs["batch"] = [str(i % 2) for i in range(adata.n_obs)]
    adata.obs["cell_type"] = (
        adata.obs["cell_type"].astype(str).where(adata.obs["batch"] == "0", "Unknown")
    )
    return adata


@pytest.fixture
def for_pages(few, monkeypatch, tmp_path):
    """Where a page's code runs, with small data and short trainings; what it takes for granted."""
    import scvi

    from mixscvi import MixSCANVI, MixSCVI, datasets, images

    def shortened(train):
        return lambda self, **kwargs: train(
            self, **{**kwargs, "max_epochs": 2, "enable_progress_bar": False}
        )

    monkeypatch.setattr(datasets, "pbmc68k", few.copy)
    for model in (MixSCVI, MixSCANVI):
        monkeypatch.setattr(model, "train", shortened(model.train))
    monkeypatch.setitem(images.BUDGETS, "small", images.BUDGETS["smoke"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    few.write("cells.h5ad")

    def given(page):
        space = {"adata": few.copy()}
        if names := GIVEN.get(page):
            adata = few.copy()
            scvi.model.SCVI.setup_anndata(adata)
            trained = scvi.model.SCVI(adata)
            trained.train(max_epochs=2, enable_progress_bar=False)
            model = MixSCVI.from_scvi_model(trained)
            all_of_them = {"trained": trained, "scvi_model": trained, "model": model}
            space |= {name: all_of_them.get(name, range(5)) for name in names}
        if page == "images":
            folder = tmp_path / "data" / "images"
            folder.mkdir(parents=True)
            write_two_classes(folder)
        return space

    return given


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [page for page in PAGES if blocks_of(page, *PYTHON[:2])], ids=by_stem
)
def test_the_code_on_pages_runs(path, for_pages):
    codes = [
        code for code in blocks_of(path, *PYTHON[:2]) if not any(mark in code for mark in ELSEWHERE)
    ]
    with warnings.catch_warnings():  # of few cells, hardly trained
        warnings.simplefilter("ignore", UserWarning)
        run(codes, path.stem, for_pages(path.stem))


def test_what_pages_leave_to_other_tests_is_there():
    code = "".join(code for path in PAGES for code in blocks_of(path, *PYTHON))
    for mark, place in ELSEWHERE.items():
        assert mark in code
        assert mark in (ROOT / "tests" / place).read_text(encoding="utf-8")


def commands():
    """Commands of the pages, in words: options behind names of programs."""
    for path in (*PAGES, ROOT / "CONTRIBUTING.md"):
        for block in blocks_of(path, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield pytest.param(words, id=f"{path.stem}: {' '.join(words)}"[:70])


@pytest.mark.parametrize("words", [*commands()])
def test_commands_on_pages_are_understood(words):
    program = words[0].removeprefix(".venv/bin/")
    if program in ("python", "python3"):
        assert words[1] == "-m"
        program, words = words[2], words[2:]
    assert program in COMMANDS, "say how such a command is to be checked"
    COMMANDS[program](words[1:])


def made(words):
    targets = re.findall(r"^(\S+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert {word for word in words if "=" not in word} <= set(targets)


def installed(words):
    """Constraints are files; groups and extras are those of the package."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for option, value in zip(words, words[1:], strict=False):
        if option == "-c":
            assert (ROOT / value).is_file()
        elif option == "--group":
            assert value in about["dependency-groups"]
        elif extra := re.fullmatch(r"mixscvi\[(\w+)\]", value):
            assert extra[1] in about["project"]["optional-dependencies"]


def parsed(interface):
    def parse(words):
        if "--help" not in words:
            tyro.cli(interface(), args=words)

    return parse


def demo():
    from mixscvi.demo import Demo

    return Demo


def image_command():
    from mixscvi.images.__main__ import Command

    return Command


def files_exist(words):
    assert all((ROOT / word).exists() for word in words if "/" in word)


COMMANDS = {
    "make": made,
    "pip": installed,
    "mixscvi.demo": parsed(demo),
    "mixscvi-images": parsed(image_command),
    "pytest": files_exist,
    "venv": lambda words: None,
    "pre-commit": lambda words: files_exist(["./.pre-commit-config.yaml"]),
}


@pytest.mark.parametrize("path", PAGES, ids=by_stem)
def test_programs_named_on_pages_have_the_options_given(path):
    text = " ".join(path.read_text(encoding="utf-8").split())
    for program, options in re.findall(r"`python ((?:benchmarks|docs)/[\w/]+\.py)([^`]*)`", text):
        source = (ROOT / program).read_text(encoding="utf-8")
        for option in re.findall(r"--[\w-]+", options):
            assert option in source
