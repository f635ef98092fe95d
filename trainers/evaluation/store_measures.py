"""What a KD store costs and survives: bytes a token, rows a second, kill -9, and a training's time.

V vocabulary, k entries per position.
"""

import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from ..data import DataArguments, PatchCollator, load_blocks, load_texts
from ..kd_config import KDConfig
from ..kd_trainer import KDTrainer
from ..teachers import CachedTeacher, HFTeacher, SQLiteStore
from ..teachers.base import TeacherIdentity
from ..teachers.cached_teacher import score_rows
from ..teachers.labelling import TeacherPool, label
from ..teachers.store import KDStore, Shape, StoredTeacher
from ..teachers.store_parquet import ParquetFolder, ParquetStore
from ..teachers.store_rows import StoredRow, content_key
from ..token_lm import TokenLMConfig, TokenLMTrainer, build_token_lm
from ..tokenizer import train_tokenizer


BENCH = StoredTeacher(TeacherIdentity("bench", "0", "float32", "0"), 151936, None)


# -- rows to measure on


def tiny_token_lm(folder: Path, vocab_size: int = 4096, steps: int = 150) -> Path:
    """A small token LM of the standard library's source, trained where it is not there yet; with its tokenizer."""
    if not (folder / "config.json").exists():
        data = DataArguments(block_size=256, max_train_tokens=steps * 2048, max_eval_tokens=2048)
        texts, _ = load_texts(data)
        tokenizer = train_tokenizer(texts, vocab_size, max_characters=4_000_000)
        train, held_out = load_blocks(data, tokenizer, 1, 0)
        model = build_token_lm("granite", tokenizer, hidden_size=128, num_hidden_layers=2)
        args = TokenLMConfig(
            output_dir=str(folder),
            per_device_train_batch_size=8,
            max_steps=steps,
            learning_rate=3e-3,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        )
        trainer = TokenLMTrainer(
            model, args, train_dataset=train, eval_dataset=held_out, data_collator=PatchCollator(1)
        )
        trainer.train()
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def real_rows(folder: Path, count: int, tokens: int = 512, k: int = 20) -> list[StoredRow]:
    """What the model in `folder` says about held-out source code."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = HFTeacher(AutoModelForCausalLM.from_pretrained(folder), tokenizer=tokenizer)
    data = DataArguments(block_size=tokens, max_train_tokens=tokens, max_eval_tokens=count * tokens)
    _, held_out = load_blocks(data, tokenizer, 1, 0)
    rows: list[StoredRow] = []
    for start in range(0, len(held_out), 8):
        ids = torch.from_numpy(held_out[start : start + 8]["input_ids"].astype(np.int64))
        rows += score_rows(teacher, ids, None, Shape(k))
    return rows


def zipf_rows(
    profile: Sequence[StoredRow], count: int, vocab_size: int = 151936, mass: float = 0.94
) -> list[StoredRow]:
    """Rows of a large vocabulary: ids drawn from Zipf's law, independently, which is harder to pack than a text's;
    log-probabilities of `profile`, sharpened until its k entries hold `mass`."""
    generator = np.random.default_rng(0)
    cumulative = np.cumsum(1 / np.arange(1, vocab_size + 1))
    logprobs = np.stack([row.top_logprobs.astype(np.float32) for row in profile])
    low, high = 0.1, 20.0
    for _ in range(40):  # the exponent, by bisection
        exponent = (low + high) / 2
        low, high = (
            (exponent, high) if np.exp(_sharpened(logprobs, exponent)).sum(-1).mean() < mass else (low, exponent)
        )
    logprobs = _sharpened(logprobs, exponent)
    rows = []
    for place in range(count):
        values = logprobs[place % len(logprobs)]
        drawn = generator.random((len(values) + 1, values.shape[1] + 1)) * cumulative[-1]
        ids = np.searchsorted(cumulative, drawn)
        rows.append(StoredRow.of(ids[:, -1], ids[1:, :-1], values))
    return rows


def _sharpened(logprobs: np.ndarray, exponent: float, others: int = 200) -> np.ndarray:
    """To a power, the tail spread over `others` ids; normalised."""
    tail = np.clip(1 - np.exp(logprobs).sum(-1, keepdims=True), 1e-6, 1)
    raised = logprobs * exponent
    return raised - np.log(np.exp(raised).sum(-1, keepdims=True) + others * (tail / others) ** exponent)


def keyed(rows: Sequence[StoredRow]) -> list[tuple[bytes, StoredRow]]:
    return [(content_key(BENCH.identity, row.token_ids), row) for row in rows]


# -- size and speed


def bytes_per_token(rows: Sequence[StoredRow], folder: Path) -> dict[str, float]:
    """Of both engines, everything included: keys, checksums, indexes, the file's own pages."""
    shutil.rmtree(folder, ignore_errors=True)
    items = keyed(rows)
    tokens = sum(len(row.token_ids) for row in rows)
    store = SQLiteStore(folder / "rows.sqlite")
    for start in range(0, len(items), 64):
        store.put(items[start : start + 64], BENCH)
    store.close()
    shards = ParquetFolder(folder / "shards", BENCH, Shape(rows[0].k), {})
    shards.write(0, items)
    sizes = {
        "sqlite": sum(file.stat().st_size for file in folder.glob("rows.sqlite*")) / tokens,
        "parquet": sum(file.stat().st_size for file in (folder / "shards").rglob("*") if file.is_file()) / tokens,
    }
    shutil.rmtree(folder)
    return sizes


