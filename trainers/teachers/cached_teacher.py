"""A teacher around a teacher: what is in the store is not asked for again.

B batch, T tokens, n tokens of one text (a row without its padding), k entries per position, V vocabulary.
"""

import logging
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ..losses.divergence import ABSENT_LOGPROB
from .base import (
    DenseSignal,
    SparseSignal,
    Teacher,
    TeacherCapabilities,
    TeacherIdentity,
    speaking_positions,
)
from .identity import identity_of, tokenizer_hash
from .sparse import row_seeds, to_sparse
from .store import KDStore, Shape, StoredTeacher, StoreError
from .store_rows import KeyMaker, StoredRow


logger = logging.getLogger(__name__)

DEFAULT_K = 20  # what servers give unless told otherwise
ABSENT = 10 * ABSENT_LOGPROB


@dataclass
class StoreStatistics:
    """What a store was worth, in rows.

    Attributes:
        found: answered by the store.
        asked: answered by the teacher.
        repeated: the same text again in one batch.
        corrupt: found damaged, dropped and asked for again.
        unanswered: the teacher left positions without any entry; not stored.
        unstored: could not be written, the disk being full or the store locked or read-only.
    """

    found: int = 0
    asked: int = 0
    repeated: int = 0
    corrupt: int = 0
    unanswered: int = 0
    unstored: int = 0

    def describe(self) -> str:
        total = self.found + self.asked + self.repeated
        share = (total - self.asked) / total if total else 0.0
        rest = {name: value for name, value in asdict(self).items() if value and name not in ("found", "asked")}
        more = "".join(f", {value} {name}" for name, value in rest.items())
        return f"{total} rows wanted, {share:.1%} without the teacher ({self.found} found, {self.asked} asked{more})"


