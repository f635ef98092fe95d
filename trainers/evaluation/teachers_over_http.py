"""Measurements of teachers behind HTTP, all over 127.0.0.1, and of vLLM where it is installed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from ..verification import ROOT, Context, Measured, Row
from .loopback_servers import CapacityServer, FakeVLLM, rate_and_refusals
from .store_measures import tiny_token_lm
from .verify_store import PATCH_SIZE, student_of_256
from .vllm_parity import parity, save_tiny


# -- pace


def aimd(context: Context, warm_up: float = 10, seconds: float = 60) -> Measured:
    """A minute against a server that refuses the seventh request."""
    from ..teachers.http_server import HTTPServer

    capacity, cost = 6, 0.1
    found = {}
    for name, retry_after in (("with Retry-After", 0.2), ("without", None)):
        with CapacityServer(capacity, cost, retry_after) as server:
            client = HTTPServer(server.url)
            ask = lambda items, client=client: client.flow.map(lambda _: client.send("POST", "/x", {}), items)  # noqa: E731
            rate, refused = rate_and_refusals(server, ask, warm_up, seconds)
            found[name] = {
                "requests_per_second": rate,
                "share_of_ideal": rate * cost / capacity,
                "refused": refused,
                "limit": client.flow.limiter.limit,
            }
            client.close()
        context.say(f"{name}: {found[name]}")
    figure = "; ".join(f"{name}: {f['share_of_ideal']:.0%}, {f['refused']:.1%} refused" for name, f in found.items())
    passed = all(f["share_of_ideal"] >= 0.7 and f["refused"] <= 0.1 for f in found.values())
    return Measured(figure, passed, {**found, "load": os.getloadavg()})


# -- faults

# what must come of one fault: the right answer after a retry, or an error that says what is wrong
FAULTS: dict[Any, str] = {
    (429, ()): "right",
    (429, (("retry-after", "0.3"),)): "right",
    (500, ()): "right",
    "hang": "right",
    "cut": "right",
    "truncate": "right",
    "html": "right",
    "absent": "right",
    "wrong_model": "asked 'teacher', and 'another' answered",
    "missing": "holds no prompt_logprobs",
    "null": "has no log-probabilities",
    "short": "log-probabilities, asked for the",
    "nan": "are NaN",
}


def faults(context: Context) -> Measured:
    """Every fault once, in the second of four rows, on both ways into the server."""
    from ..teachers import FlowConfig, VLLMServerTeacher

    model, tokenizer = tiny(context)
    ids = torch.tensor(tokenizer(Path(__file__).read_text())["input_ids"][:256]).view(4, 64)
    with torch.no_grad():
        values = model(ids).logits.log_softmax(-1).topk(20).values[:, :-1]
    wrong: list[str] = []
    outcomes: dict[str, str] = {}
    for scale_out in (True, False):
        for fault, expected in FAULTS.items():
            name = f"{fault} on {'generate' if scale_out else 'completions'}"
            with FakeVLLM(model, tokenizer, scale_out=scale_out) as server:
                config = FlowConfig(start=1, most=1, deadline=2.0, patience=20.0)
                teacher = VLLMServerTeacher(server.url, tokenizer, config=config)
                first = server.scored
                spoil = (fault[0], dict(fault[1])) if isinstance(fault, tuple) else fault
                server.fault = lambda number, first=first, spoil=spoil: spoil if number == first + 1 else None  # type: ignore[misc]
                try:
                    signal = teacher.signal(ids).top_logprobs[:, :-1]
                    different = (signal - values).abs() > 1e-4
                    # an absent entry is absent, all others are right
                    outcome = "right" if int(different.sum()) == (fault == "absent") else "WRONG VALUES"
                except ValueError as error:
                    outcome = str(error)
                finally:
                    teacher.close()
            outcomes[name] = outcome
            if expected not in outcome:
                wrong.append(name)
    figure = f"{len(outcomes) - len(wrong)} of {len(outcomes)} faults end as they must"
    return Measured(figure + (f"; not: {', '.join(wrong)}" if wrong else ""), not wrong, outcomes)


# -- prefetching

SLEEPER = """
import sys, time
from transformers import AutoTokenizer
from trainers.evaluation.loopback_servers import FakeVLLM
server = FakeVLLM(None, AutoTokenizer.from_pretrained(sys.argv[1]), latency=float(sys.argv[2]))
print(server.url, flush=True)
sys.stdin.read()
"""


@contextmanager
def sleeping_server(folder: Path, latency: float) -> Iterator[str]:
    """In a process of its own: its work must not look like waiting for Python's lock."""
    command = [sys.executable, "-c", SLEEPER, str(folder), str(latency)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise RuntimeError("the sleeping server did not start")
        yield url
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


@dataclass(frozen=True)
class PrefetchSizes:
    """Of [`latency_prefetch`]: rows of a batch, tokens of a row, steps that count and those before."""

    rows: int = 12
    block: int = 512
    steps: int = 16
    warm: int = 8


def latency_prefetch(context: Context, sizes: PrefetchSizes = PrefetchSizes()) -> Measured:
    """The teacher alone as long as the training alone, which is when waiting hurts most; and three times as long."""
    from ..teachers import SparseSignal, TeacherCapabilities

    folder = tiny_token_lm(context.shared_dir / "tiny_teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    class Instant:
        vocab_size = num_tokens = len(tokenizer)
        capabilities = TeacherCapabilities(form="sparse", any_temperature=False)

        def signal(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SparseSignal:
            ids = torch.arange(20, dtype=torch.int32).expand(*input_ids.shape, 20)
            return SparseSignal(ids, -3.0 - 0.1 * ids.float(), vocab_size=len(tokenizer))

        def check(self) -> None: ...

        def close(self) -> None: ...

    alone = train(context, Instant(), tokenizer, sizes)
    found: dict[str, Any] = {"training alone, s": alone}
    for name, share in (("teacher as slow as training", 1.0), ("three times as slow", 3.0)):
        # five batches are under way at once, so that one may take five steps
        latency = share * 5 * alone / sizes.steps
        with sleeping_server(folder, latency) as url:
            teacher_alone = ask_alone(url, tokenizer, sizes)
            both = train(context, remote(url, tokenizer, sizes), tokenizer, sizes)
        ratio = both / max(alone, teacher_alone)
        found[name] = {"latency": latency, "teacher alone, s": teacher_alone, "both, s": both, "ratio": ratio}
        context.say(f"{name}: {found[name]}")
    ratios = {name: entry["ratio"] for name, entry in found.items() if isinstance(entry, dict)}
    figure = "; ".join(f"{name}: {ratio:.2f}x" for name, ratio in ratios.items())
    return Measured(figure, max(ratios.values()) <= 1.1, {**found, "load": os.getloadavg()})


def remote(url: str, tokenizer: Any, sizes: PrefetchSizes) -> Any:
    from ..teachers import FlowConfig, VLLMServerTeacher

    # the server only sleeps: all rows of five batches may run at once
    rows = 5 * sizes.rows
    return VLLMServerTeacher(url, tokenizer, config=FlowConfig(start=rows, most=rows))


def blocks(tokenizer: Any, count: int, length: int) -> list[dict[str, list[int]]]:
    text = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py")))
    ids = tokenizer(text)["input_ids"]
    while len(ids) < count * length:
        ids = ids + ids
    pieces = [ids[length * n : length * (n + 1)] for n in range(count)]
    return [{"input_ids": piece, "attention_mask": [1] * length, "labels": piece} for piece in pieces]


def ask_alone(url: str, tokenizer: Any, sizes: PrefetchSizes) -> float:
    """Seconds for all batches without any training, asked ahead as the trainer asks."""
    from concurrent.futures import ThreadPoolExecutor

    teacher = remote(url, tokenizer, sizes)
    rows = torch.tensor([row["input_ids"] for row in blocks(tokenizer, sizes.steps * sizes.rows, sizes.block)])
    start = time.perf_counter()
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(teacher.signal, rows.split(sizes.rows)))
    seconds = time.perf_counter() - start
    teacher.close()
    return seconds


def train(context: Context, teacher: Any, tokenizer: Any, sizes: PrefetchSizes) -> float:
    """Seconds of `sizes.steps` steps, without start-up."""
    from transformers import TrainerCallback

    from ..data import PatchCollator
    from ..kd_config import KDConfig
    from ..kd_trainer import KDTrainer

    class Clock(TrainerCallback):
        start = end = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == sizes.warm:  # threads, caches and the queue of questions are warm
                self.start = time.perf_counter()
            self.end = time.perf_counter()

    torch.manual_seed(0)
    clock = Clock()
    trainer = KDTrainer(
        model=student_of_256(len(tokenizer)),
        args=KDConfig(
            str(context.work_dir / "run"),
            max_steps=sizes.steps + sizes.warm,
            per_device_train_batch_size=sizes.rows,
            learning_rate=1e-4,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        ),
        teacher=teacher,
        train_dataset=blocks(tokenizer, (sizes.steps + sizes.warm) * sizes.rows, sizes.block),
        data_collator=PatchCollator(PATCH_SIZE),
        callbacks=[clock],
    )
    trainer.train()
    return clock.end - clock.start


# -- the same weights everywhere


def tiny(context: Context) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = context.work_dir / "tiny"
    if not (folder / "config.json").exists():
        save_tiny(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def vllm_python() -> Path | None:
    """Python of `make setup-vllm`'s environment; VLLM_VENV names another folder."""
    python = Path(os.environ.get("VLLM_VENV", ROOT / ".venv-vllm")) / "bin" / "python"
    return python if python.exists() else None


def vllm_environment() -> dict[str, str]:
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return {**os.environ, **quiet, "PYTHONPATH": str(ROOT)}


@contextmanager
def vllm_server(python: Path, folder: Path, log: Path, max_model_len: int = 256, *flags: str) -> Iterator[str]:
    """The real server on a free port, started as `make serve-teacher` does; `flags` are more of vLLM's."""
    import socket
    import urllib.request

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(python), "scripts/serve_teacher.py", "--teacher", str(folder), "--port", str(port), "--"]
    command += ["--served-model-name", "teacher", "--dtype", "float32", "--max-model-len", str(max_model_len)]
    command += ["--max-num-seqs", "16", "--enforce-eager", *flags]
    with open(log, "w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=vllm_environment(), stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 600
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"vLLM did not start: see {log}")
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):  # nosec B310 # http to our own server
                    break
            except OSError:
                time.sleep(2)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def run_parity(python: Path, folder: Path, log: Path, dtype: str = "float32") -> dict[str, Any]:
    """[`vllm_parity`] of vLLM in a process of its own environment."""
    return run_with_vllm(python, log, "trainers.evaluation.vllm_parity", str(folder), "--dtype", dtype)


def run_with_vllm(python: Path, log: Path, module: str, *arguments: str) -> dict[str, Any]:
    """The last line that a module prints there, read as JSON."""
    command = [str(python), "-m", module, *arguments]
    with open(log, "w") as out:
        done = subprocess.run(
            command, cwd=ROOT, env=vllm_environment(), stdout=subprocess.PIPE, stderr=out, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:3])} ended with status {done.returncode}: see {log}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def scoring_backends(context: Context) -> Measured:
    """Every teacher that scores, on one random model in fp32."""
    from ..teachers import VLLMServerTeacher

    model, tokenizer = tiny(context)
    folder = context.work_dir / "tiny"
    found: dict[str, Any] = {}
    for name, scale_out in (("client, generate (double)", True), ("client, completions (double)", False)):
        with FakeVLLM(model, tokenizer, scale_out=scale_out) as server:
            teacher = VLLMServerTeacher(server.url, tokenizer)
            found[name] = parity(teacher, folder)
            teacher.close()
    python = vllm_python()
    if python is not None:
        found["vLLM in process"] = run_parity(python, folder, context.work_dir / "local.log")
        in_bf16 = run_parity(python, folder, context.work_dir / "local_bf16.log", "bfloat16")
        with vllm_server(python, folder, context.work_dir / "server.log") as url:
            teacher = VLLMServerTeacher(url, tokenizer)
            found[f"vLLM server, {teacher.path}"] = parity(teacher, folder)
            teacher.path = "/v1/completions"
            found["vLLM server, /v1/completions"] = parity(teacher, folder)
            teacher.close()
    figure = "; ".join(f"{name} {entry['max_error']:.1e}" for name, entry in found.items())
    if python is not None:
        figure += f"; both in bf16 {in_bf16['max_error']:.1e}, {in_bf16['tokens_with_other_ids']} of "
        figure += f"{in_bf16['tokens']} tokens with other ids (no target)"
    else:
        figure += "; vLLM is not installed (make setup-vllm), so no real process was asked"
    passed = python is not None and all(entry["max_error"] <= 1e-4 for entry in found.values())
    return Measured(figure, passed, found)


