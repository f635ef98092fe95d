"""Rows of `make verify TOPIC=scale`: how fast training goes, and a codec that sees a block once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_from_disk

from ..data import DataArguments, PatchCollator, load_blocks, load_texts
from ..kd_config import KDConfig
from ..kd_trainer import KDTrainer
from ..tokenizer import train_tokenizer
from ..verification import ROOT, Context, Measured, Row
from .throughput import Cell, build_student, codec_timed


PATCH, VOCAB, BLOCK, BLOCKS = 4, 4096, 1024, 256
LEAST_SHARE, MOST_WAITING = 0.45, 0.02
# layers, width, rows of a step, timed steps: together three minutes on two cores
CODECS = ((2, 256, 8, 4), (2, 512, 4, 4), (4, 768, 4, 3))
STUDENTS = ((4, 256, 8, 4), (8, 512, 4, 3), (12, 768, 4, 3))
TOLERANCE = 1e-6


def prepare_blocks(folder: Path) -> str:
    """Blocks of Python's standard library, tokenised by entries of its own; made once."""
    blocks = folder / "blocks"
    if not blocks.exists():
        arguments = DataArguments(
            block_size=BLOCK,
            max_train_tokens=BLOCKS * BLOCK,
            max_eval_tokens=BLOCK,
            cache_dir=str(folder / "cache"),
        )
        tokenizer = train_tokenizer(load_texts(arguments)[0], VOCAB, max_characters=2_000_000)
        train, _ = load_blocks(arguments, tokenizer, PATCH, seed=0)
        assert isinstance(train, Dataset)
        train.save_to_disk(str(blocks))
    return str(blocks)


