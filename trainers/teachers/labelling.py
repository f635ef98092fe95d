"""Label a data set once: every row's answer into a store, by one teacher or by many that come and go."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from .base import Teacher
from .cached_teacher import StoreStatistics, is_whole, score_rows
from .identity import identity_of
from .store import KDStore, Shape, StoredTeacher
from .store_parquet import ParquetFolder
from .store_rows import KeyMaker, StoredRow


logger = logging.getLogger(__name__)

Job = TypeVar("Job")
Answer = TypeVar("Answer")


@dataclass
class _Task(Generic[Job]):
    number: int
    job: Job
    failures: int = 0


class TeacherPool:
    """Hands work to several equal teachers, each in threads of its own. One that fails is left alone for a while,
    its work goes to the others, and it returns when its `check` passes. A context manager.

    Args:
        teachers: whose answers are the same; a local one is used by one thread only, see [`calls_at_once`].
        late: for each teacher that is away as yet, what builds it: raises ConnectionError while it stays away. It is
            compared with one of `teachers` and joins; one that differs, or cannot do what is asked, is left out
            for good.
        retry_after: seconds until a lost teacher is tried again; doubled each time, up to a minute.
        patience: seconds that all may be lost at once.
        max_failures: of one piece of work, whoever tried it, before it is taken for the cause.

    Raises:
        ValueError: no teacher.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        late: Sequence[Callable[[], Teacher]] = (),
        retry_after: float = 1.0,
        patience: float = 600.0,
        max_failures: int = 8,
    ):
        if not teachers:
            raise ValueError("no teacher: give at least one")
        self.teachers = list(teachers)
        self.retry_after, self.patience, self.max_failures = retry_after, patience, max_failures
        self.num_lost = 0  # how often a teacher dropped out
        self._run: _Run | None = None
        self._joining = threading.Lock()  # held while the set of teachers changes
        self._closed = threading.Event()
        for build in late:  # daemons: one that waits for a silent server must not hold up the end
            threading.Thread(target=self._await, args=(build,), name="labelling-late", daemon=True).start()

    def __enter__(self) -> "TeacherPool":
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    def close(self) -> None:
        """Wait for no late teacher any longer, and close all."""
        with self._joining:
            self._closed.set()
        for teacher in self.teachers:
            teacher.close()

    def _await(self, build: Callable[[], Teacher]) -> None:
        pause = self.retry_after
        while not self._closed.wait(pause):
            pause = min(2 * pause, 60.0)
            teacher = None
            try:
                teacher = build()
                self._check_equal(teacher)
            except Exception as error:
                if teacher is not None:
                    teacher.close()
                if isinstance(error, ConnectionError):
                    continue
                logger.warning("A teacher that was away has come and is left out: %s", error)
                return
            with self._joining:
                if self._closed.is_set():
                    teacher.close()
                    return
                self.teachers.append(teacher)
                if self._run is not None:
                    self._run.add(teacher)
            logger.warning("%r, which was away, takes part from now on.", teacher)
            return

    def _check_equal(self, late: Teacher) -> None:
        common_teacher([self.teachers[0], late])
        away: ConnectionError | None = None
        for teacher in list(self.teachers):  # whichever answers: the first may be lost meanwhile
            try:
                return check_equal_answers([teacher, late])
            except ConnectionError as error:
                away = error
        if away is not None:
            raise away

    def map(self, ask: Callable[[Teacher, Job], Answer], jobs: Iterable[Job]) -> Iterator[Answer]:
        """`ask(teacher, job)` for every job, in order; few are under way at a time.

        Raises:
            Exception: what the last teacher raised, when all were lost for too long, or one piece of work always
                fails. A single local teacher's exception at once: nothing would bring it back.
        """
        with _Run(self, ask) as run:
            with self._joining:
                for teacher in self.teachers:
                    run.add(teacher)
                self._run = run
            try:
                first = last = 0
                for job in jobs:
                    run.submit(_Task(last, job))
                    last += 1
                    while last - first >= 2 * len(run.threads):
                        yield run.answer(first)
                        first += 1
                while first < last:
                    yield run.answer(first)
                    first += 1
            finally:
                with self._joining:
                    self._run = None


def calls_at_once(teacher: Teacher) -> int:
    """Two of a remote teacher: while one batch's last rows are scored, and its answers read, the next one's are under
    way."""
    return min(2, teacher.capabilities.parallel_calls) if teacher.capabilities.remote else 1


