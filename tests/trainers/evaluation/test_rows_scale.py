"""The rows of `make verify TOPIC=scale`: each passes where the thing holds, and falls short where not."""

import json
from typing import Any

import pytest

from trainers.evaluation import rows_scale
from trainers.evaluation.audit import Advisories, Finding, ServiceAway
from trainers.evaluation.kill_training import KINDS
from trainers.verification import Context, load_topic


POINT = {"inside": True, "lost": False, "halves": [], "halves_beside": [], "store_sound": True, "same": True}
POINT |= {"whole": 4, "resumed_from": 4}


@pytest.mark.parametrize(
    ("change", "passed"),
    [
        ({}, True),
        ({"inside": False}, False),
        ({"lost": True}, False),
        ({"halves": ["cut"]}, False),
        ({"resumed_from": 2}, False),
        ({"kind": "wire"}, False),
        ({"store_sound": False}, False),
        ({"same": False}, False),
    ],
)
def test_one_kill_that_costs_something_is_enough_to_fall_short(
    context: Context, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], passed: bool
):
    """29 of 30 is a checkpoint that somebody lost."""

    class Process:
        def __init__(self, *args: Any, **kwargs: Any):
            points = [{"kind": kind} | POINT for kind in [*KINDS, *KINDS]]
            points[-1] |= change
            self.stdout = ["a log's line\n", *(json.dumps(point) + "\n" for point in points)]

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(rows_scale.subprocess, "Popen", Process)
    measured = rows_scale.kill(context, points=2, aimed_inside=2, at_least=2)
    assert measured.passed == passed and f"seed {rows_scale.SEED}: 10 kills" in measured.figure
    assert not rows_scale.kill(context, points=3, at_least=2).passed, "one is missing"


def test_packages_that_nobody_looked_up_are_not_clean(context: Context, monkeypatch: pytest.MonkeyPatch):
    """A mirror without advisories would make every audit pass."""

    def away(*given: Any) -> Advisories:
        raise ServiceAway("no advisory was looked up")

    monkeypatch.setattr(rows_scale, "bandit_findings", lambda: [])
    monkeypatch.setattr(rows_scale, "advisories", away)
    measured = rows_scale.audit(context)
    assert not measured.passed and "pip-audit not measured: no advisory was looked up" in measured.figure
    for findings, passed in (([], True), ([Finding("CVE-1", "x 1", "mended in 2")], False)):
        monkeypatch.setattr(rows_scale, "advisories", lambda *given, found=findings: Advisories(found, 9, []))
        assert rows_scale.audit(context).passed == passed


def test_the_topic_is_known():
    """A row that no command finds is never measured."""
    assert {"kill", "fuzz", "audit", "global_loss", "streaming", "docs"} <= {row.name for row in load_topic("scale")}


@pytest.mark.slow
def test_trainings_that_are_killed_end_as_those_that_are_not(context: Context):
    """The machine that dies in the middle of a save is the usual one: saves are long."""
    measured = rows_scale.kill(context, points=4, aimed_inside=3, at_least=1)
    assert measured.passed, (measured.figure, (context.work_dir / "log").read_text()[-3000:])
