"""Token losses through an output matrix, without ever holding (tokens, vocabulary) logits.

M tokens, H hidden, V vocabulary. One chunk of logits exists at a time; its gradient is taken while it exists, so
nothing is recomputed in the backward pass (three matrix products per chunk, as many as a plain linear + cross-entropy
needs).
"""

from bisect import bisect_right
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn


# Logits alive at once, in elements. Measured on two CPU cores: 2^20 (4 MB in fp32) stay near the caches and come from
# the heap, where 2^24 are mapped from the system, page by page, for every chunk; but with fewer than MIN_CHUNK_TOKENS
# the gradient of a large output matrix is read and written too often.
CHUNK_ELEMENTS, CHUNK_ELEMENTS_CPU = 2**24, 2**20
MIN_CHUNK_TOKENS = 256

# (logits (C, V) fp32, index (C,) into the M tokens) -> per-token loss (C,)
TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class SparseTargets(NamedTuple):
    """A teacher's loss of every token that needs the student's probabilities q at a few ids only.

    `constant - sum(weights * log q[ids]) - tail * log(1 - sum(q over the set of ids))`, in nats. Its gradient is a
    multiple of q but at those ids, so it rides on the cross-entropy's softmax and costs hardly a pass of its own.

    Attributes:
        ids: `(M, k)`, all within the vocabulary.
        weights: `(M, k)`.
        constant: `(M,)`.
        tail: `(M,)` mass of the bucket of all other ids; None: there is no bucket.
        repeated: `(M, k)`, True where a place holds an id that stands in another place of its row too: in a set it
            counts once. Needed with a tail.
    """

    ids: torch.Tensor
    weights: torch.Tensor
    constant: torch.Tensor
    tail: torch.Tensor | None = None
    repeated: torch.Tensor | None = None

    def rows(self, index: "slice | torch.Tensor", device: torch.device | None = None) -> "SparseTargets":
        """Those tokens only, on a device."""
        return SparseTargets(*(None if part is None else part[index].to(device) for part in self))

    def only(self, says: torch.Tensor) -> "SparseTargets":
        """Nothing is said where `says (M,)` is False."""
        tail = None if self.tail is None else self.tail * says
        return self._replace(weights=self.weights * says[:, None], constant=self.constant * says, tail=tail)


