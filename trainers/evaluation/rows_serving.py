"""Rows of `make verify TOPIC=serving`: a student in service, by the clients that people have, under load and abuse."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..verification import ROOT, Context, Measured, Row
from .benchmark import random_prompts, seed_backbone, seed_student
from .rows_generation import _demo_folder
from .serving_load import (
    Served,
    Told,
    abuses,
    bodies,
    closed_loop,
    disconnects,
    poisson,
    quantile,
    slow_loris,
    vllm_benchmark,
)
from .teachers_over_http import vllm_python


PATCH_SIZE = 4
PROMPT_TOKENS, NEW_TOKENS = 64, (32, 96)  # the load's; a mean of 64 both ways


def random_student(context: Context) -> Path:
    """A 12 x 768 student of random weights with a tokenizer of its vocabulary, saved once."""
    folder = context.shared_dir / "student_12x768"
    if not (folder / "model.safetensors").exists():
        from ..data import DataArguments, load_texts
        from ..tokenizer import train_tokenizer

        context.say("a 12 x 768 student of random weights")
        texts, _ = load_texts(DataArguments(data="builtin:python"))
        tokenizer = train_tokenizer(texts, 32_000, 20_000_000)
        tokenizer.save_pretrained(folder)
        seed_student(seed_backbone(vocab_size=len(tokenizer)), PATCH_SIZE).save_pretrained(folder)
    return folder


def demo_student(context: Context) -> Path:
    return _demo_folder(context) / "student"


def offline(folder: Path, batches: tuple[int, ...] = (8, 16, 32, 64)) -> dict[int, float]:
    """Tokens/s of `generate` on batches of prompts of one length, greedy, prefill included."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    found = {}
    for batch in batches:
        prompts = random_prompts(model.config.vocab_size, batch, PROMPT_TOKENS)
        count = sum(NEW_TOKENS) // 2
        runs = []
        for _ in range(3):
            begun = time.monotonic()
            with torch.inference_mode():
                model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    max_new_tokens=count,
                    min_new_tokens=count,
                    do_sample=False,
                    eos_token_id=model.config.vocab_size - 1,
                )
            runs.append(batch * count / (time.monotonic() - begun))
        found[batch] = sorted(runs)[1]
    return found


