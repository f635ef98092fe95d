"""Training an idea model: which part learns when, what every step of thinking is asked to say, and what comes out."""

import json

import pytest
import torch

from modeling_latentforge import LatentForgeIdea, LatentForgeIdeaConfig
from tests.modeling_latentforge.test_idea import ENCODER
from tests.modeling_latentforge.test_wire import receiver
from tests.trainers.test_wire_trainer import fingerprint, rooms
from tests.trainers.test_wire_trainer import reader as trained_reader  # noqa: F401  (a fixture)
from tests.trainers.training_helpers import tiny_args, train_log
from trainers import IdeaConfig, IdeaTrainer
from trainers.losses.answers import answer_loss


SPELLED = ("one two three four five six seven eight nine ten").split()


@pytest.fixture(scope="module")
def reader():
    return receiver("llama")


def idea_of(reader, **kwargs):
    torch.manual_seed(0)
    fields = {"num_ideas": 4, "latent_size": 24, "middle_hidden": 32, "compression_hidden": 48, "prefix_len": 6}
    fields |= {"encoder_config": ENCODER, "source": "bytes", "initializer_range": 0.1, "receiver": None}
    model = LatentForgeIdea(LatentForgeIdeaConfig(**{**fields, **kwargs}))
    model.add_receiver("llama", reader)
    return model


def counting(count=8):
    """Chains of two and of three steps."""
    rows = []
    for number in range(count):
        steps = tuple(SPELLED[(number + step) % 10] for step in range(2 + number % 2))
        rows.append({"context": f"From {number} on.", "prompt": "", "answers": (f"at {number}",), "steps": steps})
    return rows


def trainer_of(model, output_dir, rows, **kwargs):
    kwargs = {"max_steps": 2, "learning_rate": 3e-3, "per_device_train_batch_size": 8, "sample_outputs": 0, **kwargs}
    return IdeaTrainer(model, tiny_args(IdeaConfig, output_dir, **kwargs), train_dataset=rows, eval_dataset=rows)


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def moved(before, after):
    """First parts of the names of weights that are no longer the same."""
    return {".".join(name.split(".")[:2]) for name, value in before.items() if not torch.equal(value, after[name])}


COMPRESSION, BRIDGE, MIDDLE = {"encoder.norm", "encoder.to_latent"}, {"bridges.llama"}, {"middle.norm", "middle.mlp"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"align_steps": 2}, BRIDGE),
        ({"encoder_steps": 2}, BRIDGE | COMPRESSION),
        ({}, BRIDGE | COMPRESSION | MIDDLE),
        ({"middle_alone": True}, MIDDLE),
        ({"train_backbone": True}, BRIDGE | COMPRESSION | MIDDLE | {"encoder.backbone"}),
        ({"max_steps": 3, "align_steps": 1, "encoder_steps": 1, "middle_alone": True}, BRIDGE | COMPRESSION | MIDDLE),
    ],
)
def test_each_stage_moves_its_part_and_backbones_stay(reader, tmp_path, options, expected):
    """Weight decay alone moves what has no gradient, and a backbone that moved is not the one that is named."""
    model, receiver_before = idea_of(reader, steps=2), fingerprint(reader.model)
    before = copy_of(model)
    trainer_of(model, tmp_path, counting(4), weight_decay=0.1, **options).train()
    assert moved(before, copy_of(model)) == expected
    assert fingerprint(reader.model) == receiver_before
    frozen = {name for name, x in model.named_parameters() if not x.requires_grad}
    assert all(name.startswith("encoder.backbone") for name in frozen), "the last stage's freezing ends with the run"
    assert bool(frozen) != bool(options.get("train_backbone"))