class _Run:
    """The threads of one `map`."""

    def __init__(self, pool: TeacherPool, ask: Callable[[Any, Any], Any]):
        self.pool, self.ask = pool, ask
        self.waiting: deque[_Task] = deque()
        self.answers: dict[int, Any] = {}
        self.changed = threading.Condition()
        self.stopped = False
        self.error: Exception | None = None
        self.lost = 0  # teachers that are out just now
        self.threads: list[threading.Thread] = []

    def add(self, teacher: Teacher) -> None:
        """Let it take part."""
        for _ in range(calls_at_once(teacher)):
            thread = threading.Thread(target=self._work, args=(teacher,), name="labelling", daemon=True)
            with self.changed:
                self.threads.append(thread)
            thread.start()

    def __enter__(self) -> "_Run":
        return self

    def __exit__(self, *exception: Any) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()

    def submit(self, task: _Task) -> None:
        with self.changed:
            self.waiting.append(task)
            self.changed.notify_all()

    def answer(self, number: int) -> Any:
        with self.changed:
            while number not in self.answers:
                if self.error is not None:
                    raise self.error
                self.changed.wait()
            return self.answers.pop(number)

    def _work(self, teacher: Teacher) -> None:
        while (task := self._next()) is not None:
            try:
                answer = self.ask(teacher, task.job)
            except Exception as error:  # whatever a client raises when its server goes away
                if not self._drop_out(teacher, task, error):
                    return
                continue
            with self.changed:
                self.answers[task.number] = answer
                self.changed.notify_all()

    def _next(self) -> _Task | None:
        with self.changed:
            while not self.waiting and not self.stopped:
                self.changed.wait()
            return None if self.stopped else self.waiting.popleft()

    def _drop_out(self, teacher: Teacher, task: _Task, error: Exception) -> bool:
        """Give the work back and wait until the teacher answers again; False: it is over."""
        task.failures += 1
        with self.changed:
            if self._is_fatal(teacher, task, error):
                self.error = error
                self.changed.notify_all()
                return False
            self.waiting.appendleft(task)
            self.lost += 1
            self.pool.num_lost += 1
            self.changed.notify_all()
        logger.warning("A teacher dropped out (%s: %s); its work goes to the others.", type(error).__name__, error)
        pause, since = self.pool.retry_after, time.monotonic()
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.stopped, timeout=pause)
                if self.stopped:
                    return False
                if self.lost == len(self.threads) and time.monotonic() - since > self.pool.patience:
                    self.error = error
                    self.changed.notify_all()
                    return False
            try:
                teacher.check()
            except Exception as again:
                error = again
                pause = min(2 * pause, 60.0)
                continue
            with self.changed:
                self.lost -= 1
            logger.warning("The teacher is back.")
            return True

    def _is_fatal(self, teacher: Teacher, task: _Task, error: Exception) -> bool:
        # a lost server may come back; who answers wrongly will again, and nobody else is there to ask
        may_return = teacher.capabilities.remote and isinstance(error, ConnectionError)
        alone = len(self.pool.teachers) == 1 and not may_return
        return alone or task.failures >= self.pool.max_failures


@dataclass
class Text:
    """One row of a data set: its key and its tokens, padding taken out."""

    key: bytes
    token_ids: np.ndarray


def label(
    rows: Any,
    pool: TeacherPool,
    target: KDStore | ParquetFolder,
    shape: Shape,
    batch_size: int = 8,
    rows_per_shard: int = 8192,
    progress: Callable[[int], Any] = lambda count: None,
) -> StoreStatistics:
    """Ask about every row of a data set and keep the answers, shard by shard. What an earlier run has finished is not
    asked for again: in an SQLite store every row, in Parquet every whole shard.

    Args:
        rows: columns `input_ids` and `attention_mask`, as [`load_blocks`] gives; sliceable.
        pool: teachers of one identity.
        target: where the answers go.
        shape: how they are cut.
        batch_size: texts that a teacher is asked about at once; they are sorted by length, so that few are padded.
        rows_per_shard: of the data set; at 512 tokens and 20 entries 8192 rows are 250 MB.
        progress: is told how many rows are done.

    Raises:
        ValueError: teachers of several identities.
        StoreError: the target is full, busy or damaged.
    """
    teacher = common_teacher(pool.teachers)
    make_key = KeyMaker(teacher.identity)
    statistics = StoreStatistics()
    labelled: set[bytes] = set()  # in shards before: the same text may stand in two
    for shard, start in enumerate(range(0, len(rows), rows_per_shard)):
        part = rows[start : start + rows_per_shard]
        if isinstance(target, ParquetFolder) and target.has(shard):
            labelled |= target.keys(shard)
            statistics.found += len(part["input_ids"])
            progress(len(part["input_ids"]))
            continue
        texts: dict[bytes, Text] = {}
        for ids, mask in zip(part["input_ids"], part["attention_mask"], strict=True):
            token_ids = np.asarray(ids)[np.asarray(mask) != 0]
            if len(token_ids) > 1:
                key = make_key(token_ids)
                if key in texts or key in labelled:
                    statistics.repeated += 1
                else:
                    texts[key] = Text(key, token_ids)
        lacking = target.missing(list(texts), shape) if isinstance(target, KDStore) else list(texts)
        statistics.found += len(texts) - len(lacking)
        progress(len(part["input_ids"]) - len(lacking))
        _label_shard(
            [texts[key] for key in lacking], pool, target, shard, teacher, shape, batch_size, statistics, progress
        )
        if isinstance(target, ParquetFolder):
            labelled |= texts.keys()
    return statistics


