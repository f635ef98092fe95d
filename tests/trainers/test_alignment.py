import argparse
import inspect
import random
import textwrap
from functools import cache

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from modeling_latentforge import modeling_token_loss
from tests.conftest import tiny_student
from tests.trainers.training_helpers import byte_tokenizer, ragged_rows, tiny_args, tiny_teacher, train_log
from trainers import KDConfig, KDTrainer, PatchCollator
from trainers.evaluation.likelihood import divergence_from_teacher
from trainers.losses import chunk_divergence
from trainers.teachers import AlignedTeacher, ChunkSignal, HFTeacher
from trainers.teachers.alignment import TextReader, align_row, common_spans, token_bytes, valid_pieces


SOURCES = [inspect.getsource(argparse), inspect.getsource(textwrap), inspect.getsource(random)]
PIECES = [
    "é",
    "e\u0301",
    "漢字",
    "😀",
    "👩‍👩‍👧",
    "\u200d",
    " ",
    "x=1",
    "\t",
    "\n",
    "ß",
    "ﬁ",
    "١٢",
    "2026",
    "def f",
    "  ",
]


def bpe(vocab_size, digits=False, texts=SOURCES, **special):
    """Byte-level BPE trained on real text; with `digits`, every digit is a token."""
    splits = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    special = {"eos_token": "<|eos|>", "pad_token": "<|pad|>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def ours():
    return bpe(500)


@pytest.fixture(scope="module")
def theirs():
    return bpe(900, digits=True, texts=SOURCES[:1])


def with_bos(tokenizer):
    """The same, with a token put before every text (as Llama 3 does)."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.add_special_tokens(["<|bos|>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", backend.token_to_id("<|bos|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )


def strings(count):
    generator = random.Random(0)
    return ["".join(generator.choice(PIECES) for _ in range(30)) for _ in range(count)]


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# both copy a whole vocabulary
bytes_of = cache(token_bytes)
reader_of = cache(TextReader)


def aligned(ids, ours, theirs, mask=None):
    return align_row(ids, mask or [1] * len(ids), bytes_of(ours), reader_of(theirs), ours.eos_token_id)


def test_both_sides_have_the_bytes_of_the_text(ours, theirs):
    """One byte off, and every later likelihood is compared with that of another piece of text."""
    tables, reader = (token_bytes(ours), token_bytes(theirs)), TextReader(theirs)
    for text in [*strings(300), *SOURCES]:
        data = text.encode()
        for table, ids in zip(tables, (ids_of(ours, text), reader.read(text)), strict=True):
            assert b"".join(table[id_] for id_ in ids) == data
        row = aligned([ours.eos_token_id, *ids_of(ours, text)], ours, theirs)
        covered = sum(len(columns) for columns, _, _ in row.spans)
        assert covered == len(ids_of(ours, text)), "both sides end at every text's end, so all of it is in chunks"
        assert sum(stop - first for _, first, stop in row.spans) == len(row.teacher_ids) - 1


def test_identical_tokenizers_have_chunks_of_one_token(ours):
    """Where the tokenizers agree nothing may be lost: the method is then matching of token likelihoods."""
    for text in strings(20):
        row = aligned([ours.eos_token_id, *ids_of(ours, text)], ours, ours)
        assert [columns for columns, _, _ in row.spans] == [[n] for n in range(1, len(row.teacher_ids))]
        assert all((first, stop) == (columns[0], columns[0] + 1) for columns, first, stop in row.spans)


def test_common_spans_reach_from_one_common_end_to_the_next():
    """A span that ends where only one side does compares a word with half of it."""
    assert common_spans([0, 3, 6, 9], [0, 2, 3, 9]) == [(0, 1, 0, 2), (1, 3, 2, 3)]
    assert common_spans([0, 4, 6], [2, 3, 6]) == [], "nothing begins together"
    assert common_spans([0, 2, 4], [2, 4, 7]) == [(1, 2, 0, 1)]


def test_a_chunk_goes_on_over_a_patchs_end(ours, theirs):
    """Cut at the patch, the teacher's token would have to be split, which it cannot."""
    ids = [ours.eos_token_id, *ids_of(ours, SOURCES[0][:4000])]
    spans = aligned(ids, ours, theirs).spans
    assert any(columns[0] // 4 != columns[-1] // 4 for columns, _, _ in spans)
    assert [column for columns, _, _ in spans for column in columns] == list(range(1, len(ids)))


def test_first_tokens_are_judged_only_where_something_predicts_them(ours, theirs):
    """The likelihood of a token without a predecessor is a number too, of the wrong row."""
    text = "def main(argv=None):"
    ids = ids_of(ours, text)
    start = aligned(ids, ours, theirs)
    assert 0 not in [column for columns, _, _ in start.spans for column in columns], "ours has no predecessor"
    assert start.teacher_ids == ids_of(theirs, text) and all(first > 0 for _, first, _ in start.spans)

    # ours follows a special token, the teacher's tokenizer puts nothing in front: its first token is not judged
    bos_ours = with_bos(ours)
    row = aligned([bos_ours.bos_token_id, *ids_of(bos_ours, text)], bos_ours, theirs)
    assert row.teacher_ids == ids_of(theirs, text) and row.spans and all(first > 0 for _, first, _ in row.spans)
    # and the other way round: all of the teacher's are, ours but for the first
    bos_theirs = with_bos(theirs)
    row = aligned(ids, ours, bos_theirs)
    assert row.teacher_ids == [bos_theirs.bos_token_id, *ids_of(theirs, text)]
    assert 0 not in [column for columns, _, _ in row.spans for column in columns]
    row = aligned([bos_ours.bos_token_id, *ids], bos_ours, bos_theirs)
    assert sum(len(columns) for columns, _, _ in row.spans) == len(ids)


def test_special_tokens_and_padding_are_no_text(ours, theirs):
    """Two tokenizers' ends of text have nothing in common but their name: a likelihood of one teaches nothing."""
    first, second = ids_of(ours, "return 2026\n"), ids_of(ours, "import os")
    eos, pad = ours.eos_token_id, ours.pad_token_id
    ids = [pad, eos, *first, eos, pad, pad, *second]
    mask = [0, 1, *[1] * len(first), 1, 0, 0, *[1] * len(second)]
    row = aligned(ids, ours, theirs, mask)
    end = theirs.eos_token_id
    assert row.teacher_ids == [end, *ids_of(theirs, "return 2026\n"), end, *ids_of(theirs, "import os")]
    columns = [column for columns, _, _ in row.spans for column in columns]
    assert columns == [n for n, (id_, seen) in enumerate(zip(ids, mask, strict=True)) if seen and id_ != eos]
    assert all(row.teacher_ids[n] != end for _, a, b in row.spans for n in range(a, b))


def test_a_character_that_the_blocks_border_cuts_costs_only_itself(ours, theirs):
    """Blocks are cut at tokens, and an emoji may be four of them."""
    data = "😀 import os 漢".encode()
    assert valid_pieces(data[2:-1]) == [(2, " import os ")]
    assert valid_pieces(b"a\xffb") == [(0, "a"), (2, "b")] and valid_pieces(b"\x80") == []
    table = token_bytes(ours)
    single = {piece: n for n, piece in enumerate(table) if piece is not None and len(piece) == 1}
    ids = [ours.eos_token_id, *(single[bytes([byte])] for byte in data[2:-1])]
    row = aligned(ids, ours, theirs)
    assert b"".join(table[ids[n]] for columns, _, _ in row.spans for n in columns) == b" import os "


def test_text_is_read_as_it_is(ours, theirs):
    """Qwen's tokenizer composes accents, and any finds its special tokens in text: other bytes than ours."""
    backend = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    backend.normalizer = normalizers.NFC()
    composing = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|eos|>", pad_token="<|pad|>")
    text = "cafe\u0301 <|eos|> ends"
    assert composing("e\u0301")["input_ids"] == composing("é")["input_ids"]
    reader = TextReader(composing)
    assert reader.bytes_of(reader.read(text)) == text.encode()
    assert composing("<|eos|>")["input_ids"] == [composing.eos_token_id], "the caller's tokenizer is left alone"


def test_tokenizers_whose_bytes_are_unknown_are_refused(ours):
    """SentencePiece writes spaces as another character: lengths would agree by accident, and then no more."""
    pieces = Tokenizer(models.BPE(vocab={"▁the": 0, "a": 1}, merges=[]))
    other = PreTrainedTokenizerFast(tokenizer_object=pieces)
    with pytest.raises(ValueError, match="not byte-level BPE.*Train the codec with the teacher's tokenizer"):
        token_bytes(other)
    with pytest.raises(ValueError, match="not byte-level BPE"):
        token_bytes(object())
    spaced = Tokenizer.from_str(ours.backend_tokenizer.to_str())
    spaced.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    with pytest.raises(ValueError, match="does not give the bytes of .* back"):
        TextReader(PreTrainedTokenizerFast(tokenizer_object=spaced))
    with pytest.raises(ValueError, match="HFTeacher has no tokenizer"):
        AlignedTeacher(HFTeacher(tiny_teacher()), ours)
    with pytest.raises(ValueError, match="gives no likelihood of given tokens"):
        AlignedTeacher(object(), ours)


# -- signals


def batch_of(tokenizer, texts, length):
    rows = [[tokenizer.eos_token_id, *ids_of(tokenizer, text)][:length] for text in texts]
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return ids, mask


def test_chunks_sum_to_the_sequence_on_both_sides(ours, theirs):
    """What is lost or counted twice here is learned twice or never."""
    texts = [text[:150] for text in (*strings(3), SOURCES[1], "short")]
    teacher_model = tiny_teacher(vocab_size=len(theirs))
    ids, mask = batch_of(ours, texts, 200)
    signal = AlignedTeacher(HFTeacher(teacher_model, theirs), ours).signal(ids, mask)
    row_of_chunk = torch.zeros(len(signal.teacher_logprobs), dtype=torch.long)
    rows = torch.arange(len(texts))[:, None].expand_as(signal.chunks)
    row_of_chunk[signal.chunks[signal.chunks >= 0]] = rows[signal.chunks >= 0]
    sums = torch.zeros(len(texts)).index_add(0, row_of_chunk, signal.teacher_logprobs)
    for text, total in zip(texts, sums, strict=True):
        read = torch.tensor([[theirs.eos_token_id, *ids_of(theirs, text)]])
        logprobs = teacher_model(read).logits.log_softmax(-1)[0, :-1].gather(1, read[0, 1:, None])
        torch.testing.assert_close(total, logprobs.sum(), atol=1e-4, rtol=1e-5)

    # ours: the chunks hold every token of the text, each once, at the position that predicts it
    assert ((signal.chunks >= 0) == torch.nn.functional.pad(mask[:, 1:], (0, 1)).bool()).all()
    assert torch.equal(signal.targets[:, :-1], ids[:, 1:])


def test_with_one_tokenizer_the_loss_matches_token_likelihoods(ours):
    """The special case that can be computed by hand."""
    model = tiny_teacher(vocab_size=len(ours))
    ids, mask = batch_of(ours, [SOURCES[1][:200], SOURCES[2][:200]], 48)
    signal = AlignedTeacher(HFTeacher(model, ours), ours).signal(ids, mask)
    student = torch.randn(2 * 48, len(ours))
    targets = ids[:, 1:].unsqueeze(-1)
    teacher = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, targets)[..., 0]
    logprobs = student.view(2, 48, -1)[:, :-1].log_softmax(-1).gather(-1, targets)[..., 0]
    expected = chunk_divergence(logprobs.flatten(), teacher.flatten()).view(2, 47)
    loss = signal.loss(student, torch.arange(96)).view(2, 48)
    # the last tokens of a cut row may be read otherwise when nothing follows
    torch.testing.assert_close(loss[:, :40], expected[:, :40], atol=1e-4, rtol=1e-4)


def test_chunks_of_logits_never_part_a_chunk_of_text(ours, theirs, monkeypatch):
    """The student's logits come in pieces whose size depends on the machine; the loss must not."""
    codec_student = tiny_student()
    student = byte_tokenizer()
    teacher = AlignedTeacher(HFTeacher(tiny_teacher(vocab_size=len(theirs)), theirs), student)
    ids, mask = batch_of(student, [text[:40] for text in SOURCES], 44)
    signal = teacher.signal(ids, mask)
    labels = ids.masked_fill(mask == 0, -100)
    results = []
    for step in (3, 1000):
        monkeypatch.setattr(modeling_token_loss, "chunk_tokens", lambda *_, step=step: step)
        codec_student.zero_grad()
        output = codec_student(
            ids,
            attention_mask=mask,
            labels=labels,
            loss_weights={"kd": 1.0},
            distillation=signal.loss,
            distillation_starts=signal.starts,
            output_logits=False,
        )
        output.loss.backward()
        results.append((output.loss.detach(), codec_student.lm_head.weight.grad.clone()))
    assert results[0][0] > 0
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-4)
    inside = int((~signal.starts.flatten()).nonzero()[0])
    with pytest.raises(ValueError, match="was parted.*distillation_starts"):
        signal.loss(torch.randn(1, 258), torch.tensor([inside]))
    with pytest.raises(ValueError, match="temperature 2.0"):
        signal.loss(torch.randn(132, 258), torch.arange(132), 2.0)
    with pytest.raises(ValueError, match=r"\(1, 2\).*\(1, 3\)"):
        ChunkSignal(torch.zeros(1, 2).long(), torch.zeros(1, 3).long(), torch.zeros(1), vocab_size=9)


