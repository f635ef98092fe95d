"""The whole journey at laptop size: tokenizer -> teacher -> codec -> two students -> generation -> report.

    python scripts/demo.py                                       # the Python standard library, 12 minutes on 2 cores
    python scripts/demo.py --data book.txt --patch_size 4        # your text
    python scripts/demo.py --data book.txt --teacher my-org/my-lm   # your text and your model: its tokenizer is used

Writes `runs/demo/{tokenizer,teacher,autoencoder,student,student_parallel}`, each loadable with the Auto classes, and
`runs/demo/report/report.md`. A stage that is finished is not run again: its `stage.json` holds a hash of its settings,
its data and the stages before it. `log.txt` of a stage holds what its script printed.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


SCRIPTS = Path(__file__).resolve().parent
PROGRESS_SECONDS = 15.0
# what a stage leaves for those after it and for the reader; weights may be in several files
MODEL = ("config.json", "model*.safetensors", "tokenizer_config.json")
RESULTS = {
    "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
    "generation": ("generation.json",),
    "report": ("report.md", "report.json"),
}


@dataclass
class DemoArguments:
    """What the demo is made from."""

    data: str | None = field(
        default=None, metadata={"help": "Text file, folder, .jsonl, Hub id or builtin:python. Default: the recipe's."}
    )
    patch_size: int | None = field(default=None, metadata={"help": "K, tokens per latent. Default: the recipe's."})
    latent_size: int | None = field(
        default=None,
        metadata={"help": "D, numbers per latent. Default: the recipe's, or 32 x patch_size if that is given."},
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Causal LM to learn from, directory or Hub id. Default: a small one is trained."},
    )
    recipe: str = field(
        default=str(SCRIPTS / "configs" / "demo.yaml"), metadata={"help": "Flags of every stage, as YAML."}
    )
    output_dir: str = field(default="runs/demo", metadata={"help": "Where the stages write."})
    measure: str | None = field(
        default=None,
        metadata={"help": "Only repeat a stage of the demo's own (generation, report), from its arguments.yaml."},
    )

    def __post_init__(self) -> None:
        for name in ("patch_size", "latent_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.teacher is not None:
            from trainers.command_line import model_path

            self.teacher = model_path("teacher", self.teacher)


@dataclass
class Stage:
    """One script, its flags, and the stages whose results it reads."""

    name: str
    script: str
    flags: dict[str, Any]
    upstream: list["Stage"]
    data: Any
    directory: Path

    @property
    def stamp(self) -> Path:
        return self.directory / "stage.json"

    def hash(self) -> str:
        """What decides the stage's result: flags, the text's identity, and the same of every stage before it."""
        parts = [
            self.name,
            json.dumps(self.flags, sort_keys=True),
            json.dumps(self.data),
            *(stage.hash() for stage in self.upstream),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]

    def finished(self) -> dict[str, Any] | None:
        """The stamp, if the stage ended well with this very hash and what it made is still there."""
        try:
            stamp = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        made = all(any(self.directory.glob(pattern)) for pattern in RESULTS.get(self.name, MODEL))
        return stamp if made and stamp.get("hash") == self.hash() else None

    def command(self, arguments_file: Path) -> list[str]:
        """How a person would run the stage alone."""
        option = "--measure" if self.script == "demo.py" else "--config"
        return [sys.executable, str(SCRIPTS / self.script), option, str(arguments_file)]


class StageError(RuntimeError):
    """A stage's script failed; the message names its log."""


Execute = Callable[[Stage, Path], int | None]


