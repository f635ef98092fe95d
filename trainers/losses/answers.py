"""What a receiver's words about an answer cost: plain functions of the logits of the answer's tokens.

B rows, A tokens of the longest answer (EOS included), V vocabulary, H hidden.
"""

import torch
from torch.nn import functional as F


IGNORED = -100


def answer_loss(
    logits: torch.Tensor, targets: torch.Tensor, first_weight: float = 0.0, num_tokens: int | None = None
) -> torch.Tensor:
    """Cross-entropy of each row's answer, a weighted mean over its tokens.

    Args:
        logits: `(B, A, V)`.
        targets: `(B, A)`, -100 behind the answers.
        first_weight: what the first token counts more than any other, which counts 1.
        num_tokens: only the first so many count; None: all.

    Returns:
        `(B,)` nats per token.

    Raises:
        ValueError: a row without an answer.
    """
    weights = _weights(targets, num_tokens)
    weights[:, 0] += first_weight
    nats = F.cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    return (nats * weights).sum(1) / weights.sum(1)


def answer_divergence(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: float = 1.0,
    num_tokens: int | None = None,
) -> torch.Tensor:
    """`temperature**2 KL(teacher || student)` of each row, mean over its answer's tokens, `(B,)`.

    The teacher is the same receiver that reads the text itself. Both are given the answer so far.

    Raises:
        ValueError: unequal shapes, a row without an answer.
    """
    if logits.shape != teacher_logits.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and teacher's {tuple(teacher_logits.shape)} must be equal")
    weights = _weights(targets, num_tokens)
    ours = (logits.float() / temperature).log_softmax(-1)
    theirs = (teacher_logits.float() / temperature).log_softmax(-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    return temperature**2 * (divergence * weights).sum(1) / weights.sum(1)


def repeat_loss(logits: torch.Tensor, targets: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Cross-entropy of the beginning of a text that goes on, `(B,)` nats per token: [`answer_loss`] of its first
    tokens, the EOS that ends each row of `targets` left out."""
    last = (targets != IGNORED).sum(1, keepdim=True) - 1
    targets = targets.scatter(1, last, IGNORED)
    return answer_loss(logits, targets, num_tokens=num_tokens)


def align_loss(
    slots: torch.Tensor, mask: torch.Tensor, embeddings: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Mean squared distance of a message's first vectors from the embeddings of its answer's first tokens: teaches a
    message to spell its answer. Kept for comparison.

    Args:
        slots: `(B, S, H)`, and which of them are there, `mask (B, S)`.
        embeddings: `(B, A, H)` of `targets (B, A)`, -100 behind the answers.

    Returns:
        `(B,)`, a mean over the first min(S, A) pairs and H.

    Raises:
        ValueError: a row with no pair.
    """
    count = min(slots.shape[1], targets.shape[1])
    pairs = (mask.bool()[:, :count] & (targets[:, :count] != IGNORED)).float()
    if not bool((pairs.sum(1) > 0).all()):
        raise ValueError("a row has no vector of a message beside a token of an answer: there is nothing to align")
    square = (slots[:, :count].float() - embeddings[:, :count].float()).square().mean(-1)
    return (square * pairs).sum(1) / pairs.sum(1)


@torch.no_grad()
def first_token_accuracy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """1 where an answer's first token is the likeliest, else 0, `(B,)`."""
    return (logits[:, 0].argmax(-1) == targets[:, 0]).float()


def _weights(targets: torch.Tensor, num_tokens: int | None) -> torch.Tensor:
    weights = (targets != IGNORED).float()
    if num_tokens is not None:
        weights[:, num_tokens:] = 0
    if not bool((weights.sum(1) > 0).all()):
        raise ValueError("a row has no token of an answer: there is nothing to learn from it")
    return weights