def test_a_row_that_the_teacher_reads_as_too_many_tokens_is_refused(ours):
    """Beyond its positions a teacher answers all the same, or fails inside an embedding."""
    teacher = AlignedTeacher(HFTeacher(tiny_teacher(max_position_embeddings=32), byte_tokenizer()), ours)
    ids, mask = batch_of(ours, [SOURCES[0][:400]], 50)
    with pytest.raises(ValueError, match="knows 32 positions: lower .block_size"):
        teacher.signal(ids, mask)


def test_rows_without_any_text_have_no_chunks(ours, theirs):
    """A batch of nothing but padding must not end a run."""
    ids = torch.full((2, 8), ours.pad_token_id)
    signal = AlignedTeacher(HFTeacher(tiny_teacher(vocab_size=len(theirs)), theirs), ours).signal(
        ids, torch.zeros_like(ids)
    )
    assert (signal.loss(torch.randn(16, len(ours)), torch.arange(16)) == 0).all() and signal.starts.all()


# -- training


def test_trainer_takes_an_aligned_teacher_only_when_told_so(tmp_path, theirs):
    """Silently matching likelihoods where distributions were meant is a downgrade that no log shows."""
    teacher = AlignedTeacher(HFTeacher(tiny_teacher(vocab_size=len(theirs)), theirs), byte_tokenizer())

    def trainer_of(teacher, **kwargs):
        args = tiny_args(KDConfig, tmp_path, **kwargs)
        rows = ragged_rows(8)
        return KDTrainer(tiny_student(), args, teacher, train_dataset=rows, data_collator=PatchCollator(4))

    with pytest.raises(ValueError, match="kd_alignment is none, and AlignedTeacher gives chunks"):
        trainer_of(teacher)
    with pytest.raises(ValueError, match="kd_alignment is bytes, and HFTeacher gives dense"):
        trainer_of(HFTeacher(tiny_teacher()), kd_alignment="bytes")
    with pytest.raises(ValueError, match="kd_temperature is 2.0"):
        tiny_args(KDConfig, tmp_path, kd_alignment="bytes", kd_temperature=2.0)
    with pytest.raises(ValueError, match="kd_alignment must be none or bytes, got 'chars'"):
        tiny_args(KDConfig, tmp_path, kd_alignment="chars")
    trainer = trainer_of(teacher, kd_alignment="bytes")
    trainer.train()
    assert all(entry["kd"] > 0 for entry in train_log(trainer))


