"""The engine: whoever else is there, everybody gets what they would get alone."""

import threading
import time

import pytest
import torch

from scripts.serving.engine import Engine, EngineBusy, EngineClosed, EngineConfig, Output, Request, RequestRefused
from scripts.serving.patch_batch import PatchBatch, Prefill
from scripts.serving.sampling import Sampling, sample
from scripts.serving.text import TextStream
from tests.conftest import VOCAB, tiny_student
from tests.trainers.training_helpers import byte_tokenizer


GREEDY = Sampling(temperature=0)


class Listener:
    """Collects what a request is told."""

    def __init__(self):
        self.outputs, self.ended = [], threading.Event()

    def __call__(self, output: Output):
        self.outputs.append(output)
        if output.finish_reason is not None:
            self.ended.set()

    def wait(self, seconds=30):
        assert self.ended.wait(seconds), "no end"
        return self

    @property
    def text(self):
        return "".join(output.text for output in self.outputs)

    @property
    def ids(self):
        return [i for output in self.outputs for i in output.token_ids]

    @property
    def reason(self):
        return self.outputs[-1].finish_reason


@pytest.fixture
def start():
    engines = []

    def start(model=None, **limits):
        engines.append(Engine(model or student(), byte_tokenizer(), EngineConfig(**limits)))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close()


def student(head="regression", decoder="autoregressive", **kwargs):
    torch.manual_seed(0)
    return tiny_student(head, decoder, **kwargs).eval()


def ask(engine, prompt, count=13, **kwargs):
    listener = Listener()
    kwargs = {"sampling": GREEDY, "ignore_eos": True, **kwargs}
    request = Request(prompt, count, on_output=listener, **kwargs)
    listener.request = request
    engine.submit(request)
    return listener


def prompts(lengths=(1, 3, 4, 9, 30, 57, 6)):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("backbone", ["llama", "qwen3", "gpt_neox"])
@pytest.mark.parametrize(
    ("head", "decoder", "kwargs"),
    [
        ("regression", "autoregressive", {}),
        ("energy", "autoregressive", {"decoder_memory": "none"}),
        ("regression", "parallel", {}),
        ("aligned", "parallel", {}),
    ],
)
def test_rows_that_join_and_leave_get_what_generate_gives_them(head, decoder, kwargs, backbone):
    """A row that reads its neighbour's keys writes plausible text of somebody else's prompt."""
    model = student(head, decoder, backbone=backbone, **kwargs).double()
    patch_size, count = model.config.patch_size, 21
    with torch.inference_mode():
        batch, written, who, waiting = PatchBatch(model), {}, [], list(enumerate(prompts()))
        while waiting or batch.num_rows:
            if waiting:
                numbers, ids = zip(*waiting[:2], strict=True)
                prefill = Prefill(model, ids)
                while prefill.remaining:
                    prefill.advance(3)
                places = [(len(prompt) + count) // patch_size + 2 for prompt in ids]
                batch.join(prefill.finish([None] * len(ids)), places, [None] * len(ids))
                who += numbers
                written |= {number: [] for number in numbers}
            waiting = waiting[2:]
            for place in range(patch_size):
                active = [len(written[n]) < count and batch.phase(r) == place for r, n in enumerate(who)]
                tokens = batch.logits.argmax(-1)
                for row, is_active in enumerate(active):
                    if is_active:
                        written[who[row]].append(int(tokens[row]))
                active = [a and len(written[n]) < count for a, n in zip(active, who, strict=True)]
                if any(active):
                    batch.read(place, tokens, active)
            order = batch.leave([row for row, n in enumerate(who) if len(written[n]) == count])
            who = [who[row] for row in order]
        assert batch.num_bytes == 0, "an empty batch holds no memory"
        for number, prompt in enumerate(prompts()):
            ids = torch.tensor([prompt])
            expected = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=-1
            )
            assert written[number] == expected[0, len(prompt) :].tolist(), number


