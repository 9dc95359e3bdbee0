"""Two processes on this machine (gloo) train one model."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import distributed_training
from distributed_training import MODELS, TRAINED, make_model


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What both processes saw."""
    folder = tmp_path_factory.mktemp("distributed")
    program = Path(distributed_training.__file__).resolve()
    # Without what this process may have been told about processes of its own.
    env = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "PATH", "TMPDIR")}
    env |= {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(program), str(folder)],
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_to_the_same_weights_on_both(name, ranks):
    first, second = (rank[name] for rank in ranks)
    assert first["state"].keys() == second["state"].keys()
    for key, value in first["state"].items():
        assert torch.equal(value, second["state"][key]), key
    assert first["trainable"] and second["trainable"]
    assert np.isfinite(first["history"]["elbo_train"]).all()
    assert len(first["history"]["elbo_validation"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("some to")])
def test_components_are_the_same_on_both_and_noise_differs(name, ranks):
    first, second = (rank[name] for rank in ranks)
    assert first["components"] == second["components"]
    assert len({str(chosen) for chosen in first["components"]}) > 1
    assert not set(first["noise"]) & set(second["noise"])
    assert first["seed"] == second["seed"] == 0  # the user's


@pytest.mark.slow
def test_every_training_cell_is_seen_once_in_an_epoch(ranks):
    for name in ("all to all, normal", "without a seed"):
        first, second = (rank[name] for rank in ranks)
        assert first["split"] == second["split"]
        assert first["steps"] == second["steps"]
    # 17 cells each in minibatches of 8: the last, of one cell, is left out on both.
    assert [rank["a last cell alone"]["steps"] for rank in ranks] == [4, 4]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["labels", "some labels", "labels, without a seed"])
def test_cells_with_labels_are_shared(name, ranks):
    first, second = (rank[name] for rank in ranks)
    assert first["split"] == second["split"]
    training = first["split"][0]
    n_epochs, steps = (2, 2) if name == "labels" else (3, 3)
    assert first["steps"] == second["steps"] == n_epochs * steps
    seen = [
        [sum(seen["cells"][-n_epochs * steps :][i * steps :][:steps], []) for seen in ranks_seen]
        for ranks_seen in [(first, second)]
        for i in range(n_epochs)
    ]
    for one, other in seen:  # each cell once in an epoch, by one of the ranks
        assert sorted(one + other) == sorted(training)
    assert seen[0] != seen[1]  # and in another order in the next
    n_labeled = 12 if name != "labels" else len([i for i in training if i // 2 % 2 == 0])
    chosen = []
    for i in range(n_epochs):
        batches = [
            rank["labeled"][-n_epochs * steps :][i * steps :][:steps] for rank in (first, second)
        ]
        of_epoch = [set(sum(rank, [])) for rank in batches]
        assert len(of_epoch[0] | of_epoch[1]) == n_labeled
        assert not of_epoch[0] & of_epoch[1]
        chosen.append(of_epoch[0] | of_epoch[1])
    assert (chosen[0] == chosen[1]) == (name == "labels")
    assert set(chosen[0]) <= set(training)


@pytest.mark.slow
def test_bound_is_one_of_those_of_one_process(ranks):
    kwargs = {**TRAINED, "max_epochs": 12, "batch_size": 32, "train_size": 0.75}
    kwargs["plan_kwargs"] = {"lr": 1e-2, "n_epochs_kl_warmup": 1}
    bounds = []
    for seed in range(5):
        model = make_model(240, 0)  # the split is that of seed 0
        torch.manual_seed(seed)
        model.train(**kwargs)
        bounds.append(model.history["elbo_validation"].iloc[-1, 0])
    found = ranks[0]["bound"]["history"]["elbo_validation"][-1]
    spread = np.std(bounds, ddof=1)
    assert abs(found - np.mean(bounds)) < 3 * spread, (found, bounds)
    start = ranks[0]["bound"]["history"]["elbo_validation"][0]
    assert start - found > 3 * spread  # it has learned


@pytest.mark.slow
@pytest.mark.parametrize("labels", ["", "labels "])
def test_checkpoints_of_both_are_restored(labels, ranks):
    for rank in ranks:
        whole, resumed = rank[f"{labels}whole"], rank[f"{labels}resumed"]
        for key, value in whole["state"].items():
            assert torch.equal(value, resumed["state"][key]), key
        assert whole["history"] == resumed["history"]
        drawn = ("cells", "labeled") if labels else ("components",)
        for name in drawn:
            assert len(resumed[name]) == 9
            assert whole[name][-9:] == resumed[name]


@pytest.mark.slow
def test_training_alone_after_it_is_a_training_of_one_process(ranks):
    expected = make_model(40, 0)
    expected.train(**TRAINED, max_epochs=2)
    state = expected.module.state_dict()
    for rank in ranks:
        alone = rank["alone"]
        assert alone["steps"] == 2 * 5  # of all 36 training cells
        for key, value in alone["state"].items():
            torch.testing.assert_close(value, state[key], rtol=1e-4, atol=1e-5, msg=key)
        assert len(alone["history"]["elbo_train"]) == 2
        assert len(alone["history"]["elbo_validation"]) == 2
        assert rank["alone, gone on"]["steps"] == 10
        assert alone["rank kept"] and rank["alone, gone on"]["rank kept"]
    # The second process has no history of the training by both.
    assert len(ranks[0]["alone, gone on"]["history"]["elbo_train"]) == 3
    assert set(ranks[1]["alone, gone on"]["history"]) <= set(ranks[0]["alone"]["history"])


def test_without_ddp_several_processes_are_refused():
    with pytest.raises(ValueError, match="2 processes share the cells with strategy='ddp'"):
        make_model(40, 0).train(accelerator="cpu", devices=2, max_epochs=1)


@pytest.mark.filterwarnings("ignore:early_stopping was automatically disabled")
def test_few_cells_for_many_processes_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where scvi-tools writes its logs
    model = make_model(12, 0)
    message = "at least two cells for each of 8 processes to train on, got 11 of 12"
    with pytest.raises(ValueError, match=message):
        model.train(accelerator="cpu", devices=8, strategy="ddp", max_epochs=1)
