"""What each way to answer gives the receiver, what is measured of it, and what is kept."""

import inspect
import json
import math
import random
import sys
import types
from dataclasses import replace

import pytest
import torch
from scipy import stats
from transformers import LogitsProcessorList

from modeling_latentforge import Packet, Receiver, Template
from modeling_latentforge.generation_wire import FirstTokenProcessor
from modeling_latentforge.latent_packet import HEADER
from modeling_latentforge.latent_quantizer import num_payload_bytes
from tests.modeling_latentforge.test_wire import ANSWERS, CONTEXTS, PROMPTS, receiver, wire
from tests.trainers.test_wire_trainer import reader as trained_reader  # noqa: F401  (a fixture)
from tests.trainers.test_wire_trainer import rooms, trainer_of, wire_of
from trainers.evaluation.paired_statistics import holm, mcnemar
from trainers.evaluation.wire_evaluation import WireEvaluation, WireSettings, summarize
from trainers.evaluation.wire_methods import (
    METHODS,
    Decoding,
    Reading,
    Refused,
    answer_examples,
    answer_jointly,
    answer_quality,
    latency,
    llmlingua2,
    logistic_regression,
    message_sizes,
    other_contexts,
    probe_folds,
    read,
    score_answers,
    write_answers,
)
from trainers.evaluation.wire_statistics import compare, difference, gain_share, mean_interval
from trainers.tasks import Example


EXAMPLES = [
    Example(context, prompt, (answer,), f"e{place}", f"d{place}")
    for place, (context, prompt, answer) in enumerate(zip(CONTEXTS, PROMPTS, ANSWERS, strict=True))
]
SHORT = Decoding(max_new_tokens=6)


def reading_of(model, method, kind="llama", **kwargs):
    contexts = other_contexts(EXAMPLES, 0) if method == "shuffled" else CONTEXTS
    return read(model, kind, method, contexts, **kwargs)


# -- what a method gives


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_replay_equals_text_to_the_bit(kind):
    """Whatever embeddings lose against tokens would be charged to the latents in every table."""
    model = wire(receivers=(kind,))
    sides = [reading_of(model, method, kind) for method in ("text", "replay")]
    assert sides[0].tokens == sides[1].tokens and sides[0].injection is None
    logits = [
        side.receiver.answer_logits(side.injection, side.compose(PROMPTS, ANSWERS), side.bridge)[0] for side in sides
    ]
    assert torch.equal(*logits)
    assert score_answers(sides[0], PROMPTS, ANSWERS) == score_answers(sides[1], PROMPTS, ANSWERS)
    ids = [example.id for example in EXAMPLES]
    assert write_answers(sides[0], PROMPTS, ids, SHORT) == write_answers(sides[1], PROMPTS, ids, SHORT)


def test_text_is_what_transformers_writes_of_the_same_ids():
    """A baseline that only our own code can run is no baseline."""
    model = wire()
    reader = model.receivers["llama"]
    texts = write_answers(reading_of(model, "text"), PROMPTS, ["a", "b", "c"], SHORT)
    for row in range(3):
        ids = reader.tokenizer(CONTEXTS[row])["input_ids"]  # with BOS
        ids = torch.tensor([ids + reader.tokenizer(PROMPTS[row], add_special_tokens=False)["input_ids"]])
        out = reader.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert texts[row] == reader.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_each_control_is_given_what_it_says():
    """A control that sees the text after all makes every latent look bad, one that sees nothing makes them shine."""
    model = wire()
    tokenizer = model.receivers["llama"].tokenizer
    latents = [reading_of(model, name, num_latents=4) for name in ("latent", "shuffled", "zero")]
    assert all(reading.tokens == [4, 4, 4] for reading in latents)
    own = model.inject("llama", model.encode(CONTEXTS, 4)).embeds
    others = model.inject("llama", model.encode(other_contexts(EXAMPLES, 0), 4)).embeds
    assert torch.equal(latents[0].injection.embeds, own) and torch.equal(latents[1].injection.embeds, others)
    zero = latents[2].injection.embeds
    assert torch.allclose(zero[0], zero[1]) and not torch.allclose(own[0], own[1])
    budget = reading_of(model, "token_budget", num_latents=4)
    first = [tokenizer(context, add_special_tokens=False)["input_ids"][:4] for context in CONTEXTS]
    batch = budget.compose(PROMPTS)
    for row in range(3):
        after = tokenizer(PROMPTS[row], add_special_tokens=False)["input_ids"]
        assert batch.input_ids[row][batch.attention_mask[row].bool()].tolist() == [0, *first[row], *after]
    assert budget.tokens == [4, 4, 3] and budget.sent == [len(tokenizer.decode(ids).encode()) for ids in first]
    closed = reading_of(model, "closed_book").compose(PROMPTS)
    assert closed.attention_mask.sum(1).tolist() == [
        1 + len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in PROMPTS
    ]


