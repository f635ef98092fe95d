"""Differences between what must be equal: with and without cache, padded and alone, saved and loaded, sampled and
scored.

B batch, T tokens, K tokens per patch, V vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM


def logits_by_token(model: Any, ids: torch.Tensor, prompt: int = 5) -> torch.Tensor:
    """Logits `(B, T, V)` of a prompt, and then of one token after another through the cache."""
    output = model(ids[:, :prompt], use_cache=True)
    pieces = [output.logits]
    for t in range(prompt, ids.shape[1]):
        output = model(ids[:, t : t + 1], past_key_values=output.past_key_values)
        pieces.append(output.logits)
    return torch.cat(pieces, 1)


def cached_error(model: Any, ids: torch.Tensor, prompt: int = 5) -> float:
    """Largest difference between the cache's logits and one forward pass's, of any causal LM."""
    # a parallel decoder's grid follows the prompt, so that its next token is a patch's first
    is_parallel = getattr(model.config, "decoder_type", None) == "parallel"
    grid = {"patch_offset": -prompt % model.config.patch_size} if is_parallel else {}
    return _largest(logits_by_token(model, ids, prompt) - model(ids, **grid).logits)


@torch.no_grad()
def exactness(
    model: Any, ids: torch.Tensor, lengths: tuple[int, ...], new_tokens: int = 19, folder: Path | None = None
) -> tuple[dict[str, float], bool]:
    """Largest differences of logits, and whether all greedy ids agree.

    Args:
        model: a student, in the dtype that is asked about.
        ids: `(B, T)`, real text.
        lengths: tokens of each row of the left-padded batch.
        new_tokens: generated per row.
        folder: where to save the model to and load it from; None: not measured.

    Returns:
        name -> largest absolute difference. `log-probabilities` only for a regression head: an energy head's belong to
        one noise sample. `generate` keeps fp32 scores whatever the model's dtype, so they are compared in fp32.
    """
    length, pad = ids.shape[1], model.config.pad_token_id
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": pad}
    greedy = {**options, "do_sample": False}
    same = torch.equal(model.generate(ids, **greedy), model.generate(ids, use_cache=False, **greedy))
    found = {"cached": cached_error(model, ids), "left-padded": 0.0}

    mask = torch.ones_like(ids)
    for row, kept in enumerate(lengths):
        mask[row, : length - kept] = 0
    batch = model(ids, attention_mask=mask).logits
    together = model.generate(ids, attention_mask=mask, **greedy)
    for row, kept in enumerate(lengths):
        alone = ids[row : row + 1, length - kept :]
        error = _largest(batch[row, length - kept :] - model(alone).logits[0])
        found["left-padded"] = max(found["left-padded"], error)
        same &= torch.equal(together[row, length:], model.generate(alone, **greedy)[0, kept:])

    if folder is not None:
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
        found["save and load"] = _largest(again(ids).logits - model(ids).logits)
    if model.config.head_config.head_type == "regression":
        torch.manual_seed(1)
        sampled = model.generate(ids, **options, do_sample=True, return_dict_in_generate=True, output_logits=True)
        new = sampled.sequences[:, length:, None]
        kept_scores = torch.stack(sampled.logits, 1).double().log_softmax(-1).gather(2, new)
        grid = {"patch_offset": -length % model.config.patch_size} if model.config.decoder_type == "parallel" else {}
        logits = model(sampled.sequences, **grid).logits[:, length - 1 : -1]
        found["log-probabilities"] = _largest(kept_scores - logits.double().log_softmax(-1).gather(2, new))
    return found, same


def _largest(difference: torch.Tensor) -> float:
    return float(difference.detach().abs().max())
