"""What a wire learns by beside answers, LoRA on its receivers, and what fits into memory."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from modeling_latentforge import Template
from tests.modeling_latentforge.test_wire import ANSWERS, CONTEXTS, PROMPTS, receiver, wire
from tests.trainers.test_wire_trainer import fingerprint, rooms
from tests.trainers.training_helpers import tiny_args
from trainers import WireConfig, WireTrainer
from trainers.elastic import elastic_plan
from trainers.losses.answers import align_loss, answer_divergence, first_token_accuracy, repeat_loss
from trainers.wire_lora import adapter_parameters, add_adapter, without_adapter
from trainers.wire_models import load_receiver, load_wire, parse_receivers, save_wire
from trainers.wire_trainer import LEARNING, beginning


ROWS = rooms(0)[:8]


def lora_wire(kinds=("llama", "gpt2"), dropout=0.0):
    model = wire(receivers=kinds)
    for name in kinds:
        torch.manual_seed(5)
        add_adapter(model.receivers[name], 2, dropout=dropout)
    return model


def trainer_of(model, output_dir, **kwargs):
    kwargs = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, **kwargs}
    return WireTrainer(model, tiny_args(WireConfig, output_dir, **kwargs), train_dataset=ROWS, eval_dataset=ROWS)


def base_weights(reader):
    return {name.replace(".base_layer", ""): x.clone() for name, x in reader.model.state_dict().items()
            if "lora_" not in name}  # fmt: skip


# -- objectives as functions


def test_a_repeated_text_is_not_told_to_end():
    """The first tokens of a text that goes on are no text that ends there."""
    torch.manual_seed(0)
    logits, targets = torch.randn(2, 4, 9), torch.tensor([[1, 2, 3, 8], [5, 8, -100, -100]])
    nats = -logits.log_softmax(-1)
    found = repeat_loss(logits, targets, 8)
    torch.testing.assert_close(found[0], F.cross_entropy(logits[0, :3], targets[0, :3]))
    torch.testing.assert_close(found[1], nats[1, 0, 5])
    torch.testing.assert_close(repeat_loss(logits, targets, 1)[0], nats[0, 0, 1])


def test_only_pairs_that_are_there_are_aligned():
    """Padding that is pulled towards an embedding moves vectors that no receiver reads."""
    torch.manual_seed(0)
    slots, embeddings = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    targets = torch.tensor([[1, 2, -100, -100, -100], [1, 2, 3, 4, 5]])
    expected = (slots[:, :2] - embeddings[:, :2]).square().mean((1, 2))
    torch.testing.assert_close(align_loss(slots, mask, embeddings, targets), expected)
    with pytest.raises(ValueError, match="nothing to align"):
        align_loss(slots, torch.zeros(2, 3), embeddings, targets)


def test_the_first_tokens_accuracy_counts_rows():
    """A mean over all tokens hides that the first is never right."""
    logits = F.one_hot(torch.tensor([[1, 2], [3, 4]]), 6).float()
    assert first_token_accuracy(logits, torch.tensor([[1, 0], [0, 4]])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_beginning_is_of_so_many_tokens(kind):
    """Cut elsewhere, the gist's targets are other tokens than those of the text."""
    tokenizer = receiver(kind).tokenizer
    for text in CONTEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer(beginning(tokenizer, text, 5), add_special_tokens=False)["input_ids"] == ids[:5]