def _label_shard(
    texts: list[Text],
    pool: TeacherPool,
    target: KDStore | ParquetFolder,
    shard: int,
    teacher: StoredTeacher,
    shape: Shape,
    batch_size: int,
    statistics: StoreStatistics,
    progress: Callable[[int], Any],
) -> None:
    texts = sorted(texts, key=lambda text: -len(text.token_ids))
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    kept: dict[bytes, StoredRow] = {}
    for batch, answers in zip(batches, pool.map(lambda one, batch: _ask(one, batch, shape), batches), strict=True):
        whole = {text.key: row for text, row in zip(batch, answers, strict=True) if is_whole(row)}
        statistics.asked += len(batch)
        statistics.unanswered += len(batch) - len(whole)
        if isinstance(target, KDStore):
            target.put(whole.items(), teacher, shape.draw_seed)
        else:
            kept |= whole
        progress(len(batch))
    if isinstance(target, ParquetFolder):
        target.write(shard, list(kept.items()))


def _ask(teacher: Teacher, texts: Sequence[Text], shape: Shape) -> list[StoredRow]:
    longest = max(len(text.token_ids) for text in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, text in enumerate(texts):
        ids[place, : len(text.token_ids)] = torch.from_numpy(text.token_ids.astype(np.int64))
        mask[place, : len(text.token_ids)] = 1
    return score_rows(teacher, ids, mask, shape)


def common_teacher(teachers: Sequence[Teacher]) -> StoredTeacher:
    """What equal teachers are.

    Raises:
        ValueError: they are not equal: their answers would share a store.
    """
    first, *others = [StoredTeacher(identity_of(one), one.vocab_size, one.num_tokens) for one in teachers]
    for other in others:
        if other != first:
            raise ValueError(f"The teachers of a pool must be one and the same, found {first} and {other}.")
    return first


# nats, of ids that both name: bf16 against fp32 differs by 0.1 at most (measured), other weights by far more
FAR = 0.3


def check_equal_answers(teachers: Sequence[Teacher]) -> None:
    """Ask all about one and the same text: what is declared of servers says nothing of the weights behind them.

    Raises:
        ValueError: two answer differently.
        TeacherUnavailable: one does not answer.
    """
    first, *others = teachers
    if not others:
        return
    ids = torch.randint(first.num_tokens or first.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
    shape = Shape(min(getattr(teacher, "k", 20) for teacher in teachers))
    (expected,) = score_rows(first, ids, None, shape)
    for other in others:
        (found,) = score_rows(other, ids, None, shape)
        same = expected.top_ids[:, :, None] == found.top_ids[:, None, :]  # (T - 1, k, k)
        differences = np.abs(expected.top_logprobs[:, :, None] - found.top_logprobs[:, None, :])[same]
        shared = float(same.any(-1).mean())
        median = float(np.median(differences)) if len(differences) else float("inf")
        if shared < 0.5 or median > FAR:
            raise ValueError(
                f"{first!r} and {other!r} answer differently: of their most likely ids {shared:.0%} are the same, and "
                f"log-probabilities differ by {median:.2g} nats. They serve different weights; their answers must not "
                "share a store."
            )


def copy_rows(
    rows: Iterable[tuple[bytes, StoredRow]],
    target: KDStore,
    teacher: StoredTeacher,
    shape: Shape,
    progress: Callable[[int], Any] = lambda count: None,
) -> int:
    """Rows of one store, a stream say, into another; returns how many."""
    count = 0
    rows = iter(rows)
    while batch := list(islice(rows, 64)):
        target.put(batch, teacher, shape.draw_seed)
        count += len(batch)
        progress(len(batch))
    return count
