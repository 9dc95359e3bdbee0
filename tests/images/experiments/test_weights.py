import json
import shutil
from pathlib import Path

import pytest
import torch

from image_runs import config_of
from mixscvi.images import RunConfig, build, train
from mixscvi.images.experiments.weights import load_run, weights_hash


def test_a_loaded_model_is_that_of_the_best_weights(finished):
    config, model = load_run(finished)
    assert config == config_of(n_components=2) and not model.training
    best = torch.load(finished / "best.pt", weights_only=True)
    assert model.state_dict().keys() == best.keys()
    assert all(torch.equal(value, best[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("preset", ["vanilla", "composite"])
def test_weights_of_earlier_versions_are_read(tmp_path, data, preset):
    """Codes belonged to the encoders; the configuration called these amortized."""
    config = RunConfig.from_preset(
        preset,
        budget="smoke",
        n_components=3,
        component_encoder="shifted",
        training={"max_epochs": 1, "warmup_epochs": 1},
    )
    model = train(config, tmp_path, data=data)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    earlier = {name.replace("encoder.heads.codes", "encoder.codes"): v for name, v in best.items()}
    assert earlier.keys() != best.keys()
    torch.save(earlier, tmp_path / "best.pt")
    text = (tmp_path / "config.json").read_text().replace("shifted", "amortized")
    (tmp_path / "config.json").write_text(text)
    again, loaded = load_run(tmp_path)
    assert again == config
    assert weights_hash(loaded) == weights_hash(model)


HUGE = 10**9
TAMPERED = {
    "hidden": ("sizes", {"hidden": [HUGE, 10]}, r"config\.json .* its hidden=\(1000000000, 10\)"),
    "latents": ("sizes", {"n_latent": HUGE}, r"config\.json .* its n_latent=1000000000"),
    "layers": ("sizes", {"hidden": [1] * 10_000}, r"config\.json .* its len\(hidden\)=10000"),
    "one wide layer": (
        "sizes",
        {"hidden": [1000, 1000]},
        r"config\.json .* its sizes are of a larger",
    ),
    "width": ("sizes", {"encoder_width": 1e9}, r"config\.json .* its encoder_width=1000000000"),
    "components": ("mixture", {"n_components": HUGE}, r"config\.json .* its n_components="),
    "flow": ("model", {"n_flow_steps": HUGE}, r"config\.json .* its n_flow_steps=1000000000"),
}


@pytest.fixture
def copied(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize(("part", "changed", "match"), TAMPERED.values(), ids=TAMPERED)
def test_configurations_of_huge_models_are_named(part, changed, match, copied):
    path = copied / "config.json"
    config = json.loads(path.read_text())
    config[part] |= changed
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        load_run(copied)


def test_images_of_a_huge_shape_are_named(copied):
    path = copied / "summary.json"
    summary = json.loads(path.read_text()) | {"image_shape": [HUGE, HUGE]}
    path.write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=r"summary\.json .* its image_shape=\[1000000000, 1000"):
        load_run(copied)


def test_wide_flows_are_named(tmp_path, data):
    config = RunConfig.from_preset(
        "flow", budget="smoke", training={"max_epochs": 1, "warmup_epochs": 1}
    )
    train(config, tmp_path, data=data)
    path = tmp_path / "config.json"
    changed = json.loads(path.read_text())
    changed["sizes"]["flow_hidden"] = [2_000, 2_000]
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match=r"config\.json .* its flow_hidden=\(2000, 2000\)"):
        load_run(tmp_path)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _claim(path):
    weights = torch.load(path, weights_only=True)
    name = next(iter(weights))
    torch.save(weights | {name: torch.ones(1).expand(HUGE, HUGE)}, path)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (_truncate, r"best\.pt is truncated, or no checkpoint"),
        (_claim, r"best\.pt is damaged \(.* claims the shape \(1000000000, 1000000000\)"),
    ],
)
def test_spoiled_weights_are_named(spoil, match, copied):
    spoil(copied / "best.pt")
    with pytest.raises(ValueError, match=match):
        load_run(copied)


def test_weights_have_a_hash_of_their_numbers(data):
    config = config_of()
    first, same = (build(config, data.image_shape) for _ in range(2))
    assert weights_hash(first) == weights_hash(same)
    with torch.no_grad():
        next(same.parameters())[0, 0, 0] += 1e-3
    assert weights_hash(first) != weights_hash(same)
