"""From text to blocks of whole patches.

    corpus (text file | folder | .jsonl | Hub id | builtin:python)
      -> documents        read once, split into train and held-out
      -> tokens           int32, cached by text and tokenizer
      -> blocks           rows of `block_size` places, cached by tokens, block_size, patch_size and seed

    one document in a row:   <pad> x phase | its tokens | <eos>        phase = 0 .. patch_size - 1
    input_ids                pad id          ids          eos
    attention_mask           0               1            1
    labels                   -100            ids          eos

Documents follow each other without regard to the block borders. The phase, drawn per document from the data seed,
moves every text against the patch grid, so that a model meets its words at every place of a patch. Shapes: T =
block_size places a row.
"""

import hashlib
import json
import logging
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import torch
from accelerate import PartialState
from datasets import Dataset, IterableDataset
from datasets.exceptions import DatasetGenerationError
from transformers import PreTrainedTokenizerBase

from .streaming import POSITION_KEY, PackedStream


logger = logging.getLogger(__name__)

BUILTIN_CORPORA = ("builtin:python",)
DOCUMENT_SEPARATOR = "<|endoftext|>"
FOLDER_SUFFIXES = (".txt", ".md", ".py", ".jsonl")
# Text around the text: read as it is, a model would learn braces and commas.
RECORD_SUFFIXES = (".json", ".csv", ".tsv", ".arrow", ".xml")
# Part of every cache key: raise it when the same input gives other pieces, tokens or blocks than before.
FORMAT_VERSION = 2
IGNORE_INDEX = -100
MIN_DOCUMENTS_TO_SPLIT = 20
PIECE_CHARACTERS = 2**18
STREAMING_EVAL_TOKENS = 2**18


