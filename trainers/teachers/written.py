"""Sample mode: the teacher writes, and the student learns from its text.

A teacher that only writes ([`Writer`]) gives its distributions for its own tokens. They hold for a student that reads
exactly what the teacher had read: prompt and own words so far. So the text becomes the training data, and the
distributions a teacher of just that data ([`WrittenTeacher`]).

    prompts -> collect_texts(writer, prompts, file) -> [WrittenText] -> training_rows -> rows
                                                                     -> WrittenTeacher -> signal of those rows
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import torch


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from .base import SparseSignal, TeacherCapabilities
from .scored import ABSENT, ScoredRow, score_batch


IGNORE_INDEX = -100


@dataclass(frozen=True)
class WrittenText:
    """What a teacher wrote after a prompt, in the student's token ids.

    Attributes:
        prompt_ids: what stands before it, as the student will read it.
        ids: the teacher's tokens, N of them.
        top_ids, top_logprobs: `N x k`, what the teacher held likely at each; absent entries have a log-probability of
            -1e4.
        ended: the teacher ended by itself, and was not cut off.
    """

    prompt_ids: list[int]
    ids: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]
    ended: bool


class Writer(Protocol):
    """A teacher that writes."""

    name: str
    k: int
    num_tokens: int | None
    vocab_size: int
    capabilities: TeacherCapabilities

    def write(self, prompts: Iterable[list[int]]) -> Iterator[WrittenText]:
        """One text for each prompt, in their order."""
        ...

    def describe(self) -> dict[str, Any]:
        """All that the texts depend on beside the prompt; JSON, and no key in it."""
        ...

    def check(self) -> None: ...

    def close(self) -> None: ...


def collect_texts(
    writer: Writer,
    prompts: Sequence[list[int]],
    path: str | os.PathLike,
    say: Callable[[str], None] = lambda line: None,
) -> list[WrittenText]:
    """Have a text written for each prompt. What `path` holds already is not asked for again: texts are kept there as
    they come, so a broken collection goes on where it stopped. Of several processes, those of one training say, one
    asks and the others wait for its texts.

    Args:
        writer: asked for what is missing.
        prompts: token ids; equal ones get one text.
        path: JSON lines; the first says what the texts depend on.
        say: told of progress.

    Raises:
        ValueError: `path` holds another teacher's texts, or something else.
        TeacherUnavailable: the teacher stays away; what came is kept.
    """
    file = Path(path)
    header = {"written_by": writer.describe()}
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as out:
        _lock(out, say)
        kept = _read_texts(file, header)
        missing = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts)) if tuple(prompt) not in kept]
        if missing and not file.stat().st_size:
            out.write(_line(header))
        for number, (prompt, text) in enumerate(zip(missing, writer.write(missing), strict=True), 1):
            out.write(_line({"asked": prompt, **asdict(text)}))
            out.flush()  # each has cost time, and perhaps money
            kept[tuple(prompt)] = text
            if number % 100 == 0 or number == len(missing):
                say(f"{number} of {len(missing)} texts written by {writer.name}")
    return [kept[tuple(prompt)] for prompt in prompts]


def _lock(file: TextIO, say: Callable[[str], None]) -> None:
    """Until it is closed. A barrier of the processes would end after its time limit, and texts may take a day."""
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        say(f"{file.name}: another process has texts written, and this one waits for them")
        fcntl.flock(file, fcntl.LOCK_EX)


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _read_texts(file: Path, header: dict[str, Any]) -> dict[tuple[int, ...], WrittenText]:
    """What an earlier collection kept; half a line at the end, written while its process died, is cut off."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    first = lines[0] if lines else ""
    if not _line(header).startswith(first):
        found = _parsed(first)
        if found != header:  # somebody else's, and not ours to cut
            whose = found.get("written_by") if isinstance(found, dict) else None
            now = f"texts of {whose}, and now they would be of {header['written_by']}"
            raise ValueError(
                f"{file} holds {now if whose else 'no texts of a teacher'}: name another file, or move this one away."
            )
    texts = {}
    good = len(first.encode()) if first.endswith("\n") else 0
    for number, line in enumerate(lines[1:], 2):
        record: Any = _parsed(line) if line.endswith("\n") else None
        try:
            asked = tuple(record.pop("asked"))
            texts[asked] = WrittenText(**record)
        except (AttributeError, KeyError, TypeError):
            if number < len(lines):
                raise ValueError(
                    f"{file}, line {number} is no text of a teacher: take the line out, and only its prompt is asked "
                    "about again."
                ) from None
            break
        good += len(line.encode())
    os.truncate(file, good)
    return texts


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def training_rows(
    texts: Sequence[WrittenText], block_size: int, eos_token_id: int, pad_token_id: int
) -> list[dict[str, np.ndarray]]:
    """Rows of `block_size` tokens, one text each: prompt, text, an end where the teacher ended, padding. Labels are
    the teacher's tokens alone. Texts of which nothing fits are left out."""
    rows: list[dict[str, np.ndarray]] = []
    for text in texts:
        ids = [*text.prompt_ids, *text.ids, *([eos_token_id] if text.ended else [])][:block_size]
        if len(ids) <= len(text.prompt_ids) or not text.prompt_ids or not text.ids:
            continue
        padding = block_size - len(ids)
        labels = [IGNORE_INDEX] * len(text.prompt_ids) + ids[len(text.prompt_ids) :]
        rows.append(
            {
                "input_ids": np.array(ids + [pad_token_id] * padding, dtype=np.int32),
                "attention_mask": np.array([1] * len(ids) + [0] * padding, dtype=np.int8),
                "labels": np.array(labels + [IGNORE_INDEX] * padding, dtype=np.int32),
            }
        )
    return rows


