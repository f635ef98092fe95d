"""From data sets to examples: what is compressed, what stays text, what is answered.

    record of a data set (Hub split | .jsonl line | document)
      -> Example(context, prompt, answers)      `Task.parse`, one per question or window

    task      context (becomes latents)     prompt (stays text)    answers                      metric
    squad     paragraph                     question               gold spans                   f1
    hotpotqa  ten paragraphs, or gold ones  question               gold answer                  f1
    sst2      sentence                      what to classify       negative | positive          accuracy
    agnews    article                       what to classify       world | sports | ...         accuracy
    trec      question                      what to classify       ABBR | ENTY | ...            accuracy
    gsm8k     problem                       what to do             solution, ends in "#### n"   gsm8k
    reasoning problem                       none                   result, its steps beside it  gsm8k
    samsum    dialogue                      none                   summary                      rouge_l
    dialogsum dialogue                      none                   summaries                    rouge_l
    text      window of a document          none                   the next window, or itself   token_f1
    custom    the file says                 the file says          the file says                f1

A question is never part of the context of a reading task: an encoder that has to carry it loses it first. No example
says how long its answer is, so nothing that reads one can be told. Prompts and answers end without a line break: who
composes the sequence sets what stands between.
"""

import hashlib
import heapq
import logging
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from .arithmetic import arithmetic_problems
from .data import (
    BUILTIN_CORPORA,
    DataArguments,
    hash_position,
    is_jsonl,
    load_hub_split,
    local_path,
    read_documents,
    read_jsonl,
    string_field,
)


logger = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 4  # of English in a vocabulary of tens of thousands; only where no tokenizer is given
HELD_OUT_FRACTION = DataArguments.eval_fraction
SPLIT_NAMES = {"train": "train", "validation": "validation", "valid": "validation", "val": "validation"}
SPLIT_NAMES |= {"dev": "validation", "test": "test"}
SPLIT_SUFFIXES = (".jsonl", ".ndjson", ".txt")  # train.py is code, not a split

HotpotSetting = Literal["distractor", "oracle"]
Metric = Literal["f1", "accuracy", "gsm8k", "token_f1", "rouge_l"]


@dataclass(frozen=True)
class Example:
    """One thing to read and to answer.

    Args:
        context: long text that becomes latents.
        prompt: stays text, between the latents and the answer; may be empty.
        answers: at least one reference; the first is trained on, all are scored against.
        id: unique in its data set and the same on every machine: draws subsets, pairs the results of two methods.
        document: what belongs together, such as the article: a split never parts it.
        labels: the allowed answers of a classification.
        steps: what a reader thinks on the way to the answer, a text a step; empty where nobody wrote it down.

    Raises:
        ValueError: an empty context, no answer or an empty one, an answer that is no label, an empty step.
    """

    context: str
    prompt: str
    answers: tuple[str, ...]
    id: str
    document: str
    labels: tuple[str, ...] | None = None
    steps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(step.strip() for step in self.steps):
            raise ValueError(f"a step is empty in {self.steps!r:.60}: take it out")
        if not self.context.strip():
            raise ValueError(f"the context is empty ({self.context!r:.60}): mend the record or take it out")
        if not self.answers or not all(answer.strip() for answer in self.answers):
            raise ValueError(f"an answer is missing or empty in {self.answers!r:.60}: mend the record or take it out")
        if self.labels and (unknown := [answer for answer in self.answers if answer not in self.labels]):
            raise ValueError(f"the answer {unknown[0]!r:.60} is none of the labels {', '.join(self.labels)}: mend it")


@dataclass(frozen=True)
class Skipped:
    """A record, or a question of one, that says itself that it cannot be used; `load_task` counts them by reason."""

    reason: str


