"""The idea model's script, called as a person calls it: trained, saved, asked, talked to."""

import hashlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModel, LlamaForCausalLM

from modeling_latentforge import LatentForgeIdea
from scripts import idea, push_to_hub
from tests.scripts.test_train_wire import RUN, STORY, room  # noqa: F401  (a fixture)
from trainers import arithmetic, parse_arguments
from trainers.idea_config import IdeaConfig
from trainers.wire_data import IdeaDataArguments
from trainers.wire_flags import IdeaAliases, apply_aliases
from trainers.wire_lora import adapter_parameters
from trainers.wire_models import load_wire


ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = "--encoder_layers 2 --num_ideas 2 --latent_size 16 --compression_hidden 20 --middle_hidden 12 --prefix_len 3"


@pytest.fixture(scope="module", autouse=True)
def few_problems():
    """Made-up problems are drawn from as many; 20,000 take longer than all that is done with them here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arithmetic, "SIZES", {"train": 200, "validation": 50, "test": 50})
        yield


def file_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def flags(room, output, more):  # noqa: F811
    return f"--receiver {room}/llama --encoder {room}/neox --output_dir {output} {SMALL} {RUN} {more}".split()


@pytest.fixture(scope="module")
def trained(room, tmp_path_factory):  # noqa: F811
    """A model of made-up problems, as the script leaves it."""
    output = tmp_path_factory.mktemp("idea")
    before = file_hash(room / "llama"), file_hash(room / "neox")
    metrics = idea.main(
        flags(
            room,
            output,
            "--mode train --dataset reasoning --data builtin:arithmetic --max-train-samples 16 --batch-size 4 "
            "--learning-rate 1e-3 --steps 3 --align_steps 1 --sample_outputs 1 --sample_tokens 4",
        )
    )
    assert (file_hash(room / "llama"), file_hash(room / "neox")) == before
    return output, metrics


def test_a_trained_model_lies_there_without_its_receiver(trained, room):  # noqa: F811
    """Figures, samples and card of another run are worse than none."""
    output, metrics = trained
    assert {"eval_loss", "eval_answer_llama", "eval_steps", "eval_first_acc_llama"} <= set(metrics)
    assert json.loads((output / "eval_results.json").read_text())["eval_loss"] == metrics["eval_loss"]
    samples = [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 1 and len(samples[0]["said_after_each_step"]) == 4
    model = load_wire(str(output), {"llama": str(room / "llama")}, device="cpu")
    assert isinstance(model, LatentForgeIdea) and (model.config.steps, model.config.num_ideas) == (3, 2)
    assert model.config.receiver is None, "a folder of this machine is no place"
    assert not any("receiver" in name for name in model.state_dict())
    theirs = AutoModel.from_pretrained(room / "neox").state_dict()
    own = model.encoder.backbone.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in own.items()), "the backbone is frozen"
    card = ModelCard.load(output / "README.md")
    assert card.data.pipeline_tag == "feature-extraction" and "made up by LatentForge" in card.text
    code = re.search(r"```python\n(.*?)```", card.text, re.DOTALL).group(1)
    exec(code.replace(re.search(r'repo_id = "(.*)"', code).group(1), str(output)), {})  # the card's own words
    written = "".join(path.read_text() for path in output.rglob("*") if path.suffix in (".json", ".md"))
    assert str(room) not in written, "a path of this machine"


def test_it_can_be_pushed(trained):
    """What the Hub's script refuses stays on one machine."""
    checked = push_to_hub.check_folder(trained[0])
    assert checked.auto_class == "AutoModel" and {"modeling_idea.py", "modeling_wire.py"} <= set(checked.files)


def test_generate_says_one_thing_and_says_it_again(trained, room, capsys):  # noqa: F811
    """Flags of sampling that are not passed on change nothing, and nobody notices."""
    output, _ = trained
    asked = ["--mode", "generate", "--checkpoint", str(output), "--receiver", str(room / "llama"), "--device", "cpu"]
    asked += ["--input", STORY[0], "--max-length", "5"]
    found = [idea.main([*asked, *more.split()])["text"] for more in ("", "", "--steps 0")]
    assert found[0] == found[1] and found[0] in capsys.readouterr().out
    model = load_wire(str(output), {"llama": str(room / "llama")}, device="cpu")
    assert found[0] == model.generate(STORY[0], max_new_tokens=5)
    assert found[2] == model.generate(STORY[0], steps=0, max_new_tokens=5)
    torch.manual_seed(0)
    sampled = {idea.main([*asked, "--temperature", "5.0", "--top-p", "0.99"])["text"] for _ in range(2)}
    assert len(sampled) > 1