class WrittenTeacher:
    """The distributions that came with written texts, as a teacher of exactly these.

    It scores given tokens only where they are its own; rows that it never saw get a signal without entries, which
    counts as no teacher (`kd_coverage`).

    Args:
        texts: from [`collect_texts`].
        writer: whose they are; it may be closed.
    """

    def __init__(self, texts: Sequence[WrittenText], writer: Writer):
        self.name, self.k = writer.name, writer.k
        self.vocab_size, self.num_tokens = writer.vocab_size, writer.num_tokens
        self.capabilities = TeacherCapabilities(form="sparse", any_temperature=False)
        self._texts = {tuple(text.prompt_ids): text for text in texts if text.ids}
        self._lengths = sorted({len(prompt) for prompt in self._texts}, reverse=True)

    def signal(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SparseSignal:
        return score_batch(input_ids, attention_mask, self.k, self._rows, self.vocab_size, num_tokens=self.num_tokens)

    def _rows(self, rows: Sequence[list[int]]) -> Iterator[ScoredRow]:
        for row in rows:
            ids = np.zeros((len(row) - 1, self.k), dtype=np.int64)
            logprobs = np.full((len(row) - 1, self.k), ABSENT)
            text = self._find(row)
            if text is not None:
                first = len(text.prompt_ids)
                count = min(len(text.ids), len(row) - first)  # a row may be cut at its block's end
                ids[first - 1 : first - 1 + count] = text.top_ids[:count]
                logprobs[first - 1 : first - 1 + count] = text.top_logprobs[:count]
            yield ids, logprobs

    def _find(self, row: list[int]) -> WrittenText | None:
        for length in self._lengths:
            text = self._texts.get(tuple(row[:length]))
            if text is not None:
                count = min(len(text.ids), len(row) - length)
                if count > 0 and row[length : length + count] == text.ids[:count]:
                    return text
        return None

    def check(self) -> None:
        """Refuse to teach nothing.

        Raises:
            ValueError: no text holds a token.
        """
        if not self._texts:
            raise ValueError(f"{self.name} has written nothing: no text holds a token.")

    def close(self) -> None:
        """Nothing is open."""
