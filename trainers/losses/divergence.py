"""Divergence of a student's next-token distribution from its teacher's, per token, in nats.

M tokens, V vocabulary, k stored entries per token.

All functions give KL(teacher || student), from what is known of the teacher: all of it, its top k and the mass of the
rest, or its top and draws from the rest. The student is asked to cover everything that the teacher finds likely. The
sum over the M tokens and its normalisation are the model's business.
"""

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from modeling_latentforge.modeling_token_loss import SparseTargets


# A log-probability at or below this stands for "no entry": servers write -inf as -9999, padding may use any large
# negative number.
ABSENT_LOGPROB = -1e3

# Below this the teacher's tail mass is rounding (k fp32 probabilities that sum to one), not a statement about the
# student.
MIN_TAIL = 1e-6


def _float(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# An id forbidden by the teacher (-inf) would give 0 * inf.
MIN_LOGPROB = -1e4


def _logprobs(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = _float(logits)
    return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


class _DenseKL(torch.autograd.Function):
    """KL(teacher || student) with its gradient in closed form: two softmaxes and one saved tensor.

    Measured for 8192 tokens of a vocabulary of 4096 on two cores, the teacher's product included: 0.15 s, where
    autograd's chain took 0.26.
    """

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, temperature):
        student, teacher = (
            _logprobs(logits, temperature).clamp_(min=MIN_LOGPROB) for logits in (student_logits, teacher_logits)
        )
        teacher_probs = teacher.exp()
        divergence = teacher.sub_(student).mul_(teacher_probs).sum(-1)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(student.exp_().sub_(teacher_probs))
            ctx.temperature, ctx.dtype = temperature, student_logits.dtype
        return divergence

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_divergence):
        (difference,) = ctx.saved_tensors
        return (difference * (grad_divergence / ctx.temperature)[:, None]).to(ctx.dtype), None, None