def plan(arguments: DemoArguments) -> list[Stage]:
    """The stages in order.

    Raises:
        ValueError: a recipe that is unreadable or lacks a stage, or a stage that is unknown.
    """
    recipe = _read_recipe(arguments.recipe)
    data = arguments.data or recipe["data"]
    patch_size = arguments.patch_size or recipe["patch_size"]
    latent_size = arguments.latent_size or (32 * patch_size if arguments.patch_size else recipe["latent_size"])
    out = Path(arguments.output_dir)
    identity = data_identity(data)
    text = {"data": data, **recipe["text"]}
    tokenizer_dir = arguments.teacher or str(out / "tokenizer")
    teacher_dir = arguments.teacher or str(out / "teacher")
    common = {**text, "seed": recipe["seed"], "report_to": "none", "save_strategy": "no"}
    if arguments.teacher:
        identity = [identity, data_identity(arguments.teacher)]

    def stage(name: str, script: str, flags: dict[str, Any], upstream: Sequence[Stage]) -> Stage:
        flags = {**flags, **recipe[name]}
        if "block_size" in flags:  # the recipe's, brought to whole patches
            flags["block_size"] = max(flags["block_size"] // patch_size, 1) * patch_size
        return Stage(name, script, flags, list(upstream), identity, out / name)

    stages: list[Stage] = []
    roots: list[Stage] = []
    teachers: list[Stage] = []
    if not arguments.teacher:
        tokenizer = stage("tokenizer", "train_tokenizer.py", {"data": data, "output_dir": tokenizer_dir}, [])
        teacher = stage(
            "teacher",
            "train_teacher.py",
            {**common, "tokenizer": tokenizer_dir, "patch_size": patch_size, "output_dir": teacher_dir},
            [tokenizer],
        )
        stages, roots, teachers = [tokenizer, teacher], [tokenizer], [teacher]
    autoencoder = stage(
        "autoencoder",
        "train_autoencoder.py",
        {
            **common,
            "tokenizer": tokenizer_dir,
            "patch_size": patch_size,
            "latent_size": latent_size,
            "output_dir": str(out / "autoencoder"),
        },
        roots,
    )
    students = [
        stage(
            name,
            "train_student.py",
            {
                **common,
                "autoencoder": str(out / "autoencoder"),
                "teacher": teacher_dir,
                "output_dir": str(out / name),
            },
            [autoencoder, *teachers],
        )
        for name in ("student", "student_parallel")
    ]
    models = {"teacher": teacher_dir} | {student.name: str(out / student.name) for student in students}
    measured = {**text, "seed": recipe["seed"], "patch_size": patch_size, "models": models}
    generation = stage(
        "generation", "demo.py", {**measured, "output_dir": str(out / "generation")}, [*teachers, *students]
    )
    report = stage(
        "report",
        "demo.py",
        {
            **measured,
            "latent_size": latent_size,
            "runs": str(out),
            "stages": [before.name for before in (*stages, autoencoder, *students, generation)],
            "output_dir": str(out / "report"),
        },
        [*teachers, autoencoder, *students, generation],
    )
    return [*stages, autoencoder, *students, generation, report]


def data_identity(data: str) -> Any:
    """What stands for a text (or a model's folder) in a stage's hash: files by size and time, the rest by name."""
    path = Path(data).expanduser()
    if path.exists():
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        return [
            [file.relative_to(path.parent).as_posix(), file.stat().st_size, file.stat().st_mtime_ns]
            for file in files
            if file.is_file()
        ]
    return [data, sys.version] if data.startswith("builtin:") else [data]


def run_demo(
    arguments: DemoArguments, execute: Execute | None = None, say: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Run what is not finished; returns and writes (`demo.json`) seconds and peak memory of every stage.

    Args:
        execute: runs one stage from its arguments file and returns its peak memory in bytes; default, a process.

    Raises:
        StageError: a stage failed.
        ValueError: a folder of the demo holds files that are not the demo's.
        OSError: output_dir cannot be written to.
    """
    from trainers.command_line import check_writable

    execute = execute or execute_in_process_of_its_own
    say = say or (lambda line: print(line, flush=True))
    start = time.perf_counter()
    stages = plan(arguments)
    check_writable(arguments.output_dir)
    stamps, ran = {}, []
    for number, stage in enumerate(stages, 1):
        title = f"[{time.perf_counter() - start:5.0f} s] {number}/{len(stages)} {stage.name}"
        stamp = stage.finished()
        if stamp:
            say(f"{title}: finished already, skipped")
        else:
            say(f"{title}: running")
            stamp = _run_stage(stage, execute)
            ran.append(stage.name)
            memory = stamp["peak_memory_bytes"]
            say(f"    {stage.name}: {stamp['seconds']:.0f} s" + (f", {memory / 2**30:.2f} GB" if memory else ""))
        stamps[stage.name] = {key: stamp[key] for key in ("seconds", "peak_memory_bytes")}
    summary = {
        "seconds": sum(stamp["seconds"] for stamp in stamps.values()),
        "peak_memory_bytes": max(stamp["peak_memory_bytes"] or 0 for stamp in stamps.values()) or None,
        "stages": stamps,
        "ran": ran,
    }
    out = Path(arguments.output_dir)
    (out / "demo.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    say(f"[{time.perf_counter() - start:5.0f} s] the report is in {out / 'report' / 'report.md'}")
    return summary


def _run_stage(stage: Stage, execute: Execute) -> dict[str, Any]:
    import yaml

    arguments_file = stage.directory / "arguments.yaml"
    if stage.directory.exists():
        if any(stage.directory.iterdir()) and not arguments_file.exists():
            raise ValueError(
                f"{stage.directory} holds files that no demo wrote: move them, or pass another --output_dir"
            )
        shutil.rmtree(stage.directory)
    stage.directory.mkdir(parents=True)
    arguments_file.write_text(yaml.safe_dump(stage.flags, sort_keys=False), encoding="utf-8")
    start = time.perf_counter()
    peak_memory = execute(stage, arguments_file)
    stamp = {
        "hash": stage.hash(),
        "seconds": round(time.perf_counter() - start, 1),
        "peak_memory_bytes": peak_memory,
        "command": " ".join(["python", f"scripts/{stage.script}", *stage.command(arguments_file)[2:]]),
    }
    stage.stamp.write_text(json.dumps(stamp, indent=1) + "\n", encoding="utf-8")
    return stamp


def execute_in_process_of_its_own(stage: Stage, arguments_file: Path) -> int | None:
    """Run a stage's script, its output in `log.txt`, whose last line is printed now and then.

    Returns:
        The script's peak memory in bytes; None where the system does not tell.

    Raises:
        StageError: the script failed; the message holds the end of its log.
    """
    log = stage.directory / "log.txt"
    start = last = time.perf_counter()
    with open(log, "wb") as output:
        process = subprocess.Popen(stage.command(arguments_file), stdout=output, stderr=subprocess.STDOUT)
        try:
            peak_memory = None
            while process.returncode is None:
                if hasattr(os, "wait4"):
                    # unlike wait(), tells the peak memory of this one child
                    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                    if pid:
                        process.returncode = os.waitstatus_to_exitcode(status)
                        peak_memory = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
                        break
                elif process.poll() is not None:
                    break
                time.sleep(0.2)
                if time.perf_counter() - last > PROGRESS_SECONDS:
                    last = time.perf_counter()
                    print(f"    {stage.name} {last - start:4.0f} s  {_last_line(log)}", flush=True)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise StageError(f"{stage.name} ended with status {process.returncode}; the end of {log}:\n{tail}")
    return peak_memory


def _last_line(log: Path) -> str:
    # progress bars rewrite their line with carriage returns
    lines = log.read_bytes()[-4000:].decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:100] for line in reversed(lines) if line.strip()), "")


def _read_recipe(path: str) -> dict[str, Any]:
    import yaml

    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"cannot read the recipe {path}: {error}") from error
    known = {"data", "patch_size", "latent_size", "seed", "text", "tokenizer", "teacher", "autoencoder"}
    known |= {"student", "student_parallel", "generation", "report"}
    found = set(recipe) if isinstance(recipe, dict) else set()
    if found != known:
        raise ValueError(
            f"the recipe {path} lacks {sorted(known - found)} and has {sorted(found - known)} beyond that"
        )
    return recipe


def run_measurement(arguments_file: str) -> None:
    """The stages `generation` and `report`, by the name of their folder."""
    import torch
    import yaml
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    import modeling_latentforge  # noqa: F401  (registers our models with the Auto classes)
    from trainers.data import DataArguments, load_blocks, load_texts
    from trainers.reporting import held_out_prompts, measure_generation, measure_quality, read_history, write_report

    flags = yaml.safe_load(Path(arguments_file).read_text(encoding="utf-8"))
    out = Path(flags["output_dir"])
    tokenizer = AutoTokenizer.from_pretrained(flags["models"]["student"])
    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        for name, path in flags["models"].items()
    }
    data_args = DataArguments(**{key: flags[key] for key in DataArguments.__dataclass_fields__ if key in flags})
    if out.name == "generation":
        texts = load_texts(data_args)[1]
        prompts = held_out_prompts(texts, tokenizer, flags["num_prompts"], flags["prompt_tokens"], flags["new_tokens"])
        options = {key: flags[key] for key in ("new_tokens", "speed_tokens", "repeats", "temperature", "seed")}
        measured = measure_generation(models, tokenizer, prompts, **options)
        (out / "generation.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
        return
    runs = Path(flags["runs"])
    autoencoder = AutoModel.from_pretrained(runs / "autoencoder", dtype=torch.float32)
    blocks = load_blocks(data_args, tokenizer, flags["patch_size"], flags["seed"])[1]
    stages = {name: json.loads((runs / name / "stage.json").read_text(encoding="utf-8")) for name in flags["stages"]}
    write_report(
        out,
        measure_quality(
            models,
            autoencoder,
            tokenizer,
            blocks,
            max_tokens=flags["max_tokens"],
            max_codec_tokens=flags["max_codec_tokens"],
            seed=flags["seed"],
        ),
        json.loads((runs / "generation" / "generation.json").read_text(encoding="utf-8")),
        {name: read_history(runs / name) for name in stages if (runs / name / "trainer_state.json").exists()},
        {name: {key: stamp[key] for key in ("seconds", "peak_memory_bytes")} for name, stamp in stages.items()},
        {
            "text": flags["data"],
            "vocabulary": len(tokenizer),
            "tokens per latent (K)": flags["patch_size"],
            "numbers per latent (D)": flags["latent_size"],
            **{
                f"parameters of {name}": f"{sum(p.numel() for p in model.parameters()):,}"
                for name, model in {"autoencoder": autoencoder, **models}.items()
            },
        },
    )


def main(argv: Sequence[str] | None = None) -> None:
    from trainers.arguments import parse_arguments

    (arguments,) = parse_arguments(DemoArguments, argv=argv, description=__doc__)
    if arguments.measure:
        run_measurement(arguments.measure)
    else:
        run_demo(arguments)


if __name__ == "__main__":
    from trainers.command_line import run

    run(main, StageError)
