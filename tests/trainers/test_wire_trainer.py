"""Training a wire: through a frozen receiver that knows how to read the text itself."""

import hashlib
import json
import random
import statistics

import pytest
import torch
from torch.nn import functional as F

from modeling_latentforge.latent_receiver import answer_nll
from tests.modeling_latentforge.test_wire import receiver, wire
from tests.trainers.training_helpers import tiny_args
from trainers import WireConfig, WireTrainer
from trainers.losses.answers import answer_divergence, answer_loss


COLOURS = (
    "amber azure beige black bronze coral cream crimson ebony fawn gold green grey indigo ivory jade khaki lemon "
    "lilac lime mauve navy ochre olive pearl pink plum rose ruby rust sand teal"
).split()


def rooms(seed):
    """Thirty-two texts, a question each, whose answers nobody can know without the text."""
    colours = random.Random(seed).sample(COLOURS, 32)
    return [
        {"context": f"Room {number}: the key is {colour}.", "prompt": "\nThe key?", "answers": (colour,)}
        for number, colour in enumerate(colours)
    ]


@pytest.fixture(scope="module")
def reader():
    """A receiver that answers such questions from text."""
    torch.manual_seed(0)
    found = receiver("llama")
    found.model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(found.model.parameters(), 3e-3)
    for step in range(150):
        contexts, prompts, answers = zip(
            *((row["context"], row["prompt"], row["answers"][0]) for row in rooms(step)), strict=True
        )
        batch = found.compose(found.text_injection(contexts), prompts, answers)
        loss = answer_nll(*found.answer_logits(None, batch)).sum() / len(prompts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found.model.requires_grad_(False).eval()
    return found


def fingerprint(model):
    return hashlib.sha256(b"".join(x.contiguous().numpy().tobytes() for x in model.state_dict().values())).hexdigest()


def wire_of(reader, mode="soft", **kwargs):
    model = wire(mode, receivers=(), **kwargs)
    model.add_receiver("llama", reader, mode=mode)
    return model


def trainer_of(model, output_dir, rows, **kwargs):
    kwargs = {"max_steps": 4, "learning_rate": 3e-3, "per_device_train_batch_size": 8, **kwargs}
    return WireTrainer(model, tiny_args(WireConfig, output_dir, **kwargs), train_dataset=rows, eval_dataset=rows)


def right_answers(model, message, rows):
    texts = model.generate("llama", message, [row["prompt"] for row in rows], max_new_tokens=12, do_sample=False)
    return sum(text == row["answers"][0] for text, row in zip(texts, rows, strict=True)) / len(rows)


@pytest.mark.slow
def test_latents_come_to_carry_the_answer_and_nothing_else_does(reader, tmp_path):
    """A wire whose right answers stay right with another text's latents has taught its bridge the answers."""
    rows, before = rooms(0), fingerprint(reader.model)
    model = wire_of(reader)
    trainer = trainer_of(model, tmp_path, rows, max_steps=260, per_device_train_batch_size=32)
    trainer.train()
    model.eval()
    with torch.no_grad():
        message = model.encode([row["context"] for row in rows])
        assert right_answers(model, message, rows) >= 0.95
        message.last_hidden_state, message.latent_mask = (
            x.roll(1, 0) for x in (message.last_hidden_state, message.latent_mask)
        )
        assert right_answers(model, message, rows) <= 0.1, "shuffled"
        message.last_hidden_state = torch.zeros_like(message.last_hidden_state)
        assert right_answers(model, message, rows) <= 0.1, "zero"
    assert fingerprint(reader.model) == before, "the receiver is frozen"


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_a_resumed_run_is_the_run_that_was_not_broken_off(reader, tmp_path, strategy):
    """Receivers, numbers of latents and texts that are drawn anew after a fault train another wire."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "min_latents": 4, "seed": 3}
    options["train_sampling_strategy"] = strategy
    whole = wire_of(reader, pooling="queries")
    trainer_of(whole, tmp_path / "whole", rooms(0), **options).train()
    broken = wire_of(reader, pooling="queries")
    trainer_of(broken, tmp_path / "broken", rooms(0), **options).train()
    again = wire_of(reader, pooling="queries")
    trainer = trainer_of(again, tmp_path / "broken", rooms(0), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3"))
    assert fingerprint(whole) == fingerprint(broken) == fingerprint(again)


@pytest.mark.parametrize("resumed_from", [20, 32])
def test_texts_of_similar_length_share_a_step_in_an_order_of_each_epoch(reader, tmp_path, resumed_from):
    """A long text beside short ones makes them as long; one order for all epochs, or another one after a fault, shows
    some texts twice and others never."""
    rows = [{**row, "context": row["context"] * (1 + number % 8)} for number, row in enumerate(rooms(0) + rooms(1))]
    seen: list[list[str]] = []

    class Watched(WireTrainer):
        def parts(self, model, inputs, draw):
            if model.training:
                seen.append(inputs["contexts"])
            return super().parts(model, inputs, draw)

    def train(resume=None):
        args = tiny_args(
            WireConfig,
            tmp_path,
            max_steps=34,
            per_device_train_batch_size=4,
            save_strategy="steps",
            save_steps=resumed_from,
            train_sampling_strategy="group_by_length",
        )
        seen.clear()
        trainer = Watched(wire_of(reader, pooling="queries"), args, train_dataset=rows, eval_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.evaluate()["eval_loss"] > 0
        return list(seen)

    whole = train()
    first, second = ([len(text) for step in part for text in step] for part in (whole[:16], whole[16:32]))
    assert sorted(first) == sorted(second) == sorted(len(row["context"]) for row in rows), "each text once an epoch"
    assert first != second
    spans = [max(map(len, step)) - min(map(len, step)) for step in whole[1:16]]
    assert statistics.mean(spans) < max(first) / 3, "a random step has both long and short ones"
    assert train(str(tmp_path / f"checkpoint-{resumed_from}")) == whole[resumed_from:]


def test_every_part_is_in_the_log_and_in_the_evaluation(reader, tmp_path):
    """A loss whose parts cannot be told apart cannot be tuned."""
    model = wire_of(reader)
    trainer = trainer_of(model, tmp_path, rooms(0), kd_weight=0.5, diagnose_steps=2, logging_steps=1)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "answer" in entry]
    assert len(logged) == 4 and all(entry["kd"] > 0 for entry in logged)
    assert all(abs(entry["loss"] - entry["answer"] - 0.5 * entry["kd"]) < 1e-3 for entry in logged)
    found = trainer.evaluate()
    assert abs(found["eval_loss"] - found["eval_answer"] - 0.5 * found["eval_kd"]) < 1e-5
    assert found["eval_answer_llama"] == pytest.approx(found["eval_answer"])
    lines = [json.loads(line) for line in (tmp_path / "diagnostics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 2]
    assert all(line["gradient_of_answer"] > 0 and line["gradient_of_kd"] > 0 for line in lines)


def test_a_receiver_that_reads_the_text_has_nothing_to_learn_from_itself(reader):
    """One place off, the teacher speaks about another token, and the divergence is not 0."""
    rows = rooms(1)
    contexts, prompts, answers = zip(
        *((row["context"], row["prompt"], row["answers"][0]) for row in rows), strict=True
    )
    logits = [
        reader.answer_logits(None, reader.compose(reader.text_injection(contexts), prompts, answers)) for _ in range(2)
    ]
    assert float(answer_divergence(logits[0][0], logits[1][0], logits[0][1]).abs().max()) < 1e-6


def test_weights_of_an_answer_are_those_that_were_asked_for():
    """The mean of the whole answer hides a first token that is never right."""
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 9)
    targets = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]])
    nats = -logits.log_softmax(-1)
    first = nats[1, 0, 5], nats[1, 1, 6]
    torch.testing.assert_close(answer_loss(logits, targets)[1], (first[0] + first[1]) / 2)
    torch.testing.assert_close(answer_loss(logits, targets, first_weight=2.0)[1], (3 * first[0] + first[1]) / 4)
    torch.testing.assert_close(answer_loss(logits, targets, num_tokens=1)[1], first[0])
    torch.testing.assert_close(answer_loss(logits, targets)[0], F.cross_entropy(logits[0], targets[0]))
    with pytest.raises(ValueError, match="no token of an answer"):
        answer_loss(logits, torch.full((2, 4), -100))


def test_wrong_settings_are_told(reader, tmp_path):
    """Each would train for hours to nothing."""
    with pytest.raises(ValueError, match="nothing would be learned"):
        tiny_args(WireConfig, tmp_path, answer_weight=0.0)
    with pytest.raises(ValueError, match="No receiver is attached"):
        WireTrainer(wire(receivers=()), tiny_args(WireConfig, tmp_path))
    with pytest.raises(ValueError, match="min_latents must be at least 1"):
        tiny_args(WireConfig, tmp_path, min_latents=0)
    with pytest.raises(ValueError, match="take group_by_length"):
        tiny_args(WireConfig, tmp_path, train_sampling_strategy="batch_rebalance")
