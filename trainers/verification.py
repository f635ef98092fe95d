"""Measure what the project promises: one row per target, measured on real runs, kept with where it came from."""

import hashlib
import importlib
import json
import os
import pkgutil
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


try:
    import fcntl
except ImportError:  # Windows: the file is still replaced in one step, only two runners at once may lose a row
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
ROWS_PACKAGE = "trainers.evaluation"
ROWS_PREFIX = "rows_"


@dataclass
class Measured:
    """What a row found.

    Attributes:
        figure: the measured figure as a person reads it beside the target, unit included.
        passed: whether it meets the target.
        details: whatever else belongs to the record; must be JSON.
    """

    figure: str | float
    passed: bool
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """What a row's `measure` is given.

    Attributes:
        topic, row: names.
        work_dir: this row's own folder; it stays, so that a long row can resume its trainings. Empty after `--fresh`.
        shared_dir: the topic's folder, for what several rows need.
        say: prints one line of progress.
        fresh: nothing that was kept counts, in `shared_dir` and in the repository neither.
    """

    topic: str
    row: str
    work_dir: Path
    shared_dir: Path
    say: Callable[[str], None]
    fresh: bool = False


@dataclass(frozen=True)
class Row:
    """One line of a topic's target table.

    Attributes:
        name: what `ROW=` takes; letters, digits, `_` and `-`.
        what: the quantity, in words.
        target: what it must reach, in words and figures.
        measure: makes the measurement.
        long: takes more than 30 minutes; runs only when named or with `--long`.
        setup: model size, corpus, tokens and seeds behind the figure.
        also: files and folders beside the code that the figure depends on.
    """

    name: str
    what: str
    target: str
    measure: Callable[[Context], Measured]
    long: bool = False
    setup: str = ""
    also: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name or not all(letter.isalnum() or letter in "_-" for letter in self.name):
            raise ValueError(f"a row's name is made of letters, digits, `_` and `-`, got {self.name!r}")


def known_topics() -> list[str]:
    """Topics that have a `trainers/evaluation/rows_<topic>.py`."""
    folder = Path(__file__).parent / ROWS_PACKAGE.split(".", 1)[1]
    names = (module.name for module in pkgutil.iter_modules([str(folder)]))
    return sorted(name.removeprefix(ROWS_PREFIX) for name in names if name.startswith(ROWS_PREFIX))


def load_topic(topic: str) -> list[Row]:
    """The rows of a topic: `ROWS` of `trainers.evaluation.rows_<topic>`.

    Raises:
        ValueError: an unknown topic (names the known ones), or two rows of one name.
    """
    topics = known_topics()
    if topic not in topics:
        raise ValueError(f"unknown topic {topic!r}: known are {', '.join(topics) or 'none yet'}")
    rows = list(importlib.import_module(f"{ROWS_PACKAGE}.{ROWS_PREFIX}{topic}").ROWS)
    _check_names(topic, rows)
    return rows


def run_topic(
    topic: str,
    rows: Sequence[Row],
    only: str | None = None,
    results_dir: str | Path = "results",
    *,
    work_dir: str | Path = "runs/verify",
    long: bool = False,
    fresh: bool = False,
    say: Callable[[str], None] | None = None,
) -> int:
    """Measure rows one after the other and print each verdict as it comes.

    A row that was measured with the same code is shown, not run again. Code is every source and recipe file of the
    packages and scripts, and the topic's own rows file; a commit that changes only documents voids nothing. A `long`
    row that nobody named keeps the verdict of its last measurement, with a note where that was made with other code.

    Args:
        topic: names the results file, `<results_dir>/verify_<topic>.json`.
        rows: the table.
        only: name of the one row to run; runs even if it is `long` or measured already.
        work_dir: rows keep their trainings under `<work_dir>/<topic>/<row>`.
        long: run `long` rows too.
        fresh: measure what is measured already, in emptied folders.
        say: takes one line of text; default, standard output.

    Returns:
        Exit status: 0 when every row of the table (with `only`, that row) meets its target, else 1.

    Raises:
        ValueError: `only` names no row, or two rows share a name.
    """
    say = say or _write_line
    _check_names(topic, rows)
    if only is not None and only not in {row.name for row in rows}:
        raise ValueError(f"topic {topic!r} has no row {only!r}: it has {', '.join(row.name for row in rows)}")
    path = Path(results_dir) / f"verify_{topic}.json"
    chosen = [row for row in rows if only is None or row.name == only]
    lacking = []
    for row in chosen:
        code = code_hash(topic, also=row.also) if row.also else code_hash(topic)
        last = last_measurements(path).get(row.name)
        current = last is not None and last["code"] == code and last["verdict"] != "error"
        waits = row.long and not long and only is None
        if waits or (current and not fresh and only is None):
            _show(row, last, code, say)
        else:
            last = _measure(topic, row, code, Path(work_dir), fresh, say)
            _append(path, topic, last)
            _show(row, last, code, say)
        if last is None or last["verdict"] != "passed":
            lacking.append(row.name)
    not_met = f"; not: {', '.join(lacking)}" if lacking else ""
    say(f"{len(chosen) - len(lacking)} of {len(chosen)} rows meet their target{not_met}")
    say(f"kept in {path}")
    return 1 if lacking else 0