def test_every_objective_is_logged_and_judged(tmp_path):
    """A part that is weighed and never computed makes a run that was told to learn by it."""
    trainer = trainer_of(
        lora_wire(), tmp_path, max_steps=6, kd_weight=0.5, gist_weight=0.2, gist_target_len=3, align_weight=0.1,
        text_warmup_steps=4, diagnose_steps=1,
    )  # fmt: skip
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "diagnostics.jsonl").read_text().splitlines()]
    assert [line["mode"] for line in lines] == ["text", "latent", "text", "latent", "latent", "latent"]
    for line in lines:
        parts = {"text", "align"} if line["mode"] == "text" else {"answer", "kd", "gist", "align"}
        assert {name for name in line if f"gradient_of_{name}" in line} == parts
        assert all(line[f"gradient_of_{part}"] > 0 for part in parts)
        assert 0 <= line["first_acc"] <= 1 and line["input_shape"][0] == 4
    assert lines[0]["sec_per_step"] is None and all(line["sec_per_step"] > 0 for line in lines[1:])
    weights = {"text": 1.0, "answer": 1.0, "kd": 0.5, "gist": 0.2, "align": 0.1}
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        assert entry["loss"] == pytest.approx(sum(weights[x] * entry[x] for x in weights if x in entry), abs=1e-3)
        assert "first_acc" in entry
    found = trainer.evaluate()
    expected = sum(weight * found[f"eval_{part}"] for part, weight in weights.items() if part != "text")
    assert found["eval_loss"] == pytest.approx(expected) and 0 <= found["eval_first_acc_gpt2"] <= 1


# -- LoRA


@pytest.mark.parametrize("mode", ["soft", "cross"])
def test_adapters_learn_and_the_model_under_them_does_not(mode, tmp_path):
    """A receiver that was changed for good is not the one that everybody else has."""
    model = wire(mode, receivers=("llama",))
    reader = model.receivers["llama"]
    before, bare = fingerprint(reader.model), base_weights(reader)
    add_adapter(reader, 2, dropout=0.1)
    start = {name: x.clone() for name, x in adapter_parameters(reader).items()}
    trainer = trainer_of(model, tmp_path, kd_weight=0.5)
    dropped = set()
    for name, module in reader.model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.register_forward_hook(
                lambda module, *_, name=name: dropped.add(module.training == ("lora" in name))
            )
    trainer.train()
    moved = [name for name, x in adapter_parameters(reader).items() if not torch.equal(x, start[name])]
    assert len(moved) == len(start)
    after = {name.removeprefix("base_model.model."): x for name, x in base_weights(reader).items()}
    assert after.keys() == bare.keys() and all(torch.equal(after[name], bare[name]) for name in bare)
    assert not any(x.requires_grad for x in reader.model.parameters())
    assert not any(module.training for module in reader.model.modules()), "no dropout afterwards"
    assert dropped == {True}, "and dropout on LoRA alone while it learns"
    assert not hasattr(model, LEARNING) and not any("lora" in name for name in model.state_dict())
    assert before == fingerprint(receiver("llama").model)


def test_the_teacher_of_an_adapted_receiver_is_the_bare_one(tmp_path):
    """Taught by itself with its own adapter, a receiver learns whatever it already says."""
    model = lora_wire(("llama",))
    reader = model.receivers["llama"]
    text = reader.text_injection(CONTEXTS)
    bare, _ = receiver("llama").score(text, PROMPTS, ANSWERS)
    with torch.no_grad():
        for name, parameter in adapter_parameters(reader).items():
            torch.nn.init.normal_(parameter) if "lora_B" in name else None
    adapted, _ = reader.score(text, PROMPTS, ANSWERS)
    with without_adapter(reader):
        again, _ = reader.score(text, PROMPTS, ANSWERS)
    assert torch.equal(again, bare) and not torch.allclose(adapted, bare)
    trainer = trainer_of(model, tmp_path, kd_weight=1.0)
    inputs = trainer.data_collator(ROWS)
    texts, prompts, answers = inputs["contexts"], inputs["prompts"], inputs["answers"]
    with torch.no_grad():
        found = trainer.parts(model, inputs, trainer.drawn())["kd"]
        student, targets = model.ask("llama", model.encode(texts), prompts, answers)
        bare = receiver("llama")
        teacher, _ = bare.answer_logits(None, bare.compose(bare.text_injection(texts), prompts, answers))
    torch.testing.assert_close(found, answer_divergence(student, teacher, targets))


