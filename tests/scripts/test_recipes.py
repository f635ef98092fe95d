"""The recipes of `scripts/configs/`: each is one that its script takes, and says what to expect of it."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from modeling_latentforge import LatentForgeAutoencoderConfig
from scripts import demo, estimate_memory
from scripts.train_autoencoder import CodecArguments
from scripts.train_student import StudentArguments, build_student, load_codec
from scripts.train_teacher import TeacherArguments
from scripts.train_tokenizer import TokenizerArguments
from scripts.train_wire import WireArguments
from trainers import AEConfig, DataArguments, KDConfig, WireConfig, parse_arguments
from trainers.evaluation.memory import save_stand_ins
from trainers.token_lm import TokenLMConfig
from trainers.wire_data import WireDataArguments
from trainers.wire_flags import TrainingAliases, apply_aliases


ROOT = Path(__file__).resolve().parent.parent.parent
CONFIGS = ROOT / "scripts" / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
WIRES = sorted(CONFIGS.glob("wire/*/*.yaml"))
DEMOS = ("demo.yaml", "demo_tiny.yaml")

# first word of a section -> what its script parses, and the flags that a recipe leaves to the person
SCRIPTS: dict[str, tuple[tuple[type, ...], list[str]]] = {
    "tokenizer": ((TokenizerArguments, DataArguments), ["--output_dir", "x"]),
    "teacher": ((TeacherArguments, DataArguments, TokenLMConfig), ["--tokenizer", "x"]),
    "autoencoder": ((CodecArguments, DataArguments, AEConfig), ["--tokenizer", "x"]),
    "student": ((StudentArguments, DataArguments, KDConfig), ["--autoencoder", "x"]),
}

# as published with the models; of a folder that nobody here has, shapes are all that memory depends on
PUBLISHED: dict[str, PreTrainedConfig] = {
    "qwen3_0.6b.yaml": Qwen3Config(
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "llama3.2_1b.yaml": LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        intermediate_size=8192,
        vocab_size=128256,
        tie_word_embeddings=True,
    ),
}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "head_dim": 8}


def sections() -> list[tuple[str, str]]:
    """Every section of every recipe; of one without sections, the file."""
    found = []
    for file in FILES:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        names = [name for name, value in content.items() if isinstance(value, dict)]
        if file.name not in DEMOS:
            found += [(file.name, name) for name in names] or [(file.name, "")]
    return found


def parse(file: str, section: str, *flags: str) -> tuple[Any, ...]:
    kinds, needed = SCRIPTS[section.split("_")[0] or "autoencoder"]
    source = f"{CONFIGS / file}:{section}" if section else str(CONFIGS / file)
    return parse_arguments(*kinds, argv=["--config", source, *needed, *flags])


@pytest.mark.parametrize(("file", "section"), sections())
def test_every_section_of_a_recipe_is_one_that_its_script_takes(file: str, section: str, tmp_path: Path):
    """A recipe with a key that was renamed stops only when somebody has waited for the data."""
    flags = [] if section == "tokenizer" else ["--output_dir", str(tmp_path)]
    parsed = parse(file, section, *flags)
    data = next(part for part in parsed if isinstance(part, DataArguments))
    patch_size = getattr(parsed[0], "patch_size", 1)
    assert data.block_size % patch_size == 0


@pytest.mark.parametrize("file", DEMOS)
def test_every_stage_of_a_demo_s_recipe_is_one_that_its_script_takes(file: str, tmp_path: Path):
    """`make demo` would stop minutes after it began."""
    arguments = demo.DemoArguments(recipe=str(CONFIGS / file), output_dir=str(tmp_path))
    scripts = {f"train_{name}.py": kinds for name, (kinds, _) in SCRIPTS.items()}
    stages = demo.plan(arguments)
    for stage in stages:
        if stage.script in scripts:
            path = tmp_path / "flags.yaml"
            path.write_text(yaml.safe_dump(stage.flags), encoding="utf-8")
            parse_arguments(*scripts[stage.script], argv=["--config", str(path)])
    # the others are what test_demo.py runs with the tiny recipe
    tiny = yaml.safe_load((CONFIGS / "demo_tiny.yaml").read_text(encoding="utf-8"))
    recipe = yaml.safe_load((CONFIGS / file).read_text(encoding="utf-8"))
    assert all(recipe[name].keys() == tiny[name].keys() for name in ("generation", "report"))


@pytest.mark.parametrize("file", WIRES, ids=lambda file: file.stem)
def test_every_recipe_of_a_wire_is_one_that_its_script_takes(file: Path, tmp_path: Path):
    """The whole of it, not the part that its test at tiny size leaves as it is."""
    parsed = parse_arguments(
        WireArguments,
        WireDataArguments,
        TrainingAliases,
        WireConfig,
        argv=["--config", str(file), "--receivers", "x", "--output_dir", str(tmp_path)],
    )
    wire_args, data_args, aliases, training_args = parsed
    apply_aliases(aliases, wire_args, data_args, training_args)
    wire_args.check()
    assert (wire_args.latent_len, training_args.answer_tokens, data_args.names) == (32, 4, ["squad"])


@pytest.mark.parametrize("file", [*(file.name for file in FILES), *(f"wire/smoke/{file.name}" for file in WIRES)])
def test_a_recipe_says_where_its_figures_were_measured_or_that_they_were_not(file: str):
    """A figure without a source is believed or not, and neither is knowledge."""
    text = (CONFIGS / file).read_text(encoding="utf-8")
    header = " ".join(line[1:] for line in text.splitlines() if line.startswith("#"))
    assert "not measured" in header or ("measured" in header and "make verify" in header)
    if re.search(r"\d GB", header):
        assert "computed (scripts/estimate_memory.py" in header or "make verify" in header


@pytest.mark.parametrize("section", ["student_lora", "student_full", "student_lora_8gpu", "student_full_8gpu"])
@pytest.mark.parametrize("file", list(PUBLISHED))
def test_a_recipe_from_a_teacher_builds_its_student(file: str, section: str, tmp_path: Path):
    """An adapter that wraps nothing, or a decoder that does not fit, shows after the download of a billion weights."""
    codec_args, *_ = parse(file, "autoencoder", "--output_dir", str(tmp_path))
    codec = LatentForgeAutoencoderConfig(
        vocab_size=300, patch_size=codec_args.patch_size, latent_size=16, hidden_size=32, intermediate_size=64
    )
    kind = type(PUBLISHED[file])
    teacher = kind(**SMALL, num_key_value_heads=2, vocab_size=304, tie_word_embeddings=True)
    flags = save_stand_ins(tmp_path, codec, teacher)
    student_args, data_args, training_args = parse(file, section, *flags, "--output_dir", str(tmp_path))
    student = build_student(student_args, load_codec(student_args.autoencoder), data_args.block_size)
    backbone = student.model.backbone
    trained = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained and all(("lora" in name) == ("lora" in section) for name in trained)
    assert student.config.patch_size == 4 and student.config.tie_word_embeddings
    eight = 8 if section.endswith("8gpu") else 1
    batch = training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps * eight
    assert batch * data_args.block_size == 2**17  # the same step on one GPU and on eight


@pytest.mark.parametrize("file", ["books_cpu.yaml", "gb10.yaml", "seed.yaml", *PUBLISHED])
def test_the_memory_that_a_recipe_states_is_what_the_formula_gives(file: str, tmp_path: Path, capsys):
    """A figure in a comment is wrong after the second change, unless something computes it."""
    header = (CONFIGS / file).read_text(encoding="utf-8")
    stated = dict(re.findall(r"^#   (student\w*): ([\d.]+) GB$", header, re.MULTILINE))
    assert stated
    flags = {"autoencoder": f"{CONFIGS / file}:autoencoder", "device": "cuda", "output_dir": str(tmp_path)}
    if file in PUBLISHED:
        PUBLISHED[file].save_pretrained(tmp_path / "teacher")
        flags["teacher"] = str(tmp_path / "teacher")
    elif file == "books_cpu.yaml":
        shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 704}
        LlamaConfig(**shape, vocab_size=4096).save_pretrained(tmp_path / "teacher")
        flags |= {"device": "cpu", "teacher": str(tmp_path / "teacher")}
    else:
        flags["vocab_size"] = {"gb10.yaml": "151936", "seed.yaml": "32000"}[file]
        flags["kd_weight"] = "0" if file == "seed.yaml" else "1"
    for section, gigabytes in stated.items():
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        words += ["--num_processes", "8"] if section.endswith("8gpu") else []
        computed = estimate_memory.main(["--config", f"{CONFIGS / file}:{section}", *words])
        assert computed / 1e9 == pytest.approx(float(gigabytes), abs=0.06), section
    capsys.readouterr()
