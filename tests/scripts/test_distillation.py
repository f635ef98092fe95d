"""From text to a taught student, as a person types it, and whether the teaching took."""

import inspect
import json
import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scripts import train_student, train_teacher, train_tokenizer
from tests.conftest import tiny_autoencoder
from tests.trainers.training_helpers import byte_tokenizer
from trainers import DataArguments, PatchCollator, load_blocks
from trainers.evaluation.likelihood import divergence_from_teacher
from trainers.teachers import AlignedTeacher, HFTeacher


SMALL = "--block_size 64 --logging_steps 20 --save_strategy no --disable_tqdm true --use_cpu true"
TRAINING = f"{SMALL} --per_device_train_batch_size 8 --per_device_eval_batch_size 8 --lr_scheduler_type cosine"
STUDENT = "--hidden_size 32 --intermediate_size 64 --num_hidden_layers 1 --num_attention_heads 2 --learning_rate 5e-3"


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A folder with text, an untrained codec, a teacher of the codec's tokenizer and one of another."""
    folder = tmp_path_factory.mktemp("distillation")
    (folder / "text.txt").write_text(inspect.getsource(random) + inspect.getsource(inspect))
    byte_tokenizer().save_pretrained(folder / "codec")
    torch.manual_seed(0)
    tiny_autoencoder().save_pretrained(folder / "codec")
    train_tokenizer.main(f"--data {folder}/text.txt --output_dir {folder}/tokenizer --vocab_size 600".split())
    for name, tokenizer, steps in (("teacher", "codec", 250), ("stranger", "tokenizer", 5)):
        train_teacher.main(
            f"--data {folder}/text.txt --tokenizer {folder}/{tokenizer} --output_dir {folder}/{name} {TRAINING} "
            f"--cache_dir {folder}/cache --hidden_size 64 --num_hidden_layers 2 --max_steps {steps} --patch_size 4 "
            "--learning_rate 5e-3".split()
        )
    return folder


def train(room, output, more, steps=120):
    flags = f"--data {room}/text.txt --autoencoder {room}/codec --cache_dir {room}/cache --output_dir {output}"
    return train_student.main(f"{flags} {TRAINING} {STUDENT} --max_steps {steps} {more}".split())


def held_out_kl(room, output):
    """KL(teacher || student) on the text's held-out end."""
    arguments = DataArguments(data=str(room / "text.txt"), block_size=64, cache_dir=str(room / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(room / "codec")
    _, held_out = load_blocks(arguments, tokenizer, 4, seed=42)
    batches = [PatchCollator(4)([held_out[row] for row in range(len(held_out))])]
    teacher = HFTeacher(str(room / "teacher"))
    return divergence_from_teacher(AutoModelForCausalLM.from_pretrained(output), teacher, batches)


@pytest.mark.slow  # part of make test-e2e
def test_a_student_taught_by_scores_is_closer_to_its_teacher_than_one_taught_by_text(room, tmp_path):
    """If it were not, the teacher would be a cost without a gain; a shifted or bent distribution shows here first."""
    train(room, tmp_path / "text", "")
    train(room, tmp_path / "scores", f"--teacher {room}/teacher --ce_weight 0")
    train(room, tmp_path / "stored", f"--teacher {room}/teacher --ce_weight 0 --kd_top_k 20")
    kl = {name: held_out_kl(room, tmp_path / name) for name in ("text", "scores", "stored")}
    assert kl["scores"] < 0.8 * kl["text"], kl
    assert kl["stored"] < 0.8 * kl["text"], kl


def test_a_teacher_with_another_tokenizer_is_refused_unless_told_how_to_align(room, tmp_path):
    """Its ids are other words: the loss would fall all the same."""
    with pytest.raises(ValueError, match="is not the codec's.*--kd_alignment bytes"):
        train(room, tmp_path, f"--teacher {room}/stranger", steps=2)
    metrics = train(room, tmp_path, f"--teacher {room}/stranger --kd_alignment bytes", steps=2)
    assert metrics["eval_kd"] > 0
    log = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    assert any("eval_kd" in entry for entry in log)
    teacher = AlignedTeacher(HFTeacher(str(room / "stranger")), AutoTokenizer.from_pretrained(room / "codec"))
    assert teacher.reader.tokenizer.eos_token_id is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--kd_top_k 20", "kd_top_k .20. is about a teacher's distributions: add teacher"),
        (
            "--teacher x --kd_num_draws 0",
            "kd_num_draws .0. is about a part of a teacher's distributions: add kd_top_k",
        ),
        ("--teacher x --kd_top_k 4 --kd_num_draws 5", "kd_num_draws must lie in 0 to kd_top_k .4., got 5"),
        ("--teacher x --kd_alignment characters", "invalid choice: 'characters'"),
        ("--teacher x --kd_alignment bytes --kd_temperature 2", "kd_temperature is 2.0"),
    ],
)
def test_flags_about_signals_are_refused_at_once(room, tmp_path, capsys, flags, message):
    """Before a teacher is loaded, with the value and the remedy."""
    with pytest.raises(SystemExit):
        train(room, tmp_path, flags)
    assert re.search(message, capsys.readouterr().err)


def test_alignment_is_refused_where_it_means_nothing(room, tmp_path):
    """Distributions of a teacher with other ids cannot be stored for the student, nor its layers copied to it."""
    with pytest.raises(ValueError, match="kd_alignment is bytes but there is no teacher"):
        train(room, tmp_path, "--kd_alignment bytes")
    with pytest.raises(ValueError, match="kd_top_k is about a teacher with the codec's tokenizer"):
        train(room, tmp_path, f"--teacher {room}/stranger --kd_alignment bytes --kd_top_k 20")
