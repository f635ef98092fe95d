"""Patches that a parallel decoder writes in one shot, judged by the teacher: which of them could it never have
written, and how many of their tokens would it keep as a draft?

B rows, T tokens, K tokens per patch, M = T // K - 1 places (patch 0 has no context), V vocabulary.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers.cache_utils import DynamicCache

from ..losses.aligned_noise import choice_interval
from .patch_draws import draw_tokens


# a token that the teacher gives less than this, at its place in the patch, makes the patch impossible
IMPOSSIBLE = 1e-4


@torch.no_grad()
def teacher_logits(teacher: Any, input_ids: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """What the teacher says about each token of patches `(B, M, K)` that stand after the true text `input_ids (B, T)`
    before their place: logits `(B, M, K, V)`.

    One pass over the text, one over all patches, each of which sees the text before it and itself.
    """
    batch, places, patch_size = patches.shape
    device = input_ids.device
    cache = DynamicCache(config=teacher.config.get_text_config())
    of_text = teacher(input_ids=input_ids, past_key_values=cache, use_cache=True).logits
    first = of_text[:, patch_size - 1 : -1 : patch_size]  # (B, M, V)
    if patch_size == 1:
        return first[:, :, None]
    starts = patch_size * torch.arange(1, places + 1, device=device)
    count = patch_size - 1  # nothing is asked behind a patch's last token
    offsets = torch.arange(count, device=device)
    text = (torch.arange(input_ids.shape[1], device=device) < starts[:, None]).repeat_interleave(count, 0)
    branch = torch.arange(places, device=device).repeat_interleave(count)
    place = offsets.repeat(places)
    own = (branch[:, None] == branch) & (place[:, None] >= place)
    seen = torch.cat([text, own], dim=1)
    mask = torch.zeros(seen.shape, dtype=teacher.dtype, device=device)
    mask = mask.masked_fill(~seen, torch.finfo(teacher.dtype).min)
    logits = teacher(
        input_ids=patches[..., :-1].flatten(1),
        attention_mask=mask.expand(batch, 1, -1, -1),
        position_ids=(starts[:, None] + offsets).flatten().expand(batch, -1),
        past_key_values=cache,
        use_cache=True,
    ).logits.unflatten(1, (places, count))
    return torch.cat([first[:, :, None], logits], dim=2)


def kept_tokens(kept: torch.Tensor) -> torch.Tensor:
    """`(..., K)`, what is kept of each token -> the tokens `(...)` before the first that is not; of probabilities,
    their mean."""
    return kept.double().cumprod(-1).sum(-1)


@torch.no_grad()
def one_shot_figures(
    model: Any,
    teacher: Any,
    rows: torch.Tensor,
    batch_size: int = 4,
    seed: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, float]:
    """Figures of one patch at every place of `rows (R, T)`, sampled at temperature 1 and greedy.

    Args:
        model: a student with a parallel decoder in eval mode; None: the teacher writes, token by token.
        teacher: a token LM of the same vocabulary, in eval mode.
        rows: text without padding, T a multiple of K; with `model` None of 4.
        progress: wraps the list of batches.

    Returns:
        `impossible`: share of sampled patches with a token that the teacher gives less than `IMPOSSIBLE`;
        `accepted_greedy`: tokens of a greedy patch before the first that the teacher, greedy, would not have written;
        `accepted_sampled`: the mean number that survives the test of a drafted sample: of an aligned head those that
        the teacher itself draws with the same noise, of an energy head, whose probabilities nobody knows, each with
        the teacher's probability of it, of a regression head with min(1, p / q).
        `patches`: judged.

    Raises:
        ValueError: rows that are not whole patches.
    """
    patch_size = 4 if model is None else model.config.patch_size
    if rows.shape[1] % patch_size:
        raise ValueError(f"rows of {rows.shape[1]} tokens are no whole patches of {patch_size}")
    sums = {"impossible": 0.0, "accepted_greedy": 0.0, "accepted_sampled": 0.0}
    count = 0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for ids in progress(list(rows.split(batch_size))):
            if model is None:
                sampled, kept, greedy = _of_teacher(teacher, ids, patch_size)
            else:
                sampled, kept, greedy = _of_student(model, teacher, ids)
            sums["accepted_sampled"] += float(kept_tokens(kept).sum())
            logits = teacher_logits(teacher, ids, sampled)
            said = logits.float().log_softmax(-1).gather(3, sampled[..., None])[..., 0].exp()
            sums["impossible"] += float((said < IMPOSSIBLE).any(-1).sum())
            of_greedy = teacher_logits(teacher, ids, greedy).argmax(-1) == greedy
            sums["accepted_greedy"] += float(kept_tokens(of_greedy).sum())
            count += sampled.shape[0] * sampled.shape[1]
    return {name: value / count for name, value in sums.items()} | {"patches": float(count)}


def _of_teacher(teacher: Any, ids: torch.Tensor, patch_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    patches = ids[:, patch_size:].unflatten(1, (-1, patch_size)).clone()
    greedy = patches.clone()
    for place in range(patch_size):
        patches[..., place] = draw_tokens(teacher_logits(teacher, ids, patches)[:, :, place].float().softmax(-1))
        greedy[..., place] = teacher_logits(teacher, ids, greedy)[:, :, place].argmax(-1)
    return patches, torch.ones(patches.shape), greedy


def _of_student(model: Any, teacher: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sampled patches `(B, M, K)`, what is kept of each token as a draft, greedy patches."""
    patch_size = model.config.patch_size
    conditions = model._conditions(model._lay_out(ids, None, 0), None, False)[0][:, 1:-1]  # (B, M, H)
    noise = model.head.draw_noise(conditions.shape[:-1], conditions) if model.head.noise_size else None

    def logits_of(noise: torch.Tensor | None) -> torch.Tensor:
        vectors = model._decode_parallel(model.head.sample(conditions, noise))
        return model.get_output_embeddings()(vectors).unflatten(1, (-1, patch_size))

    logits = logits_of(noise)
    greedy = logits_of(None).argmax(-1)
    if noise is None:
        q = logits.float().softmax(-1)
        sampled = draw_tokens(q)
        p = teacher_logits(teacher, ids, sampled).float().softmax(-1)
        kept = (p / q.clamp_min(1e-30)).gather(3, sampled[..., None])[..., 0].clamp(max=1)
        return sampled, kept, greedy
    sampled = logits.argmax(-1)
    says = teacher_logits(teacher, ids, sampled)
    if not model.is_aligned:
        return sampled, says.float().softmax(-1).gather(3, sampled[..., None])[..., 0], greedy
    lower, width = choice_interval(says.flatten(0, 2), sampled.flatten())
    own = noise.flatten()
    return sampled, ((lower <= own) & (own < lower + width)).view_as(sampled), greedy
