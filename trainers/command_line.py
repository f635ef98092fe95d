"""What every script does with what a person typed: errors in words, names of models, folders to write to, devices."""

import difflib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn


DEBUG = "LATENTFORGE_DEBUG"
# a library's message may list every class that it knows
LONGEST_LINE = 1000


def run(main: Callable[[], Any], *errors: type[Exception], returns_status: bool = False) -> NoReturn:
    """Call a script's `main`, and end the process: with 0, or with what `main` returns if that is a status.

    A training that was asked to stop (SIGUSR1) ends it with 0: there is a checkpoint, and nothing to mend.

    What a person can mend ends it with 1 and `<script>: error: <message>` on standard error: ValueError, OSError
    (`TeacherUnavailable` is one), ImportError, `StoreError`, a configuration that its own checks refuse, and `errors`.
    Anything else is a fault of ours and keeps its traceback; LATENTFORGE_DEBUG=1 shows it for all.
    """
    try:
        returned = main()
        status = returned if returns_status else 0
    except Exception as error:
        if _was_stopped(error):
            sys.stderr.write(f"{Path(sys.argv[0]).name}: {error}.\n")
            error.end()  # type: ignore[attr-defined]
            sys.exit(0)
        if os.environ.get(DEBUG, "0") not in ("", "0") or not is_users(error, errors):
            raise
        message = describe(error)
        if DEBUG not in message:  # the log of a script that this one started says it already
            message += f"\n({DEBUG}=1 shows where in the code)"
        sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {message}\n")
        # the traceback is let go first: what its frames hold (workers, a process group) ends as after any return
        status = 1
    sys.exit(status)


def _was_stopped(error: Exception) -> bool:
    preemption = sys.modules.get("trainers.preemption")  # scripts that train have imported it
    return preemption is not None and isinstance(error, preemption.TrainingStopped)


def is_users(error: BaseException, errors: tuple[type[Exception], ...] = ()) -> bool:
    """Whether a person can mend what an error tells of; see [`run`]."""
    from huggingface_hub.errors import StrictDataclassError

    from .teachers.store import StoreError

    if isinstance(error, StrictDataclassError):
        return isinstance(error.__cause__, (ValueError, TypeError))
    return isinstance(error, (ValueError, OSError, ImportError, StoreError, *errors))


def describe(error: BaseException) -> str:
    """The message of an error as one paragraph."""
    from huggingface_hub.errors import StrictDataclassError

    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # around it stands only which validator found it
    message = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.strerror}: {error.filename}"
    lines = [line.rstrip() for line in message.splitlines() if line.strip()] or [type(error).__name__]
    return "\n".join(line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]} ..." for line in lines)


def model_path(name: str, value: str, trust_remote_code: bool | None = None) -> str:
    """A folder with its `~` replaced, or a Hub id as it is.

    Args:
        name: of the flag.
        value: what was given.
        trust_remote_code: of a script that reads models with code of their own; False takes folders with a model only.

    Raises:
        ValueError: `value` reads like a path and there is no such folder, or no model in it where there must be one.
    """
    path = Path(os.path.expanduser(value))
    if path.is_dir():
        if trust_remote_code is not None and not (path / "config.json").exists():
            raise ValueError(f"{name}: {value} holds no model: there is no config.json")
        return str(path) if value.startswith("~") else value
    if not _looks_like_path(value) and trust_remote_code is not False:
        return value
    message = f"{name}: " + (f"{value} is a file, no folder" if path.is_file() else f"there is no folder {value}")
    message += _similar(path)
    if trust_remote_code is not None:
        message += ". Train a model with `make demo` or `make train-student`"
    if trust_remote_code is False:
        message += "; for a Hub id add --trust_remote_code, which runs the code of that repository"
    raise ValueError(f"{message}.")


def _looks_like_path(value: str) -> bool:
    # an id on the Hub is `name` or `owner/name`
    if value.startswith(("/", "./", "../", "~")) or value in (".", "..") or value.strip("/").count("/") > 1:
        return True
    return "/" in value and Path(value).parent.is_dir()


def _similar(path: Path) -> str:
    try:
        folders = [entry.name for entry in path.parent.iterdir() if entry.is_dir()]
    except OSError:
        return ""
    matches = difflib.get_close_matches(path.name, folders, n=2)
    return f" (did you mean {' or '.join(str(path.parent / match) for match in matches)}?)" if matches else ""


def check_writable(output_dir: str | Path) -> None:
    """Make a folder, and see that it can be written to: before hours of work whose result would go there.

    Raises:
        OSError: it cannot.
    """
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        raise OSError(f"cannot write to the output_dir {output_dir} ({reason}): pass another --output_dir.") from error


def choose_device(device: str | None) -> str:
    """`device`, or where that is None cuda where there is one, else cpu.

    Raises:
        ValueError: torch knows no such device, or does not see it here.
    """
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return "cuda" if seen else "cpu"
    try:
        asked = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device {device}: torch knows no such device: cpu, cuda or cuda:1, say.") from None
    if asked.type == "cuda" and not seen:
        raise ValueError(f"--device {device}: torch sees no GPU here: drop --device, or install torch for CUDA.")
    if asked.type == "cuda" and (asked.index or 0) >= seen:
        raise ValueError(f"--device {device}: torch sees {seen} GPUs here, the last is cuda:{seen - 1}.")
    return device


def check_writes_text(name: str, path: str, **options: Any) -> None:
    """See that a model is no codec.

    Args:
        name: of the flag.
        path: folder or Hub id.
        options: for `AutoConfig.from_pretrained`.

    Raises:
        ValueError: it is one.
    """
    from transformers import AutoConfig

    import modeling_latentforge  # noqa: F401  (registers our models with the Auto classes)

    if AutoConfig.from_pretrained(path, **options).model_type == "latentforge_autoencoder":
        raise ValueError(
            f"{name}: {path} is a codec, which turns patches of tokens into latents and back and writes no text: pass "
            "the student that was trained around it, as runs/demo/student."
        )


def say(line: str) -> None:
    """A line of progress: with the time, on standard error."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")


def progress_bar(items: Iterable[Any], name: str) -> Iterable[Any]:
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(items, desc=name, leave=False, mininterval=1.0)
