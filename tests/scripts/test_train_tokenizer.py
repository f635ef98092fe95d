import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from scripts import make_toy_data, train_tokenizer


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "data" / "toy.jsonl"
    make_toy_data.main(["--output", str(path), "--num_documents", "120"])
    return path


def test_toy_data_is_the_same_for_a_seed_and_different_for_another(toy, tmp_path, capsys):
    """A toy run that differs from machine to machine cannot be used to find a fault."""
    make_toy_data.main(["--output", str(tmp_path / "a.jsonl"), "--num_documents", "120", "--seed", "0"])
    make_toy_data.main(["--output", str(tmp_path / "b.jsonl"), "--num_documents", "120", "--seed", "1"])
    assert (tmp_path / "a.jsonl").read_bytes() == toy.read_bytes() != (tmp_path / "b.jsonl").read_bytes()
    texts = [json.loads(line)["text"] for line in toy.read_text(encoding="utf-8").splitlines()]
    assert len(texts) == len(set(texts)) == 120
    assert "120 documents" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        make_toy_data.main(["--num_documents", "0"])


def test_the_tokenizer_loads_and_round_trips_any_text(toy, tmp_path, capsys):
    """A tokenizer that cleans spaces up, or has no entry for a byte, changes the text it is given, for good."""
    out = tmp_path / "tokenizer"
    argv = [
        "--data",
        str(toy),
        "--output_dir",
        str(out),
        "--vocab_size",
        "600",
        "--cache_dir",
        str(tmp_path / "cache"),
    ]
    result = train_tokenizer.main(argv)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert len(tokenizer) == result["vocab_size"] == 600
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.pad_token_id != tokenizer.eos_token_id
    for text in (
        " two  spaces , and . marks 's n't ",
        "def f(x):\r\n\treturn x\n\n\n",
        "caf\u00e9 \u4f60\u597d \U0001f469\u200d\U0001f680 \u0000\u2028 e\u0301",
    ):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (
        tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|pad|>"]) == tokenizer("<|endoftext|><|pad|>")["input_ids"]
    )
    assert 2 < result["bytes_per_token"] < 6
    assert "600 entries" in capsys.readouterr().out


def test_a_small_text_gives_fewer_entries_and_says_so(tmp_path, capsys):
    """A vocabulary silently smaller than asked for makes two models' sizes differ for no visible reason."""
    path = tmp_path / "small.txt"
    path.write_text("one two three\n" * 50, encoding="utf-8")
    argv = ["--data", str(path), "--output_dir", str(tmp_path / "t"), "--cache_dir", str(tmp_path / "cache")]
    result = train_tokenizer.main([*argv, "--max_characters", "100"])
    assert 258 <= result["vocab_size"] < 300
    assert "no more pairs to merge" in capsys.readouterr().out


def test_a_vocabulary_without_room_for_the_bytes_is_refused(tmp_path, capsys):
    """Text with a byte that has no entry would be lost without a word."""
    with pytest.raises(SystemExit):
        train_tokenizer.main(["--output_dir", str(tmp_path), "--vocab_size", "257"])
    assert "take at least 258" in capsys.readouterr().err


def test_the_script_runs_as_a_command(toy, tmp_path):
    """What the docstring says to type must work from the repository, with the packages importable."""
    command = [sys.executable, "scripts/train_tokenizer.py", "--data", str(toy), "--output_dir", str(tmp_path / "t")]
    run = subprocess.run(
        [*command, "--vocab_size", "300", "--cache_dir", str(tmp_path / "cache")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "bytes per token on held-out text" in run.stdout
