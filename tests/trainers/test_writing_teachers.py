"""Sample mode: Venice and TGI as doubles after their published schemas, and what becomes of their texts."""

import json
from concurrent.futures import ThreadPoolExecutor
from time import sleep

import pytest
import torch

from tests.conftest import EOS, PAD, VOCAB, tiny_student
from tests.trainers.training_helpers import TEXT, byte_tokenizer, tiny_args, tiny_teacher, train_log
from trainers import KDConfig, KDTrainer, PatchCollator
from trainers.teachers import (
    BadReply,
    ChatWriter,
    FlowConfig,
    Secret,
    Teacher,
    TGIWriter,
    WrittenTeacher,
    WrittenText,
    collect_texts,
    training_rows,
)
from trainers.teachers.chat_api import token_bytes


pytest.importorskip("openai")
from tests.trainers.teacher_doubles import TGI_REPLY, FakeTGI, FakeVenice, bytes_of_ids  # noqa: E402


KEY = "venice-key-0123456789"
QUICK = FlowConfig(deadline=10.0, patience=20.0)


@pytest.fixture(scope="module")
def model():
    return tiny_teacher()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def venice(model, tokenizer):
    with FakeVenice(model, tokenizer, KEY) as server:
        yield server


def writer_of(server, tokenizer, model="teacher", **kwargs):
    key = Secret(server.key, "VENICE_API_KEY")
    options = {"k": 8, "max_tokens": 12, "seed": 3, "config": QUICK, **kwargs}
    return ChatWriter(f"{server.url}/api/v1", model, tokenizer, key, venice=True, **options)


def prompts_of(tokenizer, count: int, length: int = 10) -> list[list[int]]:
    ids = tokenizer("".join(TEXT))["input_ids"]
    return [ids[length * n : length * (n + 1)] for n in range(count)]


def check_against_model(text: WrittenText, double, k: int) -> None:
    """Each entry is the double's own distribution behind prompt and words so far."""
    for place, (ids, logprobs) in enumerate(zip(text.top_ids, text.top_logprobs, strict=True)):
        row = double.writer.logprobs(text.prompt_ids + text.ids[:place])
        torch.testing.assert_close(torch.tensor(logprobs), row.topk(k).values, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(logprobs), row[ids], atol=1e-4, rtol=0)


@pytest.mark.parametrize("flat", [False, True])
def test_venice_writes_and_its_alternatives_are_our_ids(venice, tokenizer, flat):
    """Keys by string lose entries; bytes do not. The shape is OpenAI's or a flat list, the schema leaves it open."""
    venice.flat = flat
    writer = writer_of(venice, tokenizer, instruction="Go on.")
    for prompt, text in zip(prompts_of(tokenizer, 4), writer.write(prompts_of(tokenizer, 4)), strict=True):
        assert text.prompt_ids == prompt and 0 < len(text.ids) <= 12
        check_against_model(text, venice, 8)
    body = venice.requests[-1][2]
    assert body["venice_parameters"] == {"include_venice_system_prompt": False}
    assert (body["temperature"], body["top_p"], body["logprobs"], body["top_logprobs"]) == (1.0, 1.0, True, 8)
    assert body["messages"][0] == {"role": "system", "content": "Go on."}
    writer.close()


def test_model_without_logprobs_is_refused_with_those_that_have_them(venice, tokenizer):
    """The first LatentForge's own default model is one of them; its check looked in the wrong place."""
    with pytest.raises(ValueError, match="'mute' gives no log-probabilities.*qualify: teacher"):
        writer_of(venice, tokenizer, model="mute")
    with pytest.raises(ValueError, match="no model 'qwen3-next-80b'.*teacher"):
        writer_of(venice, tokenizer, model="qwen3-next-80b")


def test_reply_without_logprobs_is_an_error(venice, tokenizer):
    """Servers drop the field with a 200; a text alone is no teacher."""
    writer = writer_of(venice, tokenizer)
    venice.drops_logprobs = True
    with pytest.raises(BadReply, match="without log-probabilities"):
        list(writer.write(prompts_of(tokenizer, 1)))
    writer.close()


def test_venices_quota_is_kept_without_refusals(venice, tokenizer):
    """Its reset header is a Unix time and there is no Retry-After; the OpenAI client would knock every half second."""
    venice.requests_per_window, venice.window = 6, 1.0
    writer = writer_of(venice, tokenizer, max_tokens=2)
    assert len(list(writer.write(prompts_of(tokenizer, 20)))) == 20
    assert venice.refused <= 6 and venice.bans == 0
    writer.close()


def test_failing_venice_never_earns_a_ban(venice, tokenizer):
    """More than 20 failures in 30 s, and it answers nobody for 30 s."""
    venice.fail = lambda number: True
    config = FlowConfig(patience=4.0, deadline=2.0, max_failures=1000, failure_budget=18)
    writer = writer_of(venice, tokenizer, max_tokens=2, config=config)
    writer.server.flow.BACKOFF = 0.001
    with pytest.raises(ConnectionError):
        list(writer.write(prompts_of(tokenizer, 30)))
    assert venice.bans == 0 and len(venice.failures) >= 10
    writer.close()


