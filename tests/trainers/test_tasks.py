import json
import logging
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trainers.tasks import TASKS, Example, TextCut, cut_text, hold_out, load_task


ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "tasks"
DATA = Path(os.environ.get("LATENTFORGE_DATA", ROOT.parent / "shared" / "data"))
needs_data = pytest.mark.skipif(
    not (DATA / "squad_v1.1").is_dir(), reason=f"the local data sets are not in {DATA}: set LATENTFORGE_DATA"
)
WORDS = "the quick brown fox jumps over one lazy dog and naps "


def write(path: Path, *rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def paragraph(**changes):
    qas = [{"id": "q0", "question": "Who naps?", "answers": [{"text": "the fox", "answer_start": 0}]}]
    return {"title": "Fox", "context": WORDS, "qas": qas, **changes}


def custom(count: int, document: str = "d{}"):
    return [
        {"context": f"text {i}", "answer": "yes", "id": str(i), "document": document.format(i)} for i in range(count)
    ]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """Stands in for the Hub; `hub.calls` are (id, configuration, split)."""

    class Hub:
        calls: list = []
        rows: list = []

        def load_dataset(self, name, config, split, **_):
            self.calls.append((name, config, split))
            return datasets.Dataset.from_list(self.rows)

    hub = Hub()
    hub.calls = []
    monkeypatch.setattr("trainers.data.datasets.load_dataset", hub.load_dataset)
    return hub


@pytest.fixture(scope="module")
def tokenizer():
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [WORDS], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


# -- the local data sets, against the counts of their README


@needs_data
@pytest.mark.parametrize(
    ("name", "split", "questions", "documents"),
    [("squad", "validation", 7807, 36), ("squad", "train", 11877, 44), ("gsm8k", "test", 789, 789)],
)
def test_every_question_of_the_local_files_is_there(name: str, split: str, questions: int, documents: int):
    """A loader that loses the questions it cannot read scores only the easy ones."""
    folder = {"squad": "squad_v1.1"}.get(name, name)
    examples = load_task(name, split, str(DATA / folder))
    assert len(examples) == len({example.id for example in examples}) == questions
    assert len({example.document for example in examples}) == documents


@needs_data
def test_the_squad_question_is_text_and_the_context_is_the_paragraph_alone():
    """A question inside the compressed text is cut off or blurred, and the receiver answers something else."""
    record = lines(DATA / "squad_v1.1" / "dev_a.jsonl")[0]
    example = TASKS["squad"].parse(record)[0]
    assert (example.context, example.prompt) == (record["context"], "Question: When did the 1973 oil crisis begin?")
    assert (example.id, example.document) == ("5725b33f6a3fe71400b8952d", "1973_oil_crisis")
    assert example.answers == ("October 1973", "October", "1973")  # all that were given, the first one first


@needs_data
def test_hotpotqa_leaves_out_questions_whose_gold_was_not_retrieved_and_says_how_many(caplog):
    """Without the gold paragraph only a guess can be right, and every method would be graded on guesses."""
    file = str(DATA / "hotpotqa" / "dev_fullwiki_sample.jsonl")
    with caplog.at_level(logging.WARNING, "trainers.tasks"):
        assert len(load_task("hotpotqa", "validation", file)) == 106
    assert "231 left out (gold sentences not in the context), 106 kept" in caplog.text
    has_gold = {record["id"] for record in lines(Path(file)) if record["gold_in_context"]}
    assert {example.id for example in load_task("hotpotqa", "validation", file)} == has_gold


@needs_data
def test_the_oracle_reads_gold_sentences_only_and_the_distractor_setting_reads_all():
    """A figure with gold sentences picked out beforehand is not a reading figure, and must not pass for one."""
    file = DATA / "hotpotqa" / "train_distractor_sample.jsonl"
    record = lines(file)[0]
    titles = [entry["title"] for entry in record["context"]]
    (full,) = TASKS["hotpotqa"].parse(record)
    (oracle,) = TASKS["hotpotqa"].parse(record, setting="oracle")
    assert [line.split(": ")[0] for line in full.context.split("\n")] == titles
    assert [line.split(": ")[0] for line in oracle.context.split("\n")] == [
        "Michael Jackson (writer)",
        "Lucy Saunders",
    ]
    gold = {(fact["title"], fact["sent_id"]) for fact in record["supporting_facts"]}
    for entry in record["context"]:
        for place, sentence in enumerate(entry["sentences"]):
            assert (sentence.strip() in oracle.context) == ((entry["title"], place) in gold)
    assert len(load_task("hotpotqa", "train", str(file))) == 200
    assert load_task("hotpotqa", "train", str(file))[0] == full  # distractor is the default


@needs_data
def test_gold_evidence_files_are_refused_without_the_oracle_setting():
    """A file of gold sentences read as the full context would report the upper bound as the result."""
    file = str(DATA / "hotpotqa" / "dev_gold_evidence.jsonl")
    with pytest.raises(ValueError, match=r"dev_gold_evidence.jsonl:1: field 'evidence'.* hotpot_setting='oracle'"):
        load_task("hotpotqa", "validation", file)
    assert len(load_task("hotpotqa", "validation", file, hotpot_setting="oracle")) == 677


@needs_data
def test_books_of_one_split_are_in_no_other():
    """Continuing a book that was trained on measures memory."""
    cut = TextCut(context_tokens=512)
    train = load_task("text", "train", str(DATA / "books"), limit=200, text_cut=cut)
    held_out = load_task("text", "validation", str(DATA / "books"), text_cut=cut)
    assert {example.document for example in held_out} == {path.name for path in (DATA / "books" / "valid").iterdir()}
    assert not {example.document for example in train} & {example.document for example in held_out}
    assert not {example.context for example in train} & {example.context for example in held_out}


# -- the Hub's schemas


@needs_data
def test_hub_and_local_schema_give_the_same_examples(hub):
    """Two readings of one data set: a score here would not be a score there."""
    (local,) = lines(DATA / "squad_v1.1" / "dev_a.jsonl")[:1]
    hub.rows = [
        {
            "id": entry["id"],
            "title": local["title"],
            "context": local["context"],
            "question": entry["question"],
            "answers": {name: [answer[name] for answer in entry["answers"]] for name in ("text", "answer_start")},
        }
        for entry in local["qas"]
    ]
    assert load_task("squad", "validation") == TASKS["squad"].parse(local)
    assert hub.calls == [("rajpurkar/squad", None, "validation")]

    record = lines(DATA / "hotpotqa" / "train_distractor_sample.jsonl")[0]
    columns = {"context": ("title", "sentences"), "supporting_facts": ("title", "sent_id")}
    as_lists = {key: {name: [row[name] for row in record[key]] for name in names} for key, names in columns.items()}
    for setting in ("distractor", "oracle"):
        hub_record = {**record, **as_lists}
        assert TASKS["hotpotqa"].parse(hub_record, setting=setting) == TASKS["hotpotqa"].parse(record, setting=setting)


@pytest.mark.parametrize(
    ("name", "call", "counts", "first"),
    [
        ("sst2", ("stanfordnlp/sst2", None, "train"), {"negative": 4, "positive": 4}, "positive"),
        (
            "agnews",
            ("fancyzhx/ag_news", None, "train"),
            {"world": 2, "sports": 2, "business": 2, "science": 2},
            "world",
        ),
        (
            "trec",
            ("SetFit/TREC-QC", None, "train"),
            {"ABBR": 1, "ENTY": 1, "DESC": 2, "HUM": 1, "LOC": 1, "NUM": 1},
            "ABBR",
        ),
    ],
)
def test_classes_are_answered_by_their_names(hub, name: str, call: tuple, counts: dict, first: str):
    """Labels in another order than the data set's number every class wrong, and accuracy still looks like a number."""
    hub.rows = lines(FIXTURES / f"{name}.jsonl")
    examples = load_task(name, "train")
    assert hub.calls == [call]
    assert Counter(example.answers for example in examples) == {(label,): count for label, count in counts.items()}
    assert examples[0].answers == (first,)
    assert all(example.labels == TASKS[name].labels and example.context == example.document for example in examples)
    assert all(label in example.prompt for example in examples for label in counts)
    assert load_task(name, "all", str(FIXTURES / f"{name}.jsonl"))[0].context == examples[0].context
    assert TASKS[name].metric == "accuracy"


def test_hub_names_are_those_of_the_notes():
    """A mistyped id shows only on a machine with a network, long after this was written."""
    named = {name: (task.hub_id, task.config) for name, task in TASKS.items()}
    assert named == {
        "squad": ("rajpurkar/squad", None),
        "hotpotqa": ("hotpotqa/hotpot_qa", "distractor"),
        "sst2": ("stanfordnlp/sst2", None),
        "agnews": ("fancyzhx/ag_news", None),
        "trec": ("SetFit/TREC-QC", None),
        "gsm8k": ("openai/gsm8k", "main"),
        "reasoning": ("openai/gsm8k", "main"),
        "samsum": ("knkarthick/samsum", None),
        "dialogsum": ("knkarthick/dialogsum", None),
        "text": ("roneneldan/TinyStories", None),
        "custom": (None, None),
    }


def test_another_hub_id_keeps_its_own_splits_and_configuration(hub):
    """The defaults of one data set sent to another load the wrong part of it, or nothing."""
    hub.rows = [{"question": "1 + 1?", "answer": "It is two.\n#### 2"}]
    load_task("gsm8k", "test")
    load_task("gsm8k", "hard", "someone/more_problems", config="v2")
    assert hub.calls == [("openai/gsm8k", "main", "test"), ("someone/more_problems", "v2", "hard")]


# -- subsets and splits


def test_a_subset_depends_on_seed_and_ids_alone(tmp_path: Path):
    """A subset drawn anew on each machine makes two runs incomparable, and no test pairs them."""
    rows = custom(200)
    file = str(write(tmp_path / "train.jsonl", *rows))
    ids = [example.id for example in load_task("custom", "train", file, limit=20, seed=42)]
    assert ids[:5] == ["1", "16", "32", "40", "46"]  # golden: hashes, no machine's random numbers
    assert len(set(ids)) == 20 and ids == sorted(ids, key=int)
    assert set(ids) > {example.id for example in load_task("custom", "train", file, limit=7, seed=42)}
    assert ids != [example.id for example in load_task("custom", "train", file, limit=20, seed=43)]
    write(tmp_path / "train.jsonl", *reversed(rows))
    assert {example.id for example in load_task("custom", "train", file, limit=20, seed=42)} == set(ids)
    assert len(load_task("custom", "train", file, limit=999)) == 200


def test_a_source_without_splits_is_divided_by_document(tmp_path: Path):
    """Questions on one article on both sides: the held-out score rewards remembering the article."""
    rows = [{**row, "id": f"{row['id']}.{copy}"} for row in custom(100) for copy in range(3)]
    file = str(write(tmp_path / "mine.jsonl", *rows))
    train, held_out = (load_task("custom", split, file) for split in ("train", "validation"))
    assert len(train) + len(held_out) == 300 and 3 <= len(held_out) <= 45
    assert not {example.document for example in train} & {example.document for example in held_out}
    assert len(load_task("custom", "all", file)) == 300
    with pytest.raises(ValueError, match="mine.jsonl names no split, so there is no 'test': take 'train' or"):
        load_task("custom", "test", file)


def test_hold_out_keeps_documents_whole_and_never_leaves_a_side_empty():
    """A held-out side without an example ends a training at its first evaluation."""
    examples = [Example("text", "", ("a",), str(i), f"d{i % 4}") for i in range(40)]
    train, held_out = hold_out(examples, 1e-9)
    assert len(train) == 30 and len(held_out) == 10
    assert {example.document for example in hold_out(examples[::-1], 1e-9)[1]} == {held_out[0].document}
    with pytest.raises(ValueError, match="1 documents cannot be divided"):
        hold_out(examples[:1])


def test_names_say_which_split_a_file_is(tmp_path: Path):
    """Training on the file that is called dev, because it was the one there."""
    write(tmp_path / "train_a.jsonl", *custom(3))
    write(tmp_path / "train-b.jsonl", *custom(2, "e{}")).write_text('{"context": "c", "answer": "b", "id": "b0"}\n')
    write(tmp_path / "dev.jsonl", {"context": "c", "answer": "dev"})
    write(tmp_path / "notes.jsonl", "not JSON at all")
    assert [example.answers for example in load_task("custom", "validation", str(tmp_path))] == [("dev",)]
    assert [example.id for example in load_task("custom", "train", str(tmp_path))] == ["b0", "0", "1", "2"]
    with pytest.raises(ValueError, match="holds train and validation by its names, not test"):
        load_task("custom", "test", str(tmp_path))
    with pytest.raises(ValueError, match="dev.jsonl holds validation by its names, not train"):
        load_task("custom", "train", str(tmp_path / "dev.jsonl"))


# -- what is refused, and what is left out


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("squad", "{", "not a line of JSON"),
        ("squad", "[1]", r"a record must be an object, got \[1\]"),
        ("squad", paragraph(title=3), "field 'title' must be a string, got 3: mend the line"),
        (
            "squad",
            {"title": "Fox", "context": WORDS},
            "no field 'question', found fields .*squad reads title, context",
        ),
        ("squad", paragraph(qas=[{"question": "Who?"}]), "no field 'answers', found fields"),
        ("squad", paragraph(qas=[{"question": "Who?", "answers": [{"text": " "}]}]), "'answers.text' is empty: mend"),
        (
            "squad",
            paragraph(qas=[{"question": "Who?", "answers": ["fox"]}]),
            r"'answers' must be a list.*got \['fox'\]",
        ),
        (
            "hotpotqa",
            {"question": "Who?", "answer": "fox", "context": [["A", ["b"]]]},
            "'context' must be a list of obj",
        ),
        ("sst2", {"sentence": "fine", "label": 2}, "'label' must be one of negative, positive or its number.*got 2"),
        ("sst2", {"sentence": "fine", "label": True}, "'label' must be one of .*got True"),
        ("trec", {"text": "Who?", "label_coarse": 3}, "no field 'label_coarse_original'"),
        ("gsm8k", {"question": "1 + 1?", "answer": "2"}, "field 'answer' must end in '#### ' and the result, got '2'"),
        ("custom", {"context": "c", "answers": []}, r"an answer is missing or empty in \(\): mend the record"),
        ("custom", {"context": "c", "answer": "d", "labels": ["a", "b"]}, "answer 'd' is none of the labels a, b"),
        ("custom", {"context": " ", "answer": "d"}, r"the context is empty \(' '\)"),
        ("text", {"content": "x"}, "no field 'text', found fields .*: set text_field"),
    ],
)
def test_a_broken_record_is_named_by_file_line_field_and_value(tmp_path: Path, name: str, row, message: str):
    """Dropped in silence it changes the score; named without its line it costs an afternoon."""
    good = {"text": "fine"} if name == "text" else None
    file = write(tmp_path / "train.jsonl", *([good] if good else []), row)
    with pytest.raises(ValueError, match=rf"train.jsonl:{2 if good else 1}: .*{message}"):
        load_task(name, "train", str(file))


