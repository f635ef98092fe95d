"""Rows of `make verify TOPIC=scale`: one loss however a step is spread, streams over a kill, the documentation."""

import json
import shutil
import subprocess
import sys
from typing import Any

from ..verification import ROOT, Context, Measured, Row


LAYOUTS = ((1, 8), (2, 4), (4, 2))  # processes, batches that each accumulates
TOLERANCE = 1e-5
KILL_AFTER = 7  # steps; the last checkpoint is of step 6


def launch(module: str, *arguments: Any) -> None:
    """Run a module of this package in a process of its own.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    command = [sys.executable, "-m", f"{__package__}.{module}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} {arguments} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def compare(runs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Largest difference of a logged loss from the first run's, by run."""
    first, *_ = runs.values()
    return {
        name: max(abs(x["loss"] - y["loss"]) for x, y in zip(run["log"], first["log"], strict=True))
        for name, run in runs.items()
    }


def global_loss(context: Context) -> Measured:
    runs: dict[str, dict[str, dict[str, Any]]] = {"codec": {}, "student": {}}
    logits: dict[str, float] = {}
    shares: dict[str, str] = {}
    for processes, accumulation in LAYOUTS:
        context.say(f"{processes} processes, {accumulation} batches each")
        folder = context.work_dir / f"{processes}x{accumulation}"
        folder.mkdir(parents=True, exist_ok=True)
        ways = ("ddp",) if processes == 1 else ("ddp", "fsdp2")
        cases = [(kind, way) for kind in runs for way in ways]
        launch("distributed_runs", folder, processes, accumulation, *(f"{kind}-{way}" for kind, way in cases))
        for kind, way in cases:
            name = f"{kind}-{way} {processes} x {accumulation}"
            runs[kind][name] = run = json.loads((folder / f"{kind}-{way}.json").read_text())
            if way == "fsdp2":
                logits |= {f"{name}, {place}": value for place, value in run["logits_differ_by"].items()}
                shares[name] = f"{len(run['in_shares'])} in shares, {len(run['whole'])} whole"
    differ = compare(runs["codec"]) | compare(runs["student"])
    worst, furthest = max(differ.values()), max(logits.values())
    sharded = all(not share.startswith("0 ") for share in shares.values())
    return Measured(
        f"losses differ by at most {worst:.1e}; sharded save, plain load: logits differ by {furthest:.1e}",
        worst <= TOLERANCE and furthest <= 1e-6 and sharded,
        {"loss": differ, "logits": logits, "weights": shares},
    )


def streaming(context: Context) -> Measured:
    folder = context.work_dir / "run"
    shutil.rmtree(folder, ignore_errors=True)  # checkpoints of an earlier measurement
    launch("streaming_runs", folder, 2, 2, KILL_AFTER)
    found = json.loads((folder / "counted.json").read_text())
    right = found["times"] == {"1": found["documents"]} and not found["damaged"] and found["killed"] == [-9, -9]
    told = ", ".join(f"{count} documents {times} x" for times, count in found["times"].items())
    return Measured(f"killed after step {KILL_AFTER}: {told}, {found['damaged']} damaged", right, found)


def docs(context: Context) -> Measured:
    def run(*words: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False)

    built = run("mkdocs", "build", "--strict", "--site-dir", str(context.work_dir / "site"))
    warnings = [line for line in built.stderr.splitlines() if line.startswith(("WARNING", "ERROR"))]
    tests = (
        "tests/test_docs.py",
        "tests/test_readme.py",
        "tests/scripts/test_demo.py",
        "tests/trainers/test_distributed.py",
    )
    words = "docs or documentation or readme or tutorial"
    tested = run("pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu", "--timeout", "1800", "-k", words, *tests)
    *_, last = tested.stdout.strip().splitlines() or [tested.stderr[-300:]]
    site = "not built" if built.returncode else "built"
    return Measured(
        f"{site}, {len(warnings)} warnings; code blocks: {last.strip('= ')}",
        # a block that was skipped did not run
        not built.returncode and not warnings and not tested.returncode and "skipped" not in last,
        {"warnings": warnings, "tests": tested.stdout[-3000:]},
    )


ROWS: list[Row] = [
    Row(
        "global_loss",
        "loss of 1 x 8, 2 x 4, 4 x 2 (processes x accumulation), DDP and FSDP2, CPU",
        "equal to 1e-5 over 10 steps; sharded save -> plain load: same logits",
        global_loss,
        setup="codec 32 wide, student 2 x 32 with a teacher, K=4, rows with 1 to 31 labels, fp32, gloo, one seed",
    ),
    Row(
        "streaming",
        "documents of a stream that is killed and gone on with, 2 ranks x 2 workers",
        "each id exactly once",
        streaming,
        setup="120 documents of 20 to 200 bytes in 5 Parquet files, blocks of 64, checkpoint every 3 steps, SIGKILL",
    ),
    Row(
        "docs",
        "documentation: links, docstrings, code blocks",
        "build without warnings; every code block runs",
        docs,
        setup="mkdocs build --strict; the tests that run the blocks of the new pages and of the README",
        also=("docs", "mkdocs.yml", "README.md", "tests/test_docs.py"),
    ),
]