def dense_kl(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """`temperature**2 * KL(teacher || student)`, both distributions at that temperature.

    The factor keeps the size of the gradient when the temperature grows (arXiv 1503.02531, section 2).

    Args:
        student_logits: `(M, V)`; carries the gradient.
        teacher_logits: `(M, V)`; none flows here. `-inf` is allowed.
        temperature: above 0; above 1 the unlikely tokens weigh more.

    Returns:
        `(M,)` in nats, fp32 or wider. Zero, with zero gradient, where the distributions are equal.

    Raises:
        ValueError: unequal shapes (no broadcast: it would hide a shifted or misaligned teacher), or a temperature that
            is not above 0.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} must have "
            "the same shape: "
            "one row per token, one column per id. Pick the teacher's rows by position and cut padded columns first."
        )
    if not temperature > 0:
        raise ValueError(
            f"`temperature` must be above 0, got {temperature}. Use 1.0 for the distributions as they are."
        )
    return temperature**2 * _DenseKL.apply(student_logits, teacher_logits.detach(), temperature)


def refuse_temperature(temperature: float) -> None:
    """Raises `ValueError` unless it is 1: what is known sparsely is known at the temperature at which it was made."""
    if temperature != 1:
        raise ValueError(
            f"A sparse teacher signal cannot be brought to temperature {temperature}: how the mass outside its top k "
            "would spread is unknown. "
            "Set `kd_temperature` to 1, or use a teacher that gives full logits."
        )


def _present_entries(
    ids: torch.Tensor, logprobs: torch.Tensor, vocab_size: int, prefix: str = ""
) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored entries `(M, k)` -> ids that may be gathered (0 where absent), and which are present.

    Raises:
        ValueError: unequal shapes, or a present id outside the student's vocabulary.
    """
    if ids.shape != logprobs.shape or ids.ndim != 2:
        raise ValueError(
            f"`{prefix}ids` {tuple(ids.shape)} and `{prefix}logprobs` {tuple(logprobs.shape)} must both be (M, k)."
        )
    # NaN counts as absent
    present = logprobs > ABSENT_LOGPROB
    ids = ids.long()
    if bool((present & ((ids < 0) | (ids >= vocab_size))).any()):
        raise ValueError(
            f"`{prefix}ids` holds ids outside the student's vocabulary of {vocab_size} (largest: "
            f"{int(ids[present].max())}): the teacher uses "
            "another tokenizer. Mark ids that the student lacks as absent (log-probability <= -1e3), or use a teacher "
            "with the same tokenizer."
        )
    return ids.masked_fill(~present, 0), present


def sparse_kl(
    student_logits: torch.Tensor, top_ids: torch.Tensor, top_logprobs: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """KL(teacher || student) over the teacher's top-k ids and one bucket for all the rest.

    The bucket holds the mass that the teacher gives to ids outside its top k: without it, or with renormalised
    probabilities, the student learns a confidence that the teacher never had. By the data processing inequality the
    result is at most [`dense_kl`]; with k = V they are equal.

    Args:
        student_logits: `(M, V)`; carries the gradient.
        top_ids: `(M, k)` ids, without repetition among the present entries of a row.
        top_logprobs: `(M, k)` the teacher's log-probabilities at temperature 1, *not* renormalised; values <= -1e3
            mark absent entries, whose id may be anything.
        temperature: 1 only.

    Returns:
        `(M,)` in nats, fp32 or wider. A row without any present entry gives 0: the teacher said nothing there.

    Raises:
        ValueError: unequal shapes, a present id outside the student's vocabulary (it would be a gather out of bounds),
            or another temperature.
    """
    refuse_temperature(temperature)
    return sparse_loss(student_logits, bucket_targets(top_ids, top_logprobs, student_logits.shape[-1]))


def bucket_targets(top_ids: torch.Tensor, top_logprobs: torch.Tensor, vocab_size: int) -> SparseTargets:
    """[`sparse_kl`] of tokens `(M, k)` as data, for a loss that never holds all their logits.

    Raises:
        ValueError: as [`sparse_kl`].
    """
    top_ids, present = _present_entries(top_ids, top_logprobs, vocab_size, "top_")
    logprobs = _float(top_logprobs.detach()).masked_fill(~present, 0.0)
    probs = logprobs.exp() * present
    mass = probs.sum(-1)
    # stored with few digits, the k probabilities can sum to slightly more than one
    excess = mass.clamp(min=1.0)
    probs, logprobs = probs / excess[:, None], logprobs - excess.log()[:, None]
    tail = 1.0 - (mass / excess)
    has_tail = (tail > MIN_TAIL) & present.any(-1) & (present.sum(-1) < vocab_size)
    tail = torch.where(has_tail, tail, 0.0)
    # An absent place repeats an id of its row, so that the set is that of the present ones; a row that says nothing
    # has a set of one, of no weight.
    first = present.int().argmax(-1, keepdim=True)
    ids = torch.where(present, top_ids, top_ids.gather(-1, first))
    repeated = (~present).scatter(-1, first, False)
    constant = (probs * logprobs).sum(-1) + torch.xlogy(tail, tail)
    return SparseTargets(ids, probs, constant, tail, repeated)


def sparse_loss(student_logits: torch.Tensor, targets: SparseTargets) -> torch.Tensor:
    """What [`SparseTargets`] says, differentiated by autograd.

    Raises:
        ValueError: other tokens than the targets'.
    """
    if student_logits.shape[:-1] != targets.constant.shape:
        raise ValueError(
            f"`ids` {tuple(targets.ids.shape)} must be (M, k), with the M of the student's logits "
            f"{tuple(student_logits.shape)}."
        )
    student = _logprobs(student_logits, 1.0)  # (M, V)
    dtype = student.dtype
    # an id forbidden by the student (-inf) would give 0 * inf
    loss = targets.constant.to(dtype) - (
        targets.weights.to(dtype) * student.gather(1, targets.ids).clamp(min=MIN_LOGPROB)
    ).sum(-1)
    if targets.tail is None:
        return loss
    # The student's tail as a log-sum over the other ids, not log(1 - sum): that would lose the value, and with it the
    # gradient that brings the mass back, once a confident student has less than 1e-7 there. Rows without a tail keep
    # every id, so that nothing is log(0).
    has_tail = targets.tail > 0
    in_set = torch.zeros_like(student, dtype=torch.bool).scatter_(
        1, targets.ids, has_tail[:, None].expand_as(targets.ids)
    )
    student_tail = student.masked_fill(in_set, -torch.inf).logsumexp(-1)
    return loss - torch.where(has_tail, targets.tail.to(dtype) * student_tail, 0.0)


def sampled_tail_kl(
    student_logits: torch.Tensor,
    ids: torch.Tensor,
    logprobs: torch.Tensor,
    num_draws: int,
    entropy: torch.Tensor,
) -> torch.Tensor:
    """Unbiased estimate of KL(teacher || student) from an exact head and draws from the tail.

    The first `k - num_draws` entries are ids with their probabilities, the last `num_draws` are drawn with replacement
    from all other ids, in proportion to the teacher's probabilities there. Every draw stands for an equal share of
    their mass, so value and gradient are, in expectation over the draws, those of [`dense_kl`]; the plain sampling of
    arXiv 2503.16870 is the case without a head. A single value may be negative, and the gradient of a single token is
    not zero where the student agrees: only their expectations are.

    Args:
        student_logits: `(M, V)`; carries the gradient.
        ids: `(M, k)`; an id may be drawn several times.
        logprobs: `(M, k)`; of the head the teacher's log-probabilities at temperature 1, of each draw
            `log(residual / num_draws)`, residual being the mass outside the head. Values <= -1e3 mark absent entries.
        num_draws: 1 to k.
        entropy: `(M,)` nats, of the teacher's whole distribution: draws keep no probabilities of their own, and
            without it the value would be a cross-entropy. It has no part in the gradient.

    Returns:
        `(M,)` in nats, fp32 or wider. A row without any present entry gives 0.

    Raises:
        ValueError: unequal shapes, `num_draws` out of range, or a present id outside the student's vocabulary.
    """
    return sparse_loss(
        student_logits, sampled_tail_targets(ids, logprobs, num_draws, entropy, student_logits.shape[-1])
    )


def sampled_tail_targets(
    ids: torch.Tensor, logprobs: torch.Tensor, num_draws: int, entropy: torch.Tensor, vocab_size: int
) -> SparseTargets:
    """[`sampled_tail_kl`] of tokens `(M, k)` as data, for a loss that never holds all their logits.

    Raises:
        ValueError: as [`sampled_tail_kl`].
    """
    if not 1 <= num_draws <= ids.shape[-1]:
        raise ValueError(
            f"`num_draws` must lie in 1 to {ids.shape[-1]} (entries of a token), got {num_draws}. Without draws the "
            "tail is one bucket: use `sparse_kl`."
        )
    ids, present = _present_entries(ids, logprobs, vocab_size)
    if entropy.shape != ids.shape[:-1]:
        raise ValueError(f"`entropy` {tuple(entropy.shape)} must be (M,), with the M of `ids` {tuple(ids.shape)}.")
    weights = _float(logprobs.detach()).masked_fill(~present, -torch.inf).exp()
    return SparseTargets(ids, weights, -torch.where(present.any(-1), _float(entropy.detach()), 0.0))
