"""KD stores as shards of Parquet: what is exchanged, pushed to the Hub and streamed from it.

    folder/README.md              a dataset card, so that `datasets.load_dataset` finds the shards
    folder/manifest.json          whose answers, how they are cut, what was labelled, and the shards that are whole
    folder/data/train-00000.parquet ...

One line of a shard is one row, in columns that a viewer can show: `key` and `checksum`, `token_ids`, `top_ids` and
`top_logprobs` (flat, k numbers for each position), `tail` and, with draws, `entropy`; see `store_rows.py`. Sixty-four
rows are one row group; numbers are split into byte streams, then packed with zstd.

A shard is written under another name, synced, and renamed; the manifest names it after that. So what the manifest
names is whole, whatever was killed when, and labelling goes on behind it.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from .base import TeacherIdentity
from .store import KDStore, Shape, StoredTeacher, StoreError
from .store_rows import FORMAT_VERSION, StoredRow


logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
ROW_GROUP = 64
NUMBERS = ("token_ids", "top_ids", "top_logprobs", "tail", "entropy")
SCHEMA = pa.schema(
    [
        ("key", pa.binary()),
        ("checksum", pa.uint32()),
        ("token_ids", pa.list_(pa.uint32())),
        ("top_ids", pa.list_(pa.uint32())),
        ("top_logprobs", pa.list_(pa.float16())),
        ("tail", pa.list_(pa.float16())),
        ("entropy", pa.list_(pa.float16())),
    ]
)
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*.parquet
---
# Answers of a teacher, for distillation

Written by LatentForge's `build_kd_cache.py`; `manifest.json` says whose answers they are and how they are cut.
Train from it with `--kd_cache` and this repository's name.
"""


class ParquetFolder:
    """Writes shards; what an earlier run has written stays.

    Args:
        path: the folder; made when missing.
        teacher, shape: whose answers, and how they are cut.
        source: what is labelled, in words and numbers; shards of another source are not gone on with.

    Raises:
        StoreError: the folder holds something else.
    """

    def __init__(self, path: str | Path, teacher: StoredTeacher, shape: Shape, source: dict[str, Any]):
        self.path = Path(path).expanduser()
        settings = {
            "format": FORMAT_VERSION,
            "teacher": asdict(teacher),
            "shape": asdict(shape),
            "source": json.loads(json.dumps(source)),
        }
        self.manifest: dict[str, Any] = {**settings, "shards": {}}
        if (self.path / MANIFEST).exists():
            found = read_manifest(self.path / MANIFEST)
            for name, value in settings.items():
                if found.get(name) != value:
                    raise StoreError(
                        f"{self.path} holds shards of another {name} ({_differences(found.get(name), value)}): choose "
                        "another folder, or remove it."
                    )
            self.manifest = found
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise StoreError(f"{self.path} is not empty and no KD store: choose another folder.")
        elif self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{self.path} is a file, and Parquet shards need a folder: choose another place.")
        (self.path / "data").mkdir(parents=True, exist_ok=True)
        for leftover in (self.path / "data").glob("*.tmp"):
            leftover.unlink()

    def has(self, shard: int) -> bool:
        """Whether it is written, and whole: a file that was lost since is written again."""
        entry = self.manifest["shards"].get(_shard_name(shard))
        path = self.path / _shard_name(shard)
        return entry is not None and path.is_file() and path.stat().st_size == entry["bytes"]

    def keys(self, shard: int) -> set[bytes]:
        """Of the rows in a written shard.

        Raises:
            StoreError: the file is damaged.
        """
        path = self.path / _shard_name(shard)
        try:
            return set(pq.read_table(path, columns=["key"]).column("key").to_pylist())
        except (OSError, pa.ArrowException) as error:
            raise StoreError(f"{path} cannot be read ({error}): remove it, and it is labelled again.") from error

    def write(self, shard: int, rows: Sequence[tuple[bytes, StoredRow]]) -> None:
        """One whole shard; durable when it returns."""
        name = _shard_name(shard)
        path = self.path / name
        draft = path.with_suffix(".parquet.tmp")
        streams = {f"{column}.list.element": "BYTE_STREAM_SPLIT" for column in NUMBERS}
        pq.write_table(
            _table(rows),
            draft,
            row_group_size=ROW_GROUP,
            compression="zstd",
            compression_level=3,
            use_dictionary=False,
            column_encoding=streams,
            write_statistics=False,
        )
        _sync(draft)
        os.replace(draft, path)
        self.manifest["shards"][name] = {"rows": len(rows), "bytes": path.stat().st_size}
        for file, text in ((MANIFEST, json.dumps(self.manifest, indent=1) + "\n"), ("README.md", CARD)):
            draft = self.path / f"{file}.tmp"
            draft.write_text(text, encoding="utf-8")
            _sync(draft)
            os.replace(draft, self.path / file)
        for folder in (path.parent, self.path):
            _sync(folder)


