"""A vLLM server as teacher, against the double with the shapes that vLLM 0.32 was measured to have. The real one:
`test_vllm_real.py`."""

import json
import threading
import time

import pytest
import torch

from tests.conftest import VOCAB, text_batch
from tests.trainers.training_helpers import byte_tokenizer, tiny_teacher
from trainers.evaluation.loopback_servers import FakeVLLM
from trainers.teachers import (
    BadReply,
    FlowConfig,
    HFTeacher,
    Secret,
    Teacher,
    TeacherUnavailable,
    VLLMServerTeacher,
)


pytest.importorskip("openai")

QUICK = FlowConfig(deadline=1.0, patience=6.0)


@pytest.fixture(scope="module")
def model():
    return tiny_teacher()


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def connect(model, tokenizer):
    """A double and a teacher that talks to it; both are closed at the end."""
    opened = []

    def build(server_options=None, **kwargs):
        server = FakeVLLM(model, tokenizer, **(server_options or {}))
        opened.append(server)
        teacher = VLLMServerTeacher(f"{server.url}/v1", tokenizer, **{"config": QUICK, **kwargs})
        teacher.server.flow.BACKOFF = 0.01
        opened.insert(0, teacher)
        return server, teacher

    yield build
    for thing in opened:
        thing.close()


def reference(model, ids: torch.Tensor, k: int):
    with torch.no_grad():
        return model(ids).logits.log_softmax(-1).topk(k)


@pytest.mark.parametrize(("scale_out", "path"), [(True, "/inference/v1/generate"), (False, "/v1/completions")])
def test_signal_is_the_models_own_top_k(connect, model, scale_out, path):
    """One place off, one k short or one row swapped, and the student chases another text."""
    server, teacher = connect({"scale_out": scale_out})
    assert teacher.path == path and isinstance(teacher, Teacher)
    ids = text_batch(3, 16)
    signal = teacher.signal(ids)
    values, tops = reference(model, ids, 20)
    assert (signal.top_logprobs[:, :-1] - values[:, :-1]).abs().max() <= 1e-4
    assert torch.equal(signal.top_ids[:, :-1].long(), tops[:, :-1])
    assert not signal.covered()[:, -1].any() and signal.covered()[:, :-1].all()
    for _, _, body, _ in server.requests[-3:]:  # ids, never text
        assert "prompt" not in body or isinstance(body["prompt"], list)


def test_masked_tokens_are_not_sent(connect, model):
    """Padding inside a row is no text; a teacher that reads it is another teacher."""
    server, teacher = connect()
    text = text_batch(1, 13)
    gap = torch.full((1, 3), 257)
    ids = torch.cat([gap, text[:, :5], gap, text[:, 5:]], 1)
    mask = (ids != 257).long()
    signal, dense = teacher.signal(ids, mask), HFTeacher(model).signal(ids, mask)
    assert server.requests[-1][2]["token_ids"] == text[0].tolist()
    student = torch.randn(ids.shape[1], VOCAB)
    places = torch.arange(ids.shape[1] - 1)
    sparse = signal.loss(student[:-1], places)
    assert torch.isfinite(sparse).all() and (sparse[:3] == 0).all()
    assert (sparse <= dense.loss(student[:-1], places) + 1e-4).all(), "a bucket for the tail can only lose information"
    assert signal.covered()[0].tolist() == [False] * 3 + [True] * 15 + [False]


def test_rows_without_a_successor_are_not_asked_about(connect):
    """Servers refuse empty prompts, and one token has nothing to score."""
    server, teacher = connect()
    before = server.scored
    ids = text_batch(2, 4)
    signal = teacher.signal(ids, torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0]]))
    assert server.scored == before and not signal.covered().any()
    assert torch.isfinite(signal.loss(torch.randn(8, VOCAB), torch.arange(8))).all()


def test_an_absent_entry_is_absent_and_not_a_number(connect, model):
    """vLLM writes -inf as -9999; read as a log-probability it is a probability of 0 that the student must reach."""
    _, teacher = connect({"fault": lambda number: "absent"})
    ids = text_batch(4, 8)
    signal = teacher.signal(ids)
    assert torch.isfinite(signal.loss(torch.randn(28, VOCAB), torch.arange(28))).all()
    with torch.no_grad():
        own = model(ids).logits.log_softmax(-1).gather(-1, signal.top_ids.long())
    present = signal.top_logprobs > -1000
    torch.testing.assert_close(signal.top_logprobs[present], own[present], atol=1e-4, rtol=0)
    assert (signal.top_logprobs[~present] == -10000).all()


@pytest.mark.parametrize("scale_out", [True, False])
@pytest.mark.parametrize(
    ("fault", "attempts"),
    [
        ((429, {}), 2),
        ((429, {"retry-after": "0.3"}), 2),
        ((500, {}), 2),
        ((503, {"retry-after": "0.2"}), 2),
        ("hang", 2),
        ("cut", 2),
        ("truncate", 2),
        ("html", 2),
    ],
)
def test_a_passing_fault_is_survived(connect, model, fault, attempts, scale_out):
    """The right answer after one retry, and nothing of the wrong one."""
    server, teacher = connect({"scale_out": scale_out})
    ids = text_batch(1, 12)
    first = server.scored
    server.fault = lambda number: fault if number == first else None
    start = time.monotonic()
    signal = teacher.signal(ids)
    assert server.scored - first == attempts
    assert (signal.top_logprobs[:, :-1] - reference(model, ids, 20)[0][:, :-1]).abs().max() <= 1e-4
    if isinstance(fault, tuple) and "retry-after" in fault[1]:
        assert time.monotonic() - start >= float(fault[1]["retry-after"])


