import csv

import matplotlib.image
import pytest
from matplotlib.figure import Figure

from mixscvi.images import RunConfig
from mixscvi.images.experiments.report import curves, sweep_figure, sweep_table


def row(preset: str, components: int, seed: int, nll: float) -> dict:
    names = ("nll_iw_miselbo", "elbo", "jsd", "ess", "k_hat_median", "active_units")
    return dict.fromkeys(names, 1.0) | {
        "k_hat_above_0.7": 0.25 if components == 1 else 0.003,
        "preset": preset,
        "components": components,
        "seed": seed,
        "nll": nll,
    }


ROWS = [
    row("pixelcnn", 1, 0, 80.0),
    row("vanilla", 4, 0, 97.0),
    row("vanilla", 1, 0, 99.0),
    row("vanilla", 1, 1, 101.0),
    row("vanilla", 4, 1, 98.0),
]


def test_sweep_table_averages_over_seeds_and_compares_at_equal_seeds():
    lines = sweep_table(ROWS).splitlines()
    assert lines[0].startswith("| preset | A | seeds | proposal | NLL | k-hat < 0.7 |")
    assert [line.split(" | ")[:6] for line in lines[2:]] == [
        ["| vanilla", "1", "2", "encoder", "100.00 ± 1.41", "75 %"],
        ["| vanilla", "4", "2", "encoder", "97.50 ± 0.71", "99 %"],
        ["| pixelcnn", "1", "1", "encoder", "80.00", "75 %"],
    ]
    assert lines[2].endswith("|  |")
    assert lines[3].endswith("| -2.50 ± 0.71, lower in 2 of 2 |")


def test_rows_read_from_a_file_make_the_same_table():
    as_text = [{name: str(value) for name, value in row.items()} for row in ROWS]
    assert sweep_table(as_text) == sweep_table(ROWS)


def test_a_table_names_its_proposal_and_mixes_no_two(tmp_path):
    adapted = [row | {"proposal": "adapted"} for row in ROWS]
    assert sweep_table(adapted).count("| adapted |") == 3
    for mixed in (ROWS[:2] + adapted[2:], [ROWS[0] | {"proposal": "encoder"}, *adapted[1:]]):
        with pytest.raises(ValueError, match=r"one proposal, got \['adapted', 'encoder'\]"):
            sweep_table(mixed)
        with pytest.raises(ValueError, match="rows must be of one proposal"):
            sweep_figure(mixed, tmp_path / "sweep.png")


def test_the_figure_carries_the_share_of_trusted_images(tmp_path, monkeypatch):
    texts, original = [], Figure.savefig

    def savefig(self, *args, **kwargs):
        texts.extend(text.get_text() for axis in self.axes for text in axis.texts)
        texts.append(self.get_supxlabel())
        original(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    sweep_figure([row | {"proposal": "adapted"} for row in ROWS], tmp_path / "sweep.png")
    assert texts[:3] == ["75 %", "99 %", "75 %"]
    assert texts[3] == "adapted proposal; in percent: test images with k-hat < 0.7"


def test_sweep_figure(tmp_path):
    sweep_figure(ROWS, tmp_path / "sweep.png")
    assert matplotlib.image.imread(tmp_path / "sweep.png").std() > 0
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.png"]


def test_curves(tmp_path):
    folders = []
    for n_components in (1, 4):
        folder = tmp_path / f"A{n_components}"
        folder.mkdir()
        config = RunConfig.from_preset("vanilla", budget="smoke", n_components=n_components, seed=3)
        (folder / "config.json").write_text(config.to_json())
        log = f"epoch,train_bound,validation_bound\n0,-9.0,-8.0\n1,-7.0,-{n_components}.5\n"
        (folder / "log.csv").write_text(log)
        folders.append(folder)
    rows = curves(folders, tmp_path / "results" / "curves")
    assert rows[["components", "validation_bound"]].to_numpy().tolist() == [
        [1, -8.0],
        [1, -1.5],
        [4, -8.0],
        [4, -4.5],
    ]
    with open(tmp_path / "results" / "curves.csv", newline="") as file:
        written = list(csv.DictReader(file))
    assert written == [{k: str(v) for k, v in row.items()} for row in rows.to_dict("records")]
    assert [*rows][-3:] == ["epoch", "train_bound", "validation_bound"]
    assert matplotlib.image.imread(tmp_path / "results" / "curves.png").std() > 0


def test_curves_of_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run \(config.json is missing\)"):
        curves([tmp_path], tmp_path / "curves")
