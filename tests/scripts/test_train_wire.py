"""The wire's script, called as a person calls it: what its flags say is what is trained, saved and read again."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import (
    AutoModel,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    pipeline,
)

from scripts import train_wire
from tests.modeling_latentforge.test_wire import bpe, wire
from trainers.wire_build import replace_quantizer
from trainers.wire_lora import adapter_parameters
from trainers.wire_models import load_wire


ROOT = Path(__file__).resolve().parent.parent.parent
SMOKE = ROOT / "scripts" / "configs" / "wire" / "smoke"
SST2 = ROOT / "tests" / "fixtures" / "tasks" / "sst2.jsonl"
STORY = [
    "The ferry leaves the northern quay at a quarter past six, and nobody has ever seen it come back before noon.",
    "On Thursdays there is also a goat, which belongs to nobody that anyone can name, and always gets off first.",
    "When the fog lies on the water the pilot rings a bell, once for each year that he has been at sea.",
] * 4
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
RUN = (
    "--max_steps 2 --logging_steps 1 --save_strategy no --disable_tqdm true --use_cpu true --report_to none "
    "--per_device_train_batch_size 4 --per_device_eval_batch_size 8 --max_eval_examples 6"
)
SMALL = "--encoder_hidden_size 32 --encoder_layers 1 --encoder_heads 2 --latent_size 16"
MODES = {"prefix": "soft", "deep_prefix": "kv", "coprocessor": "pooled_kv", "adapters": "cross"}


def file_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Two language models of different kinds with different tokenizers, and a text."""
    folder = tmp_path_factory.mktemp("room")
    torch.manual_seed(3)
    for name, size in (("llama", 300), ("neox", 310)):
        tokenizer = bpe(size, bos=name == "llama")
        shape = {**SIZES, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        model = (
            LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2))
            if name == "llama"
            else GPTNeoXForCausalLM(GPTNeoXConfig(**shape))
        )
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = [json.dumps({"text": f"{text} ({number})"}) for number, text in enumerate(STORY)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def flags(room, output, more, receivers=("llama", "neox")):
    places = " ".join(f"{name}={room}/{name}" for name in receivers)
    return f"--receivers {places} --output_dir {output} {RUN} {more}".split()


TEXT = "--dataset text --context_tokens 10 --continue_tokens 5"


@pytest.mark.parametrize("recipe", sorted(path.stem for path in SMOKE.glob("*.yaml")))
def test_each_smoke_recipe_trains_saves_loads_and_writes(recipe, room, tmp_path):
    """A recipe whose bridge cannot be saved, or reads nothing when it is loaded, is found out after the long run."""
    before = {name: file_hash(room / name) for name in ("llama", "neox")}
    metrics = train_wire.main(
        ["--config", str(SMOKE / f"{recipe}.yaml")]
        + flags(room, tmp_path, f"--dataset sst2 --data {SST2} --latent_len 4 {SMALL} --show_answers 1")
    )
    assert {"eval_loss", "eval_answer_llama", "eval_answer_neox", "eval_first_acc_neox"} <= set(metrics)
    places = {name: str(room / name) for name in ("llama", "neox")}
    wire = load_wire(str(tmp_path), places, device="cpu")
    bridge = wire.bridges["neox"]
    assert bridge.mode == MODES.get(recipe, "soft") and wire.template("neox").anchor == "\nAnswer:"
    assert (bridge.static is None) == (recipe != "prefix")
    assert len(wire.refiner) == (2 if recipe == "refiner" else 0)
    adapters = adapter_parameters(wire.receivers["neox"])
    assert bool(adapters) == (recipe == "lora") == (tmp_path / "receivers").exists()
    assert ("eval_gist" in metrics) == (recipe == "gist")
    if recipe == "lora":  # two steps: the text's, and the latents'
        assert any(bool(x.abs().sum()) for name, x in adapters.items() if "lora_B" in name)
    message = wire.encode(["a quarter past six", "fog"])
    for name in places:
        assert len(wire.generate(name, message, ["What?", "When?"], max_new_tokens=3, do_sample=False)) == 2
        nats, counts = wire.score(name, message, ["What?", "When?"], ["fog", "six"])
        assert bool(torch.isfinite(nats).all()) and counts.tolist()
    assert {name: file_hash(room / name) for name in before} == before
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"] == metrics["eval_loss"]
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "feature-extraction" and card.data.license == "unknown"
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.suffix in (".json", ".md"))
    assert str(room) not in written, "a path of this machine"


