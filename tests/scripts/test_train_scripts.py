"""The two training scripts, called as a launcher calls them, at tiny size on real text."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from scripts import train_autoencoder, train_student, train_teacher, train_tokenizer
from tests.conftest import tiny_autoencoder
from tests.trainers.training_helpers import TEXT, byte_tokenizer, tiny_teacher
from trainers import AEConfig, DataArguments, KDConfig, parse_arguments
from trainers.evaluation import reconstruction_accuracy


ROOM = "--block_size 32 --max_steps 3 --logging_steps 1 --save_strategy no --disable_tqdm true --use_cpu true"
SMALL = "--hidden_size 32 --intermediate_size 64 --num_hidden_layers 1 --num_attention_heads 2"


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with text, a tokenizer, a codec and a teacher of the same tokenizer."""
    folder = tmp_path_factory.mktemp("room")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT * 6))
    torch.manual_seed(0)
    for name, model in (("codec", tiny_autoencoder()), ("teacher", tiny_teacher(num_hidden_layers=3))):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


def student_flags(room, output, more):
    flags = f"--data {room}/text.jsonl --autoencoder {room}/codec --cache_dir {room}/cache --output_dir {output}"
    return f"{flags} {ROOM} {more}".split()


def test_codec_script_saves_a_codec_that_loads_with_its_tokenizer(room, tmp_path):
    """A directory that lacks a piece is found out by whoever trains the student on it."""
    metrics = train_autoencoder.main(
        f"--data {room}/text.jsonl --tokenizer {room}/teacher --cache_dir {room}/cache --output_dir {tmp_path} {ROOM} "
        "--patch_size 4 --latent_size 16 --hidden_size 32 --intermediate_size 48 --eval_noise 0.5".split()
    )
    model = AutoModel.from_pretrained(tmp_path)
    assert (model.config.patch_size, model.config.latent_size, model.config.vocab_size) == (4, 16, 258)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.eos_token_id == tokenizer.eos_token_id == 256
    assert "eval_patch_accuracy_noise0.5" in metrics
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_nll"] == metrics["eval_nll"]
    assert reconstruction_accuracy(model, [tokenizer(TEXT[0])["input_ids"]])["num_tokens"] == len(TEXT[0].encode())


