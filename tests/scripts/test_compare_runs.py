"""`scripts/compare_runs.py` on records as `evaluate_wire.py` writes them: its figures, and what it refuses."""

import json
import random
from pathlib import Path

import pytest

from scripts.compare_runs import main
from trainers.evaluation.paired_statistics import holm, mcnemar, paired_difference


COUNT = 60


def records(seed: int, skill: float, **changes) -> list[dict]:
    draw, found = random.Random(seed), []
    for method in ("text", "latent"):
        for place in range(COUNT):
            score = draw.random() * 0.5 + (skill if method == "latent" else 0.4)
            found.append(
                {
                    **{"dataset": "squad", "seed": 42, "method": method, "receiver": "llama"},
                    **{"latent_len": 16 if method == "latent" else None, "id": f"q{place}", "document": f"d{place}"},
                    **{"example": f"hash {place}", "prediction": "a", "f1": score, "em": float(score > 0.6)},
                    **{"nll": 3 - score, "first_token_top1": 0.0},
                    **changes,
                }
            )
    return found


def write(folder: Path, rows: list[dict]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def of(rows: list[dict], method: str, metric: str) -> list[float]:
    return [row[metric] for row in sorted(rows, key=lambda row: row["id"]) if row["method"] == method]


def test_the_difference_is_paired_by_example_and_adjusted_over_all(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Paired by line, a run that was sorted differently is compared with other examples' scores."""
    ours, theirs = records(0, 0.45), records(1, 0.3)
    shuffled = list(theirs)
    random.Random(0).shuffle(shuffled)
    output = tmp_path / "difference.json"
    flags = ["--methods", "latent", "--metrics", "f1,em,nll", "--output", str(output)]
    report = main([write(tmp_path / "a", ours), write(tmp_path / "b", shuffled), *flags])
    found = {entry["metric"]: entry for entry in report["comparisons"]}
    assert list(found) == ["f1", "em", "nll"]
    for metric in ("f1", "nll"):
        expected = paired_difference(of(ours, "latent", metric), of(theirs, "latent", metric))
        assert {name: found[metric][name] for name in expected} == expected
    exact = mcnemar(of(ours, "latent", "em"), of(theirs, "latent", "em"))
    assert found["em"]["mcnemar"] == exact and found["em"]["p"] == exact["p"] and found["em"]["test"] == "McNemar"
    assert found["f1"]["a"] - found["f1"]["b"] == pytest.approx(found["f1"]["difference"])
    adjusted = holm([entry["p"] for entry in report["comparisons"]])
    assert [entry["p_holm"] for entry in report["comparisons"]] == adjusted
    assert json.loads(output.read_text()) == report
    text = capsys.readouterr().out
    assert "| latent, llama, M 16 |" in text and "McNemar" in text


def test_a_run_does_not_differ_from_itself(tmp_path: Path, capsys: pytest.CaptureFixture):
    """A difference of nothing with a small p is a fault in the pairing."""
    folder = write(tmp_path / "a", records(0, 0.4))
    report = main([folder, folder])
    assert all(entry["difference"] == 0 and entry["p"] == 1 for entry in report["comparisons"])
    assert {entry["metric"] for entry in report["comparisons"]} == {"f1", "em", "nll", "first_token_top1"}


def test_seeds_that_drew_the_same_example_count_once(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Three copies of the data make every p small."""
    sides = []
    for name, skill in (("a", 0.42), ("b", 0.4)):
        rows = records(0 if name == "a" else 1, skill)
        sides.append(
            (
                write(tmp_path / name, rows),
                write(tmp_path / f"{name}3", [dict(row, seed=s) for s in (1, 2, 3) for row in rows]),
            )
        )
    once = main([sides[0][0], sides[1][0], "--metrics", "f1"])
    thrice = main([sides[0][1], sides[1][1], "--metrics", "f1"])
    for one, three in zip(once["comparisons"], thrice["comparisons"], strict=True):
        assert three["examples"] == COUNT and three["p"] == pytest.approx(one["p"], abs=0.02)
        assert three["difference"] == pytest.approx(one["difference"])


def test_what_only_one_run_has_is_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    """A method that is silently left out looks as if it had been compared."""
    rows = records(0, 0.4)
    report = main([write(tmp_path / "a", rows), write(tmp_path / "b", [x for x in rows if x["method"] == "text"])])
    assert report["only"] == {"A": ["squad llama latent 16"], "B": []}
    assert "only in A: squad llama latent 16" in capsys.readouterr().out


def test_runs_that_do_not_fit_are_refused(tmp_path: Path):
    """The mean of other examples differs for a reason that no test knows."""
    rows = records(0, 0.4)
    whole = write(tmp_path / "a", rows)

    def refusal(name: str, changed: list[dict], *flags: str) -> str:
        with pytest.raises(ValueError) as error:
            main([whole, write(tmp_path / name, changed), *flags])
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "(1 only in A, 0 only in B, 59 in both)" in refusal("fewer", rows[1:])
    other = [dict(row, example="another text") if row["id"] == "q3" else row for row in rows]
    assert "the examples differ (1 only in A, 1 only in B" in refusal("other", other)
    without = [{name: value for name, value in row.items() if name != "em"} for row in rows]
    assert "squad, llama, text: the metric 'em' is missing in B" in refusal("without", without)
    assert "the metric 'accuracy' is missing in A and B" in refusal("none", rows, "--metrics", "accuracy")
    assert "A has latent, text; B has zero" in refusal("methods", [dict(row, method="zero") for row in rows])
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "predictions.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match="predictions.jsonl:1 is no record of an evaluation"):
        main([whole, str(broken)])
    with pytest.raises(ValueError, match="holds no evaluation"):
        main([whole, str(tmp_path)])
    with pytest.raises(SystemExit):
        main([whole, whole, "--metrics", "f2"])
