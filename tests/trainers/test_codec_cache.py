import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from modeling_latentforge import LatentForgeAutoencoder
from tests.conftest import tiny_student
from tests.trainers.training_helpers import ragged_rows, tiny_args, train_log
from trainers import KDConfig, KDTrainer, PatchCollator
from trainers.codec_cache import ROWS_BETWEEN_LOOKS, CodecCache, reserve


@pytest.fixture
def encoded(monkeypatch):
    """Rows that a codec was asked for, call by call."""
    calls = []
    encode = LatentForgeAutoencoder.encode

    def counting(self, input_ids):
        calls.append(len(input_ids))
        return encode(self, input_ids)

    monkeypatch.setattr(LatentForgeAutoencoder, "encode", counting)
    return calls


def trained(tmp_path, cache=None, epochs=2, head="regression", change=None, resume=None, **kwargs):
    """16 rows in batches of 4, drawn anew each epoch; the logged steps."""
    torch.manual_seed(0)
    of_student = {"input_mode": kwargs.pop("input_mode")} if "input_mode" in kwargs else {}
    student = tiny_student(head, **of_student)
    if change is not None:
        change(student.autoencoder)
    defaults = {"max_steps": -1, "num_train_epochs": epochs, "mse_weight": 0.0 if head == "energy" else 0.5}
    trainer = KDTrainer(
        student,
        tiny_args(KDConfig, tmp_path / "run", codec_cache=cache, **{**defaults, **kwargs}),
        train_dataset=ragged_rows(16),
        data_collator=PatchCollator(4),
    )
    trainer.train(resume_from_checkpoint=resume)
    return train_log(trainer), trainer


def parts(log):
    return [{name: x[name] for name in ("loss", "ce", "mse", "energy", "grad_norm") if name in x} for x in log]


@pytest.mark.parametrize(
    "kwargs",
    [{}, {"head": "energy"}, {"input_mode": "latents"}, {"bf16": True}],
    ids=["mse", "energy", "latents", "bf16"],
)
def test_the_codec_sees_a_block_once_and_the_losses_are_those_without_a_cache(tmp_path, encoded, kwargs):
    """A target of another row, or a draw that moved the random state, would train on without a word."""
    expected, _ = trained(tmp_path, **kwargs)
    assert encoded == [4] * 8
    encoded.clear()
    found, trainer = trained(tmp_path, tmp_path / "cache", **kwargs)
    assert encoded == [4] * 4 and trainer.codec_cache.num_found == 16
    for one, other in zip(parts(found), parts(expected), strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_a_resumed_run_reads_what_the_first_one_kept(tmp_path, encoded):
    """Half an epoch was seen when the run died: that half is not encoded again, and the rest is."""
    trained(
        tmp_path, tmp_path / "cache", save_strategy="steps", save_steps=2, max_steps=2, lr_scheduler_type="constant"
    )
    encoded.clear()
    found, _ = trained(tmp_path, tmp_path / "cache", resume=True)
    assert encoded == [4] * 2
    assert [x["step"] for x in found][-6:] == [3, 4, 5, 6, 7, 8]


def test_another_codec_finds_nothing(tmp_path, encoded):
    """A codec that was trained on has other latents under the same text."""

    def further_trained(codec):
        with torch.no_grad():
            codec.encoder.to_posterior.bias.add_(0.1)

    trained(tmp_path, tmp_path / "cache")
    encoded.clear()
    expected, _ = trained(tmp_path, change=further_trained)
    encoded.clear()
    found, _ = trained(tmp_path, tmp_path / "cache", change=further_trained)
    assert encoded == [4] * 4
    assert parts(found)[-1] == pytest.approx(parts(expected)[-1], rel=1e-6)


@pytest.mark.parametrize("damage", [b"", b"\0" * 300, None], ids=["empty", "zeros", "a bit"])
def test_a_damaged_row_is_computed_again(tmp_path, damage):
    cache = CodecCache(tmp_path, "codec")
    ids, mean, log_std = torch.arange(8).view(1, 8), torch.randn(1, 2, 5), torch.randn(1, 2, 5)
    keys = cache.keys(ids, torch.ones_like(ids))
    cache.put(keys, mean, log_std)
    found = cache.get(keys)
    assert torch.equal(found[0], mean) and torch.equal(found[1], log_std)
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data if damage is None else damage)
    assert cache.get(keys) is None
    cache.put(keys, mean, log_std)
    assert torch.equal(cache.get(keys)[0], mean)


