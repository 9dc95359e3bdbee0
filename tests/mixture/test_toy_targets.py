"""The core fits densities of the plane without any encoder; joint training shares them out."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "figures" / "toy_targets.py"
spec = importlib.util.spec_from_file_location("toy_targets", SCRIPT)
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)


@pytest.mark.parametrize("name", ["ring", "two modes"])
def test_joint_training_covers_more_of_the_target(name):
    target = toy.TARGETS[name]
    alone, _ = toy.score(toy.fit(target, 1, joint=True, seed=1, n_steps=600), target)
    joint, joint_jsd = toy.score(toy.fit(target, 4, joint=True, seed=1, n_steps=600), target)
    apart, apart_jsd = toy.score(toy.fit(target, 4, joint=False, seed=1, n_steps=600), target)
    assert joint < apart - 0.1
    assert joint_jsd > apart_jsd + 0.1
    assert -0.02 < joint < alone - 0.3


def test_one_component_is_the_same_trained_jointly_or_apart():
    target = toy.TARGETS["ring"]
    joint = toy.fit(target, 1, joint=True, seed=3, n_steps=50)
    apart = toy.fit(target, 1, joint=False, seed=3, n_steps=50)
    assert joint.component_loc.allclose(apart.component_loc)
