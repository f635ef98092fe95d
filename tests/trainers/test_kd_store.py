"""The KD store: keys, rows, both engines, the teacher around a teacher, and the labelling of whole data sets."""

import logging
import multiprocessing
import os
import pickle
import sqlite3
import threading
import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from tests.conftest import PAD, VOCAB, text_batch, tiny_student
from tests.trainers.training_helpers import byte_tokenizer, ragged_rows, tiny_args, tiny_teacher, train_log
from trainers import KDConfig, KDTrainer, PatchCollator
from trainers.evaluation.store_measures import kill_writers
from trainers.teachers import (
    CachedTeacher,
    HFTeacher,
    ParquetStore,
    SparseSignal,
    SQLiteStore,
    StoreError,
    Teacher,
    TeacherCapabilities,
    TeacherIdentity,
    content_key,
    identity_of,
    open_store,
    verify_store,
)
from trainers.teachers.labelling import TeacherPool, check_equal_answers, copy_rows, label
from trainers.teachers.store import Shape, StoreBusy, StoredTeacher, StoreFull
from trainers.teachers.store_parquet import ParquetFolder
from trainers.teachers.store_rows import ABSENT, StoredRow, decode_row, encode_row


IDENTITY = TeacherIdentity("someone/teacher", "0123456789abcdef", "float32", "tokenizer-hash")
WHO = StoredTeacher(IDENTITY, 151936, 151643)


class AskedTeacher(HFTeacher):
    """A real teacher that counts the rows it is asked about."""

    def __init__(self, seed=7, fail=False, **kwargs):
        model = tiny_teacher(**kwargs)
        if seed != 7:
            torch.manual_seed(seed)
            model.lm_head.weight.data.normal_()
        super().__init__(model, tokenizer=byte_tokenizer())
        self.rows, self.fail = 0, fail

    def signal(self, input_ids, attention_mask=None):
        if self.fail:
            raise ConnectionError("the endpoint went away")
        self.rows += len(input_ids)
        return super().signal(input_ids, attention_mask)


def some_row(tokens=9, k=5, seed=0, vocab=151936, num_draws=0, entropy=False) -> StoredRow:
    generator = np.random.default_rng(seed)
    token_ids = generator.integers(0, vocab, tokens)
    logits = generator.normal(size=(tokens - 1, 4 * k)) * 3
    logprobs = np.sort(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[:, ::-1][:, :k]
    ids = np.stack([generator.choice(vocab, k, replace=False) for _ in range(tokens - 1)])
    given = generator.random(tokens - 1) if entropy else None
    return StoredRow.of(token_ids, ids, logprobs, given, num_draws)


def items(count=4, **kwargs):
    rows = [some_row(seed=seed, **kwargs) for seed in range(count)]
    return [(content_key(IDENTITY, row.token_ids), row) for row in rows]


def same(first: StoredRow, second: StoredRow) -> bool:
    names = ("token_ids", "top_ids", "top_logprobs", "tail", "entropy")
    return first.num_draws == second.num_draws and all(
        np.array_equal(getattr(first, name), getattr(second, name)) for name in names
    )


def padded_batch():
    batch = PatchCollator(4)(ragged_rows(6))
    return batch["input_ids"], batch["attention_mask"]


# -- keys and rows


def test_keys_are_these_and_stay_these():
    """A key that changes with a release, a machine or a Python makes every store worthless, without a word."""
    assert content_key(IDENTITY, np.array([1, 2, 3])).hex() == (
        "38c5464e10c111087a9d140e3f202959138cca29c3335a3cf08506faedc585db"
    )
    assert content_key(IDENTITY, torch.tensor([151935, 0]).numpy()).hex() == (
        "160ee75e9e08648bcff4fd8014fdc529d271abec6786bc7e928b37d35f3b3c4d"
    )


def test_everything_that_changes_an_answer_changes_its_key():
    """Two teachers that share an entry: the student learns from the wrong one, and nobody can see it."""
    ids = np.array([5, 6, 7])
    others = [
        TeacherIdentity(*(value + "x" if place == changed else value for place, value in enumerate(fields)))
        for changed in range(4)
        for fields in [("someone/teacher", "0123456789abcdef", "float32", "tokenizer-hash")]
    ]
    # what stands in one field must not be read as the end of the one before
    others.append(TeacherIdentity("someone/teacher0123456789abcdef", "", "float32", "tokenizer-hash"))
    keys = {content_key(identity, ids) for identity in (IDENTITY, *others)}
    keys |= {content_key(IDENTITY, np.array(text)) for text in ([5, 6], [5, 6, 7, 0], [7, 6, 5], [5, 6 + 2**16, 7])}
    assert len(keys) == 10
    with pytest.raises(ValueError, match="mode must be one of score"):
        content_key(IDENTITY, ids, mode="sample")


def test_identity_is_of_the_weights_and_not_of_their_place(tmp_path):
    """A path in the key loses the store when the folder moves; a name alone keeps it when the weights change."""
    teacher = AskedTeacher()
    teacher.model.save_pretrained(tmp_path / "copy")
    copy = HFTeacher(str(tmp_path / "copy"), tokenizer=byte_tokenizer())
    assert identity_of(copy) == identity_of(teacher)
    assert str(tmp_path) not in str(identity_of(copy))
    half = HFTeacher(str(tmp_path / "copy"), tokenizer=byte_tokenizer(), dtype="bfloat16")
    with torch.no_grad():
        copy.model.model.norm.weight[0] += 1e-3
    assert len({identity_of(one) for one in (teacher, copy, half)}) == 3
    assert identity_of(half).numerics == "bfloat16"
    with pytest.raises(ValueError, match="tokenizer that would give one"):
        identity_of(HFTeacher(tiny_teacher()))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"tokens": 2, "k": 1},
        {"vocab": 200},
        {"vocab": 2**31},
        {"num_draws": 2, "entropy": True},
        {"entropy": True},
    ],
)
def test_rows_come_back_as_they_went(kwargs):
    """Ids are exact whatever the vocabulary (sixteen bits hold no Qwen), log-probabilities to the last bit of fp16."""
    row = some_row(**kwargs)
    assert same(decode_row(encode_row(row)), row)