def test_unanswerable_records_are_left_out_and_counted(tmp_path: Path, hub, caplog):
    """Left out in silence, a data set shrinks to what suits the loader."""
    impossible = {"question": "Why?", "id": "q1", "is_impossible": True, "answers": []}
    file = write(tmp_path / "train.jsonl", paragraph(qas=[impossible, *paragraph()["qas"]]))
    with caplog.at_level(logging.WARNING, "trainers.tasks"):
        assert [example.id for example in load_task("squad", "train", str(file))] == ["q0"]
    assert "train.jsonl, task squad: 1 left out (no answer), 1 kept" in caplog.text
    hub.rows = [{"sentence": "a film", "label": -1, "idx": 0}]
    with pytest.raises(ValueError, match="stanfordnlp/sst2 holds no example of sst2 in split 'validation'"):
        load_task("sst2", "validation")


def test_an_id_that_comes_twice_is_refused(tmp_path: Path):
    """Paired tests match two methods by id: a doubled one matches the answer to another question."""
    file = write(tmp_path / "train.jsonl", *custom(2), *custom(1))
    with pytest.raises(ValueError, match=r"train.jsonl:3: field 'id': '0' is there twice"):
        load_task("custom", "train", str(file))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"name": "squadd", "split": "train"}, "unknown task 'squadd': there are squad, hotpotqa, sst2"),
        ({"name": "sst2", "split": "test"}, "stanfordnlp/sst2 has no split 'test' with answers: take train or valid"),
        ({"name": "custom", "split": "train"}, "the task custom has no data of its own: give a source"),
        ({"name": "squad", "split": "dev", "source": str(FIXTURES)}, "unknown split 'dev': take train, validation"),
        ({"name": "squad", "split": "train", "hotpot_setting": "oracle"}, "is for hotpotqa, not for squad"),
        ({"name": "hotpotqa", "split": "train", "hotpot_setting": "gold"}, "must be 'distractor' or 'oracle', got"),
        ({"name": "squad", "split": "train", "text_cut": TextCut()}, "text_cut is for the task text, not for squad"),
        ({"name": "squad", "split": "train", "limit": 0}, "limit must be >= 1, got 0"),
        ({"name": "squad", "split": "train", "config": "x"}, "is for another Hub data set: give its id as source"),
        (
            {"name": "sst2", "split": "all", "source": str(FIXTURES), "config": "x"},
            "is for Hub data sets, and .* is here",
        ),
        (
            {"name": "squad", "split": "all", "source": str(ROOT / "README.md")},
            "is no JSONL file: write one JSON object",
        ),
    ],
)
def test_a_wrong_call_is_refused_before_anything_is_read(call: dict, message: str):
    """A setting that is ignored gives a figure under the wrong name."""
    with pytest.raises(ValueError, match=message):
        load_task(**call)


