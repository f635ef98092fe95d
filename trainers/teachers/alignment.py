"""A teacher with another tokenizer: where its tokens and the student's end at the same byte.

    text            T h e   c o d e c
    student         [The] [ co] [dec]
    teacher         [Th] [e] [ codec]
    chunks          [The] [ codec]          from each common end to the next

B batch, T the student's tokens, N chunks.

A student's row is text, or pieces of several documents with special tokens between them; it is cut anywhere, also in
the middle of a character. The teacher reads the bytes of that text by its own tokenizer, one sequence a row, its own
special tokens where a document begins and ends. Special tokens belong to no chunk, on either side: they are no text.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol, runtime_checkable

import torch

from ..losses.chunk_likelihood import chunk_logprobs
from .base import PROBES, ChunkSignal, TeacherCapabilities


@runtime_checkable
class ScoringTeacher(Protocol):
    """What [`AlignedTeacher`] needs: a tokenizer, and the likelihood of given tokens."""

    tokenizer: Any

    def target_logprobs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`(B, T)` ids and mask, padded on the right -> `(B, T)`: at t the log-probability of token t + 1 after the
        tokens up to t; the last column may hold anything finite."""
        ...


# -- bytes of tokens


@cache
def byte_of_character() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte: itself where it is a visible Latin-1 character, the next
    free one from U+0100 on otherwise."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


def token_bytes(tokenizer: Any) -> list[bytes | None]:
    """The bytes that each id stands for; None for special tokens and ids that mean nothing.

    Raises:
        ValueError: no byte-level BPE: the bytes of its tokens are not known for certain.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
    refusal = (
        f"The tokenizer {name} is not byte-level BPE (as of GPT-2, Llama 3, Qwen): the bytes of its tokens are not "
        "known for certain, so that texts cannot be aligned. Train the codec with the teacher's tokenizer instead."
    )
    if backend is None:
        raise ValueError(refusal)
    characters, added = byte_of_character(), backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, id_ in vocabulary.items():
        if id_ in added:
            table[id_] = None if added[id_].special else added[id_].content.encode()
        elif all(character in characters for character in token):
            table[id_] = bytes(characters[character] for character in token)
        else:
            raise ValueError(refusal)
    for id_ in tokenizer.all_special_ids:
        table[id_] = None
    return table


@dataclass
class TextReader:
    """Reads text as a teacher's tokenizer does, byte for byte.

    Normalisation is left out (Qwen's composes accents: other bytes than the text's), and text that looks like a
    special token is text.

    Args:
        tokenizer: a fast byte-level BPE tokenizer; it is not changed.

    Attributes:
        prefix: ids that it puts before a text.
        table: see [`token_bytes`].

    Raises:
        ValueError: it does not give the bytes of a text back.
    """

    tokenizer: Any
    prefix: list[int] = field(init=False)
    table: list[bytes | None] = field(init=False)

    def __post_init__(self) -> None:
        self.table = token_bytes(self.tokenizer)
        self.backend = copy.deepcopy(self.tokenizer.backend_tokenizer)
        self.backend.normalizer = None
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        for text in PROBES:
            if self.bytes_of(self.read(text)) != text.encode():
                raise ValueError(
                    f"The tokenizer {getattr(self.tokenizer, 'name_or_path', '') or 'of the teacher'} does not give "
                    f"the bytes of {text[:24]!r} back (it may add a space in front): texts cannot be aligned. Train "
                    "the codec with the teacher's tokenizer instead."
                )
        text = PROBES[0]
        whole = self.tokenizer(text)["input_ids"]
        alone = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        starts = [n for n in range(len(whole) - len(alone) + 1) if whole[n : n + len(alone)] == alone]
        self.prefix = list(whole[: starts[0]]) if starts else []

    def read(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def bytes_of(self, ids: Sequence[int]) -> bytes | None:
        """The text of `ids`; None if one of them is special."""
        pieces = [self.table[id_] for id_ in ids]
        return None if None in pieces else b"".join(pieces)  # type: ignore[arg-type]


# -- chunks


def valid_pieces(data: bytes) -> list[tuple[int, str]]:
    """Start and text of the pieces of `data` that are UTF-8: all of it but for characters that were cut."""
    pieces: list[tuple[int, str]] = []
    start = 0
    while start < len(data):
        try:
            pieces.append((start, data[start:].decode()))
            break
        except UnicodeDecodeError as error:
            if error.start:
                pieces.append((start, data[start : start + error.start].decode()))
            start += error.end
    return pieces


def common_spans(ours: Sequence[int], theirs: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Chunks between the places where a token ends on both sides.

    Args:
        ours, theirs: ascending ends of tokens, in bytes; the first is where the first token begins.

    Returns:
        (our first token, our last + 1, their first token, their last + 1) of each chunk; chunks follow each other
        without overlap, and tokens before the first or after the last common place are in none.
    """
    place = {end: n for n, end in enumerate(theirs)}
    common = [(n, place[end]) for n, end in enumerate(ours) if end in place]
    return [(a, c, b, d) for (a, b), (c, d) in zip(common, common[1:], strict=False)]


@dataclass
class AlignedRow:
    """One row of a batch on both sides.

    Attributes:
        teacher_ids: the teacher's reading.
        spans: (the columns of our tokens, the teacher's first token, its last + 1) of each chunk.
    """

    teacher_ids: list[int]
    spans: list[tuple[list[int], int, int]]


