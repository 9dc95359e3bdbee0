"""The evidence page can be made from the benchmarks' results as they are."""

import importlib.util
import re
import sys
from pathlib import Path

import pandas as pd
import pytest

from mixscvi.demo import Demo

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def evidence():
    path = ROOT / "docs" / "_ext" / "evidence.py"
    spec = importlib.util.spec_from_file_location("evidence", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.insert(0, str(module.BENCHMARKS))
    yield module
    sys.path.remove(str(module.BENCHMARKS))


def test_every_piece_is_made_and_shown(evidence):
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    for name, (_, piece) in evidence.PIECES.items():
        assert len(evidence.as_markdown(piece()).splitlines()) > 2, name
        assert f"generated/evidence/{name}.md" in page
    assert "generated/evidence/rest.md" in page


def test_every_likelihood_of_images_has_its_share_of_k_hat(evidence):
    texts = {path.name: path.read_text() for path in evidence.RESULTS.glob("images_*.md")}
    texts |= {name: piece() for name, (_, piece) in evidence.PIECES.items()}
    headings = [
        (name, line)
        for name, text in texts.items()
        for line in text.splitlines()
        if line.startswith("|") and " NLL " in line
    ]
    assert len(headings) > 10
    for name, line in headings:
        assert " k-hat < 0.7 " in line, name


def test_every_figure_of_the_pages_is_drawn(evidence, tmp_path):
    pages = (ROOT / "docs" / "evidence.md", *(ROOT / "docs" / "user_guide").glob("*.md"))
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    shown = set(re.findall(r"generated/evidence/(\w+\.png)", text))
    evidence.draw(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == shown


def test_the_readme_has_the_ratios_of_the_results(evidence):
    import speed

    rows, profile = (
        speed.read_rows(evidence.RESULTS / name) for name in ("speed.csv", "speed_profile.csv")
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert speed.with_readme_lines(readme, rows, profile) == readme
    for line in speed.readme_lines(rows, profile).values():
        assert line in readme.splitlines()
    slower = [row | {"ratio": "0.95"} for row in rows]
    assert "**0.95 to 0.95** (`A` = 4)" in speed.with_readme_lines(readme, slower, profile)


def test_the_picture_of_the_demo_is_of_the_runs_in_the_table(evidence):
    cells = pd.read_csv(ROOT / "docs" / "figures" / "demo.csv")
    runs = pd.read_csv(evidence.RESULTS / "demo_runs.csv")
    of_cells = cells.groupby("model")["log_likelihood_adapted"].mean().to_dict()
    of_runs = runs[runs["seed"] == 0].set_index("model")["log_likelihood"].to_dict()
    assert of_cells == pytest.approx(of_runs, abs=0.01)
    assert sorted(runs["seed"].unique()) == [*range(Demo().seeds)]


def test_the_readme_has_the_shares_of_the_picture():
    cells = pd.read_csv(ROOT / "docs" / "figures" / "demo.csv")
    k = cells.loc[cells["model"] == "scVI", ["pareto_k_encoder", "pareto_k_adapted"]]
    encoder, adapted = (k < 0.7).mean()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"(docs/figures/demo.csv) | {encoder:.0%} | **{adapted:.0%}** |" in readme.replace(
        " %", "%"
    )


def test_a_result_that_nobody_knows_is_averaged(evidence, tmp_path, monkeypatch):
    frame = pd.DataFrame(
        {
            "model": ["A = 1", "A = 1", "A = 4", "A = 4"],
            "seed": [0, 1, 0, 1],
            "score": [1.0, 2.0, 3.0, 5.0],
            "machine": ["x", "y", "x", "y"],
        }
    )
    frame.to_csv(tmp_path / "brand_new.csv", index=False)
    frame.to_csv(tmp_path / "known.csv", index=False)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    assert evidence.rest(["known*.csv"]).splitlines() == [
        "## Other results",
        "",
        "What no section above shows, averaged as it stands.",
        "",
        "### brand new",
        "",
        "| model | score |",
        "| --- | --- |",
        "| A = 1 | 1.500\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}0.707 |",
        "| A = 4 | 4.000\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}1.414 |",
    ]
    assert evidence.rest(["*.csv"]) == ""  # no heading over nothing


def test_a_benchmark_s_own_summary_is_shown_once(evidence, tmp_path, monkeypatch):
    (tmp_path / "told.py").write_text("def summary():\n    return '# Told\\n\\n| told |\\n'\n")
    (tmp_path / "asked.py").write_text("def summary(rows):\n    raise AssertionError\n")
    for name in ("told_one", "told_two", "asked"):
        (tmp_path / f"{name}.csv").write_text("model,score\na,1.5\n")
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    monkeypatch.setattr(evidence, "BENCHMARKS", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    text = evidence.rest([])
    assert re.findall("^### (.*)", text, re.MULTILINE) == ["asked", "told"]
    assert text.count("| told |") == 1
    assert "| a | 1.500 |" in text


def test_headings_of_a_summary_sink_below_the_page_s(evidence):
    assert evidence.as_markdown("# Title\n\nText.\n\n## data\n\n| a |\n") == (
        "Text.\n\n#### data\n\n| a |\n"
    )
    assert evidence.as_markdown("a  1\nb  2") == "```text\na  1\nb  2\n```\n"


def test_a_table_of_images_is_named_by_its_proposal(evidence, tmp_path, monkeypatch):
    (tmp_path / "runs.csv").write_text("proposal,nll\nadapted,1.0\n")
    (tmp_path / "sweep.csv").write_text("nll\n2.0\n")
    (tmp_path / "sweep_adapted.csv").write_text("proposal,nll\nadapted,3.0\n")
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)

    def table(rows):
        return f"{[float(row['nll']) for row in rows]}\n"

    assert evidence.images("runs", table)() == "NLL by draws from adapted posteriors:\n\n[1.0]\n"
    assert evidence.images("sweep", table)() == (
        "NLL by draws from the encoder's mixture:\n\n[2.0]\n\n"
        "NLL by draws from adapted posteriors:\n\n[3.0]\n"
    )
