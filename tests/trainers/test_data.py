import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

import trainers.data as data_module
from trainers.data import DataArguments, PatchCollator, load_blocks, load_texts
from trainers.streaming import PackedStream


K = 4
BLOCK = 64


@pytest.fixture(scope="module")
def texts():
    """Real text in 40 documents: the docstrings and code of this Python's own modules."""
    folder = Path(json.__file__).parent
    source = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py")))
    size = 900
    return [source[start : start + size] for start in range(0, 40 * size, size)]


@pytest.fixture(scope="module")
def tokenizer(texts):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>", pad_token="<|pad|>")


@pytest.fixture
def jsonl(texts, tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def arguments(data, tmp_path, **kwargs):
    return DataArguments(data=str(data), block_size=BLOCK, cache_dir=str(tmp_path / "cache"), **kwargs)


def columns(dataset):
    rows = list(dataset)
    return {name: np.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask", "labels")}


def decoded_documents(dataset, tokenizer):
    """The documents that lie in the blocks, each checked to end with EOS."""
    flat = {name: values.reshape(-1) for name, values in columns(dataset).items()}
    ids = flat["input_ids"][flat["attention_mask"] == 1]
    *documents, rest = np.split(ids, np.flatnonzero(ids == tokenizer.eos_token_id) + 1)
    assert len(rest) == 0
    return [tokenizer.decode(document[:-1], clean_up_tokenization_spaces=False) for document in documents]


def same(left, right):
    left, right = columns(left), columns(right)
    return all(np.array_equal(left[name], right[name]) for name in left)


# -- packing


def test_blocks_tile_the_documents_exactly(jsonl, texts, tokenizer, tmp_path):
    """A lost, doubled or moved token at a block border would be learned by every model, and seen by no loss."""
    train, held_out = load_blocks(arguments(jsonl, tmp_path), tokenizer, K, seed=0)
    in_train, in_held_out = decoded_documents(train, tokenizer), decoded_documents(held_out, tokenizer)
    assert in_train == [text for text in texts if text in in_train]
    assert sorted(in_train + in_held_out) == sorted(texts)


def test_pads_are_masked_and_never_a_label(jsonl, tokenizer, tmp_path):
    """A pad that is attended to or learned teaches a model a token that no text holds."""
    train, _ = load_blocks(arguments(jsonl, tmp_path), tokenizer, K, seed=0)
    assert train.column_names == ["input_ids", "attention_mask", "labels"]
    block = columns(train)
    assert block["input_ids"].shape == block["labels"].shape == (len(train), BLOCK)
    real = block["attention_mask"] == 1
    assert set(np.unique(block["attention_mask"])) == {0, 1}
    # nothing predicts the first token of a row, whether pads stand before it or not
    unpredicted = np.zeros_like(real)
    for row in np.flatnonzero(~real[:, 0]):
        unpredicted[row, real[row].argmax()] = True
    assert unpredicted.any()
    assert np.array_equal(block["labels"][real & ~unpredicted], block["input_ids"][real & ~unpredicted])
    assert (block["labels"][unpredicted] == -100).all()
    assert (block["labels"][~real] == -100).all()
    assert (block["input_ids"][~real] == tokenizer.pad_token_id).all()
    assert (block["labels"] == tokenizer.eos_token_id).sum() > 30  # the ends of documents are learned


def test_documents_begin_at_every_place_of_a_patch(tmp_path, tokenizer):
    """Without a random phase a parallel decoder only ever sees a document's words at one place of the patch grid."""
    packing = data_module._Packing.of(tokenizer, BLOCK, K, seed=3)
    counts = np.bincount([packing.phase(document) for document in range(4000)], minlength=K)
    assert len(counts) == K
    assert (abs(counts - 1000) < 150).all()
    other = data_module._Packing.of(tokenizer, BLOCK, K, seed=4)
    assert [packing.phase(d) for d in range(50)] != [other.phase(d) for d in range(50)]
    word = np.arange(5, 9, dtype=np.int32)
    (block,) = packing.rows((word, document, True) for document in range(4))
    starts = [place for place in range(BLOCK) if block["input_ids"][0, place] == 5]
    expected, place = [], 0
    for document in range(4):
        expected.append(place + packing.phase(document))
        place = expected[-1] + len(word) + 1
    assert starts == expected


def test_same_seed_same_blocks_and_another_seed_others(jsonl, tokenizer, tmp_path):
    """Two models can only be compared on the same blocks."""
    first, _ = load_blocks(arguments(jsonl, tmp_path / "1"), tokenizer, K, seed=1)
    second, _ = load_blocks(arguments(jsonl, tmp_path / "2"), tokenizer, K, seed=1)
    other, _ = load_blocks(arguments(jsonl, tmp_path / "1"), tokenizer, K, seed=2)
    assert same(first, second)
    assert not np.array_equal(columns(first)["input_ids"][:8], columns(other)["input_ids"][:8])


def test_patch_size_one_has_no_pads_but_the_last(jsonl, tokenizer, tmp_path):
    """A token LM has no patch grid: phases would only cost it places."""
    train, _ = load_blocks(arguments(jsonl, tmp_path), tokenizer, 1, seed=0)
    mask = columns(train)["attention_mask"].reshape(-1)
    assert mask[: mask.sum()].all()
    assert len(mask) - mask.sum() < BLOCK


def test_long_documents_are_cut_into_pieces_without_a_trace(texts, tokenizer, tmp_path, monkeypatch):
    """A book is tokenised in pieces; an EOS, a phase or a lost line at their borders would be a false end of text."""
    monkeypatch.setattr(data_module, "PIECE_CHARACTERS", 1000)
    book = "".join(texts)
    path = tmp_path / "book.txt"
    path.write_text(book, encoding="utf-8", newline="")
    train, held_out = load_blocks(arguments(path, tmp_path), tokenizer, K, seed=0)
    (start,), (end,) = decoded_documents(train, tokenizer), decoded_documents(held_out, tokenizer)
    assert start + end == book
    assert 0.04 * len(book) < len(end) < 0.08 * len(book)
    assert start.endswith("\n")


def test_a_cap_keeps_the_first_blocks_and_reads_little_more(jsonl, texts, tokenizer, tmp_path, monkeypatch):
    """A quick run must not tokenise a large corpus, and must see what the long run sees first."""
    plain = arguments(jsonl, tmp_path)
    whole, whole_held_out = load_blocks(plain, tokenizer, K, seed=0)
    seen = []
    tokenise = data_module._tokenise
    monkeypatch.setattr(data_module, "_tokenise", lambda t, texts: seen.extend(texts) or tokenise(t, texts))
    capped = replace(plain, cache_dir=str(tmp_path / "other"), max_train_tokens=1000, max_eval_tokens=100)
    train, held_out = load_blocks(capped, tokenizer, K, seed=0)
    assert (len(train), len(held_out)) == (15, 1)
    assert same(train, whole.select(range(15)))
    assert same(held_out, whole_held_out.select(range(1)))
    assert len("".join(seen)) < len("".join(texts)) / 2
    too_few_characters = [text[:40] for text in texts]  # the first guess of what to read falls short and is repeated
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in too_few_characters), encoding="utf-8")
    monkeypatch.setattr(data_module, "_count_pieces", lambda pieces, characters: min(len(pieces), characters // 2500))
    train, _ = load_blocks(replace(plain, max_train_tokens=320), tokenizer, K, seed=0)
    assert len(train) == 5 and columns(train)["attention_mask"][-1, -1] == 1


def test_a_cap_below_one_block_is_refused():
    """It would train on nothing."""
    with pytest.raises(ValueError, match="max_train_tokens .10. must hold at least one block"):
        DataArguments(block_size=64, max_train_tokens=10)


# -- cache and processes


def test_the_second_call_tokenises_nothing(jsonl, tokenizer, tmp_path, monkeypatch):
    """Tokenising a corpus again at every start costs hours on a large one."""
    args = arguments(jsonl, tmp_path)
    first, _ = load_blocks(args, tokenizer, K, seed=0)
    tokenizer(
        ["padding and truncation change"], padding=True, truncation=True, max_length=8
    )  # ... the backend's state

    def refuse(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(data_module, "_tokenise", refuse)
    second, _ = load_blocks(args, tokenizer, K, seed=0)
    assert same(first, second)
    load_blocks(args, tokenizer, 2 * K, seed=5)  # tokens do not depend on the patches
    monkeypatch.setattr(data_module._Packing, "rows", refuse)
    load_blocks(args, tokenizer, K, seed=0)
    with pytest.raises(AssertionError):
        load_blocks(args, tokenizer, K, seed=1)


def test_a_changed_text_or_tokenizer_misses_the_cache(jsonl, texts, tokenizer, tmp_path):
    """A stale cache trains on text that is no longer there."""
    args = arguments(jsonl, tmp_path)
    before, _ = load_blocks(args, tokenizer, K, seed=0)
    jsonl.write_text(jsonl.read_text(encoding="utf-8").replace("JSON", "JASON"), encoding="utf-8")
    changed_text, _ = load_blocks(args, tokenizer, K, seed=0)
    assert "JASON" in "".join(decoded_documents(changed_text, tokenizer))
    other = PreTrainedTokenizerFast.from_pretrained(save(tokenizer, tmp_path))
    other.add_tokens(["JASONDecoder"])
    changed_tokenizer, _ = load_blocks(args, other, K, seed=0)
    assert (columns(changed_tokenizer)["input_ids"] == len(other) - 1).any()


def save(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_two_processes_make_the_same_blocks(jsonl, tokenizer, tmp_path):
    """A result must not depend on the machine's number of cores."""
    one, _ = load_blocks(arguments(jsonl, tmp_path / "1"), tokenizer, K, seed=0)
    two, _ = load_blocks(arguments(jsonl, tmp_path / "2", num_proc=2), tokenizer, K, seed=0)
    assert same(one, two)


# -- sources


def test_text_file_separators_part_documents(texts, tokenizer, tmp_path):
    """Without them a file of stories is one document, and no story ever ends."""
    stories = [text.strip("\n") for text in texts[:30]]
    path = tmp_path / "stories.txt"
    path.write_text("\n<|endoftext|>\n".join(stories) + "\n<|endoftext|>\n", encoding="utf-8")
    train, held_out = load_blocks(arguments(path, tmp_path), tokenizer, K, seed=0)
    found = decoded_documents(train, tokenizer) + decoded_documents(held_out, tokenizer)
    assert sorted(found) == sorted(stories)


def test_line_ends_and_any_unicode_survive(tokenizer, tmp_path):
    """A reader that rewrites \\r\\n or loses a character makes text that round trips nowhere."""
    text = "caf\u00e9 \r\n\u4f60\u597d\U0001f600\tx\n" * 60
    path = tmp_path / "t.txt"
    path.write_bytes(text.encode())
    train, held_out = load_texts(arguments(path, tmp_path))
    assert "".join(train["text"]) + "".join(held_out["text"]) == text


def test_folder_takes_its_text_files_recursively(texts, tmp_path):
    """A folder is the usual form of a corpus; hidden files and other kinds are not text to learn."""
    folder = tmp_path / "folder"
    for index, text in enumerate(texts[:24]):
        path = folder / f"part{index % 3}" / f"{index}{('.txt', '.md', '.py')[index % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")
    (folder / "more.jsonl").write_text('{"text": "one line"}\n\n{"text": "another"}\n', encoding="utf-8")
    (folder / "image.png").write_bytes(b"\xff\xfe")
    (folder / ".git").mkdir()
    (folder / ".git" / "config.txt").write_text("hidden", encoding="utf-8")
    train, held_out = load_texts(arguments(folder, tmp_path))
    assert sorted([*train["text"], *held_out["text"]]) == sorted([*texts[:24], "one line", "another"])
    again, _ = load_texts(arguments(folder, tmp_path / "elsewhere"))
    assert train["text"][:] == again["text"][:]


def test_explicit_held_out_text_leaves_the_training_text_whole(texts, tokenizer, tmp_path):
    """Text that nobody evaluates on must not be taken from training."""
    for name, part in (("train", texts[:3]), ("valid", texts[3:5])):
        (tmp_path / name).mkdir()
        for index, text in enumerate(part):
            (tmp_path / name / f"{index}.txt").write_text(text, encoding="utf-8", newline="")
    args = arguments(tmp_path / "train", tmp_path, eval_data=str(tmp_path / "valid"))
    train, held_out = load_blocks(args, tokenizer, K, seed=0)
    assert sorted(decoded_documents(train, tokenizer)) == sorted(texts[:3])
    assert sorted(decoded_documents(held_out, tokenizer)) == sorted(texts[3:5])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut off', ":3: not a line of JSON"),
        ('{"body": "x", "id": 1}', r":3: no field 'text', found fields \['body', 'id'\]: set text_field"),
        ('{"text": 17}', ":3: field 'text' must be a string, got 17"),
        ("[1]", ":3: no field 'text', found a list"),
        ('{"text": "half an emoji \\ud83d"}', ":3: field 'text' cannot be written as UTF-8"),
        ('{"text": "x", "id": ' + "9" * 5000 + "}", ":3: not a line of JSON"),
        ("[" * 100_000, ":3: not a line of JSON"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_line_is_named_by_file_and_number(line, message, streaming, tokenizer, tmp_path):
    """Line 48210 of a 3 GB file cannot be found by eye."""
    path = tmp_path / "broken.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="broken.jsonl" + message):
        load_blocks(arguments(path, tmp_path, streaming=streaming), tokenizer, K, seed=0)


def test_another_text_field_is_read(texts, tmp_path):
    """Most public sets call it something else."""
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts), encoding="utf-8")
    train, held_out = load_texts(arguments(path, tmp_path, text_field="body"))
    assert len(train) + len(held_out) == len(texts)


def test_the_standard_library_is_a_corpus_split_by_file(tmp_path):
    """The demo needs megabytes of real text without a network, and a held-out file must never be in training."""
    args = DataArguments(cache_dir=str(tmp_path))
    train, held_out = load_texts(args)
    assert sum(map(len, train["text"])) > 3_000_000
    assert not set(train["document"]) & set(held_out["document"])
    assert 0.01 < len(set(held_out["document"])) / (train[-1]["document"] + 1) < 0.12
    files = data_module._train_source(args).files
    keys = [key for key, _ in files]
    assert "argparse.py" in keys and "json/decoder.py" in keys
    assert not [key for key in keys if {"site-packages", "test", "tests"} & set(key.split("/")) or "\\" in key]
    # the choice hangs on the relative path alone: the same on every machine, whatever the file says
    positions = [data_module._Document("argparse.py", text).position for text in ("anything", "else")]
    assert positions == pytest.approx([0.339318, 0.339318], abs=1e-6)
    assert sys.prefix not in "".join(keys)


def test_copies_of_a_text_stay_on_one_side(texts, tmp_path):
    """A held-out document whose twin was trained on measures memory."""
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 2), encoding="utf-8")
    train, held_out = load_texts(arguments(path, tmp_path, eval_fraction=0.3))
    assert len(held_out) >= 8 and len(held_out) % 2 == 0
    assert not set(train["text"]) & set(held_out["text"])