def store_speed(rows: Sequence[StoredRow], folder: Path, reads: int = 4000, batch: int = 12) -> dict[str, dict]:
    """Tokens written and random rows read a second, wall and CPU time; rows arrive as arrays, checked."""
    shutil.rmtree(folder, ignore_errors=True)
    items = keyed(rows)
    tokens = sum(len(row.token_ids) for row in rows)
    shape = Shape(rows[0].k)
    generator = random.Random(0)
    wanted = [[items[generator.randrange(len(items))][0] for _ in range(batch)] for _ in range(reads // batch)]

    def write_sqlite() -> None:
        for start in range(0, len(items), 64):
            store.put(items[start : start + 64], BENCH)

    def read(source: KDStore) -> Callable[[], Any]:
        return lambda: [len(source.get(keys, shape)) for keys in wanted]

    store = SQLiteStore(folder / "rows.sqlite")
    shards = ParquetFolder(folder / "shards", BENCH, shape, {})
    result = {"sqlite_write": _rate(write_sqlite, tokens)}
    store.close()
    store = SQLiteStore(folder / "rows.sqlite", read_only=True)
    result["sqlite_read"] = _rate(read(store), sum(map(len, wanted)))
    store.close()
    result["parquet_write"] = _rate(lambda: shards.write(0, items), tokens)
    parquet = ParquetStore(folder / "shards", cache_dir=str(folder / "datasets"))
    start = time.perf_counter()
    parquet.get(wanted[0], shape)
    result["parquet_unpacking"] = {"seconds": time.perf_counter() - start}
    result["parquet_read"] = _rate(read(parquet), sum(map(len, wanted)))
    result["parquet_stream"] = _rate(lambda: sum(1 for _ in parquet.stream()), len(items))
    shutil.rmtree(folder)
    return result


def _rate(work: Callable[[], Any], amount: int) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"per_second": amount / wall, "per_cpu_second": amount / cpu}


# -- kill -9


def kill_writers(
    path: Path, round_number: int, seconds: float, pattern: StoredRow, num_writers: int = 2
) -> dict[str, int]:
    """Let processes write into one file, kill them all, and look for every row whose `put` had returned.

    Returns:
        `acknowledged`, `lost`, `corrupt`, `sound` (SQLite finds the file whole).
    """
    writers = [_fork_writer(path, f"{round_number}-{number}", pattern) for number in range(num_writers)]
    time.sleep(seconds)
    for process, _ in writers:
        os.kill(process, signal.SIGKILL)
    acknowledged = 0
    lost = 0
    store = None
    for number, (process, pipe) in enumerate(writers):
        os.waitpid(process, 0)
        with os.fdopen(pipe, "rb") as acks:
            count = len(acks.read())
        store = store or SQLiteStore(path)
        acknowledged += count
        keys = [_kill_key(f"{round_number}-{number}", place) for place in range(count)]
        for place, key in enumerate(keys):
            row = store.get([key], Shape(pattern.k)).get(key)
            lost += row is None or int(row.token_ids[0]) != place or not np.array_equal(row.top_ids, pattern.top_ids)
    assert store is not None
    corrupt = len(store) - len(store.sample(len(store), BENCH))
    sound = int(store.check_integrity() == "ok")
    store.close()
    return {"acknowledged": acknowledged, "lost": lost, "corrupt": corrupt, "sound": sound}


def _fork_writer(path: Path, name: str, pattern: StoredRow) -> tuple[int, int]:
    read_end, write_end = os.pipe()
    process = os.fork()
    if process:
        os.close(write_end)
        return process, read_end
    try:
        store = SQLiteStore(path)
        place = 0
        while True:
            rows = []
            for _ in range(4):
                ids = pattern.token_ids.copy()
                ids[0] = place
                rows.append(
                    (_kill_key(name, place), StoredRow(ids, pattern.top_ids, pattern.top_logprobs, pattern.tail))
                )
                place += 1
            store.put(rows, BENCH)
            os.write(write_end, b"." * len(rows))
    finally:
        os._exit(1)


def _kill_key(name: str, place: int) -> bytes:
    return hashlib.sha256(f"{name} {place}".encode()).digest()


# -- training from a warm store


class _StepTimes(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[np.ndarray] = []  # wall and CPU seconds of each step
        self._start = self._now()

    @staticmethod
    def _now() -> np.ndarray:
        return np.array([time.perf_counter(), time.process_time()])

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(self._now() - self._start)


def warm_store_slowdown(
    teacher_folder: Path,
    build_student: Callable[[int], Any],
    folder: Path,
    patch_size: int,
    shape: Shape,
    steps: int = 8,
    repeats: int = 3,
    block_size: int = 512,
    rows: int = 12,
) -> dict[str, float]:
    """Seconds of a training step with a warm store and without a teacher, in turns; medians, first steps left out."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    teacher = HFTeacher(str(teacher_folder))
    data = DataArguments(block_size=block_size, max_train_tokens=steps * rows * block_size, max_eval_tokens=block_size)
    blocks, _ = load_blocks(data, tokenizer, patch_size, 0)
    path = folder / "warm.sqlite"
    for file in folder.glob("warm.sqlite*"):  # of an earlier code
        file.unlink()
    store = SQLiteStore(path)
    label(blocks, TeacherPool([teacher]), store, shape)
    store.close()
    times: dict[str, list[np.ndarray]] = {"without": [], "with": []}
    found = 0
    for _ in range(repeats):
        for kind, collected in times.items():
            cached = CachedTeacher(None, SQLiteStore(path, read_only=True)) if kind == "with" else None
            clock = _StepTimes()
            args = KDConfig(
                output_dir=str(folder / "run"),
                per_device_train_batch_size=rows,
                max_steps=steps,
                ce_weight=1.0 if cached is None else 0.5,
                kd_weight=None if cached is None else 0.5,
                learning_rate=1e-3,
                save_strategy="no",
                logging_steps=steps,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            )
            torch.manual_seed(0)
            KDTrainer(
                model=build_student(len(tokenizer)),
                args=args,
                teacher=cached,
                train_dataset=blocks,
                data_collator=PatchCollator(patch_size),
                callbacks=[clock],
            ).train()
            collected += clock.times[2:]
            found += cached.statistics.found if cached is not None else 0
    medians = {kind: np.median(values, axis=0).tolist() for kind, values in times.items()}
    return {
        "without": medians["without"][0],
        "with": medians["with"][0],
        "slowdown": medians["with"][0] / medians["without"][0] - 1,
        "slowdown_cpu": medians["with"][1] / medians["without"][1] - 1,
        "rows_found": found,
        **_reading(path, blocks),
    }


def _reading(path: Path, blocks: Any) -> dict[str, float]:
    """Seconds that a step's signal takes to read, alone."""
    cached = CachedTeacher(None, SQLiteStore(path, read_only=True))
    batch = {name: torch.from_numpy(blocks[:12][name].astype(np.int64)) for name in ("input_ids", "attention_mask")}
    cached.signal(**batch)
    start = time.perf_counter()
    for _ in range(10):
        cached.signal(**batch)
    cached.close()
    return {"reading": (time.perf_counter() - start) / 10}