@pytest.mark.parametrize("seed", range(5))
def test_no_example_is_shuffled_onto_its_own_context(seed):
    """Questions about one paragraph that swap it among themselves have not been shuffled."""
    contexts = [f"context {number // 3}" for number in range(12)]
    examples = [Example(text, "p", ("a",), str(place), text) for place, text in enumerate(contexts)]
    found = other_contexts(examples, seed)
    assert all(ours != theirs for ours, theirs in zip(found, contexts, strict=True))
    assert sorted(found) == sorted(contexts)
    with pytest.raises(Refused, match="7 of 10 examples share a context"):
        other_contexts([*examples[:3], *([examples[5]] * 7)], seed)


def test_embedding_baselines_differ_from_replay_or_are_refused():
    """A row of the table that repeats another one under a new name is read as evidence."""
    model = wire()
    reader = model.receivers["llama"]
    with pytest.raises(Refused, match="raw is replay"):
        reading_of(model, "raw")
    anchored = reading_of(model, "anchor")
    assert anchored.receiver.template.anchor == "\nAnswer:" and reader.template.anchor == ""
    with pytest.raises(Refused, match="do not go through it"):
        reading_of(model, "adapter")
    model.receivers["llama"] = receiver("llama", Template(before="[user]", anchor="\nAnswer:"))
    with pytest.raises(Refused, match="anchor is replay"):
        reading_of(model, "anchor")
    raw = reading_of(model, "raw").compose(PROMPTS)
    assert raw.inputs_embeds.shape[1] < reading_of(model, "replay").compose(PROMPTS).inputs_embeds.shape[1]
    torch.manual_seed(0)
    model = wire(receivers=())
    model.config.latent_size = 32  # of the receiver's size
    model.add_receiver("llama", receiver("llama"), mode="soft")
    adapted = reading_of(model, "adapter")
    replayed = reading_of(model, "replay")
    assert adapted.injection.embeds.shape == replayed.injection.embeds.shape
    assert not torch.allclose(adapted.injection.embeds, replayed.injection.embeds)


@pytest.mark.parametrize("mode", ["soft", "kv", "pooled_kv", "cross"])
def test_places_of_a_message_are_counted_in_every_mode(mode):
    """A compression that leaves out keys and values is one of bookkeeping."""
    tokens = reading_of(wire(mode), "latent", num_latents=4).tokens
    assert tokens == ([2] * 3 if mode == "pooled_kv" else [4] * 3)


def test_a_lora_that_was_learned_for_latents_does_not_read_text():
    """A text baseline by a receiver that was trained to read something else is a straw man."""
    from trainers.wire_lora import add_adapter

    model = wire()
    before = {name: score_answers(reading_of(model, name), PROMPTS, ANSWERS) for name in ("text", "latent", "replay")}
    add_adapter(model.receivers["llama"], 4)
    for name, parameter in model.receivers["llama"].model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    for name, scores in before.items():
        after = score_answers(reading_of(model, name), PROMPTS, ANSWERS)
        equal = all(
            ours["nll"] == pytest.approx(theirs["nll"], abs=1e-4) for ours, theirs in zip(scores, after, strict=True)
        )
        assert equal == (name != "latent")


def test_llmlingua_is_asked_for_as_many_tokens_as_there_are_latents(monkeypatch):
    """At another rate than the latents', the comparison is of rates."""
    asked = []

    class PromptCompressor:
        def __init__(self, model_name, use_llmlingua2, device_map):
            assert use_llmlingua2 and (model_name, device_map) == ("some/model", "cpu")

        def compress_prompt(self, text, target_token):
            asked.append(target_token)
            return {"compressed_prompt": " ".join(text.split()[:2])}

    monkeypatch.setitem(sys.modules, "llmlingua", types.SimpleNamespace(PromptCompressor=PromptCompressor))
    model = wire()
    found = read(model, "llama", "llmlingua2", CONTEXTS, 5, llmlingua2("some/model", "cpu"))
    assert asked == [5, 5, 4] and found.contexts == ["The ferry", "On Thursdays", "Fog."]
    assert found.sent == [len(text) for text in found.contexts]
    monkeypatch.setitem(sys.modules, "llmlingua", None)
    with pytest.raises(ImportError, match="pip install llmlingua"):
        llmlingua2("some/model", "cpu")


# -- what is measured


