"""`scripts/submit_slurm.py`: the job it writes, run by a shell in which srun prints its words, and what it refuses."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.submit_slurm import main
from tests.trainers.training_helpers import TEXT, byte_tokenizer


ROOT = Path(__file__).parents[2]


AWKWARD = [
    "it's",
    'a "quoted" word',
    "$HOME `date` $(date)",
    "two\nlines",
    "",
    "{{time}}",
    "back\\slash",
    "*",
    "--",
    "é",
]
PRINT = 'import json, sys; open(sys.argv[1], "a").write(json.dumps(sys.argv[2:]) + "\\n")'


def dry(capsys: pytest.CaptureFixture, *argv: str) -> str:
    job = main([*argv[: argv.index("--")], "--dry_run", *argv[argv.index("--") :]])
    assert capsys.readouterr().out == job
    return job


def tool(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


def checked(job: str, tmp_path: Path) -> None:
    """By shellcheck, or where that is not installed by the shell's own parser."""
    (tmp_path / "job.sh").write_text(job)
    command = ["shellcheck", "-s", "bash"] if shutil.which("shellcheck") else ["bash", "-n"]
    done = subprocess.run([*command, str(tmp_path / "job.sh")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def words_of(job: str, tmp_path: Path, out: Path) -> list[str]:
    """What the job's command was given, where srun runs it."""
    bin_folder = tmp_path / "bin"
    tool(bin_folder, "srun", '"$@"')
    tool(bin_folder, "scontrol", "printf 'node%s\\n' $(seq 1 20000)")
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    # as long as a large cluster's: who reads the first line only must not end the job
    environment |= {
        "SLURM_NODEID": "1",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "60123",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    done = subprocess.run(["bash"], input=job, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text().splitlines()[-1])


def test_a_job_asks_for_what_was_asked(capsys: pytest.CaptureFixture, tmp_path: Path):
    """A directive that is misspelt is a comment, and the job runs on one core for the cluster's default time."""
    flags = "--time 2-12:00:00 --gpus 2 --nodes 1 --cpus 12 --mem 64G --account lab --partition a100,h100".split()
    job = dry(capsys, *flags, "--job_name", "wire.8", "--output", "logs/%j.out", "--", "python", "x.py")
    directives = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", job, re.MULTILINE))
    assert directives == {
        "job-name": "wire.8",
        "time": "2-12:00:00",
        "nodes": "1",
        "ntasks-per-node": "1",
        "cpus-per-task": "12",
        "mem": "64G",
        "output": "logs/%j.out",
        "gpus-per-node": "2",
        "account": "lab",
        "partition": "a100,h100",
    }
    # sbatch reads no directive behind the first command
    assert job.startswith("#!/bin/bash\n#SBATCH") and job.rindex("#SBATCH") < job.index("set -euo")
    assert "OMP_NUM_THREADS=6" in job and "{{" not in job
    checked(job, tmp_path)
    plain = dry(capsys, "--gpus", "0", "--", "python", "x.py")
    assert not re.search("gpus-per-node|account|partition", plain) and plain.endswith("srun python x.py\n")


@pytest.mark.parametrize("processes", [("0", "1"), ("1", "1"), ("4", "1"), ("4", "2")])
def test_words_reach_the_command_unharmed(processes: tuple[str, str], capsys: pytest.CaptureFixture, tmp_path: Path):
    """A prompt with a quote in it would end the job's script, or run what it quotes."""
    gpus, nodes = processes
    out = tmp_path / "words"
    script = tmp_path / "a script.py"
    script.write_text(PRINT)
    # in place of accelerate, python prints what it is given
    tool(tmp_path / "bin", "python3", f'exec {sys.executable} -c \'{PRINT}\' "{out}" "$@"')
    python = str(tmp_path / "bin" / "python3")
    job = dry(capsys, "--gpus", gpus, "--nodes", nodes, "--", python, str(script), *AWKWARD)
    checked(job, tmp_path)
    words = words_of(job, tmp_path, out)
    assert words[words.index(str(script)) :] == [str(script), *AWKWARD]
    launch = words[: words.index(str(script))]
    if gpus != "4":
        assert launch == []
        return
    assert launch[:2] == ["-m", "accelerate.commands.launch"]
    assert launch[2] == "--multi_gpu"
    flags = dict(zip(launch[3::2], launch[4::2], strict=True))
    assert flags["--num_processes"] == str(int(nodes) * int(gpus)) and flags["--num_machines"] == nodes
    if nodes == "1":
        assert flags["--main_process_port"] == "0" and "--machine_rank" not in flags
    else:
        place = (flags["--machine_rank"], flags["--main_process_ip"], flags["--main_process_port"])
        assert place == ("1", "node1", "20123")


def test_the_ready_job_is_the_submitters_and_passes_its_words_on(capsys: pytest.CaptureFixture, tmp_path: Path):
    """A second copy of the requeueing falls behind; flags behind the file that are dropped train the defaults."""
    ready = (ROOT / "scripts" / "slurm" / "train_student.sbatch").read_text(encoding="utf-8")
    options = "--gpus 4 --time 1-00:00:00 --requeue 300 --".split()
    job = dry(capsys, *options, *"python scripts/train_student.py --resume_from_checkpoint auto".split())
    assert ready == job.replace("auto &", 'auto "$@" &')
    checked(ready, tmp_path)
    out = tmp_path / "words"
    tool(tmp_path / "bin", "python", f'exec {sys.executable} -c \'{PRINT}\' "{out}" "$@"')
    (tmp_path / "ready.sh").write_text(f"set -- {shlex.join(AWKWARD)}\n{ready}")
    words = words_of((tmp_path / "ready.sh").read_text(), tmp_path, out)
    assert words[words.index("scripts/train_student.py") :] == [
        "scripts/train_student.py",
        "--resume_from_checkpoint",
        "auto",
        *AWKWARD,
    ]


def test_accelerate_knows_the_flags_that_a_job_gives_it(capsys: pytest.CaptureFixture):
    """A flag that was renamed is found out after hours in the queue."""
    from accelerate.commands.launch import launch_command_parser

    for nodes in ("1", "2"):
        job = dry(capsys, "--gpus", "4", "--nodes", nodes, "--", "python", "x.py", "--steps", "3")
        line = job.splitlines()[-1].partition("accelerate.commands.launch ")[2].rstrip("'")
        words = (
            line.replace('"$SLURM_NODEID"', "0")
            .replace('"$MAIN_ADDRESS"', "node1")
            .replace('"$MAIN_PORT"', "1")
            .split()
        )
        parsed = launch_command_parser().parse_args(words)
        assert parsed.training_script == "x.py" and parsed.training_script_args == ["--steps", "3"]
        assert parsed.num_processes == 4 * int(nodes) and parsed.multi_gpu


def test_sbatch_checks_a_job_and_then_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """A job that sbatch would refuse is refused before anybody goes home."""
    calls = tmp_path / "calls"
    tool(tmp_path / "bin", "sbatch", f'echo "[$*]" >> {calls}; cat > {tmp_path}/job; echo Submitted batch job 7')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    job = main(["--time", "5", "--", "python", "x.py"])
    assert calls.read_text() == "[--test-only]\n[]\n" and (tmp_path / "job").read_text() == job
    assert "Submitted batch job 7" in capsys.readouterr().out
    tool(tmp_path / "bin", "sbatch", "echo 'Invalid account' >&2; exit 1")
    for flags in ([], ["--dry_run"]):
        with pytest.raises(ValueError, match="sbatch refuses the job: Invalid account"):
            main([*flags, "--", "python", "x.py"])
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no sbatch on this machine"):
        main(["--", "python", "x.py"])


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--time", "4h"), "time '4h' is none that sbatch takes: write 90, 4:00:00 or 2-12:00:00"),
        (("--time", "1:99:00"), "time '1:99:00'"),
        (("--time", "1-24:00:00"), "time '1-24:00:00'"),
        (("--mem", "lots"), "mem 'lots'"),
        (("--account", "lab\n#SBATCH --nodes=9"), "account"),
        (("--partition", "a; rm"), "partition 'a; rm'"),
        (("--job_name", "my job"), "job_name 'my job'"),
        (("--output", "my log"), "output 'my log'"),
        (("--gpus", "-1"), "gpus must be at least 0, got -1"),
        (("--nodes", "0"), "nodes must be at least 1, got 0"),
        (("--nodes", "2", "--gpus", "0"), "nodes 2 without GPUs"),
        (("--gpus", "two"), "invalid int value"),
        (("--gpu", "2"), "unknown flag --gpu"),
    ],
)
def test_a_wrong_flag_is_one_line_that_says_how_to_mend_it(
    flags: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture
):
    """sbatch tells most of these after the queue."""
    with pytest.raises(SystemExit) as stop:
        main([*flags, "--dry_run", "--", "python", "x.py"])
    assert stop.value.code == 2 and complaint in capsys.readouterr().err


def test_a_job_without_a_command_or_with_one_that_has_no_processes_is_refused():
    """Four copies of one program that know nothing of each other write over each other's files."""
    with pytest.raises(ValueError, match="there is no command"):
        main(["--dry_run"])
    with pytest.raises(ValueError, match="4 processes run a Python script"):
        main(["--dry_run", "--gpus", "4", "--", "make", "demo"])


@pytest.mark.slow
def test_a_job_that_is_told_to_stop_keeps_a_checkpoint_and_goes_back_into_the_queue(tmp_path: Path, capsys):
    """Hours on a busy cluster end at its time limit with nothing, or a job that failed is started again for ever."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT * 8))
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    flags = (
        f"--data {tmp_path}/text.jsonl --tokenizer {tmp_path}/tokenizer --output_dir {tmp_path}/run --patch_size 4 "
        f"--latent_size 8 --hidden_size 16 --intermediate_size 16 --block_size 32 --cache_dir {tmp_path}/cache "
        "--max_steps 100000 --per_device_train_batch_size 1 --logging_steps 100000 --save_strategy no "
        "--report_to none --disable_tqdm true --use_cpu true --resume_from_checkpoint auto"
    ).split()
    command = [sys.executable, str(ROOT / "scripts" / "train_autoencoder.py"), *flags]
    job = dry(capsys, "--gpus", "0", "--requeue", "60", "--", *command)
    assert "#SBATCH --requeue\n" in job and "#SBATCH --signal=B:USR1@60\n" in job
    checked(job, tmp_path)
    # signals every process of the step, as SLURM does
    session = f"for pid in $(cat {tmp_path}/step); do kill -USR1 -- -$pid; done"
    tool(tmp_path / "bin", "scancel", f'echo "$*" >> {tmp_path}/calls; {session}')
    tool(tmp_path / "bin", "scontrol", f'echo "$*" >> {tmp_path}/calls')
    # as a step: a session of its own
    tool(tmp_path / "bin", "srun", f'setsid "$@" & echo $! > {tmp_path}/step; wait $!')
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    environment |= {"SLURM_SUBMIT_DIR": str(ROOT), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (tmp_path / "job").write_text(job)
    process = subprocess.Popen(
        ["bash", str(tmp_path / "job")], env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    time.sleep(1.0)
    process.send_signal(signal.SIGUSR1)  # long before the first step: it is repeated until it is heard
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors[-2000:]
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert "training was asked to stop (SIGUSR1)" in errors and checkpoint.name in errors
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "--signal=USR1 7" and calls[-1] == "requeue 7" and calls.count("requeue 7") == 1
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    # back from the queue, the same command goes on
    last = int(state["global_step"]) + 2
    done = subprocess.run(
        [*command, "--max_steps", str(last)], env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert log["global_step"] == last


@pytest.mark.parametrize(("body", "status"), [("exit 3", 3), ("exit 0", 0)])
def test_a_job_that_nobody_asked_to_stop_is_not_put_back(body, status, tmp_path: Path, capsys):
    """A wrong flag would otherwise run into the same error until somebody looks."""
    tool(tmp_path / "bin", "srun", '"$@"')
    tool(tmp_path / "bin", "scontrol", f"touch {tmp_path}/requeued")
    job = dry(capsys, "--requeue", "60", "--", "bash", "-c", body, "--resume_from_checkpoint", "auto")
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash"], input=job, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert not (tmp_path / "requeued").exists()


def test_a_job_that_would_begin_anew_each_time_is_refused():
    """It would train its first hours again and again."""
    with pytest.raises(ValueError, match="add --resume_from_checkpoint auto"):
        main(["--dry_run", "--requeue", "60", "--", "python", "scripts/train_student.py"])
