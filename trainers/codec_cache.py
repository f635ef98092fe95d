"""`CodecCache`: what the frozen codec says of each training block, kept in files of their content's name.

    FOLDER/<key of codec and numerics>/<first two digits>/<key of the row>      checksum, then a safetensors file

A row is found by its ids and mask, so neither the order of the data nor the number of processes matters, and another
codec finds nothing. Files are written aside and renamed: processes and runs share a folder without locks, and one
that dies leaves no half file under a row's name. What is damaged is computed again.
"""

import hashlib
import logging
import secrets
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save


logger = logging.getLogger(__name__)

Encoding = tuple[torch.Tensor, torch.Tensor]  # mean and log-std


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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"codec_cache {folder} cannot be used ({error}): name a folder to write to.") from error

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
        """Keep rows. Where that fails, the disk being full, one line says so, and nothing more is written."""
        for key, *row in zip(keys, mean.detach().cpu(), log_std.detach().cpu(), strict=True):
            if not self._writes:
                return
            path = self._path(key)
            body = save({"mean": self._smallest(row[0])} | self._log_std(row[1]))
            # a process's number is another's on another machine, or in another container
            part = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
            try:
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

    def _log_std(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"log_std": self._smallest(x)} if self.with_log_std else {}

    def _smallest(self, x: torch.Tensor) -> torch.Tensor:
        narrow = x.to(self.dtype)
        return narrow.contiguous() if torch.equal(narrow.to(x.dtype), x) else x.contiguous()