def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
    """[`throughput.measure`] in a process of its own, with all of the cell's threads.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    path = folder / f"{cell.name.replace(' ', '')}.json"
    path.write_text(json.dumps(vars(cell)), encoding="utf-8")
    command = [sys.executable, "-m", f"{__package__}.throughput", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(cell.threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{cell.name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Markdown, a cell a line."""
    lines = [
        "| training | rows x tokens | tokens/s | Gflop a step | matrix Gflop/s | share | waits | peak GB | top five |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        cell = one["cell"]
        top = ", ".join(f"{x['name'].removeprefix('aten::')} {x['share']:.0%}" for x in one["top"])
        lines.append(
            f"| {name} | {cell['rows'] * cell['accumulation']} x {BLOCK} | {one['tokens_per_second']:,.0f} "
            f"| {one['operations'] / 1e9:,.0f} | {one['matrix_rate'] / 1e9:.0f} | {one['utilisation']:.0%} "
            f"| {one['waits']:.2%} | {one['peak_bytes'] / 1e9:.1f} | {top} |"
        )
    return lines


def throughput(context: Context) -> Measured:
    blocks = prepare_blocks(context.work_dir.resolve())
    threads = min(2, os.cpu_count() or 1)
    sizes = [("codec", *size) for size in CODECS] + [("student", *size) for size in STUDENTS]
    cells = [
        Cell(kind, layers, width, blocks, rows, steps=steps, threads=threads)
        for kind, layers, width, rows, steps in sizes
    ]
    largest = cells[-1]
    autocast = Cell(**{**vars(largest), "dtype": "bfloat16"})
    found = {}
    for cell in (*cells, autocast):
        found[cell.name] = one = run_cell(cell, context.work_dir.resolve())
        context.say(f"{cell.name}: {one['tokens_per_second']:,.0f} tokens/s, {one['utilisation']:.1%}")
    whole, half = found[largest.name], found[autocast.name]
    waits = max(one["waits"] for one in found.values())
    figure = (
        f"12 x 768: {whole['tokens_per_second']:,.0f} tokens/s, {whole['utilisation']:.1%} of "
        f"{whole['matrix_rate'] / 1e9:.0f} Gflop/s in fp32; {half['tokens_per_second']:,.0f} tokens/s, "
        f"{half['utilisation']:.1%} of {half['matrix_rate'] / 1e9:.0f} with bf16; loader waits at most {waits:.2%}, "
        f"{max(whole['waits'], half['waits']):.2%} of 12 x 768"
    )
    passed = whole["utilisation"] >= LEAST_SHARE and max(whole["waits"], half["waits"]) <= MOST_WAITING
    return Measured(figure, passed, {"table": table(found), "cells": found})


def _two_epochs(cell: Cell, folder: Path, cache: str | None) -> tuple[list[float], list[int]]:
    """Losses of all steps, and how often the codec encoded in each epoch."""
    torch.manual_seed(0)
    args = KDConfig(
        output_dir=str(folder / "run"),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        mse_weight=cell.mse_weight,
        codec_cache=cache,
    )
    blocks = load_from_disk(cell.blocks).select(range(16))
    trainer = KDTrainer(build_student(cell), args, train_dataset=blocks, data_collator=PatchCollator(PATCH))
    with codec_timed() as seconds:
        trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses = [entry["ce"] + cell.mse_weight * entry["mse"] for entry in logged]
    first = min(len(seconds), len(losses) // 2)
    return losses, [first, len(seconds) - first]


def cached_targets(context: Context) -> Measured:
    folder = context.work_dir.resolve()
    blocks = prepare_blocks(folder)
    small = Cell("student", 2, 128, blocks, mse_weight=0.1, codec_width=128)
    cache = folder / "cache_of_codec"
    for path in cache.glob("*/*/*"):  # of an earlier measurement
        path.unlink()
    losses, calls = _two_epochs(small, folder, None)
    cached_losses, cached_calls = _two_epochs(small, folder, str(cache))
    again_losses, again_calls = _two_epochs(small, folder, str(cache))
    differ = max(abs(x - y) for other in (cached_losses, again_losses) for x, y in zip(other, losses, strict=True))
    shares = {}
    for layers, width, rows, steps in (STUDENTS[0], STUDENTS[-1]):
        cell = Cell("student", layers, width, blocks, rows, mse_weight=0.1, steps=steps)
        shares[cell.name] = run_cell(cell, folder)["codec"]
        context.say(f"{cell.name}: the codec takes {shares[cell.name]:.1%} of a step")
    told = ", ".join(f"{share:.1%} of {name}" for name, share in shares.items())
    figure = (
        f"codec forwards by epoch: {calls} without, {cached_calls} with the cache, {again_calls} in a second run; "
        f"losses differ by at most {differ:.1e}; what it saves, a codec 2 x 512: {told}"
    )
    passed = calls == [4, 4] and cached_calls == [4, 0] and again_calls == [0, 0] and differ <= TOLERANCE
    return Measured(figure, passed, {"losses": losses, "cached": cached_losses, "shares": shares})


ROWS: list[Row] = [
    Row(
        "throughput",
        "training throughput: codec and student at three sizes, of the machine's measured matrix rate",
        f"12 x 768 student, 2 cores: >= {LEAST_SHARE:.0%} of the measured fp32 matrix rate, bf16 reported; loader "
        f"waits <= {MOST_WAITING:.0%}",
        throughput,
        setup="K=4, V=4096, blocks of 1024 of builtin:python, 4 rows a step (8 of the smallest), the defaults "
        "of train_student.py without a teacher, AdamW, 2 threads, no other work on the machine; operations of "
        "matrices by torch's counter, matrix rate: the best of 1024 and 2048 squared",
    ),
    Row(
        "cached_targets",
        "codec targets cached, with mse_weight > 0",
        f"no codec forward after epoch 1 (counted), losses equal to uncached ({TOLERANCE:g})",
        cached_targets,
        setup="student 2 x 128, 16 blocks of 1024 in batches of 4, drawn anew each epoch, fp32, one seed",
    ),
]