def test_bytes_of_a_row_are_these_and_stay_these():
    """What was labelled last year must be read next year, or the format must say that it is another."""
    logprobs = np.log([[0.5, 0.25], [0.9, 0.05]])
    row = StoredRow.of(np.array([70000, 5, 151935]), np.array([[1, 2], [300, 151935]]), logprobs)
    data = bytes.fromhex(
        "0100030303000000020000008cbe004028b52ffd201de9000070057f110051010002012c027f0001005100000002b9ae04138cfebdc1"
    )
    assert same(decode_row(data), row) and same(decode_row(encode_row(row)), row)


def test_absent_entries_stay_absent():
    """Servers give fewer entries than asked for; an id that nobody named must not become likely."""
    logprobs = np.array([[-0.5, -1e9, np.nan], [-0.1, -2.5, -np.inf]])
    row = decode_row(encode_row(StoredRow.of(np.arange(3), np.zeros((2, 3)), logprobs)))
    assert (row.top_logprobs[[0, 0, 1], [1, 2, 2]] == ABSENT).all()
    assert row.logprobs()[1, 1] == pytest.approx(-2.5, abs=2e-3)
    assert np.exp(float(row.tail[0])) == pytest.approx(1 - np.exp(-0.5), rel=1e-3)


def test_tail_survives_rounding():
    """Of a confident teacher the whole tail is smaller than fp16's error in its likeliest entries."""
    head = np.log(np.array([[0.5, 0.3, 0.1995]]))
    row = decode_row(encode_row(StoredRow.of(np.arange(2), np.arange(3)[None], head)))
    assert abs(1 - np.exp(row.top_logprobs.astype(np.float64)).sum() - 5e-4) > 2e-5, "else this shows nothing"
    assert 1 - np.exp(row.logprobs().astype(np.float64)).sum() == pytest.approx(5e-4, rel=1e-3)
    np.testing.assert_allclose(row.logprobs(), head, atol=1e-3)


def test_a_larger_k_serves_a_smaller_one():
    """Asking the teacher again for the half of what is there would cost the whole labelling again."""
    row = some_row(k=5)
    head = row.head(2)
    assert np.array_equal(head.top_ids, row.top_ids[:, :2])
    np.testing.assert_allclose(head.logprobs(), row.logprobs()[:, :2], atol=1e-3)
    kept = np.exp(row.logprobs()[:, :2].astype(np.float64)).sum(-1)
    np.testing.assert_allclose(np.exp(head.tail.astype(np.float64)), 1 - kept, rtol=2e-3)


def test_bytes_that_are_no_row_are_refused():
    """A row of a later version read by this one would be numbers without meaning."""
    data = encode_row(some_row())
    for broken, message in (
        (b"", "no row"),
        (data[:7], "no row"),
        (b"\x09" + data[1:], "format 9"),
        (data[:-9], "unpack"),
    ):
        with pytest.raises(ValueError, match=message):
            decode_row(broken)


# -- SQLite


def test_store_finds_what_serves_and_nothing_else(tmp_path):
    """A head that is too short, or draws of another seed, is another answer."""
    store = SQLiteStore(tmp_path / "a" / "kd.sqlite")
    rows = items(3)
    keys = [key for key, _ in rows]
    store.put(rows[:2], WHO)
    assert list(store.get(keys, Shape(5))) == keys[:2]
    assert same(store.get(keys, Shape(5))[keys[1]], rows[1][1])
    assert same(store.get(keys[:1], Shape(3))[keys[0]], rows[0][1].head(3))
    assert store.missing(keys + keys, Shape(5)) == keys[2:]
    assert store.missing(keys, Shape(6)) == keys and store.get(keys, Shape(6)) == {}

    drawn = items(3, num_draws=2, entropy=True)
    store.put(drawn, WHO, draw_seed=4)
    assert store.missing(keys, Shape(3, 2, 4)) == [] and len(store.missing(keys, Shape(3, 2, 5))) == 3
    assert same(store.get(keys, Shape(3, 2, 4))[keys[2]], drawn[2][1])
    assert store.get(keys, Shape(2))[keys[2]].num_draws == 0, "the head of a row with draws is a head"
    assert store.shapes(WHO) == {Shape(5): 2, Shape(3, 2, 4): 3} and store.teachers() == [WHO] and len(store) == 5


def test_what_is_stored_stays(tmp_path):
    """Two processes that label the same text must not overwrite each other's rows under a running training."""
    store = SQLiteStore(tmp_path / "kd.sqlite")
    ((key, first),) = items(1)
    store.put([(key, first)], WHO)
    store.put([(key, some_row(seed=9))], WHO)
    assert same(store.get([key], Shape(5))[key], first)
    store.close()
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        len(store)
    assert len(SQLiteStore(tmp_path / "kd.sqlite", read_only=True)) == 1


def damage(path, place=20):
    """One bit of one row."""
    with sqlite3.connect(path) as connection:
        number, data = connection.execute("SELECT id, data FROM rows ORDER BY id LIMIT 1").fetchone()
        data = bytearray(data)
        data[place] ^= 4
        connection.execute("UPDATE rows SET data = ? WHERE id = ?", (bytes(data), number))
    connection.close()