def rows_of(tokenizer, text, length):
    ids = ids_of(tokenizer, text)
    rows = [ids[start : start + length] for start in range(0, len(ids) - length, length)]
    return [{"input_ids": row, "attention_mask": [1] * length, "labels": row} for row in rows]


@pytest.mark.slow
def test_a_student_learns_from_a_teacher_with_another_tokenizer(tmp_path, theirs):
    """The point of it all: closer to the teacher, on text that neither has seen, than by the text alone."""
    text, unseen = SOURCES[0][:60_000], SOURCES[0][60_000:80_000]
    teacher_model = tiny_teacher(vocab_size=len(theirs), initializer_range=0.05)
    rows = torch.tensor([row["input_ids"] for row in rows_of(theirs, text, 64)])
    optimizer = torch.optim.AdamW(teacher_model.parameters(), lr=5e-3)
    for _ in range(150):
        batch = rows[torch.randint(len(rows), (8,))]
        teacher_model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    student_tokenizer = byte_tokenizer()
    held_out = [PatchCollator(4)(rows_of(student_tokenizer, unseen, 96)[start : start + 16]) for start in (0, 16, 32)]
    found = {}
    for kd_weight in (0.0, 1.0):
        teacher = AlignedTeacher(HFTeacher(teacher_model, theirs), student_tokenizer)
        torch.manual_seed(1)
        model = tiny_student(num_decoder_layers=1, decoder_window=16, initializer_range=0.05)
        trainer = KDTrainer(
            model,
            tiny_args(
                KDConfig,
                tmp_path,
                max_steps=150,
                kd_weight=kd_weight,
                kd_alignment="bytes" * bool(kd_weight) or "none",
                per_device_train_batch_size=8,
            ),
            teacher if kd_weight else None,
            train_dataset=rows_of(student_tokenizer, text, 96),
            data_collator=PatchCollator(4),
        )
        if teacher is not None and kd_weight:
            trainer.teacher_callback.close_after_training = False
        trainer.train()
        found[kd_weight] = divergence_from_teacher(model, teacher, held_out)
        log = [entry["kd"] for entry in train_log(trainer)] if kd_weight else []
    assert sum(log[-10:]) < 0.5 * sum(log[:10]), "the loss falls"
    assert found[1.0] < 0.9 * found[0.0], found
