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
    Teacher,
    check_same_tokenizer,
    speaking_positions,
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