def test_damaged_row_is_dropped_and_asked_for_again(tmp_path):
    """A bit that falls over on disk would otherwise be a teacher's opinion, in every epoch."""
    ids, mask = padded_batch()
    teacher = AskedTeacher()
    clean = CachedTeacher(teacher, SQLiteStore(tmp_path / "kd.sqlite"), k=8).signal(ids, mask)
    damage(tmp_path / "kd.sqlite")
    reader = CachedTeacher(None, SQLiteStore(tmp_path / "kd.sqlite", read_only=True))
    with pytest.raises(StoreError, match="lacks 1 of the 6 rows"):
        reader.signal(ids, mask)
    again = CachedTeacher(teacher, SQLiteStore(tmp_path / "kd.sqlite"), k=8)
    signal = again.signal(ids, mask)
    assert (again.statistics.corrupt, again.statistics.asked, again.statistics.found) == (1, 1, 5)
    assert torch.equal(signal.top_ids, clean.top_ids)
    torch.testing.assert_close(signal.top_logprobs, clean.top_logprobs, atol=1e-3, rtol=1e-3)
    again.signal(ids, mask)
    assert again.statistics.corrupt == 1, "the new row is whole"


def test_row_under_another_key_is_found_out(tmp_path):
    """Its bytes are whole; they are an answer to another question."""
    store = SQLiteStore(tmp_path / "kd.sqlite")
    (one, _), (two, _) = rows = items(2)
    store.put(rows, WHO)
    with sqlite3.connect(tmp_path / "kd.sqlite") as connection:
        connection.execute("UPDATE rows SET key = ? WHERE key = ?", (b"elsewhere", one))
        connection.execute("UPDATE rows SET key = ? WHERE key = ?", (one, two))
    connection.close()
    assert store.get([one], Shape(5)) == {} and store.num_corrupt == 1


def test_files_of_others_are_left_alone(tmp_path):
    """A mistyped path must not put tables into somebody's database."""
    with sqlite3.connect(tmp_path / "photos.db") as connection:
        connection.execute("CREATE TABLE photos (id)")
    connection.close()
    with pytest.raises(StoreError, match="another program"):
        SQLiteStore(tmp_path / "photos.db")
    (tmp_path / "text.sqlite").write_text("no database at all, but long enough to have a header" * 20)
    with pytest.raises(StoreError, match="text.sqlite is no SQLite file: choose another path"):
        SQLiteStore(tmp_path / "text.sqlite")
    SQLiteStore(tmp_path / "broken.sqlite").close()
    whole = (tmp_path / "broken.sqlite").read_bytes()
    (tmp_path / "broken.sqlite").write_bytes(whole[:100] + b"\xff" * (len(whole) - 100))  # the header alone is sound
    with pytest.raises(StoreError, match="damaged beyond single rows.*move it away and build it anew"):
        SQLiteStore(tmp_path / "broken.sqlite")
    SQLiteStore(tmp_path / "old.sqlite").close()
    with sqlite3.connect(tmp_path / "old.sqlite") as connection:
        connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(StoreError, match="format 99, this version reads 1"):
        SQLiteStore(tmp_path / "old.sqlite")
    with pytest.raises(StoreError, match="is not there"):
        SQLiteStore(tmp_path / "none.sqlite", read_only=True)
    with pytest.raises(StoreError, match="no KD store"):
        open_store("./nothing/here")


def test_full_disk_stops_the_storing_and_not_the_training(tmp_path, caplog):
    """A run of days must not end because a cache has no room; what is in it stays readable."""
    store = SQLiteStore(tmp_path / "kd.sqlite")
    pages = store._connection().execute("PRAGMA page_count").fetchone()[0]
    store._connection().execute(f"PRAGMA max_page_count={pages + 2}")
    with pytest.raises(StoreFull, match="free some space"):
        store.put(items(40, tokens=400), WHO)
    assert len(store) == 0
    teacher = CachedTeacher(AskedTeacher(), store, k=20)
    for _ in range(2):
        assert torch.isfinite(teacher.signal(text_batch(3, 200)).top_logprobs).all()
    assert teacher.statistics.unstored == teacher.statistics.asked == 6
    assert caplog.text.count("used but not kept") == 1


def test_locked_store_says_who_to_look_for(tmp_path):
    """'database is locked' sends people to delete the file that another run is writing."""
    path = tmp_path / "kd.sqlite"
    store = SQLiteStore(path, timeout=0.05)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreBusy, match="Another process has been writing"):
        store.put(items(1), WHO)
    assert len(store) == 0, "readers go on"
    other.execute("ROLLBACK")
    other.close()
    store.put(items(1), WHO)
    assert len(store) == 1


def write_rows(path, start):
    store = SQLiteStore(path)
    for place in range(start, start + 30):
        store.put([(content_key(IDENTITY, np.array([place, 1])), some_row(seed=place))], WHO)
    store.close()


def test_two_processes_write_one_store(tmp_path):
    """Every GPU of a machine has its own process, and all of them ask."""
    path = tmp_path / "kd.sqlite"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_rows, args=(path, start)) for start in (0, 15)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    store = SQLiteStore(path)
    assert len(store) == 45 and len(store.sample(99, WHO)) == 45 and store.check_integrity() == "ok"


class StoredRows(torch.utils.data.Dataset):
    def __init__(self, store, keys):
        self.store, self.keys = store, keys

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, place):
        row = self.store.get([self.keys[place]], Shape(5))[self.keys[place]]
        return torch.from_numpy(row.top_ids.astype(np.int64)), os.getpid()


