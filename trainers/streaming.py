"""Blocks that are packed while training reads them, from a place that can be kept and found again.

    documents (a `datasets.IterableDataset`)     dealt out to processes and dataloader workers by `datasets`
      -> places      <pad> x phase | tokens | <eos>, one document after another
      -> windows     so many whole rows; a position is a document, places into it, and rows of the window
      -> rows        each with the position behind it

A position is made where the row is made, in a worker, and travels with it: batches that were read ahead and never
trained on do not count. Going on, a worker reads one document and one window again, whatever came before them.
"""

from __future__ import annotations

import copy
import json
import logging
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node


if TYPE_CHECKING:
    from .data import _Packing


logger = logging.getLogger(__name__)

POSITION_KEY = "stream_position"
DOCUMENTS_AT_ONCE = 32
ROWS_AT_ONCE = 16

Position = dict[str, Any]


class PackedStream(torch.utils.data.IterableDataset):
    """Rows of T = `packing.block_size` places, without end stored anywhere.

    Iterated in a dataloader worker, it gives that worker's share of this process's share of the documents. Each row is
    a dict of `input_ids`, `attention_mask`, `labels`, NumPy arrays (T,), and `stream_position`.

    Args:
        documents: rows with `text`, `index` (of the document in the corpus; None: counted here) and `kept` (False: it
            is held out; None: it is no document); anything that `datasets` streams and can go on in. Files of a Hub
            dataset are dealt out whole where their number is a multiple of that of the processes; else each process
            reads all, and takes its documents. A worker has whole files, or nothing where there are too few.
        packing: how tokens become rows.
        cut: a text in pieces, (piece, whether it is the last).
        tokenise: pieces -> ids of each.
        max_rows: of all processes and workers together.
        shuffle_rows: rows that are held back and given in random order; 1 keeps the order of the text.
    """

    def __init__(
        self,
        documents: datasets.IterableDataset,
        packing: _Packing,
        cut: Callable[[str], Iterator[tuple[str, bool]]],
        tokenise: Callable[[list[str]], list[np.ndarray]],
        max_rows: int | None = None,
        shuffle_rows: int = 1,
    ):
        self.documents, self.packing, self.cut, self.tokenise = documents, packing, cut, tokenise
        self.max_rows, self.shuffle_rows = max_rows, shuffle_rows
        self.rank, self.world_size = 0, 1
        self.passes = 0
        self.positions: dict[int, Position] = {}  # by worker

    def for_process(self, rank: int, world_size: int) -> PackedStream:
        """The share of one process of several, which all read for themselves."""
        share = copy.copy(self)
        share.documents = split_dataset_by_node(self.documents, rank=rank, world_size=world_size)
        share.rank, share.world_size, share.positions = rank, world_size, {}
        return share

    def next_pass(self) -> None:
        """The text from its beginning."""
        self.passes, self.positions = self.passes + 1, {}

    def empty_row(self) -> dict[str, np.ndarray]:
        """A row that asks for nothing, for a process that has no more while others have."""
        ids = np.full(self.packing.block_size, self.packing.eos_token_id, dtype=np.int32)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": np.full_like(ids, -100)}

    # -- kept and found again

    def save(self, path: Path, num_workers: int) -> None:
        """Write the positions of this process."""
        kept = {
            "world_size": self.world_size,
            "num_workers": num_workers,
            "passes": self.passes,
            "positions": self.positions,
        }
        path.write_text(json.dumps(kept), encoding="utf-8")

    def load(self, path: Path, num_workers: int) -> None:
        """Go on where [`save`] was.

        Raises:
            ValueError: no such file, or one of another number of processes or workers: their shares are others.
        """
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            found = (kept["world_size"], kept["num_workers"])
            positions, passes = {int(worker): place for worker, place in kept["positions"].items()}, kept["passes"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} does not say where the stream was ({type(error).__name__}: {error}): resume from another "
                "checkpoint, or read the text from its beginning with --ignore_data_skip true."
            ) from error
        if found != (self.world_size, num_workers):
            raise ValueError(
                f"The stream of {path.parent} was shared by {found[0]} processes with {found[1]} workers each, and "
                f"there are {self.world_size} with {num_workers}: start as many, or read the text from its beginning "
                "with --ignore_data_skip true."
            )
        self.positions, self.passes = positions, passes

    # -- reading

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        readers = min(num_workers, self.documents.num_shards)  # where files are too few, the other workers have none
        share, shares = self.rank * readers + worker, self.world_size * readers
        place = self.positions.get(worker)
        given = place["rows"] if place else 0
        wanted = None
        if self.max_rows is not None:
            wanted = self.max_rows // shares + (share < self.max_rows % shares) if worker < readers else 0
        for window in self._windows(place, share, shares):
            start, columns = window
            order = np.arange(len(columns["input_ids"]))
            if self.shuffle_rows > 1:
                order = np.random.default_rng([self.packing.seed, self.passes, share, start["window"]]).permutation(
                    order
                )
            for row in range(start["row"], len(order)):
                if wanted is not None and given >= wanted:
                    break
                given += 1
                position = {**start, "row": row + 1, "rows": given, "worker": worker}
                yield {name: values[order[row]] for name, values in columns.items()} | {POSITION_KEY: position}
            if wanted is not None and given >= wanted:
                break
        if info:
            self.next_pass()  # where workers live on, this object is theirs for the next pass too

    def _windows(
        self, place: Position | None, share: int, shares: int
    ) -> Iterator[tuple[Position, dict[str, np.ndarray]]]:
        """(position of its first row, columns (R, T)) of one window after another, R at least `shuffle_rows` but in
        the last one."""
        block_size = self.packing.block_size
        least = max(ROWS_AT_ONCE, self.shuffle_rows) * block_size
        number, row, drop = (place["window"], place["row"], place["drop"]) if place else (0, 0, 0)
        buffer: list[np.ndarray] = []
        size = 0
        marks: deque[tuple[int, Any, int]] = deque()  # (place at which a document begins, the source there, its count)

        def window(places: np.ndarray, following: int) -> tuple[Position, dict[str, np.ndarray]]:
            nonlocal number, row
            begin, state, count = marks[0]
            start = {"source": state, "documents": count, "drop": -begin, "window": number, "row": row}
            number, row = number + 1, 0
            # places are counted from the next window's first
            for index, (begin, *rest) in enumerate(marks):
                marks[index] = (begin - following, *rest)
            while len(marks) > 1 and marks[1][0] <= 0:
                marks.popleft()
            return start, self.packing.columns(places)

        for places, mark in self._places(place, share, shares):
            if mark is not None:
                marks.append((size - drop, *mark))
            places, drop = places[drop:], max(0, drop - len(places))
            buffer.append(places)
            size += len(places)
            if size >= least:
                whole = np.concatenate(buffer)
                full = size - size % block_size
                yield window(whole[:full], full)
                buffer, size = [whole[full:]], size - full
        if size:
            whole = np.concatenate(buffer)
            yield window(self.packing.filled(whole), size)

    def _places(
        self, place: Position | None, share: int, shares: int
    ) -> Iterator[tuple[np.ndarray, tuple[Any, int] | None]]:
        """Places of one piece after another; where a document begins, (the source before it, documents before it)."""
        pieces = self._pieces(place, share, shares)
        while batch := list(islice(pieces, DOCUMENTS_AT_ONCE)):
            texts, indices, lasts, marks = zip(*batch, strict=True)
            for tokens, index, last, mark in zip(self.tokenise(list(texts)), indices, lasts, marks, strict=True):
                yield self.packing.places(tokens, index, mark is not None, last), mark

    def _pieces(
        self, place: Position | None, share: int, shares: int
    ) -> Iterator[tuple[str, int, bool, tuple[Any, int] | None]]:
        documents = copy.copy(self.documents)  # where it goes on is remembered in the object
        if place and place["source"] is not None:
            documents.load_state_dict(place["source"])
        count = place["documents"] if place else 0
        before = None
        for row in documents:
            here = before if before is not None else (place["source"] if place else None)
            before = documents.state_dict()
            if row["kept"] is None:  # blank: no document
                continue
            if row["kept"]:
                index = row["index"] if row["index"] is not None else count * shares + share
                mark: tuple[Any, int] | None = (here, count)
                for text, last in self.cut(row["text"]):
                    yield text, index, last, mark
                    mark = None
            count += 1
