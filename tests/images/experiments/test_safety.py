"""Files of a run that were truncated, tampered with, or made to do harm."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from image_runs import run, small_data
from mixscvi.checkpoint_file import check_tensors
from mixscvi.images import RunConfig, evaluate, load_run, train
from mixscvi.images.experiments.devices import resolve_device
from mixscvi.images.experiments.report import curves
from mixscvi.images.experiments.runs import read_config, read_json
from mixscvi.images.experiments.sweep import run_once


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "run", small_data())


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished run, to be harmed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def harm(path, kind, mark):
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "other":
        torch.save([1, 2], path)
    else:
        torch.save({"state_dict": {}, "payload": Payload(mark)}, path)


def read_weights(folder):
    load_run(folder)


def resume(folder):
    """Go on for an epoch more than the run had."""
    (folder / "summary.json").unlink()
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content["training"]["max_epochs"] += 1
    path.write_text(json.dumps(content))
    train(read_config(folder), folder, data=small_data(), resume=True)


def evaluation(folder):
    evaluate(folder, data=small_data(), draws=30)


FILES = {
    "best.pt": read_weights,
    "last.ckpt": resume,
    "evaluation.partial.pt": evaluation,
}


@pytest.mark.parametrize("kind", ["truncated", "flipped", "empty", "other", "payload"])
@pytest.mark.parametrize("name", FILES)
def test_a_harmed_file_is_named_and_not_run(name, kind, folder, tmp_path):
    path, mark = folder / name, tmp_path / "harmed"
    if not path.exists():
        torch.save({"key": {}, "done": [], "blocks": []}, path)
    harm(path, kind, mark)
    with pytest.raises(ValueError, match=name):
        FILES[name](folder)
    assert not mark.exists()


def _moments(value):
    def change(state):
        for of_parameter in state["optimizer_states"][0]["state"].values():
            of_parameter["exp_avg"] = value(of_parameter["exp_avg"])

    return change


def _of_loops(value):
    def change(state):
        state["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"] = value

    return change


def _of_recorder(**values):
    def change(state):
        (theirs,) = (v for key, v in state["callbacks"].items() if "_Recorder" in key)
        theirs.update(values)

    return change


def _of_patience(**values):
    def change(state):
        (theirs,) = (v for key, v in state["callbacks"].items() if "_Patience" in key)
        theirs.update(values)

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        # With the strides of their parameters: the kernel would write beyond their ends.
        ("last.ckpt", _moments(lambda value: torch.zeros((1, *value.shape[1:])))),
        ("last.ckpt", _moments(lambda _: None)),
        ("last.ckpt", _of_loops("x")),
        ("last.ckpt", _of_loops(2**40)),
        ("last.ckpt", lambda state: state.update(epoch=2**40)),
        ("last.ckpt", _of_recorder(rows=[[]])),
        ("last.ckpt", _of_patience(best_score=float("nan"))),
        ("last.ckpt", lambda state: state.update(optimizer_states=[])),
        ("last.ckpt", lambda state: state["optimizer_states"][0].update(param_groups=[])),
        ("last.ckpt", lambda state: state["state_dict"].popitem()),
        ("last.ckpt", lambda state: state.update(callbacks={"_Recorder": {"rows": 3}})),
        ("last.ckpt", lambda state: state.update(loops=3)),
        ("evaluation.partial.pt", lambda state: state.update(blocks=[(torch.ones(2),)])),
        ("evaluation.partial.pt", lambda state: state.update(done=[{"siwae": 3}])),
        ("evaluation.partial.pt", lambda state: state.update(done=[{"elbo": torch.ones(2)}])),
    ],
)
def test_a_state_of_other_values_is_named(name, change, folder):
    path = folder / name
    if name == "last.ckpt":
        state = torch.load(path, weights_only=True)
    else:
        state = {"key": {}, "done": [], "blocks": []}
    change(state)
    torch.save(state, path)
    with pytest.raises(ValueError, match=name):
        FILES[name](folder)


def test_the_payload_of_these_tests_would_do_harm(tmp_path):
    harm(tmp_path / "x.pt", "payload", tmp_path / "harmed")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert (tmp_path / "harmed").exists()


def test_weights_must_be_finite_and_fit(folder):
    path = folder / "best.pt"
    weights = torch.load(path, weights_only=True)
    name, value = next(iter(weights.items()))
    torch.save(weights | {name: value * torch.nan}, path)
    with pytest.raises(ValueError, match=r"best.pt holds values of .* that are not finite"):
        load_run(folder)
    torch.save(weights | {name: torch.cat((value, value))}, path)
    with pytest.raises(ValueError, match=r"best.pt does not fit the model of config.json"):
        load_run(folder)
    weights._metadata[""] = 3
    torch.save(weights, path)
    with pytest.raises(ValueError, match=r"best.pt must hold versions of modules by name, got"):
        load_run(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"best.pt, the weights of the run, is missing"):
        load_run(folder)


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("config.json", '{"model": ', "config.json is truncated or damaged"),
        ("config.json", "[" * 100_000, "config.json is truncated or damaged"),
        ("config.json", "[1]", "config.json must hold a JSON object, got a list"),
        ("config.json", "{}", "config.json does not describe a run: 'budget' is missing"),
        ("config.json", {"mixture": 3}, "config.json does not describe a run"),
        ("config.json", {"sizes": {"hidden": [1]}}, "config.json does not describe a run"),
        ("config.json", {"surprise": 1}, "config.json does not describe a run: .*surprise"),
        ("config.json", {"training": {"batch_size": "x"}}, "config.json does not describe a run"),
        ("config.json", {"dataset": 3}, "config.json does not .*: dataset must be a text, got 3"),
        (
            "config.json",
            {"draws": None},
            "config.json does not .*: draws must be an integer, got None",
        ),
        ("config.json", {"draws": -1}, "config.json does not .*: draws must be at least 1, got -1"),
        (
            "config.json",
            {"ensemble": 1},
            "config.json does not .*: ensemble must be true or false, got 1",
        ),
        ("summary.json", "", "summary.json is truncated or damaged"),
        ("summary.json", {"image_shape": [0, 3]}, "summary.json must hold an image_shape of two"),
        ("summary.json", {"image_shape": "3x3"}, "summary.json must hold an image_shape of two"),
        ("summary.json", {"images": None}, "summary.json must hold images, got None"),
        ("summary.json", {"epochs": True}, "summary.json must hold epochs, got True"),
        (
            "summary.json",
            {"best_validation_bound": float("nan")},
            "summary.json must hold a finite best_validation_bound, got nan",
        ),
        ("summary.json", {"parameters": {}}, "summary.json must hold total as a count, got None"),
        (
            "summary.json",
            {"parameters": {"total": "x"}},
            "summary.json must hold total as a count, got 'x'",
        ),
    ],
)
def test_json_that_was_tampered_with(name, content, match, folder):
    path = folder / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.write_text(content)
    with pytest.raises(ValueError, match=match):
        load_run(folder)


@pytest.mark.parametrize(
    ("part", "name", "value", "match"),
    [
        ("sizes", "n_latent", "3", "n_latent must be an integer, got '3'"),
        ("sizes", "n_latent", True, "n_latent must be an integer, got True"),
        ("sizes", "n_latent", 1.5, "n_latent must be an integer, got 1.5"),
        ("sizes", "encoder_width", None, "encoder_width must be a number, got None"),
        ("sizes", "encoder_width", float("nan"), "encoder_width must be a number, got nan"),
        ("sizes", "hidden", [], "hidden must have at least one layer"),
        ("sizes", "hidden", "x", "hidden must be"),
        ("sizes", "conv_layers", [[1, 2]], "conv_layers must be"),
        ("model", "n_flow_steps", 1.5, "n_flow_steps must be an integer, got 1.5"),
        ("training", "n_test", 1.5, r"n_test must be int \| None, got 1.5"),
        ("mixture", "n_components", 1.5, "n_components must be an integer, got 1.5"),
    ],
)
def test_fields_of_other_types_are_named(part, name, value, match, folder):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content[part][name] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"config.json does not describe a run: {match}"):
        load_run(folder)


def test_weights_that_are_no_numbers(folder):
    path = folder / "best.pt"
    weights = torch.load(path, weights_only=True)
    name, value = next(iter(weights.items()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch is to do without them
        quantized = torch.quantize_per_tensor(value, 0.1, 0, torch.quint8)
    with pytest.raises(ValueError, match="weights is no dense tensor of numbers"):
        check_tensors({"weights": quantized}, 10**6)
    for wrong in (
        value.to(torch.float8_e4m3fn),
        value.to(torch.complex64),
        value > 0,
    ):
        torch.save(weights | {name: wrong}, path)
        with pytest.raises(ValueError, match=r"best.pt (holds|is damaged)"):
            load_run(folder)


@pytest.mark.parametrize(
    ("content", "match"),
    [("", "No columns"), ("epoch\n1\n", "train_bound"), ("\x00\x01", "damaged")],
)
def test_a_damaged_log(content, match, folder, tmp_path):
    (folder / "log.csv").write_text(content)
    with pytest.raises(ValueError, match=rf"log.csv is damaged.*{match}|{match}"):
        curves([folder], tmp_path / "curves")


def test_a_run_without_an_epoch_has_no_curve(folder, tmp_path):
    (folder / "log.csv").unlink()
    with pytest.raises(FileNotFoundError, match="no epoch of this run has ended"):
        curves([folder], tmp_path / "curves")


@pytest.mark.parametrize("name", ["evaluation.json", "cost.json"])
def test_a_sweep_names_the_results_that_it_cannot_read(name, folder):
    config = read_config(folder)
    run_once(config, folder, small_data(), draws=30)
    text = (folder / name).read_text()
    (folder / name).write_text(text[:-5])
    with pytest.raises(ValueError, match=f"{name} is truncated or damaged"):
        run_once(config, folder, small_data(), draws=30)
    values = json.loads(text)
    number = "nll" if name == "evaluation.json" else "seconds"
    for wrong in (True, float("nan"), "x"):
        (folder / name).write_text(json.dumps(values | {number: wrong}))
        with pytest.raises(ValueError, match=f"{name} must hold a number as {number}, got"):
            run_once(config, folder, small_data(), draws=30)
    if name == "evaluation.json":  # what honest evaluations hold
        few = {"nll_se": float("nan"), "k_hat_median": float("inf")}
        (folder / name).write_text(json.dumps(values | few))
        assert run_once(config, folder, small_data(), draws=30)["k_hat_median"] == float("inf")
    del values["device"]
    (folder / name).write_text(json.dumps(values))
    if name == "cost.json":
        with pytest.raises(ValueError, match=r"cost.json lacks device: delete it"):
            run_once(config, folder, small_data(), draws=30)
    else:  # it is not known to be of this device
        run_once(config, folder, small_data(), draws=30)
        assert "device" in read_json(folder / name)


@pytest.mark.parametrize(
    ("device", "match"),
    [
        ("gpu", "device must be cpu, cuda, cuda:N or mps, got 'gpu'"),
        ("meta", "device must be cpu, cuda, cuda:N or mps, got 'meta'"),
        ("cuda", "device='cuda', but this machine has none"),
        ("cuda:1", "device='cuda:1', but this machine has 1 of them"),
    ],
)
def test_a_device_that_is_not_there(device, match, monkeypatch):
    here = 1 if device == "cuda:1" else 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: here)
    with pytest.raises(ValueError, match=match):
        resolve_device(device)


def test_the_differences_to_another_run_are_named(folder):
    config = RunConfig.from_json((folder / "config.json").read_text())
    other = RunConfig.from_preset("vanilla", budget="smoke", seed=3)
    with pytest.raises(ValueError, match="config.json differs in mixture, training, seed"):
        run_once(other, folder, small_data())
    assert config.seed == 0
