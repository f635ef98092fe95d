"""What a model writes, over a grid of temperatures: judged by the teacher, and counted.

A low NLL under a judge alone proves nothing: a text that repeats itself has one (arXiv 2606.08417). So each
temperature gives a point of a frontier, NLL beside entropy, and two texts of people stand beside them.

R texts, T tokens of a prompt, L tokens of a text.
"""

from collections.abc import Callable
from typing import Any

import torch

from .benchmark import samples_whole_patches
from .mauve import judge_texts, mauve
from .speed import only_given_options
from .text_statistics import text_statistics


TEMPERATURES = (0.5, 0.7, 0.85, 1.0, 1.2)


def prompts_and_references(
    rows: torch.Tensor, count: int, prompt_tokens: int, new_tokens: int, end: int | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts, how people went on, and as much other text of people.

    Args:
        rows: `(R', T')` ids of held-out text.
        count: R; fewer where the text has no more.
        prompt_tokens, new_tokens: T and L.
        end: EOS; pieces that hold it are passed over, as models are held back from it too.

    Returns:
        prompts `(R, T)`, references `(R, L)`, and texts `(R, L)` from elsewhere.

    Raises:
        ValueError: the text has fewer than two such pieces.
    """
    length = prompt_tokens + new_tokens
    pieces = rows[:, : rows.shape[1] // length * length].reshape(-1, length)
    if end is not None:
        pieces = pieces[(pieces != end).all(1)]
    count = min(count, len(pieces) // 2)
    if count < 1:
        raise ValueError(
            f"the held-out text has no two pieces of {length} tokens without an end of text: give longer texts, or "
            "lower prompt_tokens or new_tokens"
        )
    # spread over the text: neighbours are of one document
    pieces = pieces[torch.linspace(0, len(pieces) - 1, 2 * count).round().long()]
    return pieces[::2, :prompt_tokens], pieces[::2, prompt_tokens:], pieces[1::2, prompt_tokens:]


def sampling_options(model: Any, temperature: float) -> dict[str, Any]:
    """Arguments of `generate` for a temperature: of tokens, or of whole patches where those have no token's.

    Raises:
        ValueError: an energy head with a parallel decoder above temperature 1, which no sampler of patches offers.
    """
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if not samples_whole_patches(model):
        return {**plain, "temperature": temperature}
    if temperature > 1:
        raise ValueError(
            f"temperature {temperature:g}: whole patches of an energy head can be sharpened, not flattened (at most 1)"
        )
    return plain if temperature == 1 else {**plain, "patch_temperature": temperature, "patch_sampling": "batched"}


@torch.no_grad()
def write_texts(
    model: Any,
    prompts: torch.Tensor,
    new_tokens: int,
    temperature: float,
    batch_size: int = 32,
    seed: int = 0,
    progress: Callable[[Any], Any] = iter,
) -> torch.Tensor:
    """One text of each prompt, `(R, T) -> (R, L)`; EOS is held back, so that all are of one length.

    Nothing of a generation config that came with a checkpoint is used: it may penalise or search.

    Raises:
        ValueError: see [`sampling_options`].
    """
    options = sampling_options(model, temperature)
    pad = model.generation_config.pad_token_id
    options |= {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "pad_token_id": 0 if pad is None else pad}
    texts = []
    with torch.random.fork_rng():
        for number, part in enumerate(progress(prompts.split(batch_size))):
            torch.manual_seed(seed + number)
            ids = part.to(model.device)
            with only_given_options(model):
                written = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            texts.append(written[:, ids.shape[1] :].cpu())
    return torch.cat(texts)


def text_figures(
    texts: torch.Tensor, prompts: torch.Tensor, references: torch.Tensor | None = None, judge: Any = None
) -> dict[str, float]:
    """[`text_statistics`] of `(R, L)` texts; with a judge its NLL of them (`judge_nll`, nats per token, given the
    prompt) and `mauve` against the references."""
    figures = text_statistics(texts)
    if judge is not None:
        nats, features = judge_texts(judge, prompts, texts)
        figures["judge_nll"] = float(nats.double().mean())
        if references is not None:
            figures |= mauve(features, judge_texts(judge, prompts, references)[1])
    return figures
