"""What is read from outside, written and then broken: it comes back as it was written, or an error says what is wrong.

An error that a person can mend is one that `trainers.command_line.run` prints in words; any other exception is a
crash. `cases` of a test's properties (`--junitxml`) are the number that were tried.
"""

import dataclasses
import json
import math
import os
import sqlite3
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel
from transformers.utils import logging as transformers_logging

from modeling_latentforge import (
    LatentForgeAutoencoderConfig,
    LatentForgeConfig,
    LatentForgeIdeaConfig,
    LatentForgeWireConfig,
)
from modeling_latentforge.configuration_latentforge import LatentHeadConfig
from modeling_latentforge.latent_packet import KINDS, Packet
from modeling_latentforge.latent_quantizer import LatentQuantizer
from tests.conftest import tiny_autoencoder
from tests.trainers.training_helpers import ragged_rows, tiny_args
from trainers import AEConfig, AETrainer, DataArguments, PatchCollator
from trainers.checkpoints import SUMS, check_checkpoint
from trainers.command_line import is_users
from trainers.data import read_documents
from trainers.tasks import load_task
from trainers.teachers.base import TeacherIdentity
from trainers.teachers.store import Shape, SQLiteStore, StoredTeacher
from trainers.teachers.store_rows import StoredRow, content_key, decode_row, encode_row


hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")

QUICK = 20  # cases of each kind; ten thousand of all in the slow test
SLOW = {
    "packets": 2500,
    "rows": 2000,
    "stores": 500,
    "configs": 2000,
    "jsonl": 1000,
    "tasks": 1500,
    "checkpoints": 500,
}


class Documented(Exception):
    """The reader said in words what is wrong."""


def reading(read: Callable[[], Any]) -> Any:
    """What was read.

    Raises:
        Documented: it was refused as it should be, with a message.
    """
    try:
        return read()
    except Exception as error:
        if not is_users(error) or not str(error).strip():
            raise
        raise Documented(str(error)) from error


# -- breaking

damages = st.one_of(
    st.just(("none", 0, b"")),
    st.tuples(
        st.sampled_from(["flip", "cut", "drop"]), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=1)
    ),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
)


def broken(data: bytes, damage: tuple[str, float, bytes]) -> bytes:
    kind, where, more = damage
    place = int(where * len(data))
    if kind == "flip" and data:
        return data[:place] + bytes([data[place] ^ (more[0] or 1)]) + data[place + 1 :]
    if kind == "cut":
        return data[:place]
    if kind == "drop":
        return data[:place] + data[place + 1 + more[0] % 4 :]
    return data[:place] + more + data[place:] if kind == "insert" else data


numbers = st.one_of(st.floats(width=32), st.floats(-4, 4, width=32))
words = st.text(max_size=12)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=5,
)


# -- packets

packets = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(KINDS),
        "levels": st.lists(st.integers(2, 70), min_size=1, max_size=6),
        "latents": st.integers(1, 5).flatmap(
            lambda size: st.lists(st.lists(numbers, min_size=size, max_size=size), min_size=1, max_size=4)
        ),
        "damage": damages,
        "payload": st.binary(max_size=64),
    }
)


def check_packet(case: dict[str, Any]) -> None:
    latents = torch.tensor(case["latents"])
    torch.manual_seed(0)
    quantizer = LatentQuantizer(case["kind"], latents.shape[1], case["levels"])
    foreign = Packet(case["kind"], len(latents), quantizer.numbers, quantizer.identity, case["payload"])
    try:
        made = reading(lambda: quantizer.unpack(foreign))
        assert made.shape == latents.shape and made.isfinite().all()
    except Documented:
        pass
    try:
        packet = reading(lambda: quantizer.pack(latents))
    except Documented:
        assert not quantizer(latents).isfinite().all() or not latents.isfinite().all()
        return
    data = packet.to_bytes()
    received = broken(data, case["damage"])
    try:
        again = reading(lambda: Packet.from_bytes(received))
    except Documented:
        assert received != data
        return
    assert received == data and again == packet
    assert torch.equal(reading(lambda: quantizer.unpack(again)), quantizer(latents).detach())


# -- what a teacher said

