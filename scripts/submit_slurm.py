"""Give a command to SLURM: fills scripts/slurm/job.sbatch, checks it, submits it.

    python scripts/submit_slurm.py --time 4:00:00 --account lab -- python scripts/train_wire.py --config my.yaml
    python scripts/submit_slurm.py --gpus 4 --nodes 2 --mem 200G --dry_run -- python scripts/train_wire.py ...
    python scripts/submit_slurm.py --time 1-00:00:00 --requeue 300 -- python scripts/train_student.py \\
        --config my.yaml --resume_from_checkpoint auto

What follows `--` is run on the node as it stands here: spaces, quotes and dollars reach the command unharmed. With
more than one GPU in all, `python script ...` becomes `accelerate launch`, one process a GPU. --dry_run prints the job
and submits nothing. Where there is an sbatch, it checks the job first (`sbatch --test-only`).

With --requeue a job whose time is nearly over gets SIGUSR1, keeps a checkpoint, ends, and is put back in the queue;
the same command then goes on from there, again and again until the training is done. Clusters that preempt jobs
send it too where they are configured so (`PreemptParameters=send_user_signal`), and so does
`scancel --signal=USR1 --batch JOB`.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


TEMPLATE = Path(__file__).resolve().parent / "slurm" / "job.sbatch"
# of sbatch's manual: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]
TIME = re.compile(r"\d+(:[0-5]?\d){0,2}|\d+-([01]?\d|2[0-3])(:[0-5]?\d){0,2}")
MEMORY = re.compile(r"\d+[KMGT]?")
NAME = re.compile(r"[\w.,@+-]+")  # what a line of #SBATCH holds without quotes
FILE = re.compile(r"[\w./%@+-]+")
# of the first of several nodes: it must not give up where it lists more than one, and two jobs there need two ports
RENDEZVOUS = """HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MAIN_ADDRESS="${HOSTS%%$'\\n'*}"
export MAIN_PORT=$((20000 + SLURM_JOB_ID % 20000))"""
# SLURM signals every process of a step: launchers ignore it, trainers take it up once they train, so it is repeated
REQUEUE = """ASKED=
trap 'ASKED=1' USR1
srun bash -c 'trap "" USR1; exec "$@"' job {command} &
STEP=$!
while kill -0 "$STEP" 2>/dev/null; do
    if [ -z "$ASKED" ]; then
        wait "$STEP" || true
    else
        scancel --signal=USR1 "$SLURM_JOB_ID" || true
        sleep 3
    fi
