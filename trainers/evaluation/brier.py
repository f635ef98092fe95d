"""Brier scores of patches: how good a distribution is, from samples alone.

B batch, T tokens, N patches, K tokens per patch, P patches of any rows, R rows of text.

BrierLM (CALM, arXiv 2510.27688, section 5) is 100 times the geometric mean of Brier-1 .. Brier-4. Two things differ
from its released code, which

* multiplies the four scores and clamps the product: four negatives become a high score (a model that is always wrong
  gets 100). Here each factor is clamped at 0 first.
* scores token models at every place of 2048-token rows, and latent models at patch starts of 8192-token rows. Here all
  models that are compared are scored at the same places of the same rows (`patch_draws.py`).
"""

from collections.abc import Mapping
from typing import Any

import torch

from modeling_latentforge import LatentForgeForCausalLM


BRIER_LM_LENGTHS = 4  # the published score ends there; Brier-K tells of the rest of the patch


def patch_outcomes(first: torch.Tensor, second: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Unbiased estimate of Brier-n for n = 1 .. K, of each patch.

    `Brier(P, y) = 2 P(y) - sum_x P(x)^2`, estimated from two independent draws by `1{a = y} + 1{b = y} - 1{a = b}`,
    where the outcome is the first n tokens of the patch (CALM, arXiv 2510.27688, section 5). Higher is better; 0 is
    what a model gets that never agrees with anything, 1 is certainty that is right. A deterministic model gets `2 *
    accuracy - 1`.

    Args:
        first, second: `(..., K)`, independent draws given the same context.
        targets: `(..., K)`, what the text says.

    Returns:
        `(..., K)`, each -1, 0 or 1.
    """
    if not first.shape == second.shape == targets.shape:
        raise ValueError(
            f"Draws and targets are of one shape, (patches, tokens); got {tuple(first.shape)}, {tuple(second.shape)} "
            f"and {tuple(targets.shape)}."
        )

    def prefix_matches(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a == b).long().cumprod(dim=-1)

    return prefix_matches(first, targets) + prefix_matches(second, targets) - prefix_matches(first, second)


def brier_scores(first: torch.Tensor, second: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Brier-n for n = 1 .. K, `(K,)`: the mean over patches of [`patch_outcomes`], `(P, K)` each.

    Not clamped: a negative score says that the model is worse than abstaining.
    """
    return patch_outcomes(first, second, targets).double().mean(0)


def smooth_outcomes(target_probability: torch.Tensor, collision: torch.Tensor) -> torch.Tensor:
    """Brier-n of each patch where probabilities are known: `2 P(y) - sum_x P(x)^2`, the low-variance estimate.

    Args:
        target_probability: `(..., K)`, P of the true patch's first n tokens.
        collision: `(..., K)`, `sum_x P(x)^2` over patches of n tokens, or an unbiased estimate of it.
    """
    return 2 * target_probability - collision


def mixture_terms(probabilities: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """P(y) and `sum_x P(x)^2` of a patch whose tokens are independent given a latent, from S draws of the latent.

    `P(y) ~ mean_s prod_k D_k(y_k | z_s)` and `sum_x P(x)^2 ~ mean_{s != s'} prod_k <D_k(.|z_s), D_k(.|z_s')>`, a
    U-statistic: both are unbiased. With one latent that is no draw (a regression head) both are exact.

    Args:
        probabilities: `(S, P, K, V)`, softmaxes of the decoder.
        targets: `(P, K)`.

    Returns:
        `(P, K)` each, of the first n tokens.
    """
    samples = probabilities.shape[0]
    of_target = probabilities.gather(3, targets.expand(samples, *targets.shape)[..., None])[..., 0].double()
    target_probability = of_target.cumprod(-1).mean(0)
    inner = torch.einsum("spkv,tpkv->pkst", probabilities, probabilities).double().cumprod(1)  # (P, K, S, S)
    if samples == 1:
        return target_probability, inner[..., 0, 0]
    diagonal = inner.diagonal(dim1=-2, dim2=-1).sum(-1)
    return target_probability, (inner.sum((-2, -1)) - diagonal) / (samples * (samples - 1))


def brier_lm(scores: torch.Tensor) -> torch.Tensor:
    """`(..., K)` Brier-n -> `(...)`, 0 to 100: 100 times the geometric mean of the first four (all K where those are
    fewer), each clamped at 0 before the product."""
    factors = scores[..., :BRIER_LM_LENGTHS].double().clamp(min=0)
    return 100 * factors.prod(-1).pow(1 / factors.shape[-1])


def bootstrap_means(sums: torch.Tensor, counts: torch.Tensor, resamples: int = 1000, seed: int = 0) -> torch.Tensor:
    """Means over patches when whole rows are drawn again with replacement, `(resamples, K)`.

    Patches of a row share their text: drawn one by one, intervals would come out too narrow.

    Args:
        sums: `(R, K)`, over the patches of each row.
        counts: `(R,)`, patches of each row.
        resamples: how often the rows are drawn; with the same seed and R, the same rows for every model.
        seed: of the draw.
    """
    rows = sums.shape[0]
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(resamples, rows, dtype=torch.float64)
    drawn = torch.randint(rows, (resamples, rows), generator=generator)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return (weights @ sums.double()) / (weights @ counts.double())[:, None]


def summarize_brier(
    sums: torch.Tensor, counts: torch.Tensor, resamples: int = 1000, seed: int = 0, level: float = 0.95
) -> dict[str, Any]:
    """Scores with what they are uncertain by.

    Args:
        sums, counts, resamples, seed: as in [`bootstrap_means`].
        level: of the intervals, percentiles of the bootstrap.

    Returns:
        `brier`, `brier_error`: K numbers, Brier-n and their standard errors; `brier_lm`, `brier_lm_error`,
        `brier_lm_interval` (low, high); `positions`, `rows`.
    """
    means = sums.double().sum(0) / counts.double().sum()
    drawn = bootstrap_means(sums, counts, resamples, seed)
    lm = brier_lm(drawn)
    edges = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    return {
        "brier": means.tolist(),
        "brier_error": drawn.std(0).tolist(),
        "brier_lm": float(brier_lm(means)),
        "brier_lm_error": float(lm.std()),
        "brier_lm_interval": torch.quantile(lm, edges).tolist(),
        "positions": int(counts.sum()),
        "rows": int(sums.shape[0]),
    }


def brier_difference(
    ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """BrierLM of one model less another's on the same rows, which are drawn again together.

    Args:
        ours, theirs: `sums (R, K)` and `counts (R,)` of the same rows.

    Returns:
        `difference` and `interval` (95 %, low and high).

    Raises:
        ValueError: other rows.
    """
    if not torch.equal(ours["counts"], theirs["counts"]):
        raise ValueError("a difference is of the same patches of the same rows: score both models on one text")
    drawn = [brier_lm(bootstrap_means(x["sums"], x["counts"], resamples, seed)) for x in (ours, theirs)]
    means = [brier_lm(x["sums"].double().sum(0) / x["counts"].double().sum()) for x in (ours, theirs)]
    edges = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {
        "difference": float(means[0] - means[1]),
        "interval": torch.quantile(drawn[0] - drawn[1], edges).tolist(),
    }


@torch.no_grad()
def draw_patches(
    model: LatentForgeForCausalLM, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.LongTensor:
    """One draw of every patch but the first, given the true text before it: `(B, T) -> (B, N - 1, K)`, T = N * K.
    For rows with padding; `patch_draws.draw_after_text` draws from every kind of model, without.

    A head that reads noise draws a latent, which is decoded to its likeliest tokens (CALM); without noise the tokens
    are drawn from the decoder's K softmaxes.

    Raises:
        ValueError: an autoregressive decoder, whose patches must be written token by token (`generate`).
    """
    if model.config.decoder_type != "parallel":
        raise ValueError(
            f"draw_patches is for parallel decoders; this one is {model.config.decoder_type}: use `generate`."
        )
    patch_size = model.config.patch_size
    # place t predicts token t + 1: place K - 1 is the first of patch 1
    output = model(input_ids, attention_mask=attention_mask, patch_offset=0, use_cache=False, sample_noise=True)
    logits = output.logits[:, patch_size - 1 : -1].unflatten(1, (-1, patch_size))  # patches 1 .. N - 1
    if model.head.noise_size:
        return logits.argmax(-1)
    return torch.distributions.Categorical(logits=logits.float()).sample()
