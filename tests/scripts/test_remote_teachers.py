"""The scripts with a teacher elsewhere: doubles on 127.0.0.1, addresses and keys in `.env`, as a person has them."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from scripts import check_api, serve_teacher, train_student
from tests.conftest import tiny_autoencoder
from tests.trainers.training_helpers import TEXT, byte_tokenizer, tiny_teacher


pytest.importorskip("openai")
from tests.trainers.teacher_doubles import FakeTGI, FakeVenice  # noqa: E402
from trainers.evaluation.loopback_servers import FakeVLLM  # noqa: E402


KEY = "sk-never-to-be-seen-0123456789"
FLAGS = (
    "--block_size 32 --max_steps 3 --logging_steps 1 --save_strategy no --disable_tqdm true --use_cpu true "
    "--hidden_size 32 --intermediate_size 64 --num_hidden_layers 1 --num_attention_heads 2 --report_to none "
    "--max_train_tokens 640 --max_eval_tokens 256"
)


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A working directory with text, a codec, and nothing of this machine's environment."""
    for name in ("TEACHER_BACKEND", "VENICE_API_KEY", "OPENAI_API_KEY", "VLLM_REMOTE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT * 6))
    torch.manual_seed(0)
    tiny_autoencoder().save_pretrained("codec")
    byte_tokenizer().save_pretrained("codec")
    return tmp_path


def train(more: str = "") -> dict[str, float]:
    return train_student.main(
        f"--data text.jsonl --autoencoder codec --cache_dir cache --output_dir out {FLAGS} {more}".split()
    )


def recipe(target: str, *variables: str) -> list[str]:
    """Flags that the Makefile gives train_student.py for a target."""
    folder = Path(__file__).resolve().parent.parent.parent
    command = ["make", "-n", "-o", "setup", "-o", "setup-vllm", f"CHECKPOINTS={os.getcwd()}", target, *variables]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in said.replace("\\\n", " ").splitlines() if "scripts/train_student.py" in line]
    words = shlex.split(line)
    return words[words.index("scripts/train_student.py") + 1 :]


@pytest.mark.parametrize("target", ["train-student-vllm-remote", "train-student-venice", "train-student-vllm-local"])
def test_the_makefiles_recipe_suits_a_teacher_that_is_elsewhere(room, monkeypatch, target):
    """The recipe's own temperature fits a local teacher only: each of these targets would end in an error, Venice's
    after texts were paid for."""
    shutil.copytree(room / "codec", room / "ae")
    monkeypatch.setenv("DATA_TEXT", "text.jsonl")
    flags = [os.path.expandvars(word) for word in recipe(target, "STEPS=2", "BLOCK_SIZE=32")]
    flags[flags.index("--config") + 1] = f"{Path(train_student.__file__).parent}/configs/seed.yaml:student"
    assert flags[flags.index("--teacher_backend") + 1] == target.removeprefix("train-student-")
    if target.endswith("local"):
        flags[flags.index("--teacher_backend") + 1] = "vllm-remote"  # vLLM in process needs its environment
    small = f"{FLAGS} --max_steps 2 --warmup_steps 1 --gradient_accumulation_steps 1 --cache_dir cache"
    with (
        FakeVLLM(tiny_teacher(), byte_tokenizer()) as vllm,
        FakeVenice(tiny_teacher(), byte_tokenizer(), KEY) as venice,
    ):
        monkeypatch.setenv("VLLM_REMOTE_URL", vllm.url)
        monkeypatch.setenv("VENICE_BASE_URL", f"{venice.url}/api/v1")
        monkeypatch.setenv("VENICE_API_KEY", KEY)
        monkeypatch.setenv("VENICE_MODEL", "teacher")
        writes = "--kd_top_k 8 --teacher_prompt_tokens 8" if target.endswith("venice") else ""
        metrics = train_student.main([*flags, *f"{small} {writes}".split()])
        assert metrics["eval_kd"] > 0 or target.endswith("venice")


def test_another_temperature_is_refused_before_a_word_is_paid_for(room, monkeypatch):
    """Venice had written 21 texts before the trainer looked at the temperature."""
    with FakeVenice(tiny_teacher(), byte_tokenizer(), KEY) as server:
        monkeypatch.setenv("VENICE_BASE_URL", f"{server.url}/api/v1")
        monkeypatch.setenv("VENICE_API_KEY", KEY)
        monkeypatch.setenv("VENICE_MODEL", "teacher")
        with pytest.raises(ValueError, match="kd_temperature is 2.0.*set it to 1"):
            train("--teacher_backend venice --kd_temperature 2.0")
        assert not server.requests