def test_a_session_answers_texts_interpolates_and_shows_steps(trained, room, capsys, monkeypatch):  # noqa: F811
    """The end of the input, or a text that cannot be read, must not end in a traceback."""
    output, _ = trained
    lines = iter(["", STORY[0], "interp", "one", "two", "interp slerp", "one", "two", "steps", "three", "interp"])
    lines = iter([*lines, "", "four", "exit", "never read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    asked = f"--mode inference --checkpoint {output} --receiver {room}/llama --device cpu --max-length 4".split()
    assert idea.main(asked) == {}
    assert next(lines) == "never read"
    said = capsys.readouterr()
    model = load_wire(str(output), {"llama": str(room / "llama")}, device="cpu")
    options = {"max_new_tokens": 4}
    for text in (model.generate(STORY[0], **options), "0.00  " + model.generate("one", **options)):
        assert text in said.out
    assert said.out.count("1.00  " + model.generate("two", **options)) == 2
    for number in range(4):
        assert f"{number:4d}  {model.generate('three', steps=number, **options)}" in said.out
    assert "are empty" in said.err

    def ends(prompt):
        raise EOFError

    monkeypatch.setattr("builtins.input", ends)
    assert idea.main(asked) == {}


def test_training_goes_on_from_a_checkpoint(trained, room, tmp_path):  # noqa: F811
    """Reconstruction first and summaries then are two runs; the second must begin where the first ended."""
    output, _ = trained
    (tmp_path / "train.jsonl").write_text(json.dumps({"dialogue": "A: Hi.\nB: Bye.", "summary": "They part."}) + "\n")
    (tmp_path / "dev.jsonl").write_text(json.dumps({"dialogue": "A: No.", "summaries": ["A refuses.", "No."]}) + "\n")
    more = f"--dataset dialogsum --data {tmp_path} --learning_rate 0 --steps 1 --output_dir {tmp_path}/again"
    idea.main(
        [*f"--receiver {room}/llama --checkpoint {output} {RUN} {more} --middle_alone true --sample_outputs 0".split()]
    )
    before, after = (AutoModel.from_pretrained(folder) for folder in (output, tmp_path / "again"))
    assert after.config.steps == 1
    assert all(torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items())


def test_lora_lies_beside_the_model_and_comes_back_with_it(room, tmp_path):  # noqa: F811
    """A receiver without what it learned reads ideas as noise; one whose weights were changed serves nobody else."""
    before = file_hash(room / "llama")
    more = "--mode train --dataset reasoning --data builtin:arithmetic --max-train-samples 8 --batch-size 4"
    idea.main(flags(room, tmp_path, f"{more} --learning_rate 1e-2 --lora_r 2 --sample_outputs 0"))
    assert file_hash(room / "llama") == before
    model = load_wire(str(tmp_path), {"llama": str(room / "llama")}, device="cpu")
    adapter = adapter_parameters(model.receivers["llama"])
    assert adapter and all(bool(value.abs().sum()) for name, value in adapter.items() if "lora_B" in name)
    asked = f"--mode generate --checkpoint {tmp_path} --receiver {room}/llama --device cpu --max-length 8".split()
    said = idea.main([*asked, "--input", STORY[0]])["text"]
    assert said == model.generate(STORY[0], max_new_tokens=8)


def test_the_seeds_recipe_and_flags_are_taken(tmp_path):
    """The whole of it, though neither of its models can be had here."""
    recipe = ROOT / "scripts" / "configs" / "idea" / "seed.yaml"
    more = "--batch-size 8 --learning-rate 2e-4 --epochs 2 --max-train-samples 100 --max-length 64 --temperature 0.7"
    args, data_args, aliases, training_args = parse_arguments(
        idea.IdeaArguments,
        IdeaDataArguments,
        IdeaAliases,
        IdeaConfig,
        argv=["--config", str(recipe), "--output_dir", str(tmp_path), *more.split(), "--top-p", "0.9"],
    )
    apply_aliases(aliases, data_args, training_args)
    assert (args.encoder, args.receiver) == ("answerdotai/ModernBERT-base", "openai-community/gpt2")
    assert data_args.sources() == [("samsum", None)] and data_args.max_train_examples == 100
    assert (training_args.per_device_train_batch_size, training_args.num_train_epochs) == (8, 2)
    assert training_args.learning_rate == 2e-4 and training_args.load_best_model_at_end
    options = {"max_new_tokens": 64, "do_sample": True, "temperature": 0.7, "top_p": 0.9}
    assert args.generation_options() == options
    header = recipe.read_text(encoding="utf-8").splitlines()[:2]
    assert "not measured here" in " ".join(line.lstrip("# ") for line in header)
    assert yaml.safe_load(recipe.read_text(encoding="utf-8"))["epochs"] == 5


@pytest.mark.slow
def test_the_readmes_commands_and_python_run(room, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The first thing that anybody tries."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## Idea\n")[1].split("\n## ")[0]
    commands = re.findall(r"^\.venv/bin/python scripts/idea\.py (.*)$", text, re.MULTILINE)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "teacher").symlink_to(room / "llama")
    monkeypatch.chdir(tmp_path)
    short = "--max-train-samples 8 --sample_outputs 0".split()
    idea.main([*shlex.split(commands[0]), *RUN.split(), *short, "--batch-size", "4"])
    said = idea.main([*shlex.split(commands[1]), "--max-length", "4", "--device", "cpu"])["text"]
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1), {})
    assert len(commands) == 2 and said in capsys.readouterr().out


def test_wrong_flags_are_told(trained, room, tmp_path, capsys):  # noqa: F811
    """Each would train something else than was meant, or stop after the data is read."""
    output, _ = trained
    for more, message in (
        ("--mode generate", "input is the text of mode generate"),
        (f"--checkpoint {output} --num_ideas 2", "is about a new model"),
        (f"--mode inference --checkpoint {output}", "add --receiver"),
        (f"--mode inference --checkpoint {room}/llama", "holds no idea model"),
        ("--top_p 0", "must lie in"),
        ("--lora_r -1", "lora_r must not be negative"),
        ("--min_latents 2", "thinks with all of its"),
        ("--epochs 2 --num_train_epochs 4", "epochs is num_train_epochs 2.0, and is given with"),
        ("--dataset samsun", "there is no 'samsun'"),
    ):
        with pytest.raises((ValueError, SystemExit)) as stop:
            idea.main([*more.split(), "--output_dir", str(tmp_path)])
        assert message in (capsys.readouterr().err if isinstance(stop.value, SystemExit) else str(stop.value)), more
    assert isinstance(LlamaForCausalLM.from_pretrained(room / "llama"), LlamaForCausalLM)