def test_the_mask_and_what_is_kept_are_part_of_a_row(tmp_path):
    """Masked ids are read as padding; means alone must not answer an energy score."""
    cache = CodecCache(tmp_path, "codec", with_log_std=False)
    ids, mask = torch.arange(8).view(1, 8), torch.ones(1, 8, dtype=torch.long)
    keys = cache.keys(ids, mask)
    mask[0, 0] = 0
    assert cache.keys(ids, mask) != keys
    cache.put(keys, torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    assert cache.get(keys)[1].eq(0).all()
    assert (
        CodecCache(tmp_path, "codec").get(keys) is None
        and CodecCache(tmp_path, "codec", torch.bfloat16).get(keys) is None
    )


def test_a_disk_without_room_ends_the_cache_and_not_the_training(tmp_path, encoded, monkeypatch, caplog):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    log, _ = trained(tmp_path, tmp_path / "cache")
    assert len(log) == 8 and encoded == [4] * 8
    assert len([x for x in caplog.messages if "No space left" in x]) == 1
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.fixture
def disk(monkeypatch):
    """100 GB with as much free as a test says; how often it was looked at."""
    found = SimpleNamespace(total=100 * 2**30, free=0, looks=0)

    def disk_usage(path):
        found.looks += 1
        return found

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    return found


def put_rows(cache, start, count):
    """How many of so many new rows are kept."""
    ids = (torch.arange(count * 8) + 8 * start).view(count, 8)
    keys, before = cache.keys(ids, None), cache.num_found
    cache.put(keys, torch.ones(count, 2, 5), torch.ones(count, 2, 5))
    cache.get(keys)
    return cache.num_found - before


def test_a_disk_that_is_nearly_full_is_left_to_checkpoints(tmp_path, disk, caplog):
    """The last bytes that a cache takes are those that the next checkpoint cannot be written to."""
    cache = CodecCache(tmp_path, "codec")
    disk.free = 5 * 2**30 - 1
    assert put_rows(cache, 0, 3) == put_rows(cache, 3, 3) == 0
    (said,) = caplog.messages
    assert "5.0 GiB free" in said and "Make room there, or name a folder of another disk." in said
    disk.free = 5 * 2**30
    assert put_rows(cache, 6, 200) == 200 - (ROWS_BETWEEN_LOOKS - 6)  # somebody has made room
    disk.free = 0
    put_rows(cache, 206, ROWS_BETWEEN_LOOKS)
    assert put_rows(cache, 400, 5) == 0 and len(caplog.messages) == 1
    assert disk.looks == -(-(206 + ROWS_BETWEEN_LOOKS + 5) // ROWS_BETWEEN_LOOKS)


def test_the_reserve_is_neither_nothing_nor_half_a_terabyte():
    gib = 2**30
    assert [reserve(total * gib) // gib for total in (2, 100, 10_000)] == [1, 5, 50]


def test_what_killed_runs_left_goes_when_it_is_old(tmp_path):
    """Half rows of runs that died fill the disk for good; those of runs that write now are needed."""
    CodecCache(tmp_path, "another").folder.joinpath("aside").mkdir()
    cache = CodecCache(tmp_path, "codec")
    assert put_rows(cache, 0, 2) == 2
    parts = [path / "row.0.part" for path in tmp_path.glob("*/aside")]
    assert len(parts) == 2
    for age, name in ((25, "old"), (1, "new")):
        for path in (part.with_name(f"{name}.part") for part in parts):
            path.write_bytes(b"half")
            os.utime(path, (time.time() - age * 3600,) * 2)
    again = CodecCache(tmp_path, "codec")
    assert [path.name for path in tmp_path.rglob("*.part")] == ["new.part"] * 2
    assert again.get(cache.keys(torch.arange(16).view(2, 8), None)) is not None


def test_a_row_that_cannot_be_written_ends_the_cache_and_not_the_training(tmp_path, caplog):
    """Where another user's folder refuses the row, it refuses to have it cleared away too."""
    cache = CodecCache(tmp_path, "codec")
    ids = torch.arange(8).view(1, 8)
    keys = cache.keys(ids, None)
    (cache.folder / keys[0][:2]).write_text("in the way")
    cache.put(keys, torch.randn(1, 2, 5), torch.randn(1, 2, 5))
    assert cache.get(keys) is None and len([x for x in caplog.messages if "encoded at every step" in x]) == 1


def test_writers_with_one_process_number_do_not_meet(tmp_path, monkeypatch):
    """In two containers both may be process 12: one renamed the file that the other was writing, and the cache of the
    other ended."""
    cache = CodecCache(tmp_path, "codec")
    keys, parts = cache.keys(torch.arange(8).view(1, 8), None), []
    plain = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: (parts.append(self.name), plain(self, data))[1])
    for _ in range(2):
        cache.put(keys, torch.ones(1, 2, 5), torch.ones(1, 2, 5))
    assert len(set(parts)) == 2


def test_a_cache_that_nothing_reads_or_nobody_can_write_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing asks the codec"):
        trained(tmp_path, tmp_path / "cache", mse_weight=0.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="name a folder to write to"):
        trained(tmp_path, tmp_path / "file")


def test_an_encoding_of_other_rows_is_refused():
    student, ids = tiny_student(), torch.arange(16).view(2, 8)
    encoding = student(ids, labels=ids, loss_weights={"mse": 1.0}).codec_encoding
    assert student(ids, labels=ids, loss_weights={"mse": 1.0}, codec_encoding=encoding).loss > 0
    with pytest.raises(ValueError, match="is not these rows'"):
        student(ids[:1], labels=ids[:1], loss_weights={"mse": 1.0}, codec_encoding=encoding)
    with pytest.raises(ValueError, match="pass `labels`"):
        student(ids, codec_encoding=encoding)
