"""`scripts/infer.py` on real, tiny students: what it prints, what it refuses."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from modeling_latentforge import LatentForgeAutoencoder, LatentForgeAutoencoderConfig, LatentForgeForCausalLM
from scripts.infer import encode_prompt, main
from tests.conftest import tiny_autoencoder


TEXT = ["def main():\n    return first + second\n", "class Shape:\n    def area(self):\n        return 0\n"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


@pytest.fixture(scope="module", params=["autoregressive", "parallel"])
def student(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved student with random weights and its tokenizer."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    codec = LatentForgeAutoencoder(
        LatentForgeAutoencoderConfig(
            vocab_size=len(tokenizer),
            patch_size=4,
            latent_size=16,
            hidden_size=32,
            intermediate_size=64,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    backbone = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = LatentForgeForCausalLM.from_autoencoder(codec, backbone, decoder_type=request.param)
    path = tmp_path_factory.mktemp("student") / request.param
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run(capsys: pytest.CaptureFixture, *argv: str) -> tuple[str, str]:
    main([*argv, "--device", "cpu"])
    captured = capsys.readouterr()
    return captured.out, captured.err


def speed_line(err: str) -> tuple[int, int]:
    """Tokens written and backbone steps."""
    found = re.search(r"(\d+) tokens in [\d.]+ s \([\d.]+ tokens/s\), (\d+) backbone steps", err)
    assert found, err
    return int(found[1]), int(found[2])


def test_the_prompt_is_continued_and_the_steps_are_counted(student: Path, capsys: pytest.CaptureFixture):
    """The one figure the whole project is about is steps per token; it must be seen, apart from the text."""
    out, err = run(
        capsys, "--model", str(student), "--prompt", "def main", "--max_new_tokens", "16", "--temperature", "0"
    )
    assert out.startswith("def main") and "tokens/s" in err and "tokens/s" not in out
    written, steps = speed_line(err)
    assert written <= 16 and steps <= -(-written // 4) + 1


def test_greedy_text_does_not_depend_on_the_cache_or_the_seed(student: Path, capsys: pytest.CaptureFixture):
    """A cache that changes the text would be a silent error of every user."""
    common = ("--student", str(student), "--prompt", "class Sh", "--max_new_tokens", "11", "--temperature", "0")
    first, _ = run(capsys, *common)
    assert run(capsys, *common, "--no_use_kv_cache")[0] == first
    assert run(capsys, *common, "--seed", "7")[0] == first


def test_sampling_repeats_with_its_seed_and_changes_with_another(student: Path, capsys: pytest.CaptureFixture):
    """A sample that nobody can repeat cannot be reported."""
    common = ("--model", str(student), "--prompt", "class", "--max_new_tokens", "24", "--temperature", "1.5")
    first, _ = run(capsys, *common, "--seed", "1")
    assert run(capsys, *common, "--seed", "1")[0] == first
    assert run(capsys, *common, "--seed", "2")[0] != first


def test_top_k_of_one_is_greedy(student: Path, capsys: pytest.CaptureFixture):
    """A filter that is parsed and not handed on looks like one that works."""
    common = ("--model", str(student), "--prompt", "def", "--max_new_tokens", "9")
    greedy, _ = run(capsys, *common, "--temperature", "0")
    assert run(capsys, *common, "--temperature", "2", "--top_k", "1")[0] == greedy
    assert run(capsys, *common, "--temperature", "2", "--top_p", "1e-6")[0] == greedy


def test_an_empty_prompt_starts_a_document(student: Path, capsys: pytest.CaptureFixture):
    """`generate` on no ids at all raises deep inside transformers."""
    out, err = run(capsys, "--model", str(student), "--max_new_tokens", "5", "--temperature", "0")
    assert "<|endoftext|>" not in out and speed_line(err)[0] >= 1
    assert encode_prompt("", make_tokenizer()).tolist() == [[make_tokenizer().eos_token_id]]


def test_an_empty_prompt_without_any_start_token_is_refused():
    """Starting from an arbitrary id would be a text that nobody asked for."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no BOS or EOS"):
        encode_prompt("", tokenizer)