def test_a_further_receiver_trains_its_bridge_and_nothing_else(room, tmp_path):
    """An encoder that moves under the bridges of earlier receivers breaks each of them."""
    first, second = tmp_path / "first", tmp_path / "second"
    quantizer = "--quantizer fsq --quantizer_levels 5,5,5"
    train_wire.main(
        flags(room, first, f"{TEXT} --data {room}/text.jsonl {SMALL} {quantizer} --use_lora", receivers=["llama"])
    )
    train_wire.main(
        flags(
            room,
            second,
            f"{TEXT} --data {room}/text.jsonl --init_wire {first} --freeze_encoder --bridge kv --anchor_text So:",
            receivers=["neox"],
        )
    )
    before, after = (AutoModel.from_pretrained(folder).state_dict() for folder in (first, second))
    assert set(before) < set(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(name.startswith("bridges.neox.") for name in set(after) - set(before))
    wire = load_wire(str(second), {name: str(room / name) for name in ("llama", "neox")}, device="cpu")
    assert (wire.template("llama").anchor, wire.template("neox").anchor) == ("", "So:")
    assert adapter_parameters(wire.receivers["llama"]), "the adapter of a receiver that was not asked comes along"


def test_a_trained_wire_goes_on_with_another_quantizer(room, tmp_path):
    """Fewer bytes would cost a training from nothing."""
    first, second = tmp_path / "first", tmp_path / "second"
    train_wire.main(flags(room, first, f"{TEXT} --data {room}/text.jsonl {SMALL}", receivers=["llama"]))
    fsq = f"--init_wire {first} --quantizer fsq --quantizer_levels 5,5,5 --learning_rate 0"
    train_wire.main(flags(room, second, f"{TEXT} --data {room}/text.jsonl {fsq}", receivers=["llama"]))
    before, after = (AutoModel.from_pretrained(folder).state_dict() for folder in (first, second))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {name.split(".")[0] for name in set(after) - set(before)} == {"quantizer"}
    wire = load_wire(str(second), {"llama": str(room / "llama")}, device="cpu")
    assert wire.quantizer.levels == (5, 5, 5)
    sizes = [
        one.pack([STORY[0]])[0].num_bytes for one in (wire, load_wire(str(first), {"llama": str(room / "llama")}))
    ]
    assert sizes[0] < sizes[1] / 10


def test_the_quantizer_that_a_wire_has_stays_as_it_was_trained():
    """A training that goes on with the same flags would begin with new maps, and say nothing."""
    made = wire(quantizer="fsq", quantizer_levels=[5, 5, 5])
    trained = made.quantizer
    for levels in (None, (5, 5, 5)):
        replace_quantizer(made, "fsq", levels)
        assert made.quantizer is trained
    replace_quantizer(made, "fsq", (5, 5))
    assert made.quantizer.levels == made.config.quantizer_levels == (5, 5)


def test_an_encoder_starts_from_a_pretrained_models_first_layers(room, tmp_path, capsys):
    """Layers that are read and then initialised anew are a pretrained encoder by name only."""
    more = f"{TEXT} --data {room}/text.jsonl --encoder {room}/llama --encoder_layers 2 --ratio 2 --latent_size 16"
    train_wire.main(flags(room, tmp_path, f"{more} --learning_rate 0 --text_mode continue,reconstruct --elastic"))
    assert re.search(r"elastic: 4 rows at once, 1 times a step", capsys.readouterr().out)
    wire = load_wire(str(tmp_path), {name: str(room / name) for name in ("llama", "neox")}, device="cpu")
    llama = LlamaForCausalLM.from_pretrained(room / "llama").model
    backbone = wire.encoder.backbone
    assert len(backbone.layers) == 2 and len(wire.tokenizer) == 300
    theirs = llama.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in backbone.state_dict().items())
    ids, mask = wire.ids_of([STORY[0], STORY[1][:60]])
    with torch.no_grad():
        for row in (slice(0, 1), slice(0, 2)):  # without padding, and with it
            states = [
                backbone(input_ids=x[row], attention_mask=mask[row]).last_hidden_state[0, 0]
                for x in (ids, ids.index_fill(1, torch.tensor([mask[0].sum() - 1]), 7))
            ]
            assert not torch.allclose(*states), "the first token sees the last"
    card = ModelCard.load(tmp_path / "README.md").text
    assert "encoder started from layers of another model" in card