def test_another_tokenizer_is_noticed(venice, tokenizer):
    """Nothing proves equality over a chat API, but texts that are split otherwise give it away."""
    writer = writer_of(venice, tokenizer, max_tokens=3)
    writer.ids_of_bytes = {spelt: i for spelt, i in writer.ids_of_bytes.items() if not spelt.isalpha()}
    with pytest.raises(ValueError, match="does not use the student's tokenizer"):
        list(writer.write(prompts_of(tokenizer, 60, 4)))
    writer.close()


def test_bytes_of_tokens_are_found_for_both_kinds_of_vocabularies(tokenizer):
    """A map that is off by one byte class puts all mass into the tail, or on other words."""
    known = token_bytes(tokenizer)
    assert {i: spelt for spelt, i in known.items()}.items() >= bytes_of_ids(tokenizer).items()
    assert EOS not in known.values() and len(known) == 256

    class Sentencepiece:
        all_special_ids = (0,)

        def get_vocab(self):
            return {"<s>": 0, "<0x0A>": 1, "▁the": 2, "é": 3, "ing": 4}

    assert token_bytes(Sentencepiece()) == {b"\n": 1, b" the": 2, "é".encode(): 3, b"ing": 4}


# -- TGI


def test_tgi_writes_with_its_own_prefix(model, tokenizer, monkeypatch):
    """The student must read what the teacher read, which TGI reports as prefill."""
    jsonschema = pytest.importorskip("jsonschema")
    monkeypatch.setenv("HF_TOKEN", "hf_not_for_this_server")
    with FakeTGI(model, tokenizer) as server:
        writer = TGIWriter(server.url, tokenizer, k=5, max_tokens=9, seed=1, config=QUICK)
        assert writer.name == "teacher" and writer.describe()["revision"] == "0123abcd"
        for prompt, text in zip(prompts_of(tokenizer, 3), writer.write(prompts_of(tokenizer, 3)), strict=True):
            assert text.prompt_ids == prompt
            check_against_model(text, server, 5)
        for reply in server.replies:
            jsonschema.validate(reply, TGI_REPLY)
        assert not any("hf_not" in str(headers) for *_, headers in server.requests), "the Hub's token is not TGI's"
        writer.check()
        writer.close()


@pytest.mark.parametrize(
    ("options", "k", "message"),
    [
        ({}, 6, "top_n_tokens.*--max-top-n-tokens"),
        ({"drops": ("decoder_input_details",)}, 5, "holds no prefill"),
    ],
)
def test_what_tgi_does_not_give_is_refused_when_it_is_built(model, tokenizer, options, k, message):
    """Five alternatives are its default; fewer than asked would be another teacher."""
    with FakeTGI(model, tokenizer, **options) as server:
        with pytest.raises(ValueError, match=message):
            TGIWriter(server.url, tokenizer, k=k, config=QUICK)


def test_tgi_that_drops_the_alternatives_is_an_error(model, tokenizer):
    """A 200 with text alone."""
    with FakeTGI(model, tokenizer, drops=("top_n_tokens",)) as server:
        writer = TGIWriter(server.url, tokenizer, config=QUICK)
        with pytest.raises(BadReply, match="dropped `top_n_tokens`"):
            list(writer.write(prompts_of(tokenizer, 1)))
        writer.close()


# -- texts


def test_texts_are_kept_and_never_asked_for_twice(venice, tokenizer, tmp_path):
    """They cost money; and a broken collection must not begin anew."""
    prompts = prompts_of(tokenizer, 6)
    file = tmp_path / "texts.jsonl"
    writer = writer_of(venice, tokenizer)
    first = collect_texts(writer, prompts[:4], file)
    with open(file, "a") as out:
        out.write('{"asked": [1, 2')  # killed while it wrote
    asked = len(venice.requests)
    again = collect_texts(writer, [*prompts, prompts[0]], file)
    assert len(venice.requests) == asked + 2
    assert again[:4] == first and again[6] == first[0]
    assert KEY not in file.read_text() and venice.url not in file.read_text()
    other = writer_of(venice, tokenizer, max_tokens=5)
    with pytest.raises(ValueError, match="holds texts of.*name another file"):
        collect_texts(other, prompts, file)
    other.close()
    writer.close()


def texts() -> list[WrittenText]:
    def text(prompt, ids, ended):
        return WrittenText(prompt, ids, [[i, 5] for i in ids], [[-0.5, -1.5] for _ in ids], ended)

    return [text([7, 8, 9], [65, 66, 67], True), text([7, 8], [70] * 9, False), text([1] * 8, [2], False)]


class Named:
    name, k, vocab_size, num_tokens = "teacher", 2, VOCAB, VOCAB


class Scribe(Named):
    """Writes slowly, and never the same twice."""

    written = 0

    def describe(self):
        return {"model": self.name}

    def write(self, prompts):
        for prompt in prompts:
            sleep(0.02)
            self.written += 1
            yield WrittenText(list(prompt), [self.written], [[1, 2]], [[-0.5, -1.5]], False)