@pytest.mark.parametrize(("variables", "refused"), [((), False), (("K=3",), False), (("K=8",), True)])
def test_make_takes_k_from_the_codec_that_is_there(room, variables, refused):
    """K=8 after a codec of K=3 trained a teacher on blocks of the wrong phase, and then failed; or was ignored."""
    shutil.copytree(room / "codec", room / "ae")
    config = json.loads((room / "ae" / "config.json").read_text()) | {"patch_size": 3}
    (room / "ae" / "config.json").write_text(json.dumps(config, indent=2))
    flags = recipe("train-student-vllm-remote", *variables)
    assert flags[flags.index("--block_size") + 1] == "2046", "whole patches of the codec's K"
    folder = Path(__file__).resolve().parent.parent.parent
    done = subprocess.run(
        ["make", "-s", "-o", "setup", f"CHECKPOINTS={room}", "check-k", *variables],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert bool(done.returncode) == refused
    assert not refused or "K is 8" in done.stderr and "has 3" in done.stderr


def everything_written(room) -> str:
    kept = [path for path in room.rglob("*") if path.is_file() and path.name != ".env" and path.suffix != ".arrow"]
    return "".join(path.read_text(errors="replace") for path in kept)


def test_student_learns_from_a_vllm_server_that_env_names(room, capsys):
    """`make train-student-vllm-remote`, and a card that names the model and neither address nor key."""
    with FakeVLLM(tiny_teacher(), byte_tokenizer(), key=KEY) as server:
        (room / ".env").write_text(
            f"TEACHER_BACKEND=vllm-remote\nVLLM_REMOTE_URL={server.url}/v1\nVLLM_REMOTE_API_KEY={KEY}\n"
        )
        metrics = train("--kd_top_k 10 --teacher_revision abc --teacher_dtype float32")
        assert server.requests[-1][2]["sampling_params"]["prompt_logprobs"] == 10
    assert metrics["eval_kd"] > 0
    AutoModelForCausalLM.from_pretrained("out")
    log = json.loads((room / "out" / "trainer_state.json").read_text())["log_history"]
    assert all(entry["kd_coverage"] > 0.9 for entry in log if "kd" in entry)
    output = capsys.readouterr()
    assert "teacher: teacher (vllm-remote)" in output.out
    for text in (everything_written(room), output.out, output.err):
        assert KEY not in text
    assert server.url not in everything_written(room)


def test_what_a_server_says_is_kept_where_nothing_is_said(room, monkeypatch, capsys):
    """A second training with another learning rate would pay the teacher again; answers of weights that nobody named
    must not be kept, for they would be found under another's name."""
    with FakeVLLM(tiny_teacher(), byte_tokenizer()) as server:
        monkeypatch.setenv("VLLM_REMOTE_URL", server.url)
        train("--teacher_backend vllm-remote")
        assert "not kept: A server does not tell the revision" in capsys.readouterr().out
        assert not (room / "cache" / "kd_cache.sqlite").exists()
        monkeypatch.setenv("VLLM_REMOTE_REVISION", "abc")
        monkeypatch.setenv("VLLM_REMOTE_DTYPE", "float32")
        first = train("--teacher_backend vllm-remote")
        scored = server.scored
        assert "kept in cache/kd_cache.sqlite" in capsys.readouterr().out
        second = train("--teacher_backend vllm-remote")
        assert server.scored <= scored + 3, "only whether it answers"
        assert second["eval_kd"] == first["eval_kd"] > 0
        train("--teacher_backend vllm-remote --kd_cache none")
        assert server.scored > scored + 20
    metrics = train("--kd_cache cache/kd_cache.sqlite")  # and without the server
    assert metrics["eval_kd"] == first["eval_kd"]


def test_a_teacher_that_leaves_before_the_last_evaluation_costs_no_weights(room, monkeypatch):
    """It is asked once more when all is learned, and of several processes none can save for the others then."""
    from trainers import KDTrainer

    def evaluate(trainer):
        raise ConnectionError("no answer")

    monkeypatch.setattr(KDTrainer, "evaluate", evaluate)
    with FakeVLLM(tiny_teacher(), byte_tokenizer()) as server, pytest.raises(ConnectionError):
        monkeypatch.setenv("VLLM_REMOTE_URL", server.url)
        train("--teacher_backend vllm-remote")
    AutoModelForCausalLM.from_pretrained("out")


def test_student_learns_from_what_venice_writes(room, capsys):
    """`make train-student-venice`; the second run pays for nothing, and the card does not take the text of the prompts
    for what was learned."""
    with FakeVenice(tiny_teacher(), byte_tokenizer(), KEY) as server:
        (room / ".env").write_text(
            f"VENICE_BASE_URL={server.url}/api/v1\nVENICE_API_KEY={KEY}\nVENICE_MODEL=teacher  # any\n"
        )
        flags = "--teacher_backend venice --kd_top_k 8 --teacher_prompt_tokens 8"
        metrics = train(flags)
        asked = len([path for _, path, *_ in server.requests if path.endswith("completions")])
        assert asked > 10 and metrics["eval_kd"] > 0
        train(flags)
        again = len([path for _, path, *_ in server.requests if path.endswith("completions")])
        assert again == asked + 1, "one token to check that it answers"
        with pytest.raises(ValueError, match="judged on texts of its own.*drop --eval_data"):
            train(f"{flags} --eval_data text.jsonl")
        train(f"{flags} --kd_weight 0")
    card = (room / "out" / "README.md").read_text()
    words = "what a model that is not on the Hub (teacher) wrote after beginnings of text that is not on the Hub"
    assert words in card, "the student never saw the rest of that text"
    assert "license: unknown" in card, "ours, where only the words of the teacher were learned"
    output = capsys.readouterr()
    assert (room / "out" / "teacher_texts.jsonl").exists()
    for text in (everything_written(room), output.out, output.err):
        assert KEY not in text


def test_mode_that_the_backend_cannot_do_ends_the_script_at_once(room):
    """Before the corpus is tokenised."""
    (room / ".env").write_text(f"VENICE_API_KEY={KEY}\n")
    with pytest.raises(ValueError, match="'venice' cannot score"):
        train("--teacher_backend venice --teacher_mode score")
    assert not (room / "cache").exists()


def test_draws_from_a_server_are_refused_before_it_is_asked(room, monkeypatch):
    """It gives the most likely ids alone; the flag was dropped without a word."""
    monkeypatch.setenv("VLLM_REMOTE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(
        ValueError, match="kd_num_draws is 2, and teacher_backend vllm-remote gives.*drop kd_num_draws"
    ):
        train("--teacher_backend vllm-remote --kd_top_k 4 --kd_num_draws 2")


def test_check_api_says_models_limits_and_modes(room, capsys):
    """What one wants to know before an hour of training."""
    with FakeVenice(tiny_teacher(), byte_tokenizer(), KEY) as server:
        env = f"TEACHER_BACKEND=venice\nVENICE_BASE_URL={server.url}/api/v1\nVENICE_API_KEY={KEY}\n"
        (room / ".env").write_text(env)
        assert check_api.main([]) == 1
        said = capsys.readouterr().out
        assert "VENICE_MODEL is 'qwen3-next-80b', which is not listed. Models that qualify: teacher." in said
        assert check_api.main(["--teacher", "teacher"]) == 0 and check_api.main(["--teacher", "mute"]) == 1
        assert "'mute' gives no log-probabilities" in capsys.readouterr().out
        (room / ".env").write_text(env + "VENICE_MODEL=mute\n")
        assert check_api.main([]) == 1
        assert "'mute' gives no log-probabilities. Models that qualify: teacher." in capsys.readouterr().out
        (room / ".env").write_text(env + "VENICE_MODEL=teacher\n")
        assert check_api.main(["--tokenizer", "codec", "--kd_top_k", "8"]) == 0
        text = capsys.readouterr().out
    for words in (
        "mode      score: no, ",
        "mode      sample: yes",
        "* teacher  gives log-probabilities  up to 2048 tokens",
        "limits",
        "OK",
    ):
        assert words in text
    assert KEY not in text


def test_check_api_fails_where_training_would_refuse(room, capsys):
    """A status of 0 before an hour of training that ends at its first question."""
    with FakeVLLM(tiny_teacher(), byte_tokenizer()) as server:
        (room / ".env").write_text(f"TEACHER_BACKEND=openai\nOPENAI_BASE_URL={server.url}/v1\nOPENAI_MODEL=other\n")
        assert check_api.main([]) == 1
        assert "OPENAI_MODEL is 'other', which is not listed. Models that qualify: teacher." in capsys.readouterr().out
        (room / ".env").write_text(f"TEACHER_BACKEND=venice\nVENICE_BASE_URL={server.url}/v1\nVENICE_MODEL=teacher\n")
        assert check_api.main([]) == 1
        assert "VENICE_API_KEY is not set" in capsys.readouterr().out


def test_check_api_of_a_vllm_server_says_its_way_in(room, capsys):
    """Whether --enable-scale-out was given shows nowhere else."""
    with FakeVLLM(tiny_teacher(), byte_tokenizer(), scale_out=False) as server:
        (room / ".env").write_text(f"TEACHER_BACKEND=vllm-remote\nVLLM_REMOTE_URL={server.url}/v1\n")
        assert check_api.main(["--tokenizer", "codec"]) == 0
    text = capsys.readouterr().out
    assert "mode      score: yes" in text and "path: /v1/completions" in text and "max_model_len: 2048" in text
    assert "mode      sample: no, " in text
    (room / ".env").write_text("TEACHER_BACKEND=vllm-remote\nVLLM_REMOTE_URL=http://127.0.0.1:9/v1\n")
    assert check_api.main(["--timeout", "0.5"]) == 1
    assert "FAILED    http://127.0.0.1:9/v1 gave no answer" in capsys.readouterr().out


def test_check_api_of_tgi(room, capsys):
    """It only writes, and five alternatives are its most. Without a codec nothing was asked, and the status was 0."""
    with FakeTGI(tiny_teacher(), byte_tokenizer()) as server:
        (room / ".env").write_text(f"TEACHER_BACKEND=tgi\nTGI_URL={server.url}\n")
        assert check_api.main(["--tokenizer", "codec"]) == 0 and check_api.main([]) == 0
        said = capsys.readouterr().out
        assert "model     teacher 0123abcd" in said and "'max_input_tokens': 1024" in said
        assert "mode      score: no, " in said and "mode      sample: yes" in said
        server.drops = ("top_n_tokens",)
        assert check_api.main([]) == 1 and "sample: no, its texts come without top_tokens" in capsys.readouterr().out
    for address, problem in ((server.url, "gave no answer for 0.3 s"), ("", "TGI_URL is not set")):
        (room / ".env").write_text(f"TEACHER_BACKEND=tgi\nTGI_URL={address}\n")
        assert check_api.main(["--timeout", "0.3"]) == 1
        assert problem in capsys.readouterr().out


def test_check_api_does_not_take_an_empty_list_for_logprobs(room, monkeypatch, capsys):
    """Services that do not give them answer with `{"content": null}`: a yes that training refuses."""
    with FakeVenice(tiny_teacher(), byte_tokenizer(), KEY) as server:
        write = server._write
        monkeypatch.setattr(
            server,
            "_write",
            lambda body: {
                **(reply := write(body)),
                "choices": [{**reply["choices"][0], "logprobs": {"content": None}}],
            },
        )
        (room / ".env").write_text(
            f"TEACHER_BACKEND=venice\nVENICE_BASE_URL={server.url}/api/v1\nVENICE_API_KEY={KEY}\nVENICE_MODEL=teacher\n"
        )
        assert check_api.main([]) == 1
    assert "sample: no, its texts come without log-probabilities" in capsys.readouterr().out


def test_the_server_is_started_with_what_env_says(room, monkeypatch):
    """A key on a command line is everybody's."""
    started = []
    monkeypatch.setattr("os.execve", lambda *arguments: started.append(arguments))
    (room / ".env").write_text(
        f"VLLM_LOCAL_MODEL=a/b\nVLLM_QUANTIZATION=gptq           # or awq\nVLLM_MAX_MODEL_LEN=4096\n"
        f"VLLM_GPU_MEMORY_UTIL=0.5\nVLLM_TENSOR_PARALLEL=2\nVLLM_REMOTE_API_KEY={KEY}\n"
    )
    serve_teacher.main(["--port", "8001", "--", "--max-num-seqs", "4"])
    ((_, command, environment),) = started
    text = " ".join(command)
    for words in (
        "--model a/b --host 127.0.0.1 --port 8001",
        "--enable-scale-out --max-logprobs 128",
        "--quantization gptq --max-model-len 4096 --gpu-memory-utilization 0.5 --tensor-parallel-size 2",
    ):
        assert words in text
    assert command[-2:] == ["--max-num-seqs", "4"]
    assert KEY not in text and environment["VLLM_API_KEY"] == KEY
    (room / ".env").unlink()
    with pytest.raises(SystemExit):
        serve_teacher.main([])
