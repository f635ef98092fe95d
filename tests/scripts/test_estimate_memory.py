"""`scripts/estimate_memory.py`: what it reads, what it prints, and that training takes what it says."""

import re
import shlex
from pathlib import Path

import pytest
from transformers import LlamaConfig

from modeling_latentforge import LatentForgeAutoencoderConfig
from scripts.estimate_memory import main
from trainers.evaluation.memory import save_stand_ins


ROOT = Path(__file__).resolve().parent.parent.parent
SEED = f"{ROOT}/scripts/configs/seed.yaml"
SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
FLAGS = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    codec = LatentForgeAutoencoderConfig(
        vocab_size=300, patch_size=8, latent_size=16, hidden_size=32, intermediate_size=64
    )
    flags = save_stand_ins(tmp_path, codec, LlamaConfig(**SHAPE, vocab_size=300))
    return dict(zip(flags[::2], flags[1::2], strict=True))


def test_the_readmes_command_prints_a_table(stand_ins, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Copied from the README it must run."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\.venv/bin/python scripts/estimate_memory\.py (.*)$", readme, re.MULTILINE)
    command = command.replace("runs/demo/autoencoder", stand_ins["--autoencoder"])
    command = command.replace("scripts/configs", f"{ROOT}/scripts/configs")
    total = main([*shlex.split(command), "--output_dir", str(tmp_path), "--kd_weight", "0", "--device", "cpu"])
    table = capsys.readouterr().out
    assert f"| **peak** | **{total / 1e6:,.0f}** |" in table
    assert all(f"| {name} |" in table for name in ("process", "weights", "codec that was read", "loss: optimizer"))


def test_a_recipe_of_a_codec_stands_for_one_that_is_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Memory is asked about before anything is trained."""
    flags = [*FLAGS, "--autoencoder", f"{SEED}:autoencoder", "--output_dir", str(tmp_path), "--device", "cuda"]
    small = main([*flags, "--vocab_size", "1000"])
    assert "CUDA context" in capsys.readouterr().out
    assert main([*flags, "--vocab_size", "100000"]) > small + 4 * 99_000 * 512
    with pytest.raises(SystemExit, match="--vocab_size"):
        main(flags)


def test_teachers_at_hand_and_elsewhere_are_told_apart(stand_ins, tmp_path: Path, capsys: pytest.CaptureFixture):
    """A server's weights are no part of this machine's memory, a local teacher's are."""
    flags = [*FLAGS, *(word for pair in stand_ins.items() for word in pair), "--output_dir", str(tmp_path)]
    main([*flags, "--device", "cpu"])
    assert "| teacher's weights |" in capsys.readouterr().out
    main([*flags, "--device", "cpu", "--teacher_backend", "vllm-remote"])
    text = capsys.readouterr().out
    assert "teacher's weights" not in text and "teacher's entries" in text
    with pytest.raises(SystemExit, match="--measure is for one process on a CPU"):
        main([*flags, "--device", "cuda", "--measure"])


def test_an_unknown_flag_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    """A misspelt size would give the memory of another model."""
    with pytest.raises(SystemExit):
        main(["--autoencoder", f"{SEED}:autoencoder", "--vocab_size", "300", "--hiden_size", "64"])
    assert "did you mean --hidden_size" in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_takes_what_was_predicted(stand_ins, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Even the smallest: the process itself is in the figure."""
    flags = [*FLAGS, *(word for pair in stand_ins.items() for word in pair), "--output_dir", str(tmp_path)]
    main([*flags, "--block_size", "64", "--per_device_train_batch_size", "2", "--device", "cpu", "--measure"])
    (error,) = re.findall(r"measured [\d,]+ MB, predicted [\d,]+ MB: ([+-][\d.]+)%", capsys.readouterr().out)
    assert abs(float(error)) <= 15
