"""Checkpoints that are whole or not there.

    output_dir/_saving/checkpoint-12/    while it is written; what begins with `_` is never pushed
    output_dir/checkpoint-12/            once all of its files, and SHA256SUMS of them, are on the disk

One that is to go is moved to the first place before it is removed. A run that dies while it saves or removes leaves
what no tool takes for a checkpoint. Whoever resumes compares every file with its sum, so that one that was cut or
changed later is not taken either. `sha256sum -c SHA256SUMS` does the same by hand.

Sums are no signature. A checkpoint in shares, which torch's `distributed.checkpoint` reads with pickle, is read under
[`numbers_only`].
"""

import errno
import hashlib
import logging
import os
import pickletools
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers.trainer_callback import TrainerState


logger = logging.getLogger(__name__)

SAVING = "_saving"
SUMS = "SHA256SUMS"
STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_LINE = re.compile(rb"([0-9a-f]{64})  ([^\n]+)\n")
_LAST = re.compile(rb"# ([0-9a-f]{64}) of the lines above\n")
# all that the metadata of torch's shares is made of (torch 2.13); a path's module is another from Python 3.13 on
_OF_SHARES = {
    *(
        f"torch.distributed.checkpoint.metadata {name}"
        for name in "Metadata MetadataIndex StorageMeta TensorStorageMetadata BytesStorageMetadata TensorProperties "
        "ChunkStorageMetadata _MEM_FORMAT_ENCODING".split()
    ),
    "torch.distributed.checkpoint.filesystem _StorageInfo",
    "torch.serialization _get_layout",
    "torch Size",
    *(f"torch {name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    *(f"{module} {kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")),
}
# what puts no more than a string, or an earlier one, onto the pickle's stack
_STRINGS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_NAMES_OTHERWISE = {"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID"}
_ONLY_WEIGHTS = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # read by torch.load


def seal(folder: Path) -> None:
    """Write the sums of all files in `folder`, and see that files and sums are on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS)
    lines = b"".join(f"{_sum(path)}  {path.relative_to(folder).as_posix()}\n".encode() for path in files)
    # a list that is cut behind a line would check less, and say nothing; sha256sum takes such a line for a comment
    last = f"# {hashlib.sha256(lines).hexdigest()} of the lines above\n".encode()
    (folder / SUMS).write_bytes(lines + last)
    for path in [*files, folder / SUMS, *{file.parent for file in files}, folder]:
        _sync(path)


def put_in_place(staged: Path, final: Path) -> None:
    """Rename a sealed checkpoint; what has its name already is removed after that."""
    old = staged.with_name(f"old-{final.name}")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)  # dying here leaves the staged one, which `last_checkpoint` finds by its sums
    staged.rename(final)
    _sync(final.parent)
    shutil.rmtree(staged.parent, ignore_errors=True)


def check_checkpoint(folder: str | Path) -> None:
    """See that a checkpoint is what was written.

    One without sums (of a version that wrote none) must have a readable `trainer_state.json`, which is written last.

    Raises:
        ValueError: no checkpoint, or a file that is missing, cut or changed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no checkpoint {folder}: pass a folder `checkpoint-<step>`, or true for the last.")
    if not (folder / SUMS).exists():
        try:
            TrainerState.load_from_json(str(folder / STATE))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"The checkpoint {folder} is not whole: it has no {SUMS}, and {STATE} cannot be read ({error}). "
                "Resume from an earlier one."
            ) from error
        return
    for name, expected in _sums_of(folder).items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"The checkpoint {folder} is not whole: {name} is missing. Resume from an earlier one.")
        if _sum(path) != expected:
            raise ValueError(
                f"The checkpoint {folder} is damaged: {name} is not what was written. Resume from an earlier one."
            )


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest whole checkpoint below `output_dir`, None where there is none; others are named in a warning."""
    root = Path(output_dir)
    found = [*_numbered(root), *((step, path) for step, path in _numbered(root / SAVING) if (path / SUMS).exists())]
    for _, path in sorted(found, key=lambda item: item[0], reverse=True):
        try:
            check_checkpoint(path)
        except ValueError as error:
            logger.warning("%s", error)
        else:
            return str(path)
    return None


@contextmanager
def numbers_only(folder: str | Path) -> Iterator[None]:
    """While a checkpoint in shares is read, nothing in it can run.

    torch reads `.metadata` with pickle: that is refused if it names anything but what torch writes there. Entries of
    the optimizer that are no tensors are read with `torch.load` and no limits: while this lasts, with
    `weights_only=True`.

    Raises:
        ValueError: there is more in it than numbers.
    """
    check_shares(folder)
    before = os.environ.get(_ONLY_WEIGHTS)
    os.environ[_ONLY_WEIGHTS] = "1"
    try:
        yield
    except CheckpointException as error:
        if "Weights only load failed" not in str(error):
            raise
        raise ValueError(f"The checkpoint {folder} is refused: a share holds more than numbers. {_ASK}") from error
    finally:
        if before is None:
            del os.environ[_ONLY_WEIGHTS]
        else:
            os.environ[_ONLY_WEIGHTS] = before


_ASK = "Take shares from nobody else; ask for the whole model."


def check_shares(folder: str | Path) -> None:
    """See that each `.metadata` of a checkpoint in shares names nothing but what torch writes there. Nothing of it is
    run for that.

    Raises:
        ValueError: it does, or is no pickle.
    """
    folder = Path(folder)
    inside = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    # torch takes one of a process, `__0.metadata`, where it cannot read the common one
    for path in sorted(file for place in inside for file in place.glob("*.metadata")):
        try:
            named = set(_globals_of(path.read_bytes()))
        except (ValueError, UnicodeError) as error:
            raise ValueError(f"The checkpoint {folder} is damaged: {path.name} cannot be read ({error}).") from error
        if named - _OF_SHARES:
            names = ", ".join(sorted(name.replace(" ", ".") for name in named - _OF_SHARES))
            raise ValueError(
                f"The checkpoint {folder} is refused: {path.relative_to(folder)} names {names}, which is no part of a "
                f"checkpoint and could run code. {_ASK}"
            )


def _globals_of(data: bytes) -> Iterator[str]:
    """`module name` of all that a pickle would import. Of names that are put together in another way than Python's
    own pickler does, `an unknown name`."""
    memo: dict[int, str | None] = {}
    pushed: list[str | None] = []  # on top of the stack: strings, or what they are not known to be
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _STRINGS:
            pushed.append(argument)
        elif name in _GETS:
            pushed.append(memo.get(int(argument)))
        elif name in _PUTS:
            memo[len(memo) if name == "MEMOIZE" else int(argument)] = pushed[-1] if pushed else None
        elif name in ("FRAME", "PROTO"):
            pass
        else:
            if name in ("GLOBAL", "INST"):
                yield argument
            elif name == "STACK_GLOBAL":
                known = [part for part in pushed[-2:] if part is not None]
                yield " ".join(known) if len(known) == 2 else "an unknown name"
            elif name in _NAMES_OTHERWISE:
                yield "an unknown name"
            pushed.clear()


def check_agreement(found: Sequence[str | None]) -> None:
    """See that all processes go on from the same checkpoint; `found` by each, None where it would begin anew.

    Raises:
        ValueError: they would train different steps, and wait for each other at the end for ever.
    """
    names = [None if path is None else Path(path).name for path in found]
    if len(set(names)) > 1:
        told = ", ".join(f"process {rank}: {name or 'none'}" for rank, name in enumerate(names))
        raise ValueError(
            f"The processes find different checkpoints ({told}): output_dir must be a folder that all machines share."
        )


def recover(output_dir: Path) -> None:
    """Give what was sealed by a run that died before its rename its name; only there is it safe from later saves."""
    for _, path in list(_numbered(output_dir / SAVING)):
        final = output_dir / path.name
        if (path / SUMS).exists() and not final.exists():
            with suppress(ValueError):
                check_checkpoint(path)
                path.rename(final)


def rotate(output_dir: Path, limit: int | None, best: str | None, newest: Path) -> None:
    """Remove checkpoints beyond `limit`; `newest`, just written, and the best stay.

    Those of later steps go first: another course of training left them, which was given up, or they are damaged. Then
    the oldest. One that is half removed has not its name any more; one that cannot be moved stays whole.
    """
    if not limit or limit < 1:
        return
    now = int(newest.name.rsplit("-", 1)[1])
    steps = [path for _, path in sorted(_numbered(output_dir), key=lambda item: (item[0] <= now, item[0]))]
    kept = {newest, *([Path(best)] if best is not None else [])} & set(steps)
    surplus = len(steps) - max(limit, len(kept))
    saving = output_dir / SAVING
    for path in [path for path in steps if path not in kept][: max(surplus, 0)]:
        with suppress(OSError):
            saving.mkdir(exist_ok=True)
            path.rename(saving / f"old-{path.name}")
    shutil.rmtree(saving, ignore_errors=True)


def is_write_error(error: BaseException) -> bool:
    """Whether a save failed at the disk, by what the writers raise: Python's, safetensors' and torch's own."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error) or "IoError" in str(error)
    return isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStream" in str(error))


