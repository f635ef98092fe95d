"""Quality against speed at tiny size: what is compared with what, and what is measured again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from scripts import frontier as script
from tests.test_readme import make, needs_make
from trainers.evaluation import frontier, rows_evaluation
from trainers.evaluation.frontier import Candidate, Frontier, Lengths
from trainers.evaluation.side_by_side import Run, SideBySide
from trainers.verification import Context


def point(label: str, speed: float, nll: float, series: str = "token LM", choice: float | None = None) -> dict:
    return {
        "label": label,
        "series": series,
        "tokens_per_second": speed,
        "low": speed,
        "high": speed,
        "nll": nll,
        "nll_choice": nll if choice is None else choice,
    }


TOKEN_LMS = [point("small", 1600, 5.0), point("large", 400, 4.0), point("slow and bad", 900, 5.5)]


@pytest.mark.parametrize(
    ("speed", "expected"), [(1600, 5.0), (800, 4.5), (400, 4.0), (1601, None), (399, None), (900, 4.58496)]
)
def test_a_rival_lies_between_two_token_lms_on_a_line_over_log_speed(speed: float, expected: float | None):
    """Beyond the fastest and the slowest a guess could favour the student, and a token LM that another beats in both
    counts is nobody's rival."""
    found = frontier.at_speed(TOKEN_LMS, speed)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-5))


def test_the_best_student_is_chosen_on_other_text_than_the_figure(monkeypatch: pytest.MonkeyPatch):
    """The best of several noisy figures is too good by the noise."""
    students = [
        point("lucky", 800, 4.0, "student", choice=4.45),
        point("good", 800, 4.2, "student", choice=4.1),
        point("too fast", 2000, 3.0, "student"),
        point("taught", 800, 3.9, "student, taught"),
        point("parallel", 800, 1.0, "student, parallel decoder"),
    ]
    best = frontier.best_advantage([*TOKEN_LMS, *students])
    assert best is not None and best["label"] == "good" and best["advantage"] == pytest.approx(0.3)
    taught = frontier.best_advantage([*TOKEN_LMS, *students], "student, taught")
    assert taught is not None and taught["advantage"] == pytest.approx(0.6)
    assert frontier.best_advantage([*TOKEN_LMS, students[2]]) is None
    text = frontier.markdown({"text": [*TOKEN_LMS, *students]}, {"text": "A note."})
    assert "| too fast | 2000 (2000 to 2000) | 3.000 | no token LMs of higher and lower speed |  |" in text
    assert "| good | 800 (800 to 800) | 4.200 | +0.300 |  |" in text
    assert "| parallel | 800 (800 to 800) |  |  |  |" in text  # no likelihood to compare


class Sized:
    """A model of which only the vocabulary is asked."""

    config = LlamaConfig(vocab_size=9)


def test_a_token_lm_is_timed_with_the_faster_of_its_caches(monkeypatch: pytest.MonkeyPatch):
    """A rival slowed by a cache that nobody would choose is a straw man."""
    seconds = {"a": 0.2, "a static": 0.1, "b": 0.1, "b static": 0.2, "student": 0.05}

    def speed(models: Any, *_: Any, **__: Any) -> dict[str, Any]:
        assert torch.get_num_threads() == 1
        return {n: {"seconds_per_token": s, "seconds_per_token_runs": [s, 2 * s]} for n, s in seconds.items()}

    monkeypatch.setattr(frontier, "generation_speed", speed)
    threads = torch.get_num_threads()
    rates = frontier.decode_rates(dict.fromkeys(seconds, Sized()), Lengths())
    assert {name: rate["decode_tokens_per_second"] for name, rate in rates.items()} == {
        "a": 10,
        "b": 10,
        "student": 20,
    }
    assert (rates["a"]["cache"], rates["b"]["cache"]) == ("static", "dynamic") and "cache" not in rates["student"]
    assert (rates["student"]["low"], rates["student"]["high"]) == (10, 20)
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match=r"`new_tokens` \(1\) must be at least 2"):
        frontier.decode_rates({}, Lengths(new_tokens=1))


