"""Patches that a model writes after true text, at every patch start of a row in one go, and their Brier scores.

B batch, T tokens, N = T // K patches, M = N - 1 places (patch 0 has no context), S draws, K tokens per patch, V
vocabulary, W decoder window.

    token model       one pass over the text; then M * S branches step by step, each sees the text before its own place
                      and itself (a mask of four dimensions over one cache)
    autoregressive    one pass over the text; then M * S branches, of which only the small decoder runs: a patch's
                      tokens need no backbone step
    parallel          one pass over the text gives every patch's latent and with it all K softmaxes

All are given the same rows, cut at the same places, so that context and positions are equal for all.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import DynamicCache

from modeling_latentforge.token_lookup import begin_history, extend_history

from .brier import mixture_terms, patch_outcomes, smooth_outcomes


# logits alive at once, in elements: 2^24 fp32 values are 64 MB
CHUNK_ELEMENTS = 2**24
CHUNK_TOKENS = 2**14  # of the text; small vocabularies would make batches whose attention leaves the caches


class PatchDraws(NamedTuple):
    """What a model makes of the places of a batch of rows.

    Attributes:
        ids: `(S, B, M, K)`, independent draws.
        target_probability: `(B, M, K)`, P of the true patch's first n tokens.
        collision: `(B, M, K)`, an unbiased estimate of `sum_x P(x)^2` over the first n tokens.
    """

    ids: torch.Tensor
    target_probability: torch.Tensor
    collision: torch.Tensor


def is_student(model: Any) -> bool:
    """Whether a causal LM is one of ours, with a backbone over patches."""
    return hasattr(model, "sample_latents")


def draw_tokens(probabilities: torch.Tensor) -> torch.Tensor:
    """One id for each distribution, `(..., V) -> (...)`, by inverting the cumulated distribution."""
    cumulated = probabilities.double().cumsum(-1)
    number = torch.rand(*cumulated.shape[:-1], 1, dtype=torch.float64, device=cumulated.device) * cumulated[..., -1:]
    # rounding may put the number at the very end
    return torch.searchsorted(cumulated, number, right=True)[..., 0].clamp(max=cumulated.shape[-1] - 1)


@torch.no_grad()
def draw_after_text(
    model: Any, input_ids: torch.Tensor, patch_size: int, num_draws: int = 2, noise_samples: int = 8
) -> PatchDraws:
    """Draw patches 1 .. N - 1 of every row, each after the true text before it.

    Temperature 1, nothing cut off. Of a head that reads noise with a parallel decoder, `ids` are the likeliest tokens
    of one latent each, as CALM writes, while the probabilities are those of the decoder's softmaxes.

    Args:
        model: a causal LM in eval mode, a student of this patch size or a token model.
        input_ids: `(B, T)`, T a multiple of K, text without padding.
        patch_size: K.
        num_draws: S, at least 2 for Brier scores.
        noise_samples: latents per place behind the probabilities of such a head, at least 2.

    Raises:
        ValueError: another patch size than the student's, fewer than two patches, layers that do not attend to the
            whole text.
    """
    if input_ids.shape[1] % patch_size or input_ids.shape[1] < 2 * patch_size:
        raise ValueError(
            f"rows of {input_ids.shape[1]} tokens are not two or more whole patches of {patch_size}: the first one "
            "has no text before it"
        )
    if not is_student(model):
        return _draw_tokens_lm(model, input_ids, patch_size, num_draws)
    if model.config.patch_size != patch_size:
        raise ValueError(f"the student's patches hold {model.config.patch_size} tokens, asked are {patch_size}")
    if model.config.decoder_type == "parallel":
        return _draw_parallel(model, input_ids, num_draws, noise_samples)
    if not model.head.noise_size:
        return _draw_autoregressive(model, input_ids, num_draws)
    # each draw of the noise makes latents of its own, in the text that was read as well
    draws = [_draw_autoregressive(model, input_ids, 1) for _ in range(num_draws)]
    ids, target, collision = (torch.stack(x) for x in zip(*draws, strict=True))
    # P(y) is the mean over noise; sum P^2 is not the mean of its square: only what two independent draws agree on
    same = (ids[0, 0] == ids[1, 0]).long().cumprod(-1).double()
    return PatchDraws(ids[:, 0], target.mean(0), same)


def _branch(
    first: torch.Tensor, targets: torch.Tensor, num_draws: int, step: Callable[[torch.Tensor, int], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw K tokens one after the other: ids `(B, M, S, K)`, and `sum_x P(x)^2` of n tokens `(B, M, K)`.

    `sum_x P(x)^2` over n tokens is `E[P(x_<n) sum_v p(v | x_<n)^2]`, x drawn from P: the last token is summed exactly.

    Args:
        first: `(B, M, V)`, distributions of the first token.
        targets: `(B, M, K)`, for their number only.
        step: (ids `(B, M, S)` that were drawn, their place in the patch) -> distributions `(B, M, S, V)`.
    """
    probabilities = first[:, :, None].expand(-1, -1, num_draws, -1)
    drawn: list[torch.Tensor] = []
    collision: list[torch.Tensor] = []
    of_prefix = torch.ones(probabilities.shape[:3], dtype=torch.float64, device=first.device)
    for place in range(targets.shape[-1]):
        if place:
            probabilities = step(drawn[-1], place - 1)
        collision.append((of_prefix * probabilities.square().sum(-1).double()).mean(2))
        drawn.append(draw_tokens(probabilities))
        of_prefix = of_prefix * probabilities.gather(3, drawn[-1][..., None])[..., 0].double()
    return torch.stack(drawn, -1), torch.stack(collision, -1)