@pytest.mark.parametrize(("head", "decoder"), [("regression", "autoregressive"), ("energy", "parallel")])
def test_a_seeded_request_gets_the_same_text_alone_and_in_a_crowd(start, head, decoder):
    """Whoever reports a bug with its seed must see it again."""
    engine = start(student(head, decoder), max_rows=8)
    sampling = Sampling(temperature=0.8, top_p=0.9)
    alone = [ask(engine, prompt, sampling=sampling, seed=7).wait().ids for prompt in prompts()]
    crowd = [ask(engine, prompt, sampling=sampling, seed=7) for prompt in prompts() for _ in range(3)]
    assert [listener.wait().ids for listener in crowd] == [ids for ids in alone for _ in range(3)]
    other = ask(engine, prompts()[0], sampling=sampling, seed=8).wait()
    assert other.ids != alone[0] and len(other.ids) == 13


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_prompts_that_are_read_together_see_only_themselves(start, attention):
    """Attention that adds its mask takes True for a 1, and everybody reads everybody's prompt."""
    model = student().double()
    model.set_attn_implementation(attention)
    with torch.inference_mode():
        together = Prefill(model, prompts())
        together.advance(together.remaining)
        for prompt, found in zip(prompts(), together.finish([None] * len(prompts())), strict=True):
            torch.testing.assert_close(found.logits, model(torch.tensor([prompt])).logits[:, -1].float())
    engine = start(model, max_rows=8)
    listeners = [ask(engine, prompt) for prompt in prompts()]
    for prompt, listener in zip(prompts(), listeners, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=13, do_sample=False, eos_token_id=-1
        )
        assert listener.wait().ids == expected[0, len(prompt) :].tolist()


def test_prompts_of_all_lengths_are_read_when_a_long_one_is_among_them(start):
    """A long prompt is read in parts, and those behind it must neither overtake it for ever nor be lost."""
    model = student()
    engine = start(model, max_rows=4, prefill_tokens=8)
    lengths = [1, 200, 3, 9, 2, 150, 4, 1]
    listeners = [ask(engine, prompt) for prompt in prompts(lengths)]
    listeners[5].request.cancel()
    alone = [ask(engine, prompt).wait().ids for prompt in prompts(lengths)]
    for number, listener in enumerate(listeners):
        if number == 5:
            assert listener.wait().reason == "cancelled"
        else:
            assert listener.wait().ids == alone[number], number
    assert engine.snapshot().waiting == engine.snapshot().rows == 0


def test_more_requests_than_rows_are_served_in_turn(start):
    """A row that is never given back ends the service after an hour."""
    engine = start(max_rows=2)
    listeners = [ask(engine, prompt) for prompt in prompts() * 3]
    assert all(listener.wait().reason == "length" and len(listener.ids) == 13 for listener in listeners)
    found = engine.snapshot()
    assert found.rows == found.waiting == found.cache_bytes == 0
    assert found.finished == {"length": 21} and found.generated_tokens == 21 * 13
    # once per patch for all rows, whatever their lengths
    assert found.backbone_steps < found.patches


def test_memory_bounds_how_many_are_written_together(start):
    """A few long requests must wait for each other, and not end the process."""
    engine = start(cache_bytes=1 << 20)
    room = engine._bytes_of(2, 32)
    engine.close()
    engine = start(cache_bytes=room)
    most = [0]
    listeners = [ask(engine, [5] * 60, 60) for _ in range(5)]
    while not all(listener.ended.is_set() for listener in listeners):
        most.append(engine.snapshot().rows)
        assert engine.snapshot().cache_bytes <= room
        time.sleep(0.002)
    assert max(most) <= 2 and all(len(listener.ids) == 60 for listener in listeners)
    with pytest.raises(RequestRefused, match="need more memory than the server sets aside"):
        ask(engine, [5] * 60, 4000)


def test_what_can_never_be_served_is_refused_at_once(start):
    """Queued first, it would end the batch that it joins."""
    engine = start(max_tokens=50)
    for prompt, count, message in (
        ([], 5, "The prompt is empty"),
        ([5], 0, "max_tokens must be at least 1"),
        ([5] * 40, 11, "together at most 50"),
        ([VOCAB], 5, f"outside of 0 to {VOCAB - 1}"),
    ):
        with pytest.raises(RequestRefused, match=message):
            ask(engine, prompt, count)
    with pytest.raises(RequestRefused, match="no probability"):
        ask(start(student("energy")), [5], logprobs=1)
    # unchecked, these would be lost between the queue and their row, and end everybody else's text
    running = ask(start(student("energy")), [5], 40, sampling=Sampling(), seed=-(2**63))
    with pytest.raises(RequestRefused, match="seed must lie"):
        ask(start(student("energy")), [5], sampling=Sampling(), seed=2**63)
    assert running.wait().reason == "length"
    for wrong in ({"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_k": -1}):
        with pytest.raises(ValueError, match="must"):
            Sampling(**wrong)