def table(folder: Path) -> SideBySide:
    text = folder / "text.txt"
    if not text.exists():
        with open(torch.__file__) as source:  # real text
            text.write_text(source.read()[:40_000])
    return SideBySide(
        folder / "work",
        str(text),
        None,
        vocab_size=300,
        num_tokens=1024,
        block_size=64,
        tokens_per_step=512,
        eval_tokens=1024,
        hidden_size=64,
        num_hidden_layers=1,
        say=lambda line: None,
        records_dir=folder / "records",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained once, in this process."""
    folder = tmp_path_factory.mktemp("frontier")
    made = tiny(folder)
    for candidate in made.candidates:
        for run in candidate.runs:
            made.table.result(run)
    return folder


def tiny(folder: Path, only: int = 3) -> Frontier:
    backbone = {"backbone": {"hidden_size": 128, "num_hidden_layers": 2}}
    candidates = [
        Candidate("K=4", "student", (Run("student", 5e-3, 0, 4, backbone),), brier=True),
        Candidate("1 x 64", "token LM", (Run("token_lm", 1e-3), Run("token_lm", 5e-3)), brier=True),
    ]
    lengths = Lengths(prompt=4, new_tokens=3, repeats=1, positions=30)
    return Frontier("Tiny text", table(folder), candidates[:only], lengths)


def test_a_report_trains_times_and_draws_once(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Half an hour of training that is lost with a picture is not resumable; rates of two sessions in one picture
    compare the sessions."""
    timed = []
    rates = frontier.decode_rates
    monkeypatch.setattr(
        frontier, "decode_rates", lambda models, lengths: timed.append(set(models)) or rates(models, lengths)
    )
    out = folder / "out"
    frontier.report([tiny(folder, only=1)], out)
    made = tiny(folder)
    assert made.table.build(made.candidates[0].runs[0]).config.backbone_config.num_hidden_layers == 2
    found = frontier.report([made], out)
    assert [len(models) for models in timed] == [1, 3]  # all of them again, the token LM with two caches
    student, token_lm = found["Tiny text"]["points"]
    assert token_lm["learning_rate"] == made.best(made.candidates[1]).learning_rate
    assert token_lm["learning_rates_tried"] == [1e-3, 5e-3] and token_lm["cache"] in ("static", "dynamic")
    assert student["brier"]["positions"] >= 30 and len(student["brier"]["brier"]) == 4
    assert token_lm["brier"]["positions"] == student["brier"]["positions"]  # the same places
    assert student["low"] <= student["tokens_per_second"] <= student["high"]
    assert found["Tiny text"]["best"] is None  # one token LM has no two sides
    assert json.loads((out / "frontier.json").read_text()) == json.loads(json.dumps(found))
    assert "1,024 training tokens" in (out / "frontier.md").read_text()
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")

    again = tiny(folder)
    again.table.load = again.table.build = None  # type: ignore[method-assign,assignment]  # anything new needs them
    assert frontier.report([again], out) == found and len(timed) == 2
    frontier.report([tiny(folder, only=1)], out, speed_again=True)
    assert len(timed) == 3


def test_speed_is_kept_by_shape_not_by_training(tmp_path: Path):
    """A speed that is measured again for each learning rate wastes the quiet minutes; one that is shared by two
    shapes is wrong."""
    made = Frontier("any", table(tmp_path), [])
    first, second = (Candidate("x", "token LM", (Run("token_lm", rate),)) for rate in (1e-3, 2e-3))
    assert made.shape(first) == made.shape(second)
    shapes = {
        made.shape(Candidate("x", "student", (Run("student", 1e-3, 0, k, {"decoder_window": w}),)))
        for k in (4, 8)
        for w in (8, 16)
    }
    assert len(shapes) == 4


def test_every_point_of_the_real_picture_is_a_model_of_its_own(tmp_path: Path):
    """Two labels of one model are one figure twice; Brier scores at other places are no comparison."""
    for candidates in (frontier.python_candidates("codec-4"), frontier.books_candidates()):
        made = Frontier("any", table(tmp_path), candidates)
        names = [made.table.name(run) for candidate in candidates for run in candidate.runs]
        assert len(set(names)) == len(names)
        sizes = {run.patch_size for c in candidates if c.brier and c.series != "token LM" for run in c.runs}
        assert sizes <= {Lengths().brier_patch_size}
        assert sum(candidate.series == "token LM" for candidate in candidates) >= 4


def test_candidates_that_cannot_be_drawn_are_refused(tmp_path: Path):
    """After an hour of training it is late to learn that two points have one name."""
    run = Run("token_lm", 1e-3)
    with pytest.raises(ValueError, match="unknown series 'rival': take one of token LM"):
        Candidate("a", "rival", (run,))
    with pytest.raises(ValueError, match="'a' has no run"):
        Candidate("a", "student", ())
    with pytest.raises(ValueError, match="two candidates are named a"):
        Frontier("any", table(tmp_path), [Candidate("a", "token LM", (run,))] * 2)


@pytest.mark.parametrize(("python", "books", "passed"), [(0.05, 0.3, True), (0.049, 0.3, False), (0.3, None, False)])
def test_the_row_asks_both_corpora(
    context: Context, monkeypatch: pytest.MonkeyPatch, python: float, books: float | None, passed: bool
):
    """A student that is ahead on one text only is not ahead."""

    def entry(advantage: float | None) -> dict[str, Any]:
        best = None if advantage is None else {"label": "K=8", "advantage": advantage, "tokens_per_second": 600.0}
        return {"best": best, "best_taught": None}

    for name in ("python_frontier", "books_frontier"):
        monkeypatch.setattr(rows_evaluation, name, lambda folder, **options: folder)
    found = {"Python code": entry(python), "books": entry(books)}
    monkeypatch.setattr(rows_evaluation, "report", lambda *given, **named: found)
    measured = rows_evaluation.frontier(context)
    assert measured.passed == passed and f"Python code: +{python:.3f} nats (K=8, 600 tokens/s)" in str(measured.figure)
    assert ("books: no student between two token LMs" in str(measured.figure)) == (books is None)


@needs_make
def test_make_frontier_prints_tables_and_verdict(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """What a newcomer runs must say what came of it, and refuse a corpus before anything is trained."""
    monkeypatch.setitem(frontier.CORPORA, "python", lambda work_dir, records_dir: tiny(work_dir, only=1))
    printed = make("-n", "frontier", "FRONTIER=--corpus python").stdout
    flags = printed.split("scripts/frontier.py")[1].splitlines()[0]  # inside another make it also says where it is
    text = script.main([*flags.split(), "--work_dir", str(folder), "--output_dir", str(tmp_path)])
    assert "| K=4 |" in text
    assert "Tiny text: no student has token LMs of both higher and lower speed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="unknown corpus 'novels': known are python, books"):
        script.main(["--corpus", "novels"])