@pytest.mark.parametrize(
    "shape",
    [
        "--architecture qwen3 --decoder_window 6 --decoder_memory none --decoder_output_size 16 --decoder_conv_size 2",
        "--architecture gpt_neox --decoder_type parallel --train_decoder --mse_weight 1",
        "--head_type energy --input_mode latents --num_samples 3 --exponent 0.5 --embedding_multiplier 2.0",
    ],
)
def test_student_script_builds_what_the_flags_say(room, tmp_path, shape):
    """A flag that is parsed and dropped trains another model under the name one asked for."""
    train_student.main(student_flags(room, tmp_path, f"{SMALL} {shape} --teacher {room}/teacher"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    words = shape.split()
    for flag, value in zip(words, words[1:], strict=False):
        name = flag.removeprefix("--")
        if name == "architecture":
            assert model.config.backbone_config.model_type == value
        elif flag.startswith("--") and hasattr(model.config.head_config, name):
            assert str(getattr(model.config.head_config, name)) == value
        elif flag.startswith("--") and hasattr(model.config, name):
            assert str(getattr(model.config, name)) == ("True" if value.startswith("--") else value)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 258
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert all("kd" in entry for entry in log if "loss" in entry)
    assert {"eval_kd", "eval_loss"} <= set(json.loads((tmp_path / "eval_results.json").read_text()))


def test_lora_on_the_teachers_layers_is_merged_and_kept(room, tmp_path):
    """Users load the result with transformers alone; the adapter, unmerged, would be a backbone that was never
    trained."""
    torch.manual_seed(0)
    train_student.main(
        student_flags(
            room,
            tmp_path,
            f"--teacher {room}/teacher --init_from_teacher --layers 0,2 --lora_r 2 --learning_rate 1e-2",
        )
    )
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    teacher = AutoModelForCausalLM.from_pretrained(room / "teacher")
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert adapter["r"] == 2 and (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    for ours, theirs in ((0, 0), (1, 2)):
        change = model.model.backbone.layers[ours].mlp.up_proj.weight - teacher.model.layers[theirs].mlp.up_proj.weight
        assert change.abs().max() > 0 and torch.linalg.matrix_rank(change, tol=1e-5) <= 2
        norms = [m.input_layernorm.weight for m in (model.model.backbone.layers[ours], teacher.model.layers[theirs])]
        assert torch.equal(*norms)


def test_training_resumes_inside_a_lora_run(room, tmp_path):
    """Checkpoints of a wrapped backbone have other names than its merged weights."""
    more = (
        f"--teacher {room}/teacher --init_from_teacher --lora_r 2 --kd_weight 0 --save_strategy steps --save_steps 2"
    )
    whole = train_student.main(student_flags(room, tmp_path, more))
    # such a checkpoint is no model: its backbone's weights have other names, and random ones would take their place
    with pytest.raises(ValueError, match="no complete LatentForgeForCausalLM.*backbone"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    (tmp_path / "model.safetensors").unlink()
    resumed = train_student.main(
        student_flags(room, tmp_path, f"{more} --resume_from_checkpoint {tmp_path}/checkpoint-2")
    )
    assert resumed["eval_nll"] == whole["eval_nll"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--init_from_teacher", "init_from_teacher is set but there is no teacher"),
        ("--lora_r 4", "lora_r .4. is about a teacher's backbone"),
        ("--layers 0,2", "layers .0,2. is about a teacher's backbone"),
        ("--teacher x --init_from_teacher --num_hidden_layers 9", "num_hidden_layers .9. is about a new backbone"),
        ("--decoder_type parallel --decoder_window 0", "decoder_window .0. is about an autoregressive decoder"),
        ("--lora_alpha 3", "lora_alpha .3.0. is about LoRA: add lora_r"),
        ("--num_samples 3", "num_samples .3. is about an energy head"),
        ("--decoder_type parallel --decoder_window 16", "decoder_window .16. is about an autoregressive decoder"),
        ("--label_smoothing_factor 0.1", "label_smoothing_factor .0.1. is not possible"),
        ("--kd_wieght 1", "unknown flag --kd_wieght .did you mean --kd_weight"),
        ("--kd_weight -1", "kd_weight must not be negative, got -1"),
    ],
)
def test_flags_that_cannot_work_are_refused_at_once(room, tmp_path, capsys, flags, message):
    """Before the data is tokenised and the teacher loaded, with the value and the remedy."""
    with pytest.raises(SystemExit):
        train_student.main(student_flags(room, tmp_path, flags))
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (train_teacher, "--tokenizer ./codec", "tokenizer: there is no folder ./codec"),
        (train_autoencoder, "--tokenizer {room}/codek", "tokenizer: there is no folder .* .did you mean .*/codec"),
        (train_student, "--autoencoder ./codec", "autoencoder: there is no folder ./codec"),
        (train_student, "--autoencoder {room}/codec --teacher {room}/x", "teacher: there is no folder .*/x"),
    ],
)
def test_a_mistyped_folder_is_not_asked_for_on_the_hub(room, tmp_path, script, flags, message):
    """The library says that a repository's id has another form, or that the network is down."""
    with pytest.raises(ValueError, match=message):
        script.main(f"{flags.format(room=room)} --data x --output_dir {tmp_path} {ROOM}".split())


def test_a_served_teacher_may_be_named_like_a_path(room, tmp_path, monkeypatch):
    """A server serves a folder of its own machine under that folder's name."""
    monkeypatch.setenv("VLLM_REMOTE_URL", "http://127.0.0.1:9")
    flags = f"--teacher {tmp_path}/on/the/server --teacher_backend vllm-remote --teacher_patience 0.1 --data x"
    with pytest.raises(ConnectionError, match="127.0.0.1:9"):
        train_student.main(student_flags(room, tmp_path, flags))


@pytest.mark.parametrize("script", [train_tokenizer, train_teacher, train_autoencoder, train_student])
def test_a_folder_that_cannot_be_written_to_is_said_before_the_work(room, tmp_path, script):
    """Text that is read and tokenised, or a model that is trained, would be lost for a mistyped flag."""
    (tmp_path / "file").touch()
    flags = f"--data {room}/text.jsonl --cache_dir {tmp_path}/cache --output_dir {tmp_path}/file/out"
    if script is not train_tokenizer:
        flags += f" {ROOM} " + (
            f"--autoencoder {room}/codec" if script is train_student else f"--tokenizer {room}/codec"
        )
    with pytest.raises(OSError, match="cannot write to the output_dir .*file/out .*: pass another --output_dir"):
        script.main(flags.split())
    assert not (tmp_path / "cache").exists()


def test_a_backbone_of_size_zero_is_refused_and_not_replaced_by_the_default(room):
    """A zero from a mistaken sweep would train the twelve-layer default under its name."""
    arguments = train_student.StudentArguments(autoencoder="x", num_hidden_layers=0)
    with pytest.raises(ValueError, match="num_hidden_layers must be at least 1, got 0"):
        train_student.build_student(arguments, tiny_autoencoder(), 32)


def test_a_folder_that_holds_no_codec_is_refused(room, tmp_path):
    """Any model with as many ids would do for a codec with random weights, and the loss would fall all the same."""
    with pytest.raises(ValueError, match="holds a llama model, no codec"):
        train_student.load_codec(str(room / "teacher"))
    assert train_student.load_codec(str(room / "codec")).config.patch_size == 4


def test_teacher_of_another_tokenizer_is_refused(room, tmp_path):
    """It would answer about other words, with a loss that falls like any other."""
    tiny_teacher(vocab_size=300).save_pretrained(tmp_path / "teacher")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["The codec", "teacher"])
    tokenizer.save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="(is not the codec's|token ids and the teacher)"):
        train_student.main(student_flags(room, tmp_path / "student", f"--teacher {tmp_path}/teacher"))
    codec = tiny_autoencoder()
    codec.save_pretrained(tmp_path / "codec")
    tokenizer.save_pretrained(tmp_path / "codec")
    flags = f"--data {room}/text.jsonl --autoencoder {tmp_path}/codec --output_dir {tmp_path}/student {ROOM}"
    with pytest.raises(ValueError, match="has 260 ids, the codec 258"):
        train_student.main(flags.split())


