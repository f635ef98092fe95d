"""Approximate likelihood matching (arXiv 2503.20083): a teacher with another tokenizer gives likelihoods of pieces of
the text, and the student is to give the same ones.

C tokens, V vocabulary, N chunks: pieces of text at whose two ends a token ends on both sides, see
`teachers/alignment.py`.

Nothing is said of tokens that are not in the text: that is all that two vocabularies have in common.
"""

import torch
from torch.nn import functional as F

from .divergence import MIN_LOGPROB


# Of arXiv 2503.20083. A chunk of several tokens has a probability near 0, where a divergence of the two outcomes
# "this chunk" and "any other" is flat; at this temperature it reads the surprisals themselves.
CHUNK_TEMPERATURE = 100.0

# In nats: what a side that is sure of a chunk keeps, so that the other can be unsure at a finite price.
MIN_SURPRISAL = 1e-6


def chunk_logprobs(token_logprobs: torch.Tensor, chunks: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """Log-probabilities `(N,)` of chunks from those of their tokens.

    Args:
        token_logprobs: `(C,)`.
        chunks: `(C,)`, the chunk of each token, 0 to N - 1, or -1 for none.
        num_chunks: N.
    """
    # the last place takes what belongs to none
    sums = token_logprobs.new_zeros(num_chunks + 1)
    return sums.index_add(0, chunks.remainder(num_chunks + 1), token_logprobs)[:num_chunks]


def chunk_divergence(
    student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, temperature: float = CHUNK_TEMPERATURE
) -> torch.Tensor:
    """KL of two outcomes, the chunk or any other text, with probabilities `p ** (1 / temperature)`; times the
    temperature.

    With the factor its size does not depend on the temperature: for a high one it is `s log(s / s') - s + s'` of the
    surprisals s of the teacher and s' of the student (nats), which says as much about unlikely chunks as about likely
    ones. At 1 it is the divergence of the outcomes as they are, and an unlikely chunk teaches nothing.

    Args:
        student_logprobs: `(N,)`; carries the gradient.
        teacher_logprobs: `(N,)`; none flows here. `-inf` is allowed.
        temperature: above 0.

    Returns:
        `(N,)`, fp32 or wider. Zero, with zero gradient, where the likelihoods are equal.

    Raises:
        ValueError: unequal shapes, or a temperature that is not above 0.
    """
    if student_logprobs.shape != teacher_logprobs.shape:
        raise ValueError(
            f"Student log-probabilities {tuple(student_logprobs.shape)} and the teacher's "
            f"{tuple(teacher_logprobs.shape)} must have the same shape: one number per chunk."
        )
    if not temperature > 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}.")
    dtype = torch.promote_types(student_logprobs.dtype, torch.float32)
    # shifted, not cut off: a student that is too sure must feel it
    student, teacher = (
        (values.to(dtype).clamp(min=MIN_LOGPROB, max=0.0) - MIN_SURPRISAL) / temperature
        for values in (student_logprobs, teacher_logprobs.detach())
    )
    other_student, other_teacher = ((-torch.expm1(values)).log() for values in (student, teacher))
    chunk = teacher.exp() * (teacher - student)
    other = -torch.expm1(teacher) * (other_teacher - other_student)
    return temperature * (chunk + other)


def chunk_likelihood_loss(
    student_logits: torch.Tensor,
    targets: torch.Tensor,
    chunks: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    temperature: float = CHUNK_TEMPERATURE,
) -> torch.Tensor:
    """[`chunk_divergence`] of whole chunks from logits of their tokens.

    Args:
        student_logits: `(C, V)`; carries the gradient.
        targets: `(C,)`, the text's own ids.
        chunks: `(C,)`, 0 to N - 1, or -1 for none. Every chunk that begins here must end here.
        teacher_logprobs: `(N,)`; chunks without tokens here count for nothing.
        temperature: see [`chunk_divergence`].

    Returns:
        `(C,)`: a chunk's divergence stands at its last token, 0 at all others.
    """
    num_chunks = teacher_logprobs.shape[0]
    logits = student_logits.to(torch.promote_types(student_logits.dtype, torch.float32))
    token_logprobs = -F.cross_entropy(logits, targets, reduction="none")
    divergence = chunk_divergence(
        chunk_logprobs(token_logprobs, chunks, num_chunks), teacher_logprobs.to(logits.device), temperature
    )
    places = torch.arange(len(chunks), device=chunks.device)
    last = places.new_zeros(num_chunks + 1).scatter_reduce(0, chunks.remainder(num_chunks + 1), places, "amax")
    is_last = (chunks >= 0) & (last[chunks] == places)
    return torch.where(is_last, F.pad(divergence, (0, 1))[chunks], 0.0)