def test_some_document_is_always_held_out(texts, tmp_path):
    """With 20 documents and 5 % chance may choose none, and evaluation would be empty."""
    for start in range(0, 20, 5):
        path = tmp_path / f"{start}.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[start : start + 20]), encoding="utf-8")
        train, held_out = load_texts(arguments(path, tmp_path, eval_fraction=0.001))
        assert len(held_out) == 1 and len(train) == 19


# -- refusals


def test_a_block_that_is_no_multiple_of_the_patch_is_refused(jsonl, tokenizer, tmp_path):
    """The last patch of every row would be torn apart; the message must say what to type instead."""
    args = replace(arguments(jsonl, tmp_path), block_size=510)
    with pytest.raises(
        ValueError, match=r"block_size \(510\) must be a multiple of patch_size \(8\): take 504 or 512"
    ):
        load_blocks(args, tokenizer, 8, seed=0)


@pytest.mark.parametrize("content", ["", " \n\n"])
def test_an_empty_corpus_is_refused(content, tokenizer, tmp_path):
    """Training on nothing ends in a division by zero far from its cause."""
    path = tmp_path / "empty.txt"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="empty corpus: .*empty.txt holds no text"):
        load_blocks(arguments(path, tmp_path), tokenizer, K, seed=0)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="empty corpus: no .txt, .md, .py, .jsonl file in the folder"):
        load_blocks(arguments(tmp_path / "folder", tmp_path), tokenizer, K, seed=0)


