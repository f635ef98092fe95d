import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Gemma2Config, Gemma2ForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from tests.conftest import TINY, VOCAB, text_batch
from tests.trainers.training_helpers import byte_tokenizer, tiny_teacher
from trainers.teachers import (
    DenseSignal,
    HFTeacher,
    SparseSignal,
    SparseTeacher,
    Teacher,
    check_same_tokenizer,
    row_seeds,
    sparse,
    speaking_positions,
    to_sparse,
)


def everywhere(signal) -> torch.Tensor:
    return torch.arange(signal.hidden_states.shape[:2].numel())


def test_signal_gives_the_models_own_logits_without_holding_them():
    """A signal of (tokens, vocabulary) logits is 32 GB for 64k tokens of a 128k vocabulary."""
    model = tiny_teacher()
    ids = text_batch(3, 16)
    signal = HFTeacher(model).signal(ids)
    assert signal.hidden_states.shape == (3, 16, 32)
    expected = model(input_ids=ids).logits.flatten(0, 1)
    torch.testing.assert_close(signal.logits(everywhere(signal)), expected)
    index = torch.tensor([5, 40, 17])
    torch.testing.assert_close(signal.logits(index), expected[index])
    assert isinstance(HFTeacher(model), Teacher)


def test_model_with_more_than_a_matrix_product_gives_full_logits():
    """Gemma's soft cap bends every logit: the output matrix alone would be another teacher."""
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(**TINY, num_key_value_heads=2, head_dim=8, final_logit_softcapping=0.5, initializer_range=0.3)
    )
    ids = text_batch(2, 12)
    signal = HFTeacher(model.eval()).signal(ids)
    assert signal.hidden_states.shape == (2, 12, VOCAB)
    torch.testing.assert_close(signal.logits(everywhere(signal)), model(input_ids=ids).logits.flatten(0, 1))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_masked_tokens_are_invisible_to_the_teacher(family):
    """Each document stands behind a few pads: a teacher that reads them, or is asked at them, teaches the first words
    wrongly."""
    model = tiny_teacher()
    if family == "gpt_neox":
        torch.manual_seed(1)
        model = GPTNeoXForCausalLM(GPTNeoXConfig(**TINY, initializer_range=0.3)).eval()
    teacher = HFTeacher(model)
    text = text_batch(1, 13)
    gap = torch.full((1, 3), 257)
    ids = torch.cat([gap, text[:, :5], gap, text[:, 5:]], 1)
    mask = (ids != 257).long()
    student = torch.randn(ids.shape[1], VOCAB)
    padded, plain = teacher.signal(ids, mask), teacher.signal(text)
    loss = padded.loss(student, torch.arange(ids.shape[1]))
    assert torch.isfinite(loss).all()

    seen = [*range(3, 8), *range(11, 19)]
    rows = torch.arange(13)
    torch.testing.assert_close(loss[seen], plain.loss(student[seen], rows), atol=1e-4, rtol=1e-4)
    # at the last pad the next token is the sixth of the text: what the teacher said about it at the fifth
    torch.testing.assert_close(loss[10:11], plain.loss(student[10:11], torch.tensor([4])), atol=1e-4, rtol=1e-4)
    assert (loss[:3] == 0).all(), "nothing was seen yet, so nothing was said"


def test_speaking_positions_are_the_last_seen_tokens():
    """Off by one here is a teacher that knows the answer, or one that lags."""
    mask = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 0]])
    assert speaking_positions(mask).tolist() == [[-1, 1, 2, 2, 2, 5], [0, 1, 2, 3, 4, 4]]


