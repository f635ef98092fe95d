"""The rows of `make verify` about the store of teachers' answers, at tiny sizes, and what they measure with."""

import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from trainers.evaluation import verify_store
from trainers.evaluation.store_measures import keyed, real_rows, zipf_rows
from trainers.teachers import CachedTeacher, SQLiteStore
from trainers.verification import Context


@pytest.fixture
def teacher(context: Context, demo: Path) -> Path:
    """Where the rows find the demo's teacher."""
    assert verify_store.real_teacher(context) == demo / "teacher"
    return demo / "teacher"


def test_rows_of_a_large_vocabulary_keep_a_real_model_s_shape(teacher: Path):
    """Numbers that pack better than a teacher's promise a size that nobody will see."""
    real = real_rows(teacher, 3)
    assert len(real) == 3 and real[0].top_logprobs.shape == (511, 20)
    rows = zipf_rows(real, 5)
    mass = np.exp(np.stack([row.top_logprobs.astype(np.float32) for row in rows[:3]])).sum(-1).mean()
    assert len(rows) == 5 and mass == pytest.approx(0.94, abs=0.005)
    ids = np.concatenate([row.top_ids.ravel() for row in rows])
    assert 256 < ids.max() < 151936 and np.median(ids) < 151936 / 100  # small ids are the frequent ones
    assert len({key for key, _ in keyed(rows)}) == 5


def test_the_size_of_a_store_is_of_the_files_and_grows_with_the_entries(
    context: Context, teacher: Path, monkeypatch: pytest.MonkeyPatch
):
    """Bytes per token decide whether a data set's answers fit on a disk."""
    measured = verify_store.store_size(context, num_real=24, num_zipf=48)
    assert measured.passed, measured.figure
    for sizes in measured.details.values():
        assert 20 < sizes["parquet"] < sizes["sqlite"]  # 20 ids and numbers cannot be a byte each
    assert measured.details["real"]["sqlite"] < measured.details["zipf"]["sqlite"]
    assert not list(context.work_dir.iterdir())

    monkeypatch.setattr(verify_store, "real_rows", lambda folder, count: real_rows(folder, count, k=40))
    assert not verify_store.store_size(context, num_real=8, num_zipf=16).passed


def test_the_speed_of_a_store_is_the_middle_run_s(context: Context, teacher: Path, monkeypatch: pytest.MonkeyPatch):
    """The best of three is the machine's luck, and a store that crawls must not pass."""
    measured = verify_store.store_speed(context, num_real=2, num_zipf=64, reads=120)
    runs = measured.details["runs"]
    read = statistics.median(run["sqlite_read"]["per_second"] for run in runs)
    write = statistics.median(run["sqlite_write"]["per_second"] for run in runs)
    assert len(runs) == 3 and measured.passed == (read >= 6000 and write >= 0.6e6)
    assert measured.figure.startswith(f"{read:.0f} rows/s read, {write / 1e6:.2f} M tokens/s written; Parquet ")
    assert all(run["parquet_stream"]["per_second"] > 0 < run["parquet_unpacking"]["seconds"] for run in runs)

    put = SQLiteStore.put

    def slowly(self: SQLiteStore, *given: Any) -> Any:
        time.sleep(0.1)
        return put(self, *given)

    monkeypatch.setattr(SQLiteStore, "put", slowly)
    slow = verify_store.store_speed(context, num_real=2, num_zipf=64, reads=12, repeats=1)
    assert not slow.passed
    assert max(run["sqlite_write"]["per_second"] for run in slow.details["runs"]) <= 64 * 512 / 0.1


def test_a_store_that_loses_an_acknowledged_row_falls_short(
    context: Context, teacher: Path, monkeypatch: pytest.MonkeyPatch
):
    """A teacher's answer that was paid for and is gone is paid for again."""
    measured = verify_store.store_kill(context, kills=1)
    assert measured.passed and ", 0 lost, 0 corrupt, file sound 1 times" in measured.figure
    assert all(each["acknowledged"] > 0 for each in measured.details["rounds"])

    put = SQLiteStore.put
    monkeypatch.setattr(SQLiteStore, "put", lambda self, rows, who: put(self, rows[:-1], who))
    broken = verify_store.store_kill(context, kills=1)
    (counts,) = broken.details["rounds"]
    assert not broken.passed and counts["lost"] == counts["acknowledged"] / 4 and counts["sound"] == 1


@pytest.mark.slow
def test_a_store_that_is_slow_to_read_slows_the_training_and_is_found(
    context: Context, tiny_demo: Path, monkeypatch: pytest.MonkeyPatch
):
    """A teacher is asked once so that training need not wait: a store that makes it wait has failed."""
    said: list[str] = []
    context.say = said.append
    shutil.copytree(tiny_demo / "teacher", context.shared_dir / "tiny_teacher")
    assert verify_store.real_teacher(context) == context.shared_dir / "tiny_teacher" and "no demo" in said[0]

    sizes = {"steps": 5, "repeats": 1, "block_size": 32, "rows": 2}
    signal = CachedTeacher.signal

    def slowly(self: CachedTeacher, input_ids: torch.Tensor, attention_mask: Any = None) -> Any:
        time.sleep(0.3 if len(input_ids) == sizes["rows"] else 0.0)  # in training
        return signal(self, input_ids, attention_mask)

    monkeypatch.setattr(CachedTeacher, "signal", slowly)
    slow = verify_store.warm_store(context, **sizes)
    assert not slow.passed
    for name, one in slow.details.items():
        assert one["with"] >= 0.3 > one["reading"] > 0 and one["rows_found"] >= 5 * 2
        assert f"{name}: {one['slowdown']:.1%} slower ({one['with']:.2f} s a step, without " in slow.figure