def test_a_run_through_all_stages_resumes_in_its_own(reader, tmp_path):
    """A stage that is counted from the resumption on trains another model."""
    options = {"max_steps": 4, "align_steps": 1, "encoder_steps": 2, "save_strategy": "steps", "save_steps": 2}
    whole, again = idea_of(reader, steps=2), idea_of(reader, steps=2)
    trainer_of(whole, tmp_path, counting(4), **options).train()
    trainer_of(again, tmp_path, counting(4), **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert fingerprint(whole) == fingerprint(again)


def test_every_step_is_asked_for_its_own_text_and_those_behind_the_chain_for_the_answer(reader, tmp_path):
    """One step off, the last thing that is thought is never said."""
    model = idea_of(reader, steps=4)
    rows = [*counting(3), {"context": "No chain.", "prompt": "", "answers": ("none",)}]
    trainer = trainer_of(model, tmp_path, rows, steps_weight=0.5)
    inputs = trainer.data_collator(rows)
    model.eval()
    found = trainer.parts(model, inputs, trainer.drawn())["steps"]
    with torch.no_grad():
        message = model.encode([row["context"] for row in rows])
        for row, example in enumerate(rows[:3]):
            nats = []
            for number in (1, 2, 3):  # the fourth says the answer, as the part `answer`
                words = [*example["steps"], *example["answers"] * 4]
                text = words[number - 1] if number < len(example["steps"]) else example["answers"][0]
                ideas = message.thoughts[number][row : row + 1]
                injection = model.bridges["llama"](ideas)
                batch = reader.compose(injection, [""], [text])
                nats.append(answer_loss(*reader.answer_logits(injection, batch)))
            torch.testing.assert_close(found[row], torch.cat(nats).mean(), atol=1e-4, rtol=1e-4)
    assert found[3] == 0
    model.train()
    trainer.train()
    for entry in train_log(trainer):
        assert entry["loss"] == pytest.approx(entry["answer"] + 0.5 * entry["steps"], abs=1e-3)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_answer"] + 0.5 * metrics["eval_steps"], abs=1e-4)
    plain = trainer_of(idea_of(reader), tmp_path, rooms(0)[:8], kd_weight=0.5)
    plain.train()
    assert "steps" not in train_log(plain)[0] and train_log(plain)[0]["kd"] > 0
    assert "eval_steps" not in plain.evaluate()


def test_first_stages_say_the_text_itself_and_nothing_of_the_answer(reader, tmp_path):
    """An alignment to answers teaches the bridge what the middle model is there for."""
    losses = []
    for answer in ("pearl", "something else altogether"):
        rows = [{**row, "answers": (answer,)} for row in rooms(0)[:8]]
        trainer = trainer_of(idea_of(reader, steps=2), tmp_path, rows, align_steps=2, kd_weight=1.0, repeat_tokens=5)
        trainer.train()
        losses.append([entry["answer"] for entry in train_log(trainer)])
        assert "kd" not in train_log(trainer)[0]
    assert losses[0] == losses[1]


def test_the_best_checkpoint_is_loaded_and_samples_of_every_step_are_kept(reader, tmp_path):
    """A log of losses does not show a model that says the same to every text."""
    model = idea_of(reader, steps=2)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(
        model,
        tmp_path,
        counting(),
        **options,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        sample_outputs=2,
        sample_tokens=4,
        gradient_accumulation_steps=2,
        per_device_train_batch_size=4,
        bf16=True,
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint is not None
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1, 2, 2]
    assert all(len(line["said_after_each_step"]) == 3 for line in lines)
    assert lines[0]["context"] == "From 0 on." and lines[0]["answer"] == "at 0"


@pytest.mark.slow
def test_ideas_come_to_say_their_answers_and_to_stop(trained_reader, tmp_path):  # noqa: F811
    """The first model's targets had no end, and its texts none either."""
    rows, before = counting(), fingerprint(trained_reader.model)
    model = idea_of(trained_reader, steps=3)
    trainer_of(model, tmp_path, rows, max_steps=300, learning_rate=1e-2, lr_scheduler_type="cosine").train()
    model.eval()
    texts = [row["context"] for row in rows]
    said = model.generate_batch(texts, max_new_tokens=24)
    assert sum(text == row["answers"][0] for text, row in zip(said, rows, strict=True)) >= 7, said
    with torch.no_grad():
        first = model.read(model.encode(texts).thoughts[1], max_new_tokens=24)
    assert sum(text == row["steps"][0] for text, row in zip(first, rows, strict=True)) >= 7, first
    assert fingerprint(trained_reader.model) == before


def test_wrong_settings_are_told(reader, tmp_path):
    """Each would train for hours to nothing."""
    with pytest.raises(ValueError, match="takes no step of thinking"):
        trainer_of(idea_of(reader, steps=0), tmp_path, counting(), middle_alone=True)
    for options, message in (
        ({"align_steps": -1}, "align_steps must not be negative"),
        ({"repeat_tokens": 0}, "repeat_tokens must be at least 1"),
        ({"min_latents": 2}, "thinks with all of its"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_args(IdeaConfig, tmp_path, **options)
