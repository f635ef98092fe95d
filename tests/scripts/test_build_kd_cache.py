"""From text to a store, and from the store to a student, as a person types it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import build_kd_cache, train_student
from tests.conftest import tiny_autoencoder
from tests.hub_server import HubServer
from tests.trainers.training_helpers import TEXT, byte_tokenizer, tiny_teacher
from trainers.evaluation.loopback_servers import FakeVLLM
from trainers.teachers import HFTeacher, ParquetStore, SQLiteStore, TeacherUnavailable
from trainers.teachers.identity import identity_of


ROOT = Path(__file__).resolve().parent.parent.parent
TRAINING = (
    "--max_steps 3 --logging_steps 1 --save_strategy no --disable_tqdm true --use_cpu true --report_to none "
    "--hidden_size 32 --intermediate_size 64 --num_hidden_layers 1 --num_attention_heads 2"
)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """Text, a codec, a teacher of the same tokenizer, and both kinds of store."""
    folder = tmp_path_factory.mktemp("room")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT * 6))
    torch.manual_seed(0)
    for name, model in (("codec", tiny_autoencoder()), ("teacher", tiny_teacher())):
        model.save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    build(folder, f"--output {folder}/kd.sqlite")
    build(folder, f"--output {folder}/shards --format parquet --rows_per_shard 64")
    return folder


def data_flags(room):
    return f"--data {room}/text.jsonl --block_size 32 --cache_dir {room}/cache --autoencoder {room}/codec"


def build(room, more):
    flags = f"{data_flags(room)} --teacher {room}/teacher --top_k 12 --num_draws 0 --batch_size 16 {more}"
    return build_kd_cache.main(flags.split())


def train(room, output, more):
    train_student.main(f"{data_flags(room)} {TRAINING} --output_dir {output} {more}".split())
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    losses = [(entry["loss"], entry["kd"]) for entry in log if "loss" in entry]
    return losses, json.loads((output / "eval_results.json").read_text())


def test_student_trains_from_either_store_without_its_teacher(room, tmp_path, capsys):
    """The teacher's machine is gone when the student is trained; held-out rows are asked for too."""
    runs = [train(room, tmp_path / name, f"--kd_cache {room}/{name} --kd_top_k 8") for name in ("kd.sqlite", "shards")]
    assert runs[0][0] == runs[1][0] and len(runs[0][0]) == 3
    assert runs[0][1]["eval_kd"] == runs[1][1]["eval_kd"] > 0
    assert "100.0% without the teacher" in capsys.readouterr().out
    asked, _ = train(
        room,
        tmp_path / "live",
        f"--teacher {room}/teacher --kd_cache {tmp_path}/new.sqlite --kd_top_k 12 --kd_num_draws 0",
    )
    stored, _ = train(room, tmp_path / "stored", f"--kd_cache {room}/kd.sqlite")
    for live, kept in zip(asked, stored, strict=True):
        assert live == pytest.approx(kept, rel=1e-4), "in batches of other sizes a teacher rounds otherwise"


def test_a_second_run_asks_nobody_and_verifies(room, capsys):
    """Resuming that asks again is paid twice; a check that cannot fail is none (see the tests of the store)."""
    for output in ("kd.sqlite", "shards --format parquet --rows_per_shard 64"):
        result = build(room, f"--output {room}/{output} --verify 4")
        assert result["asked"] == 0 and result["found"] > 50
        assert result["verification"]["rows"] == 4 and result["verification"]["beyond"] == 0
    assert "4 rows (" in capsys.readouterr().out
    assert len(list((room / "shards" / "data").iterdir())) > 1


