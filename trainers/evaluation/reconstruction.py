"""Does the codec give the text back? Free-running: posterior mean -> decoder -> argmax, nothing of the text on the
decoder's side.

B batch, T tokens, K tokens per patch, N patches, D latent, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


# logits alive at once, in elements: 2^24 fp32 values are 64 MB
CHUNK_ELEMENTS = 2**24


@dataclass
class ReconstructionCounts:
    """Right and asked-for tokens and patches; they add up over batches and processes."""

    correct_tokens: int = 0
    num_tokens: int = 0
    correct_patches: int = 0
    num_patches: int = 0

    def __add__(self, other: "ReconstructionCounts") -> "ReconstructionCounts":
        return ReconstructionCounts(
            self.correct_tokens + other.correct_tokens,
            self.num_tokens + other.num_tokens,
            self.correct_patches + other.correct_patches,
            self.num_patches + other.num_patches,
        )

    def accuracy(self) -> dict[str, float]:
        """`token_accuracy` and `patch_accuracy` in [0, 1], NaN where nothing was asked."""
        nan = float("nan")
        return {
            "token_accuracy": self.correct_tokens / self.num_tokens if self.num_tokens else nan,
            "patch_accuracy": self.correct_patches / self.num_patches if self.num_patches else nan,
        }


@torch.no_grad()
def count_reconstructed(
    model: Any,
    input_ids: torch.Tensor,
    asked: torch.Tensor | None = None,
    sigma: float = 0.0,
    generator: torch.Generator | None = None,
) -> ReconstructionCounts:
    """Count what the codec gives back of one batch.

    Args:
        model: a codec with `encode` and `decode`; it must be in eval mode, or dropout would be measured.
        input_ids: `(B, T)`, T a multiple of K.
        asked: `(B, T)` bool, the tokens that count; default all. A patch counts when it holds at least one, and is
            right when all of those are: the pads that surround a text are not to be credited.
        sigma: standard deviation of noise added to the latent, in units of the prior's (1).
        generator: of that noise, on the CPU, so that figures agree between devices.

    Raises:
        ValueError: the model is in training mode, or T is no multiple of K.
    """
    if model.training:
        raise ValueError(
            "Reconstruction is measured in eval mode, the model is in training mode: call model.eval() first."
        )
    patch_size, vocab_size = model.config.patch_size, model.config.vocab_size
    if asked is None:
        asked = torch.ones_like(input_ids, dtype=torch.bool)
    latents = model.encode(input_ids).mean  # (B, N, D)
    if sigma:
        noise = torch.randn(latents.shape, generator=generator, dtype=torch.float32)
        latents = latents + sigma * noise.to(latents)
    latents = latents.flatten(0, 1)  # (B * N, D)
    targets, asked = input_ids.reshape(-1, patch_size), asked.reshape(-1, patch_size)
    step = max(1, CHUNK_ELEMENTS // (patch_size * vocab_size))
    right = torch.cat([model.decode(part).argmax(-1) for part in latents.split(step)]) == targets  # (B * N, K)
    counts = torch.stack(
        [(right & asked).sum(), asked.sum(), ((right | ~asked).all(-1) & asked.any(-1)).sum(), asked.any(-1).sum()]
    )
    return ReconstructionCounts(*counts.tolist())


@torch.no_grad()
def reconstruction_accuracy(
    model: Any,
    data: Iterable[Any],
    sigma: float = 0.0,
    seed: int = 0,
    batch_size: int = 8,
    max_tokens: int | None = None,
) -> dict[str, float]:
    """Token and whole-patch accuracy of free-running reconstruction over a dataset.

    Args:
        model: the codec; put in eval mode for the time of the call.
        data: rows as dicts with `input_ids` and optionally `attention_mask` and `labels` (0, respectively -100, where
            nothing is asked), or plain id sequences. A row that is no multiple of K is filled up with EOS, which does
            not count; its last patch does.
        sigma: noise on the latent, `mean + sigma * N(0, 1)`.
        seed: of that noise.
        batch_size: rows at once; the figures do not depend on it, but for the noise's draw.
        max_tokens: stop once so many asked-for tokens are counted.

    Returns:
        `token_accuracy`, `patch_accuracy` in [0, 1], and `num_tokens`, `num_patches`, `sigma`.

    Raises:
        ValueError: no token to measure on.
    """
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    total = ReconstructionCounts()
    try:
        for ids, asked in _batches(data, batch_size, model.config):
            total = total + count_reconstructed(model, ids.to(model.device), asked.to(model.device), sigma, generator)
            if max_tokens is not None and total.num_tokens >= max_tokens:
                break
    finally:
        model.train(was_training)
    if not total.num_tokens:
        raise ValueError(
            "No token to reconstruct: the data is empty, or masked everywhere. Give at least one row with text."
        )
    return {**total.accuracy(), "num_tokens": total.num_tokens, "num_patches": total.num_patches, "sigma": sigma}


@torch.no_grad()
def active_dimensions(model: Any, input_ids: torch.Tensor, threshold: float = 0.01) -> dict[str, Any]:
    """How many of the D numbers of a latent say something about the patch.

    A dimension is active where its posterior mean varies over patches by more than `threshold` (variance, in units of
    the prior's; Burda et al., arXiv 1509.00519, section 5.2). CALM's codec without a clamp on the KL lost 71 of 128.

    Args:
        model: a codec in eval mode.
        input_ids: `(B, T)`, T a multiple of K.

    Returns:
        `active`, `dimensions` (D); `mean_deviation`, the posterior's standard deviation, mean over patches and
        dimensions; `patches`.
    """
    encoding = model.encode(input_ids)
    means = encoding.mean.flatten(0, 1).double()  # (P, D)
    return {
        "active": int((means.var(0) > threshold).sum()),
        "dimensions": means.shape[1],
        "mean_deviation": float(encoding.log_std.double().exp().mean()),
        "patches": means.shape[0],
    }


@torch.no_grad()
def cycle_error(model: Any, latents: torch.Tensor) -> dict[str, float]:
    """How far latents lie from those that the codec makes: `|enc(dec(z)) - z|`, `dec` with its likeliest tokens.

    Args:
        model: a codec in eval mode.
        latents: `(P, D)`, a student's, or posterior means of text, for which the error is a codec's floor.

    Returns:
        `error`, root mean square over patches and dimensions, in units of the prior; `relative`, that over the root
        mean square of z; `patches`.
    """
    step = max(1, CHUNK_ELEMENTS // (model.config.patch_size * model.config.vocab_size))
    squares = 0.0
    for part in latents.split(step):
        again = model.encode(model.decode(part).argmax(-1)).mean[:, 0]  # (P, K) are P rows of one patch
        squares += float((again - part).double().square().sum())
    error = (squares / latents.numel()) ** 0.5
    return {
        "error": error,
        "relative": error / float(latents.double().square().mean().sqrt()),
        "patches": latents.shape[0],
    }


@torch.no_grad()
def student_latents(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Latents `(B * (N - 1), D)` that a student makes of patches 1 .. N - 1, given the true text `(B, T)` before each.
    Of a head that reads noise: one draw."""
    grid = model._lay_out(input_ids, None, 0)
    conditions = model._conditions(grid, None, False)[0][:, 1:-1]
    return model.sample_latents(conditions, sample_noise=bool(model.head.noise_size)).flatten(0, 1)


def _batches(data: Iterable[Any], batch_size: int, config: Any) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    fill = next((i for i in (config.pad_token_id, config.eos_token_id) if isinstance(i, int)), 0)
    rows: list[tuple[torch.Tensor, torch.Tensor]] = []
    for row in data:
        ids, asked = _row(row)
        # rows of unequal length share a batch only when their padded lengths agree: padding a row out would cost more
        # than a smaller batch
        missing = -ids.shape[0] % config.patch_size
        ids = torch.nn.functional.pad(ids, (0, missing), value=fill)
        asked = torch.nn.functional.pad(asked, (0, missing), value=False)
        if rows and (len(rows) == batch_size or rows[0][0].shape != ids.shape):
            yield torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])
            rows = []
        rows.append((ids, asked))
    if rows:
        yield torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows])


def _row(row: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(row, dict):
        ids = torch.as_tensor(row, dtype=torch.long)
        return ids, torch.ones_like(ids, dtype=torch.bool)
    ids = torch.as_tensor(row["input_ids"], dtype=torch.long)
    asked = torch.ones_like(ids, dtype=torch.bool)
    if row.get("attention_mask") is not None:
        asked &= torch.as_tensor(row["attention_mask"]) != 0
    if row.get("labels") is not None:
        asked &= torch.as_tensor(row["labels"]) != -100
    return ids, asked