def test_a_full_queue_says_when_to_come_back(start):
    """Waiting without bound, every client times out and asks again."""
    engine = start(max_rows=1, max_waiting=2)
    first = ask(engine, [5], 400)
    while not first.outputs:
        time.sleep(0.01)
    others = [ask(engine, [5], 5) for _ in range(2)]
    with pytest.raises(EngineBusy) as caught:
        ask(engine, [5], 5)
    assert caught.value.retry_after >= 1
    first.request.cancel()
    assert first.wait().reason == "cancelled" and len(first.ids) < 400
    assert all(listener.wait().reason == "length" for listener in others)


def test_who_leaves_the_queue_frees_its_place_at_once(start):
    """Else clients that have long gone fill the queue, and those who are there are sent away."""
    engine = start(max_rows=1, max_waiting=3)
    first = ask(engine, [5], 1500)
    while not first.outputs:
        time.sleep(0.01)
    waiting = ask(engine, [5], 5)
    gone, late = ask(engine, [5], 5), ask(engine, [5], 5, deadline=0.05)
    gone.request.cancel()
    assert gone.wait().reason == "cancelled" and late.wait().reason == "deadline"
    assert not first.ended.is_set() and not waiting.ended.is_set(), "they stood behind one that has no room"
    others = [ask(engine, [5], 5) for _ in range(2)]
    first.request.cancel()
    assert all(listener.wait().reason == "length" for listener in [waiting, *others])


def test_a_request_ends_when_its_time_is_up(start):
    """Also while it waits: nobody reads it any more."""
    engine = start(max_rows=1)
    slow = ask(engine, [5], 4000 if engine.max_tokens > 5000 else 1500, deadline=0.5)
    waiting = ask(engine, [5], 5, deadline=0.1)
    assert slow.wait().reason == "deadline" and waiting.wait().reason == "deadline" and not waiting.ids


def test_a_step_that_fails_ends_its_requests_and_not_the_engine(start, monkeypatch):
    """Out of memory once, and the service would answer nothing for ever."""
    engine = start()
    monkeypatch.setattr(engine._batch, "read", lambda *args: 1 / 0)
    failed = ask(engine, [5]).wait()
    assert failed.reason == "error" and "ZeroDivisionError" in failed.outputs[-1].error
    assert ask(engine, [5]).wait().reason == "length"


def test_closing_lets_what_is_there_finish(start):
    """A deployment must not cut the texts of those who are just reading."""
    engine = start(max_rows=2)
    listeners = [ask(engine, [5], 40) for _ in range(4)]
    engine.close(patience=30)
    assert all(listener.reason == "length" for listener in listeners)
    with pytest.raises(EngineClosed):
        ask(engine, [5])
    impatient = start(max_rows=1)
    listener = ask(impatient, [5], 1500)
    impatient.close()
    assert listener.reason == "cancelled"


