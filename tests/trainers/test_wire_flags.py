"""The first LatentWire's flags, and the data that a wire's flags name."""

import dataclasses
import json
from dataclasses import fields

import pytest

from scripts.train_wire import WireArguments
from tests.modeling_latentforge.test_wire import CONTEXTS, PROMPTS, wire
from tests.trainers.training_helpers import tiny_args
from trainers import WireConfig
from trainers.wire_data import WireDataArguments, load_examples
from trainers.wire_flags import ALIASES, GenerationAliases, TrainingAliases, apply_aliases


# as the issue names them
FLAGS = (
    "use_lora use_prefix use_deep_prefix use_latent_adapters use_coprocessor use_gist_head use_latent_refiner "
    "k_token_ce first_token_ce_weight kd_tau calibration anchor_text append_bos_after_prefix eos_ban_steps "
    "first_token_top_p lora_r lora_alpha gist_weight gist_target_len prefix_len debug profile_memory log_shapes"
).split()


def arguments(tmp_path, **kwargs):
    return WireArguments(receivers=["x"]), tiny_args(WireConfig, tmp_path, **kwargs)


def test_every_flag_is_a_field_or_another_word_for_one(tmp_path):
    """A flag that is read and goes nowhere trains another model under the name that was asked for."""
    own, training = arguments(tmp_path)
    known = {field.name for part in (own, training) for field in fields(part)}
    aliases = {field.name for field in fields(TrainingAliases)}
    generation = {field.name for field in fields(GenerationAliases)}
    for name in FLAGS:
        assert name in aliases or ALIASES[name].field == name
        assert name in aliases or name in known
        assert ALIASES[name].field in known or name in generation
    assert aliases <= ALIASES.keys()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"use_lora": True}, {"lora_r": 8}),
        ({"use_prefix": True}, {"static_slots": 16}),
        ({"use_prefix": True, "prefix_len": 5}, {"static_slots": 5}),
        ({"use_deep_prefix": True, "anchor_text": "A:"}, {"bridge": "kv", "anchor": "A:"}),
        ({"use_coprocessor": True}, {"bridge": "pooled_kv"}),
        ({"use_latent_adapters": True}, {"bridge": "cross"}),
        ({"use_gist_head": True, "kd_tau": 2.0}, {"gist_weight": 0.1, "kd_temperature": 2.0}),
        ({"use_latent_refiner": True}, {"refiner_layers": 2}),
        ({"k_token_ce": 4, "first_token_ce_weight": 0.5}, {"answer_tokens": 4, "first_token_weight": 0.5}),
        ({"append_bos_after_prefix": "no"}, {"bos": "no"}),
        ({"profile_memory": True, "log_shapes": True}, {"skip_memory_metrics": False, "diagnose_steps": 1}),
    ],
)
def test_a_flag_sets_its_field_and_no_other(given, expected, tmp_path):
    """Seed recipes are read by these names."""
    own, training = arguments(tmp_path)
    before = {**vars(own), **vars(training)}
    apply_aliases(TrainingAliases(**given), own, training)
    after = {**vars(own), **vars(training)}
    assert {name: value for name, value in after.items() if value is not before[name]} == expected


def test_flags_that_say_different_things_are_refused(tmp_path):
    """Whoever is last wins quietly, and the run has the name of the other."""
    for given, held, message in (
        ({"use_deep_prefix": True, "use_coprocessor": True}, {}, "drop one"),
        ({"use_latent_adapters": True}, {"bridge": "kv"}, "use_latent_adapters is bridge 'cross'"),
        ({"anchor_text": "A:"}, {"anchor": "B:"}, "is given with anchor 'B:'"),
    ):
        own, training = arguments(tmp_path)
        own = dataclasses.replace(own, **held)
        with pytest.raises(ValueError, match=message):
            apply_aliases(TrainingAliases(**given), own, training)
    own, training = arguments(tmp_path, gist_weight=0.3)
    apply_aliases(TrainingAliases(use_gist_head=True), own, training)
    assert training.gist_weight == 0.3  # the flag says that there is one, the number how much
    assert tiny_args(WireConfig, tmp_path, debug="true").debug == ["underflow_overflow"]


@pytest.mark.parametrize("mode", ["soft", "kv"])
def test_options_of_generation_reach_the_receiver(mode):
    """A ban that counts the message's places bans nothing."""
    model = wire(mode)
    reader = model.receivers["llama"]
    message = model.encode(CONTEXTS[:1])
    options = {"max_new_tokens": 6, "do_sample": False}
    batch = reader.compose(model.inject("llama", message), PROMPTS[:1])
    first = int(reader.model.generate(**batch.for_generate(), **options)[0, 0])
    plain = model.generate("llama", message, PROMPTS[:1], **options)[0]
    ended = model.generate("llama", message, PROMPTS[:1], **options, eos_token_id=first)[0]
    assert ended == reader.tokenizer.decode([first]).strip() != plain
    banned = GenerationAliases(eos_ban_steps=6).generation_options()
    longer = model.generate("llama", message, PROMPTS[:1], **options, **banned, eos_token_id=first)[0]
    assert len(longer) > len(ended) and longer != plain
    drawn = GenerationAliases(first_token_top_p=1e-6).generation_options()  # the likeliest alone
    assert model.generate("llama", message, PROMPTS[:1], **options, **drawn)[0] == plain
    with pytest.raises(ValueError, match="must not be negative"):
        GenerationAliases(eos_ban_steps=-1).generation_options()


# -- data


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_examples_come_from_every_data_set_and_never_from_both_sides(tmp_path):
    """A document that is learned and judged by makes every figure better."""
    (tmp_path / "trec").mkdir()
    trec = [{"text": f"What is {number}?", "label_coarse_original": "DESC"} for number in range(40)]
    lines(tmp_path / "trec" / "train.jsonl", trec)
    lines(tmp_path / "trec" / "test.jsonl", trec[:2])  # no validation: a part of train is held out
    lines(tmp_path / "text.jsonl", [{"text": f"number {number} " * 60} for number in range(30)])
    args = WireDataArguments(
        dataset="trec,text",
        data=[str(tmp_path / "trec"), str(tmp_path / "text.jsonl")],
        max_train_examples=20,
        max_eval_examples=2,
        text_mode="continue,reconstruct",
        context_tokens=16,
        continue_tokens=8,
    )
    train, held_out = load_examples(args, "\nAgain:")
    assert len(train) == 60 and len(held_out) == 6
    assert not {row.document for row in train} & {row.document for row in held_out}
    repeated = [row for row in train if row.answers == (row.context,)]
    assert len(repeated) == 20 and all(row.prompt == "\nAgain:" for row in repeated)
    alone, _ = load_examples(
        dataclasses.replace(args, dataset="text", data=args.data[1:], text_mode="reconstruct"), "x"
    )
    assert {row.prompt for row in alone} == {""}
    assert args.describe() == "trec (from a local copy), text (from a local copy)"


def test_wrong_data_flags_are_told():
    """Each is found before anything is downloaded."""
    assert WireDataArguments(dataset="hotpot, sst2", data=["hub", "x"]).sources() == [
        ("hotpotqa", None),
        ("sst2", "x"),
    ]
    for given, message in (
        ({"dataset": "squat"}, "there is no 'squat'"),
        ({"data": ["a", "b"]}, "names 2 sources"),
        ({"max_train_examples": 0}, "at least 1"),
        ({"text_mode": "repeat"}, "mode must be"),
    ):
        with pytest.raises(ValueError, match=message):
            WireDataArguments(**given)
