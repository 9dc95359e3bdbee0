import statistics

import pytest

from mixscvi.tables import csv_text, markdown_table, mean_and_spread, read_rows, run_missing


def test_the_spread_is_the_sample_standard_deviation():
    values = [97.0, 98.5, 101.25]
    mean, spread = mean_and_spread(values, digits=4).split(" ± ")
    assert float(mean) == pytest.approx(statistics.fmean(values), abs=1e-4)
    squares = sum((value - statistics.fmean(values)) ** 2 for value in values)
    assert float(spread) == pytest.approx((squares / 2) ** 0.5, abs=1e-4)


@pytest.mark.parametrize(
    ("values", "kwargs", "expected"),
    [
        ([1.0], {}, "1.00"),
        ([2.0, 2.0], {"digits": 1}, "2.0 ± 0.0"),
        ([1.0, 2.0], {"signed": True}, "+1.50 ± 0.71"),
        ([-1.0, -2.0], {"signed": True}, "-1.50 ± 0.71"),
    ],
)
def test_mean_and_spread(values, kwargs, expected):
    assert mean_and_spread(values, **kwargs) == expected


def test_no_values_have_no_mean():
    with pytest.raises(ValueError, match="values must hold at least one number"):
        mean_and_spread([])


def test_rows_survive_their_file(tmp_path):
    rows = [{"a": "1", "b": "x, y"}, {"a": "2", "b": 'with "quotes"'}]
    (tmp_path / "table.csv").write_text(csv_text(rows))
    assert read_rows(tmp_path / "table.csv") == rows
    assert read_rows(tmp_path / "none.csv") == []


def test_markdown_lines_up_with_its_columns():
    lines = markdown_table([{"a": 1, "b": 2}, {"b": 3}]).splitlines()
    assert lines == ["| a | b |", "| --- | --- |", "| 1 | 2 |", "|  | 3 |"]


class Interrupted(KeyboardInterrupt):
    """Instead of a kill."""


@pytest.fixture
def runner(tmp_path):
    """Runs configurations of a model and a seed; the calls that were made, and reports."""
    calls, reports = [], []
    path = tmp_path / "results" / "table.csv"

    def run(name, configuration, device):
        if configuration["seed"] == 13:
            raise Interrupted
        calls.append((name, device))
        return {**configuration, "score": len(calls) + 0.5}

    def again(seeds):
        runs = {f"m-{seed}": {"model": "m, large", "seed": seed} for seed in seeds}
        report = lambda name, rows: reports.append((name, rows[-1]))  # noqa: E731
        return run_missing(runs, run, path, device="cpu", identity=dict, report=report)

    return again, calls, reports, path


def test_what_the_table_holds_is_not_run_again(runner):
    again, calls, reports, path = runner
    again([0, 1])
    first = path.read_text()
    rows = again([1, 2])
    assert calls == [("m-0", "cpu"), ("m-1", "cpu"), ("m-2", "cpu")]
    assert [name for name, _ in reports] == ["m-0", "m-1", "m-2"]
    assert [str(row["seed"]) for row in rows] == ["0", "1", "2"]
    # The rows that were there stay as they are.
    assert path.read_text().startswith(first)
    assert len(path.read_text().splitlines()) == 4


def test_an_interrupted_runner_goes_on(runner):
    again, calls, _, path = runner
    with pytest.raises(Interrupted):
        again([0, 13, 1])
    assert len(path.read_text().splitlines()) == 2
    again([0, 1])
    assert calls == [("m-0", "cpu"), ("m-1", "cpu")]


def test_without_an_identity_the_table_is_made_anew(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("name\nold\n")
    runs = {"a": 1, "b": 2}
    rows = run_missing(runs, lambda name, value, device: {"name": name, "value": value}, path)
    assert rows == [{"name": "a", "value": 1}, {"name": "b", "value": 2}]
    assert path.read_text() == csv_text(rows)


def test_a_failed_run_is_repeated_and_the_others_are_kept(runner, tmp_path):
    path, broken, calls, told = tmp_path / "table.csv", {1, 3}, [], []

    def run(name, value, device):
        calls.append(name)
        if value in broken:
            raise ValueError(f"no {value}")
        return {"value": value}

    def again():
        runs = {f"run {value}": value for value in range(5)}
        identity = lambda value: {"value": value}  # noqa: E731
        failed = lambda name, error: told.append((name, str(error)))  # noqa: E731
        return run_missing(runs, run, path, identity=identity, failed=failed)

    with pytest.raises(ExceptionGroup, match=r"2 of 5 runs failed \(run 1, run 3\)") as raised:
        again()
    assert [str(error) for error in raised.value.exceptions] == ["no 1", "no 3"]
    assert told == [("run 1", "no 1"), ("run 3", "no 3")]
    assert [row["value"] for row in read_rows(path)] == ["0", "2", "4"]
    broken.clear()
    calls.clear()
    assert {row["value"] for row in again()} == {"0", "2", "4", 1, 3}
    assert calls == ["run 1", "run 3"]


def test_rows_that_come_in_any_order_end_in_that_of_the_configurations(tmp_path):
    reported = []

    def backwards(run, configurations):
        for name in reversed(configurations):
            yield name, run(name, configurations[name])

    rows = run_missing(
        {"a": 1, "b": 2},
        lambda name, value, device: {"value": value, "device": device},
        tmp_path / "new" / "table.csv",
        device="cpu",
        report=lambda name, rows: reported.append((name, rows[-1]["value"])),
        engine=backwards,
    )
    assert reported == [("b", 2), ("a", 1)]
    assert rows == [{"value": 1, "device": "cpu"}, {"value": 2, "device": "cpu"}]
    assert (tmp_path / "new" / "table.csv").read_text() == csv_text(rows)