@pytest.mark.parametrize("source", ["tokens", "bytes"])
def test_the_latents_come_out_of_the_feature_extraction_pipeline(source, room, tmp_path):
    """The one thing that stock tools can do with a wire without a receiver."""
    reads = f"--tokenizer {room}/neox" if source == "tokens" else ""
    train_wire.main(flags(room, tmp_path, f"{TEXT} --data {room}/text.jsonl {reads} {SMALL}"))
    model, tokenizer = AutoModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    extract = pipeline("feature-extraction", model=model, tokenizer=tokenizer)
    text = f"{STORY[0]} – naïve, 日本\n"
    found = torch.tensor(extract(text, add_special_tokens=False))
    if source == "tokens":
        model.attach_tokenizer(tokenizer)
    with torch.no_grad():
        torch.testing.assert_close(found, model.encode([text]).last_hidden_state.cpu())
    code = re.search(r"```python\n(.*?)```", ModelCard.load(tmp_path / "README.md").text, re.DOTALL).group(1)
    exec(code.replace(re.search(r'repo_id = "(.*)"', code).group(1), str(tmp_path)), {})  # the card's own words


def test_the_readmes_commands_and_python_run(room, tmp_path, monkeypatch, capsys):
    """The first thing that anybody tries."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Wire\n")[1].split("\n## ")[0]
    command = re.search(r"^\.venv/bin/python scripts/train_wire\.py (.*)$", text, re.MULTILINE).group(1)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "teacher").symlink_to(room / "llama")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"{line} " * 30}) + "\n" for line in STORY))
    monkeypatch.chdir(tmp_path)
    train_wire.main([*command.replace("builtin:python", "text.jsonl").split(), *RUN.split()])
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1), {})
    assert "torch.Size([1, " in capsys.readouterr().out


def test_wrong_flags_are_told(room, tmp_path, capsys):
    """Each would train something else than was meant, or stop after the data is read."""
    for more, message in (
        ("--use_deep_prefix --use_coprocessor", "use_coprocessor is bridge 'pooled_kv', and use_deep_prefix sets"),
        ("--kd_tau 2 --kd_temperature 3", "kd_tau is kd_temperature 2.0, and is given with"),
        ("--freeze_encoder", "add init_wire"),
        ("--freeze_encoder --init_wire x --quantizer int8", "changes the message, which is frozen"),
        ("--latent_len 4 --ratio 2", "both say how many latents"),
        ("--encoder x --tokenizer y", "is about a new encoder"),
        ("--text_warmup_steps 4", "nothing here learns from the text itself"),
        ("--align_weight 1 --use_deep_prefix", "soft bridges alone"),
        (f"--data {SST2} {SST2}", "names 2 sources for the 1 data sets"),
        ("--first_token_top_p 2", "must lie in"),
        ("--encoder_positions 5", "No text is as short"),
    ):
        asked = flags(
            room, tmp_path, f"{SMALL} {TEXT} {'' if '--data ' in more else f'--data {room}/text.jsonl'} {more}"
        )
        with pytest.raises((ValueError, SystemExit)) as stop:
            train_wire.main(asked)
        assert message in (capsys.readouterr().err if isinstance(stop.value, SystemExit) else str(stop.value)), more