@pytest.mark.parametrize("scale_out", [True, False])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "holds no prompt_logprobs"),
        ("null", "has no log-probabilities"),
        ("short", "log-probabilities, asked for the 20"),
        ("nan", "are NaN"),
        ("wrong_model", "asked 'teacher', and 'another' answered"),
        ((404, {}), "answers 404"),
        ((400, {}), "answers 400"),
    ],
)
def test_a_wrong_answer_is_an_error_and_not_a_signal(connect, fault, message, scale_out):
    """Servers drop unknown fields with a 200; training would go on with a teacher that says nothing, or nonsense."""
    server, teacher = connect({"scale_out": scale_out})
    first = server.scored
    server.fault = lambda number: fault
    with pytest.raises(ValueError, match=message):
        teacher.signal(text_batch(1, 12))
    assert server.scored == first + 1, "asked once"


def test_server_that_stays_away_is_told_within_its_patience(connect):
    """And neither forever nor at the first hiccup."""
    server, teacher = connect(config=FlowConfig(deadline=0.5, patience=2.0))
    server.fault = lambda number: (503, {})
    start = time.monotonic()
    with pytest.raises(TeacherUnavailable, match="503"):
        teacher.signal(text_batch(4, 12))
    assert time.monotonic() - start < 10
    server.fault = lambda number: None
    time.sleep(0.1)


def test_nobody_there_is_said_with_the_address(tokenizer):
    """'Connection error.' does not say which of three servers."""
    with pytest.raises(TeacherUnavailable, match="http://127.0.0.1:9/v1 gave no answer"):
        VLLMServerTeacher("http://127.0.0.1:9/v1", tokenizer, config=FlowConfig(patience=0.5))


@pytest.mark.parametrize(
    ("server_options", "kwargs", "message"),
    [
        ({}, {"model": "llama"}, "serves 'teacher', and 'llama' is not among them"),
        ({}, {"temperature": 2.0}, "temperature 1, whatever it is asked for, got 2.0"),
        ({}, {"k": 21}, "at most 20 log-probabilities per token, asked for 21.*--max-logprobs 21"),
        ({}, {"k": 0}, "k must be at least 1"),
        ({"key": "the-right-key"}, {}, "401.*not set"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_built(connect, server_options, kwargs, message):
    """After the corpus was tokenised is too late."""
    with pytest.raises(ValueError, match=message):
        connect(server_options, **kwargs)


def test_key_is_sent(connect):
    """As a bearer token, which vLLM's --api-key expects."""
    server, teacher = connect({"key": "the-right-key"}, key=Secret("the-right-key", "VLLM_REMOTE_API_KEY"))
    teacher.check()
    assert server.requests[-1][3]["authorization"] == "Bearer the-right-key"


def test_another_tokenizer_is_found_by_asking_the_server(model, tokenizer):
    """Equal sizes, other ids: every answer would look fine."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    other = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    other = PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<|eos|>", pad_token="<|pad|>")
    with FakeVLLM(model, other) as server:
        with pytest.raises(ValueError, match="is not the student's.*Train the codec with the teacher's tokenizer"):
            VLLMServerTeacher(server.url, tokenizer, config=QUICK)


def test_a_row_that_is_too_long_is_refused_with_the_flag(connect):
    """vLLM counts the token that it writes: a row of max_model_len tokens does not fit."""
    _, teacher = connect({"max_model_len": 16})
    teacher.signal(text_batch(1, 15))
    with pytest.raises(ValueError, match="A row has 16 tokens.*--max-model-len 17.*--block_size"):
        teacher.signal(text_batch(1, 16))


def test_columns_that_pad_the_matrix_fall_into_the_tail(tokenizer):
    """Their ids mean nothing; the student has no such column."""
    with FakeVLLM(tiny_teacher(vocab_size=320), tokenizer) as server:
        teacher = VLLMServerTeacher(server.url, tokenizer, k=20, config=QUICK)
        signal = teacher.signal(text_batch(1, 12))
        assert (signal.top_ids[signal.top_logprobs > -1000] < VOCAB).all()
        assert torch.isfinite(signal.loss(torch.randn(11, VOCAB), torch.arange(11))).all()
        teacher.close()


def test_threads_may_ask_at_once(connect, model):
    """Batches are asked about ahead of time by several threads."""
    _, teacher = connect({"latency": 0.05})
    batches = [text_batch(12, 10)[3 * n : 3 * n + 3] for n in range(4)]
    found = {}
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: teacher.signal(batches[n])})) for n in range(len(batches))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, batch in enumerate(batches):
        values, _ = reference(model, batch, 20)
        assert (found[n].top_logprobs[:, :-1] - values[:, :-1]).abs().max() <= 1e-4


def test_identity_is_what_the_user_declares(connect, tokenizer):
    """A server tells neither revision nor dtype; a store without them mixes two teachers."""
    _, teacher = connect()
    with pytest.raises(ValueError, match="--teacher_revision"):
        assert teacher.identity
    _, teacher = connect(revision="abc", dtype="float32")
    assert (teacher.identity.name, teacher.identity.revision, teacher.identity.numerics) == (
        "teacher",
        "abc",
        "float32",
    )
    assert "127.0.0.1" not in json.dumps(vars(teacher.identity))


def test_closed_teacher_says_so(connect):
    """And leaves no thread behind."""
    _, teacher = connect()
    teacher.close()
    teacher.close()
    with pytest.raises(RuntimeError, match="is closed"):
        teacher.signal(text_batch(1, 8))


def test_bad_reply_is_a_value_error():
    """Callers catch ValueError for what a user can mend."""
    assert issubclass(BadReply, ValueError) and issubclass(TeacherUnavailable, ConnectionError)