def align_row(
    ids: Sequence[int],
    mask: Sequence[int],
    table: Sequence[bytes | None],
    reader: TextReader,
    eos_token_id: int | None = None,
) -> AlignedRow:
    """Align a student's row with its teacher's reading of the same text.

    Tokens that nothing predicts are in no chunk: the first unmasked one of ours, and the teacher's first, unless its
    tokenizer puts one before it.

    Args:
        ids, mask: `(T,)`, the student's; masked tokens are not there.
        table: [`token_bytes`] of the student's tokenizer.
        reader: the teacher's.
        eos_token_id: of the student's tokenizer: where it stands, the teacher reads its own.
    """
    teacher_eos = reader.tokenizer.eos_token_id
    row = AlignedRow([], [])
    unpredicted = next((column for column, seen in enumerate(mask) if seen), None)
    segment: list[tuple[int, bytes]] = []

    def close() -> None:
        if not segment:
            return
        row.teacher_ids.extend(reader.prefix)
        ends = [0]
        for _, piece in segment:
            ends.append(ends[-1] + len(piece))
        for start, text in valid_pieces(b"".join(piece for _, piece in segment)):
            read = reader.read(text)
            first = len(row.teacher_ids)
            row.teacher_ids.extend(read)
            if reader.bytes_of(read) != text.encode():
                continue  # a text that its tokenizer does not read byte by byte teaches nothing
            theirs = [start]
            for id_ in read:
                theirs.append(theirs[-1] + len(reader.table[id_] or b""))
            for a, c, b, d in common_spans(ends, theirs):
                columns = [column for column, _ in segment[a:c]]
                if unpredicted not in columns and first + b > 0:
                    row.spans.append((columns, first + b, first + d))
        segment.clear()

    for column, (id_, seen) in enumerate(zip(ids, mask, strict=True)):
        if not seen:
            continue
        piece = table[id_] if id_ < len(table) else None
        if piece is not None:
            segment.append((column, piece))
            continue
        close()
        if id_ == eos_token_id and teacher_eos is not None:
            row.teacher_ids.append(teacher_eos)
    close()
    return row


# -- the teacher


class AlignedTeacher:
    """Makes a teacher with another tokenizer one of ours: its signals are the likelihoods of the chunks of text that
    both tokenizers have in common (arXiv 2503.20083).

    Both tokenizers must be byte-level BPE. Every text that a row holds is read by the teacher's own tokenizer, so any
    student's row will do; nothing is kept between batches.

    Args:
        teacher: gives the likelihood of given tokens and has a tokenizer, as [`HFTeacher`] does.
        tokenizer: the student's.
        vocab_size: columns of the student's logits; default, as many as its tokenizer has ids.

    Raises:
        ValueError: a teacher that cannot do that, or a tokenizer that is not byte-level BPE.
    """

    num_tokens = None

    def __init__(self, teacher: Any, tokenizer: Any, vocab_size: int | None = None):
        if not isinstance(teacher, ScoringTeacher) or teacher.tokenizer is None:
            lacks = (
                "has no tokenizer" if isinstance(teacher, ScoringTeacher) else "gives no likelihood of given tokens"
            )
            raise ValueError(
                f"{type(teacher).__name__} {lacks}, so it cannot be aligned: use a local teacher (HFTeacher) with its "
                "tokenizer."
            )
        self.teacher: Any = teacher
        self.tokenizer = tokenizer
        self.table = token_bytes(tokenizer)
        self.reader = TextReader(teacher.tokenizer)
        self.vocab_size = len(tokenizer) if vocab_size is None else vocab_size
        remote = teacher.capabilities.remote if hasattr(teacher, "capabilities") else False
        self.capabilities = TeacherCapabilities(form="chunks", any_temperature=False, remote=remote)

    @property
    def name(self) -> str | None:
        """The teacher's."""
        return getattr(self.teacher, "name", None)

    def to(self, device: str | torch.device) -> "AlignedTeacher":
        """Move the teacher."""
        if hasattr(self.teacher, "to"):
            self.teacher.to(device)
        return self

    @torch.no_grad()
    def signal(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> ChunkSignal:
        """`(B, T)` ids and mask -> [`ChunkSignal`]."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        eos_token_id = self.tokenizer.eos_token_id
        rows = [
            align_row(ids, seen, self.table, self.reader, eos_token_id)
            for ids, seen in zip(input_ids.tolist(), mask.tolist(), strict=True)
        ]
        chunks = torch.full(input_ids.shape, -1)
        length = max(2, *(len(row.teacher_ids) for row in rows))
        teacher_ids = torch.zeros(len(rows), length, dtype=torch.long)
        teacher_mask, teacher_chunks = torch.zeros_like(teacher_ids), torch.full_like(teacher_ids, -1)
        num_chunks = 0
        for n, row in enumerate(rows):
            teacher_ids[n, : len(row.teacher_ids)] = torch.tensor(row.teacher_ids, dtype=torch.long)
            teacher_mask[n, : max(1, len(row.teacher_ids))] = 1
            for columns, first, stop in row.spans:
                chunks[n, [column - 1 for column in columns]] = num_chunks
                teacher_chunks[n, first - 1 : stop - 1] = num_chunks
                num_chunks += 1
        logprobs = self.teacher.target_logprobs(teacher_ids, teacher_mask).cpu()
        return ChunkSignal(
            targets=torch.nn.functional.pad(input_ids[:, 1:], (0, 1)),
            chunks=chunks.to(input_ids.device),
            teacher_logprobs=chunk_logprobs(logprobs.flatten(), teacher_chunks.flatten(), num_chunks).to(
                input_ids.device
            ),
            vocab_size=self.vocab_size,
            tokenizer_id=getattr(self.reader.tokenizer, "name_or_path", "") or None,
        )

    def check(self) -> None:
        """The teacher's."""
        self.teacher.check()

    def close(self) -> None:
        """The teacher's."""
        self.teacher.close()
