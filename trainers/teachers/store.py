"""Where a teacher's answers are kept: rows under content keys (`KDStore`), by default in one SQLite file.

A store never knows how an answer came about: [`CachedTeacher`] asks the teacher, a store keeps and finds rows. It
keeps answers only: a question that failed leaves nothing behind.
"""

import logging
import os
import sqlite3
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from .base import TeacherIdentity
from .store_rows import FORMAT_VERSION, StoredRow, decode_row, encode_row, row_checksum


logger = logging.getLogger(__name__)

DEFAULT_STORE = "cache/kd_cache.sqlite"
SQLITE_SUFFIXES = (".sqlite", ".sqlite3", ".db")
APPLICATION_ID = 0x4C464B44  # "LFKD", in the file's header


class StoreError(RuntimeError):
    """A store that cannot be used; the message says what to do."""


class StoreFull(StoreError):
    """No room left on the disk. What was stored before stays."""


class StoreBusy(StoreError):
    """Another process held the write lock for too long."""


@dataclass(frozen=True)
class Shape:
    """How an answer is cut.

    Attributes:
        num_exact: most likely ids.
        num_draws: draws from the others, see [`SparseSignal`].
        draw_seed: of the draws; 0 without.
    """

    num_exact: int
    num_draws: int = 0
    draw_seed: int = 0

    def __post_init__(self) -> None:
        if self.num_exact < 0 or self.num_draws < 0 or not self.num_exact + self.num_draws:
            raise ValueError(f"a row needs at least one entry, got {self.num_exact} exact and {self.num_draws} drawn")
        if self.draw_seed and not self.num_draws:
            raise ValueError(f"draw_seed is {self.draw_seed} but nothing is drawn: set num_draws, or leave it 0")

    def serves(self, asked: "Shape") -> bool:
        """Whether a row of this shape answers for another: a longer head for a shorter, draws only for the same."""
        return self == asked or (not asked.num_draws and self.num_exact >= asked.num_exact)


@dataclass(frozen=True)
class StoredTeacher:
    """Whose answers a store holds: what a training without that teacher must know about it."""

    identity: TeacherIdentity
    vocab_size: int
    num_tokens: int | None


class KDStore(ABC):
    """Rows under content keys.

    Attributes:
        name: for messages.
        writable: whether [`put`] works.
        num_corrupt: rows that were found damaged, and dropped, since it was opened.
    """

    name: str
    writable: bool
    num_corrupt: int = 0

    @abstractmethod
    def get(self, keys: Sequence[bytes], shape: Shape) -> dict[bytes, StoredRow]:
        """The rows that are there, cut to `shape`."""

    @abstractmethod
    def missing(self, keys: Sequence[bytes], shape: Shape) -> list[bytes]:
        """Those of `keys` that no row answers for, each once; looks at no row's content."""

    @abstractmethod
    def put(self, rows: Iterable[tuple[bytes, StoredRow]], teacher: StoredTeacher, draw_seed: int = 0) -> None:
        """Keep rows; when it returns they survive the death of this process. What is there already stays."""

    @abstractmethod
    def teachers(self) -> list[StoredTeacher]:
        """Whose answers it holds."""

    @abstractmethod
    def shapes(self, teacher: StoredTeacher) -> dict[Shape, int]:
        """How many rows of each shape."""

    @abstractmethod
    def sample(self, count: int, teacher: StoredTeacher, seed: int = 0) -> list[tuple[bytes, StoredRow]]:
        """At most `count` random rows of a teacher, as they are stored."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows."""

    @abstractmethod
    def close(self) -> None:
        """May be called twice."""

    def fit(self, row: StoredRow, shape: Shape) -> StoredRow:
        """`row`, which serves `shape`, cut to it."""
        same = row.num_draws == shape.num_draws and row.num_exact == shape.num_exact
        return row if same else row.head(shape.num_exact)


def open_store(name: str | Path, read_only: bool = False) -> KDStore:
    """A store by its name: a folder or Hub dataset of Parquet shards, else an SQLite file, which is made when missing.

    Raises:
        StoreError: nothing there that could be read.
    """
    from .store_parquet import ParquetStore

    path = Path(name).expanduser()
    if path.is_dir():
        return ParquetStore(path)
    if path.suffix in SQLITE_SUFFIXES or path.is_file():
        return SQLiteStore(path, read_only=read_only)
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        return ParquetStore(str(name))
    raise StoreError(
        f"{name} is no KD store: give an SQLite file ({', '.join(SQLITE_SUFFIXES)}), a folder of Parquet shards that "
        "build_kd_cache.py wrote, or the Hub dataset that it pushed."
    )