def test_a_resumed_run_has_the_adapters_it_had(tmp_path):
    """Adapters that begin anew after a fault leave a bridge that was trained for others."""
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "text_warmup_steps": 4, "seed": 3}
    runs = {}
    for name in ("whole", "again"):
        model = lora_wire(dropout=0.1)
        trainer = trainer_of(model, tmp_path / name, **options)
        trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3") if name == "again" else None)
        runs[name] = [fingerprint(model), *(fingerprint(reader.model) for reader in model.receivers.values())]
    assert runs["whole"] == runs["again"]


def test_the_best_checkpoint_comes_back_with_its_adapters(tmp_path):
    """The bridge of one step behind the adapter of another."""
    model = lora_wire(("llama",))
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(
        model, tmp_path, **options, load_best_model_at_end=True, metric_for_best_model="first_acc", learning_rate=0.3
    )
    assert trainer.args.greater_is_better
    trainer.train()
    best = load_file(Path(trainer.state.best_model_checkpoint) / "receivers" / "llama" / "adapter_model.safetensors")
    held = {name.replace(".default", ""): x for name, x in adapter_parameters(model.receivers["llama"]).items()}
    assert best.keys() == held.keys() and all(torch.equal(best[name], held[name]) for name in best)
    assert set(model.state_dict()) == set(load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors"))


def test_a_saved_wire_comes_back_with_adapters_and_templates(tmp_path):
    """A bridge behind another template, or without its adapter, reads another language."""
    model = wire(receivers=())
    for kind in ("llama", "gpt2"):
        reader = receiver(kind, Template(before="[", after="]", anchor="\nSo:", bos=True))
        reader.model.save_pretrained(tmp_path / kind)
        reader.tokenizer.save_pretrained(tmp_path / kind)
        model.add_receiver(kind, reader, static_slots=2)
    add_adapter(model.receivers["gpt2"], 2, targets="c_attn")
    with torch.no_grad():
        for parameter in adapter_parameters(model.receivers["gpt2"]).values():
            torch.nn.init.normal_(parameter)
    save_wire(model, tmp_path / "wire")
    places = {kind: str(tmp_path / kind) for kind in ("llama", "gpt2")}
    again = load_wire(str(tmp_path / "wire"), places, device="cpu")
    for kind in places:
        assert again.receivers[kind].template == Template(before="[", after="]", anchor="\nSo:", bos=True)
        expected, _ = model.score(kind, model.encode(CONTEXTS), PROMPTS, ANSWERS)
        found, _ = again.score(kind, again.encode(CONTEXTS), PROMPTS, ANSWERS)
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="built for Template"):
        again.attach("llama", receiver("llama"))
    with pytest.raises(ValueError, match="bridges to gpt2, llama, and nothing says where gpt2 lies"):
        load_wire(str(tmp_path / "wire"), {"llama": places["llama"]})
    with pytest.raises(ValueError, match="no bridge to qwen: it has gpt2, llama"):
        load_wire(str(tmp_path / "wire"), {**places, "qwen": "x"})
    with pytest.raises(ValueError, match="holds a llama model, no wire"):
        load_wire(places["llama"], {})


def test_a_receivers_template_is_its_tokenizers_where_it_has_one(tmp_path):
    """A chat model that is asked without its turns answers as if nobody had asked."""
    reader = receiver("llama")
    reader.model.save_pretrained(tmp_path)
    reader.tokenizer.save_pretrained(tmp_path)
    assert load_receiver(str(tmp_path), anchor="So:").template == Template(anchor="So:")
    with pytest.raises(ValueError, match="no chat template"):
        load_receiver(str(tmp_path), template="chat")
    reader.tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    reader.tokenizer.save_pretrained(tmp_path)
    assert load_receiver(str(tmp_path)).template == Template(True, "<user>", "<assistant>")
    assert load_receiver(str(tmp_path), bos=False).template == Template(False, "<user>", "<assistant>")
    assert load_receiver(str(tmp_path), template="plain").template == Template()
    assert load_receiver(str(tmp_path), dtype="bfloat16").model.dtype == torch.bfloat16
    for given, message in (({"template": "chatty"}, "must be one of"), ({"dtype": "int9"}, "dtype must be")):
        with pytest.raises(ValueError, match=message):
            load_receiver(str(tmp_path), **given)


