import anndata
import numpy as np
import pandas as pd
import pytest

from mixscvi import datasets, demo
from mixscvi.model import AdaptedPosterior, LatentMixture


def test_the_demo_writes_what_it_says(tmp_path, capsys):
    output = tmp_path / "out"
    demo.main(
        ["--components", "2", "--seeds", "2", "--epochs", "2", "--draws", "30"]
        + ["--output", str(output)]
    )
    printed = capsys.readouterr().out
    figures = ["umap.png", "why.png"]
    assert sorted(path.name for path in output.iterdir()) == [
        "cells.h5ad",
        "held_out.csv",
        "runs.csv",
        *figures,
    ]
    for figure in figures:
        assert (output / figure).read_bytes().startswith(b"\x89PNG")
    runs = pd.read_csv(output / "runs.csv")
    assert set(zip(runs["model"], runs["seed"], strict=True)) == {
        (model, seed) for model in ("scVI", "MixSCVI, A = 2") for seed in (0, 1)
    }
    assert runs.notna().all(axis=None)
    held_out = pd.read_csv(output / "held_out.csv")
    scored = held_out.groupby("model")["log_likelihood_adapted"].mean()
    of_seed_0 = runs[runs["seed"] == 0].set_index("model")["log_likelihood"]
    assert scored.to_dict() == pytest.approx(of_seed_0.to_dict(), abs=0.01)
    cells = anndata.read_h5ad(output / "cells.h5ad")
    assert cells.obsm["X_scvi"].shape == cells.obsm["X_mixscvi"].shape == (700, 10)
    assert cells.obsm["X_umap_mixscvi"].shape == (700, 2)
    assert (cells.obs["scvi_jensen_shannon_divergence"].abs() < 1e-4).all()
    assert (cells.obs["mixscvi_jensen_shannon_divergence"] > 0).mean() > 0.8
    gain = runs.pivot(index="seed", columns="model", values="log_likelihood")
    gain = (gain["MixSCVI, A = 2"] - gain["scVI"]).mean()
    table = [line for line in printed.splitlines() if line.startswith(("scVI", "Mix", "diff"))]
    assert len({len(line) for line in table}) == 1, "the table is aligned"
    assert f"{gain:+.2f}" in table[2]
    assert "over 2 seeds, of two 0.71 of how far they are apart" in printed
    assert str(output / "cells.h5ad") in printed


def test_the_demo_on_a_file_without_labels(tmp_path, capsys):
    cells = datasets.pbmc68k()[:120].copy()
    cells.obs["donor"] = ["a", "b"] * 60
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    options = ["--seeds", "1", "--epochs", "1", "--draws", "25", "--batch-key", "donor"]
    demo.main(["--adata", str(path), "--output", str(tmp_path / "out"), *options])
    printed = capsys.readouterr().out
    assert "120 cells" in printed
    assert "ARI" not in printed
    assert "one seed, so without a spread" in printed
    assert "±" not in printed


def test_panels_of_the_picture_are_level(tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    rng = np.random.default_rng(0)
    table = pd.DataFrame({"log_likelihood": [-9.0, -7.0], "pareto_k": [0.3, 1.2]})
    held_out = {
        name: demo.HeldOut(
            table,
            table,
            (
                AdaptedPosterior(*[None] * 8, rng.normal(size=(200, 1, 3)) * [2, wide, 0.1]),
                LatentMixture(np.full((1, 1, 3), offset), np.ones((1, 1, 3))),
            ),
        )
        for name, wide, offset in (("scVI", 0.2, 0), ("MixSCVI, A = 1", 2, 5))
    }
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    demo._draw_why(held_out, tmp_path / "why.png")
    monkeypatch.undo()
    boxes = [ax.get_window_extent() for ax in drawn[0].axes]
    assert len(boxes) == 4
    assert np.ptp([box.y0 for box in boxes]) < 1
    assert np.ptp([box.y1 for box in boxes]) < 1
    plt.close(drawn[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--adata", "absent.h5ad"], "no such file: absent.h5ad"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--draws", "3"], "--draws must be at least 25, got 3"),
        (["--batch-key", "donor"], "--batch-key needs --adata"),
    ],
)
def test_the_demo_refuses(options, message):
    with pytest.raises(SystemExit, match=message):
        demo.main(options)


def test_the_demo_names_a_missing_column(tmp_path):
    path = tmp_path / "cells.h5ad"
    datasets.pbmc68k()[:50].copy().write_h5ad(path)
    with pytest.raises(SystemExit, match="--label-key 'type' is not a column of obs.*cell_type"):
        demo.main(["--adata", str(path), "--label-key", "type"])
