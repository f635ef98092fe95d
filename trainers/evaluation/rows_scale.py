"""Rows of `make verify TOPIC=scale`: what a fault costs, and what a security team would find."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree  # nosec B405 # of what pytest has just written here

from ..verification import ROOT, Context, Measured, Row, code_hash
from . import distributed_rows, throughput_rows
from .audit import ServiceAway, advisories, bandit_findings
from .kill_training import KINDS


SEED = 20261122


def kill(context: Context, points: int = 30, aimed_inside: int = 16, at_least: int = 8) -> Measured:
    """kill -9 at drawn moments of tiny trainings, so many of each trainer."""
    context.say(f"seed {SEED}")
    folder = context.work_dir.resolve() / f"runs-{code_hash('scale')}"  # points of other code do not count
    command = [sys.executable, "-m", "trainers.evaluation.kill_training", str(folder)]
    command += [str(points), str(aimed_inside), str(SEED)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found: list[dict[str, Any]] = []
    log = context.work_dir / "log"
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=file, text=True, encoding="utf-8"
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"kind"'):
                found.append(json.loads(line))
                context.say(f"{len(found)}: {line.strip()}")
    if process.wait():
        raise RuntimeError(f"the trainings ended with {process.returncode}: see {log}; what is done is kept")
    return judged(found, points, at_least)


def judged(found: list[dict[str, Any]], points: int, at_least: int) -> Measured:
    """The verdict on kills, of `kill_training.point`."""
    by_kind = {kind: [one for one in found if one["kind"] == kind] for kind in KINDS}
    inside = {kind: sum(one["inside"] for one in ones) for kind, ones in by_kind.items()}
    lost = sum(one["lost"] for one in found)
    halves = sum(len(one["halves"]) for one in found)
    loaded = sum(one["resumed_from"] != one["whole"] for one in found)
    beside = sum(bool(one["halves_beside"]) for one in found)
    same = sum(one["same"] for one in found)
    damaged = sum(not one["store_sound"] for one in found)
    told = ", ".join(f"{kind} {len(by_kind[kind])} ({count})" for kind, count in inside.items())
    figure = (
        f"seed {SEED}: {len(found)} kills ({sum(inside.values())} inside a save), {told}; {lost} checkpoints lost, "
        f"{halves} half ones with a checkpoint's name, {beside} beside them and {loaded} loaded, {same} of "
        f"{len(found)} with the same last weights, {damaged} stores damaged"
    )
    enough = all(len(ones) == points and inside[kind] >= at_least for kind, ones in by_kind.items())
    passed = enough and not (lost or halves or loaded or damaged) and same == len(found)
    return Measured(figure, passed, {"points": found})


def fuzz(context: Context, share: float = 1.0) -> Measured:
    """The slow fuzz test, counted."""
    report = context.work_dir.resolve() / "fuzz.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "slow", "-p", "no:cacheprovider", "--timeout", "7200"]
    command += [f"--junitxml={report}", "tests/test_fuzz.py"]
    environment = {**os.environ, "LATENTFORGE_FUZZ_SHARE": str(share), "LATENTFORGE_FUZZ_SEED": str(SEED)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    (context.work_dir / "log").write_text(done.stdout + done.stderr, encoding="utf-8")
    tests = list(ElementTree.parse(report).iter("testcase"))  # nosec B314 # as above
    cases = {test.get("name", ""): int(one.get("value", 0)) for test in tests for one in test.iter("property")}
    failed = [
        test.get("name", "") for test in tests if test.find("failure") is not None or test.find("error") is not None
    ]
    figure = (
        f"seed {SEED}: {sum(cases.values())} cases, {len(failed)} of {len(tests)} kinds with a crash or a wrong value"
    )
    passed = done.returncode == 0 and not failed and sum(cases.values()) >= 10_000 * min(share, 1.0)
    return Measured(figure, passed, {"cases": cases, "failed": failed, "end": done.stdout[-3000:]})


def audit(context: Context, pip_audit: str | Path = ROOT / ".venv-audit" / "bin" / "pip-audit") -> Measured:
    """bandit and pip-audit."""
    findings = [str(finding) for finding in bandit_findings()]
    details: dict[str, Any] = {"bandit": findings}
    try:
        known = advisories(pip_audit)
    except (ServiceAway, FileNotFoundError) as error:
        return Measured(f"bandit {len(findings)} unexplained; pip-audit not measured: {error}", False, details)
    details |= {"pip-audit": [str(one) for one in known.findings], "not known to the service": known.skipped}
    figure = (
        f"bandit {len(findings)} unexplained; pip-audit {len(known.findings)} unexplained in {known.looked_up} "
        f"packages, {len(known.skipped)} not known to the service"
    )
    return Measured(figure, not findings and not known.findings, details)


ROWS = [
    Row(
        "kill",
        "kill -9 at 30 drawn moments of each trainer (codec, student, KD with store, wire, idea), resumed",
        "0 lost checkpoints, same final weights; at least 8 of each inside a save",
        kill,
        long=True,
        setup="tiny models, 12 steps, a save every 2, 2 kept, fp32, one thread; 16 moments of each are aimed at "
        "a save, the trace of the run says where they fell",
    ),
    Row(
        "fuzz",
        "packets, configs, KD-store rows and files, JSON lines, records of tasks, checkpoints: broken and read",
        "10,000 cases, 0 crashes without a clear error, 0 silent wrong values",
        fuzz,
        long=True,
        setup="hypothesis, tests/test_fuzz.py -m slow",
        also=("tests/test_fuzz.py",),
    ),
    Row(
        "audit",
        "bandit over the source, pip-audit over what is installed",
        "0 unexplained findings",
        audit,
        setup="pip-audit from the environment of make audit",
        also=("pyproject.toml",),
    ),
    *distributed_rows.ROWS,
    *throughput_rows.ROWS,
]