def test_a_receivers_name_is_given_or_its_places_last_part():
    """Two models under one name would share a bridge."""
    given = ["small=a/b-c.d", "me/Qwen3-0.6B", "runs/teacher/", "models/k=8/lm"]
    assert parse_receivers(given) == {
        "small": "a/b-c.d",
        "Qwen3-0_6B": "me/Qwen3-0.6B",
        "teacher": "runs/teacher/",
        "lm": "models/k=8/lm",
    }
    for entries, message in ((["a/x", "b/x"], "given twice"), (["q.w=a"], "no dots"), (["a="], "must read name=")):
        with pytest.raises(ValueError, match=message):
            parse_receivers(entries)


# -- memory


@pytest.mark.parametrize(
    ("rows", "free", "fixed", "row", "expected"),
    [
        (64, [80], 18, 1, (32, 2, 1)),  # 42 fit: two times 32
        (64, [80, 80], 18, 1, (32, 1, 2)),
        (64, [80, 24], 14, 1, (4, 8, 2)),  # the smaller device decides
        (64, [1000], 18, 1, (64, 1, 1)),
        (10, [40], 26, 1, (4, 3, 1)),  # 12 rows: never fewer than asked for
        (8, [10], 18, 1, (1, 8, 1)),
    ],
)
def test_a_step_has_its_rows_whatever_fits(rows, free, fixed, row, expected):
    """A plan that shrinks the step trains with another batch size on every machine."""
    plan = elastic_plan(rows, free, fixed, row)
    assert (plan.per_device_batch_size, plan.accumulation_steps, plan.num_devices) == expected
    assert rows <= plan.rows < rows + plan.accumulation_steps * plan.num_devices
    with pytest.raises(ValueError, match="share must lie"):
        elastic_plan(1, [1], 0, 1, share=0)
    with pytest.raises(ValueError, match="needs a device"):
        elastic_plan(1, [], 0, 1)


def test_a_run_without_memory_goes_on_with_fewer_rows(tmp_path, monkeypatch):
    """A plan is an estimate, and the longest batch comes when nobody looks."""
    trainer = trainer_of(lora_wire(("llama",)), tmp_path, elastic=True, per_device_train_batch_size=5)
    sizes, real = [], WireTrainer.parts

    def parts(self, model, inputs, draw):
        sizes.append(len(inputs["prompts"]))
        if sizes[-1] > 4:
            raise RuntimeError("CUDA out of memory.")
        return real(self, model, inputs, draw)

    monkeypatch.setattr(WireTrainer, "parts", parts)
    trainer.train()
    assert sizes[0] == 5 and sizes[-1] <= 4 and trainer.state.global_step == 4


def test_wrong_objectives_are_told(tmp_path):
    """Each would train for hours by something else than was asked for."""
    with pytest.raises(ValueError, match="soft bridges alone"):
        trainer_of(wire("kv"), tmp_path, align_weight=1.0)
    with pytest.raises(ValueError, match="nothing here learns from the text itself"):
        trainer_of(wire(), tmp_path, text_warmup_steps=2)
    with pytest.raises(ValueError, match="gist_weight must not be negative"):
        tiny_args(WireConfig, tmp_path, gist_weight=-1.0)
    with pytest.raises(ValueError, match="has an adapter already"):
        add_adapter(lora_wire(("llama",)).receivers["llama"], 2)
    with pytest.raises(ValueError, match="nothing to read"):
        wire()(receiver="llama", prompts=["a"], answers=["b"])