class ParquetStore(KDStore):
    """Reads what [`ParquetFolder`] wrote, from a folder or from a dataset on the Hub.

    `datasets` unpacks the shards once into its cache, which is mapped into memory: about 125 bytes a token at 20
    entries, twice the shards' size. Rows are then found through an index over the keys (16 bytes a row in memory). A
    random row out of the shards themselves would cost the unpacking of its sixty-four neighbours; out of the map it
    costs about what SQLite costs. Where the disk has no room for that, copy into an SQLite store: `build_kd_cache.py
    --copy_from`, which streams.

    Args:
        name: folder, or Hub id.
        revision: of the Hub dataset.
        cache_dir: default, the cache folder of `datasets`.

    Raises:
        StoreError: no store of this version.
    """

    writable = False

    def __init__(self, name: str | Path, revision: str | None = None, cache_dir: str | None = None):
        self.name = str(name)
        self.num_corrupt = 0
        self._cache_dir = cache_dir
        path = Path(name).expanduser()
        if path.is_dir():
            manifest = path / MANIFEST
            self._where: dict[str, Any] = {"path": "parquet"}
            root = f"{path.resolve()}/"
        else:
            manifest, revision = _fetch_manifest(self.name, revision)
            self._where = {"path": self.name, "revision": revision}
            root = ""
        self.manifest = read_manifest(manifest)
        if not self.manifest["shards"]:
            raise StoreError(f"{self.name} has no finished shard: let build_kd_cache.py write one.")
        self._where["data_files"] = {"train": [root + shard for shard in sorted(self.manifest["shards"])]}
        stored = self.manifest["teacher"]
        self.teacher = StoredTeacher(**{**stored, "identity": TeacherIdentity(**stored["identity"])})
        self.shape = Shape(**self.manifest["shape"])
        self._data: Any = None
        self._index: tuple[np.ndarray, np.ndarray] | None = None

    def _rows(self) -> Any:
        if self._data is None:
            try:
                loaded = datasets.load_dataset(**self._where, split="train", cache_dir=self._cache_dir)
            except Exception as error:
                raise StoreError(f"The shards of {self.name} cannot be read: {error}") from error
            self._data = loaded.with_format("arrow")
        return self._data

    def _places(self, keys: Sequence[bytes]) -> dict[bytes, int]:
        if self._index is None:
            starts = [
                np.frombuffer(b"".join(key[:8] for key in table.column("key").to_pylist()), dtype="<u8")
                for table in self._rows().select_columns("key").iter(batch_size=4096)
            ]
            start = np.concatenate(starts)
            order = np.argsort(start, kind="stable")
            self._index = start[order], order
        start, order = self._index
        # eight of a hash's bytes: two keys that share them are not expected in the lifetime of a disk, and the row's
        # own key is looked at before it is used
        asked = np.frombuffer(b"".join(key[:8] for key in keys), dtype="<u8")
        place = np.searchsorted(start, asked).clip(max=len(start) - 1)
        return {key: int(order[p]) for key, p, same in zip(keys, place, start[place] == asked, strict=True) if same}

    def get(self, keys: Sequence[bytes], shape: Shape) -> dict[bytes, StoredRow]:
        found = {}
        if keys and self.shape.serves(shape):
            places = self._places(keys)
            numbers = sorted(places.values())
            for key, row in self._checked(self._rows()[numbers]) if numbers else ():
                if key in places:
                    found[key] = self.fit(row, shape)
        return found

    def missing(self, keys: Sequence[bytes], shape: Shape) -> list[bytes]:
        known = self._places(keys) if keys and self.shape.serves(shape) else {}
        return [key for key in dict.fromkeys(keys) if key not in known]

    def stream(self) -> Iterator[tuple[bytes, StoredRow]]:
        """Every row once, in order, without unpacking the shards to disk; damaged ones are left out and counted."""
        loaded = datasets.load_dataset(**self._where, split="train", streaming=True)
        for table in loaded.with_format("arrow").iter(batch_size=ROW_GROUP):
            yield from self._checked(table)

    def _checked(self, table: Any) -> Iterator[tuple[bytes, StoredRow]]:
        for key, checksum, row in _from_table(table, self.shape):
            if row is not None and row.content_checksum(key) == checksum:
                yield key, row
            else:
                self.num_corrupt += 1
                logger.warning("%s: the row %s is damaged and left out.", self.name, key.hex()[:16])

    def put(self, rows: Iterable[tuple[bytes, StoredRow]], teacher: StoredTeacher, draw_seed: int = 0) -> None:
        raise StoreError(f"{self.name} is a store of finished shards: add to it with build_kd_cache.py.")

    def teachers(self) -> list[StoredTeacher]:
        return [self.teacher]

    def shapes(self, teacher: StoredTeacher) -> dict[Shape, int]:
        return {self.shape: len(self)} if teacher == self.teacher else {}

    def sample(self, count: int, teacher: StoredTeacher, seed: int = 0) -> list[tuple[bytes, StoredRow]]:
        if teacher != self.teacher:
            return []
        chosen = np.random.default_rng(seed).permutation(len(self._rows()))[:count]
        return list(self._checked(self._rows()[sorted(chosen.tolist())])) if len(chosen) else []

    def __len__(self) -> int:
        return sum(shard["rows"] for shard in self.manifest["shards"].values())

    def close(self) -> None:
        self._data = self._index = None