done
STATUS=0
wait "$STEP" || STATUS=$?
if [ -n "$ASKED" ] && [ "$STATUS" -eq 0 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$STATUS\""""


@dataclass
class SlurmArguments:
    """What the job needs."""

    time: str = field(default="1:00:00", metadata={"help": "At most: minutes, h:m:s, or days-hours:m:s."})
    gpus: int = field(default=1, metadata={"help": "Of each node; 0: none."})
    nodes: int = field(default=1, metadata={"help": "Machines."})
    cpus: int = field(default=8, metadata={"help": "Cores of each node."})
    mem: str = field(default="32G", metadata={"help": "Memory of each node, as 32G."})
    account: str | None = field(default=None, metadata={"help": "Who pays; default: the cluster's default."})
    partition: str | None = field(default=None, metadata={"help": "Which queue; default: the cluster's default."})
    job_name: str = field(default="latentforge", metadata={"help": "As squeue shows it."})
    output: str = field(default="slurm-%j.out", metadata={"help": "File of what the job prints; %j is its number."})
    requeue: int = field(
        default=0,
        metadata={
            "help": "Seconds before its end at which the job is told to keep a checkpoint, and then goes back into "
            "the queue; 0: it ends as it is. Take several times what a step and a checkpoint need."
        },
    )
    dry_run: bool = field(default=False, metadata={"help": "Print the job and submit nothing."})

    def __post_init__(self) -> None:
        for name, least in (("gpus", 0), ("nodes", 1), ("cpus", 1), ("requeue", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.nodes > 1 and not self.gpus:
            raise ValueError(f"nodes {self.nodes} without GPUs: accelerate starts one process on a CPU; ask for gpus")
        for name, pattern, example in (
            ("time", TIME, "90, 4:00:00 or 2-12:00:00"),
            ("mem", MEMORY, "32G"),
            ("account", NAME, "letters, digits and . , @ + - _"),
            ("partition", NAME, "letters, digits and . , @ + - _"),
            ("job_name", NAME, "letters, digits and . , @ + - _"),
            ("output", FILE, "logs/%j.out, without spaces"),
        ):
            value = getattr(self, name)
            if value is not None and not pattern.fullmatch(value):
                raise ValueError(f"{name} {value!r} is none that sbatch takes: write {example}")

    @property
    def processes(self) -> int:
        return self.nodes * max(1, self.gpus)


def launched(command: Sequence[str], arguments: SlurmArguments) -> tuple[str, list[str]]:
    """(lines that set the environment, the command in the shell's words) of a job.

    Raises:
        ValueError: a command that cannot be run by several processes.
    """
    if arguments.processes == 1:
        return "", [shlex.quote(word) for word in command]
    if len(command) < 2 or not re.fullmatch(r"python[\d.]*", Path(command[0]).name) or not command[1].endswith(".py"):
        raise ValueError(
            f"{arguments.processes} processes run a Python script: write `-- python script.py ...`, got "
            f"{shlex.join(command)!r}; or ask for one node and one GPU"
        )
    # the interpreter that was named, and not whatever `accelerate` is first on the path
    words = [shlex.quote(command[0]), "-m", "accelerate.commands.launch", "--multi_gpu"]
    words += ["--num_processes", str(arguments.processes), "--num_machines", str(arguments.nodes)]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # both are the script's to choose
    rest = [shlex.quote(word) for word in command[1:]]
    if arguments.nodes == 1:
        return "", [*words, "--main_process_port", "0", *rest]  # a free one
    # each node's own number is known on the node only
    words += ["--machine_rank", '"$SLURM_NODEID"', "--main_process_ip", '"$MAIN_ADDRESS"']
    words += ["--main_process_port", '"$MAIN_PORT"']
    return RENDEZVOUS, ["bash", "-c", shlex.quote(" ".join([*words, *rest]))]


def fill_template(arguments: SlurmArguments, command: Sequence[str]) -> str:
    """The job's script.

    Raises:
        ValueError: no command, or one that cannot be run by several processes.
    """
    if not command:
        raise ValueError("there is no command: write it after `--`, as in `-- python scripts/train_wire.py ...`")
    if arguments.requeue and not any(word.startswith("--resume_from_checkpoint") for word in command):
        raise ValueError(
            "a job that goes back into the queue would begin anew each time: add --resume_from_checkpoint auto to the "
            "command, or drop --requeue"
        )
    environment, words = launched(command, arguments)
    directives = [f"#SBATCH --gpus-per-node={arguments.gpus}"] if arguments.gpus else []
    for name in ("account", "partition"):
        if getattr(arguments, name) is not None:
            directives.append(f"#SBATCH --{name}={getattr(arguments, name)}")
    if arguments.requeue:
        # the file of a run is gone on with, too
        directives += [
            "#SBATCH --requeue",
            f"#SBATCH --signal=B:USR1@{arguments.requeue}",
            "#SBATCH --open-mode=append",
        ]
    values = {name: str(getattr(arguments, name)) for name in ("job_name", "time", "nodes", "cpus", "mem", "output")}
    values |= {"directives": "\n".join(directives), "environment": environment}
    values["run"] = (REQUEUE if arguments.requeue else "srun {command}").replace("{command}", " ".join(words))
    values["threads"] = str(max(1, arguments.cpus // max(1, arguments.gpus)))
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text(encoding="utf-8"))
    return re.sub(r"\n{2,}", "\n", text)


def main(argv: Sequence[str] | None = None) -> str:
    """Parse, fill, check, submit; returns the job's script."""
    from trainers.arguments import parse_arguments

    argv = list(sys.argv[1:] if argv is None else argv)
    place = argv.index("--") if "--" in argv else len(argv)
    (arguments,) = parse_arguments(SlurmArguments, argv=argv[:place], description=__doc__)
    job = fill_template(arguments, argv[place + 1 :])
    sbatch = shutil.which("sbatch")
    if sbatch:
        _sbatch(sbatch, job, "--test-only")
    if arguments.dry_run:
        print(job, end="")
        return job
    if not sbatch:
        raise ValueError("there is no sbatch on this machine: run this where SLURM is, or with --dry_run")
    print(_sbatch(sbatch, job))
    return job


def _sbatch(sbatch: str, job: str, *flags: str) -> str:
    done = subprocess.run([sbatch, *flags], input=job, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"sbatch refuses the job: {(done.stderr or done.stdout).strip()}")
    return done.stdout.strip()


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