def labelling(context: Context) -> Measured:
    """Tokens/s into a store, against what the same vLLM does for nobody."""
    python = vllm_python()
    if python is None:
        raise RuntimeError("vLLM is not installed: make setup-vllm")
    folder, module = context.work_dir / "small", "trainers.evaluation.vllm_labelling"
    if not (folder / "config.json").exists():
        save_tiny(folder, hidden_size=256, num_layers=4, positions=1024)
    store = str(context.work_dir / "labelled.sqlite")
    found = {"in process": run_with_vllm(python, context.work_dir / "local.log", module, str(folder), store)}
    with vllm_server(python, folder, context.work_dir / "server.log", max_model_len=1024) as url:
        log = context.work_dir / "client.log"
        found["over HTTP"] = run_with_vllm(python, log, module, str(folder), store, "--url", url)
    figure = "; ".join(
        f"{name} ({one['path']}) {one['share']:.2f}x ({min(one['shares']):.2f} to {max(one['shares']):.2f}): "
        f"{one['tokens_per_second']['labelled']:.0f} tokens/s of {max(one['tokens_per_second'].values()):.0f}"
        for name, one in found.items()
    )
    return Measured(figure, all(one["share"] >= 0.9 for one in found.values()), found)


HTTP_ROWS = [
    Row(
        "aimd",
        "rate and refusals against a server of capacity 6",
        ">= 70 % of its ideal rate, <= 10 % of requests refused",
        aimd,
        setup="0.1 s a request, 60 s after 10 s of warm-up, refusals with Retry-After 0.2 s and without",
    ),
    Row(
        "faults",
        "a server's faults: refusals, 500, hang, cut, broken JSON, wrong model, missing or short values, NaN, -9999",
        "the right values after a retry, or an error that names the fault; nothing wrong comes through",
        faults,
        setup="each once, in the second of four rows of 64 tokens, on both ways into the server",
    ),
    Row(
        "latency_prefetch",
        "training with a teacher that costs only latency, against the slower of both alone",
        "<= 1.1x",
        latency_prefetch,
        setup="4 x 256 student, V=4096, 12 rows of 512 tokens, 16 steps after 8, five batches asked about at once",
    ),
    Row(
        "scoring_backends",
        "log-probabilities of every scoring backend against transformers' forward, same fp32 weights",
        "largest error <= 1e-4",
        scoring_backends,
        setup="random Qwen3 2 x 64, V=258, 4 rows of 96 bytes, top 20",
    ),
    Row(
        "labelling",
        "labelling into a SQLite store with the real vLLM, tokens/s against its own scoring of the same rows",
        ">= 0.9x of vLLM alone in process; >= 0.9x of the endpoint's ceiling over HTTP",
        labelling,
        setup="random Qwen3 4 x 256, V=258, fp32; 256 rows of 512 tokens, top 20; ceiling: answers thrown away "
        "unread, best of 4, 8, 16 at once; medians of 6 in turns; server, client and store share two cores",
    ),
]