def test_nll_is_of_the_answers_own_tokens():
    """A bridge learns to end an answer, the receiver of plain text never did: EOS counted in flatters the bridge."""
    model = wire()
    reading = reading_of(model, "latent")
    logits, targets = reading.receiver.answer_logits(
        reading.injection, reading.compose(PROMPTS, ANSWERS), reading.bridge
    )
    found = score_answers(reading, PROMPTS, ANSWERS)
    cut = score_answers(reading, PROMPTS, ANSWERS, num_tokens=2)
    for row in range(3):
        ids = [label for label in targets[row].tolist() if label != -100]
        assert ids[-1] == reading.receiver.tokenizer.eos_token_id
        nats = [-float(logits[row, place].log_softmax(-1)[label]) for place, label in enumerate(ids)]
        assert found[row]["nll"] == pytest.approx(sum(nats[:-1]) / (len(nats) - 1), rel=1e-5)
        assert found[row]["answer_tokens"] == len(ids) - 1
        kept = min(2, len(ids) - 1)
        assert cut[row]["nll"] == pytest.approx(sum(nats[:kept]) / kept, rel=1e-5)
        order = logits[row, 0].argsort(descending=True).tolist()
        assert found[row]["first_token_top1"] == float(order[0] == ids[0])
        assert found[row]["first_token_top5"] == float(ids[0] in order[:5])


@pytest.mark.parametrize("method", ["text", "latent", "token_budget", "closed_book", "shuffled", "zero", "replay"])
def test_gold_answers_do_not_change_what_is_written(method):
    """A length or a word of the gold answer that reaches the receiver flatters every figure."""
    model = wire()
    examples = [replace(example, answers=("something much longer than before",)) for example in EXAMPLES]
    texts = [
        [record["prediction"] for record in answer_examples(model, "llama", method, rows, "f1", SHORT, batch_size=2)]
        for rows in (EXAMPLES, examples)
    ]
    assert texts[0] == texts[1]
    for function in (read, write_answers, Reading, other_contexts, message_sizes):
        names = set(inspect.signature(function).parameters)
        assert not {name for name in names if "answer" in name or "gold" in name}, function


def test_an_answer_does_not_depend_on_its_batch():
    """Figures that move with the batch size cannot be repeated on another machine."""
    model = wire().double()
    model.receivers["llama"].model.double()
    decoding = Decoding(6, first_token_top_p=0.95, first_token_temperature=0.7, eos_ban_steps=2)
    runs = [
        answer_examples(model, "llama", method, EXAMPLES, "f1", decoding, batch_size=size)
        for method in ("latent", "text")
        for size in (1, 3)
    ]
    for one, three in (runs[:2], runs[2:]):
        assert [x["prediction"] for x in one] == [x["prediction"] for x in three]
        assert [x["nll"] for x in one] == pytest.approx([x["nll"] for x in three], rel=1e-6)


def test_quality_is_of_the_task_s_own_metric():
    """Exact match of a label, or F1 of a solution, says nothing."""
    tokenizer = receiver().tokenizer
    text = Example("c", "p", ("the goat", "a horse"), "i", "d")
    assert answer_quality("f1", text, "Goat!", tokenizer) == {"f1": 1.0, "em": 1.0}
    label = Example("c", "p", ("positive",), "i", "d", ("negative", "positive"))
    assert answer_quality("accuracy", label, "It is positive.", tokenizer) == {"accuracy": 1.0}
    assert answer_quality("f1", label, "negative", tokenizer) == {"accuracy": 0.0}  # a custom task with labels
    solution = Example("c", "p", ("so #### 1,000",), "i", "d")
    assert answer_quality("gsm8k", solution, "#### 1000", tokenizer) == {"gsm8k": 1.0}
    window = Example("c", "p", (" the ferry leaves",), "i", "d")
    assert answer_quality("token_f1", window, "the ferry leaves", tokenizer) == {"token_f1": 1.0}


@pytest.mark.parametrize("quantizer", ["none", "int8", "fsq"])
def test_bytes_are_counted_by_packing(quantizer):
    """The published wire called 33 times the text's bytes compression."""
    model = wire(quantizer=quantizer)
    found = message_sizes(model, CONTEXTS, 4)
    packets = model.pack(CONTEXTS, 4)
    for entry, packet, context in zip(found, packets, CONTEXTS, strict=True):
        assert entry["codec"] == quantizer and entry["latents"] == packet.num_latents == 4
        assert entry["bytes"][quantizer] == len(packet.to_bytes()) == Packet.from_bytes(packet.to_bytes()).num_bytes
        assert entry["context_bytes"] == len(context.encode())
        assert ("fsq" in entry["bytes"]) == (quantizer == "fsq")
        for kind in ("none", "fp16", "int8", "int4"):
            assert entry["bytes"][kind] == HEADER.size + num_payload_bytes(kind, 4, 24)


