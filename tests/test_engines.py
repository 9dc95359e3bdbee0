import socket
import sys
from functools import partial

import pytest

from mixscvi.engines import RayEngine, sequential


@pytest.fixture
def half():
    """Within a function, as the processes of Ray cannot import the tests."""

    def half(name, value, *, of=None):
        if value is None:
            raise ValueError(f"{name} has no half")
        return {"name": name, "half": value / 2}

    return half


VALUES = {"a": 4, "none": None, "b": 6}


@pytest.mark.parametrize("engine", ["sequential", "ray"])
def test_one_failed_run_does_not_lose_the_others(engine, half, ray_cluster):
    # What a run holds is sent along with it.
    engine = sequential if engine == "sequential" else RayEngine()
    outcomes = dict(engine(partial(half, of="a closure"), VALUES))
    assert outcomes["a"] == {"name": "a", "half": 2.0}
    assert outcomes["b"] == {"name": "b", "half": 3.0}
    assert type(outcomes["none"]) is ValueError
    assert str(outcomes["none"]) == "none has no half"
    assert len(outcomes) == 3


def test_an_error_of_another_machine_says_where_it_was_raised(half, ray_cluster):
    ((_, error),) = RayEngine()(half, {"none": None})
    assert "in half" in error.__notes__[0]


def test_a_cluster_that_is_connected_to_stays_so(half, ray_cluster):
    assert len([*RayEngine()(half, {"a": 4})]) == 1
    assert ray_cluster.is_initialized()


@pytest.mark.parametrize("kwargs", [{"cpus": 99}, {"gpus": 3}])
def test_runs_that_no_machine_can_take_are_told_of(kwargs, ray_cluster):
    with pytest.warns(UserWarning, match="no machine of the cluster has"):
        RayEngine(**kwargs)._gpus(ray_cluster)


def test_accelerators_are_asked_for_where_there_are_any(ray_cluster):
    assert RayEngine()._gpus(ray_cluster) == 0


def test_no_ray_names_the_extra(half, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'mixscvi\[ray\]'"):
        next(iter(RayEngine()(half, VALUES)))


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nothing_listens_is_refused_at_once(scheme, half, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"no cluster of Ray answers at .*:{port}'"):
        next(iter(RayEngine(f"{scheme}127.0.0.1:{port}")(half, VALUES)))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"cpus": 0}, "cpus must be above 0, got 0"),
        ({"cpus": float("nan")}, "cpus must be above 0, got nan"),
        ({"gpus": -1}, "gpus must be at least 0, got -1"),
        ({"gpus": float("inf")}, "gpus must be at least 0, got inf"),
        ({"gpus": float("nan")}, "gpus must be at least 0, got nan"),
    ],
)
def test_impossible_resources_are_refused(kwargs, match):
    with pytest.raises(ValueError, match=match):
        RayEngine(**kwargs)
