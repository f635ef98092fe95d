"""`CodecCache`: what the frozen codec says of each training block, kept in files of their content's name.

    FOLDER/<key of codec and numerics>/<first two digits>/<key of the row>      checksum, then a safetensors file
    FOLDER/<key of codec and numerics>/aside/                                   what is being written

A row is found by its ids and mask, so neither the order of the data nor the number of processes matters, and another
codec finds nothing. Files are written aside and renamed: processes and runs share a folder without locks, and one
that dies leaves no half file under a row's name. What is damaged is computed again. Nothing is written while the disk
is nearly full: checkpoints come first.
"""

import hashlib
import logging
import secrets
import shutil
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save


logger = logging.getLogger(__name__)

ASIDE = "aside"
ABANDONED = 24 * 3600.0  # seconds; writing a row takes far less than one
ROWS_BETWEEN_LOOKS = 64  # at the disk; of a megabyte each, which is much, they are well within the reserve
GIB = 2**30

Encoding = tuple[torch.Tensor, torch.Tensor]  # mean and log-std


def reserve(total: int) -> int:
    """Bytes of a disk of `total` that rows leave free: 5 %, at least 1 GiB, at most 50, which a checkpoint of three
    billion weights with its optimizer takes."""
    return min(max(GIB, total // 20), 50 * GIB)


class CodecCache:
    """Encodings of rows.

    Args:
        folder: made when missing.
        codec: names the codec and the numerics that it runs in; rows under another name are not seen.
        dtype: what encodings are computed in: what it holds exactly takes half the room.
        with_log_std: else only means are kept, and the log-stds that come back are zeros.

    Raises:
        ValueError: `folder` is a file, or cannot be made.
    """

    def __init__(self, folder: str | Path, codec: str, dtype: torch.dtype = torch.float32, with_log_std: bool = True):
        name = hashlib.sha256(f"{codec}\0{dtype}\0{with_log_std}".encode()).hexdigest()[:16]
        self.folder = Path(folder).expanduser() / name
        self.dtype, self.with_log_std = dtype, with_log_std
        self.num_found = self.num_missing = 0  # rows
        self._writes = True
        self._has_room, self._has_said = True, False
        self._rows_to_look = 0  # at the disk again
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"codec_cache {folder} cannot be used ({error}): name a folder to write to.") from error
        for part in Path(folder).expanduser().glob(f"*/{ASIDE}/*.part"):
            with suppress(OSError):  # somebody else's, or gone
                if time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink()

    def keys(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> list[str]:
        """One for each row of `(B, T)`; ids under a mask of 0 count, too."""
        rows = input_ids.cpu().to(torch.int64).contiguous().numpy()
        masks = (
            [b""] * len(rows) if attention_mask is None else [x.numpy().tobytes() for x in attention_mask.cpu() != 0]
        )
        return [
            hashlib.blake2b(row.tobytes() + mask, digest_size=16).hexdigest()
            for row, mask in zip(rows, masks, strict=True)
        ]

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key[2:]

    def get(self, keys: Sequence[str]) -> Encoding | None:
        """Mean and log-std `(B, N, D)` of these rows; None unless all are there."""
        found = [self._read(self._path(key)) for key in keys]
        encodings = [x for x in found if x is not None]
        self.num_found += len(encodings)
        self.num_missing += len(keys) - len(encodings)
        if len(encodings) < len(keys):
            return None
        means, log_stds = zip(*encodings, strict=True)
        return torch.stack(means), torch.stack(log_stds)

    def _read(self, path: Path) -> Encoding | None:
        try:
            data = path.read_bytes()
            if len(data) > 4 and zlib.crc32(data[4:]) == int.from_bytes(data[:4], "little"):
                tensors = load(data[4:])
                mean = tensors["mean"].float()
                log_std = tensors["log_std"].float() if self.with_log_std else torch.zeros(()).expand_as(mean)
                return mean, log_std
        except (OSError, SafetensorError, KeyError):
            pass
        return None

    def put(self, keys: Sequence[str], mean: torch.Tensor, log_std: torch.Tensor) -> None:
        """Keep rows, where the disk has room. Where that fails, one line says so, and nothing more is written."""
        for key, *row in zip(keys, mean.detach().cpu(), log_std.detach().cpu(), strict=True):
            if not self._writes:
                return
            if not self._look_for_room():
                continue
            path = self._path(key)
            body = save({"mean": self._smallest(row[0])} | self._log_std(row[1]))
            # a process's number is another's on another machine, or in another container
            part = self.folder / ASIDE / f"{key}.{secrets.token_hex(8)}.part"
            try:
                part.parent.mkdir(exist_ok=True)
                path.parent.mkdir(exist_ok=True)
                part.write_bytes(zlib.crc32(body).to_bytes(4, "little") + body)
                part.replace(path)
            except OSError as error:
                self._writes = False
                with suppress(OSError):  # as where the folder is somebody else's
                    part.unlink(missing_ok=True)
                logger.warning(
                    "codec_cache: %s. Rows that are not in %s yet are encoded at every step.", error, self.folder
                )

    def _look_for_room(self) -> bool:
        if self._rows_to_look == 0:
            self._rows_to_look = ROWS_BETWEEN_LOOKS
            with suppress(OSError):  # writing will say what is wrong
                disk = shutil.disk_usage(self.folder)
                self._has_room = disk.free >= reserve(disk.total)
                if not self._has_room and not self._has_said:
                    self._has_said = True
                    logger.warning(
                        "codec_cache: the disk of %s has %.1f GiB free, and the last %.1f are left to checkpoints: "
                        "rows that are not kept yet are encoded at every step. Make room there, or name a folder of "
                        "another disk.",
                        self.folder,
                        disk.free / GIB,
                        reserve(disk.total) / GIB,
                    )
        self._rows_to_look -= 1
        return self._has_room

    def _log_std(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"log_std": self._smallest(x)} if self.with_log_std else {}

    def _smallest(self, x: torch.Tensor) -> torch.Tensor:
        narrow = x.to(self.dtype)
        return narrow.contiguous() if torch.equal(narrow.to(x.dtype), x) else x.contiguous()