@pytest.mark.parametrize("script", ["autoencoder", "student"])
def test_seed_configs_are_readable_and_hold_the_seeds_values(tmp_path, script):
    """`make train-ae` and `make train-student` start from them."""
    config = f"{Path(train_student.__file__).parent}/configs/seed.yaml:{script}"
    if script == "autoencoder":
        argv = ["--config", config, "--tokenizer", "t", "--output_dir", str(tmp_path)]
        codec, data, training = parse_arguments(train_autoencoder.CodecArguments, DataArguments, AEConfig, argv=argv)
        assert (codec.patch_size, codec.latent_size, codec.hidden_size, codec.intermediate_size) == (
            8,
            1024,
            512,
            1280,
        )
        assert (codec.token_dropout, codec.kl_weight, codec.kl_clamp) == (0.15, 1e-3, 0.5)
    else:
        argv = ["--config", config, "--autoencoder", "a", "--output_dir", str(tmp_path)]
        student, data, training = parse_arguments(train_student.StudentArguments, DataArguments, KDConfig, argv=argv)
        assert (student.num_hidden_layers, student.hidden_size, student.intermediate_size) == (12, 768, 2048)
        assert (student.decoder_type, training.kd_temperature, training.mse_weight) == ("parallel", 2.0, 1.0)
    assert (data.block_size, training.learning_rate, training.weight_decay) == (2048, 3e-4, 0.1)
    assert training.warmup_steps == {"autoencoder": 1000, "student": 2000}[script]