class SQLiteStore(KDStore):
    """One SQLite file: many processes read and write it at once, and the death of any of them loses nothing that
    [`put`] had returned from (kill -9 is survived; power loss may take the last commits, never the file).

    Local disks only: the write-ahead log needs memory that all its readers share. The connection is made where it is
    first used, and made anew after a fork, so a store can be handed to data-loader workers.

    Args:
        path: the file; its folder is made.
        read_only: never write, not even the lock files where the folder cannot be written.
        timeout: seconds to wait for another process's write.

    Raises:
        StoreError: no store of this version. [`StoreFull`] and [`StoreBusy`] from `put`.
    """

    def __init__(self, path: str | Path = DEFAULT_STORE, read_only: bool = False, timeout: float = 30.0):
        self.path = Path(path).expanduser()
        self.name = str(path)
        self.writable = not read_only
        self.timeout = timeout
        self.num_corrupt = 0
        self._open: tuple[int, sqlite3.Connection] | None = None
        self._closed = False
        self._teacher_ids: dict[StoredTeacher, int] = {}
        if self.path.is_dir():
            raise StoreError(f"{self.path} is a folder: give a file, as {self.path / Path(DEFAULT_STORE).name}.")
        if read_only and not self.path.is_file():
            raise StoreError(f"{self.path} is not there: build it with build_kd_cache.py.")
        if not _may_be_sqlite(self.path):
            raise StoreError(f"{self.path} is no SQLite file: choose another path. It was left as it is.")
        self._connection()

    def __getstate__(self) -> dict:
        # for data-loader workers that are spawned: a connection cannot travel
        return {**self.__dict__, "_open": None}

    # -- connection

    def _connection(self) -> sqlite3.Connection:
        if self._closed:
            raise StoreError(f"The store {self.name} is closed: open it again.")
        if self._open is not None:
            if self._open[0] == os.getpid():
                return self._open[1]
            # the parent's: closing it here, or letting it be collected, would drop the parent's locks
            _FOREIGN.append(self._open[1])
        with self._explained():
            connection = self._connect()
            try:
                self._prepare(connection)
            except BaseException:
                connection.close()
                raise
        self._open = (os.getpid(), connection)
        return connection

    def _connect(self) -> sqlite3.Connection:
        if self.writable:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            return self._raw(f"{self.path.resolve().as_uri()}?mode=rwc")
        # a reader of a write-ahead log writes its lock file; where it cannot, nobody else writes either
        alone = not os.access(self.path.parent, os.W_OK)
        return self._raw(f"{self.path.resolve().as_uri()}?mode=ro{'&immutable=1' if alone else ''}")

    def _raw(self, uri: str) -> sqlite3.Connection:
        return sqlite3.connect(
            uri, uri=True, timeout=self.timeout, isolation_level=None, check_same_thread=False, cached_statements=32
        )

    def _prepare(self, connection: sqlite3.Connection) -> None:
        empty = not _value(
            connection, "SELECT count(*) FROM sqlite_master"
        )  # first: another process may be creating it
        found = _value(connection, "PRAGMA application_id"), _value(connection, "PRAGMA user_version")
        if empty:
            if not self.writable:
                raise StoreError(f"{self.path} is empty: build it with build_kd_cache.py.")
            self._create(connection)
        elif found[0] != APPLICATION_ID:
            raise StoreError(f"{self.path} is an SQLite file of another program: choose another path.")
        elif found[1] != FORMAT_VERSION:
            raise StoreError(
                f"{self.path} is a KD store of format {found[1]}, this version reads {FORMAT_VERSION}: build it anew."
            )
        connection.execute("PRAGMA synchronous=NORMAL")
        if self.writable:
            # the log is folded into the file every 16 MB, not every 4: each time both are synced
            connection.execute("PRAGMA wal_autocheckpoint=4000")
        else:
            connection.execute(f"PRAGMA mmap_size={2**31 - 2**16}")  # SQLite's own limit; the rest is read as usual

    def _create(self, connection: sqlite3.Connection) -> None:
        deadline = time.monotonic() + self.timeout
        while True:  # two processes that create one file: switching to the log does not wait by itself
            try:
                mode = _value(connection, "PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        if mode != "wal":
            raise StoreError(f"{self.path} cannot have a write-ahead log: put the store on a local disk.")
        connection.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA:
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version={FORMAT_VERSION}")
        connection.execute("COMMIT")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            text = str(error)
            if "full" in text:
                raise StoreFull(
                    f"No room for {self.name} ({text}): free some space. What it holds stays readable."
                ) from error
            if "locked" in text or "busy" in text:
                raise StoreBusy(
                    f"Another process has been writing to {self.name} for more than {self.timeout:g} s: see who holds "
                    "it, or give each machine a store of its own."
                ) from error
            if "malformed" in text or "not a database" in text or "disk I/O" in text:
                raise StoreError(
                    f"{self.name} is damaged beyond single rows ({text}): move it away and build it anew."
                ) from error
            raise StoreError(f"{self.name}: {text}") from error

    # -- rows

    def get(self, keys: Sequence[bytes], shape: Shape) -> dict[bytes, StoredRow]:
        found: dict[bytes, StoredRow] = {}
        query, parameters = _serving(shape)
        wanted = query.format("id, checksum, data")
        with self._explained():
            cursor = self._connection().cursor()
            for key in dict.fromkeys(keys):
                # damaged rows are dropped, and the next that serves is taken
                # fetchall: a statement that is not run to its end would keep an old view of the file
                while hits := cursor.execute(wanted, (key, *parameters)).fetchall():
                    row = self._decode(key, *hits[0])
                    if row is not None:
                        found[key] = self.fit(row, shape)
                        break
                    if not self.writable:
                        break
        return found

    def _decode(self, key: bytes, number: int, checksum: int, data: bytes) -> StoredRow | None:
        if row_checksum(key, data) == checksum:
            try:
                return decode_row(data)
            except ValueError:
                pass
        self.num_corrupt += 1
        fate = "will be asked for again" if self.writable else "counts as missing: run build_kd_cache.py again"
        logger.warning("%s: row %d is damaged and %s.", self.name, number, fate)
        if self.writable:
            with self._transaction() as connection:
                connection.execute("DELETE FROM rows WHERE id = ?", (number,))
        return None

    def missing(self, keys: Sequence[bytes], shape: Shape) -> list[bytes]:
        # read whole: a damaged row is none, and would be found to be missing only when a training wants it
        return [key for key in dict.fromkeys(keys) if not self.get([key], shape)]

    def put(self, rows: Iterable[tuple[bytes, StoredRow]], teacher: StoredTeacher, draw_seed: int = 0) -> None:
        if not self.writable:
            raise StoreError(f"{self.name} was opened for reading only.")
        encoded = []
        for key, row in rows:  # before the transaction: others wait while it lasts
            data = encode_row(row)
            seed = draw_seed if row.num_draws else 0
            encoded.append(
                (key, row.num_exact, row.num_draws, seed, len(row.token_ids), row_checksum(key, data), data)
            )
        with self._transaction() as connection:
            number = self._teacher_number(connection, teacher)
            connection.executemany(
                "INSERT OR IGNORE INTO rows "
                "(key, num_exact, num_draws, draw_seed, num_tokens, checksum, data, teacher) "
                f"VALUES (?, ?, ?, ?, ?, ?, ?, {number})",
                encoded,
            )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._explained():
            connection = self._connection()
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # a full disk has rolled back already
                    connection.execute("ROLLBACK")
                self._teacher_ids.clear()
                raise

    # -- whose rows

    def _teacher_number(self, connection: sqlite3.Connection, teacher: StoredTeacher) -> int:
        if teacher not in self._teacher_ids:
            values = (*astuple(teacher.identity), teacher.vocab_size, teacher.num_tokens)
            connection.execute(
                "INSERT OR IGNORE INTO teachers (name, revision, numerics, tokenizer, vocab_size, num_tokens) "
                "VALUES (?, ?, ?, ?, ?, ?)",
                values,
            )
            where = "name = ? AND revision = ? AND numerics = ? AND tokenizer = ?"
            number = _value(connection, f"SELECT id FROM teachers WHERE {where}", values[:4])  # nosec B608 # names of columns, values are bound
            self._teacher_ids[teacher] = number
        return self._teacher_ids[teacher]

    def teachers(self) -> list[StoredTeacher]:
        query = "SELECT name, revision, numerics, tokenizer, vocab_size, num_tokens FROM teachers ORDER BY id"
        with self._explained():
            rows = self._connection().execute(query).fetchall()
        return [StoredTeacher(TeacherIdentity(*row[:4]), *row[4:]) for row in rows]

    def _number_of(self, teacher: StoredTeacher) -> int:
        where = "name = ? AND revision = ? AND numerics = ? AND tokenizer = ?"
        query = f"SELECT coalesce(max(id), 0) FROM teachers WHERE {where}"  # nosec B608 # as above
        return _value(self._connection(), query, astuple(teacher.identity))

    def shapes(self, teacher: StoredTeacher) -> dict[Shape, int]:
        query = (
            "SELECT num_exact, num_draws, draw_seed, count(*) FROM rows WHERE teacher = ? "
            "GROUP BY num_exact, num_draws, draw_seed"
        )
        with self._explained():
            rows = self._connection().execute(query, (self._number_of(teacher),)).fetchall()
        return {Shape(*row[:3]): row[3] for row in rows}

    def sample(self, count: int, teacher: StoredTeacher, seed: int = 0) -> list[tuple[bytes, StoredRow]]:
        with self._explained():
            connection = self._connection()
            query = "SELECT id FROM rows WHERE teacher = ? ORDER BY id"
            numbers = [row[0] for row in connection.execute(query, (self._number_of(teacher),))]
            chosen = np.random.default_rng(seed).permutation(len(numbers))[:count]
            sampled = []
            for place in sorted(chosen.tolist()):
                query = "SELECT key, id, checksum, data FROM rows WHERE id = ?"
                key, *rest = connection.execute(query, (numbers[place],)).fetchone()
                row = self._decode(key, *rest)
                if row is not None:
                    sampled.append((key, row))
        return sampled

    def __len__(self) -> int:
        with self._explained():
            return _value(self._connection(), "SELECT count(*) FROM rows")

    def check_integrity(self) -> str:
        """`ok`, or what SQLite itself finds wrong with the file."""
        with self._explained():
            return _value(self._connection(), "PRAGMA integrity_check")

    def close(self) -> None:
        if self._open is not None and self._open[0] == os.getpid():
            self._open[1].close()
        elif self._open is not None:
            _FOREIGN.append(self._open[1])
        self._open = None
        self._closed = True


def _may_be_sqlite(path: Path) -> bool:
    """Whether a file begins as SQLite's do; one that is missing or empty may become one. What begins otherwise is
    somebody's text, and no damaged store."""
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError:
        return True  # SQLite says what is wrong
    return start in (b"", b"SQLite format 3\0")


# connections of a parent process, kept from being collected in the child
_FOREIGN: list[sqlite3.Connection] = []

_SCHEMA = (
    """CREATE TABLE IF NOT EXISTS teachers (
        id INTEGER PRIMARY KEY,
        name TEXT NOT NULL, revision TEXT NOT NULL, numerics TEXT NOT NULL, tokenizer TEXT NOT NULL,
        vocab_size INTEGER NOT NULL, num_tokens INTEGER,
        UNIQUE (name, revision, numerics, tokenizer))""",
    """CREATE TABLE IF NOT EXISTS rows (
        id INTEGER PRIMARY KEY,
        key BLOB NOT NULL,
        num_exact INTEGER NOT NULL, num_draws INTEGER NOT NULL, draw_seed INTEGER NOT NULL,
        teacher INTEGER NOT NULL REFERENCES teachers (id),
        num_tokens INTEGER NOT NULL,
        checksum INTEGER NOT NULL,
        data BLOB NOT NULL,
        UNIQUE (key, num_exact, num_draws, draw_seed))""",
)


def _serving(shape: Shape) -> tuple[str, tuple[int, ...]]:
    """The query, with a place for its columns, for the smallest row that serves a shape, and what follows the key."""
    if shape.num_draws:
        where = "num_exact = ? AND num_draws = ? AND draw_seed = ?"
        return f"SELECT {{}} FROM rows WHERE key = ? AND {where}", astuple(shape)  # nosec B608 # as above
    where = "num_exact >= ? ORDER BY num_exact LIMIT 1"  # the index's own order: nothing is sorted
    return f"SELECT {{}} FROM rows WHERE key = ? AND {where}", (shape.num_exact,)  # nosec B608 # as above


def _value(connection: sqlite3.Connection, query: str, parameters: Sequence = ()):
    row = connection.execute(query, parameters).fetchone()
    return None if row is None else row[0]