def test_a_text_too_short_to_hold_a_block_out_is_refused(tokenizer, tmp_path):
    """A held-out figure from ten tokens is noise that looks like a result."""
    path = tmp_path / "short.txt"
    path.write_text("a few words in a line\n" * 20, encoding="utf-8")
    with pytest.raises(
        ValueError, match="do not fill one block: give eval_data, raise eval_fraction, lower block_size"
    ):
        load_blocks(arguments(path, tmp_path), tokenizer, K, seed=0)
    path.write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match="too little text to hold some out"):
        load_texts(arguments(path, tmp_path))


def test_sources_that_are_not_there_are_refused_by_name(tokenizer, tmp_path):
    """A mistyped path must not be looked up on the Hub."""
    for data in (tmp_path / "nope.jsonl", "data/nope.jsonl", "./nope"):
        with pytest.raises(FileNotFoundError, match="nope"):
            load_blocks(arguments(data, tmp_path), tokenizer, K, seed=0)
    with pytest.raises(ValueError, match="unknown built-in corpus 'builtin:ruby': there is builtin:python"):
        load_texts(arguments("builtin:ruby", tmp_path))
    latin = tmp_path / "latin.txt"
    latin.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match="latin.txt is not UTF-8 text"):
        load_texts(arguments(latin, tmp_path))
    with pytest.raises(ValueError, match="eval_split .test. is for Hub datasets"):
        load_texts(arguments(__file__, tmp_path, eval_split="test"))


