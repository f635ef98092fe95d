"""Rows of `make verify TOPIC=evaluation`: whether the scores mean what they say, and what an evaluation takes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, TrainerCallback
from transformers.trainer_utils import set_seed

from ..data import DataArguments, PatchCollator, load_blocks, load_texts
from ..token_lm import TokenLMConfig, TokenLMTrainer, build_token_lm
from ..tokenizer import train_tokenizer
from ..verification import ROOT, Context, Measured, Row
from .brier import brier_lm, summarize_brier
from .calm_comparison import CALM, CALM_CDIST, OURS, Comparison, compare
from .enumerable import chain_brier, chain_token_lm, draw_chain, known_models
from .frontier import books_frontier, python_frontier, report
from .likelihood import exact_likelihood
from .patch_draws import brier_sums
from .rows_main import run_or_tell
from .side_by_side import RECORDS


def brier_closed_form(context: Context, num_rows: int = 512, length: int = 256) -> Measured:
    """Chains of order 1 as token models, through the code that scores every model."""
    found: dict[str, Any] = {}
    for name, (text, chain) in known_models().items():
        rows = draw_chain(text, num_rows, length)
        sums = brier_sums(chain_token_lm(chain), rows, patch_size=4, positions=32_000)
        truth = chain_brier(text, chain, 4)
        entry = found[name] = {"brier": truth.tolist(), "brier_lm": float(brier_lm(truth))}
        for form in ("sampled", "smooth"):
            summary = entry[form] = summarize_brier(sums[form], sums["counts"])
            pairs = [*zip(summary["brier"], truth.tolist(), summary["brier_error"], strict=True)]
            pairs.append((summary["brier_lm"], entry["brier_lm"], summary["brier_lm_error"]))
            # where nothing varies there is rounding
            summary["errors_off"] = max(abs(a - b) / max(error, 1e-5) for a, b, error in pairs)
        context.say(f"{name}: BrierLM {entry['sampled']['brier_lm']:.2f}, on paper {entry['brier_lm']:.2f}")
    worst = {form: max(entry[form]["errors_off"] for entry in found.values()) for form in ("sampled", "smooth")}
    wrong = found["deterministic, wrong"]["sampled"]["brier_lm"]
    figure = (
        f"at most {worst['sampled']:.2f} standard errors off (low-variance {worst['smooth']:.2f}); "
        f"deterministic and wrong {wrong:g}"
    )
    return Measured(figure, max(worst.values()) <= 3 and wrong == 0, found)


# -- BrierLM against likelihood


CHECKPOINTS = tuple(round(60 * (1000 / 60) ** (i / 15)) for i in range(16))


class _SaveAt(TrainerCallback):
    def __init__(self, folder: Path, steps: Sequence[int]):
        self.folder, self.steps = folder, set(steps)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.steps:
            part = self.folder / f"step-{state.global_step}.part"
            model.save_pretrained(part)
            part.rename(self.folder / f"step-{state.global_step}")


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Correlation of ranks; without ties."""
    ranks = torch.stack([torch.tensor(values).argsort().argsort().double() for values in (first, second)])
    return float(torch.corrcoef(ranks)[0, 1])