def prompts_of(tokenizer: Any, count: int, length: int) -> list[str]:
    """Texts of so many tokens (about), of the standard library."""
    text = Path(json.__file__).read_text(encoding="utf-8") + Path(subprocess.__file__).read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    starts = range(0, len(ids) - length, max(1, (len(ids) - length) // count))
    return [tokenizer.decode(ids[start : start + length]) for start in list(starts)[:count]]


def _errors(told: list[Told]) -> list[str]:
    return [one.error for one in told if one.error is not None]


def _load(context: Context, folder: Path, seconds: float) -> dict[str, Any]:
    """vLLM's client and ours against one server."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = prompts_of(tokenizer, 50, PROMPT_TOKENS)
    with Served(folder, context.work_dir / "server.log") as served:
        # everybody's text in a crowd of 32, and alone: a stream that got another's tokens cannot be equal
        checked = bodies(64, prompts)
        crowd = asyncio.run(closed_loop(served.port, checked, 32))
        context.say("texts of a crowd of 32 are asked for again, one by one")
        alone = asyncio.run(closed_loop(served.port, checked[::2], 1))
        mixed = sum(one.text != other.text for one, other in zip(crowd[::2], alone, strict=True))
        short = sum(one.num_tokens != body["max_tokens"] for one, body in zip(crowd, checked, strict=True))
        found: dict[str, Any] = {"errors": _errors(crowd) + _errors(alone), "mixed_up": mixed, "short": short}
        python = vllm_python()
        if python is None:
            raise FileNotFoundError("vLLM's benchmark client is missing: make setup-vllm")
        ours = sum(one.num_tokens for one in crowd) / sum(one.last for one in crowd) * 32
        context.say(f"vLLM's benchmark client, about {seconds:.0f} s")
        flags = {
            "dataset_name": "random",
            "random_input_len": PROMPT_TOKENS,
            "random_output_len": sum(NEW_TOKENS) // 2,
            "random_range_ratio": 0.5,
            "num_prompts": max(64, int(seconds * ours / (sum(NEW_TOKENS) / 2))),
            "max_concurrency": 32,
            "ignore_eos": True,
            "seed": 1,
        }
        bench = vllm_benchmark(python, served, folder, context.work_dir, **flags)
        found |= {
            "tokens_per_second": bench["output_throughput"],
            "completed": bench["completed"],
            "failed": flags["num_prompts"] - bench["completed"],
            "seconds": bench["duration"],
            "steps_saved": served.metric("steps_saved"),
            "ttft_p50_ms": bench["median_ttft_ms"],
        }
        found["exit"] = served.stop()
    return found


def load(context: Context, seconds: float = 300.0) -> Measured:
    """The 12 x 768 student, judged; the demo's, reported."""
    folder, demo = random_student(context), demo_student(context)
    context.say("offline batches")
    ceilings = offline(folder)
    big = _load(context, folder, seconds)
    # the machine's speed drifts in five minutes: before and after
    ceilings = {batch: (ceilings[batch] + after) / 2 for batch, after in offline(folder).items()}
    best, best_32 = max(ceilings.values()), max(speed for batch, speed in ceilings.items() if batch <= 32)
    ceilings_demo = offline(demo)
    small = _load(context, demo, seconds / 5)
    ratio = big["tokens_per_second"] / best
    ratio_demo = small["tokens_per_second"] / max(ceilings_demo.values())
    wrong = {name: found["failed"] + len(found["errors"]) + found["mixed_up"] + found["short"] + found["exit"]
             for name, found in (("12 x 768", big), ("demo", small))}  # fmt: skip
    figure = (
        f"12 x 768: {big['tokens_per_second']:.0f} tokens/s, {ratio:.2f}x of offline's best ({best:.0f}, batch "
        f"{max(ceilings, key=ceilings.__getitem__)}), {big['tokens_per_second'] / best_32:.2f}x of its best at up to "
        f"32 rows ({best_32:.0f}), {big['completed']} streams in {big['seconds']:.0f} s, "
        f"{wrong['12 x 768']} errors, lost or mixed up; demo: {small['tokens_per_second']:.0f} tokens/s, "
        f"{ratio_demo:.2f}x of {max(ceilings_demo.values()):.0f}, {wrong['demo']} errors"
    )
    details = {"offline": ceilings, "served": big, "offline_demo": ceilings_demo, "served_demo": small}
    return Measured(figure, ratio >= 0.85 and not any(wrong.values()), details)


def first_token(context: Context, seconds: float = 120.0) -> Measured:
    """Time to first token at half of capacity, against an idle server."""
    from transformers import AutoTokenizer

    folder = random_student(context)
    prompts = prompts_of(AutoTokenizer.from_pretrained(folder), 50, PROMPT_TOKENS)
    with Served(folder, context.work_dir / "server.log") as served:
        full = asyncio.run(closed_loop(served.port, bodies(96, prompts, NEW_TOKENS), 32))
        # requests/s of 32 clients that always wait for one
        capacity = 32 / (sum(one.last for one in full) / len(full))
        idle = asyncio.run(closed_loop(served.port, bodies(20, prompts, NEW_TOKENS), 1))
        count = max(40, int(capacity / 2 * seconds))
        context.say(f"capacity {capacity:.2f} requests/s; {count} at half of it")
        half = asyncio.run(poisson(served.port, bodies(count, prompts, NEW_TOKENS), capacity / 2))
    errors = _errors([*full, *idle, *half])
    base = [quantile([one.first for one in idle], share) for share in (0.5, 0.95)]
    busy = [quantile([one.first for one in half], share) for share in (0.5, 0.95)]
    times = [busy[0] / base[0], busy[1] / base[1]]
    figure = (
        f"p50 {times[0]:.2f}x ({1000 * busy[0]:.0f} ms, idle {1000 * base[0]:.0f}), p95 {times[1]:.2f}x "
        f"({1000 * busy[1]:.0f} ms, idle {1000 * base[1]:.0f}); {count} requests, {len(errors)} errors"
    )
    details = {"capacity": capacity, "idle": [one.first for one in idle], "half": [one.first for one in half]}
    return Measured(figure, times[0] <= 2 and times[1] <= 4 and not errors, details)


def clients_python() -> Path | None:
    """Of `make setup-clients`, where it was made."""
    python = Path(os.environ.get("CLIENTS_VENV", ROOT / ".venv-clients")) / "bin" / "python"
    return python if python.exists() else None


def clients(context: Context) -> Measured:
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/scripts/serving"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    last = done.stdout.strip().splitlines()[-1]
    passed = done.returncode == 0 and "skipped" not in last
    return Measured(last.strip("= "), passed, {"end": done.stdout[-1500:]})


SCHEMATHESIS = """# what no schema can say is refused with 400: prompt and text together too long, an unknown id
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", 400, 401, 403, 404, 409, 429]
"""


def schema(context: Context, examples: int = 400) -> Measured:
    """Generated requests, right and wrong, against the OpenAPI schema."""
    python = clients_python()
    if python is None:
        raise FileNotFoundError("schemathesis is missing: make setup-clients")
    folder = context.work_dir.resolve()
    config, template = folder / "schemathesis.toml", folder / "template.jinja"
    config.write_text(SCHEMATHESIS, encoding="utf-8")
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", encoding="utf-8")
    flags = ("--max_tokens", "96", "--chat_template", str(template))
    with Served(demo_student(context), context.work_dir / "server.log", *flags) as served:
        command = [str(python.with_name("schemathesis")), "--config-file", str(config), "run"]
        command += [f"{served.url}/openapi.json", "--checks", "all", "--max-examples", str(examples)]
        command += ["--seed", "1", "--no-color"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=context.work_dir)
        (context.work_dir / "schemathesis.log").write_text(done.stdout + done.stderr, encoding="utf-8")
        status = served.stop()
    generated = re.search(r"(\d+) generated, (.*)", done.stdout)
    cases = int(generated[1]) if generated else 0
    figure = f"{cases} cases, {generated[2] if generated else done.stdout[-300:]}"
    return Measured(figure, done.returncode == 0 and cases >= 2000 and status == 0, {"end": done.stdout[-1500:]})


def abuse(context: Context, streams: int = 500) -> Measured:
    """What a server on the open net meets; memory before and after."""
    folder = demo_student(context)
    wrong: list[str] = []
    found: dict[str, float] = {}
    with Served(folder, context.work_dir / "server.log", "--max_waiting", "600") as served:
        body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True}
        asyncio.run(closed_loop(served.port, [{**body, "seed": i} for i in range(96)], 32))
        asyncio.run(disconnects(served.port, 50))
        time.sleep(5)
        before = served.memory()
        for name, (do, right) in abuses(served.port).items():
            found[name] = do()
            if found[name] not in right:
                wrong.append(f"{name}: {found[name]}")
            context.say(f"{name}: {found[name]}")
        still, opened = slow_loris(served.port, 50, 25.0)
        found["slow loris, still open of 50"] = still
        if still:
            wrong.append(f"slow loris: {still} of {opened} still open")
        begun = asyncio.run(disconnects(served.port, streams))
        deadline = time.monotonic() + 30
        while served.metric("rows") + served.metric("waiting") and time.monotonic() < deadline:
            time.sleep(0.1)
        left = served.metric("rows") + served.metric("waiting") + served.metric("cache_bytes")
        found |= {"streams left in the middle": begun, "rows and bytes left": left}
        if begun < streams or left:
            wrong.append(f"{begun} streams begun, {left} rows, requests or bytes left")
        time.sleep(5)
        after = served.memory()
        answered = served.post("/v1/completions", {"prompt": "x", "max_tokens": 4})
        found |= {"memory before": before, "memory after": after}
        if abs(after / before - 1) > 0.05:
            wrong.append(f"memory from {before / 2**20:.0f} to {after / 2**20:.0f} MiB")
        if answered["usage"]["completion_tokens"] != 4:
            wrong.append("no answer afterwards")
        restarted = _killed_under_load(served)
        found["seconds from kill to answer"] = restarted
    figure = (
        f"{len(found)} abuses, {len(wrong)} wrong{': ' + '; '.join(wrong) if wrong else ''}; {begun} streams left in "
        f"the middle; memory {before / 2**20:.0f} -> {after / 2**20:.0f} MiB ({100 * (after / before - 1):+.1f} %); "
        f"answers {restarted:.1f} s after kill -9"
    )
    return Measured(figure, not wrong, found)


def _killed_under_load(served: Served) -> float:
    """kill -9 with 32 streams, and the same port again; seconds until it answers."""

    async def run() -> list[Told]:
        requests = [{"prompt": "x", "max_tokens": 1000, "ignore_eos": True, "seed": i} for i in range(32)]
        load = asyncio.create_task(closed_loop(served.port, requests, 32))
        await asyncio.sleep(1.0)
        served.kill()
        return await load

    told = asyncio.run(run())
    if not all(one.error for one in told):
        raise RuntimeError("streams of a killed server ended as if they were whole")
    begun = time.monotonic()
    served.start()
    served.post("/v1/completions", {"prompt": "x", "max_tokens": 4})
    return time.monotonic() - begun


def soak(context: Context, seconds: float = 3600.0) -> Measured:
    """An hour at half load: memory and latency of the first and the last tenth."""
    from transformers import AutoTokenizer

    folder = demo_student(context)
    prompts = prompts_of(AutoTokenizer.from_pretrained(folder), 50, PROMPT_TOKENS)
    samples: list[tuple[float, int, float]] = []
    errors = 0
    with Served(folder, context.work_dir / "server.log") as served:
        full = asyncio.run(closed_loop(served.port, bodies(320, prompts, NEW_TOKENS), 32))
        capacity = 32 / (sum(one.last for one in full) / len(full))
        begun, part = time.monotonic(), 0
        while time.monotonic() - begun < seconds:
            piece = bodies(max(20, int(30 * capacity / 2)), prompts, NEW_TOKENS, seed=part)
            told = asyncio.run(poisson(served.port, piece, capacity / 2, seed=part))
            errors += len(_errors(told))
            samples.append((time.monotonic() - begun, served.memory(), quantile([one.last for one in told], 0.5)))
            part += 1
            context.say(f"{samples[-1][0]:.0f} s: {samples[-1][1] / 2**20:.0f} MiB, p50 {samples[-1][2]:.3f} s")
    tenth = max(1, len(samples) // 10)
    memory = [sum(s[1] for s in part) / tenth for part in (samples[tenth : 2 * tenth], samples[-tenth:])]
    latency = [sum(s[2] for s in part) / tenth for part in (samples[tenth : 2 * tenth], samples[-tenth:])]
    figure = (
        f"{samples[-1][0]:.0f} s at {capacity / 2:.1f} requests/s: memory {memory[0] / 2**20:.0f} -> "
        f"{memory[1] / 2**20:.0f} MiB, p50 of whole requests {latency[0]:.3f} -> {latency[1]:.3f} s, {errors} errors"
    )
    passed = memory[1] <= 1.05 * memory[0] and latency[1] <= 1.15 * latency[0] and not errors
    return Measured(figure, passed, {"samples": samples})


def start(context: Context, repeats: int = 3) -> Measured:
    """From the start of the process to the first text."""
    times = []
    for _ in range(repeats):
        begun = time.monotonic()
        with Served(demo_student(context), context.work_dir / "server.log") as served:
            served.post("/generate", {"prompt": "def main(", "max_new_tokens": 8})
            times.append(time.monotonic() - begun)
    times.sort()
    return Measured(f"{times[len(times) // 2]:.1f} s ({times[0]:.1f} to {times[-1]:.1f})", times[len(times) // 2] <= 8)


ROWS = [
    Row(
        "load",
        "32 concurrent streaming clients of mixed lengths, by vLLM's own benchmark client, 5 minutes",
        "0 errors, 0 lost or mixed-up streams; tokens/s >= 0.85x of offline batches (12 x 768); demo size reported",
        load,
        setup="K=4, V=32,000 (demo: K=8), random weights, prompts of 32 to 96 tokens and as many new ones, fp32; "
        "offline: generate at batch 8 to 64, 64 tokens after 64, best batch, mean of before and after; "
        "crowd of 32 compared with alone",
    ),
    Row(
        "first_token",
        "time to first token, 64-token prompts, Poisson arrivals at half of capacity, against an idle server",
        "p50 <= 2x, p95 <= 4x",
        first_token,
        setup="12 x 768, K=4, V=32,000, 32 to 96 new tokens, 2 minutes",
    ),
    Row(
        "clients",
        "openai (sync, async, stream), huggingface_hub.InferenceClient, curl, litellm, each a test",
        "all pass, none skipped",
        clients,
        setup="random weights of test size, real sockets; litellm from the environment of make setup-clients",
    ),
    Row(
        "schema",
        "schemathesis on the OpenAPI schema, all checks",
        ">= 2,000 cases, 0 server errors, 0 schema violations",
        schema,
        setup="demo's student, 96 tokens at most, a chat template; 400 counts as a right answer where only the model "
        "can know",
    ),
    Row(
        "abuse",
        "100 MB bodies, slow loris, 10,000 stop strings, invalid UTF-8, NaN, negative tokens, 500 disconnects, "
        "kill -9 and restart under load",
        "service stays, memory within 5 % of its start, right status codes",
        abuse,
        setup="demo's student; memory after 96 texts and 50 disconnects, and after everything",
    ),
    Row(
        "soak",
        "1 hour at half load",
        "flat memory, no growth in latency",
        soak,
        long=True,
        setup="demo's student; second tenth of the time against the last: memory within 5 %, p50 within 15 %",
    ),
    Row(
        "start", "start to first answer, demo model", "<= 8 s", start, setup="K=8, first text of 8 tokens, median of 3"
    ),
]
