import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from modeling_latentforge import LatentForgeAutoencoderConfig
from tests.conftest import tiny_autoencoder
from trainers import command_line
from trainers.command_line import check_writable, choose_device, model_path, run
from trainers.teachers import TeacherUnavailable
from trainers.teachers.store import StoreBusy


@pytest.fixture(autouse=True)
def called_as_a_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])
    monkeypatch.delenv(command_line.DEBUG, raising=False)


class Failure(RuntimeError):
    pass


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("a.jsonl:3: not a line of JSON"), "a.jsonl:3: not a line of JSON"),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), "No such file or directory: x.txt"),
        (ImportError("--lora_r needs peft"), "--lora_r needs peft"),
        (TeacherUnavailable("nobody answers"), "nobody answers"),
        (StoreBusy("another process writes"), "another process writes"),
        (Failure("of the script's own"), "of the script's own"),
        (ValueError("one\n\n  two\n"), "one\n  two"),
        (ValueError("x" * 5000), "x" * 1000 + " ..."),
        (ValueError(), "ValueError"),
    ],
)
def test_what_a_person_can_mend_is_said_in_words(error, message, capsys):
    """A good message below thirty lines of traceback is not read."""
    with pytest.raises(SystemExit) as stop:
        run(raising(error), Failure)
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"train.py: error: {message}\n(LATENTFORGE_DEBUG=1 shows where in the code)\n"


def test_a_wrong_size_is_said_without_the_validator_around_it(capsys):
    """Configurations wrap what their checks say, and the wrapper's name tells a user nothing."""
    with pytest.raises(SystemExit) as stop:
        run(lambda: LatentForgeAutoencoderConfig(patch_size=0))
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("train.py: error: `patch_size` must be at least 1, got 0.\n")


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shapes"), AssertionError(), KeyboardInterrupt()])
def test_a_fault_of_ours_keeps_its_traceback(error, capsys):
    """Without it nobody can report, or find, what went wrong; and Ctrl-C must end a shell's loop too."""
    with pytest.raises(type(error)):
        run(raising(error))
    assert not capsys.readouterr().err


def test_the_traceback_of_any_error_can_be_had(monkeypatch):
    """A ValueError may be a fault of ours after all."""
    monkeypatch.setenv(command_line.DEBUG, "1")
    with pytest.raises(ValueError, match="why"):
        run(raising(ValueError("why")))


@pytest.mark.parametrize("returned", [None, 0, 1, {"eval_loss": 1.0}, "text"])
def test_what_main_returns_is_a_status_only_where_that_is_said(returned):
    """Python prints what is no number and calls it a failure; and a number may be a figure."""
    with pytest.raises(SystemExit) as stop:
        run(lambda: returned)
    assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        run(lambda: 1, returns_status=True)
    assert stop.value.code == 1


def test_the_status_of_the_argument_parser_is_kept(capsys):
    """Shell scripts tell a wrong call (2) from work that failed (1)."""
    with pytest.raises(SystemExit) as stop:
        run(raising(SystemExit(2)))
    assert stop.value.code == 2 and not capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupt_ends_a_process_as_the_shell_expects(tmp_path):
    """A loop over trainings would go on with the next one."""
    script = tmp_path / "interrupted.py"
    script.write_text(
        "import os, signal, time\nfrom trainers.command_line import run\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "def main():\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\nrun(main)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGINT, done.stderr  # 130 in a shell


@pytest.mark.slow
def test_one_process_s_error_stops_the_others(tmp_path):
    """Processes that wait for one that is gone would hold their GPUs until somebody looks."""
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch
            from trainers.command_line import run

            def main():
                torch.distributed.init_process_group("gloo")
                if torch.distributed.get_rank() == 1:
                    raise ValueError("only here")
                torch.distributed.barrier()

            run(main)
            """
        )
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rendezvous = f"--nnodes 1 --node_rank 0 --master_addr 127.0.0.1 --master_port {port}".split()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc_per_node", "2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 1 and "two.py: error: only here" in done.stderr, done.stderr[-3000:]


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B-Base", "no_such_folder/model"])
def test_an_id_of_the_hub_is_none_of_our_business(name):
    """Whoever has no such folder means the Hub."""
    assert model_path("teacher", name) == model_path("teacher", name, True) == name


@pytest.mark.parametrize("name", ["/no/folder", "./codec", "../codec", "~/codec", "a/b/c", "trainers/codec", ".."])
def test_a_mistyped_path_is_not_looked_up_on_the_hub(name, monkeypatch, tmp_path):
    """`Repo id must be in the form 'repo_name'` does not say that a folder is missing."""
    (tmp_path / "trainers" / "other").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)
    if name == "..":
        assert model_path("tokenizer", name) == name
        return
    with pytest.raises(ValueError, match=f"^tokenizer: there is no folder {name}.$"):
        model_path("tokenizer", name)
    with pytest.raises(ValueError, match="no folder .* Train a model with `make demo`"):
        model_path("model", name, True)


def test_folders_are_found_and_those_of_similar_names_are_named(tmp_path, monkeypatch):
    """Of a list of twenty runs the one that was meant is hard to see."""
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_autoencoder().save_pretrained(tmp_path / "codec")
    assert model_path("autoencoder", f"{tmp_path}/codec", False) == f"{tmp_path}/codec"
    assert model_path("autoencoder", "~/codec") == f"{tmp_path}/codec"
    with pytest.raises(ValueError, match=f"did you mean {tmp_path}/codec"):
        model_path("autoencoder", f"{tmp_path}/codek")
    with pytest.raises(ValueError, match="is a file, no folder"):
        model_path("autoencoder", f"{tmp_path}/codec/config.json")
    with pytest.raises(ValueError, match="holds no model: there is no config.json"):
        model_path("model", str(tmp_path), True)
    with pytest.raises(ValueError, match="there is no folder gpt2.*add --trust_remote_code"):
        model_path("model", "gpt2", False)


def test_a_folder_is_made_and_one_that_cannot_be_is_refused(tmp_path):
    """The weights of a night would go there."""
    check_writable(tmp_path / "a" / "b")
    assert not list((tmp_path / "a" / "b").iterdir())
    (tmp_path / "file").touch()
    for wrong in ("file", "file/below"):
        with pytest.raises(OSError, match="cannot write to the output_dir .*: pass another --output_dir"):
            check_writable(tmp_path / wrong)


def test_a_device_is_checked_before_it_is_used():
    """An error of CUDA after minutes of loading names no flag."""
    assert choose_device("cpu") == "cpu" and choose_device(None) in ("cpu", "cuda")
    with pytest.raises(ValueError, match="torch knows no such device"):
        choose_device("gpu")
    with pytest.raises(ValueError, match="torch sees"):
        choose_device("cuda:99")