def brier_spearman(context: Context, max_train_tokens: int = 2**22, max_eval_tokens: int = 2**19) -> Measured:
    """One training of a token LM; its checkpoints are scored by sampling and by likelihood on the same rows."""
    set_seed(0)
    texts, _ = load_texts(DataArguments())
    if not (context.work_dir / "tokenizer").exists():
        train_tokenizer(texts, 1024, max_characters=2**22).save_pretrained(context.work_dir / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(context.work_dir / "tokenizer")
    data = DataArguments(block_size=256, max_train_tokens=max_train_tokens, max_eval_tokens=max_eval_tokens)
    train, held_out = load_blocks(data, tokenizer, 1, seed=0)
    folders = {step: context.work_dir / f"step-{step}" for step in CHECKPOINTS}
    if not all(folder.exists() for folder in folders.values()):
        for folder in context.work_dir.glob("step-*"):
            shutil.rmtree(folder)
        context.say(f"training {CHECKPOINTS[-1]} steps")
        arguments = TokenLMConfig(
            output_dir=str(context.work_dir / "trainer"),
            per_device_train_batch_size=16,
            max_steps=CHECKPOINTS[-1],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=100,
        )
        model = build_token_lm("granite", tokenizer, hidden_size=128, num_hidden_layers=2)
        TokenLMTrainer(
            model,
            args=arguments,
            train_dataset=train,
            data_collator=PatchCollator(1),
            callbacks=[_SaveAt(context.work_dir, CHECKPOINTS)],
        ).train()
    rows = torch.from_numpy(held_out["input_ids"][:]).long()
    rows = rows[torch.from_numpy(held_out["attention_mask"][:]).bool().all(1)]
    points = []
    for step, folder in folders.items():
        kept = folder / "scores.json"
        if not kept.exists():
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
            sums = brier_sums(model, rows, patch_size=4, positions=100_000)
            scores: dict[str, Any] = {
                form: summarize_brier(sums[form], sums["counts"]) for form in ("sampled", "smooth")
            }
            scored = held_out.select(range(len(sums["counts"])))
            scores["nll"] = exact_likelihood(model, scored, batch_size=8)["nats_per_token"]
            kept.write_text(json.dumps(scores))
        points.append({"step": step, **json.loads(kept.read_text())})
        last = points[-1]
        context.say(f"step {step}: {last['nll']:.3f} nats/token, BrierLM {last['sampled']['brier_lm']:.2f}")
    used = [point for point in points if point["nll"] < 5]
    correlations = {
        form: spearman([p["nll"] for p in used], [p[form]["brier_lm"] for p in used]) for form in ("sampled", "smooth")
    }
    figure = (
        f"{correlations['sampled']:.3f} over {len(used)} checkpoints of {used[0]['nll']:.2f} to {used[-1]['nll']:.2f} "
        f"nats/token, {used[0]['sampled']['positions']:,} positions; low-variance {correlations['smooth']:.3f}"
    )
    return Measured(figure, len(used) >= 12 and correlations["sampled"] <= -0.95, {"points": points})


# -- what an evaluation takes


def _demo(context: Context) -> Path:
    folder = ROOT / "runs" / "demo"
    if not (folder / "student" / "config.json").exists():
        folder = context.shared_dir.parent / "main" / "demo" / "clone" / "runs" / "demo"
    if not (folder / "student" / "config.json").exists():
        raise FileNotFoundError("no trained demo: `make demo` first")
    return folder


def _evaluate(context: Context, flags: Sequence[str], minutes: float) -> Measured:
    """Both students of the demo and their teacher; broken off in the middle, and begun again."""
    demo = _demo(context)
    out = context.work_dir / "evaluation"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "scripts/evaluate_model.py", str(demo / "student"), "--teacher", str(demo / "teacher")]
    command += ["--baseline", str(demo / "student_parallel"), "--output_dir", str(out), "--device", "cpu", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    logs, parts_before = [], 0
    for run in (1, 2):
        log = context.work_dir / f"run-{run}.log"
        with open(log, "w") as stream:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
            while process.poll() is None:
                time.sleep(0.5)
                parts_before = len(list((out / "parts").glob("*.json"))) if run == 1 else parts_before
                if run == 1 and parts_before >= 6:
                    process.send_signal(signal.SIGINT)
                    process.wait()
        logs.append(log.read_text())
    seconds = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"the evaluation ended with status {process.returncode}: {logs[-1][-2000:]}")
    kept = logs[1].count("kept from an earlier run")
    shown = "[1/" in logs[0] and "%|" in logs[0]  # parts, and a bar in each
    written = [out / f"evaluation.{suffix}" for suffix in ("json", "md", "html")]
    report = json.loads(written[0].read_text())
    figure = (
        f"{seconds / 60:.1f} minutes with a break after {parts_before} parts, of which the second run repeated "
        f"{parts_before - kept}; progress {'shown' if shown else 'not shown'}"
    )
    brier = {name: entry["sampled"] for name, entry in report["brier"].items()}
    passed = seconds <= 60 * minutes and shown and kept >= parts_before >= 6
    return Measured(
        figure, passed and all(path.stat().st_size for path in written), {"seconds": seconds, "brier": brier}
    )