IDS = st.integers(0, 2**32 - 1)
rows = st.tuples(st.integers(1, 8), st.integers(1, 4)).flatmap(
    lambda size: st.fixed_dictionaries(
        {
            "token_ids": st.lists(IDS, min_size=size[0], max_size=size[0]),
            "top_ids": st.lists(IDS, min_size=(size[0] - 1) * size[1], max_size=(size[0] - 1) * size[1]),
            "logprobs": st.lists(
                st.one_of(st.floats(-20, 0), st.floats()),
                min_size=(size[0] - 1) * size[1],
                max_size=(size[0] - 1) * size[1],
            ),
            "entropy": st.one_of(st.none(), st.floats(0, 12)),
            "num_draws": st.integers(0, size[1]),
            "shape": st.just((size[0] - 1, size[1])),
            "damage": damages,
        }
    )
)


def row_of(case: dict[str, Any]) -> StoredRow:
    positions, k = case["shape"]
    return StoredRow.of(
        np.array(case["token_ids"], dtype=np.uint32),
        np.array(case["top_ids"], dtype=np.uint32).reshape(positions, k),
        np.array(case["logprobs"], dtype=np.float64).reshape(positions, k),
        None if case["entropy"] is None else np.full(positions, case["entropy"]),
        case["num_draws"],
    )


def equal_rows(first: StoredRow, second: StoredRow) -> bool:
    return (
        first.num_draws == second.num_draws
        and all(
            (a is None) == (b is None) and (a is None or (a.dtype == b.dtype and a.tobytes() == b.tobytes()))
            for a, b in ((getattr(x, n) for x in (first, second)) for n in ("token_ids", "tail", "entropy"))
        )
        and all(
            np.array_equal(a, b, equal_nan=a.dtype == np.float16)
            for a, b in ((getattr(x, n) for x in (first, second)) for n in ("top_ids", "top_logprobs"))
        )
    )


def check_row(case: dict[str, Any]) -> None:
    row = row_of(case)
    data = encode_row(row)
    assert equal_rows(decode_row(data), row)
    try:
        reading(lambda: decode_row(broken(data, case["damage"])))  # the store's checksum says whether it is the row
    except Documented:
        assert case["damage"][0] != "none"


TEACHER = StoredTeacher(TeacherIdentity("name", "revision", "float32", "tokenizer"), 2**20, None)
stores = st.fixed_dictionaries({"row": rows, "where": st.sampled_from(["row", "file"])})


def check_store(case: dict[str, Any]) -> None:
    row, damage = row_of(case["row"]), case["row"]["damage"]
    if not row.num_exact:
        return
    key, shape = content_key(TEACHER.identity, row.token_ids), Shape(row.num_exact, row.num_draws)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kd.sqlite")
        store = SQLiteStore(path)
        store.put([(key, row)], TEACHER)
        store.close()
        if case["where"] == "row":
            with sqlite3.connect(path) as connection:
                (data,) = connection.execute("SELECT data FROM rows").fetchone()
                connection.execute("UPDATE rows SET data = ?", (broken(data, damage),))
            connection.close()
            unchanged = broken(data, damage) == data
        else:
            data = path.read_bytes()
            path.write_bytes(broken(data, damage))
            unchanged = path.read_bytes() == data
        found: dict[bytes, StoredRow] = {}
        try:
            again = reading(lambda: SQLiteStore(path))
            try:
                found = reading(lambda: again.get([key], shape))
            finally:
                again.close()
        except Documented:
            assert not unchanged
        assert not unchanged or found
        assert not found or equal_rows(found[key], row)


# -- configurations

CONFIGS = {
    kind: sorted(field.name for field in dataclasses.fields(kind) if field.init)
    for kind in (
        LatentForgeAutoencoderConfig,
        LatentHeadConfig,
        LatentForgeConfig,
        LatentForgeWireConfig,
        LatentForgeIdeaConfig,
    )
}
small = st.one_of(
    json_values, st.integers(-2, 64), st.sampled_from(["tokens", "fsq", "energy", "parallel", "mean", "int8"])
)
configs = st.sampled_from(sorted(CONFIGS, key=lambda kind: kind.__name__)).flatmap(
    lambda kind: st.fixed_dictionaries(
        {
            "kind": st.just(kind),
            "fields": st.dictionaries(st.sampled_from(CONFIGS[kind]), small, max_size=3),
            "damage": damages,
        }
    )
)


