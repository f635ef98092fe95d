"""Brier scores of patches: how good a distribution is, from samples alone.

B batch, N patches, K tokens per patch, P = B * N.
"""

import torch

from modeling_latentforge import LatentForgeForCausalLM


def brier_scores(first: torch.Tensor, second: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Brier-n for n = 1 .. K, each the mean over patches of an unbiased estimate.

    `Brier(P, y) = 2 P(y) - sum_x P(x)^2`, estimated from two independent draws by `1{a = y} + 1{b = y} - 1{a = b}`,
    where the outcome is the first n tokens of the patch (CALM, arXiv 2510.27688, section 5). Higher is better; 0 is
    what a model gets that never agrees with anything, 1 is certainty that is right. A deterministic model gets `2 *
    accuracy - 1`.

    Args:
        first, second: `(P, K)`, independent draws given the same context.
        targets: `(P, K)`, what the text says.

    Returns:
        `(K,)`. Not clamped: a negative score says that the model is worse than abstaining.
    """
    if not first.shape == second.shape == targets.shape:
        raise ValueError(
            f"Draws and targets are of one shape, (patches, tokens); got {tuple(first.shape)}, {tuple(second.shape)} "
            f"and {tuple(targets.shape)}."
        )

    def prefix_matches(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a == b).long().cumprod(dim=1).double().mean(0)

    return prefix_matches(first, targets) + prefix_matches(second, targets) - prefix_matches(first, second)


@torch.no_grad()
def draw_patches(
    model: LatentForgeForCausalLM, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.LongTensor:
    """One draw of every patch but the first, given the true text before it: `(B, T) -> (B, N - 1, K)`, T = N * K.

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