def test_sparse_signal_of_every_id_equals_the_dense_signal():
    """Both forms are one interface to the student's forward, which cannot tell them apart."""
    logits = 3 * torch.randn(2, 6, VOCAB)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]])
    values, ids = logits.log_softmax(-1).topk(VOCAB)
    positions = speaking_positions(mask)
    dense = DenseSignal.from_logits(logits, positions=positions)
    sparse = SparseSignal(ids, values, vocab_size=VOCAB, positions=positions)
    index = torch.tensor([1, 2, 8, 9, 0, 11])
    student = torch.randn(6, VOCAB)
    torch.testing.assert_close(sparse.loss(student, index), dense.loss(student, index), atol=1e-5, rtol=1e-5)


def test_another_vocabulary_is_refused_with_both_sizes():
    """Cut to the smaller size the divergence is a number like any other, about other words."""
    signal = DenseSignal.from_logits(torch.randn(1, 4, 300))
    with pytest.raises(ValueError, match="258 token ids and the teacher 300.*Train the codec with the teacher's"):
        signal.loss(torch.randn(4, 258), torch.arange(4))
    with pytest.raises(ValueError, match="400 token ids and the teacher 300"):
        signal.loss(torch.randn(4, 400), torch.arange(4))


def test_padded_columns_of_the_teacher_are_cut():
    """Most checkpoints pad their matrix (Qwen: 151643 ids, 151936 columns), a codec made from the tokenizer does
    not."""
    logits = torch.randn(1, 4, 300)
    signal = DenseSignal.from_logits(logits, num_tokens=258)
    student = torch.randn(4, 258)
    cut = DenseSignal.from_logits(logits[..., :258])
    torch.testing.assert_close(signal.loss(student, torch.arange(4)), cut.loss(student, torch.arange(4)))

    values, ids = logits.log_softmax(-1).topk(300)
    sparse = SparseSignal(ids, values, vocab_size=300, num_tokens=258)
    assert torch.isfinite(sparse.loss(student, torch.arange(4))).all()


def test_sparse_signal_refuses_another_temperature():
    """The temperature that was asked for and the one that was used differ without any sign (vLLM ignores it)."""
    with pytest.raises(ValueError, match="temperature 1, got 2.0"):
        SparseSignal(torch.zeros(1, 2, 3).long(), torch.zeros(1, 2, 3), vocab_size=9, temperature=2.0)


def test_check_finds_a_broken_teacher():
    """A truncated download or fp16 overflow would teach NaN, found hours later in the student's weights."""
    model = tiny_teacher()
    HFTeacher(model).check()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(ValueError, match="not finite.*torch.float32"):
        HFTeacher(model).check()


def test_rows_longer_than_the_teachers_positions_are_refused():
    """With rotary positions it answers all the same, and the student learns what an untrained place says."""
    teacher = HFTeacher(tiny_teacher(max_position_embeddings=8), byte_tokenizer())
    ids = torch.randint(VOCAB, (2, 9))
    with pytest.raises(ValueError, match="as 9 tokens and knows 8 positions: lower `block_size`"):
        teacher.signal(ids)
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    teacher.signal(ids, mask)


def test_closed_teacher_says_so():
    """'NoneType has no attribute' points at us, not at the life of the teacher."""
    teacher = HFTeacher(tiny_teacher())
    teacher.close()
    teacher.close()
    with pytest.raises(RuntimeError, match="is closed"):
        teacher.signal(text_batch(1, 8))


def test_teacher_loads_from_a_directory_with_its_tokenizer(tmp_path):
    """The command line knows only names."""
    tiny_teacher().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    teacher = HFTeacher(str(tmp_path), dtype="bfloat16", device="cpu")
    assert teacher.model.dtype == torch.bfloat16 and not teacher.model.training
    assert (teacher.vocab_size, teacher.num_tokens) == (VOCAB, VOCAB)
    teacher.check_tokenizer(byte_tokenizer())
    teacher.check()


