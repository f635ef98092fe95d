"""The rows of `make verify TOPIC=evaluation` at tiny sizes: each passes where the scores mean what they say, and falls
short where not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.trainers.training_helpers import byte_tokenizer
from trainers.evaluation import rows_evaluation
from trainers.verification import Context


def test_brier_agrees_with_paper_and_a_biased_score_is_found(context: Context, monkeypatch: pytest.MonkeyPatch):
    """A score that is off for models we know is off for all others."""
    measured = rows_evaluation.brier_closed_form(context, num_rows=64, length=64)
    assert measured.passed and measured.figure.endswith("deterministic and wrong 0"), measured.figure
    assert len(measured.details) == 7
    sums = rows_evaluation.brier_sums
    monkeypatch.setattr(rows_evaluation, "brier_sums", lambda *given, **named: biased(sums(*given, **named)))
    assert not rows_evaluation.brier_closed_form(context, num_rows=64, length=64).passed


def biased(outcomes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return outcomes | {"sampled": outcomes["sampled"] + 0.1 * outcomes["counts"][:, None]}


@pytest.mark.parametrize(("second", "expected"), [([2.0, 3.0, 9.0], 1.0), ([5.0, 3.0, 1.0], -1.0), ([2, 1, 3], 0.5)])
def test_spearman_is_of_ranks(second: list[float], expected: float):
    """Of values, one outlier decides."""
    assert rows_evaluation.spearman([0.1, 0.2, 70.0], second) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("nll", "brier", "passed"),
    [
        (lambda n: 4.9 - 0.1 * n, lambda n: float(n), True),
        (lambda n: 4.9 - 0.1 * n, lambda n: float(n % 4) + 0.01 * n, False),  # the scores disagree
        (lambda n: 5.6 - 0.1 * n, lambda n: float(n), False),  # ten of sixteen checkpoints have learned anything
    ],
)
def test_brier_and_likelihood_must_order_enough_checkpoints_alike(
    context: Context, nll: Callable[[int], float], brier: Callable[[int], float], passed: bool
):
    """A score that orders checkpoints otherwise than likelihood does, or a correlation of few points, proves
    nothing."""
    byte_tokenizer().save_pretrained(context.work_dir / "tokenizer")
    for number, step in enumerate(rows_evaluation.CHECKPOINTS):
        summary = {"brier_lm": brier(number), "positions": 100_000}
        folder = context.work_dir / f"step-{step}"
        folder.mkdir()
        (folder / "scores.json").write_text(json.dumps({"nll": nll(number), "sampled": summary, "smooth": summary}))
    measured = rows_evaluation.brier_spearman(context, max_train_tokens=1024, max_eval_tokens=1024)
    assert measured.passed == passed
    used = [point["nll"] for point in measured.details["points"] if point["nll"] < 5]
    assert f"over {len(used)} checkpoints of {used[0]:.2f} to {used[-1]:.2f} nats/token, 100,000" in measured.figure
    if passed:
        assert measured.figure.startswith("-1.000 over 16 checkpoints")


def test_an_evaluation_needs_a_trained_demo(context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Without one, minutes would pass before a script says so in a log."""
    monkeypatch.setattr(rows_evaluation, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match="no trained demo: `make demo` first"):
        rows_evaluation.evaluate_quick(context)
