"""Streams: where they were is kept with every row, and found again; the trainings of several processes are killed in
`trainers/evaluation/streaming_runs.py`."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from torch.utils.data import DataLoader

from tests.trainers.training_helpers import byte_tokenizer
from trainers.data import DataArguments, PatchCollator, load_blocks
from trainers.evaluation.distributed_rows import launch
from trainers.streaming import POSITION_KEY, PackedStream


BLOCK = 16


@pytest.fixture(params=["jsonl", "parquet"])
def load(request, tmp_path):
    """Sixty documents of very different lengths, blank ones among them."""
    texts = [("" if i % 13 == 5 else f"{i} ") + "abcdefg " * (i % 9) for i in range(60)]
    if request.param == "jsonl":
        data = tmp_path / "text.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        data = tmp_path / "parquet"
        data.mkdir()
        for file in range(2):
            part = pa.table({"text": texts[30 * file : 30 * file + 30]})
            pq.write_table(part, data / f"{file}.parquet", row_group_size=7)

    def load(**kwargs):
        arguments = DataArguments(str(data), block_size=BLOCK, cache_dir=str(tmp_path / "cache"), **kwargs)
        return load_blocks(arguments, byte_tokenizer(), 4, seed=0)

    return load


def ids(rows) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in rows]


@pytest.mark.parametrize("shuffle", [0, 24])
def test_a_stream_goes_on_at_every_row(load, shuffle):
    """A row lost or given twice at each of a thousand restarts is another corpus, and no loss shows it."""
    stream, _ = load(streaming=True, shuffle_buffer_size=shuffle)
    rows = list(stream)
    assert len(rows) > 3 * 16  # several windows
    for place in range(0, len(rows), 5):
        again, _ = load(streaming=True, shuffle_buffer_size=shuffle)
        again.positions = {0: json.loads(json.dumps(rows[place][POSITION_KEY]))}
        assert ids(again) == ids(rows[place + 1 :]), place


def test_a_stream_holds_the_map_style_blocks(load):
    """Streaming is a way to read, not another data set; phases depend on blank documents being none."""
    train, held_out = load()
    stream, stream_held_out = load(streaming=True)
    assert ids(stream) == ids(train) and ids(stream_held_out) == ids(held_out)


def test_a_cap_is_that_of_all_shares_together(load):
    """A cap that each process takes for itself trains on so many times the tokens."""
    stream, _ = load(streaming=True, streaming_shards=2, max_train_tokens=7 * BLOCK)
    assert [len(list(stream.for_process(rank, 2))) for rank in range(2)] == [4, 3]


def test_a_cap_is_not_shared_with_workers_that_have_nothing_to_read(load):
    """Of one file two workers read half the rows that were asked for, in every pass again."""
    stream, _ = load(streaming=True, max_train_tokens=7 * BLOCK)
    shards = stream.documents.num_shards  # 1 of lines of JSON, 2 files of Parquet
    rows = DataLoader(stream, batch_size=1, collate_fn=PatchCollator(4), num_workers=shards + 1)
    assert len(list(rows)) == 7


def test_a_parquet_file_without_rows_is_passed_over(tmp_path):
    """Jobs that write many files leave empty ones, and a training meets them after days."""
    for file, texts in enumerate((["some text " * 9] * 30, [], ["other text " * 9] * 30)):
        pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), tmp_path / f"{file}.parquet")
    (tmp_path / "held_out.txt").write_text("held out")
    arguments = DataArguments(str(tmp_path), str(tmp_path / "held_out.txt"), streaming=True, block_size=BLOCK)
    stream, _ = load_blocks(arguments, byte_tokenizer(), 4, seed=0)
    assert stream.documents.num_shards == 2 and len(list(stream)) > 200
    for file in (0, 2):
        (tmp_path / f"{file}.parquet").unlink()
    with pytest.raises(ValueError, match="no Parquet file of .* has a row"):
        load_blocks(arguments, byte_tokenizer(), 4, seed=0)


def test_another_number_of_processes_or_workers_is_refused(load, tmp_path):
    """Their shares are others: what one has read another reads again."""
    stream = load(streaming=True)[0].for_process(0, 2)
    stream.positions = {0: {"row": 1}}
    stream.save(tmp_path / "stream_0.json", num_workers=2)
    other = load(streaming=True)[0].for_process(0, 2)
    other.load(tmp_path / "stream_0.json", num_workers=2)
    assert other.positions == stream.positions
    with pytest.raises(ValueError, match="shared by 2 processes with 2 workers.*there are 2 with 1: start as many"):
        other.load(tmp_path / "stream_0.json", num_workers=1)
    for text in ("", "[]", '{"world_size": 2}'):
        (tmp_path / "stream_0.json").write_text(text)
        with pytest.raises(ValueError, match="does not say where the stream was.*ignore_data_skip"):
            other.load(tmp_path / "stream_0.json", num_workers=2)


def test_the_collator_keeps_the_place_of_its_last_row(load):
    """The first row's place would give all others of its batch again."""
    stream, _ = load(streaming=True)
    rows = [row for row, _ in zip(stream, range(3), strict=False)]
    batch = PatchCollator(4)(rows)
    assert batch["input_ids"].shape == (3, BLOCK) and batch[POSITION_KEY] == rows[-1][POSITION_KEY]


def test_columns_of_a_data_set_do_not_get_in_the_way(tmp_path):
    """Many sets on the Hub have an `index` column of their own."""
    pq.write_table(
        pa.table({"body": ["some text " * 9] * 30, "index": [7] * 30, "kept": [False] * 30}), tmp_path / "x.parquet"
    )
    arguments = DataArguments(str(tmp_path / "x.parquet"), text_field="body", streaming=True, block_size=BLOCK)
    arguments.eval_data = str(tmp_path / "held_out.txt")
    (tmp_path / "held_out.txt").write_text("held out")
    stream, _ = load_blocks(arguments, byte_tokenizer(), 4, seed=0)
    assert isinstance(stream, PackedStream) and len(list(stream)) > 100
    arguments.text_field = "text"
    with pytest.raises(ValueError, match="field 'text' must be a string, got None; fields are .*body"):
        next(iter(load_blocks(arguments, byte_tokenizer(), 4, seed=0)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("kill_after", [7, 10])
def test_every_document_is_trained_on_once_over_a_kill(kill_after, tmp_path):
    """2 processes x 2 workers in mid-stream: what was read ahead must be read again, what was trained on must not."""
    launch("streaming_runs", tmp_path, 2, 2, kill_after)
    counted = json.loads((tmp_path / "counted.json").read_text())
    assert counted["killed"] == [-9, -9] and counted["ended"] == [0, 0]
    assert counted["times"] == {"1": counted["documents"]} and not counted["damaged"]
    assert len(counted["shares"]) == 4
