"""The runner of `make verify`: what it records, what it repeats, what it refuses to call a success."""

import json
from pathlib import Path

import pytest

from scripts.verify import main
from trainers.verification import Context, Measured, Row, code_hash, known_topics, load_topic, run_topic


class Bench:
    """A table whose rows count how often they were measured."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.calls: list[str] = []
        self.lines: list[str] = []

    def row(self, name: str, figure: float, least: float = 0.0, long: bool = False) -> Row:
        def measure(context: Context) -> Measured:
            self.calls.append(name)
            (context.work_dir / "trained").write_text(name)
            return Measured(figure, figure >= least, {"least": least})

        return Row(name, f"the {name}", f">= {least}", measure, long=long, setup="no model, no corpus, no seed")

    def run(self, *rows: Row, **options) -> int:
        return run_topic(
            "bench",
            rows,
            results_dir=self.folder / "results",
            work_dir=self.folder / "work",
            say=self.lines.append,
            **options,
        )

    def records(self) -> list[dict]:
        return json.loads((self.folder / "results" / "verify_bench.json").read_text())["rows"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_every_record_says_how_it_was_made(bench: Bench):
    """A figure without command, code and machine cannot be checked by anybody else."""
    assert bench.run(bench.row("speed", 2.0, 1.8)) == 0
    (record,) = bench.records()
    assert record["figure"] == 2.0 and record["verdict"] == "passed" and record["details"] == {"least": 1.8}
    assert record["command"] == "make verify TOPIC=bench ROW=speed"
    assert set(record["versions"]) == {"python", "torch", "transformers"}
    assert record["machine"]["cores"] >= 1 and record["code"] == code_hash("bench") and record["seconds"] >= 0
    assert {"commit", "setup", "target", "what", "time"} <= set(record)


def test_target_figure_and_verdict_are_printed_row_by_row(bench: Bench):
    """Someone who stops a long run must have seen what was measured before."""
    bench.run(bench.row("speed", 1.0, 1.8), bench.row("memory", 3.0))
    text = "\n".join(bench.lines)
    assert ">= 1.8" in text and "measured 1.0" in text and "FALLS SHORT" in text and "PASSED" in text
    assert text.index("FALLS SHORT") < text.index("[memory] measuring")


def test_a_row_that_falls_short_fails_the_run(bench: Bench):
    """Continuous checks look only at the exit status."""
    assert bench.run(bench.row("speed", 1.0, 1.8), bench.row("memory", 3.0)) == 1
    assert bench.run(bench.row("memory", 3.0)) == 0


def test_a_row_that_raises_is_an_error_and_the_others_go_on(bench: Bench):
    """One broken row must not cost an hour of the rows behind it, nor pass as measured the next time."""

    def broken(context: Context) -> Measured:
        bench.calls.append("broken")
        raise RuntimeError("the corpus is empty")

    rows = (Row("broken", "nothing", "exact", broken), bench.row("memory", 3.0))
    assert bench.run(*rows) == 1
    assert [record["verdict"] for record in bench.records()] == ["error", "passed"]
    assert "the corpus is empty" in bench.records()[0]["details"]["traceback"]
    bench.run(*rows)
    assert bench.calls == ["broken", "memory", "broken"]


def test_figures_that_are_no_json_are_that_row_s_error(bench: Bench):
    """A tensor among the details would otherwise break the file for every row before it."""
    row = Row("odd", "a set", "none", lambda context: Measured(1.0, True, {"odd": {1, 2}}))
    assert bench.run(row, bench.row("memory", 3.0)) == 1
    assert [record["verdict"] for record in bench.records()] == ["error", "passed"]


def test_a_measured_row_is_shown_and_not_run_again(bench: Bench):
    """A table of hours must be resumable row by row."""
    rows = (bench.row("speed", 2.0), bench.row("memory", 3.0))
    bench.run(rows[0])
    bench.run(*rows)
    assert bench.calls == ["speed", "memory"]
    bench.run(*rows, only="speed")
    assert bench.calls == ["speed", "memory", "speed"]
    bench.run(*rows, fresh=True)
    assert len(bench.calls) == 5 and len(bench.records()) == 5


def test_other_code_voids_a_measurement(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """A figure of yesterday's code would vouch for today's."""
    bench.run(bench.row("speed", 2.0))
    monkeypatch.setattr("trainers.verification.code_hash", lambda topic: "other")
    bench.run(bench.row("speed", 2.0))
    assert bench.calls == ["speed", "speed"]


def test_the_code_hash_sees_sources_and_not_the_rows_of_other_topics(tmp_path: Path):
    """A new topic would otherwise void hours of measurements that it has nothing to do with."""
    (tmp_path / "trainers" / "evaluation").mkdir(parents=True)
    (tmp_path / "trainers" / "losses.py").write_text("a = 1\n")
    first = code_hash("main", tmp_path)
    (tmp_path / "trainers" / "evaluation" / "rows_wire.py").write_text("ROWS = []\n")
    assert code_hash("main", tmp_path) == first and code_hash("wire", tmp_path) != first
    (tmp_path / "trainers" / "losses.py").write_text("a = 2\n")
    assert code_hash("main", tmp_path) != first


def test_a_long_row_runs_only_when_asked_and_counts_as_missing_until_then(bench: Bench):
    """`make verify` must end in minutes, and must not call a table complete that is not."""
    rows = (bench.row("hours", 2.0, long=True), bench.row("memory", 3.0))
    assert bench.run(*rows) == 1
    assert bench.calls == ["memory"] and any("ROW=hours" in line for line in bench.lines)
    assert bench.run(*rows, only="hours") == 0
    assert bench.run(*rows) == 0
    assert bench.calls == ["memory", "hours"]
    assert bench.run(*rows, long=True) == 0
    assert bench.calls == ["memory", "hours"]


def test_a_long_row_of_older_code_keeps_its_verdict_and_says_so(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    """Two hours are not measured anew for every commit, but nobody may take them for fresh."""
    row = bench.row("hours", 2.0, long=True)
    bench.run(row, only="hours")
    monkeypatch.setattr("trainers.verification.code_hash", lambda topic: "other")
    bench.lines.clear()
    assert bench.run(row) == 0
    assert bench.calls == ["hours"] and any("other code" in line for line in bench.lines)


def test_a_row_finds_its_folder_again_until_fresh(bench: Bench):
    """A long row resumes its trainings from there; `--fresh` must not."""
    found = []

    def measure(context: Context) -> Measured:
        found.append((context.work_dir / "checkpoint").exists())
        (context.work_dir / "checkpoint").touch()
        return Measured(1.0, True)

    row = Row("train", "a training", "ends", measure)
    bench.run(row)
    bench.run(row, only="train")
    bench.run(row, fresh=True)
    assert found == [False, True, False]


def test_unknown_topic_and_row_name_the_known_ones(bench: Bench):
    """A typo must not read as a table without failures."""
    with pytest.raises(ValueError, match="unknown topic 'mian': known are"):
        load_topic("mian")
    with pytest.raises(ValueError, match="no row 'sped': it has speed"):
        bench.run(bench.row("speed", 2.0), only="sped")
    with pytest.raises(ValueError, match="two rows named speed"):
        bench.run(bench.row("speed", 2.0), bench.row("speed", 2.0))
    with pytest.raises(ValueError, match="letters, digits"):
        bench.row("../speed", 2.0)


def test_a_results_file_that_is_not_ours_is_refused(bench: Bench):
    """Overwriting it would lose somebody's data."""
    path = bench.folder / "results" / "verify_bench.json"
    path.parent.mkdir()
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="move it away"):
        bench.run(bench.row("speed", 2.0))
    assert path.read_text() == "[1, 2]"


def test_every_topic_loads_and_lists_what_a_row_must_name(capsys: pytest.CaptureFixture):
    """A row without setup or target is a figure that cannot be read."""
    assert "main" in known_topics()
    for topic in known_topics():
        for row in load_topic(topic):
            assert row.what and row.target and row.setup, row.name
        assert main(["--topic", topic, "--list"]) == 0
        assert "target" in capsys.readouterr().out


def test_a_wrong_call_ends_with_status_two(capsys: pytest.CaptureFixture):
    """Status 1 means a row falls short; a typo is something else."""
    with pytest.raises(SystemExit) as stop:
        main(["--topic", "mian"])
    assert stop.value.code == 2 and "known are" in capsys.readouterr().err
