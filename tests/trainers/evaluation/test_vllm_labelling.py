"""The measure of labelling, against a double: what is compared, and that a store which lacks rows is no result."""

import pytest

from tests.trainers.training_helpers import byte_tokenizer, tiny_teacher
from trainers.evaluation.vllm_labelling import compare, labelled, raw_http, rows_of_text


pytest.importorskip("openai")
from trainers.evaluation.loopback_servers import FakeVLLM  # noqa: E402
from trainers.teachers import SQLiteStore, VLLMServerTeacher  # noqa: E402


def test_both_sides_ask_for_the_same_rows(tmp_path):
    """A ceiling that asks for less than the client makes the client look slow, or the other way round."""
    tokenizer = byte_tokenizer()
    rows = rows_of_text(tokenizer, 12, length=32)
    assert len({tuple(row) for row in rows}) == 12 and {len(row) for row in rows} == {32}
    with FakeVLLM(tiny_teacher(), tokenizer) as server:
        teacher = VLLMServerTeacher(server.url, tokenizer, revision="1", dtype="float32")
        asked = []
        for path in ("/inference/v1/generate", "/v1/completions"):
            server.requests.clear()
            assert raw_http(server.url, rows, path, teacher.name, in_flight=3) > 0
            asked.append(server.requests.copy())
        server.requests.clear()
        assert labelled(teacher, rows, tmp_path / "kd.sqlite", 8) > 0
        asked.append(server.requests.copy())
        teacher.close()
    texts = [sorted(request[2].get("token_ids") or request[2]["prompt"] for request in one) for one in asked]
    assert texts[0] == texts[1] == texts[2] == sorted(rows)
    assert len(SQLiteStore(tmp_path / "kd.sqlite")) == 12


def test_rows_that_were_not_stored_are_no_result(tmp_path):
    """Half of the rows in half of the time would be a record."""
    tokenizer = byte_tokenizer()
    rows = rows_of_text(tokenizer, 4, length=32)
    with FakeVLLM(tiny_teacher(), tokenizer) as server:
        teacher = VLLMServerTeacher(server.url, tokenizer, revision="1", dtype="float32")
        with pytest.raises(RuntimeError, match="3 of 4 rows"):
            labelled(teacher, [*rows[:3], rows[0]], tmp_path / "kd.sqlite", 8)
        with pytest.raises(RuntimeError, match="answers 404"):
            raw_http(server.url, rows, "/generate_nothing", teacher.name, 1)
        teacher.close()


def test_the_share_is_of_the_fastest_way_and_of_medians():
    """Against a slow ceiling every client is fast."""
    slow, fast, kept = iter([4.0, 4.0, 4.0]), iter([1.0, 2.0, 90.0]), iter([2.5, 2.5, 100.0])
    found = compare({"1": lambda: next(slow), "2": lambda: next(fast)}, lambda: next(kept), 100, rounds=3)
    assert found["tokens_per_second"] == {"1": 25.0, "2": 50.0, "labelled": 40.0} and found["shares"] == [
        0.4,
        0.8,
        0.9,
    ]
    assert found["share"] == 0.8 and found["shares"] == [0.4, 0.8, 0.9]