def last_measurements(path: str | Path) -> dict[str, dict[str, Any]]:
    """The newest record of each row in a results file, by row name; empty if there is no file.

    Raises:
        ValueError: a file that is not ours.
    """
    return {record["row"]: record for record in _read(Path(path))}


def code_hash(topic: str, root: Path = ROOT, also: Sequence[str] = ()) -> str:
    """Hash of every source and recipe file that a measurement of `topic` may depend on, and of `also`."""
    digest = hashlib.sha256()
    for name in ("modeling_latentforge", "trainers", "scripts", *also):
        named = root / name
        for file in [named] if named.is_file() else sorted(named.rglob("*")):
            if file.suffix not in (".py", ".yaml") and file != named:
                continue
            if file.stem.startswith(ROWS_PREFIX) and file.stem != ROWS_PREFIX + topic:
                continue
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def environment() -> dict[str, Any]:
    """Versions, commit and machine, in words that name nobody."""
    import torch
    import transformers

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)  # nosec B607 # git of the PATH
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    except OSError:
        commit = changes = None
    return {
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "commit": commit,
        "uncommitted_changes": bool(changes),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cpu": _cpu_name(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def _measure(
    topic: str, row: Row, code: str, work_dir: Path, fresh: bool, say: Callable[[str], None]
) -> dict[str, Any]:
    shared = work_dir / topic
    own = shared / row.name
    if fresh and own.exists():
        shutil.rmtree(own)
    own.mkdir(parents=True, exist_ok=True)
    say(f"[{row.name}] measuring: {row.what}")
    record: dict[str, Any] = {
        "row": row.name,
        "what": row.what,
        "target": row.target,
        "setup": row.setup,
        "command": f"make verify TOPIC={topic} ROW={row.name}",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    start = time.perf_counter()
    try:
        measured = row.measure(Context(topic, row.name, own, shared, lambda line: say(f"[{row.name}] {line}"), fresh))
        record |= asdict(measured)
        record["verdict"] = "passed" if measured.passed else "falls short"
        json.dumps(record)  # what is no JSON must fail here, where it is one row's fault
    except Exception as error:
        # the other rows are still worth measuring
        record |= {"figure": f"{type(error).__name__}: {error}", "passed": False, "verdict": "error"}
        record["details"] = {"traceback": traceback.format_exc()}
    record["seconds"] = round(time.perf_counter() - start, 1)
    return record | {"code": code} | environment()


def _show(row: Row, record: dict[str, Any] | None, code: str, say: Callable[[str], None]) -> None:
    say(f"[{row.name}] {row.what}" + (f" ({row.setup})" if row.setup else ""))
    say(f"    target   {row.target}")
    if record is None:
        say(f"    missing  {'long: run it alone with ROW=' + row.name if row.long else 'not measured yet'}")
        return
    say(f"    measured {record['figure']}")
    note = "" if record["code"] == code else f", with other code than today's (commit {str(record['commit'])[:12]})"
    say(f"    {record['verdict'].upper()}   {record['time']}, {record['seconds']:g} s{note}")
    if record["verdict"] == "error":
        say("    " + record["details"]["traceback"].rstrip().replace("\n", "\n    "))


def _check_names(topic: str, rows: Sequence[Row]) -> None:
    names = [row.name for row in rows]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"topic {topic!r} has two rows named {', '.join(twice)}: a name must be unique")


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        return list(json.loads(path.read_text(encoding="utf-8"))["rows"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of `make verify` ({error}): move it away") from error


def _append(path: Path, topic: str, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        text = json.dumps({"topic": topic, "rows": [*_read(path), record]}, indent=1)
        draft = path.with_name(f"{path.name}.{os.getpid()}.part")
        draft.write_text(text + "\n", encoding="utf-8")
        os.replace(draft, path)  # a reader, or a crash, never meets half a file


@contextmanager
def _locked(path: Path):
    # a long row may run beside the others, and both append
    with open(path.with_suffix(".lock"), "w") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _write_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
