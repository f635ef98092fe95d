"""Token losses through an output matrix, without ever holding (tokens, vocabulary) logits.

M tokens, H hidden, V vocabulary. One chunk of logits exists at a time; its gradient is taken while it exists, so
nothing is recomputed in the backward pass (three matrix products per chunk, as many as a plain linear + cross-entropy
needs).
"""

from bisect import bisect_right
from collections.abc import Callable

import torch
from torch import nn


# Logits alive at once, in elements. Measured on two CPU cores: 2^20 (4 MB in fp32) stay near the caches and come from
# the heap, where 2^24 are mapped from the system, page by page, for every chunk; but with fewer than MIN_CHUNK_TOKENS
# the gradient of a large output matrix is read and written too often.
CHUNK_ELEMENTS, CHUNK_ELEMENTS_CPU = 2**24, 2**20
MIN_CHUNK_TOKENS = 256

# (logits (C, V) fp32, index (C,) into the M tokens) -> per-token loss (C,)
TokenLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


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

            if distillation is not None:
                index = torch.arange(start, stop, device=hidden.device)
                with torch.enable_grad():
                    leaf = logits.detach().requires_grad_(need_hidden or need_weight)
                    kd = distillation(leaf, index).masked_fill(~valid, 0).sum()
                kd_sum += kd.detach()
                if leaf.requires_grad and distillation_weight:
                    (grad_logits,) = torch.autograd.grad(kd, leaf)
                    grad_logits.mul_(distillation_weight)

            safe_target = target.masked_fill(~valid, 0)
            # softmax in place: one exponential and no second buffer (`logsumexp` would make one)
            highest = logits.amax(-1, keepdim=True)
            target_logit = logits.gather(1, safe_target[:, None]).sub_(highest)[:, 0]
            exponentials = logits.sub_(highest).exp_()
            normaliser = exponentials.sum(-1)
            ce_sum += ((normaliser.log() - target_logit) * valid).sum()
            if (need_hidden or need_weight) and ce_weight:
                scale = valid.to(sum_dtype) * ce_weight
                probs = exponentials.mul_((scale / normaliser)[:, None])
                probs.scatter_add_(1, safe_target[:, None], -scale[:, None])
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
    distillation: TokenLoss | None = None,
    distillation_weight: float = 0.0,
    distillation_starts: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cross-entropy, and optionally a teacher's loss, summed over tokens.

    Args:
        hidden: `(M, H)`, the vectors that `weight` turns into logits.
        weight: `(V, H)`, the output matrix.
        targets: `(M,)` token ids; -100 counts for nothing, in either loss.
        ce_weight, distillation_weight: factors of the two sums in `total`.
        distillation: per-token loss of one chunk of logits, differentiated by autograd; `index` tells which of the M
            tokens it sees.
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