def test_a_tokenizer_without_eos_is_refused_and_one_without_pad_fills_with_eos(jsonl, tokenizer, tmp_path):
    """Without EOS no document ends; many LLM tokenizers have no pad, and that is no reason to refuse them."""
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="has no EOS token.*set tokenizer.eos_token"):
        load_blocks(arguments(jsonl, tmp_path), bare, K, seed=0)
    bare.eos_token = "<|endoftext|>"
    block = columns(load_blocks(arguments(jsonl, tmp_path), bare, K, seed=0)[0])
    filler = block["attention_mask"] == 0
    assert filler.any() and (block["input_ids"][filler] == bare.eos_token_id).all()
    assert (block["labels"][filler] == -100).all()


@pytest.mark.parametrize(
    "wrong",
    [{"block_size": 0}, {"eval_fraction": 1.0}, {"streaming_shards": 0}, {"shuffle_buffer_size": -1}],
)
def test_impossible_values_are_refused_at_once(wrong):
    """They would fail minutes later, in another place."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DataArguments(**wrong)


# -- Hub


def test_a_hub_set_is_read_by_its_split(texts, tokenizer, tmp_path):
    """A dataset repository (here one on this disk) is read whole and as a stream, in its named splits."""
    repository = tmp_path / "repository"
    repository.mkdir()
    for name, part in (("train", texts[:30]), ("test", texts[30:33])):
        rows = "".join(json.dumps({"text": text}) + "\n" for text in part)
        (repository / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    args = arguments("unused", tmp_path)
    source = data_module._HubSplit(str(repository), None, "test", "text", args.cache_dir, streaming=False)
    assert [document.text for document in source.documents()] == texts[30:33]
    assert [document.text for document in replace(source, split="train", streaming=True).documents()] == texts[:30]
    assert source.fingerprint() == source.fingerprint() != replace(source, split="train").fingerprint()
    with pytest.raises(ValueError, match="row 0: field 'body' must be a string, got None; fields are .'text'."):
        list(replace(source, text_field="body").documents())
    with pytest.raises(ValueError, match="neither a file or folder here nor a Hub dataset"):
        list(replace(source, split="validation").documents())
    hub = data_module._resolve("owner/name", "train", args)
    assert isinstance(hub, data_module._HubSplit) and hub.split == "train"


# -- streaming


@pytest.fixture
def streamed(jsonl, tokenizer, tmp_path):
    def load(**kwargs):
        return load_blocks(arguments(jsonl, tmp_path, streaming=True, **kwargs), tokenizer, K, seed=0)

    return load


def test_a_stream_holds_the_map_style_blocks(jsonl, tokenizer, tmp_path, streamed):
    """Streaming is a way to read, not another data set."""
    train, held_out = load_blocks(arguments(jsonl, tmp_path), tokenizer, K, seed=0)
    stream, stream_held_out = streamed()
    assert isinstance(stream, PackedStream)
    assert same(stream, train)
    assert same(stream_held_out, held_out)
    capped, _ = streamed(max_train_tokens=5 * BLOCK)
    assert same(capped, train.select(range(5)))


def test_workers_and_processes_share_a_stream_without_overlap(texts, tokenizer, streamed):
    """Workers that all read everything train on each text several times, silently."""
    stream, held_out = streamed(streaming_shards=2)
    whole = set(texts) - set(decoded_documents(held_out, tokenizer))
    loader = DataLoader(stream, batch_size=3, num_workers=2, collate_fn=PatchCollator(K))
    by_workers = [tuple(row) for batch in loader for row in batch["input_ids"].tolist()]
    assert len(set(by_workers)) == len(by_workers)
    shares = [stream.for_process(rank, 2) for rank in range(2)]
    documents = [decoded_documents(share, tokenizer) for share in shares]
    assert sorted(documents[0] + documents[1]) == sorted(whole)
    assert min(map(len, documents)) > 10
    assert set(by_workers) == {tuple(row) for share in shares for row in columns(share)["input_ids"].tolist()}


def test_a_stream_can_be_shuffled(streamed):
    """A stream of books is a stream of the same book for thousands of steps."""
    plain = columns(streamed()[0])["input_ids"]
    shuffled = columns(streamed(shuffle_buffer_size=50)[0])["input_ids"]
    assert not np.array_equal(plain, shuffled)
    assert {row.tobytes() for row in plain} == {row.tobytes() for row in shuffled}


def test_a_stream_that_cannot_be_split_is_refused(texts, tokenizer, tmp_path):
    """One book has no documents to hold out, and a stream's end is not known."""
    path = tmp_path / "book.txt"
    path.write_text("".join(texts), encoding="utf-8")
    with pytest.raises(ValueError, match="fewer than 20 documents.*give eval_data"):
        load_blocks(arguments(path, tmp_path, streaming=True), tokenizer, K, seed=0)
    with pytest.raises(ValueError, match="cannot stream"):
        load_texts(arguments(path, tmp_path, streaming=True))
    other = tmp_path / "other.txt"
    other.write_text(texts[0] * 2, encoding="utf-8")
    train, held_out = load_blocks(
        arguments(path, tmp_path, streaming=True, eval_data=str(other)), tokenizer, K, seed=0
    )
    assert decoded_documents(train, tokenizer) == ["".join(texts)]
    assert decoded_documents(held_out, tokenizer) == [texts[0] * 2]