def same_value(first: Any, second: Any) -> bool:
    if isinstance(first, float) and isinstance(second, float) and math.isnan(first):
        return math.isnan(second)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same_value, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same_value(first[name], second[name]) for name in first)
    return first == second


def check_config(case: dict[str, Any]) -> None:
    kind, fields = case["kind"], case["fields"]
    try:
        config = reading(lambda: kind.from_dict(fields))
    except Documented:
        return
    with tempfile.TemporaryDirectory() as folder:
        reading(lambda: config.save_pretrained(folder))
        again = reading(lambda: kind.from_pretrained(folder))
        assert same_value(again.to_dict(), config.to_dict())
        path = Path(folder, "config.json")
        path.write_bytes(broken(path.read_bytes(), case["damage"]))
        try:
            reading(lambda: kind.from_pretrained(folder))
        except Documented:
            assert case["damage"][0] != "none"


@pytest.mark.parametrize("dtype", [0.0, 5, "nn", {"head": "float32"}])
@pytest.mark.parametrize("kind", [LatentForgeAutoencoderConfig, LatentForgeIdeaConfig])
def test_a_dtype_that_is_none_is_refused_before_it_is_written(kind: type, dtype: Any):
    """Found here: 0.0 was written into config.json, which could not be read again."""
    with pytest.raises(Documented, match="`dtype` must be one of torch's"):
        reading(lambda: kind.from_dict({"dtype": dtype}))


# -- JSON lines

jsonl = st.fixed_dictionaries(
    {
        "rows": st.lists(
            st.one_of(
                st.fixed_dictionaries({"text": words}), st.fixed_dictionaries({"text": json_values}), json_values
            ),
            max_size=4,
        ),
        "ascii": st.booleans(),
        "damage": damages,
    }
)


def check_jsonl(case: dict[str, Any]) -> None:
    lines = [json.dumps(row, ensure_ascii=case["ascii"]) for row in case["rows"]]
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.jsonl")
        path.write_bytes(broken(data, case["damage"]))
        unchanged = path.read_bytes() == data
        try:
            texts = reading(lambda: [text for _, text in read_documents(DataArguments(data=str(path)))])
        except Documented:
            return
    if unchanged:
        assert texts == [row["text"] for row in case["rows"] if row["text"].strip()]


RECORDS: dict[str, dict[str, Any]] = {
    "squad": {"title": "a", "context": "b", "question": "c", "answers": {"text": ["d"]}, "id": "1"},
    "hotpotqa": {
        "question": "a",
        "answer": "b",
        "context": {"title": ["c"], "sentences": [["d", "e"]]},
        "supporting_facts": {"title": ["c"], "sent_id": [0]},
    },
    "sst2": {"sentence": "a", "label": 1},
    "agnews": {"text": "a", "label": 2},
    "trec": {"text": "a", "label_coarse_original": "ABBR"},
    "gsm8k": {"question": "a", "answer": "b\n#### 3"},
    "reasoning": {"question": "a", "answer": "b\n#### 3"},
    "samsum": {"dialogue": "a", "summary": "b", "id": 7},
    "dialogsum": {"dialogue": "a", "summaries": ["b"]},
    "text": {"text": "word " * 200},
    "custom": {"context": "a", "answers": ["b"], "labels": ["b", "c"], "steps": ["d"], "document": "e", "prompt": "f"},
}
tasks = st.sampled_from(sorted(RECORDS)).flatmap(
    lambda name: st.fixed_dictionaries(
        {
            "task": st.just(name),
            "changes": st.dictionaries(
                st.sampled_from(sorted(RECORDS[name])),
                st.one_of(json_values, st.lists(json_values, max_size=2), st.just("missing")),
                max_size=2,
            ),
            "whole": st.one_of(st.none(), json_values),
            "damage": damages,
        }
    )
)


def check_task(case: dict[str, Any]) -> None:
    name, record = case["task"], {**RECORDS[case["task"]], **case["changes"]}
    record = {field: value for field, value in record.items() if value != "missing"}
    value = record if case["whole"] is None else case["whole"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "train.jsonl")
        data = json.dumps(value).encode()
        path.write_bytes(broken(data, case["damage"]))
        try:
            examples = reading(lambda: load_task(name, "train", str(path)))
        except Documented:
            assert case["changes"] or case["whole"] is not None or path.read_bytes() != data
            return
    for example in examples:
        texts = [example.context, example.prompt, example.id, example.document, *example.answers, *example.steps]
        assert all(type(text) is str for text in texts) and example.context.strip() and example.answers
        # what is compared: all that the file says and white space at the ends
        said = json.dumps(value, ensure_ascii=False) if case["damage"][0] == "none" else None
        if said is not None and name not in ("text", "hotpotqa"):
            assert json.dumps(example.context.strip(), ensure_ascii=False)[1:-1] in said.replace("\\r\\n", "\\n")