def test_the_readmes_command_labels_a_data_set(room, tmp_path, monkeypatch):
    """Copied from the README it must find the codec that its own targets have made."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^\.venv/bin/python scripts/build_kd_cache\.py (.*)$", readme, re.MULTILINE)
    places = {"corpus.jsonl": f"{room}/text.jsonl", "checkpoints/ae": f"{room}/codec", "checkpoints": str(room)}
    for name, place in places.items():
        command = command.replace(name, place)
    monkeypatch.chdir(tmp_path)
    result = build_kd_cache.main(f"{command} --block_size 64 --cache_dir {room}/cache".split())
    assert result["asked"] > 0 and len(SQLiteStore("cache/kd_cache.sqlite")) == result["asked"]


def over_urls(room, output, *urls):
    flags = f"{data_flags(room)} --top_k 12 --teacher_revision 1 --teacher_dtype float32 --batch_size 16"
    return build_kd_cache.main(f"{flags} --output {output} --urls {' '.join(urls)}".split())


@pytest.mark.slow
def test_a_server_that_is_lost_drops_out_and_the_others_do_its_work(room, tmp_path, monkeypatch, capfd):
    """Labelling takes days; one of eight machines always fails, and what it had been asked must not be missing."""
    monkeypatch.setattr(build_kd_cache, "SERVER_PATIENCE", 0.5)
    monkeypatch.delenv("VLLM_REMOTE_API_KEY", raising=False)
    model, tokenizer = tiny_teacher(), byte_tokenizer()

    def fails(number):
        return (500, {}) if 5 < number < 100 else None

    with FakeVLLM(model, tokenizer) as sound, FakeVLLM(model, tokenizer, fault=fails) as failing:
        away = "http://127.0.0.1:9/v1"
        result = over_urls(room, tmp_path / "shared.sqlite", away, failing.url, f"{sound.url}/v1")
        assert result["dropped_out"] >= 1 and failing.scored > 5
        assert f"{away} does not answer and takes part when it does" in capfd.readouterr().err
        alone = over_urls(room, tmp_path / "alone.sqlite", sound.url)
        assert result["asked"] == alone["asked"] > 50 and result["unanswered"] == alone["unanswered"] == 0
        again = over_urls(room, tmp_path / "shared.sqlite", sound.url)
        assert again["asked"] == 0, "what one server said is the other's word too"


def test_no_server_at_all_is_said_at_once(room, tmp_path, monkeypatch):
    """A mistyped port would wait for ten minutes, and then store nothing."""
    monkeypatch.setattr(build_kd_cache, "SERVER_PATIENCE", 0.5)
    with pytest.raises(TeacherUnavailable, match="127.0.0.1:9"):
        over_urls(room, tmp_path / "none.sqlite", "http://127.0.0.1:9", "http://127.0.0.1:9/v1")


def test_other_data_is_not_found(room, tmp_path):
    """Another data seed moves every block: the student must not train on the few rows that happen to fit."""
    with pytest.raises(Exception, match="lacks .* rows of this batch.*build_kd_cache.py"):
        train(room, tmp_path, f"--kd_cache {room}/kd.sqlite --data_seed 7")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "teacher is missing"),
        ("--teacher x --push_to a/b", "push_to needs --format parquet"),
        ("--teacher x --copy_from a/b", "leave out teacher"),
        ("--urls http://a", "pass teacher_revision and teacher_dtype, or set VLLM_REMOTE_REVISION"),
        ("--urls http://a http://a --teacher_revision 1 --teacher_dtype bfloat16", "names a server twice"),
        ("--urls http://a --teacher_backend vllm-local", "leave out teacher_backend"),
        ("--teacher ./x", "teacher: there is no folder ./x"),
        ("--teacher x --tokenizer ./x", "tokenizer: there is no folder ./x"),
        ("--teacher x --patience 0", "patience must be above 0"),
        ("--teacher x --top_k 0", "top_k must be at least 1"),
        ("--teacher x --num_draws 30", "num_draws must lie between"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, message, capsys):
    """Before a model is loaded and a data set is tokenised."""
    with pytest.raises(SystemExit):
        build_kd_cache.main(flags.split())
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_store_goes_over_the_hub(room, tmp_path):
    """Labelled on one machine, trained on another: whole, by stream, and by what `datasets` alone makes of it."""
    copied = tmp_path / "copied.sqlite"
    code = f"""
import datasets
from scripts import build_kd_cache
from trainers.teachers import ParquetStore
build_kd_cache.main('''{data_flags(room)} --teacher {room}/teacher --top_k 12 --format parquet --rows_per_shard 64
    --output {room}/shards --push_to alice/answers --private'''.split())
store = ParquetStore("alice/answers")
who = store.teacher
print("rows", len(store), len(store.get([key for key, _ in store.sample(5, who)], store.shape)))
build_kd_cache.main("--copy_from alice/answers --output {copied}".split())
row = next(iter(datasets.load_dataset("alice/answers", split="train", streaming=True)))
print("columns", sorted(row), len(row["top_ids"]) == 12 * len(row["tail"]))
"""
    with HubServer(tmp_path / "hub", {"hf_alicewrites": "alice"}) as hub:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_alicewrites",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        environment.pop("HF_HUB_OFFLINE", None)
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert hub.repos["alice/answers"].private
        names = {
            path.relative_to(hub.folder("alice/answers")).as_posix()
            for path in hub.folder("alice/answers").rglob("*.*")
        }
    shards = ParquetStore(room / "shards")
    assert {"README.md", "manifest.json", *shards.manifest["shards"]} <= names
    assert f"rows {len(shards)} 5" in done.stdout
    assert "columns ['checksum', 'entropy', 'key', 'tail', 'token_ids', 'top_ids', 'top_logprobs'] True" in done.stdout
    store = SQLiteStore(copied)
    unique = {key for key, _ in shards.stream()}
    assert len(store) == len(unique) == len(shards) > 100 and store.teachers() == shards.teachers()


def test_a_store_of_other_weights_fails_its_verification(room, capsys):
    """A sum that says "3 nats off" above a status of 0 is read by nobody, and then the store is pushed."""
    store, teacher = SQLiteStore(room / "kd.sqlite"), HFTeacher(str(room / "teacher"))
    assert build_kd_cache.verify(store, teacher, 4)["verification"]["beyond"] == 0
    identity = identity_of(teacher)
    with torch.no_grad():
        teacher.model.get_output_embeddings().weight.mul_(3)
    teacher.identity = identity  # declared, like a server's
    with pytest.raises(ValueError, match="nats on average: those are other weights' answers. Nothing was pushed"):
        build_kd_cache.verify(store, teacher, 4)