def test_logprobs_are_those_of_the_model(start):
    """At temperature 1, whatever the sampling: a client that scores texts takes them for the model's."""
    model = student()
    prompt = prompts()[4]
    listener = ask(start(model), prompt, 9, sampling=Sampling(temperature=0.5), seed=1, logprobs=3).wait()
    told = [entry for output in listener.outputs for entry in output.logprobs]
    logits = model(torch.tensor([prompt + listener.ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.detach().log_softmax(-1)
    assert [entry.token_id for entry in told] == listener.ids
    for row, entry in zip(expected, told, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [i for i, _ in entry.top] == row.topk(3).indices.tolist()


def test_texts_end_at_eos_and_at_stop_strings(start):
    """And never show the beginning of a stop string that the next patch completes."""
    model = student()
    tokenizer = byte_tokenizer()
    engine = start(model)
    whole = ask(engine, prompts()[0], 60).wait()
    text = tokenizer.decode(whole.ids, skip_special_tokens=True)
    assert whole.text == text
    stop = text[20:23]
    cut = ask(engine, prompts()[0], 60, stop=[stop, "never there"]).wait()
    assert cut.text == text[: text.index(stop)] and cut.reason == "stop"
    assert cut.request.num_tokens <= len(whole.ids)
    model.generation_config.eos_token_id = whole.ids[10]
    ended = ask(start(model), prompts()[0], 60, ignore_eos=False).wait()
    first = whole.ids.index(whole.ids[10])
    assert ended.ids == whole.ids[:first] and ended.reason == "stop" and ended.request.num_tokens == first + 1


def test_text_is_shown_when_no_later_token_can_change_it():
    """Half a character shown is a replacement mark for ever."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("naïve café €5 STOP more", add_special_tokens=False)["input_ids"]
    for stop in ((), ("STOP", "€6")):
        stream = TextStream(tokenizer, tokenizer("x")["input_ids"], stop)
        shown = [stream.push([i], last=i is ids[-1]) for i in ids]
        assert "".join(shown) == stream.text == ("naïve café €5 " if stop else "naïve café €5 STOP more")
        assert not any("\ufffd" in part for part in shown)
        assert stream.stopped == bool(stop) and stream.push(ids) == ("" if stop else "naïve café €5 STOP more")


class Fixed:
    """A generator of numbers that are known."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


@pytest.mark.parametrize("size", [1, 7, 1000, 5000])
def test_a_number_finds_its_token_in_any_vocabulary(size):
    """Searched block by block, and cut among the likeliest first: an edge would be a token that is never written."""
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(64, size, generator=generator) * 3
    numbers = torch.rand(64, generator=generator, dtype=torch.float64)
    numbers[:2] = torch.tensor([0.0, 1 - 1e-16])
    upto = logits.double().softmax(-1).cumsum(-1)

    def drawn(**kwargs):
        return sample(logits, [Sampling(**kwargs)] * 64, [Fixed(float(x)) for x in numbers])

    expected = torch.searchsorted(upto, numbers[:, None] * upto[:, -1:], right=True)[:, 0].clamp(max=size - 1)
    assert (drawn() == expected).float().mean() > 0.98, "but for rounding"
    for cut in ({"top_p": 0.999999}, {"top_k": 3000}, {"top_k": 2000, "top_p": 0.9}, {"top_p": 0.5}):
        probabilities, order = logits.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
        k = min(cut.get("top_k", size), size)
        if k == size and "top_p" not in cut:
            continue  # nothing is cut, and nothing sorted
        probabilities[:, k:] = 0
        probabilities /= probabilities.sum(-1, keepdim=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities[before >= cut.get("top_p", 1.0)] = 0
        mass = probabilities.cumsum(-1)
        place = torch.searchsorted(mass, numbers[:, None] * mass[:, -1:], right=True).clamp(max=k - 1)
        assert (drawn(**cut) == order.gather(1, place)[:, 0]).float().mean() > 0.95, cut


def test_equal_logits_are_chosen_alike_alone_and_in_a_crowd():
    """In bf16 many are equal; sorted in another order where somebody else's cut is wide, a seed is worth nothing."""
    logits = (2 * torch.randn(2, 5000)).bfloat16().float()
    narrow, wide = Sampling(top_p=0.9), Sampling(top_k=3000)
    for number in torch.rand(100).tolist():
        alone = sample(logits[:1], [narrow], [Fixed(number)])
        assert sample(logits, [narrow, wide], [Fixed(number), Fixed(0.5)])[0] == alone[0]


def test_a_temperature_that_is_nearly_nothing_is_greedy():
    """Rounded to 0 it divides 0 by 0, and every token is the first of the vocabulary."""
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    for temperature in (1e-30, 1e-50, 5e-324):
        for cut in ({}, {"top_k": 2}, {"top_p": 0.5}):
            assert sample(logits, [Sampling(temperature, **cut)], [Fixed(0.9)]).tolist() == [1]


def test_samples_follow_the_distribution_and_the_cuts():
    """A wrong cut shows in no single text."""
    torch.manual_seed(0)
    import random

    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])
    number, count = random.Random(1), 20000

    def shares(**kwargs):
        sampling = Sampling(**kwargs)
        found = sample(logits.expand(count, -1), [sampling] * count, [number] * count)
        return torch.bincount(found, minlength=5) / count

    assert torch.allclose(shares(), logits.softmax(-1), atol=0.012)
    assert torch.allclose(shares(temperature=2.0), (logits / 2).softmax(-1), atol=0.012)
    assert torch.allclose(shares(top_k=2)[:2], logits[:2].softmax(-1), atol=0.012) and shares(top_k=2)[2:].sum() == 0
    assert shares(top_p=0.6)[1:].sum() == 0, "the first alone has 0.64"
    assert shares(top_p=0.7)[:2].sum() == 1 and shares(top_p=0.7)[1] > 0.2
    assert shares(temperature=0)[0] == 1
    both = Sampling(top_k=2, top_p=0.7)  # of the two that are left the first has 0.73
    assert set(sample(logits.expand(99, -1), [both] * 99, [number] * 99).tolist()) == {0}
    mixed = sample(logits.expand(3, -1), [Sampling(), GREEDY, Sampling(top_k=1)], [number] * 3)
    assert mixed[1:].tolist() == [0, 0]