# -- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a codec, after a step."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    args = tiny_args(AEConfig, folder, max_steps=1, save_strategy="steps", save_steps=1)
    data = {"train_dataset": ragged_rows(4), "data_collator": PatchCollator(4)}
    AETrainer(tiny_autoencoder(), args, **data).train()
    return folder / "checkpoint-1"


FILES = (
    "model.safetensors",
    "config.json",
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    SUMS,
)
checkpoints = st.fixed_dictionaries(
    {"file": st.sampled_from(FILES), "damage": damages, "header": st.booleans(), "gone": st.booleans()}
)


def check_of(checkpoint: Path) -> Callable[[dict[str, Any]], None]:
    whole = AutoModel.from_pretrained(checkpoint).state_dict()

    def check(case: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder, "checkpoint-1")
            copy.mkdir()
            for file in checkpoint.iterdir():
                os.link(file, copy / file.name)
            path = copy / case["file"]
            data = path.read_bytes()
            path.unlink()
            kind, where, more = case["damage"]
            if case["header"] and case["file"] == "model.safetensors":
                # most of the file are numbers: aim at what describes them
                where *= min(1.0, (8 + struct.unpack("<Q", data[:8])[0]) / len(data))
            damaged = broken(data, (kind, where, more))
            if not case["gone"] or case["file"] == SUMS:
                path.write_bytes(damaged)
            unchanged = path.exists() and path.read_bytes() == data
            try:
                reading(lambda: check_checkpoint(copy))
                assert unchanged
            except Documented:
                assert not unchanged
            if case["file"] not in ("model.safetensors", "config.json"):
                return
            # without sums, as a model's folder is
            try:
                model = reading(lambda: AutoModel.from_pretrained(copy))
            except Documented:
                assert not unchanged
                return
            found = model.state_dict()
            if unchanged:
                assert all(torch.equal(found[name], value) for name, value in whole.items())

    return check


GROUPS = {
    "packets": (packets, check_packet),
    "rows": (rows, check_row),
    "stores": (stores, check_store),
    "configs": (configs, check_config),
    "jsonl": (jsonl, check_jsonl),
    "tasks": (tasks, check_task),
    "checkpoints": (checkpoints, check_of),
}


def run(group: str, count: int, checkpoint: Path, seed: int | None = None) -> int:
    strategy, check = GROUPS[group]
    if group == "checkpoints":
        check = check(checkpoint)
    tried = 0

    @hypothesis.settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=seed is None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def cases(case: dict[str, Any]) -> None:
        nonlocal tried
        tried += 1
        check(case)

    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        (cases if seed is None else hypothesis.seed(seed)(cases))()
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
    return tried


@pytest.mark.parametrize("group", GROUPS)
def test_what_is_broken_is_refused_in_words_and_what_is_whole_comes_back(group: str, checkpoint: Path):
    """A crash says nothing to whoever has the broken file, and a wrong value says nothing to anybody."""
    assert run(group, QUICK, checkpoint) >= QUICK // 2


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_ten_thousand_cases(group: str, checkpoint: Path, record_property: Callable[[str, Any], None]):
    """The same, where the rare ones are."""
    assert sum(SLOW.values()) == 10_000
    share = float(os.environ.get("LATENTFORGE_FUZZ_SHARE", "1"))
    seed = int(os.environ.get("LATENTFORGE_FUZZ_SEED", "0"))
    record_property("cases", run(group, max(1, round(SLOW[group] * share)), checkpoint, seed))


def test_a_damage_of_each_kind_changes_the_bytes():
    """A fuzz test that breaks nothing finds nothing."""
    for kind in ("flip", "cut", "drop", "insert"):
        assert broken(b"abcdef", (kind, 0.5, b"\x01")) != b"abcdef"
    assert broken(b"abc", ("none", 0, b"")) == b"abc"