def test_a_path_that_is_not_there_is_no_hub_id():
    """A mistyped file name sent to the Hub comes back as a network error."""
    with pytest.raises(FileNotFoundError, match="no file or folder './nowhere.jsonl'"):
        load_task("squad", "train", "./nowhere.jsonl")


# -- plain text


@pytest.mark.parametrize("by_tokens", [False, True])
@pytest.mark.parametrize("mode", ["continue", "reconstruct"])
def test_windows_tile_the_document(tokenizer, by_tokens: bool, mode: str):
    """A gap or an overlap between context and answer asks for text that nobody sent, or that was given."""
    text = WORDS * 8 + "naïve 日本語\n\n" + WORDS * 8
    cut = TextCut(mode=mode, context_tokens=20, answer_tokens=5, tokenizer=tokenizer if by_tokens else None)
    examples = list(cut_text(text, "fox", cut))
    parts = [part for example in examples for part in (example.context, *example.answers)]
    joined = "".join(parts if mode == "continue" else parts[::2])
    assert len(examples) > 5 and text.startswith(joined) and len(text) - len(joined) < 120
    assert all(example.document == "fox" and example.prompt == "" for example in examples)
    if mode == "reconstruct":
        assert all(example.answers == (example.context,) for example in examples)
    if not by_tokens:
        assert all(part[0].isspace() and not part[-1].isspace() for part in parts[2:10])  # words stay whole
    else:
        ids = [len(tokenizer(part)["input_ids"]) for part in parts[:8]]
        assert ids == ([20, 5] * 4 if mode == "continue" else [20] * 8)