def test_store_reads_in_data_loader_workers(tmp_path):
    """A connection that crosses a fork drops the parent's locks, and the file is torn at some later write."""
    store = SQLiteStore(tmp_path / "kd.sqlite")
    rows = items(8)
    store.put(rows, WHO)
    loader = DataLoader(
        StoredRows(store, [key for key, _ in rows]), batch_size=2, num_workers=1, multiprocessing_context="fork"
    )
    batches = list(loader)
    assert os.getpid() not in torch.cat([pids for _, pids in batches])
    expected = torch.from_numpy(np.stack([row.top_ids for _, row in rows]).astype(np.int64))
    assert torch.equal(torch.cat([ids for ids, _ in batches]), expected)
    store.put(items(9), WHO)
    assert len(store) == 9, "the parent's connection still works"
    assert len(pickle.loads(pickle.dumps(store))) == 9, "as a spawned worker gets it"


def test_kill_9_loses_no_acknowledged_row(tmp_path):
    """Machines that can be taken away at any second are the cheap ones."""
    for number in range(3):
        result = kill_writers(tmp_path / "kd.sqlite", number, 0.3, some_row(tokens=200, k=20))
        assert result["acknowledged"] > 0
        assert (result["lost"], result["corrupt"], result["sound"]) == (0, 0, 1)


# -- the teacher around a teacher


def test_cached_teacher_says_what_its_teacher_says(tmp_path):
    """Positions, padding, rounding: a store that shifts an answer by one teaches the past."""
    ids, mask = padded_batch()
    plain = AskedTeacher().signal(ids, mask)
    logits = plain.logits(torch.arange(ids.numel())).view(*ids.shape, -1)
    values, top = logits.log_softmax(-1).topk(VOCAB)
    expected = SparseSignal(top, values, vocab_size=VOCAB, positions=plain.positions)
    cached = CachedTeacher(AskedTeacher(), SQLiteStore(tmp_path / "kd.sqlite"), k=VOCAB)
    assert isinstance(cached, Teacher)
    cached.check()
    cached.teacher.rows = 0
    student = torch.randn(ids.numel(), VOCAB)
    index = torch.arange(ids.numel())
    # the last token of each row speaks about none that is there
    speaks = (plain.positions < plain.positions.max(1, keepdim=True).values).flatten()
    speaks[[0, 1, 2]] = True
    for _ in range(2):
        signal = cached.signal(ids, mask)
        loss = signal.loss(student, index)
        torch.testing.assert_close(loss[speaks], expected.loss(student, index)[speaks], atol=2e-3, rtol=1e-3)
        assert torch.isfinite(signal.top_logprobs).all()
    assert cached.teacher.rows == 6 and cached.statistics.found == 6


def test_only_missing_rows_are_asked_for_and_padding_is_no_difference(tmp_path):
    """The same text behind other pads is the same question; asked again, each epoch would cost a labelling."""
    teacher = AskedTeacher()
    cached = CachedTeacher(teacher, SQLiteStore(tmp_path / "kd.sqlite"), k=8)
    text = text_batch(3, 12)
    first = cached.signal(text[:2])
    padded = torch.full((4, 15), PAD)
    padded[:3, 3:], padded[3, :12] = text, text[0]
    signal = cached.signal(padded, (padded != PAD).long())
    assert teacher.rows == 3
    assert torch.equal(signal.top_logprobs[:2, 3:14], first.top_logprobs[:, :11])
    assert torch.equal(signal.top_ids[3, :11], first.top_ids[0, :11])
    statistics = cached.statistics
    assert (statistics.found, statistics.asked, statistics.repeated) == (2, 3, 1)


def test_rows_that_say_nothing_are_no_trouble(tmp_path):
    """A block that is all padding, or one token long, has nothing to look up."""
    cached = CachedTeacher(AskedTeacher(), SQLiteStore(tmp_path / "kd.sqlite"), k=8)
    ids = text_batch(2, 6)
    mask = torch.tensor([[0] * 6, [0, 0, 1, 0, 0, 0]])
    loss = cached.signal(ids, mask).loss(torch.randn(12, VOCAB), torch.arange(12))
    assert (loss == 0).all() and cached.teacher.rows == 0


def test_two_teachers_never_share_a_store_entry(tmp_path):
    """The first LatentForge filed them under the kind of backend: two teachers, one entry."""
    path = tmp_path / "kd.sqlite"
    one, two = AskedTeacher(), AskedTeacher(seed=8)
    ids = text_batch(2, 12)
    signals = [CachedTeacher(teacher, SQLiteStore(path), k=8).signal(ids) for teacher in (one, two, one, two)]
    assert (one.rows, two.rows) == (2, 2)
    assert not torch.equal(signals[0].top_ids, signals[1].top_ids)
    assert torch.equal(signals[0].top_logprobs, signals[2].top_logprobs)
    with pytest.raises(StoreError, match="rows of 2 teachers.*give the teacher that is meant"):
        CachedTeacher(None, SQLiteStore(path))
    assert CachedTeacher(None, SQLiteStore(path), identity=identity_of(two)).signal(ids).vocab_size == VOCAB