def test_the_first_token_is_drawn_and_no_other():
    """A draw at every step is sampling, and a nucleus that loses its first token writes noise."""
    scores = torch.tensor([[3.0, 2.0, 1.0, -9.0]]).repeat(4000, 1)
    processor = FirstTokenProcessor(0.96, 0.7, list(range(4000)))
    drawn = processor(torch.zeros(4000, 0, dtype=torch.long), scores)
    assert (drawn.isfinite().sum(1) == 1).all()
    shares = drawn.argmax(1).bincount(minlength=4) / 4000
    expected = (scores[0, :3] / 0.7).softmax(0)  # .77 .18 .04: the third crosses .96
    assert float(expected[:2].sum()) < 0.96 and shares[3] == 0
    torch.testing.assert_close(shares[:3], expected.float(), atol=0.02, rtol=0)
    assert processor(torch.zeros(4000, 1, dtype=torch.long), scores) is scores
    behind = FirstTokenProcessor(0.96, 0.7, list(range(4000)), start=9)
    assert behind(torch.zeros(4000, 0), scores) is scores
    assert torch.equal(behind(torch.zeros(4000, 9), scores), drawn)
    torch.manual_seed(0)
    free = FirstTokenProcessor(0.96, 0.7)(torch.zeros(4000, 0), scores).argmax(1).bincount(minlength=4) / 4000
    torch.testing.assert_close(free[:3], expected.float(), atol=0.02, rtol=0)
    only = FirstTokenProcessor(0.5, 1.0, [0, 1])(torch.zeros(2, 0), scores[:2])
    assert only.argmax(1).tolist() == [0, 0]
    with pytest.raises(ValueError, match="1 seeds for 2 rows"):
        FirstTokenProcessor(0.5, 1.0, [0])(torch.zeros(2, 0), scores[:2])
    for wrong in ((0.0, 1.0), (1.1, 1.0), (0.5, 0.0)):
        with pytest.raises(ValueError, match="first_token"):
            FirstTokenProcessor(*wrong, [0])


def test_a_draw_is_of_the_seed_and_the_example_and_the_rest_is_greedy():
    """A seed that changes nothing, or a run that cannot be repeated, makes three seeds one figure."""
    model = wire()
    reading = reading_of(model, "latent")
    ids = ["a", "b", "c"]

    def texts(**kwargs):
        return write_answers(reading, PROMPTS, ids, Decoding(8, **kwargs))

    hot = {"first_token_temperature": 5.0}
    assert texts(**hot, seed=1) == texts(**hot, seed=1) != texts(**hot, seed=2)
    assert texts() == texts(first_token_top_p=1e-6)  # the likeliest alone
    assert write_answers(reading_of(model, "text"), PROMPTS, ids, Decoding(8, **hot, seed=1)) == write_answers(
        reading_of(model, "replay"), PROMPTS, ids, Decoding(8, **hot, seed=1)
    )
    first = LogitsProcessorList(Decoding(8, **hot, seed=1).processors(ids))
    options = {"max_new_tokens": 8, "do_sample": False, "logits_processor": first}
    assert model.generate("llama", model.encode(CONTEXTS), PROMPTS, **options) == texts(**hot, seed=1)
    longer = write_answers(reading, PROMPTS, ids, Decoding(8, eos_ban_steps=7))
    assert all(len(text) >= len(short) for text, short in zip(longer, texts(), strict=True))
    with pytest.raises(ValueError, match="eos_ban_steps must lie in 0 to max_new_tokens - 1 \\(7\\), got 8"):
        Decoding(8, eos_ban_steps=8)


def test_an_end_that_is_banned_comes_after_the_ban():
    """Counted from the beginning of the text, a ban would hold for the whole answer."""
    model = wire()
    reading = reading_of(model, "latent")
    head = reading.receiver.model.lm_head
    eos = reading.receiver.tokenizer.eos_token_id
    handle = head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([eos]), 100.0))
    try:
        lengths = []
        for steps in (0, 3):
            batch = reading.compose(PROMPTS)
            options = Decoding(8, eos_ban_steps=steps).options(["a", "b", "c"])
            ids = reading.receiver.model.generate(
                **batch.for_generate(), **options, eos_token_id=eos, pad_token_id=eos
            )
            lengths.append((ids != eos).sum(1).tolist())
    finally:
        handle.remove()
    assert lengths == [[0, 0, 0], [3, 3, 3]]


# -- joint and probe


def test_the_joint_answer_is_the_one_that_both_receivers_find_likeliest():
    """An argmax of one receiver's score is that receiver, twice as expensive."""
    model = wire(receivers=("llama", "gpt2"))
    found = answer_jointly(model, EXAMPLES, "f1", SHORT, 4, batch_size=2)
    for row, record in enumerate(found):
        message = model.encode(CONTEXTS[row : row + 1], 4)
        totals = {}
        for name, text in record["proposals"].items():
            if text.strip():
                totals[name] = sum(
                    float(model.score(judge, message, PROMPTS[row : row + 1], [text])[0]) for judge in model.receivers
                )
        assert record["chosen"] == max(totals, key=totals.get)
        assert record["prediction"] == record["proposals"][record["chosen"]]
        assert record["oracle_f1"] >= record["f1"]
        assert record["agreement"] == float(len(set(record["proposals"].values())) == 1)
    with pytest.raises(Refused, match="two receivers"):
        answer_jointly(wire(), EXAMPLES, "f1", SHORT)