@dataclass
class DataArguments:
    """Which text, and how it is cut into blocks."""

    data: str = field(
        default="builtin:python",
        metadata={
            "help": "Training text: a text file (lines that read <|endoftext|> part documents), a folder (its .txt, "
            ".md, .py and .jsonl files, or its .parquet files), a .jsonl or .parquet file, a Hub dataset id, or "
            "builtin:python (the standard library)."
        },
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Held-out text, same forms. Default: a held-out part of `data`."}
    )
    split: str = field(default="train", metadata={"help": "Split of a Hub dataset."})
    eval_split: str | None = field(
        default=None, metadata={"help": "Split of the Hub dataset that serves as held-out text."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of a Hub dataset."})
    text_field: str = field(default="text", metadata={"help": "Field that holds the text (JSONL, Hub)."})
    eval_fraction: float = field(
        default=0.05, metadata={"help": "Held-out share of `data` when neither eval_data nor eval_split is given."}
    )
    block_size: int = field(default=2048, metadata={"help": "Tokens in a row, a multiple of the patch size."})
    max_train_tokens: int | None = field(
        default=None, metadata={"help": "Keep the first so many training tokens (whole blocks)."}
    )
    max_eval_tokens: int | None = field(
        default=None, metadata={"help": "Keep the first so many held-out tokens (whole blocks)."}
    )
    num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenise. Default: one, threaded."})
    cache_dir: str | None = field(default=None, metadata={"help": "Default: the cache folder of `datasets`."})
    streaming: bool = field(
        default=False, metadata={"help": "Tokenise and pack while training, nothing is stored; needs --max_steps."}
    )
    streaming_shards: int = field(
        default=1,
        metadata={
            "help": "Shares a stream of text or JSONL files is dealt out in: processes x dataloader workers. A Hub "
            "dataset and Parquet have their files."
        },
    )
    shuffle_buffer_size: int = field(
        default=0,
        metadata={"help": "Blocks of a stream that are held back and shuffled together; 0 keeps the text's order."},
    )

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise ValueError(f"block_size must be >= 1, got {self.block_size}")
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must lie between 0 and 1, got {self.eval_fraction}")
        if self.streaming_shards < 1:
            raise ValueError(f"streaming_shards must be >= 1, got {self.streaming_shards}")
        if self.shuffle_buffer_size < 0:
            raise ValueError(f"shuffle_buffer_size must be >= 0, got {self.shuffle_buffer_size}")
        for name in ("max_train_tokens", "max_eval_tokens"):
            value = getattr(self, name)
            if value is not None and value < self.block_size:
                raise ValueError(
                    f"{name} ({value}) must hold at least one block: raise it or lower block_size ({self.block_size})"
                )


def load_texts(data_args: DataArguments) -> tuple[Dataset, Dataset]:
    """Read the corpus and split it, without a tokenizer.

    Returns:
        (train, held-out), each with the columns `text` (str, at most `PIECE_CHARACTERS` characters), `document` (int,
        the document's index in the corpus) and `last` (bool: the piece ends its document). The pieces of a document
        follow each other and concatenate to it.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: empty corpus, a broken JSONL line (named by file and line number), nothing left to hold out.
    """
    if data_args.streaming:
        raise ValueError("load_texts reads a corpus whole and cannot stream: drop --streaming")
    with _local_main_process_first():
        train, evaluation, _ = _read_texts(data_args)
    return train, evaluation


def load_blocks(
    data_args: DataArguments, tokenizer: PreTrainedTokenizerBase, patch_size: int, seed: int
) -> tuple[Dataset | PackedStream, Dataset]:
    """Tokenise and pack a corpus. The same arguments give the same blocks, whatever model they are for: a token LM
    that is to be compared with a student loads its blocks with the student's `patch_size`.

    Held-out text, when neither `eval_data` nor `eval_split` is given: with 20 documents or more those whose key's hash
    falls into `eval_fraction` (key: the path of a file that is one document, the text itself otherwise, so that copies
    of a text stay on one side; the choice never changes with order, seed or tokenizer), otherwise the last
    `eval_fraction` of the text.

    `max_train_tokens` keeps the first blocks and tokenises little more than that.

    Streaming (`data_args.streaming`): the training set is a `PackedStream`. Our trainers give every process and every
    dataloader worker a share of its documents and go on exactly where a checkpoint was; with another trainer, process
    0 reads and sends each its rows. Text and JSONL files are dealt out in `streaming_shards` shares, a Hub dataset and
    Parquet by file. With one share the stream holds the same tokens in the same order as the map-style set. Held-out
    text is read first, up to `max_eval_tokens` (default 262144), and kept in memory.

    Args:
        data_args: see `DataArguments`.
        tokenizer: needs an EOS token; without a pad token, EOS fills (masked, never a label).
        patch_size: tokens per patch, K; 1 for no phases.
        seed: data seed, draws the phases.

    Returns:
        (train, held-out) with columns `input_ids` (int32), `attention_mask` (int8), `labels` (int32, -100 where
        nothing is to be learned), each (T,), in NumPy format.

    Raises:
        ValueError: block_size is no multiple of patch_size, no EOS token, empty corpus, broken JSONL line, held-out
            text missing or too small.
        FileNotFoundError: no such file or folder.
    """
    packing = _Packing.of(tokenizer, data_args.block_size, patch_size, seed)
    if data_args.streaming:
        return _stream_blocks(data_args, tokenizer, packing)
    with _local_main_process_first():
        train_texts, eval_texts, cut = _read_texts(data_args)
        train = _pack_texts(train_texts, tokenizer, packing, data_args.max_train_tokens, data_args.num_proc)
        evaluation = _pack_texts(eval_texts, tokenizer, packing, data_args.max_eval_tokens, data_args.num_proc)
    if cut and len(evaluation) == 1 and not evaluation[0]["attention_mask"][-1]:
        num_tokens = evaluation[0]["attention_mask"].sum()
        raise ValueError(
            f"the last {data_args.eval_fraction:.0%} of {data_args.data} ({num_tokens} tokens) do not fill one block: "
            f"give eval_data, raise eval_fraction, lower block_size ({data_args.block_size}), or add text"
        )
    for name, blocks in (("training", train), ("held-out", evaluation)):
        logger.info("%s: %d blocks of %d tokens", name, len(blocks), packing.block_size)
    return train, evaluation


@dataclass
class PatchCollator:
    """Batch rows of blocks.

    Args:
        patch_size: tokens per patch, K.

    Call: a list of B rows, each a dict of lists or arrays (T,) -> a dict of `torch.long` tensors (B, T), and the last
    row's place in a stream as it is.

    Raises:
        ValueError: rows of different lengths, or T no multiple of `patch_size`.
    """

    patch_size: int = 1

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        lengths = {len(row["input_ids"]) for row in features}
        if len(lengths) > 1:
            raise ValueError(
                f"rows of different lengths ({sorted(lengths)}): pack documents into blocks with load_blocks"
            )
        length = lengths.pop()
        if length % self.patch_size:
            raise ValueError(f"rows of {length} tokens: " + _multiple_hint("block_size", length, self.patch_size))
        batch: dict[str, Any] = {
            name: torch.from_numpy(np.stack([np.asarray(row[name]) for row in features]).astype(np.int64))
            for name in features[0]
            if name != POSITION_KEY
        }
        if POSITION_KEY in features[-1]:
            batch[POSITION_KEY] = features[-1][POSITION_KEY]  # behind the last of its rows
        return batch


# ------------------------------------------------------------------------------------------------------------- readers


def local_path(data: str) -> Path | None:
    """The file or folder that `data` names; None where it reads like a Hub id.

    Raises:
        FileNotFoundError: it reads like a path, and there is nothing.
    """
    path = Path(data).expanduser()
    if path.exists():
        return path
    if path.suffix in FOLDER_SUFFIXES or data.startswith((".", "/", "~")) or data.count("/") > 1:
        raise FileNotFoundError(f"no file or folder {data!r} (working folder {os.getcwd()})")
    return None


def is_jsonl(path: str) -> bool:
    return path.lower().endswith((".jsonl", ".ndjson"))


def read_jsonl(path: str) -> Iterator[tuple[int, Any]]:
    """(line number from 1, value) of every line that is not blank.

    Raises:
        ValueError: a line is not JSON (named by file and line number).
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:  # also no UTF-8, endless numbers, deep nesting
                raise ValueError(f"{path}:{number}: not a line of JSON ({error})") from error
            yield number, row


def string_field(row: Any, name: str, remedy: str) -> str:
    """The text in one field of a record.

    Raises:
        ValueError: no such field, no string, or no Unicode text. It names the field, the value and the remedy; who
            calls says which record it is.
    """
    if not isinstance(row, dict) or name not in row:
        found = f"fields {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise ValueError(f"no field {name!r}, found {found}: {remedy}")
    text = row[name]
    if not isinstance(text, str):
        raise ValueError(f"field {name!r} must be a string, got {text!r:.60}: mend the line or {remedy}")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may name half an emoji
        raise ValueError(f"field {name!r} cannot be written as UTF-8 ({error}): mend it") from error
    return text


def load_hub_split(
    name: str,
    config: str | None,
    split: str,
    cache_dir: str | None = None,
    streaming: bool = False,
    data_files: list[str] | None = None,
) -> Any:
    """One split of a Hub dataset, or with `data_files` of files on this machine, of the format `name`.

    Raises:
        ValueError: it could not be loaded.
    """
    try:
        return datasets.load_dataset(
            name, config, split=split, cache_dir=cache_dir, streaming=streaming, data_files=data_files
        )
    except Exception as error:
        if data_files:
            raise ValueError(f"{data_files[0]}: {type(error).__name__}: {error}") from error
        raise ValueError(
            f"{name!r} is neither a file or folder here nor a Hub dataset that could be loaded "
            f"(configuration {config}, split {split}): {type(error).__name__}: {error}"
        ) from error


def hash_position(key: str) -> float:
    """A place in [0, 1), uniform over keys; the same on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def read_documents(data_args: DataArguments) -> Iterator[tuple[str, str]]:
    """(key, text) of every document of `data_args.data`, whole and in order; nothing is held out. The key is the path
    of a file that is one document, the text itself otherwise.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a broken JSONL line, a file that is no text, a Hub dataset that could not be loaded.
    """
    for document in _train_source(data_args).documents():
        yield document.key, document.text


# ----------------------------------------------------------------------------------------------------------- documents


@dataclass(frozen=True)
class _Document:
    key: str  # its hash decides on which side of the split the document falls
    text: str

    @property
    def position(self) -> float:
        return hash_position(self.key)


@dataclass(frozen=True)
class _Files:
    """Text files and JSONL files on this machine."""

    files: tuple[tuple[str, str], ...]  # (key, path)
    text_field: str
    skip_undecodable: bool = False

    def documents(self) -> Iterator[_Document]:
        for key, path in self.files:
            texts = self._jsonl(path) if is_jsonl(path) else self._text(path)
            first = list(islice(texts, 2))
            if len(first) == 1:
                yield _Document(key, first[0])  # split by its path, which survives edits
                continue
            for text in first:
                yield _Document(text, text)
            for text in texts:
                yield _Document(text, text)

    def stream(self, num_shards: int, span: tuple[float, float]) -> IterableDataset:
        """What `PackedStream` reads; every share reads all files and keeps its documents."""
        shards = {"shards": list(range(num_shards)), "num_shards": num_shards, "source": self, "span": span}
        return IterableDataset.from_generator(_share_of_documents, gen_kwargs=shards)

    def fingerprint(self) -> str:
        digest = hashlib.blake2b(self.text_field.encode())
        for key, path in self.files:
            digest.update(f"\0{key}\0{is_jsonl(path)}\0{os.path.getsize(path)}\0".encode())
            with open(path, "rb") as file:
                while chunk := file.read(2**22):
                    digest.update(chunk)
        return digest.hexdigest()

    def _text(self, path: str) -> Iterator[str]:
        lines: list[str] = []
        try:
            # newline="": what blocks decode to has the file's own line ends
            with open(path, encoding="utf-8-sig", newline="") as file:
                for line in file:
                    if line.strip() == DOCUMENT_SEPARATOR:
                        yield from _non_empty("".join(lines).strip("\r\n"))
                        lines = []
                    else:
                        lines.append(line)
        except UnicodeDecodeError as error:
            if not self.skip_undecodable:
                raise ValueError(f"{path} is not UTF-8 text ({error.reason}): convert it, or take it out") from error
            return
        yield from _non_empty("".join(lines))

    def _jsonl(self, path: str) -> Iterator[str]:
        for number, row in read_jsonl(path):
            try:
                text = string_field(row, self.text_field, "set text_field")
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
            yield from _non_empty(text)


@dataclass(frozen=True)
class _HubSplit:
    """One split of a Hub dataset. Read whole, its text is copied once into the cache."""

    name: str
    config: str | None
    split: str
    text_field: str
    cache_dir: str | None
    streaming: bool
    data_files: tuple[str, ...] = ()  # Parquet files on this machine, as a dataset named `parquet`

    def documents(self) -> Iterator[_Document]:
        for index, row in enumerate(self._load()):
            for kept in _non_empty(self._text_of(row, f", row {index}")):
                yield _Document(kept, kept)

    def _text_of(self, row: dict[str, Any], place: str = "") -> str:
        text = row.get(self.text_field)
        if not isinstance(text, str):
            raise ValueError(
                f"{self.name}, split {self.split}{place}: field {self.text_field!r} must be a string, got "
                f"{text!r:.60}; fields are {sorted(row)}: set text_field"
            )
        return text

    def stream(self, num_shards: int, span: tuple[float, float]) -> IterableDataset:
        """What `PackedStream` reads: its files are its shards."""
        return self._load(streaming=True).map(partial(self._document_of, span))

    def _document_of(self, span: tuple[float, float], row: dict[str, Any]) -> dict[str, Any]:
        text = self._text_of(row)
        kept = span[0] <= hash_position(text) < span[1] if text.strip() else None
        return {"text": text, "index": None, "kept": kept}

    def fingerprint(self) -> str:
        return f"{self.text_field}\0{self._load()._fingerprint}"

    def _load(self, streaming: bool | None = None) -> Any:
        streaming = self.streaming if streaming is None else streaming
        return load_hub_split(
            self.name, self.config, self.split, self.cache_dir, streaming, list(self.data_files) or None
        )


_Source = _Files | _HubSplit


def _train_source(args: DataArguments) -> _Source:
    return _resolve(args.data, args.split, args)


def _eval_source(args: DataArguments) -> _Source | None:
    if args.eval_data is None and args.eval_split is None:
        return None
    if (args.eval_data or args.data, args.eval_split or args.split) == (args.data, args.split):
        logger.warning("eval_data is data (%s): held-out figures will be figures on training text", args.data)
    source = _resolve(args.eval_data or args.data, args.eval_split or args.split, args)
    if args.eval_split is not None and isinstance(source, _Files):
        raise ValueError(f"eval_split ({args.eval_split}) is for Hub datasets: for files set eval_data")
    return source


def _resolve(data: str, split: str, args: DataArguments) -> _Source:
    if data.startswith("builtin:"):
        if data not in BUILTIN_CORPORA:
            raise ValueError(f"unknown built-in corpus {data!r}: there is {', '.join(BUILTIN_CORPORA)}")
        return _standard_library(args.text_field)
    path = local_path(data)
    if path is None:
        return _HubSplit(data, args.dataset_config, split, args.text_field, args.cache_dir, args.streaming)
    parquet = [path] if path.suffix == ".parquet" else sorted(path.glob("*.parquet"))
    if parquet:
        names = tuple(str(file) for file in parquet if _has_rows(file))
        if not names:
            raise ValueError(f"empty corpus: no Parquet file of {data} has a row")
        return _HubSplit("parquet", None, "train", args.text_field, args.cache_dir, args.streaming, names)
    if path.is_file():
        if path.suffix.lower() in RECORD_SUFFIXES:
            raise ValueError(
                f"{data} holds records, not text: write one JSON object a line, with the text in its field "
                f"{args.text_field!r}, and name the file .jsonl (or .txt, if this is the text that is meant)"
            )
        return _Files(((path.name, str(path)),), args.text_field)
    files = _walk(path, lambda name: name.startswith("."), FOLDER_SUFFIXES)
    if not files:
        raise ValueError(f"empty corpus: no {', '.join(FOLDER_SUFFIXES)} file in the folder {data}")
    return _Files(files, args.text_field)


def _has_rows(file: Path) -> bool:
    """Of a Parquet file; jobs that write many leave some empty, and `datasets` fails at them (5.2)."""
    try:
        return pq.read_metadata(file).num_rows > 0
    except (OSError, pa.ArrowException):
        return True  # what is wrong with it is said where it is read


def _walk(root: Path, skip_folder: Callable[[str], bool], suffixes: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Files below `root` as (path relative to it with slashes, path), in the order of that key's hash: the first
    megabytes of a capped run are then a sample of the folder, not its first names, and the same on every machine."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not skip_folder(name)]
        for name in names:
            path = Path(folder, name)
            if path.suffix in suffixes and not name.startswith("."):
                found.append((path.relative_to(root).as_posix(), str(path)))
    return tuple(sorted(found, key=lambda item: hashlib.blake2b(b"order\0" + item[0].encode()).digest()))


def _standard_library(text_field: str) -> _Files:
    """builtin:python: the .py files of the running Python's standard library, a document each, keyed by relative path.

    Left out: installed packages, test suites (they would be two thirds of it), tables rather than code (`encodings`,
    `pydoc_data`), `lib2to3` and build settings of this machine. Files that are not UTF-8 are skipped.
    """
    folders = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data"}
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _walk(root, lambda name: name in folders or name.startswith(("__", ".", "config-")), (".py",))
    files = tuple(item for item in files if not item[0].startswith("_sysconfigdata"))
    if not files:
        raise ValueError(
            f"builtin:python: this Python keeps no .py files in {root}: give a text file or folder as data"
        )
    return _Files(files, text_field, skip_undecodable=True)


def _non_empty(text: str) -> Iterator[str]:
    if text.strip():
        yield text


# -------------------------------------------------------------------------------------------------------------- pieces
# Long documents are handled in pieces: bounded memory, several threads on one book, and caps finer than a document.

_TEXT_FEATURES = datasets.Features(
    {
        "text": datasets.Value("string"),
        "document": datasets.Value("int64"),
        "last": datasets.Value("bool"),
        "position": datasets.Value("float64"),
        "tail": datasets.Value("bool"),
    }
)


def _read_texts(args: DataArguments) -> tuple[Dataset, Dataset, bool]:
    """(training pieces, held-out pieces, whether the held-out part was cut off the end)"""
    eval_source = _eval_source(args)
    pieces = _cached_pieces(_train_source(args), args, hold_out=eval_source is None)
    if eval_source is not None:
        held_out_pieces = _cached_pieces(eval_source, args, hold_out=False)
        return pieces.remove_columns(["position", "tail"]), held_out_pieces.remove_columns(["position", "tail"]), False

    columns = pieces.with_format("numpy")
    position, held_out = np.asarray(columns["position"]), np.asarray(columns["tail"])
    cut = int(columns[-1]["document"]) + 1 < MIN_DOCUMENTS_TO_SPLIT
    if not cut:
        held_out = position < args.eval_fraction
        if not held_out.any():
            held_out = position == position.min()
    if held_out.all() or not held_out.any():
        raise ValueError(f"{args.data} has too little text to hold some out: give eval_data, or more text")
    pieces = pieces.remove_columns(["position", "tail"])
    return pieces.select(np.flatnonzero(~held_out)), pieces.select(np.flatnonzero(held_out)), cut


def _cached_pieces(source: _Source, args: DataArguments, hold_out: bool) -> Dataset:
    tail_fraction = args.eval_fraction if hold_out else 0.0
    try:
        return Dataset.from_generator(
            _pieces,
            features=_TEXT_FEATURES,
            cache_dir=args.cache_dir,
            gen_kwargs={"source": source, "tail_fraction": tail_fraction},
            fingerprint=_hash("pieces", source.fingerprint(), tail_fraction),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise error.__cause__ from None  # our own message, which names file and line
        raise


def _pieces(source: _Source, tail_fraction: float) -> Iterator[dict[str, Any]]:
    documents = source.documents()
    head = list(islice(documents, MIN_DOCUMENTS_TO_SPLIT))
    if not head:
        raise ValueError(f"empty corpus: {_describe(source)} holds no text")
    tail_start: float = float("inf")  # in characters, over all documents
    if len(head) < MIN_DOCUMENTS_TO_SPLIT and tail_fraction:
        tail_start = int(sum(len(document.text) for document in head) * (1 - tail_fraction))
    seen = 0
    for index, document in enumerate(_chain(head, documents)):
        length = len(document.text)
        cut = length if seen + length <= tail_start else max(0, int(tail_start - seen))
        if 0 < cut < length:
            cut = document.text.rfind("\n", 0, cut) + 1 or cut
        for tail, text in ((False, document.text[:cut]), (True, document.text[cut:])):
            for piece, last in _cut(text):
                yield {
                    "text": piece,
                    "document": index,
                    "last": last,
                    "position": document.position,
                    "tail": tail,
                }
        seen += length


def _chain(head: list[_Document], rest: Iterator[_Document]) -> Iterator[_Document]:
    while head:
        yield head.pop(0)
    yield from rest


def _cut(text: str) -> Iterator[tuple[str, bool]]:
    """Pieces of at most `PIECE_CHARACTERS`, cut behind a line end where there is one; (piece, is it the last)."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARACTERS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end], end >= len(text)
        start = end


def _describe(source: _Source) -> str:
    if isinstance(source, _HubSplit):
        return ", ".join(source.data_files) or f"{source.name} (split {source.split})"
    return source.files[0][1] if len(source.files) == 1 else f"the {len(source.files)} files"


# -------------------------------------------------------------------------------------------------------------- tokens

_TOKEN_FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "document": datasets.Value("int64"),
        "last": datasets.Value("bool"),
    }
)


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    encoded = tokenizer(
        texts, add_special_tokens=False, truncation=False, padding=False, return_attention_mask=False, verbose=False
    )
    return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]


def _tokenise_batch(texts: list[str], tokenizer: PreTrainedTokenizerBase, parent: int) -> dict[str, list[np.ndarray]]:
    if os.getpid() != parent:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes already: threads in each would fight over the cores
    return {"input_ids": _tokenise(tokenizer, texts)}


def _cached_tokens(texts: Dataset, tokenizer: PreTrainedTokenizerBase, num_proc: int | None) -> Dataset:
    return texts.map(
        partial(_tokenise_batch, tokenizer=tokenizer, parent=os.getpid()),
        input_columns="text",
        batched=True,
        batch_size=32,
        remove_columns="text",
        features=_TOKEN_FEATURES,
        num_proc=num_proc,
        new_fingerprint=_hash("tokens", texts._fingerprint, _tokenizer_fingerprint(tokenizer)),
        desc="Tokenising",
    )


def _tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return datasets.fingerprint.Hasher.hash(
            (type(tokenizer).__name__, tokenizer.init_kwargs, tokenizer.get_vocab())
        )
    state = json.loads(backend.to_str())
    # every call with padding or truncation rewrites these two: the same tokenizer would miss its own cache
    state.pop("truncation", None)
    state.pop("padding", None)
    return _hash(json.dumps(state, sort_keys=True))


def _hash(*parts: Any) -> str:
    return hashlib.blake2b(repr((FORMAT_VERSION, *parts)).encode(), digest_size=16).hexdigest()


# -------------------------------------------------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class _Packing:
    """What decides, beside the tokens, what the blocks hold."""

    block_size: int
    patch_size: int
    seed: int
    eos_token_id: int
    pad_token_id: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, block_size: int, patch_size: int, seed: int) -> "_Packing":
        if patch_size < 1:
            raise ValueError(f"patch_size must be >= 1, got {patch_size}")
        if block_size % patch_size:
            raise ValueError(_multiple_hint("block_size", block_size, patch_size))
        eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        if eos is None:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path!r} has no EOS token, and documents end with one: "
                "set tokenizer.eos_token to a token of its vocabulary and save it"
            )
        return cls(block_size, patch_size, seed, eos, eos if pad is None else pad)

    @property
    def features(self) -> datasets.Features:
        types = {"input_ids": "int32", "attention_mask": "int8", "labels": "int32"}
        return datasets.Features(
            {name: datasets.List(datasets.Value(dtype), length=self.block_size) for name, dtype in types.items()}
        )

    def phase(self, document: int) -> int:
        """Pads in front of a document, 0 .. patch_size - 1."""
        digest = hashlib.blake2b(f"{self.seed}:{document}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.patch_size

    def places(self, tokens: np.ndarray, document: int, begins: bool, ends: bool) -> np.ndarray:
        """What a piece of a document takes of a row: pads before its beginning, EOS after its end."""
        parts = [np.full(self.phase(document), _NOTHING, dtype=np.int32)] if begins else []
        parts.append(tokens)
        if ends:
            parts.append(np.array([self.eos_token_id], dtype=np.int32))
        return np.concatenate(parts)

    def rows(self, pieces: Iterable[tuple[np.ndarray, int, bool]]) -> Iterator[dict[str, np.ndarray]]:
        """Pack (tokens, document, whether the piece ends it) into columns of several rows at a time, (R, T)."""
        buffer: list[np.ndarray] = []
        size, begins = 0, True
        for tokens, document, last in pieces:
            buffer.append(self.places(tokens, document, begins, last))
            begins = last
            size += len(buffer[-1])
            if size >= 16 * self.block_size:
                places = np.concatenate(buffer)
                full = len(places) - len(places) % self.block_size
                yield self.columns(places[:full])
                buffer, size = [places[full:]], 0
        rest = np.concatenate(buffer) if buffer else np.zeros(0, dtype=np.int32)
        if len(rest):
            yield self.columns(self.filled(rest))

    def filled(self, places: np.ndarray) -> np.ndarray:
        """With nothing behind the last place, up to a whole row."""
        return np.concatenate([places, np.full(-len(places) % self.block_size, _NOTHING, dtype=np.int32)])

    def columns(self, places: np.ndarray) -> dict[str, np.ndarray]:
        """Places of R whole rows -> columns (R, T)."""
        places = places.reshape(-1, self.block_size)
        real = places != _NOTHING
        asked = real.copy()
        # a row that begins with pads: nothing predicts its first token, as nothing predicts the one in column 0
        asked[np.arange(len(places)), real.argmax(axis=1)] &= real[:, 0]
        return {
            "input_ids": np.where(real, places, np.int32(self.pad_token_id)),
            "attention_mask": real.astype(np.int8),
            "labels": np.where(asked, places, np.int32(IGNORE_INDEX)),
        }


_NOTHING = -1  # a place without a token, until the columns are made; no token has this id


def _multiple_hint(name: str, value: int, patch_size: int) -> str:
    below = value // patch_size * patch_size
    nearest = f"{below} or {below + patch_size}" if below else f"{patch_size}"
    return f"{name} ({value}) must be a multiple of patch_size ({patch_size}): take {nearest}"


def _pack_texts(
    texts: Dataset, tokenizer: PreTrainedTokenizerBase, packing: _Packing, max_tokens: int | None, num_proc: int | None
) -> Dataset:
    if max_tokens is None:
        return _cached_blocks(_cached_tokens(texts, tokenizer, num_proc), packing, None)
    num_blocks = max_tokens // packing.block_size
    characters = 5 * max_tokens  # what most tokenizers need for most text; where it falls short, more is read
    while True:
        part = texts.select(range(_count_pieces(texts, characters)))
        blocks = _cached_blocks(_cached_tokens(part, tokenizer, num_proc), packing, num_blocks)
        # the last block of a part is cut short by its end, which is no end of the text
        if len(part) == len(texts) or (len(blocks) == num_blocks and blocks[-1]["attention_mask"][-1]):
            return blocks
        characters *= 2


def _count_pieces(texts: Dataset, characters: int) -> int:
    """Number of pieces that hold at least so many characters."""
    count = 0
    for batch in texts.select_columns("text").iter(batch_size=256):
        for text in batch["text"]:
            if characters <= 0:
                return count
            characters -= len(text)
            count += 1
    return count


def _cached_blocks(tokens: Dataset, packing: _Packing, num_blocks: int | None) -> Dataset:
    """The first `num_blocks` blocks (all when None), as a memory-mapped file beside the tokens'."""
    folder = Path(tokens.cache_files[0]["filename"]).parent
    path = folder / f"blocks-{_hash('blocks', tokens._fingerprint, packing, num_blocks)}.arrow"
    if not path.exists():
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        schema = packing.features.arrow_schema
        pieces = _iterate_tokens(tokens)
        with pa.OSFile(str(unfinished), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            written = 0
            for columns in packing.rows(pieces):
                if num_blocks is not None:
                    columns = {name: rows[: num_blocks - written] for name, rows in columns.items()}
                written += len(columns["input_ids"])
                arrays = [
                    pa.FixedSizeListArray.from_arrays(pa.array(columns[name].reshape(-1)), packing.block_size)
                    for name in schema.names
                ]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema), max_chunksize=1000)
                if written == num_blocks:
                    break
        unfinished.replace(path)  # a run that is killed half way leaves no half file under the final name
    return Dataset.from_file(str(path)).with_format("numpy")


def _iterate_tokens(tokens: Dataset) -> Iterator[tuple[np.ndarray, int, bool]]:
    with datasets.utils.tqdm(total=len(tokens), desc="Packing", unit=" pieces") as progress:
        for table in tokens.with_format("arrow").iter(batch_size=256):
            ids, documents, last = (table.column(name).combine_chunks() for name in ("input_ids", "document", "last"))
            values, offsets = ids.values.to_numpy(), ids.offsets.to_numpy()
            for row in range(table.num_rows):
                yield values[offsets[row] : offsets[row + 1]], documents[row].as_py(), last[row].as_py()
            progress.update(table.num_rows)


# -------------------------------------------------------------------------------------------------------------- stream


def _stream_blocks(
    args: DataArguments, tokenizer: PreTrainedTokenizerBase, packing: _Packing
) -> tuple[PackedStream, Dataset]:
    source, eval_source = _train_source(args), _eval_source(args)
    num_blocks = (args.max_eval_tokens or max(STREAMING_EVAL_TOKENS, args.block_size)) // args.block_size
    if eval_source is None:
        if len(list(islice(source.documents(), MIN_DOCUMENTS_TO_SPLIT))) < MIN_DOCUMENTS_TO_SPLIT:
            raise ValueError(
                f"{args.data} has fewer than {MIN_DOCUMENTS_TO_SPLIT} documents, and a stream has no end to hold out: "
                "give eval_data, or drop streaming"
            )
        held_out = args.eval_fraction
    else:
        held_out = 0.0

    def stream(documents: IterableDataset, **kwargs: Any) -> PackedStream:
        return PackedStream(documents, packing, _cut, partial(_tokenise, tokenizer), **kwargs)

    judged = (eval_source or source).stream(1, (0.0, held_out if eval_source is None else 1.0))
    evaluation = list(islice(stream(judged), num_blocks))
    if not evaluation:
        raise ValueError(f"{args.eval_data or args.data} has no held-out text: give eval_data, or raise eval_fraction")
    columns = {name: [row[name] for row in evaluation] for name in packing.features}
    train = stream(
        source.stream(args.streaming_shards, (held_out, 1.0)),
        max_rows=None if args.max_train_tokens is None else args.max_train_tokens // args.block_size,
        shuffle_rows=max(1, args.shuffle_buffer_size),
    )
    return train, Dataset.from_dict(columns, features=packing.features).with_format("numpy")


def _share_of_documents(shards: list[int], num_shards: int, source: "_Files", span: tuple[float, float]) -> Any:
    for shard in shards:
        for index, document in enumerate(source.documents()):
            if index % num_shards == shard:
                kept = span[0] <= document.position < span[1]
                yield {"text": document.text, "index": index, "kept": kept}


def _local_main_process_first() -> AbstractContextManager[Any]:
    """One process of a machine fills the cache, the others then read it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return PartialState().local_main_process_first()
    return nullcontext()
