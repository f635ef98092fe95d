import math

import pytest
import torch
from torch.nn import functional as F

from modeling_latentforge import modeling_token_loss
from modeling_latentforge.modeling_token_loss import SparseTargets, token_loss
from trainers.losses import chunk_divergence, chunk_likelihood_loss, dense_kl, sampled_tail_kl, sparse_kl
from trainers.losses.divergence import bucket_targets, sampled_tail_targets, sparse_loss


def logits(rows: int, vocab: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(rows, vocab)


def top(teacher: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    values, ids = teacher.log_softmax(-1).topk(k)
    return ids, values


def head_and_draws(teacher: torch.Tensor, head: int, draws: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Entries as `to_sparse` makes them, by other means: ids, logprobs, entropy."""
    logprobs = teacher.log_softmax(-1)
    values, ids = logprobs.topk(head)
    tail = logprobs.exp().scatter(-1, ids, 0.0)
    drawn = torch.multinomial(tail, draws, replacement=True)
    shares = (tail.sum(-1, keepdim=True) / draws).log().expand(-1, draws)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return torch.cat([ids, drawn], -1), torch.cat([values, shares], -1), entropy


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_dense_kl_and_its_gradient_are_zero_where_the_student_agrees(temperature):
    """A student that has learnt all there is would be pushed away again, by rounding at best."""
    teacher = logits(50, 300, 10.0)
    student = (teacher + torch.randn(50, 1)).requires_grad_()  # a shift of all logits changes no distribution
    loss = dense_kl(student, teacher, temperature)
    loss.sum().backward()
    assert loss.shape == (50,) and loss.abs().max() < 1e-5
    assert student.grad.abs().max() < 1e-6

    student = teacher.clone().requires_grad_()
    loss = dense_kl(student, teacher, temperature)
    loss.sum().backward()
    assert loss.abs().max() < 1e-6 and student.grad.abs().max() < 1e-6


def test_dense_kl_is_forward_kl_times_the_temperature_squared():
    """The reverse direction, or a missing factor, trains quietly towards something else."""
    student, teacher = logits(7, 11).double(), logits(7, 11).double()
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    torch.testing.assert_close(dense_kl(student, teacher, 2.0), 4 * (p * (p.log() - q.log())).sum(-1))


def test_dense_kl_takes_ids_that_the_teacher_forbids():
    """0 * inf is NaN: one forbidden id would wipe out the whole step."""
    teacher = logits(3, 8)
    teacher[:, 2] = -torch.inf
    student = logits(3, 8).requires_grad_()
    loss = dense_kl(student, teacher)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(student.grad).all()


def test_dense_kl_refuses_shapes_that_would_broadcast():
    """A teacher's single row would silently teach every token the same distribution."""
    with pytest.raises(ValueError, match=r"\(4, 9\).*\(1, 9\)"):
        dense_kl(logits(4, 9), logits(1, 9))


def test_sparse_kl_with_every_id_equals_dense_kl():
    """If the two forms disagree where both know everything, results of two teachers cannot be compared."""
    teacher, student = logits(20, 40), logits(20, 40).requires_grad_()
    ids, values = top(teacher, 40)
    sparse = sparse_kl(student, ids, values)
    (sparse_grad,) = torch.autograd.grad(sparse.sum(), student)
    dense = dense_kl(student, teacher)
    (dense_grad,) = torch.autograd.grad(dense.sum(), student)
    torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sparse_grad, dense_grad, atol=1e-5, rtol=1e-5)


def test_sparse_kl_is_the_kl_of_the_top_ids_and_one_bucket():
    """Dropping the tail, or renormalising the top, teaches a confidence that the teacher never had."""
    teacher, student = logits(20, 40).double(), logits(20, 40).double()
    ids, values = top(teacher, 5)
    p, q = values.exp(), student.softmax(-1).gather(1, ids)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    torch.testing.assert_close(sparse_kl(student, ids, values), (p * (p / q).log()).sum(-1))


def test_sparse_kl_lowers_to_the_teachers_tail_mass():
    """Optimised freely, the student must end with the teacher's mass outside the top, not with none."""
    teacher = logits(1, 50, 1.0)
    ids, values = top(teacher, 4)
    student = torch.zeros(1, 50, requires_grad=True)
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        sparse_kl(student, ids, values).sum().backward()
        optimizer.step()
    mass = student.softmax(-1).gather(1, ids).sum()
    torch.testing.assert_close(mass, values.exp().sum(), atol=1e-3, rtol=0)


def test_sparse_kl_pulls_a_student_back_whose_tail_has_underflowed():
    """log(1 - sum) has no value and no gradient once the sum rounds to 1: an overconfident student would stay so."""
    student = torch.full((1, 50), -40.0)
    student[0, 0] = 0.0
    student.requires_grad_()
    loss = sparse_kl(student, torch.tensor([[0]]), torch.tensor([[0.5]]).log())
    loss.sum().backward()
    assert torch.isfinite(loss).all() and loss > 10
    torch.testing.assert_close(student.grad[0, 0], torch.tensor(0.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "values",
    [
        [[0.0, -9999.0, -9999.0]],  # all mass on one id, the others absent
        [[float("nan"), -1.0, -2.0]],  # a server's NaN
        [[-9999.0, -9999.0, -9999.0]],  # nothing at all
        [[-0.6, -0.8, -5.0]],  # sums to more than one: few digits
    ],
)
def test_sparse_kl_is_finite_at_the_edges(values):
    """Endpoints write -inf as -9999, clip digits, and skip tokens; one NaN gradient ends a run."""
    student = logits(1, 9).requires_grad_()
    loss = sparse_kl(student, torch.tensor([[3, 5, 7]]), torch.tensor(values))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(student.grad).all()
    assert loss.item() >= -1e-6


def test_absent_entries_change_nothing():
    """Rows are padded to one k: the padding must not count as an id, whatever stands there."""
    teacher, student = logits(6, 30), logits(6, 30)
    ids, values = top(teacher, 4)
    padded_ids = F.pad(ids, (0, 3), value=12345)
    padded_values = F.pad(values, (0, 3), value=-9999.0)
    torch.testing.assert_close(sparse_kl(student, padded_ids, padded_values), sparse_kl(student, ids, values))


def test_sparse_kl_refuses_another_temperature():
    """How the tail spreads at another temperature is unknown; a number would be wrong by nats, without any sign of
    it."""
    ids, values = top(logits(2, 9), 3)
    with pytest.raises(ValueError, match="temperature 2.0.*kd_temperature"):
        sparse_kl(logits(2, 9), ids, values, temperature=2.0)


def test_sparse_kl_refuses_ids_of_another_vocabulary():
    """A gather out of bounds is a crash on a GPU that takes the process with it."""
    ids, values = top(logits(2, 30), 3)
    with pytest.raises(ValueError, match="outside the student's vocabulary of 9"):
        sparse_kl(logits(2, 9), ids + 9, values)


@pytest.mark.parametrize("agree", [True, False])
def test_sampled_tail_kl_is_unbiased_in_value_and_gradient(agree):
    """A bias moves what the student converges to, and no amount of text takes it back."""
    repeats = 20_000
    teacher = logits(1, 30, 1.5).double()
    student = teacher.clone() if agree else logits(1, 30, 1.0).double()
    ids, values, entropy = head_and_draws(teacher.expand(repeats, -1), 4, 3)
    student.requires_grad_()
    losses = sampled_tail_kl(student.expand(repeats, -1), ids, values, 3, entropy)
    (grad,) = torch.autograd.grad(losses.mean(), student)
    exact = dense_kl(student, teacher)
    (exact_grad,) = torch.autograd.grad(exact.sum(), student)
    # five standard errors of the mean
    assert abs(losses.mean() - exact.sum()) < 5 * losses.std() / repeats**0.5
    assert losses.std() > 0.01, "the draws differ"
    torch.testing.assert_close(grad, exact_grad, atol=5 * 0.5 / repeats**0.5, rtol=0)
    assert not agree or exact_grad.abs().max() < 1e-9


def test_sampled_tail_kl_has_the_gradient_of_what_it_says():
    """Ids that are drawn twice are where a scatter loses one."""
    teacher, student = logits(20, 12).double(), logits(20, 12).double().requires_grad_()
    ids, values, entropy = head_and_draws(teacher, 3, 6)
    loss = sampled_tail_kl(student, ids, values, 6, entropy)
    plain = -(values.exp() * student.log_softmax(-1).gather(-1, ids)).sum(-1) - entropy
    weights = torch.rand(20).double()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(*(torch.autograd.grad((weights * value).sum(), student)[0] for value in (loss, plain)))
    half = student.detach().bfloat16().requires_grad_()
    sampled_tail_kl(half, ids, values, 6, entropy).sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_sampled_tail_kl_is_finite_at_the_edges():
    """A teacher without a tail has no draws, a server skips tokens, a student forbids an id: one NaN ends a run."""
    student = logits(3, 9)
    student[2, 4] = -torch.inf
    student.requires_grad_()
    ids = torch.tensor([[3, 12345], [5, 6], [4, 7]])
    values = torch.tensor([[0.0, -9999.0], [float("nan"), -9999.0], [-0.5, -0.9]])
    loss = sampled_tail_kl(student, ids, values, 1, torch.tensor([0.0, 3.0, 0.7]))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(student.grad).all()
    assert loss[1] == 0 and (student.grad[1] == 0).all(), "nothing was said, so nothing is learned"


def test_sampled_tail_kl_refuses_what_is_no_head_and_draws():
    """Without draws the tail would count for nothing: the bias that this loss is there to avoid."""
    ids, values, entropy = head_and_draws(logits(2, 30), 3, 2)
    with pytest.raises(ValueError, match="1 to 5.*got 0.*sparse_kl"):
        sampled_tail_kl(logits(2, 30), ids, values, 0, entropy)
    with pytest.raises(ValueError, match=r"entropy.*\(1,\).*\(2, 5\)"):
        sampled_tail_kl(logits(2, 30), ids, values, 2, entropy[:1])
    with pytest.raises(ValueError, match=r"\(1, 5\).*\(2, 5\).*\(M, k\)"):
        sampled_tail_kl(logits(2, 30), ids[:1], values, 2, entropy)
    with pytest.raises(ValueError, match=r"`ids` \(2, 5\).*student's logits \(3, 30\)"):
        sampled_tail_kl(logits(3, 30), ids, values, 2, entropy)
    with pytest.raises(ValueError, match=r"`ids` \(2, 3\).*student's logits \(1, 30\)"):
        sparse_kl(logits(1, 30), ids[:, :3], values[:, :3])  # would broadcast
    with pytest.raises(ValueError, match="outside the student's vocabulary of 9"):
        sampled_tail_kl(logits(2, 9), ids + 9, values, 2, entropy)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_chunk_divergence_is_the_divergence_of_two_outcomes(temperature):
    """Its minimum must be the teacher's likelihood, whatever that is, and nowhere else."""
    teacher = -torch.tensor([1e-4, 0.1, 2.0, 30.0]).double()
    student = torch.tensor([-0.3, -0.2, -2.5, -20.0]).double()
    p, q = ((values / temperature).exp() for values in (teacher, student))
    expected = temperature * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    torch.testing.assert_close(chunk_divergence(student, teacher, temperature), expected, atol=1e-4, rtol=1e-4)

    same = teacher.float().requires_grad_()
    loss = chunk_divergence(same, teacher.float(), temperature)
    (grad,) = torch.autograd.grad(loss.sum(), same)
    assert loss.abs().max() == 0 and grad.abs().max() < 1e-5


def test_chunk_divergence_is_finite_where_one_side_is_certain():
    """log(1 - p) of a token that both tokenizers make inevitable is minus infinity."""
    student = torch.tensor([0.0, -1.0, -0.0, -1e5, -3.0], requires_grad=True)
    loss = chunk_divergence(student, torch.tensor([0.0, 0.0, -2.0, -1.0, -torch.inf]))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(student.grad).all()
    assert loss[0] == 0 and (loss[1:] > 0).all() and student.grad[2] > 0, "a student that is too sure is told"
    with pytest.raises(ValueError, match="one number per chunk"):
        chunk_divergence(torch.zeros(2), torch.zeros(1))


def test_a_chunks_loss_stands_once_at_its_last_token():
    """Counted at every token, long chunks would weigh by their length squared."""
    student = logits(7, 11).double().requires_grad_()
    targets = torch.tensor([3, 5, 2, 8, 1, 1, 0])
    chunks = torch.tensor([-1, 0, 0, -1, 0, 2, -1])
    teacher = torch.tensor([-4.0, -1.0, -2.0]).double()
    loss = chunk_likelihood_loss(student, targets, chunks, teacher)
    logprobs = student.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    whole = torch.stack([logprobs[[1, 2, 4]].sum(), logprobs[5]])
    expected = chunk_divergence(whole, teacher[[0, 2]])
    assert loss[[0, 1, 2, 3, 6]].abs().max() == 0
    torch.testing.assert_close(loss[[4, 5]], expected)
    assert (chunk_likelihood_loss(student, targets, torch.full((7,), -1), teacher[:0]) == 0).all()


# -- the same, riding on the cross-entropy of a student


def output_layer(tokens: int, vocab: int, scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = (torch.randn(tokens, 16) * scale).double().requires_grad_()
    weight = torch.randn(vocab, 16).double().requires_grad_()
    labels = torch.randint(0, vocab, (tokens,))
    labels[::5] = -100
    return hidden, weight, labels


def stored(tokens: int, vocab: int, form: str) -> SparseTargets:
    teacher = logits(tokens, vocab).double()
    if form == "draws":
        return sampled_tail_targets(*head_and_draws(teacher, 3, 6)[:2], 6, torch.rand(tokens).double(), vocab)
    ids, values = top(teacher, vocab if form == "whole vocabulary" else 5)
    values[1, :2] = -9999.0  # absent at the front, where the set of ids begins
    values[2] = -9999.0  # a row that says nothing
    values[3] = values[3].log_softmax(-1)  # a row without a tail
    return bucket_targets(ids, values, vocab)


@pytest.mark.parametrize("form", ["draws", "tail bucket", "whole vocabulary"])
@pytest.mark.parametrize("scale", [0.5, 300.0])  # the second: nearly all of a row's probabilities underflow
@pytest.mark.parametrize(("ce_weight", "kd_weight"), [(0.4, 0.7), (0.0, 1.0)])
def test_stored_answers_on_the_cross_entropys_softmax_are_those_of_autograd(
    monkeypatch, form, scale, ce_weight, kd_weight
):
    """The fast form is what students really learn from: a wrong sign at one id would be a wrong teacher."""
    monkeypatch.setattr(modeling_token_loss, "chunk_tokens", lambda *_: 7)
    torch.manual_seed(0)
    hidden, weight, labels = output_layer(20, 12, scale)
    targets = stored(20, 12, form)
    fast = token_loss(hidden, weight, labels, ce_weight, targets, kd_weight)
    slow = token_loss(
        hidden, weight, labels, ce_weight, lambda logits, index: sparse_loss(logits, targets.rows(index)), kd_weight
    )
    for one, other in zip(fast, slow, strict=True):
        torch.testing.assert_close(one, other)
    assert fast[2] > 0.01
    gradients = [torch.autograd.grad(total, (hidden, weight)) for total, *_ in (fast, slow)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_stored_answers_pull_a_confident_student_back():
    """In fp32 a student's tail of e^-200 is 0, and 1 - sum has neither value nor gradient there."""
    hidden = torch.tensor([[200.0]], requires_grad=True)
    weight = torch.tensor([[1.0]] + [[0.0]] * 9)
    targets = bucket_targets(torch.tensor([[0]]), torch.tensor([[0.5]]).log(), 10)
    total, _, kd = token_loss(hidden, weight, torch.tensor([0]), 0.0, targets, 1.0)
    total.backward()
    torch.testing.assert_close(kd, torch.tensor(0.5 * (200 - math.log(9)) + math.log(0.5)))
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.5]]))