def test_processes_of_one_training_share_one_collection(tmp_path):
    """Each asked for all texts: paid once per process, trained on different ones, and kept in a file of two heads."""
    scribe, prompts = Scribe(), [[1], [2], [3]]
    with ThreadPoolExecutor(2) as processes:
        runs = [processes.submit(collect_texts, scribe, prompts, tmp_path / "texts.jsonl") for _ in range(2)]
    assert scribe.written == 3 and runs[0].result() == runs[1].result()
    assert collect_texts(scribe, prompts, tmp_path / "texts.jsonl") == runs[0].result() and scribe.written == 3


@pytest.mark.parametrize(
    "content", ["Dear diary", '{"text": "a corpus"}\n', '{"text": "a corpus"}\n{"text": "of two"}\n']
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, content):
    """A mistyped name of one line was cut to nothing, as if it were a text half written."""
    (tmp_path / "notes").write_text(content)
    with pytest.raises(ValueError, match="notes holds no texts of a teacher: name another file"):
        collect_texts(Scribe(), [[1]], tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == content


@pytest.mark.parametrize("damage", [b'{"asked": [7], "ids": [1]}', b'{"written_by": {}}', b"null", b"\xff\0\0"])
def test_a_damaged_text_is_named_by_its_line(tmp_path, damage):
    """A traceback, or a codec's complaint, names neither the file nor what to do; the other texts are paid for."""
    file, prompts = tmp_path / "texts.jsonl", [[1], [2], [3]]
    kept = collect_texts(Scribe(), prompts, file)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], damage + b"\n", *lines[3:]]))
    with pytest.raises(ValueError, match="texts.jsonl, line 3 is no text of a teacher: take the line out"):
        collect_texts(Scribe(), prompts, file)
    file.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    scribe = Scribe()
    again = collect_texts(scribe, prompts, file)
    assert scribe.written == 1 and (again[0], again[2]) == (kept[0], kept[2])


def test_a_file_that_holds_half_a_head_begins_anew(tmp_path):
    """Killed in its first moment, a collection has kept nothing."""
    whole, file = collect_texts(Scribe(), [[1]], tmp_path / "whole.jsonl"), tmp_path / "half.jsonl"
    file.write_text('{"written_by": {"mod')
    assert collect_texts(Scribe(), [[1]], file) == whole
    assert file.read_text() == (tmp_path / "whole.jsonl").read_text()


def test_the_check_of_a_chat_api_costs_one_token(venice, tokenizer):
    """It came in every run and every process, as long as a text, and was thrown away."""
    writer = writer_of(venice, tokenizer)
    writer.check()
    assert venice.requests[-1][2]["max_tokens"] == 1
    writer.close()


def test_rows_learn_the_teachers_words_alone():
    """The prompt is somebody else's text; a label there without a distribution would be learned as the teacher's."""
    rows = training_rows(texts(), 8, EOS, PAD)
    assert len(rows) == 2, "of the third nothing fits"
    assert rows[0]["input_ids"].tolist() == [7, 8, 9, 65, 66, 67, EOS, PAD]
    assert rows[0]["labels"].tolist() == [-100, -100, -100, 65, 66, 67, EOS, -100]
    assert rows[0]["attention_mask"].tolist() == [1] * 7 + [0]
    assert rows[1]["labels"].tolist() == [-100, -100] + [70] * 6


def test_written_teacher_speaks_where_the_teacher_wrote():
    """The distribution of the first word stands behind the prompt's last token."""
    teacher = WrittenTeacher(texts(), Named())
    assert isinstance(teacher, Teacher)
    rows = PatchCollator(4)(training_rows(texts(), 8, EOS, PAD))
    signal = teacher.signal(rows["input_ids"], rows["attention_mask"])
    assert signal.covered()[0].tolist() == [False, False, True, True, True, False, False, False]
    assert signal.top_ids[0, 2:5, 0].tolist() == [65, 66, 67]
    assert signal.covered()[1].tolist() == [False] + [True] * 6 + [False], "a row that the block's end cuts"
    unknown = teacher.signal(torch.tensor([[7, 8, 9, 65, 1, 67, EOS, PAD]]))
    assert not unknown.covered().any(), "not its text"


def test_student_learns_from_written_text(venice, tokenizer, tmp_path):
    """The whole of sample mode, to a loss that falls and a coverage that is said."""
    writer = writer_of(venice, tokenizer, max_tokens=14)
    texts = collect_texts(writer, prompts_of(tokenizer, 24), tmp_path / "texts.jsonl")
    rows = training_rows(texts, 24, EOS, PAD)
    writer.close()
    trainer = KDTrainer(
        model=tiny_student(),
        args=tiny_args(KDConfig, tmp_path, max_steps=12),
        teacher=WrittenTeacher(texts, writer),
        train_dataset=rows,
        data_collator=PatchCollator(4),
    )
    trainer.train()
    log = train_log(trainer)
    assert log[-1]["kd"] < log[0]["kd"]
    assert 0.9 < log[0]["kd_coverage"] <= 1, "all but the ends that we appended"
    assert json.loads((tmp_path / "texts.jsonl").read_text().splitlines()[0])["written_by"]["model"] == "teacher"