def write_failed(error: BaseException, name: str, output_dir: Path) -> OSError:
    """What to say about it."""
    last = last_checkpoint(output_dir)
    rest = "There is no earlier checkpoint." if last is None else f"{Path(last).name} before it is whole."
    on = ": go on with --resume_from_checkpoint true" if last is not None else ""
    free = shutil.disk_usage(output_dir).free / 2**20
    return OSError(
        f"{name} could not be written to {output_dir}, where {free:.0f} MiB are free ({error}). {rest} Make room, or "
        f"keep fewer (--save_total_limit){on}."
    )


def _numbered(folder: Path) -> Iterator[tuple[int, Path]]:
    if folder.is_dir():
        for path in folder.iterdir():
            name = _NAME.fullmatch(path.name)
            if name is not None and path.is_dir():
                yield int(name[1]), path


def _sums_of(folder: Path) -> dict[str, str]:
    data = (folder / SUMS).read_bytes()
    start = data.rfind(b"# ")
    lines, last = data[: max(start, 0)], _LAST.fullmatch(data[max(start, 0) :])
    if last is None or last[1].decode() != hashlib.sha256(lines).hexdigest():
        raise ValueError(f"The checkpoint {folder} is damaged: {SUMS} is. Resume from an earlier one.")
    return {name.decode(): digest.decode() for digest, name in _LINE.findall(lines)}


def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