def test_a_text_without_spaces_still_makes_windows():
    """Looking back for a space that is not there would end in windows of one character, or in none."""
    examples = list(cut_text("a " + "x" * 2000, "x", TextCut(context_tokens=32, answer_tokens=8)))
    assert {len(example.context) for example in examples} == {128}


def test_short_documents_are_counted(tmp_path: Path, caplog):
    """A corpus of short texts that yields one window in ten would pass for the corpus."""
    file = write(tmp_path / "train.txt", WORDS * 20, "<|endoftext|>", "too short")
    with caplog.at_level(logging.WARNING, "trainers.tasks"):
        examples = load_task("text", "train", str(file))
    assert "1 left out (documents shorter than a window), 1 kept" in caplog.text
    assert replace(examples[0], context="c", answers=("a",), document="d") == Example("c", "", ("a",), "train-1", "d")


def test_cut_text_refuses_what_it_cannot_do(tokenizer):
    """A slow tokenizer gives no offsets, and windows guessed from ids are not the text."""
    with pytest.raises(ValueError, match="mode must be 'continue' or 'reconstruct', got 'copy'"):
        TextCut(mode="copy")
    with pytest.raises(ValueError, match="answer_tokens must be >= 1, got 0"):
        TextCut(answer_tokens=0)

    class Slow:
        is_fast, name_or_path = False, "slow"

    with pytest.raises(ValueError, match="'slow' does not know where its tokens lie"):
        TextCut(tokenizer=Slow())