def read_manifest(path: Path) -> dict[str, Any]:
    """Raises StoreError where it is none of ours, or of another version."""
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format"]
        if not isinstance(manifest["shards"], dict):
            raise TypeError("no shards")
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing: {path.parent} is no KD store of build_kd_cache.py.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} is no manifest of a KD store ({error}).") from error
    if version != FORMAT_VERSION:
        raise StoreError(f"{path} is of format {version}, this version reads {FORMAT_VERSION}: build it anew.")
    return manifest


def _fetch_manifest(repo_id: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import HfApi, hf_hub_download

    try:
        # one commit for manifest and shards, whatever is pushed in between
        commit = HfApi().dataset_info(repo_id, revision=revision).sha
        return Path(hf_hub_download(repo_id, MANIFEST, repo_type="dataset", revision=commit)), str(commit)
    except Exception as error:
        raise StoreError(f"{repo_id} is no KD store here or on the Hub: {type(error).__name__}: {error}") from error


def _differences(found: Any, now: Any, name: str = "") -> str:
    """What two settings differ in: `identity.revision was 1a2b, is now 3c4d`."""
    if isinstance(found, dict) and isinstance(now, dict):
        parts = [
            _differences(found.get(key), now.get(key), f"{name}.{key}".lstrip("."))
            for key in {**found, **now}
            if found.get(key) != now.get(key)
        ]
        return "; ".join(parts)
    return f"{name} was {found}, is now {now}".lstrip()


def _shard_name(shard: int) -> str:
    return f"data/train-{shard:05d}.parquet"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _table(rows: Sequence[tuple[bytes, StoredRow]]) -> pa.Table:
    columns: dict[str, Any] = {
        "key": pa.array([key for key, _ in rows], pa.binary()),
        "checksum": pa.array([row.content_checksum(key) for key, row in rows], pa.uint32()),
    }
    for name in NUMBERS:
        values = [getattr(row, name) for _, row in rows]
        kind = SCHEMA.field(name).type.value_type
        sizes = [0 if value is None else value.size for value in values]
        flat = [np.ascontiguousarray(value).reshape(-1) for value in values if value is not None and value.size]
        empty = np.zeros(0, dtype=kind.to_pandas_dtype())
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
        columns[name] = pa.ListArray.from_arrays(
            pa.array(offsets), pa.array(np.concatenate(flat) if flat else empty, kind)
        )
    return pa.table(columns, schema=SCHEMA)


def _from_table(table: pa.Table, shape: Shape) -> Iterator[tuple[bytes, int, StoredRow | None]]:
    keys, checksums = table.column("key").to_pylist(), table.column("checksum").to_pylist()
    numbers = {}
    for name in NUMBERS:
        column = table.column(name).combine_chunks()
        if isinstance(column, pa.ChunkedArray):  # no rows
            return
        numbers[name] = column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=False)
    k = shape.num_exact + shape.num_draws
    for place, key in enumerate(keys):
        values = {name: flat[offsets[place] : offsets[place + 1]] for name, (offsets, flat) in numbers.items()}
        positions = len(values["token_ids"]) - 1
        row = None
        if len(values["top_ids"]) == len(values["top_logprobs"]) == positions * k and len(values["tail"]) == positions:
            row = StoredRow(
                token_ids=values["token_ids"],
                top_ids=values["top_ids"].reshape(positions, k),
                top_logprobs=values["top_logprobs"].reshape(positions, k),
                tail=values["tail"],
                entropy=values["entropy"] if len(values["entropy"]) else None,
                num_draws=shape.num_draws,
            )
        yield key, checksums[place], row