# -- collator


def test_the_collator_makes_long_tensors(jsonl, tokenizer, tmp_path):
    """int32 ids and int8 masks save memory on disk and are refused by embeddings and losses."""
    train, _ = load_blocks(arguments(jsonl, tmp_path), tokenizer, K, seed=0)
    batch = PatchCollator(K)([train[0], train[1], train[2]])
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(train.column_names, torch.long)
    assert batch["input_ids"].shape == (3, BLOCK)
    assert batch["labels"][2].tolist() == train[2]["labels"].tolist()
    lists = PatchCollator(2)([{"input_ids": [1, 2]}, {"input_ids": [3, 4]}])
    assert lists["input_ids"].tolist() == [[1, 2], [3, 4]]


def test_the_collator_refuses_torn_patches():
    """A row of 6 tokens with patches of 4 fails deep inside a reshape, or worse, does not."""
    with pytest.raises(ValueError, match=r"rows of 6 tokens: block_size \(6\) must be a multiple .*: take 4 or 8"):
        PatchCollator(4)([{"input_ids": [0] * 6}])
    with pytest.raises(ValueError, match=r"rows of different lengths \(\[4, 8\]\)"):
        PatchCollator(4)([{"input_ids": [0] * 4}, {"input_ids": [0] * 8}])


def test_a_file_of_records_is_refused(tmp_path, tokenizer):
    """Read as text, a model learns braces and field names, and nothing looks wrong."""
    path = tmp_path / "toy.json"
    path.write_text('[{"text": "a"}]')
    with pytest.raises(ValueError, match="holds records, not text.*'text'.*jsonl"):
        load_blocks(DataArguments(data=str(path)), tokenizer, 4, 0)