def _target_probability(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`(B, M, K, V)` and `(B, M, K)` -> `(B, M, K)`: probability of the true patch's first n tokens."""
    logs = logits.float().gather(3, targets[..., None])[..., 0] - logits.float().logsumexp(-1)
    return logs.double().cumsum(-1).exp()


# -- token models


def _draw_tokens_lm(model: Any, input_ids: torch.Tensor, patch_size: int, num_draws: int) -> PatchDraws:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(config, "sliding_window", None)
    if kinds or (window and getattr(config, "use_sliding_window", True) and not getattr(config, "layer_types", None)):
        raise ValueError(
            f"a {config.model_type} model with {', '.join(sorted(kinds)) or 'a sliding window'} cannot share one "
            "cache between places: score it on rows no longer than its window with `generate`, or leave it out"
        )
    batch, length = input_ids.shape
    places = length // patch_size - 1  # M
    device = input_ids.device
    cache = DynamicCache(config=config)
    logits = model(input_ids=input_ids, past_key_values=cache, use_cache=True).logits
    targets = input_ids[:, patch_size:].unflatten(1, (-1, patch_size))
    logits = logits[:, patch_size - 1 : -1].unflatten(1, (-1, patch_size))  # (B, M, K, V)

    starts = patch_size * torch.arange(1, places + 1, device=device)  # of the places' patches
    starts = starts.repeat_interleave(num_draws)  # (M * S,), a branch each
    branches = torch.arange(len(starts), device=device)
    text = torch.arange(length, device=device) < starts[:, None]  # (M * S, T)
    own = branches[:, None] == branches  # (M * S, M * S)
    dtype = model.dtype

    def step(drawn: torch.Tensor, place: int) -> torch.Tensor:
        seen = torch.cat([text, own.repeat(1, place + 1)], dim=1)
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
        output = model(
            input_ids=drawn.flatten(1),
            attention_mask=mask.expand(batch, 1, -1, -1),
            position_ids=(starts + place).expand(batch, -1),
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits.float().softmax(-1).unflatten(1, (places, num_draws))

    ids, collision = _branch(logits[:, :, 0].float().softmax(-1), targets, num_draws, step)
    return PatchDraws(ids.permute(2, 0, 1, 3), _target_probability(logits, targets), collision)


# -- students


def _draw_autoregressive(model: Any, input_ids: torch.Tensor, num_draws: int) -> PatchDraws:
    decoder, patch_size = model.decoder, model.config.patch_size
    device = input_ids.device
    places = input_ids.shape[1] // patch_size - 1  # M
    grid = model._lay_out(input_ids, None, None)
    conditions, _ = model._conditions(grid, None, False)
    latents = model.sample_latents(conditions, sample_noise=bool(model.head.noise_size))
    hidden, inputs, windows, memory = decoder(grid.input_ids, None, latents, conditions)
    output = model.get_output_embeddings()
    targets = input_ids[:, patch_size:].unflatten(1, (-1, patch_size))
    logits = output(hidden[:, patch_size - 1 : -1]).unflatten(1, (-1, patch_size))  # (B, M, K, V)

    starts = patch_size * torch.arange(1, places + 1, device=device)  # (M,)

    def branches(x: torch.Tensor) -> torch.Tensor:
        """`(B, M, ...)` -> `(B * M * S, ...)`."""
        return x.repeat_interleave(num_draws, dim=1).flatten(0, 1)

    # what `LatentForgeCache` would hold at each place
    taps = starts[:, None] + torch.arange(model.config.decoder_conv_size - 1, device=device)
    recent = branches(inputs[:, taps])
    before = starts[:, None] - (decoder.window - 1) + torch.arange(decoder.window - 1, device=device)  # (M, W - 1)
    window_mask = branches((before >= 0).expand(len(input_ids), -1, -1))
    held = [
        tuple(branches(x[:, :, before.clamp(min=0)].transpose(1, 2)) for x in pair) for pair in windows
    ]  # (B, h, T, d) -> (B * M * S, h, W - 1, d)
    memory_mask = None
    if memory is not None:
        known = torch.arange(conditions.shape[1], device=device) <= torch.arange(1, places + 1, device=device)[:, None]
        memory_mask = branches(known.expand(len(input_ids), -1, -1))[:, None, None]
        memory = tuple(branches(x[:, None].expand(-1, places, -1, -1, -1)) for x in memory)
    latent_embeds = branches(decoder.embed_latents(latents[:, 1 : places + 1]))[:, None]
    positions = branches(starts.expand(len(input_ids), -1))
    state: dict[str, Any] = {"recent": recent, "windows": held, "mask": window_mask}
    if decoder.lookup is not None:
        rows = input_ids.repeat_interleave(places, dim=0)
        texts = begin_history(rows, None, starts.tolist() * len(input_ids), decoder.lookup.sizes)
        state["history"], state["runs"] = (x.repeat_interleave(num_draws, dim=0) for x in texts)

    def step(drawn: torch.Tensor, place: int) -> torch.Tensor:
        seen = torch.cat([state["mask"], state["mask"].new_ones(len(positions), 1)], dim=1)
        embeds = latent_embeds
        if decoder.lookup is not None:
            state["history"], state["runs"], found, levels = extend_history(
                state["history"], state["runs"], drawn.flatten(), None, decoder.lookup.boundaries_on(drawn.device)
            )
            embeds = embeds + decoder.step_lookup(found, levels)
        vectors, state["recent"], state["windows"] = decoder.step(
            drawn.flatten(),
            None,
            embeds,
            positions + place,
            state["recent"],
            state["windows"],
            seen[:, None, None],
            memory,
            memory_mask,
        )
        state["mask"] = seen[:, 1:]
        return output(vectors)[:, 0].float().softmax(-1).view(*drawn.shape, -1)

    ids, collision = _branch(logits[:, :, 0].float().softmax(-1), targets, num_draws, step)
    return PatchDraws(ids.permute(2, 0, 1, 3), _target_probability(logits, targets), collision)


def _draw_parallel(model: Any, input_ids: torch.Tensor, num_draws: int, noise_samples: int) -> PatchDraws:
    patch_size = model.config.patch_size
    grid = model._lay_out(input_ids, None, 0)
    conditions = model._conditions(grid, None, False)[0][:, 1:-1].flatten(0, 1)  # (B * M, H)
    targets = input_ids[:, patch_size:].reshape(-1, patch_size)  # (B * M, K)
    has_noise = bool(model.head.noise_size)
    needed = max(noise_samples, num_draws) if has_noise else 1
    step = max(1, CHUNK_ELEMENTS // (needed * patch_size * model.config.vocab_size))
    drawn: list[torch.Tensor] = []
    target: list[torch.Tensor] = []
    collision: list[torch.Tensor] = []
    for condition, truth in zip(conditions.split(step), targets.split(step), strict=True):
        latents = model.sample_latents(condition.expand(needed, -1, -1), sample_noise=has_noise)  # (S', P, D)
        vectors = model._decode_parallel(latents).unflatten(1, (-1, patch_size))
        probabilities = model.get_output_embeddings()(vectors).float().softmax(-1)  # (S', P, K, V)
        if has_noise:
            drawn.append(probabilities[:num_draws].argmax(-1))
        else:
            drawn.append(draw_tokens(probabilities.expand(num_draws, -1, -1, -1)))
        known = mixture_terms(probabilities, truth)
        target.append(known[0])
        collision.append(known[1])
    shape = (len(input_ids), -1, patch_size)
    return PatchDraws(
        torch.cat(drawn, dim=1).view(num_draws, *shape),
        torch.cat(target).view(shape),
        torch.cat(collision).view(shape),
    )


# -- scores over a text


def plan_positions(num_rows: int, block_size: int, patch_size: int, positions: int) -> tuple[int, list[int], int]:
    """Rows, phases and tokens per row that give so many positions, where there is text enough.

    A row cut so many tokens later has other patch starts: up to K phases, spread over the patch, give more positions
    from the same text. All phases cut the row to the same length, one patch less than the block.

    Returns:
        rows to use, phases (tokens cut off on the left), tokens per cut row.
    """
    length = block_size // patch_size * patch_size
    per_row = length // patch_size - 1
    if num_rows * per_row >= positions:
        return -(-positions // per_row), [0], length
    per_row -= 1
    count = min(patch_size, -(-positions // max(1, num_rows * per_row)))
    num_rows = min(num_rows, -(-positions // (per_row * count)))
    return num_rows, [phase * patch_size // count for phase in range(count)], length - patch_size


@torch.no_grad()
def brier_sums(
    model: Any,
    rows: torch.Tensor,
    patch_size: int,
    positions: int,
    noise_samples: int = 8,
    seed: int = 0,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> dict[str, torch.Tensor]:
    """Brier outcomes of a model summed over the positions of each row.

    Args:
        model: as in [`draw_after_text`]; put in eval mode for the time of the call.
        rows: `(R, T)` ids, text without padding.
        patch_size: K.
        positions: how many patch starts to score, see [`plan_positions`]; fewer where the text has no more.
        noise_samples: as there.
        seed: of all draws; they depend on the row's number, not on the batch before.
        progress: wraps the list of batches.

    Returns:
        `sampled` and `smooth`, `(R', K)`: from two draws, as published, and from known probabilities; `counts (R',)`.
    """
    num_rows, phases, length = plan_positions(rows.shape[0], rows.shape[1], patch_size, positions)
    config = model.config.get_text_config()
    # logits of the text, and of the branches step by step, are held at once
    step = max(1, min(CHUNK_ELEMENTS // config.vocab_size, CHUNK_TOKENS) // length)
    batches = [(start, phase) for start in range(0, num_rows, step) for phase in phases]
    sums = {name: torch.zeros(num_rows, patch_size, dtype=torch.float64) for name in ("sampled", "smooth")}
    counts = torch.zeros(num_rows, dtype=torch.long)
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng():
            for start, phase in progress(batches):
                torch.manual_seed(hash((seed, start, phase)) % 2**31)
                ids = rows[start : min(start + step, num_rows), phase : phase + length].to(model.device)
                drawn = draw_after_text(model, ids, patch_size, noise_samples=noise_samples)
                targets = ids[:, patch_size:].unflatten(1, (-1, patch_size))
                part = slice(start, start + len(ids))
                sums["sampled"][part] += patch_outcomes(drawn.ids[0], drawn.ids[1], targets).sum(1).cpu()
                sums["smooth"][part] += smooth_outcomes(drawn.target_probability, drawn.collision).sum(1).cpu()
                counts[part] += targets.shape[1]
    finally:
        model.train(was_training)
    return {**sums, "counts": counts}
