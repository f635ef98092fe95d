import pytest
import torch
from torch import nn

from modeling_latentforge import modeling_token_loss
from modeling_latentforge.modeling_token_loss import token_loss


def _problem(tokens=37, hidden=8, vocab=50):
    vectors = torch.randn(tokens, hidden, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab, hidden, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, vocab, (tokens,))
    targets[::5] = -100
    return vectors, weight, targets


@pytest.mark.parametrize("chunk_tokens", [1, 10, 1000])
def test_chunked_cross_entropy_has_the_gradients_of_the_plain_one(monkeypatch, chunk_tokens):
    """A chunk boundary that drops or doubles a token trains towards a wrong optimum at a plausible loss."""
    monkeypatch.setattr(modeling_token_loss, "chunk_tokens", lambda *_: chunk_tokens)
    vectors, weight, targets = _problem()
    expected = nn.functional.cross_entropy(vectors @ weight.T, targets, reduction="sum")
    expected_grads = torch.autograd.grad(3 * expected, (vectors, weight))
    total, ce, kd = token_loss(vectors, weight, targets)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(ce, expected.detach())
    assert kd == 0
    torch.testing.assert_close(torch.autograd.grad(3 * total, (vectors, weight)), expected_grads)


def test_teacher_loss_and_cross_entropy_add_up_in_the_gradient(monkeypatch):
    """A weight applied to the reported sum but not to the gradient makes `kd_weight` a placebo."""
    monkeypatch.setattr(modeling_token_loss, "chunk_tokens", lambda *_: 4)
    vectors, weight, targets = _problem()
    teacher = torch.randn(37, 50, dtype=torch.float64).log_softmax(-1)

    def kl(logits, index):
        return (teacher[index].exp() * (teacher[index] - logits.log_softmax(-1))).sum(-1)

    logits = vectors @ weight.T
    valid = targets != -100
    expected_kd = (kl(logits, torch.arange(37)) * valid).sum()
    expected = 0.3 * nn.functional.cross_entropy(logits, targets, reduction="sum") + 0.7 * expected_kd
    total, _, kd = token_loss(vectors, weight, targets, 0.3, kl, 0.7)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(kd, expected_kd.detach())
    torch.testing.assert_close(
        torch.autograd.grad(total, (vectors, weight)), torch.autograd.grad(expected, (vectors, weight))
    )


def test_frozen_output_matrix_gets_no_gradient():
    """The codec inside a student must not move, and its gradient costs a third of the loss."""
    vectors, weight, targets = _problem()
    total, *_ = token_loss(vectors, weight.detach(), targets)
    total.backward()
    assert vectors.grad is not None and weight.grad is None


def test_bf16_vectors_give_fp32_sums():
    """64k losses summed in bf16 stop growing near 256: the logged loss would be noise."""
    vectors, weight, targets = _problem()
    low = vectors.detach().bfloat16().requires_grad_()
    total, ce, _ = token_loss(low, weight.detach().bfloat16().requires_grad_(), targets)
    assert total.dtype == ce.dtype == torch.float32
    total.backward()
    assert low.grad.dtype == torch.bfloat16 and low.grad.isfinite().all()


def test_all_targets_masked_is_zero_not_nan():
    """A batch of nothing but prompts would otherwise end a run with NaN."""
    vectors, weight, targets = _problem()
    total, *_ = token_loss(vectors, weight, torch.full_like(targets, -100))
    total.backward()
    assert total == 0 and vectors.grad.abs().sum() == 0


@pytest.mark.parametrize("step", [1, 3, 4, 100])
def test_chunks_begin_only_where_they_may(monkeypatch, step):
    """A loss over several tokens that are judged apart is another loss, and which one depends on the machine."""
    monkeypatch.setattr(modeling_token_loss, "chunk_tokens", lambda *_: step)
    vectors, weight, targets = _problem()
    starts = torch.ones(37, dtype=torch.bool)
    starts[[0, 4, 5, 6, 7, 12, 36]] = False
    group = starts.long().cumsum(0)  # tokens that are judged together

    def squared_sum(logits, index):
        assert index[0] == 0 or starts[index[0]]
        logprobs = logits.log_softmax(-1)[torch.arange(len(index)), targets[index].clamp(min=0)]
        sums = logprobs.new_zeros(40).index_add(0, group[index], logprobs)
        return sums[group[index]] ** 2

    valid = targets != -100
    expected = (squared_sum(vectors @ weight.T, torch.arange(37)) * valid).sum()
    total, _, _ = token_loss(vectors, weight, targets, 0.0, squared_sum, 1.0, starts)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(
        torch.autograd.grad(total, (vectors, weight)), torch.autograd.grad(expected, (vectors, weight))
    )