class CachedTeacher:
    """Answers from a store; asks `teacher` about the rest, and stores what it says.

    A trainer cannot tell it from any sparse teacher. What is asked for now is rounded as what is stored is, so that a
    run gives the same losses whether the store was warm or cold.

    Args:
        teacher: asked about the rows that are missing; None: whose rows the store holds must be plain from the store
            (or `identity`), and a missing row is an error.
        store: see [`open_store`].
        k: entries per position, draws included; default, what the store holds where that is plain, else `DEFAULT_K`.
        num_draws: how many of them are draws, see [`SparseSignal`]; default, like `k`, else none.
        draw_seed: of the draws.
        mode: `score`.
        identity: of the teacher; default, `teacher`'s own.

    Attributes:
        statistics: see [`StoreStatistics`].

    Raises:
        ValueError: a teacher that cannot score given tokens, or whose identity is unknown.
        StoreError: without a teacher, a store that holds no answers or those of several teachers or shapes.
    """

    def __init__(
        self,
        teacher: Teacher | None,
        store: KDStore,
        k: int | None = None,
        num_draws: int | None = None,
        draw_seed: int = 0,
        mode: str = "score",
        identity: TeacherIdentity | None = None,
    ):
        self.teacher, self.store = teacher, store
        if teacher is not None:
            if not teacher.capabilities.scores_given_tokens:
                raise ValueError(
                    f"{type(teacher).__name__} only writes its own text: a store keeps what is said of given text."
                )
            self.stored = StoredTeacher(identity or identity_of(teacher), teacher.vocab_size, teacher.num_tokens)
            self.name: str = getattr(teacher, "name", self.stored.identity.name)
        else:
            self.stored = _only_teacher(store, identity)
            self.name = self.stored.identity.name
        self.identity = self.stored.identity
        self.vocab_size, self.num_tokens = self.stored.vocab_size, self.stored.num_tokens
        own = TeacherCapabilities() if teacher is None else teacher.capabilities
        self.capabilities = TeacherCapabilities(
            form="sparse", any_temperature=False, remote=own.remote, parallel_calls=own.parallel_calls
        )
        # the store is one connection, and a text that one thread asks about is not asked about by another
        self._changed = threading.Condition()
        self._asking: set[bytes] = set()
        self.shape = self._choose_shape(k, num_draws, draw_seed)
        self.statistics = StoreStatistics()
        self._key = KeyMaker(self.identity, mode)
        self._warned = False

    def _choose_shape(self, k: int | None, num_draws: int | None, draw_seed: int) -> Shape:
        if k is not None or self.teacher is not None:
            num_draws = num_draws or 0
            kept = self.store.shapes(self.stored) if self.teacher is None else ()
            most = max((shape.num_exact + shape.num_draws for shape in kept), default=0)
            if k is not None and 0 < most < k:
                raise StoreError(
                    f"{self.store.name} holds {most} entries a token, asked for {k}: pass `--kd_top_k {most}`, or "
                    "give a teacher."
                )
            k = min(DEFAULT_K if k is None else k, self.vocab_size)
            return Shape(k - num_draws, num_draws, draw_seed if num_draws else 0)
        shapes = self.store.shapes(self.stored)
        if num_draws is not None:
            shapes = {shape: count for shape, count in shapes.items() if shape.num_draws == num_draws}
            if not shapes:
                others = ", ".join(map(str, self.store.shapes(self.stored)))
                raise StoreError(
                    f"{self.store.name} holds no rows with {num_draws} draws, but {others}: drop `--kd_num_draws`, or "
                    "give a teacher."
                )
        if len(shapes) != 1:
            raise StoreError(
                f"{self.store.name} holds rows of {len(shapes)} shapes ({', '.join(map(str, shapes))}): say how many "
                "entries are wanted (`--kd_top_k`)."
            )
        return next(iter(shapes))

    # -- the protocol

    def signal(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SparseSignal:
        """`(B, T)` ids and mask -> [`SparseSignal`] of k entries.

        Raises:
            StoreError: without a teacher, rows that the store does not hold; says how many of the batch's.
        """
        ids = input_ids.detach().cpu().numpy()
        mask = np.ones(ids.shape, dtype=bool) if attention_mask is None else attention_mask.cpu().numpy() != 0
        texts = [row[seen] for row, seen in zip(ids, mask, strict=True)]
        # one token says nothing about another
        keys = [self._key(text) if len(text) > 1 else None for text in texts]
        wanted = [key for key in keys if key is not None]
        with self._changed:
            while True:
                rows = self._find(wanted)
                lacking: dict[bytes, int] = {}
                for place, key in enumerate(keys):
                    if key is not None and key not in rows:
                        lacking.setdefault(key, place)
                if self._asking.isdisjoint(lacking):
                    break
                self._changed.wait()
            self.statistics.found += len(rows)
            if self.teacher is not None:
                self._asking |= lacking.keys()
        if lacking:
            if self.teacher is None:
                raise StoreError(
                    f"{self.store.name} lacks {len(lacking)} of the {len(set(wanted))} rows of this batch, and there "
                    "is no teacher to ask: label the same data with build_kd_cache.py (same data flags, patch size "
                    "and data seed), or give a teacher."
                )
            try:
                rows |= self._ask(lacking, input_ids, attention_mask)
            finally:
                with self._changed:
                    self._asking -= lacking.keys()
                    self._changed.notify_all()
        self.statistics.repeated += len(wanted) - len(set(wanted))
        return self._assemble([None if key is None else rows[key] for key in keys], mask, input_ids.device)

    def _find(self, keys: Sequence[bytes]) -> dict[bytes, StoredRow]:
        damaged = self.store.num_corrupt
        rows = self.store.get(keys, self.shape)
        self.statistics.corrupt += self.store.num_corrupt - damaged
        return rows

    def _ask(
        self, lacking: dict[bytes, int], input_ids: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> dict[bytes, StoredRow]:
        assert self.teacher is not None
        keys, places = list(lacking), torch.tensor(list(lacking.values()), device=input_ids.device)
        mask = None if attention_mask is None else attention_mask[places]
        answers = score_rows(self.teacher, input_ids[places], mask, self.shape)
        rows = dict(zip(keys, answers, strict=True))
        whole = {key: row for key, row in rows.items() if is_whole(row)}
        with self._changed:
            self.statistics.asked += len(rows)
            self.statistics.unanswered += len(rows) - len(whole)
            self._keep(whole)
        return rows

    def _keep(self, rows: dict[bytes, StoredRow]) -> None:
        if not rows:
            return
        try:
            if self.store.writable:
                self.store.put(rows.items(), self.stored, self.shape.draw_seed)
                return
            problem = f"{self.store.name} is read-only"
        except StoreError as error:
            # the answer is here: training goes on, only the next run has to ask again
            problem = str(error)
        self.statistics.unstored += len(rows)
        if not self._warned:
            self._warned = True
            logger.warning("The teacher's answers are used but not kept: %s", problem)

    def _assemble(self, rows: list[StoredRow | None], mask: np.ndarray, device: torch.device) -> SparseSignal:
        k = self.shape.num_exact + self.shape.num_draws
        ids = np.zeros((*mask.shape, k), dtype=np.int32)
        logprobs = np.full((*mask.shape, k), ABSENT, dtype=np.float32)
        entropy = np.zeros(mask.shape, dtype=np.float32) if self.shape.num_draws else None
        for place, row in enumerate(rows):
            if row is None:
                continue
            seen = np.flatnonzero(mask[place])[:-1]
            ids[place, seen] = row.top_ids
            logprobs[place, seen] = row.logprobs()
            if entropy is not None and row.entropy is not None:
                entropy[place, seen] = row.entropy
        on_device = torch.from_numpy(mask).to(device)
        return SparseSignal(
            top_ids=torch.from_numpy(ids).to(device),
            top_logprobs=torch.from_numpy(logprobs).to(device),
            vocab_size=self.vocab_size,
            num_tokens=self.num_tokens,
            tokenizer_id=self.name,
            positions=None if mask.all() else speaking_positions(on_device),
            num_draws=self.shape.num_draws,
            entropy=None if entropy is None else torch.from_numpy(entropy).to(device),
        )

    def to(self, device: str | torch.device) -> "CachedTeacher":
        """Move the teacher."""
        if self.teacher is not None and hasattr(self.teacher, "to"):
            self.teacher.to(device)
        return self

    def check(self) -> None:
        """That the teacher works, where there is one, and that the store can be read."""
        if self.teacher is not None:
            self.teacher.check()
        self.store.shapes(self.stored)

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a student's tokenizer that reads text as other ids.

        Raises:
            ValueError: it is another one than the teacher's.
        """
        if self.teacher is not None and hasattr(self.teacher, "check_tokenizer"):
            self.teacher.check_tokenizer(tokenizer)
        elif tokenizer_hash(tokenizer) != self.identity.tokenizer:
            raise ValueError(
                f"The rows of {self.store.name} were made with another tokenizer than the codec's "
                f"({getattr(tokenizer, 'name_or_path', '') or 'unnamed'}, {len(tokenizer)} ids): train the codec with "
                f"the tokenizer of {self.name}."
            )

    def close(self) -> None:
        """Close teacher and store."""
        try:
            if self.teacher is not None:
                self.teacher.close()
        finally:
            self.store.close()


def _only_teacher(store: KDStore, identity: TeacherIdentity | None) -> StoredTeacher:
    teachers = [one for one in store.teachers() if identity is None or one.identity == identity]
    if len(teachers) == 1:
        return teachers[0]
    if not teachers:
        raise StoreError(f"{store.name} holds no rows{' of that teacher' if identity else ''}: give a teacher to ask.")
    names = ", ".join(
        f"{one.identity.name} ({one.identity.revision[:15]}, {one.identity.numerics})" for one in teachers
    )
    raise StoreError(f"{store.name} holds rows of {len(teachers)} teachers ({names}): give the teacher that is meant.")


# -- from a signal to rows


def score_rows(
    teacher: Teacher,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    shape: Shape,
) -> list[StoredRow]:
    """Ask a teacher about a batch `(B, T)` and take its answer apart: one row for each text, not yet stored.

    Autocast is off meanwhile: what a store keeps must not depend on the precision that some student trains in.

    Raises:
        ValueError: it gives fewer entries than asked for.
    """
    with torch.no_grad(), torch.autocast(input_ids.device.type, enabled=False):
        signal = teacher.signal(input_ids, attention_mask)
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    k, num_draws = shape.num_exact + shape.num_draws, shape.num_draws
    if isinstance(signal, SparseSignal):
        sparse = fewer_entries(signal, k, num_draws)
    elif not isinstance(signal, DenseSignal):
        raise ValueError(f"{type(signal).__name__} is neither dense nor sparse: nothing to store.")
    else:
        # a text's draws are its own, whatever the batch
        seeds = [
            row_seeds(row[seen][None], shape.draw_seed)[0]
            for row, seen in zip(input_ids.cpu(), mask.cpu(), strict=True)
        ]
        sparse = to_sparse(signal, k, num_draws, seed=seeds if num_draws else None)
    top_ids, top_logprobs = sparse.top_ids.cpu().numpy(), sparse.top_logprobs.float().cpu().numpy()
    entropy = None if sparse.entropy is None else sparse.entropy.float().cpu().numpy()
    ids, seen = input_ids.cpu().numpy(), mask.cpu().numpy()
    rows = []
    for place in range(len(ids)):
        speaks = np.flatnonzero(seen[place])
        rows.append(
            StoredRow.of(
                ids[place, speaks],
                top_ids[place, speaks[:-1]],
                top_logprobs[place, speaks[:-1]],
                entropy=None if entropy is None else entropy[place, speaks[:-1]],
                num_draws=shape.num_draws,
            )
        )
    return rows


def is_whole(row: StoredRow) -> bool:
    """Whether the teacher gave at least one entry at every position; only such rows are stored."""
    return bool((row.top_logprobs.max(-1, initial=-np.inf) > -1e3).all())


def fewer_entries(signal: SparseSignal, k: int, num_draws: int) -> SparseSignal:
    """A sparse signal as k entries a position.

    Raises:
        ValueError: it gives fewer, or not so many draws.
    """
    given = signal.top_ids.shape[-1]
    if (given, signal.num_draws) == (k, num_draws):
        return signal
    if num_draws or given - signal.num_draws < k:
        raise ValueError(
            f"The teacher gives {given} entries a token, {signal.num_draws} of them draws; asked for {k} with "
            f"{num_draws} draws. Lower k, or raise what the teacher gives."
        )
    return SparseSignal(
        signal.top_ids[..., :k],
        signal.top_logprobs[..., :k],
        vocab_size=signal.vocab_size,
        num_tokens=signal.num_tokens,
        tokenizer_id=signal.tokenizer_id,
        positions=signal.positions,
    )


# -- is it still true


@dataclass
class Verification:
    """What a second look at stored rows found.

    Attributes:
        rows: looked at.
        positions: in them.
        largest, mean: difference of log-probabilities, over the most likely ids that both looks name.
        other_ids: share of positions where the sets of ids differ.
        beyond: entries that differ by more than `tolerance` and the rounding of fp16.
        tolerance: nats.
    """

    rows: int
    positions: int
    largest: float
    mean: float
    other_ids: float
    beyond: int
    tolerance: float

    def describe(self) -> str:
        return (
            f"{self.rows} rows ({self.positions} positions) scored again: largest difference {self.largest:.2g} nats, "
            f"mean {self.mean:.2g}; other ids at {self.other_ids:.2%} of positions; {self.beyond} entries off by more "
            f"than rounding and {self.tolerance:g}"
        )


def verify_store(
    store: KDStore, teacher: Teacher, count: int = 16, seed: int = 0, tolerance: float = 1e-3
) -> Verification:
    """Score `count` random rows again and compare.

    Raises:
        StoreError: the store holds nothing of this teacher.
    """
    stored = StoredTeacher(identity_of(teacher), teacher.vocab_size, teacher.num_tokens)
    sample = store.sample(count, stored, seed)
    if not sample:
        raise StoreError(f"{store.name} holds no row of this teacher ({stored.identity}).")
    differences, other, positions, beyond = [], 0, 0, 0
    for _, row in sample:
        ids = torch.from_numpy(row.token_ids.astype(np.int64))[None]
        again = score_rows(teacher, ids, None, Shape(row.num_exact))[0]
        old = {name: getattr(row, name)[:, : row.num_exact] for name in ("top_ids", "top_logprobs")}
        same = old["top_ids"][:, :, None] == again.top_ids[:, None, :]  # (n - 1, k, k)
        first, second = old["top_logprobs"].astype(np.float64), again.top_logprobs.astype(np.float64)
        difference = np.abs(first[:, :, None] - second[:, None, :])[same]
        # two roundings, each by at most half of the last bit
        rounding = np.abs(np.spacing(old["top_logprobs"])).astype(np.float64)
        rounding = np.broadcast_to(rounding[:, :, None], same.shape)[same]
        differences.append(difference)
        beyond += int((difference > tolerance + 2 * rounding).sum())
        other += int((~same.any(-1).all(-1)).sum())
        positions += len(same)
    every = np.concatenate(differences)
    largest, mean = (float(every.max()), float(every.mean())) if len(every) else (float("inf"), float("inf"))
    return Verification(len(sample), positions, largest, mean, other / positions, beyond, tolerance)