def test_tokenizers_of_equal_size_are_told_apart():
    """Two vocabularies of one size differ in nearly every id, and the teacher answers all the same."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    other = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    other = PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<|eos|>", pad_token="<|pad|>")
    assert len(other) == len(byte_tokenizer())
    check_same_tokenizer(byte_tokenizer(), byte_tokenizer())
    with pytest.raises(ValueError, match="is not the codec's.*Train the codec with the teacher's tokenizer"):
        check_same_tokenizer(byte_tokenizer(), other)
    with pytest.raises(ValueError, match="without a tokenizer"):
        HFTeacher(tiny_teacher()).check_tokenizer(byte_tokenizer())


def test_sparse_form_keeps_an_exact_head_and_draws_of_equal_weight():
    """What a store keeps is all that training ever sees: weights that do not sum to one are a bias for good."""
    logits = 2 * torch.randn(2, 5, 40)
    signal = to_sparse(DenseSignal.from_logits(logits), 12, 5, seed=3)
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(7)
    assert torch.equal(signal.top_ids[..., :7], ids) and signal.num_draws == 5
    torch.testing.assert_close(signal.top_logprobs[..., :7], values)
    torch.testing.assert_close(signal.top_logprobs.exp().sum(-1), torch.ones(2, 5))
    assert not (signal.top_ids[..., 7:, None] == ids[..., None, :]).any(), "a draw from the head counts it twice"
    torch.testing.assert_close(signal.entropy, -(logprobs.exp() * logprobs).sum(-1))
    bucket = to_sparse(DenseSignal.from_logits(logits), 12, 0)
    assert torch.equal(bucket.top_ids, logprobs.topk(12).indices) and bucket.num_draws == 0
    assert bucket.entropy is None


def test_draws_follow_the_tail():
    """Draws by any other law are another teacher, and the loss does not show it."""
    logits = torch.randn(1, 1, 12).expand(200, 100, 12)
    signal = to_sparse(DenseSignal.from_logits(logits), 8, 5, seed=0)
    tail = logits[0, 0].softmax(-1).scatter(0, signal.top_ids[0, 0, :3], 0.0)
    shares = torch.bincount(signal.top_ids[..., 3:].flatten(), minlength=12) / 100_000
    torch.testing.assert_close(shares, tail / tail.sum(), atol=0.006, rtol=0)


def test_draws_depend_on_the_seed_alone(monkeypatch):
    """A store is resumed, or read on a machine with another chunk size, and must be the same store."""
    dense = DenseSignal.from_logits(torch.randn(3, 7, 30))
    whole = to_sparse(dense, 10, 6, seed=5)
    monkeypatch.setattr(sparse, "CHUNK_ELEMENTS", 60)
    for again in (
        to_sparse(dense, 10, 6, seed=5),
        to_sparse(dense, 10, 6, 5),
        to_sparse(dense, 10, 6, torch.Generator().manual_seed(5)),
    ):
        assert torch.equal(again.top_ids, whole.top_ids) and torch.equal(again.top_logprobs, whole.top_logprobs)
    assert not torch.equal(to_sparse(dense, 10, 6, seed=6).top_ids, whole.top_ids)
    for wrong in ({}, {"seed": 1, "generator": 1}):
        with pytest.raises(ValueError, match="Draws need a seed"):
            to_sparse(dense, 10, 6, **wrong)
    rows = to_sparse(dense, 10, 6, seed=[7, 8, 7])
    last = DenseSignal.from_logits(dense.hidden_states[1:2])
    assert torch.equal(rows.top_ids[1:2], to_sparse(last, 10, 6, seed=[8]).top_ids), "a row's seed is its own"
    with pytest.raises(ValueError, match="2 seeds for 3 rows"):
        to_sparse(dense, 10, 6, seed=[7, 8])
    with pytest.raises(ValueError, match="got 4 and 6"):
        to_sparse(dense, 4, 6, seed=1)


def test_sparse_form_never_holds_all_logits(monkeypatch):
    """(tokens, vocabulary) of a batch is 32 GB for 64k tokens of a 128k vocabulary."""
    monkeypatch.setattr(sparse, "CHUNK_ELEMENTS", 1000)
    rows = []

    def project(hidden):
        rows.append(len(hidden))
        return hidden @ torch.ones(8, 100)

    signal = DenseSignal(torch.randn(4, 20, 8), project, vocab_size=100)
    to_sparse(signal, 20, 8, seed=0)
    assert max(rows) == 10 and sum(rows) == 80


def test_sparse_form_of_a_small_or_padded_vocabulary():
    """Columns that no token uses would be drawn and then missed; a head that holds all leaves nothing to draw from."""
    logits = torch.randn(1, 6, 30)
    padded = torch.cat([logits, torch.full((1, 6, 10), 9.0)], -1)
    signal = to_sparse(DenseSignal.from_logits(padded, num_tokens=30), 12, 8, seed=0)
    assert signal.top_ids.max() < 30 and signal.vocab_size == 40
    student = torch.randn(6, 30)
    index = torch.arange(6)
    everything = to_sparse(DenseSignal.from_logits(logits), 38, 6, seed=0)
    dense = DenseSignal.from_logits(logits).loss(student, index)
    torch.testing.assert_close(everything.loss(student, index), dense, atol=1e-5, rtol=1e-5)


def test_sparse_signal_with_draws_is_judged_as_such():
    """Draws that are read as a top-k with a tail bucket teach that the teacher thinks them likely."""
    logits = torch.randn(2, 300, 60)
    mask = torch.ones(2, 300).long()
    mask[0, :2] = 0
    dense = DenseSignal.from_logits(logits, positions=speaking_positions(mask))
    student, index = torch.randn(600, 60), torch.arange(600)
    signal = to_sparse(dense, 20, 8, seed=0)
    losses = signal.loss(student, index)
    assert (losses[:2] == 0).all()
    exact = dense.loss(student, index)
    assert abs((losses - exact).mean()) < 5 * (losses - exact).std() / 600**0.5
    with pytest.raises(ValueError, match="temperature 2.0.*kd_temperature"):
        signal.loss(student, index, 2.0)
    fields = {"top_ids": signal.top_ids, "top_logprobs": signal.top_logprobs, "vocab_size": 60}
    with pytest.raises(ValueError, match="num_draws. is 8 but there is no .entropy"):
        SparseSignal(**fields, num_draws=8)
    with pytest.raises(ValueError, match="0 to 20.*got 21"):
        SparseSignal(**fields, num_draws=21, entropy=signal.entropy)
    with pytest.raises(ValueError, match=r"entropy.*\(2,\).*\(B, T\)"):
        SparseSignal(**fields, num_draws=8, entropy=signal.entropy[:, 0])


def test_sparse_teacher_says_of_a_teacher_what_a_store_keeps():
    """A trial of a store's loss must be a trial of that loss, and must not promise temperatures."""
    model = tiny_teacher()
    teacher = SparseTeacher(HFTeacher(model, byte_tokenizer()), 20, 8, seed=1)
    assert isinstance(teacher, Teacher) and teacher.capabilities.form == "sparse"
    assert not teacher.capabilities.any_temperature
    ids = text_batch(2, 16)
    first = teacher.signal(ids)
    expected = to_sparse(HFTeacher(model, byte_tokenizer()).signal(ids), 20, 8, seed=row_seeds(ids, 1))
    assert torch.equal(first.top_ids, expected.top_ids)
    # an evaluation in between, or a resumed run, must not change what is learned
    assert torch.equal(teacher.signal(ids[1:]).top_ids, first.top_ids[1:])
    other = SparseTeacher(HFTeacher(model, byte_tokenizer()), 20, 8, seed=2).signal(ids)
    assert not torch.equal(first.top_ids, other.top_ids)
    teacher.check()
    with pytest.raises(ValueError, match="gives sparse ones"):
        SparseTeacher(teacher)
    teacher.close()
    with pytest.raises(RuntimeError, match="is closed"):
        teacher.signal(ids)