@dataclass(frozen=True)
class TextCut:
    """How plain text becomes windows.

    Args:
        mode: "continue": the text after the context is the answer. "reconstruct": the context is the answer.
        context_tokens: tokens of a context.
        answer_tokens: tokens of the answer that follows it; nothing in "reconstruct".
        tokenizer: counts the tokens, and needs to be a fast one, which knows where its tokens lie in the text. None: a
            token is 4 characters and windows end between words, so that receivers of different tokenizers get the
            same text. A window tokenised by itself may have other tokens at its ends.
        text_field: the field that holds the text, in JSONL and on the Hub.
    """

    mode: Literal["continue", "reconstruct"] = "continue"
    context_tokens: int = 128
    answer_tokens: int = 32
    tokenizer: PreTrainedTokenizerBase | None = None
    text_field: str = "text"

    def __post_init__(self) -> None:
        if self.mode not in ("continue", "reconstruct"):
            raise ValueError(f"mode must be 'continue' or 'reconstruct', got {self.mode!r}")
        for name in ("context_tokens", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.tokenizer is not None and not self.tokenizer.is_fast:
            raise ValueError(
                f"the tokenizer {self.tokenizer.name_or_path!r} does not know where its tokens lie in the text: take "
                "a fast one, or none"
            )


# ------------------------------------------------------------------------------------------------------------- records
# One function a task: a record in the Hub's schema or in that of the local files -> its examples. A missing field, a
# wrong type or an empty text is an error; only what a data set marks as unanswered is `Skipped`.

_NO_ANSWER = Skipped("no answer")
_GOLD_MISSING = Skipped("gold sentences not in the context")


def _text(record: Any, name: str) -> str:
    text = string_field(record, name, "take the task that fits").strip()
    if not text:
        raise ValueError(f"field {name!r} is empty: mend the line or take it out")
    return text


def _table(record: Any, name: str, columns: dict[str, type]) -> list[tuple[Any, ...]]:
    """Rows of a field that is a list of objects (local files) or an object of lists (Hub)."""
    if name not in record:
        raise ValueError(f"no field {name!r}, found fields {sorted(record)}: take the task that fits")
    value, rows = record[name], None
    if isinstance(value, dict) and all(isinstance(value.get(column), list) for column in columns):
        lists = [value[column] for column in columns]
        rows = list(zip(*lists, strict=True)) if len({len(items) for items in lists}) == 1 else None
    elif isinstance(value, list) and all(isinstance(row, dict) and columns.keys() <= row.keys() for row in value):
        rows = [tuple(row[column] for column in columns) for row in value]
    if rows is None or not all(
        isinstance(cell, kind) for row in rows for cell, kind in zip(row, columns.values(), strict=True)
    ):
        wanted = " and ".join(f"{column} ({kind.__name__})" for column, kind in columns.items())
        raise ValueError(
            f"field {name!r} must be a list of objects with {wanted}, or an object of such lists of one length, got "
            f"{value!r:.60}: mend the line"
        )
    return rows


def _id(record: dict[str, Any]) -> str:
    return str(record.get("id", record.get("idx", "")))


def _squad(record: dict[str, Any]) -> Iterator[Example | Skipped]:
    title, context = _text(record, "title"), _text(record, "context")
    questions = record.get("qas", [record])
    if not isinstance(questions, list):
        raise ValueError(f"field 'qas' must be a list, got {questions!r:.60}: mend the line")
    for entry in questions:
        question = _text(entry, "question")
        answers = [
            _text({"answers.text": text}, "answers.text") for (text,) in _table(entry, "answers", {"text": str})
        ]
        if answers:
            # several people gave the same answer: once is enough for a maximum over references
            yield Example(context, f"Question: {question}", tuple(dict.fromkeys(answers)), _id(entry), title)
        else:
            yield _NO_ANSWER  # SQuAD v2


def _hotpotqa(record: dict[str, Any], setting: HotpotSetting = "distractor") -> Iterator[Example | Skipped]:
    """All paragraphs ("distractor"), as a reader finds them; or only the sentences marked as gold ("oracle"), which
    nobody has who does not know the answer: an upper bound."""
    question = _text(record, "question")
    if record.get("answer", "") is None:  # the Hub's fullwiki test
        yield _NO_ANSWER
        return
    answer = _text(record, "answer")
    paragraphs: dict[str, list[str]] = {}
    if "evidence" in record:
        if setting == "distractor":
            raise ValueError(
                "field 'evidence': the record has its gold sentences only, no distractors: set "
                "hotpot_setting='oracle', or give files with a context"
            )
        for title, sentence in _table(record, "evidence", {"title": str, "sentence": str}):
            paragraphs.setdefault(title, []).append(sentence)
    else:
        for title, sentences in _table(record, "context", {"title": str, "sentences": list}):
            if wrong := [sentence for sentence in sentences if not isinstance(sentence, str)]:
                raise ValueError(f"field 'context.sentences' must hold strings, got {wrong[0]!r:.60}: mend the line")
            paragraphs.setdefault(title, []).extend(sentences)
        gold = _table(record, "supporting_facts", {"title": str, "sent_id": int})
        # the fullwiki paragraphs were retrieved and may lack what the answer needs; some sentence numbers are wrong
        if not gold or any(title not in paragraphs for title, _ in gold):
            yield _GOLD_MISSING
            return
        if setting == "oracle":
            if any(not 0 <= place < len(paragraphs[title]) for title, place in gold):
                yield _GOLD_MISSING
                return
            paragraphs = {
                title: [sentence for place, sentence in enumerate(sentences) if (title, place) in gold]
                for title, sentences in paragraphs.items()
                if title in {title for title, _ in gold}
            }
    context = "\n".join(
        f"{title}: {' '.join(sentence.strip() for sentence in sentences)}" for title, sentences in paragraphs.items()
    )
    yield Example(context, f"Question: {question}", (answer,), _id(record), question)


def _classification(
    record: dict[str, Any], text_field: str, label_field: str, labels: tuple[str, ...], prompt: str
) -> Iterator[Example | Skipped]:
    text = _text(record, text_field)
    if label_field not in record:
        raise ValueError(f"no field {label_field!r}, found fields {sorted(record)}: take the task that fits")
    label = record[label_field]
    if label is None or label == -1:  # the Hub's mark of a hidden test label
        yield _NO_ANSWER
        return
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(labels):
        label = labels[label]
    if label not in labels:
        raise ValueError(
            f"field {label_field!r} must be one of {', '.join(labels)} or its number from 0, got {label!r:.60}: mend "
            "the line"
        )
    yield Example(text, prompt, (label,), _id(record), text, labels)


def _gsm8k(record: dict[str, Any]) -> Iterator[Example | Skipped]:
    question, answer = _text(record, "question"), _text(record, "answer")
    if not re.search(r"####\s*\S", answer):
        raise ValueError(f"field 'answer' must end in '#### ' and the result, got {answer[-40:]!r}: mend the line")
    prompt = "Solve the problem step by step. Write the result after '####'."
    yield Example(question, prompt, (answer,), _id(record), question)


_CALCULATION = re.compile(r"<<[^<>]*>>")  # GSM8K writes one beside each result, for a calculator


def _reasoning(record: dict[str, Any]) -> Iterator[Example | Skipped]:
    """GSM8K's solutions a line a step, and the result as the answer: what is thought is not what is said."""
    (example,) = (entry for entry in _gsm8k(record) if isinstance(entry, Example))
    solution, _, result = example.answers[0].partition("####")
    lines = (_CALCULATION.sub("", line).strip() for line in solution.splitlines())
    steps = tuple(line for line in lines if line)
    yield replace(example, prompt="", answers=(result.split("\n")[0].strip(),), steps=steps)


def _dialogue(record: dict[str, Any]) -> Iterator[Example | Skipped]:
    dialogue = record.get("dialogue")
    if dialogue is None or (isinstance(dialogue, str) and not dialogue.strip()):  # the Hub's SAMSum has one
        yield Skipped("no dialogue")
        return
    dialogue, summaries = _text(record, "dialogue").replace("\r\n", "\n"), record.get("summaries")
    if summaries is None:
        summaries = [_text(record, "summary")]
    if not isinstance(summaries, list) or not summaries:
        raise ValueError(f"field 'summaries' must be a list of texts, got {summaries!r:.60}: mend the line")
    answers = tuple(dict.fromkeys(_text({"summaries": text}, "summaries") for text in summaries))
    yield Example(dialogue, "", answers, _id(record), dialogue)


def _custom(record: dict[str, Any]) -> Iterator[Example | Skipped]:
    context = string_field(record, "context", "take the task that fits")
    prompt = string_field({"prompt": "", **record}, "prompt", "leave it out")
    lists: dict[str, tuple[str, ...] | None] = {"labels": None}
    for name in {"answers", "labels", "steps"} & record.keys():
        values = record[name]
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise ValueError(f"field {name!r} must be a list of strings, got {values!r:.60}: mend the line")
        lists[name] = tuple(values)
    answers = lists.get("answers")
    if answers is None:
        answers = (string_field(record, "answer", "give it, or a list answers"),)
    document = _text(record, "document") if "document" in record else context
    yield Example(context, prompt, answers, _id(record), document, lists["labels"], lists.get("steps") or ())


def cut_text(text: str, document: str, cut: TextCut) -> Iterator[Example | Skipped]:
    """Windows of one document, one after the other without a gap: contexts and answers put together again are the
    document up to its last whole window, with the white space before a word at the beginning of a window.

    Args:
        text: the document.
        document: its name.
        cut: see `TextCut`.
    """
    end_of = _character_ends(text) if cut.tokenizer is None else _token_ends(text, cut.tokenizer)
    start, count = 0, 0
    while (middle := end_of(start, cut.context_tokens)) is not None:
        end = middle if cut.mode == "reconstruct" else end_of(middle, cut.answer_tokens)
        if end is None:
            break
        context = text[start:middle]
        answer = context if cut.mode == "reconstruct" else text[middle:end]
        start, count = end, count + 1
        yield Example(context, "", (answer,), "", document) if context.strip() and answer.strip() else Skipped("blank")
    if not count:
        yield Skipped("documents shorter than a window")


_EndOf = Callable[[int, int], int | None]  # (begin in the text, tokens) -> end in the text, None behind the last


def _character_ends(text: str) -> _EndOf:
    def end_of(start: int, tokens: int) -> int | None:
        end = start + tokens * CHARACTERS_PER_TOKEN
        if end >= len(text):
            return len(text) if end == len(text) else None
        # a text without spaces is cut inside its words, not into windows of a few characters
        return next((place for place in range(end, (start + end) // 2, -1) if text[place].isspace()), end)

    return end_of


def _token_ends(text: str, tokenizer: PreTrainedTokenizerBase) -> _EndOf:
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    # ends, not starts: of the white space before a word some tokenizers make a part of its token, others nothing
    ends = [0, *(end for _, end in offsets["offset_mapping"])]

    def end_of(start: int, tokens: int) -> int | None:
        place = bisect_right(ends, start) - 1 + tokens
        return ends[place] if place < len(ends) else None

    return end_of


def _plain_text(record: dict[str, Any], cut: TextCut | None = None) -> Iterator[Example | Skipped]:
    cut = cut or TextCut()
    text = string_field(record, cut.text_field, "set text_field")
    return cut_text(text, _text(record, "document") if "document" in record else text, cut)


# ------------------------------------------------------------------------------------------------------------ registry


@dataclass(frozen=True)
class Task:
    """Where the records of a data set are, how they read and how answers to them are judged.

    Args:
        name: as in `TASKS`.
        fields: what a record must hold, for error messages.
        metric: "f1" (words, SQuAD's normalisation), "accuracy", "gsm8k" (the number after "####", or the last),
            "token_f1" or "rouge_l".
        entries: a record -> its examples, or why there are none.
        hub_id, config: of the Hub data set; None for a task without one.
        builtin: a source without a file: its name, and what makes the records of a split.
        splits: our name of a split -> the Hub's.
        labels: the allowed answers of a classification.
    """

    name: str
    fields: str
    metric: Metric
    entries: Callable[..., Iterator[Example | Skipped]]
    hub_id: str | None = None
    config: str | None = None
    splits: dict[str, str] | None = None
    labels: tuple[str, ...] | None = None
    builtin: tuple[str, Callable[[str], Iterable[dict[str, Any]]]] | None = None

    def parse(self, record: Any, **options: Any) -> list[Example]:
        """The examples of a record; `id` is empty where the record has none.

        Args:
            record: in the Hub's schema or in that of the local files.
            options: `setting` for hotpotqa, `cut` for text.

        Raises:
            ValueError: a field is missing, empty or of a wrong type; it names field, value and remedy.
        """
        return [entry for entry in self.read(record, **options) if isinstance(entry, Example)]

    def read(self, record: Any, **options: Any) -> list[Example | Skipped]:
        """As `parse`, with what was skipped."""
        try:
            if not isinstance(record, dict):
                raise ValueError(f"a record must be an object, got {record!r:.60}: mend the line")
            return list(self.entries(record, **options))
        except ValueError as error:
            raise ValueError(f"{error} (task {self.name} reads {self.fields})") from error


def _classify(name: str, hub_id: str, text: str, label: str, splits: Sequence[str], prompt: str, *labels: str) -> Task:
    entries = partial(_classification, text_field=text, label_field=label, labels=labels, prompt=prompt)
    return Task(
        name=name,
        fields=f"{text}, {label}",
        metric="accuracy",
        entries=entries,
        hub_id=hub_id,
        splits={split: split for split in splits},
        labels=labels,
    )


# The Hub was out of reach where this was written: ids, configurations, splits and schemas are those of public code and
# data cards, and none was downloaded.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="squad",
            fields="title, context, question, answers (text), or title, context and a list qas of question, answers",
            metric="f1",
            entries=_squad,
            hub_id="rajpurkar/squad",
            splits={"train": "train", "validation": "validation"},
        ),
        Task(
            name="hotpotqa",
            fields="question, answer, context (title, sentences), supporting_facts (title, sent_id), or evidence "
            "(title, sentence) instead of the two",
            metric="f1",
            entries=_hotpotqa,
            hub_id="hotpotqa/hotpot_qa",
            config="distractor",
            splits={"train": "train", "validation": "validation"},
        ),
        _classify(
            "sst2",
            "stanfordnlp/sst2",  # nyu-mll/glue, configuration sst2, has the same fields
            "sentence",
            "label",
            ("train", "validation"),  # the labels of test are hidden
            "Classify the sentiment as 'positive' or 'negative'.",
            "negative",
            "positive",
        ),
        _classify(
            "agnews",
            "fancyzhx/ag_news",
            "text",
            "label",
            ("train", "test"),
            "Classify the topic as 'world', 'sports', 'business' or 'science'.",
            "world",
            "sports",
            "business",
            "science",
        ),
        _classify(
            "trec",
            "SetFit/TREC-QC",
            "text",
            "label_coarse_original",  # the class by name: its numbers are in another order than CogComp/trec's
            ("train", "test"),
            "Classify what the question asks for as ABBR, ENTY, DESC, HUM, LOC or NUM.",
            "ABBR",
            "ENTY",
            "DESC",
            "HUM",
            "LOC",
            "NUM",
        ),
        Task(
            name="gsm8k",
            fields="question, answer",
            metric="gsm8k",
            entries=_gsm8k,
            hub_id="openai/gsm8k",
            config="main",
            splits={"train": "train", "test": "test"},
        ),
        Task(
            name="reasoning",
            fields="question, answer",
            metric="gsm8k",
            entries=_reasoning,
            hub_id="openai/gsm8k",
            config="main",
            splits={"train": "train", "test": "test"},
            builtin=("builtin:arithmetic", arithmetic_problems),
        ),
        Task(
            name="samsum",
            fields="dialogue, summary",
            metric="rouge_l",
            entries=_dialogue,
            hub_id="knkarthick/samsum",
            splits={"train": "train", "validation": "validation", "test": "test"},
        ),
        Task(
            name="dialogsum",
            fields="dialogue, and summary or a list summaries",
            metric="rouge_l",
            entries=_dialogue,
            hub_id="knkarthick/dialogsum",
            splits={"train": "train", "validation": "validation", "test": "test"},
        ),
        Task(
            name="text",
            fields="text",
            metric="token_f1",
            entries=_plain_text,
            hub_id="roneneldan/TinyStories",
            splits={"train": "train", "validation": "validation"},
        ),
        Task(
            name="custom",
            fields="context, answers or answer, and if they are there prompt, labels, steps, id, document",
            metric="f1",
            entries=_custom,
        ),
    )
}


# ------------------------------------------------------------------------------------------------------------- loading


def load_task(
    name: str,
    split: str,
    source: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    hotpot_setting: HotpotSetting = "distractor",
    *,
    config: str | None = None,
    text_cut: TextCut | None = None,
) -> list[Example]:
    """Examples of one split of a task, in the order of the data.

    On this machine, names say which split is which: the first word of a file (`train_44articles.jsonl`, `dev_a.jsonl`,
    `valid.txt`) or the name of a folder (`books/valid`); `valid`, `val` and `dev` are "validation". Files without such
    a name beside named ones are not read. A source that names no split is divided by document: "validation" are the
    documents whose hash falls into 5 %, "train" the others, so that no document is on both sides.

    Args:
        name: see `TASKS`.
        split: "train", "validation" or "test"; "all" for a file or folder whatever its name. Of another Hub data set
            than the task's own any split it has.
        source: None (the task's Hub data set), a .jsonl file, a folder, or another Hub id. For "text" what
            `DataArguments.data` takes; for "reasoning" `builtin:arithmetic` too.
        limit: number of examples, drawn without replacement by the hash of `seed` and id: the same on every machine,
            and the smaller subset is part of the larger.
        seed: of that draw.
        hotpot_setting: "distractor" (the whole context) or "oracle" (gold sentences only).
        config: configuration of another Hub data set.
        text_cut: see `TextCut`; for "text" only.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: unknown task, split or setting, a record that cannot be read (named by file and line number), two
            examples of one id, nothing found. Records that say that they have no answer are left out, counted and
            logged as a warning.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: there are {', '.join(TASKS)}")
    task = TASKS[name]
    if hotpot_setting not in ("distractor", "oracle"):
        raise ValueError(f"hotpot_setting must be 'distractor' or 'oracle', got {hotpot_setting!r}")
    if hotpot_setting != "distractor" and name != "hotpotqa":
        raise ValueError(f"hotpot_setting ({hotpot_setting!r}) is for hotpotqa, not for {name}: leave it out")
    if text_cut is not None and name != "text":
        raise ValueError(f"text_cut is for the task text, not for {name}: leave it out")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be >= 1, got {limit}")
    options: dict[str, Any] = {}
    if name == "hotpotqa":
        options["setting"] = hotpot_setting
    elif name == "text":
        options["cut"] = text_cut
    records, divide = _find(task, split, source, config, text_cut or TextCut())
    examples: Iterable[Example] = _read(task, records, options, source or str(task.hub_id))
    if divide:
        logger.info("%s names no split: its documents are divided by hash", source)
        train, held_out = hold_out(list(examples))
        examples = held_out if split == "validation" else train
    chosen = draw_examples(examples, limit, seed)
    if not chosen:
        raise ValueError(f"{source or task.hub_id} holds no example of {name} in split {split!r}: give another source")
    logger.info("%s, %s: %d examples", name, split, len(chosen))
    return chosen


def has_split(name: str, split: str, source: str | None = None) -> bool:
    """Whether `load_task` finds this split; of another Hub data set than the task's own, whether the task's has it."""
    task = TASKS[name]
    path = None if source is None else local_path(source)
    if task.builtin is not None and source == task.builtin[0]:
        return True
    if path is None:
        return source in BUILTIN_CORPORA or split in (task.splits or {})
    try:
        _choose(path, split)
    except ValueError:
        return False
    return True


def hold_out(examples: Sequence[Example], fraction: float = HELD_OUT_FRACTION) -> tuple[list[Example], list[Example]]:
    """Divide examples by document: those whose document's hash falls into `fraction` are held out, or the one document
    nearest to it where none does. The order of the examples changes nothing.

    Returns:
        (others, held out)

    Raises:
        ValueError: fewer than two documents, or nothing left to train on.
    """
    positions = {document: hash_position(document) for document in {example.document for example in examples}}
    nearest = min(positions.values(), default=0.0)
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        position = positions[example.document]
        sides[position < fraction or position == nearest].append(example)
    if not all(sides):
        raise ValueError(
            f"{len(positions)} documents cannot be divided into two sides ({fraction:.0%} held out): give more, or "
            "name the file of each split (train.jsonl, valid.jsonl), or take split 'all'"
        )
    return sides


@dataclass(frozen=True)
class _Record:
    place: str  # for error messages
    id: str  # where the record has none of its own
    content: Any


def _find(
    task: Task, split: str, source: str | None, config: str | None, cut: TextCut
) -> tuple[Iterator[_Record], bool]:
    """(records, whether they are still to be divided)"""
    if source in BUILTIN_CORPORA and task.name == "text":
        return _documents(source, split, None, cut), _needs_division(source, split)
    if task.builtin is not None and source == task.builtin[0]:
        made = enumerate(task.builtin[1](split))
        return (_Record(f"{source}, {split} {number}", f"{split}-{number}", row) for number, row in made), False
    path = None if source is None else local_path(source)
    if path is None:
        hub_id = source or task.hub_id
        if hub_id is None:
            raise ValueError(f"the task {task.name} has no data of its own: give a source")
        known = task.splits or {}
        if source is None and split not in known:
            raise ValueError(
                f"{hub_id} has no split {split!r} with answers: take {' or '.join(known)}, or divide one with hold_out"
            )
        if source is None and config is not None:
            raise ValueError(
                f"config ({config!r}) is for another Hub data set: give its id as source, or leave it out"
            )
        split = known.get(split, split)
        config = task.config if source is None else config
        if task.name == "text":
            return _documents(hub_id, split, config, cut), False
        return _hub_records(hub_id, config, split), False
    if config is not None:
        raise ValueError(f"config ({config!r}) is for Hub data sets, and {source} is here: leave it out")
    parts, divide = _choose(path, split)
    if task.name == "text":
        return (record for part in parts for record in _documents(str(part), split, None, cut)), divide
    return (record for part in parts for record in _lines(part)), divide


def _needs_division(source: str, split: str) -> bool:
    if split not in ("train", "validation", "all"):
        raise ValueError(
            f"{source} names no split, so there is no {split!r}: take 'train' or 'validation' (a share of its "
            "documents) or 'all'"
        )
    return split != "all"


def _choose(path: Path, split: str) -> tuple[list[Path], bool]:
    """(what holds the split, whether it is still to be divided)"""
    if split not in (*SPLIT_NAMES.values(), "all"):
        raise ValueError(f"unknown split {split!r}: take train, validation, test or all")
    if split == "all":
        return [path], False
    named: dict[str, list[Path]] = {}
    for child in sorted(path.iterdir()) if path.is_dir() else []:
        if found := _split_of(child):
            named.setdefault(found, []).append(child)
    if len(named) < 2 and (own := _split_of(path)):  # a book called "Train ..." in the folder train is no split
        named = {own: [path]}
    if not named:
        return [path], _needs_division(str(path), split)
    if split not in named:
        raise ValueError(
            f"{path} holds {' and '.join(sorted(named))} by its names, not {split}: give what holds it, or take "
            "split 'all'"
        )
    return named[split], False


def _split_of(path: Path) -> str | None:
    name = path.name.lower()
    if path.is_dir():
        return SPLIT_NAMES.get(name)
    return SPLIT_NAMES.get(re.split(r"[._-]", name)[0]) if path.suffix.lower() in SPLIT_SUFFIXES else None


def _jsonl_files(path: Path) -> list[Path]:
    if path.is_file():
        if not is_jsonl(path.name):
            raise ValueError(f"{path} is no JSONL file: write one JSON object a line and name the file .jsonl")
        return [path]
    files = sorted(file for file in path.rglob("*") if is_jsonl(file.name) and not file.name.startswith("."))
    if not files:
        raise ValueError(f"no .jsonl file in the folder {path}: give the folder or the file that holds the records")
    return files


def _lines(part: Path) -> Iterator[_Record]:
    for file in _jsonl_files(part):
        name = file.relative_to(part.parent).with_suffix("").as_posix()
        for number, row in read_jsonl(str(file)):
            yield _Record(f"{file}:{number}", f"{name}-{number}", row)


def _hub_records(name: str, config: str | None, split: str) -> Iterator[_Record]:
    for index, row in enumerate(load_hub_split(name, config, split)):
        yield _Record(f"{name}, split {split}, row {index}", f"{split}-{index}", row)


def _documents(source: str, split: str, config: str | None, cut: TextCut) -> Iterator[_Record]:
    args = DataArguments(data=source, split=split, dataset_config=config, text_field=cut.text_field)
    for number, (key, text) in enumerate(read_documents(args), start=1):
        content = {"document": key, cut.text_field: text}
        yield _Record(f"{source}, document {number}", f"{Path(source).stem}-{number}", content)


def _read(task: Task, records: Iterable[_Record], options: dict[str, Any], source: str) -> Iterator[Example]:
    seen: set[str] = set()
    skipped: Counter[str] = Counter()
    for record in records:
        try:
            entries = task.read(record.content, **options)
        except ValueError as error:
            raise ValueError(f"{record.place}: {error}") from error
        for place, entry in enumerate(entries):
            if isinstance(entry, Skipped):
                skipped[entry.reason] += 1
                continue
            if not entry.id:
                entry = replace(entry, id=record.id if len(entries) == 1 else f"{record.id}.{place}")
            if entry.id in seen:
                raise ValueError(
                    f"{record.place}: field 'id': {entry.id!r} is there twice: mend it, or give one file only"
                )
            seen.add(entry.id)
            yield entry
    for reason, count in skipped.items():
        logger.warning("%s, task %s: %d left out (%s), %d kept", source, task.name, count, reason, len(seen))


def draw_examples(examples: Iterable[Example], limit: int | None, seed: int) -> list[Example]:
    """So many examples, drawn as `load_task` draws them; None: all."""
    if limit is None:
        return list(examples)

    def rank(item: tuple[int, Example]) -> bytes:
        return hashlib.blake2b(f"{seed}:{item[1].id}".encode(), digest_size=16).digest()

    # holds `limit` examples at a time: the contexts of a whole HotpotQA are half a gigabyte
    return [example for _, example in sorted(heapq.nsmallest(limit, enumerate(examples), key=rank))]