def test_bfloat16_writes_too(student: Path, capsys: pytest.CaptureFixture):
    """A part that stays in fp32 beside bf16 ones raises at the first matrix product."""
    out, _ = run(capsys, "--model", str(student), "--prompt", "def", "--max_new_tokens", "9", "--bf16")
    assert out.startswith("def")


def test_interactive_continues_each_line_until_an_empty_one(
    student: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """A state kept from one prompt to the next would make the second answer depend on the first."""
    monkeypatch.setattr("sys.stdin", io.StringIO("def\ndef\n\nclass\n"))
    out, err = run(capsys, "--model", str(student), "--interactive", "--max_new_tokens", "6", "--temperature", "0")
    assert err.count("tokens/s") == 2 and "class" not in out.split("\n")[0]
    first = out[: len(out) // 2]
    assert out == first + first


def test_the_prompt_of_an_interactive_session_is_its_first(
    student: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """A flag that is read and not used looks like a model that ignores its prompt."""
    common = ("--model", str(student), "--max_new_tokens", "6", "--temperature", "0")
    expected = [run(capsys, *common, "--prompt", prompt)[0] for prompt in ("class Shape:\n", "def")]
    monkeypatch.setattr("sys.stdin", io.StringIO("def\n\n"))
    assert run(capsys, *common, "--interactive", "--prompt", "class Shape:\n")[0] == "".join(expected)


def test_a_line_that_is_too_long_does_not_end_the_session(
    student: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """One pasted page would throw the loaded model away."""
    short = shutil.copytree(student, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    config["backbone_config"]["max_position_embeddings"] = 8
    (short / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 200 + "\ndef\n"))
    out, err = run(capsys, "--model", str(short), "--interactive", "--max_new_tokens", "4", "--temperature", "0")
    assert "error: The prompt has 200 tokens, the model reads at most 8 patches" in err and "Traceback" not in err
    assert out.startswith("def") and err.count("tokens/s") == 1


def test_a_codec_is_refused_by_that_name(tmp_path: Path):
    """The library's answer is a list of every class that it knows."""
    tiny_autoencoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a codec, .* writes no text: pass the student"):
        main(["--model", str(tmp_path)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_before_the_model_is_loaded(student: Path):
    """`Torch not compiled with CUDA enabled` out of torch does not name the flag."""
    with pytest.raises(ValueError, match="--device cuda: torch sees no GPU here"):
        main(["--model", str(student), "--device", "cuda"])
    with pytest.raises(ValueError, match="--device cudda: torch knows no such device"):
        main(["--model", str(student), "--device", "cudda"])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--temperature", "-1"), "temperature must be 0 (greedy) or more, got -1.0"),
        (("--temperature", "nan"), "temperature must be 0 (greedy) or more, got nan"),
        (("--temperature", "inf"), "temperature must be 0 (greedy) or more, got inf"),
        (("--top_p", "0"), "top_p must lie in (0, 1], got 0.0"),
        (("--top_p", "1.5"), "top_p must lie in (0, 1], got 1.5"),
        (("--top_k", "-2"), "top_k must be 0 (all tokens) or more, got -2"),
        (("--max_new_tokens", "0"), "max_new_tokens must be at least 1, got 0"),
        (("--temprature", "1"), "did you mean --temperature"),
        (("--model", "no/such/student"), "there is no folder no/such/student. Train a model with"),
    ],
)
def test_a_wrong_call_says_what_and_how_to_mend_it(
    flags: tuple[str, str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """A traceback out of transformers, or text sampled with a nonsense setting, helps nobody."""
    with pytest.raises(SystemExit) as stop:
        main(["--model", str(tmp_path), *flags])
    assert stop.value.code == 2 and complaint in capsys.readouterr().err