def evaluate_quick(context: Context) -> Measured:
    return _evaluate(context, ["--quick"], 5)


def evaluate_full(context: Context) -> Measured:
    return _evaluate(context, [], 40)


# -- what a training takes


MEMORY_SIZES: dict[str, dict[str, Any]] = {
    "4 x 256": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 768,
        "per_device_train_batch_size": 8,
    },
    "6 x 512, taught by 4 x 256": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "intermediate_size": 1536,
        "per_device_train_batch_size": 8,
    },
    "12 x 768": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 2048,
        "per_device_train_batch_size": 4,
    },
}


def estimate_memory_row(context: Context) -> Measured:
    """The script's own table, and three steps of the real training beside it."""
    teacher = LlamaConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=768, vocab_size=8192
    )
    teacher.save_pretrained(context.work_dir / "teacher")
    found: dict[str, Any] = {}
    for name, sizes in MEMORY_SIZES.items():
        flags = {**sizes, "autoencoder": "scripts/configs/seed.yaml:autoencoder", "block_size": 512, "device": "cpu"}
        if "taught" in name:
            flags["teacher"] = context.work_dir / "teacher"
        words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
        started = time.perf_counter()
        out = run_or_tell(
            [sys.executable, "scripts/estimate_memory.py", *words, "--measure"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        match = re.search(r"^measured ([\d,]+) MB, predicted ([\d,]+) MB", out, re.MULTILINE)
        assert match is not None, out[-1000:]
        measured, predicted = (int(number.replace(",", "")) for number in match.groups())
        found[name] = {
            "measured_mb": measured,
            "predicted_mb": predicted,
            "error": predicted / measured - 1,
            "seconds": time.perf_counter() - started,
        }
        context.say(f"{name}: measured {measured:,} MB, predicted {predicted:,}")
    figure = "; ".join(
        f"{name}: {entry['predicted_mb']:,} MB predicted, {entry['measured_mb']:,} measured ({entry['error']:+.1%})"
        for name, entry in found.items()
    )
    return Measured(figure, all(abs(entry["error"]) <= 0.15 for entry in found.values()), found)


# -- quality against speed


def frontier(context: Context) -> Measured:
    """Trains what docs/runs does not know; speeds are measured each time."""
    options = {"say": context.say, "records_dir": RECORDS, "fresh": context.fresh}
    corpora = [make(context.shared_dir / "frontier", **options) for make in (python_frontier, books_frontier)]
    return judge_frontier(report(corpora, context.work_dir, speed_again=True))


def judge_frontier(found: dict[str, Any]) -> Measured:
    """Students without a teacher decide: a token LM could have had one too."""
    figures, passed = [], True
    for title, entry in found.items():
        best, taught = entry["best"], entry["best_taught"]
        if best is None:
            figures.append(f"{title}: no student between two token LMs")
            passed = False
            continue
        words = f"{title}: {best['advantage']:+.3f} nats ({best['label']}, {best['tokens_per_second']:.0f} tokens/s)"
        if taught is not None:
            words += f", taught {taught['advantage']:+.3f}"
        figures.append(words)
        passed &= best["advantage"] >= 0.05
    return Measured("; ".join(figures) + " ahead of the token LM of equal speed", passed, found)


# -- against CALM


def calm_comparison(context: Context) -> Measured:
    """Same codec, backbone, text, batches, steps and optimizer; what differs is the step from states to a loss."""
    fields = {"work_dir": context.work_dir, "data": "builtin:python", "eval_data": None, "vocab_size": 1024}
    comparison = Comparison({**fields, "num_tokens": 250 * 8192, "phase_size": 1})
    return judge_calm(compare(comparison, context.say))


def judge_calm(found: dict[str, Any]) -> Measured:
    speed = {name: entry["tokens_per_second"] for name, entry in found["speed"].items()}
    memory = found["memory"]
    scores = ", ".join(f"{entry['ours']:.2f}/{entry['calm']:.2f}" for entry in found["brier"])
    ratios = [
        f"{speed[OURS] / speed[name]:.2f}x tokens/s, {memory[OURS] / memory[name]:.2f} of the memory {words}"
        for name, words in ((CALM, "as released"), (CALM_CDIST, "with its distances by cdist"))
    ]
    sizes = ", ".join(f"{speed[name]:.0f} tokens/s and {memory[name] / 1e9:.2f} GB" for name in memory)
    figure = f"Brier-1..4 {scores} % (ours/CALM, {found['places']:,} places); {'; '.join(ratios)} ({sizes})"
    as_good = all(entry["high"] >= 0 for entry in found["brier"])
    passed = as_good and speed[OURS] >= 1.3 * speed[CALM] and 3 * memory[OURS] <= memory[CALM]
    return Measured(figure, passed, found)


ROWS = [
    Row(
        "brier_closed_form",
        "BrierLM against closed form on enumerable models",
        "within 3 standard errors; deterministic and wrong scores 0",
        brier_closed_form,
        setup="uniform, deterministic and order-1 chains over 4 tokens, K=4, 32,000 positions, seed 0",
    ),
    Row(
        "brier_spearman",
        "BrierLM by sampling against NLL, checkpoints of one token LM with NLL < 5",
        ">= 12 checkpoints, Spearman <= -0.95",
        brier_spearman,
        setup="2 x 128, vocabulary 1024, Python's standard library, 4 M tokens, K=4, 100,000 positions, one seed",
    ),
    Row(
        "evaluate_quick",
        "scripts/evaluate_model.py --quick of the demo's students and teacher",
        "<= 5 minutes on 2 cores, progress shown, resumable",
        evaluate_quick,
        setup="K=8, 20,000 positions; broken off after 6 parts and begun again",
    ),
    Row(
        "evaluate_full",
        "the same without --quick",
        "<= 40 minutes on 2 cores, progress shown, resumable",
        evaluate_full,
        long=True,
        setup="K=8, 100,000 positions, 512 texts at 5 temperatures",
    ),
    Row(
        "frontier",
        "Python code and books, equal training tokens: best student against the token LM of equal decode tokens/s",
        "the student's held-out NLL is lower by >= 0.05 nats, on both",
        frontier,
        long=True,
        setup="4 token LMs and 9 students (Python, V=1024, 2 M tokens) or 7 (books, V=4096, 5 M tokens); best "
        "student without a teacher, chosen on other held-out text; NLL of the token LM on a line between two "
        "measured ones; seed 0; speeds greedy, batch 1, one thread, median of 15",
    ),
    Row(
        "calm_comparison",
        "energy x parallel at K=4 trained by us and by CALM's published algorithm, same data, steps, size",
        "Brier-1..4 within noise or better, training tokens/s >= 1.3x, peak memory <= 1/3",
        calm_comparison,
        setup="backbone 4 x 256, frozen codec of D=128, Python's standard library, V=1024, 250 steps of 8192 tokens "
        "in one batch, fp32, one thread, the better of rates 1e-3 and 4e-3 on other held-out rows, seed 0; CALM with "
        "N=8 and M=100, all differences held at once as released; memory grown from before the model",
    ),
    Row(
        "estimate_memory",
        "peak memory of training three sizes, predicted by scripts/estimate_memory.py, against VmHWM",
        "within 15 % each",
        estimate_memory_row,
        setup="K=8, blocks of 512, batch 8, 8 and 4, V=4096, 8192 and 32,000, codec of the seed, 3 steps, fp32, CPU",
    ),
]