def test_without_a_teacher_missing_rows_are_counted(tmp_path):
    """'KeyError' after an hour of training does not say that the block size is another."""
    path = tmp_path / "kd.sqlite"
    CachedTeacher(AskedTeacher(), SQLiteStore(path), k=8).signal(text_batch(2, 12))
    reader = CachedTeacher(None, open_store(path, read_only=True))
    reader.check()
    assert reader.shape == Shape(8) and reader.num_tokens == VOCAB and reader.capabilities.form == "sparse"
    with pytest.raises(StoreError, match="lacks 2 of the 4 rows of this batch.*build_kd_cache.py"):
        reader.signal(text_batch(4, 12))
    reader.check_tokenizer(byte_tokenizer())
    (tmp_path / "empty").mkdir()
    SQLiteStore(tmp_path / "empty" / "kd.sqlite").close()
    with pytest.raises(StoreError, match="holds no rows"):
        CachedTeacher(None, SQLiteStore(tmp_path / "empty" / "kd.sqlite"))


class HalfTeacher(AskedTeacher):
    """An endpoint that forgets the log-probabilities of one row."""

    def signal(self, input_ids, attention_mask=None):
        dense = super().signal(input_ids, attention_mask)
        values, ids = dense.logits(torch.arange(input_ids.numel())).log_softmax(-1).topk(8)
        values, ids = values.view(*input_ids.shape, 8), ids.view(*input_ids.shape, 8)
        values[-1, 3] = -9999.0
        return SparseSignal(ids, values, vocab_size=VOCAB, positions=dense.positions)


def test_failures_leave_nothing_in_the_store(tmp_path):
    """A stored failure is a hole in the training data for good."""
    store = SQLiteStore(tmp_path / "kd.sqlite")
    with pytest.raises(ConnectionError):
        CachedTeacher(AskedTeacher(fail=True), store, k=8).signal(text_batch(2, 12))
    assert len(store) == 0
    half = CachedTeacher(HalfTeacher(), store, k=8)
    signal = half.signal(text_batch(3, 12))
    assert torch.isfinite(signal.top_logprobs).all() and (signal.top_logprobs[-1, 3] < -1e3).all()
    assert len(store) == 2 and half.statistics.unanswered == 1
    with pytest.raises(ValueError, match="gives 8 entries a token.*asked for 9"):
        CachedTeacher(HalfTeacher(), store, k=9).signal(text_batch(3, 12))


def test_draws_of_a_teacher_are_kept_with_their_entropy(tmp_path):
    """Entries that are draws read as most likely ones would make the unlikely likely."""

    class DrawingTeacher(AskedTeacher):
        def signal(self, input_ids, attention_mask=None):
            dense = super().signal(input_ids, attention_mask)
            logprobs = dense.logits(torch.arange(input_ids.numel())).log_softmax(-1).view(*input_ids.shape, -1)
            values, ids = logprobs.topk(6)
            left = (1 - values[..., :4].exp().sum(-1, keepdim=True)).log() - np.log(2)
            values = torch.cat([values[..., :4], left.expand(-1, -1, 2)], -1)
            entropy = -(logprobs.exp() * logprobs).sum(-1)
            return SparseSignal(ids, values, vocab_size=VOCAB, num_draws=2, entropy=entropy)

    ids = text_batch(2, 12)
    teacher = DrawingTeacher()
    plain = teacher.signal(ids)
    path = tmp_path / "kd.sqlite"
    for _ in range(2):
        cached = CachedTeacher(teacher, SQLiteStore(path), k=6, num_draws=2, draw_seed=3)
        signal = cached.signal(ids)
        assert signal.num_draws == 2 and torch.equal(signal.top_ids[:, :11], plain.top_ids[:, :11].int())
        torch.testing.assert_close(signal.top_logprobs[:, :11], plain.top_logprobs[:, :11], atol=4e-3, rtol=1e-3)
        torch.testing.assert_close(signal.entropy[:, :11], plain.entropy[:, :11], atol=2e-3, rtol=1e-3)
    assert cached.statistics.found == 2


def test_a_full_distribution_is_kept_as_its_head_and_a_texts_own_draws(tmp_path):
    """Draws that changed with the batch, or with what was asked before, would make a warm run another run."""
    ids = text_batch(2, 12)
    teacher = AskedTeacher()
    logprobs = teacher.signal(ids).logits(torch.arange(ids.numel())).log_softmax(-1).view(*ids.shape, -1)
    together = CachedTeacher(teacher, SQLiteStore(tmp_path / "a.sqlite"), k=6, num_draws=2).signal(ids)
    assert together.num_draws == 2 and together.entropy is not None
    head = logprobs.topk(4)
    assert torch.equal(together.top_ids[:, :11, :4].long(), head.indices[:, :11])
    torch.testing.assert_close(
        together.entropy[:, :11], -(logprobs.exp() * logprobs).sum(-1)[:, :11], atol=2e-3, rtol=1e-3
    )
    alone = CachedTeacher(AskedTeacher(), SQLiteStore(tmp_path / "b.sqlite"), k=6, num_draws=2).signal(ids[1:])
    assert torch.equal(alone.top_ids[:, :11], together.top_ids[1:, :11])
    again = CachedTeacher(None, SQLiteStore(tmp_path / "a.sqlite")).signal(ids)
    assert torch.equal(again.top_ids[:, :11], together.top_ids[:, :11])