def chunk_tokens(vocab_size: int, device_type: str) -> int:
    """Number of tokens whose logits are held at once."""
    elements = CHUNK_ELEMENTS_CPU if device_type == "cpu" else CHUNK_ELEMENTS
    return max(MIN_CHUNK_TOKENS, elements // vocab_size)


def chunk_bounds(num_tokens: int, step: int, starts: torch.Tensor | None = None) -> list[tuple[int, int]]:
    """Where chunks begin and end: every `step` tokens, or at the last place before that at which one may begin; where
    there is none, at the next."""
    if starts is None:
        return [(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]
    places = [*starts.flatten().nonzero().flatten().tolist(), num_tokens]
    bounds, start = [], 0
    while start < num_tokens:
        following = bisect_right(places, start)
        stop = places[max(following, bisect_right(places, start + step) - 1)]
        bounds.append((start, stop))
        start = stop
    return bounds


def _softmax_(logits: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(C, V)`, overwritten by probabilities times their normaliser -> log-probabilities `(C, k)` at some ids,
    and the normaliser `(C, 1)`.

    One exponential and no second buffer (`logsumexp` would make one).
    """
    highest = logits.amax(-1, keepdim=True)
    chosen = logits.gather(1, ids).sub_(highest)
    normaliser = logits.sub_(highest).exp_().sum(-1, keepdim=True)
    return chosen.sub_(normaliser.log()), normaliser


def _sparse_chunk_(
    logits: torch.Tensor,
    target: torch.Tensor,
    sparse: SparseTargets,
    ce_scale: torch.Tensor,
    kd_scale: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy `(C,)`, the teacher's loss `(C,)`, and the gradient of both, scaled by `(C,)` each; it takes the
    place of the logits.

    With T the ids outside the set and W = sum(weights) + tail, the teacher's part of it is
    `q * (W - tail * [in T] / q(T))`, less `weights` at the ids.
    """
    dtype = logits.dtype
    ids, weights = sparse.ids, sparse.weights.to(dtype)
    places = torch.cat([target[:, None], ids], 1)
    if sparse.tail is None:
        log_probs, normaliser = _softmax_(logits, places)
        kd = sparse.constant.to(dtype) - (weights * log_probs[:, 1:]).sum(-1)
        grad = logits.mul_((ce_scale + kd_scale * weights.sum(-1))[:, None] / normaliser)
    else:
        tail = sparse.tail.to(dtype)
        chosen = logits.gather(1, places)
        # The tail apart from the set, each with its own maximum: 1 - sum(q) would lose a confident student's tail, and
        # with it the gradient that brings the mass back.
        highest = logits.scatter_(1, ids, -torch.inf).amax(-1, keepdim=True)
        nothing = highest == -torch.inf  # the set is the vocabulary
        in_tail = logits.sub_(highest.masked_fill(nothing, 0.0)).exp_().sum(-1, keepdim=True).clamp_(min=1.0)
        log_tail = (highest + in_tail.log())[:, 0]
        log_set = chosen[:, 1:].masked_fill(sparse.repeated, -torch.inf).logsumexp(-1)
        log_sum = torch.logaddexp(log_tail, log_set)
        log_probs = chosen - log_sum[:, None]
        kd = sparse.constant.to(dtype) - (weights * log_probs[:, 1:]).sum(-1)
        log_tail = torch.where(nothing[:, 0], 0.0, log_tail - log_sum)
        kd = kd - tail * log_tail
        row = ce_scale + kd_scale * (weights.sum(-1) + tail)
        grad = logits.mul_((row * log_tail.exp() - kd_scale * tail)[:, None] / in_tail)
        grad.scatter_(1, ids, log_probs[:, 1:].exp() * row[:, None])
    grad.scatter_add_(1, ids, -kd_scale[:, None] * weights)
    grad.scatter_add_(1, target[:, None], -ce_scale[:, None])
    return -log_probs[:, 0], kd, grad


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, ce_weight, distillation, distillation_weight, distillation_starts):
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = (
            torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32)) if need_weight else None
        )
        sum_dtype = torch.promote_types(hidden.dtype, torch.float32)
        ce_sum, kd_sum = torch.zeros(2, dtype=sum_dtype, device=hidden.device)

        step = chunk_tokens(vocab_size, hidden.device.type)
        for start, stop in chunk_bounds(num_tokens, step, distillation_starts):
            chunk, target = hidden[start:stop], targets[start:stop]
            logits = nn.functional.linear(chunk, weight).to(sum_dtype)
            valid = target != -100
            grad_logits = None

            safe_target = target.masked_fill(~valid, 0)
            ce_scale = valid.to(sum_dtype) * ce_weight
            if isinstance(distillation, SparseTargets):
                sparse = distillation.rows(slice(start, stop), logits.device)
                kd_scale = valid.to(sum_dtype) * distillation_weight
                ce, kd, grad_logits = _sparse_chunk_(logits, safe_target, sparse, ce_scale, kd_scale)
                ce_sum += (ce * valid).sum()
                kd_sum += (kd * valid).sum()
            else:
                if distillation is not None:
                    index = torch.arange(start, stop, device=hidden.device)
                    with torch.enable_grad():
                        leaf = logits.detach().requires_grad_(need_hidden or need_weight)
                        kd = distillation(leaf, index).masked_fill(~valid, 0).sum()
                    kd_sum += kd.detach()
                    if leaf.requires_grad and distillation_weight:
                        (grad_logits,) = torch.autograd.grad(kd, leaf)
                        grad_logits.mul_(distillation_weight)

                log_probs, normaliser = _softmax_(logits, safe_target[:, None])
                ce_sum -= (log_probs[:, 0] * valid).sum()
                if (need_hidden or need_weight) and ce_weight:
                    probs = logits.mul_(ce_scale[:, None] / normaliser)
                    probs.scatter_add_(1, safe_target[:, None], -ce_scale[:, None])
                    grad_logits = probs if grad_logits is None else grad_logits.add_(probs)

            if grad_logits is None:
                if need_hidden:
                    grad_hidden[start:stop] = 0
                continue
            grad_logits = grad_logits.to(weight.dtype)
            if need_hidden:
                grad_hidden[start:stop] = grad_logits @ weight
            if need_weight:
                if grad_weight.dtype == chunk.dtype == grad_logits.dtype and not torch.is_autocast_enabled(
                    chunk.device.type
                ):
                    grad_weight.addmm_(grad_logits.t(), chunk)
                else:
                    grad_weight += grad_logits.t() @ chunk.to(grad_logits.dtype)

        total = ce_weight * ce_sum + distillation_weight * kd_sum
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(ce_sum, kd_sum)
        return total, ce_sum, kd_sum

    @staticmethod
    def backward(ctx, grad_total, *_):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden.mul_(grad_total)  # in place: at a large vocabulary a copy is as much again
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None


def token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    ce_weight: float = 1.0,
    distillation: TokenLoss | SparseTargets | None = None,
    distillation_weight: float = 0.0,
    distillation_starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy, and optionally a teacher's loss, summed over tokens.

    Args:
        hidden: `(M, H)`, the vectors that `weight` turns into logits.
        weight: `(V, H)`, the output matrix.
        targets: `(M,)` token ids; -100 counts for nothing, in either loss.
        ce_weight, distillation_weight: factors of the two sums in `total`.
        distillation: per-token loss of one chunk of logits, differentiated by autograd (`index` tells which of the M
            tokens it sees), or what a teacher says at a few ids of every token.
        distillation_starts: `(M,)`, False where `distillation` of a token needs the logits of the one before too: no
            chunk begins there, however many tokens it must then hold. Default: anywhere.

    Returns:
        `(total, ce_sum, kd_sum)`, scalars in nats. Only `total` carries a gradient, to `hidden` and `weight`.

    Gradients equal those of `F.cross_entropy(hidden @ weight.T, targets, reduction="sum")` up to rounding. The result
    cannot be differentiated twice.
    """
    if not torch.is_grad_enabled():  # inside a Function every parameter seems to want its gradient
        hidden, weight = hidden.detach(), weight.detach()
    return _TokenLoss.apply(
        hidden, weight, targets, float(ce_weight), distillation, float(distillation_weight), distillation_starts
    )