def test_a_probe_finds_what_is_there_and_not_what_is_not():
    """A probe that sees its test fold tells classes apart that nothing tells apart."""
    generator = torch.Generator().manual_seed(0)
    labels = [("a", "b", "c")[number % 3] for number in range(120)]
    documents = [str(number) for number in range(120)]
    noise = torch.randn(120, 20, generator=generator)
    signal = noise.clone()
    signal[:, 4] = torch.tensor([{"a": -3.0, "b": 0.0, "c": 3.0}[label] for label in labels]) * 1000 + 5e4
    signal[:, 5] = 7.0  # constant
    right = [found == label for found, label in zip(probe_folds(signal, labels, documents, 0), labels, strict=True)]
    assert sum(right) >= 115
    chance = [found == label for found, label in zip(probe_folds(noise, labels, documents, 0), labels, strict=True)]
    assert 20 <= sum(chance) <= 60
    # each example under its own label's twin: a document that is in two folds would be recognised
    twins = torch.randn(60, 50, generator=generator).repeat_interleave(2, 0)
    coins = [("a", "b")[int(torch.randint(2, (), generator=generator))] for _ in range(60) for _ in (0,)]
    twice = [label for label in coins for _ in range(2)]
    names = [str(number // 2) for number in range(120)]
    assert sum(x == y for x, y in zip(probe_folds(twins, twice, names, 0), twice, strict=True)) < 90
    with pytest.raises(Refused, match="two classes and 5 texts"):
        probe_folds(noise, ["a"] * 120, documents, 0)


def test_the_probe_s_regression_is_the_minimum_of_its_own_loss():
    """A regression that stopped early is a low bar."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(80, 6, generator=generator).double() * 3 + 2
    labels = (features[:, 0] + torch.randn(80, generator=generator).double() > 2).long()
    model = logistic_regression(features, labels, 2)
    logits = model(features)
    scaled = (features - features.mean(0)) / features.std(0, unbiased=False)
    residual = torch.nn.functional.one_hot(labels, 2).double() - logits.softmax(1)
    assert residual.sum(0).abs().max() < 1e-2  # no penalty on the bias
    slopes = torch.linalg.lstsq(torch.cat([scaled, torch.ones(80, 1).double()], 1), logits).solution[:6]
    torch.testing.assert_close(slopes, scaled.T @ residual, atol=2e-2, rtol=0)  # gradient of sum CE + |W|^2 / 2


# -- statistics


def test_the_share_of_the_gain_is_exact_where_it_is_known():
    """The row of the target table is this number."""
    draw = random.Random(0)
    text = [draw.uniform(2, 4) for _ in range(60)]
    closed = [x + draw.uniform(0.3, 0.7) for x in text]
    latent = [c - 0.6 * (c - t) for c, t in zip(closed, text, strict=True)]
    found = gain_share(closed, latent, text)
    assert found["share"] == pytest.approx(0.6) and found["interval"] == pytest.approx([0.6, 0.6])
    assert found["gain"] == pytest.approx(sum(closed) / 60 - sum(text) / 60)
    low, high = found["gain_interval"]
    assert low < found["gain"] < high and high - low < 0.1
    assert gain_share(closed, text, text)["share"] == pytest.approx(1)
    assert gain_share(closed, closed, text)["share"] == pytest.approx(0)
    assert gain_share(closed, latent, text, ["one"] * 60)["interval"] is None
    with pytest.raises(ValueError, match="no gain to have a share of"):
        gain_share(text, text, closed)


def test_the_share_s_interval_draws_documents_as_scipy_does():
    """Windows of one book that are counted as independent make an interval too narrow."""
    draw = random.Random(1)
    documents = [f"book {number // 10}" for number in range(200)]
    level = {name: draw.gauss(0.5, 0.2) for name in set(documents)}
    closed = [4 + draw.gauss(0, 0.05) for _ in documents]
    text = [c - 1 for c in closed]
    latent = [c - level[name] + draw.gauss(0, 0.02) for c, name in zip(closed, documents, strict=True)]
    found = gain_share(closed, latent, text, documents)
    alone = gain_share(closed, latent, text)
    assert found["documents"] == 20 and found["share"] == pytest.approx(alone["share"])
    width = [entry["interval"][1] - entry["interval"][0] for entry in (found, alone)]
    assert width[0] > 2 * width[1]
    per_book = [
        sum(c - x for c, x, name in zip(closed, latent, documents, strict=True) if name == book) / 10
        for book in dict.fromkeys(documents)
    ]
    expected = stats.bootstrap((per_book,), lambda x, axis: x.mean(axis), n_resamples=10_000, method="BCa", rng=0)
    assert found["interval"] == pytest.approx(list(expected.confidence_interval), abs=0.02)


def test_tests_are_of_documents_where_examples_share_them():
    """A p of ten questions about one text is a p of one text."""
    draw = random.Random(2)
    ids = [f"e{number}" for number in range(80)]
    ours = {name: float(draw.random() < 0.7) for name in ids}
    theirs = {name: float(draw.random() < 0.4) for name in ids}
    own = compare(ours, theirs, {name: name for name in ids}, "accuracy")
    expected = mcnemar([ours[name] for name in sorted(ids)], [theirs[name] for name in sorted(ids)])
    assert own["test"] == "McNemar" and own["p"] == expected["p"] == own["mcnemar"]["p"]
    shared = compare(ours, theirs, {name: name[:2] for name in ids}, "accuracy")
    assert shared["test"] == "sign flips" and shared["documents"] == 10 and shared["p"] != expected["p"]
    assert shared["difference"] == pytest.approx(own["difference"])
    lone = difference([1.0, 0.0], [0.0, 0.0], ["a", "a"])
    assert lone["interval"] is None and lone["p"] == 1.0
    assert mean_interval([0.5, 0.5, 0.5]) == [0.5, 0.5]
    with pytest.raises(ValueError, match="1 only here; 1 only there; the first: e0"):
        compare({"e0": 1.0, "e1": 0.0}, {"e1": 0.0, "e2": 1.0}, {}, "f1")


# -- the runner


def labelled(count=12):
    labels = ("negative", "positive")
    return [
        Example(
            f"{'good' if number % 2 else 'bad'} film {number}",
            "\nWhat is it?",
            (labels[number % 2],),
            f"s{number}",
            str(number),
            labels,
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Every method but llmlingua2, two receivers, two numbers of latents, two seeds."""
    folder = tmp_path_factory.mktemp("evaluation")
    model = wire(receivers=("llama", "gpt2"), pooling="queries", quantizer="fsq")
    settings = WireSettings(
        methods=tuple(name for name in METHODS if name != "llmlingua2"),
        latent_lens=(2, 4),
        decoding=Decoding(4),
        latency_examples=1,
        resamples=200,
    )
    rows = labelled()
    examples = {("squad", 1): EXAMPLES, ("squad", 2): EXAMPLES, ("sst2", 1): rows[:10], ("sst2", 2): rows[2:]}
    lines = []
    evaluation = WireEvaluation(
        model, examples, {"squad": "f1", "sst2": "accuracy"}, settings, folder / "parts", lines.append
    )
    return evaluation, *evaluation.run(), lines


def test_every_method_answers_every_example_or_says_why_not(evaluated):
    """A method that silently left out what it could not do would be compared on other examples."""
    evaluation, report, records, lines = evaluated
    groups = {}
    for record in records:
        key = tuple(record[name] for name in ("dataset", "method", "receiver", "latent_len", "seed"))
        groups.setdefault(key, set()).add(record["id"])
    assert all(len(ids) == (3 if key[0] == "squad" else 10) for key, ids in groups.items())
    found = {(key[0], key[1]) for key in groups}
    refused = {(entry["dataset"], entry["method"]) for entry in report["refused"]}
    assert found | refused == {(name, method) for name in ("squad", "sst2") for method in evaluation.settings.methods}
    assert ("squad", "linear_probe") in refused and ("sst2", "linear_probe") in found
    assert ("squad", "raw") in refused and ("squad", "adapter") in refused
    assert {key[2] for key in groups if key[1] == "joint"} == {None}
    assert {(key[2], key[3]) for key in groups if key[1] == "linear_probe"} == {
        (None, 2),
        (None, 4),
        ("llama", None),
        ("gpt2", None),
    }
    probe = [x for x in report["results"] if x["method"] == "linear_probe"]
    assert all(entry["metrics"]["accuracy"]["mean"] >= 0 for entry in probe)
    assert not [line for line in lines if "kept" in line and "squad" not in line]
    assert json.dumps(report)


def test_the_report_compares_with_text_and_with_latents_and_adjusts_over_all(evaluated):
    """One p of forty below .05 is what chance gives."""
    _, report, records, _ = evaluated
    comparisons = report["comparisons"]
    assert [entry["p_holm"] for entry in comparisons] == holm([entry["p"] for entry in comparisons])
    about = {
        (x["dataset"], x["receiver"], x["method"], x["latent_len"], x["against"], x["metric"]) for x in comparisons
    }
    assert ("squad", "llama", "latent", 4, "text", "f1") in about
    assert ("squad", "gpt2", "closed_book", None, "latent", "nll") in about
    assert ("sst2", "llama", "shuffled", 2, "latent", "accuracy") in about
    assert ("sst2", None, "linear_probe", 2, "text", "accuracy") in about
    assert ("squad", None, "joint", 4, "latent", "em") in about
    assert all(
        entry["latent_len"] in (None, entry["against_latent_len"]) or entry["against"] == "text"
        for entry in comparisons
    )
    replay = [x for x in comparisons if x["method"] == "replay" and x["against"] == "text"]
    assert replay and all(entry["difference"] == 0 and entry["p"] == 1 for entry in replay)
    result = next(
        x for x in report["results"] if (x["dataset"], x["receiver"], x["method"]) == ("sst2", "llama", "text")
    )
    own = [x for x in records if (x["dataset"], x["receiver"], x["method"]) == ("sst2", "llama", "text")]
    assert result["examples"] == 12 and result["metrics"]["nll"]["seeds"] == 2
    per_seed = [sum(x["nll"] for x in own if x["seed"] == seed) / 10 for seed in (1, 2)]
    assert result["metrics"]["nll"]["mean"] == pytest.approx(sum(per_seed) / 2)
    assert result["metrics"]["nll"]["std"] == pytest.approx(abs(per_seed[0] - per_seed[1]) / math.sqrt(2))
    latent = next(
        x
        for x in report["results"]
        if (x["dataset"], x["receiver"], x["method"], x["latent_len"]) == ("squad", "llama", "latent", 4)
    )
    message = next(x for x in report["messages"] if (x["dataset"], x["latent_len"]) == ("squad", 4))
    assert latent["tokens"] == 4 and latent["bytes"] == message["bytes"]["fsq"]
    assert latent["tokens_saved"] == pytest.approx(latent["context_tokens"] / 4)
    shares = {(x["receiver"], x["method"], x["latent_len"]) for x in report["gain_share"] if x["dataset"] == "squad"}
    assert {("llama", "latent", 2), ("gpt2", "zero", 4), ("llama", "shuffled", 4)} <= shares
    assert {x["method"] for x in report["latency"]} == {"text", "latent", "token_budget", "closed_book"}
    assert all(x["prefill"] > 0 and x["token"] > 0 for x in report["latency"])


def test_equal_examples_are_answered_once_and_finished_parts_are_kept(evaluated, tmp_path):
    """Three seeds of a whole test set are three times the same work, an interrupted night is one too."""
    evaluation, report, records, lines = evaluated
    kept = [line for line in lines if "kept from an earlier run" in line]
    assert [line for line in kept if "] text squad llama" in line and "seed 2" in line]
    assert not [line for line in kept if "shuffled" in line]
    again = []
    evaluation.say = again.append
    second, answers = evaluation.run()
    assert answers == records
    # what refuses does so again, in two lines
    assert len([line for line in again if "kept" in line]) + 2 * len(report["refused"]) == len(again)
    assert second["comparisons"] == report["comparisons"]


def test_answers_of_other_weights_or_settings_are_not_taken(tmp_path):
    """Yesterday's figures under today's name are wrong without a sign of it."""

    def run(model, **kwargs):
        lines = []
        settings = WireSettings(methods=("latent",), decoding=Decoding(3), latency_examples=0, resamples=50, **kwargs)
        WireEvaluation(model, {("squad", 0): EXAMPLES}, {"squad": "f1"}, settings, tmp_path, lines.append).run()
        return sum("kept" in line for line in lines)

    model = wire()
    assert run(model) == 0 and run(model) == 2
    assert run(model, nll_tokens=1) == 1  # the messages are the same
    with torch.no_grad():
        model.receivers["llama"].model.lm_head.weight.mul_(2)
    assert run(model) == 0
    with torch.no_grad():
        model.encoder.to_latent.weight.mul_(2)
    assert run(model) == 0


def test_an_interrupted_part_leaves_nothing_half(tmp_path, monkeypatch):
    """Half a part that is taken for a whole one is a comparison of other examples."""
    import trainers.evaluation.wire_evaluation as module

    settings = WireSettings(methods=("text", "latent"), decoding=Decoding(3), latency_examples=0, resamples=50)
    arguments = (wire(), {("squad", 0): EXAMPLES}, {"squad": "f1"}, settings, tmp_path)
    answered = module.answer_examples

    def broken(model, name, method, *rest):
        if method == "latent":
            raise KeyboardInterrupt
        return answered(model, name, method, *rest)

    monkeypatch.setattr(module, "answer_examples", broken)
    with pytest.raises(KeyboardInterrupt):
        WireEvaluation(*arguments).run()
    assert sorted(path.name.split("-")[0] for path in tmp_path.iterdir()) == ["message", "text"]
    monkeypatch.setattr(module, "answer_examples", answered)
    lines = []
    _, records = WireEvaluation(*arguments, lines.append).run()
    assert [line for line in lines if "] text squad" in line][0].endswith("kept from an earlier run")
    assert len(records) == 6


def test_wrong_settings_are_told_before_anything_is_answered(tmp_path):
    """Each would stop a night's evaluation in the middle, or give a table of nothing."""
    examples, metrics = {("squad", 0): EXAMPLES}, {"squad": "f1"}
    with pytest.raises(ValueError, match="unknown method 'latents': known are text, latent"):
        WireSettings(methods=("latents",))
    for field in ("batch_size", "resamples", "nll_tokens"):
        with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
            WireSettings(**{field: 0})
    with pytest.raises(ValueError, match="latent_len must be at least 1, got 0"):
        WireSettings(latent_lens=(4, 0))
    with pytest.raises(ValueError, match="more than the 16 queries"):
        WireEvaluation(wire(pooling="queries"), examples, metrics, WireSettings(latent_lens=(17,)), tmp_path)
    with pytest.raises(ValueError, match="a latent of every 4 tokens"):
        WireEvaluation(wire(pooling="patches"), examples, metrics, WireSettings(latent_lens=(4,)), tmp_path)
    with pytest.raises(ValueError, match="No receiver is attached"):
        WireEvaluation(wire(receivers=()), examples, metrics, WireSettings(), tmp_path)
    with pytest.raises(ValueError, match="no examples"):
        WireEvaluation(wire(), {}, metrics, WireSettings(), tmp_path)
    with pytest.raises(ValueError, match="reads 256: give shorter contexts"):
        read(wire(receivers=("gpt2",)), "gpt2", "text", ["word " * 600]).compose(["?"])


def test_a_summary_without_closed_book_has_no_share():
    """A share of a gain that nobody measured is a guess."""
    records = [
        {
            "dataset": "text",
            "seed": 0,
            "method": method,
            "receiver": "llama",
            "latent_len": None,
            "id": str(place),
            "document": str(place),
            "token_f1": 0.5,
            "nll": nll,
        }
        for method, nll in (("text", 2.0), ("latent", 2.5), ("closed_book", 3.0))
        for place in range(3)
    ]
    found = summarize(records, [], {"text": "token_f1"}, 50)
    assert found["gain_share"][0]["share"] == pytest.approx(0.5)
    assert not summarize(records[:6], [], {"text": "token_f1"}, 50)["gain_share"]


@pytest.mark.slow
def test_a_trained_wire_has_its_share_and_the_controls_have_none(trained_reader, tmp_path):  # noqa: F811
    """Controls that come out well, or a text that does not, are a fault of the table before they are one of a wire."""
    rows = rooms(0)
    model = wire_of(trained_reader)
    trainer_of(model, tmp_path / "run", rows, max_steps=260, per_device_train_batch_size=32).train()
    examples = [Example(**row, id=str(place), document=str(place)) for place, row in enumerate(rows)]
    methods = ("text", "latent", "closed_book", "token_budget", "shuffled", "zero", "replay")
    settings = WireSettings(methods, decoding=Decoding(12), batch_size=32, latency_examples=0, resamples=2000)
    report, _ = WireEvaluation(model, {("custom", 0): examples}, {"custom": "f1"}, settings, tmp_path / "parts").run()
    em = {entry["method"]: entry["metrics"]["em"]["mean"] for entry in report["results"]}
    assert em["text"] == em["replay"] >= 0.9 and em["latent"] >= 0.9
    assert max(em["closed_book"], em["shuffled"], em["zero"]) <= 0.1
    share = {entry["method"]: entry for entry in report["gain_share"]}
    assert share["latent"]["gain"] > 1 and share["latent"]["gain_interval"][0] > 0.5
    assert share["latent"]["interval"][0] > 0.8
    # this receiver has never seen a question without a text, so that any text brings it something
    assert max(share[name]["interval"][1] for name in ("shuffled", "zero")) < 0.4
    p = {(x["method"], x["against"]): x for x in report["comparisons"] if x["metric"] == "em"}
    assert p["shuffled", "latent"]["p_holm"] < 1e-4 and p["latent", "text"]["p_holm"] > 0.05


def test_latencies_are_of_one_example_at_a_time():
    """A time that leaves out the encoder makes every wire fast."""
    model = wire()
    seen = []
    forward = model.encoder.forward
    model.encoder.forward = lambda *args: seen.append(args[0].shape[0]) or forward(*args)
    found = latency(model, "llama", "latent", EXAMPLES, 4, new_tokens=3)
    assert seen == [1] * 4 and set(found) == {"encode", "prefill", "token"}
    assert isinstance(model.receivers["llama"], Receiver) and all(value > 0 for value in found.values())


def test_a_receiver_whose_rows_would_be_empty_is_not_asked_without_a_context():
    """Plain text, no BOS, no prompt: an error here would throw away what the other methods have measured."""
    with pytest.raises(Refused, match="--bos yes"):
        Reading(receiver("llama", Template(bos=False)), [0]).compose([""])