def test_stored_numbers_do_not_depend_on_the_students_precision(tmp_path):
    """A bf16 training would fill a float32 teacher's store with bf16 answers."""
    ids = text_batch(2, 12)
    plain = CachedTeacher(AskedTeacher(), SQLiteStore(tmp_path / "a.sqlite"), k=8).signal(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = CachedTeacher(AskedTeacher(), SQLiteStore(tmp_path / "b.sqlite"), k=8).signal(ids)
    assert torch.equal(plain.top_logprobs, mixed.top_logprobs)


def trained(tmp_path, teacher, **kwargs):
    torch.manual_seed(0)
    trainer = KDTrainer(
        model=tiny_student(),
        args=tiny_args(KDConfig, tmp_path, **kwargs),
        teacher=teacher,
        train_dataset=ragged_rows(16),
        eval_dataset=ragged_rows(7),
        data_collator=PatchCollator(4),
    )
    trainer.train()
    return trainer


def test_training_from_a_warm_store_gives_the_same_losses(tmp_path):
    """Cold, warm, or without any teacher: if these differ, nobody can say which run a result came from."""
    path = tmp_path / "kd.sqlite"
    runs = []
    for teacher in (AskedTeacher(), AskedTeacher(), None):
        cached = CachedTeacher(teacher, SQLiteStore(path), k=12 if teacher else None)
        trainer = trained(tmp_path, cached, max_steps=4)
        runs.append(([(entry["loss"], entry["kd"]) for entry in train_log(trainer)], cached, trainer))
    assert runs[0][0] == runs[1][0] == runs[2][0]
    assert runs[0][1].statistics.asked == 16 and runs[1][1].statistics.asked == 0
    logged = [entry for entry in runs[2][2].state.log_history if "kd_store_found" in entry]
    assert [entry["kd_store_found"] for entry in logged] == [16]


def test_training_without_a_teacher_stops_at_the_first_missing_row(tmp_path):
    """Training on silently, without distillation, is found out when the student is finished."""
    path = tmp_path / "kd.sqlite"
    CachedTeacher(AskedTeacher(), SQLiteStore(path), k=8).signal(text_batch(2, 12))
    with pytest.raises(StoreError, match="lacks 4 of the 4 rows"):
        trained(tmp_path, CachedTeacher(None, SQLiteStore(path, read_only=True)))


def test_store_prefetches_for_a_remote_teacher(tmp_path):
    """The thread that asks ahead uses the connection that the main thread opened."""
    teacher = AskedTeacher()
    teacher.capabilities = TeacherCapabilities(form="dense", remote=True)
    cached = CachedTeacher(teacher, SQLiteStore(tmp_path / "kd.sqlite"), k=8)
    assert cached.capabilities.remote
    trained(tmp_path, cached, teacher_prefetch=2)
    assert cached.statistics.asked >= 12


# -- labelling


def blocks(rows=10):
    return Dataset.from_list(ragged_rows(rows)).with_format("numpy")


def test_labelling_goes_on_where_it_was_killed(tmp_path):
    """A day of a server's time must not be bought twice."""

    for target in ("kd.sqlite", "shards"):
        asked = []
        for rows in (6, 10, 10):
            teacher = AskedTeacher()
            if target == "shards":
                store = ParquetFolder(tmp_path / target, *_whose(teacher), {"data": "text"})
            else:
                store = SQLiteStore(tmp_path / target)
            statistics = label(blocks(rows), TeacherPool([teacher]), store, Shape(8), batch_size=2, rows_per_shard=3)
            asked.append(teacher.rows)
            assert statistics.found + statistics.asked == rows
        assert asked == [6, 4, 0]


def _whose(teacher):
    return StoredTeacher(identity_of(teacher), VOCAB, VOCAB), Shape(8)


def test_parquet_reads_as_sqlite_does(tmp_path):
    """The trainer reads either; which one must not be seen in a loss."""
    ids, mask = padded_batch()
    teacher = AskedTeacher()
    sqlite = SQLiteStore(tmp_path / "kd.sqlite")
    label(blocks(), TeacherPool([teacher]), sqlite, Shape(8))
    folder = ParquetFolder(tmp_path / "shards", *_whose(teacher), {"data": "text"})
    label(blocks(), TeacherPool([teacher]), folder, Shape(8), rows_per_shard=4)
    assert sorted(folder.manifest["shards"]) == [f"data/train-0000{i}.parquet" for i in range(3)]

    shards = ParquetStore(tmp_path / "shards", cache_dir=str(tmp_path / "datasets"))
    assert len(shards) == len(sqlite) == 10 and not shards.writable
    keys = [key for key, _ in sqlite.sample(10, shards.teacher)]
    for k in (8, 3):
        ours, theirs = shards.get(keys, Shape(k)), sqlite.get(keys, Shape(k))
        assert ours.keys() == theirs.keys() and all(same(ours[key], theirs[key]) for key in ours)
    assert shards.missing([*keys, bytes(32)], Shape(8)) == [bytes(32)] and shards.get(keys, Shape(9)) == {}
    signals = [CachedTeacher(None, store, k=8).signal(ids, mask) for store in (shards, sqlite)]
    assert torch.equal(signals[0].top_logprobs, signals[1].top_logprobs)

    copy = SQLiteStore(tmp_path / "copy.sqlite")
    assert copy_rows(shards.stream(), copy, shards.teacher, shards.shape) == 10
    assert all(same(copy.get([key], Shape(8))[key], row) for key, row in sqlite.sample(10, shards.teacher))


def test_half_a_shard_is_no_shard(tmp_path):
    """A Parquet file without its footer is lost whole: it must never stand under a shard's name."""
    teacher = AskedTeacher()
    folder = ParquetFolder(tmp_path / "shards", *_whose(teacher), {"data": "text"})
    label(blocks(4), TeacherPool([teacher]), folder, Shape(8), rows_per_shard=4)
    leftover = tmp_path / "shards" / "data" / "train-00001.parquet.tmp"
    leftover.write_bytes(b"PAR1 and then the machine went away")
    again = ParquetFolder(tmp_path / "shards", *_whose(teacher), {"data": "text"})
    assert not leftover.exists() and again.has(0) and not again.has(1)
    for other in ((_whose(AskedTeacher(seed=8)), "text"), (_whose(teacher), "other text")):
        with pytest.raises(StoreError, match=r"of another (teacher \(identity.name|source \(data) was"):
            ParquetFolder(tmp_path / "shards", *other[0], {"data": other[1]})
    with pytest.raises(StoreError, match="is a file, and Parquet shards need a folder"):
        ParquetFolder(leftover.with_name("train-00000.parquet"), *_whose(teacher), {})
    with pytest.raises(StoreError, match="is a folder: give a file, as .*kd_cache.sqlite"):
        SQLiteStore(tmp_path / "shards")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(StoreError, match="not empty"):
        ParquetFolder(tmp_path / "mine", *_whose(teacher), {})
    with pytest.raises(StoreError, match="manifest.json is missing"):
        ParquetStore(tmp_path / "mine")


class FlakyTeacher(AskedTeacher):
    """A remote teacher whose server is away between its calls number `down` and `up`; a check is a call too."""

    def __init__(self, down, up, **kwargs):
        super().__init__(**kwargs)
        self.capabilities = TeacherCapabilities(remote=True)
        self.down, self.up, self.calls = down, up, 0

    def _call(self):
        self.calls += 1
        if self.down <= self.calls < self.up:
            raise ConnectionError("server away")

    def check(self):
        self._call()

    def signal(self, input_ids, attention_mask=None):
        self._call()
        return super().signal(input_ids, attention_mask)


def test_lost_teacher_drops_out_and_returns(tmp_path, monkeypatch):
    """One server of four that restarts must cost its own share of the time, not the labelling."""
    steady, flaky = FlakyTeacher(99, 99), FlakyTeacher(2, 5)
    pool = TeacherPool([steady, flaky], retry_after=0.01)
    store = SQLiteStore(tmp_path / "kd.sqlite")
    turn = threading.Barrier(2, timeout=10)
    plain = HFTeacher.signal

    def both(teacher, ids, mask=None):  # neither teacher may do all the work before the other has begun
        if teacher.calls == 1:
            turn.wait()
        return plain(teacher, ids, mask)

    monkeypatch.setattr(HFTeacher, "signal", both)
    statistics = label(blocks(60), pool, store, Shape(8), batch_size=1)
    assert statistics.asked == len(store) == 60 and pool.num_lost == 1
    assert flaky.calls > 5, "it has worked again after its return"


def test_a_teacher_that_is_away_at_the_start_joins_later(tmp_path, caplog):
    """A machine that boots a minute later than the labelling would stay idle for the days that it takes; another
    model's must not join."""
    late, closed, tries = FlakyTeacher(99, 99), [], []
    late.close = lambda: closed.append(True)

    def build():
        tries.append(True)
        if len(tries) < 3:
            raise ConnectionError("server away")
        return late

    class Waiting(FlakyTeacher):
        def signal(self, input_ids, attention_mask=None):
            if input_ids.shape == (1, 32) or late.calls > 2:  # the comparison, else not before the other has worked
                return super().signal(input_ids, attention_mask)
            time.sleep(0.05)
            return super().signal(input_ids, attention_mask)

    first, store = Waiting(999, 999), SQLiteStore(tmp_path / "kd.sqlite")
    other = FlakyTeacher(99, 99, seed=8)
    with TeacherPool([first], [build, lambda: other], retry_after=0.01) as pool:
        statistics = label(blocks(60), pool, store, Shape(8), batch_size=1)
        assert statistics.asked == len(store) == 60 and late.rows > 1 and pool.teachers == [first, late]
    assert closed and other.rows == 0 and "has come and is left out: The teachers of a pool must be one" in caplog.text


def test_a_late_teacher_joins_while_another_is_lost():
    """Where the first server had died, none that came later was let in, and the whole work hung on the others."""
    lost, steady, late = FlakyTeacher(1, 999), FlakyTeacher(99, 99), FlakyTeacher(99, 99)
    with TeacherPool([lost, steady], [lambda: late], retry_after=0.01) as pool:
        end = time.monotonic() + 5
        while late not in pool.teachers and time.monotonic() < end:
            time.sleep(0.01)
        assert pool.teachers == [lost, steady, late]


def test_a_text_in_two_shards_is_asked_about_once(tmp_path):
    """Boilerplate stands in many shards, and would be paid for in each, after a restart too."""
    rows = ragged_rows(4)
    twice = Dataset.from_list([*rows, *rows]).with_format("numpy")
    teacher = AskedTeacher()
    for _ in range(2):
        folder = ParquetFolder(tmp_path / "shards", *_whose(teacher), {})
        statistics = label(twice, TeacherPool([teacher]), folder, Shape(8), rows_per_shard=4)
        assert teacher.rows == 4
        (tmp_path / "shards" / "data" / "train-00001.parquet").unlink()
    assert statistics.repeated == 4 and statistics.asked == 0


def test_work_that_always_fails_ends_the_labelling(tmp_path):
    """A text that no server takes must not be tried for ever; a local teacher that raises does not come back."""
    store = SQLiteStore(tmp_path / "kd.sqlite")
    with pytest.raises(ConnectionError, match="went away"):
        label(blocks(), TeacherPool([AskedTeacher(fail=True)]), store, Shape(8))

    class Refusing(FlakyTeacher):
        def signal(self, input_ids, attention_mask=None):
            raise ValueError("token id out of vocabulary")

    with pytest.raises(ValueError, match="out of vocabulary"):
        label(blocks(), TeacherPool([Refusing(9, 9), Refusing(9, 9)], retry_after=0.001), store, Shape(8))
    away = [FlakyTeacher(1, 10**9) for _ in range(2)]
    with pytest.raises(ConnectionError, match="server away"):
        label(blocks(), TeacherPool(away, retry_after=0.01, patience=0.1, max_failures=10**6), store, Shape(8))
    assert len(store) == 0
    with pytest.raises(ValueError, match="must be one and the same"):
        label(blocks(), TeacherPool([AskedTeacher(), AskedTeacher(seed=8)]), store, Shape(8))
    # nobody else is there, and it would answer the same: no waiting for a server that is not away
    with pytest.raises(ValueError, match="out of vocabulary"):
        label(blocks(), TeacherPool([Refusing(9, 9)], retry_after=60, patience=600), store, Shape(8))


def test_servers_of_different_weights_do_not_share_a_store():
    """Of a server one knows what was declared: with other weights behind one url, every second row would be another
    model's."""
    equal, other = [AskedTeacher(), AskedTeacher()], AskedTeacher(seed=8)
    check_equal_answers(equal[:1])
    check_equal_answers(equal)
    equal[1].model.lm_head.weight.data += 1e-3 * torch.randn_like(equal[1].model.lm_head.weight)  # other kernels
    check_equal_answers(equal)
    with pytest.raises(ValueError, match=r"answer differently: .*\d+% are the same, .* differ by .* nats"):
        check_equal_answers([*equal, other])


def test_labelling_again_mends_a_damaged_row(tmp_path, caplog):
    """Training says "label the same data", and labelling that counts keys alone says that all is there."""
    teacher, store = AskedTeacher(), SQLiteStore(tmp_path / "kd.sqlite")
    label(blocks(4), TeacherPool([teacher]), store, Shape(8))
    store.close()
    damage(tmp_path / "kd.sqlite")
    reader = SQLiteStore(tmp_path / "kd.sqlite", read_only=True)
    keys = [key for key, _ in SQLiteStore(tmp_path / "kd.sqlite", read_only=True).sample(9, _whose(teacher)[0])]
    assert len(keys) == 3 and "counts as missing: run build_kd_cache.py again" in caplog.text
    reader.close()
    again = label(blocks(4), TeacherPool([teacher]), SQLiteStore(tmp_path / "kd.sqlite"), Shape(8))
    assert (again.asked, again.found) == (1, 3)


def test_what_a_store_does_not_hold_is_not_trained_on_in_silence(tmp_path):
    """A flag that changes nothing looks like a result."""
    teacher, store = AskedTeacher(), SQLiteStore(tmp_path / "kd.sqlite")
    label(blocks(4), TeacherPool([teacher]), store, Shape(6, 2, 1))
    assert CachedTeacher(None, store).shape == CachedTeacher(None, store, num_draws=2).shape == Shape(6, 2, 1)
    with pytest.raises(StoreError, match="no rows with 0 draws, but .*num_draws=2.*drop `--kd_num_draws`"):
        CachedTeacher(None, store, num_draws=0)
    with pytest.raises(StoreError, match="holds 8 entries a token, asked for 32: pass `--kd_top_k 8`"):
        CachedTeacher(None, store, k=32)
    cached = CachedTeacher(None, store)
    for _ in range(2):  # a second time too: nobody waits for an answer that nobody asks for
        with pytest.raises(StoreError, match="is no teacher to ask"):
            cached.signal(torch.full((1, 9), 5))


def test_a_shard_that_was_lost_is_labelled_again(tmp_path):
    """The manifest alone would call the work done, and training could not read it."""
    teacher = AskedTeacher()
    folder = ParquetFolder(tmp_path / "shards", *_whose(teacher), {})
    label(blocks(8), TeacherPool([teacher]), folder, Shape(8), rows_per_shard=4)
    asked, lost = teacher.rows, tmp_path / "shards" / "data" / "train-00001.parquet"
    for break_it in (lost.unlink, lambda: lost.write_bytes(lost.read_bytes()[:-9])):
        break_it()
        again = ParquetFolder(tmp_path / "shards", *_whose(teacher), {})
        assert again.has(0) and not again.has(1)
        assert label(blocks(8), TeacherPool([teacher]), again, Shape(8), rows_per_shard=4).asked == 4
    assert teacher.rows == asked + 8 and len(ParquetStore(tmp_path / "shards")) == 8


def test_verify_finds_rows_that_are_no_longer_true(tmp_path, caplog):
    """A server whose weights were swapped under the same name answers as if nothing had happened."""
    teacher = AskedTeacher()
    store = SQLiteStore(tmp_path / "kd.sqlite")
    label(blocks(), TeacherPool([teacher]), store, Shape(8))
    good = verify_store(store, teacher, 5)
    assert (good.rows, good.beyond) == (5, 0) and good.largest < 0.02 and good.other_ids < 0.02
    teacher.identity = identity_of(teacher)
    with torch.no_grad():
        teacher.model.lm_head.weight.mul_(1.05)
    swapped = verify_store(store, teacher, 5)
    assert swapped.beyond > 100 and swapped.largest > 0.05, swapped.describe()
    with pytest.raises(StoreError, match="no row of this teacher"):
        verify_store(store, AskedTeacher(seed=8))


def test_hit_statistics_are_logged(tmp_path, caplog):
    """Who sees 0 % knows that the block size changed; who sees nothing pays for the teacher again."""
    cached = CachedTeacher(AskedTeacher(), SQLiteStore(tmp_path / "kd.sqlite"), k=8)
    with caplog.at_level(logging.INFO, logger="trainers.callbacks"):
        trained(tmp_path, cached)
    assert "12 rows wanted, 0.0% without the teacher (0 found, 12 asked)" in caplog.text
