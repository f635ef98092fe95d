"""Throughput of training: what is counted and timed, and when its rows pass."""

import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tests.trainers.training_helpers import ragged_rows
from trainers.evaluation import throughput, throughput_rows
from trainers.evaluation.throughput import Cell, measure
from trainers.verification import Context, load_topic


@pytest.fixture
def blocks(tmp_path: Path) -> str:
    rows = [row for row in ragged_rows(128) if 0 not in row["attention_mask"]]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "blocks"))
    return str(tmp_path / "blocks")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(throughput, "MATRIX_SIZES", (64,))
    yield {"layers": 1, "width": 64, "rows": 2, "vocab_size": 258, "threads": 1, "codec_layers": 1, "codec_width": 32}
    torch.set_num_threads(threads)


def test_a_step_is_counted_timed_and_profiled(blocks: str, small: dict[str, Any]):
    """Operations that nobody counts, or of two steps instead of one, make any machine look fast or slow."""
    found = measure(Cell("student", blocks=blocks, accumulation=2, mse_weight=0.1, **small))
    assert len(found["seconds"]["all"]) == 3 and len(found["top"]) == 5
    assert found["tokens_per_second"] == pytest.approx(2 * 2 * 16 / found["seconds"]["median"])
    assert 0 < found["waits"] < 1 and 0 < found["codec"] < 1 and 0 < found["utilisation"] < 1
    assert found["peak_bytes"] > 10**7
    # of a linear layer a multiply-add is two, forward once and backward twice: 64 tokens through the decoder and the
    # output matrix, 16 patches through the backbone
    width, inner, vocabulary = 64, 192, 258
    token = 4 * width**2 + 3 * width * inner + vocabulary * width
    patch = 4 * width**2 + 3 * width * inner
    assert found["operations"] > 6 * (64 * token + 16 * patch)
    assert found["operations"] < 2 * 6 * (64 * token + 16 * patch)


def test_a_slow_loader_is_seen(blocks: str, small: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """A loader that keeps the machine waiting is what the figure is for."""
    collate = throughput.PatchCollator.__call__

    def slow(self: Any, features: Any) -> Any:
        time.sleep(0.3)
        return collate(self, features)

    monkeypatch.setattr(throughput.PatchCollator, "__call__", slow)
    found = measure(Cell("codec", blocks=blocks, steps=2, **small))
    assert found["waits"] * sum(found["seconds"]["all"]) == pytest.approx(0.6, rel=0.5)
    assert found["codec"] == 0


@pytest.mark.parametrize(("share", "waits", "passed"), [(0.5, 0.01, True), (0.44, 0.01, False), (0.5, 0.03, False)])
def test_the_largest_student_decides(
    context: Context, monkeypatch: pytest.MonkeyPatch, share: float, waits: float, passed: bool
):
    """A small model that is fast must not stand in for the one that the target names."""

    def run_cell(cell: Cell, folder: Path) -> dict[str, Any]:
        largest = (cell.kind, cell.layers, cell.width) == ("student", 12, 768)
        return {
            "cell": vars(cell),
            "tokens_per_second": 1000.0,
            "operations": 10**12,
            "matrix_rate": 2.5e11,
            "utilisation": share if largest else 0.9,
            "waits": waits if largest else 0.001,
            "peak_bytes": 10**9,
            "top": [{"name": "aten::mm", "share": 0.7, "calls": 3}],
        }

    monkeypatch.setattr(throughput_rows, "prepare_blocks", lambda folder: "blocks")
    monkeypatch.setattr(throughput_rows, "run_cell", run_cell)
    measured = throughput_rows.throughput(context)
    assert measured.passed == passed and f"{share:.1%} of 250 Gflop/s in fp32" in measured.figure
    assert len(measured.details["table"]) == 2 + 7


def test_a_cached_codec_is_counted(context: Context, monkeypatch: pytest.MonkeyPatch, blocks: str):
    """Were the cache never read, the losses would be equal all the same."""
    monkeypatch.setattr(throughput_rows, "prepare_blocks", lambda folder: blocks)
    monkeypatch.setattr(throughput_rows, "run_cell", lambda cell, folder: {"codec": 0.1})
    monkeypatch.setattr(throughput_rows, "VOCAB", 258)
    measured = throughput_rows.cached_targets(context)
    assert measured.passed and "[4, 4] without, [4, 0] with the cache, [0, 0] in a second run" in measured.figure
    monkeypatch.setattr("trainers.codec_cache.CodecCache.get", lambda self, keys: None)
    assert not throughput_rows.cached_targets(context).passed


def test_a_cell_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def run(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess:
        assert kwargs["env"]["OMP_NUM_THREADS"] == "2", "a caller's single thread is not the cell's"
        return subprocess.CompletedProcess(command, 1, "", "no blocks")

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(throughput_rows.subprocess, "run", run)
    with pytest.raises(RuntimeError, match="student 1 x 64 fp32 ended with 1:\nno blocks"):
        throughput_rows.run_cell(Cell("student", 1, 64, str(tmp_path / "nothing")), tmp_path)


def test_the_topic_has_the_rows():
    assert {"throughput", "cached_targets"} <= {row.name for row in load_topic("scale")}
