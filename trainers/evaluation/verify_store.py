"""Rows of `make verify TOPIC=teachers` about the store of teachers' answers."""

import random
import statistics
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from modeling_latentforge import LatentForgeAutoencoder, LatentForgeAutoencoderConfig, LatentForgeForCausalLM

from ..teachers.store import Shape
from ..verification import Context, Measured, Row
from .side_by_side import STUDENT
from .store_measures import bytes_per_token, kill_writers, real_rows, tiny_token_lm, warm_store_slowdown, zipf_rows
from .store_measures import store_speed as measure_store_speed


KILLS = 20


def real_teacher(context: Context) -> Path:
    """The demo's teacher where the topic `main` has made one, else a tiny one of our own."""
    demo = context.shared_dir.parent / "main" / "demo" / "clone" / "runs" / "demo" / "teacher"
    if (demo / "config.json").exists():
        return demo
    context.say("no demo's teacher here: a tiny one is trained")
    return tiny_token_lm(context.shared_dir / "tiny_teacher")


def store_size(context: Context, num_real: int = 256, num_zipf: int = 2048) -> Measured:
    real = real_rows(real_teacher(context), num_real)
    sizes = {
        "zipf": bytes_per_token(zipf_rows(real, num_zipf), context.work_dir / "size"),
        "real": bytes_per_token(real, context.work_dir / "size"),
    }
    figure = "; ".join(
        f"{name}: Parquet {size['parquet']:.1f}, SQLite {size['sqlite']:.1f} bytes/token"
        for name, size in sizes.items()
    )
    passed = all(size["parquet"] <= 64 and size["sqlite"] <= 88 for size in sizes.values())
    return Measured(figure, passed, sizes)


def store_speed(
    context: Context, num_real: int = 64, num_zipf: int = 2048, reads: int = 4000, repeats: int = 3
) -> Measured:
    rows = zipf_rows(real_rows(real_teacher(context), num_real), num_zipf)
    runs: list[dict[str, Any]] = [measure_store_speed(rows, context.work_dir / "speed", reads) for _ in range(repeats)]
    # the machine is shared: the middle run counts, all are kept
    read = statistics.median(run["sqlite_read"]["per_second"] for run in runs)
    write = statistics.median(run["sqlite_write"]["per_second"] for run in runs)
    parquet = statistics.median(run["parquet_read"]["per_second"] for run in runs)
    figure = (
        f"{read:.0f} rows/s read, {write / 1e6:.2f} M tokens/s written; Parquet {parquet:.0f} rows/s once unpacked"
    )
    return Measured(figure, read >= 6000 and write >= 0.6e6, {"runs": runs})


def store_kill(context: Context, kills: int = KILLS) -> Measured:
    (pattern,) = real_rows(real_teacher(context), 1)
    path = context.work_dir / "killed.sqlite"
    for file in context.work_dir.glob("killed.sqlite*"):
        file.unlink()
    delays = random.Random(0)
    rounds = [kill_writers(path, number, delays.uniform(0.2, 0.7), pattern) for number in range(kills)]
    megabytes = path.stat().st_size / 2**20
    path.unlink()
    total = {name: sum(one[name] for one in rounds) for name in rounds[0]}
    figure = (
        f"{total['acknowledged']} rows acknowledged in {kills} rounds, {total['lost']} lost, {total['corrupt']} "
        f"corrupt, file sound {total['sound']} times"
    )
    every_round_wrote = all(one["acknowledged"] for one in rounds)
    passed = every_round_wrote and not total["lost"] and not total["corrupt"] and total["sound"] == kills
    return Measured(figure, passed, {"rounds": rounds, "megabytes": megabytes})


PATCH_SIZE = 4


def student_of_256(vocab_size: int) -> LatentForgeForCausalLM:
    """4 x 256, the size at which what a teacher adds to a step is measured."""
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
    codec = LatentForgeAutoencoder(
        LatentForgeAutoencoderConfig(
            vocab_size=vocab_size, patch_size=PATCH_SIZE, hidden_size=256, intermediate_size=512
        )
    )
    return LatentForgeForCausalLM.from_autoencoder(
        codec, LlamaConfig(vocab_size=vocab_size, **shape), **STUDENT, decoder_hidden_size=256
    )


def warm_store(context: Context, **sizes: int) -> Measured:
    teacher = tiny_token_lm(context.shared_dir / "tiny_teacher")
    shapes = {"top 20": Shape(20), "12 exact + 8 draws": Shape(12, 8)}
    measured = {
        name: warm_store_slowdown(teacher, student_of_256, context.work_dir, PATCH_SIZE, shape, **sizes)
        for name, shape in shapes.items()
    }
    figure = "; ".join(
        f"{name}: {one['slowdown']:.1%} slower ({one['with']:.2f} s a step, without {one['without']:.2f}; of it "
        f"reading {one['reading'] / one['without']:.1%})"
        for name, one in measured.items()
    )
    return Measured(figure, all(one["slowdown"] <= 0.08 for one in measured.values()), measured)


ROWS = [
    Row(
        "store_size",
        "bytes a token of stored answers, key and checksum included",
        "Parquet <= 64, SQLite <= 88",
        store_size,
        setup="512-token rows, top-20; 2048 rows of Zipf ids over 151,936 with a real model's log-probabilities "
        "sharpened to a mass of 0.94; up to 256 rows of a real model (the demo's teacher or 2 x 128, V=4096) on "
        "held-out Python source",
    ),
    Row(
        "store_speed",
        "random rows read and tokens written a second, SQLite",
        ">= 6,000 rows/s, >= 0.6 M tokens/s",
        store_speed,
        setup="the same Zipf rows, 2048; reads of 12 keys, checked and unpacked to arrays; writes of 64 rows; middle "
        "of 3, one process, wall time",
    ),
    Row(
        "store_kill",
        "kill -9 of two writers into one SQLite file",
        f"{KILLS} times: no acknowledged row lost, none corrupt",
        store_kill,
        setup="512-token rows, four a transaction, killed after 0.2 to 0.7 s; the file goes on through all rounds",
    ),
    Row(
        "warm_store",
        "KDTrainer with a warm store against no KD, time of a step",
        "<= 8 % slower",
        warm_store,
        setup="student 4 x 256, decoder 1 x 256, V=4096, K=4, 12 x 512 tokens a step, 20 entries a token of "
        "both forms, SQLite; medians of 18 steps each, in turns; fp32",
    ),
]
