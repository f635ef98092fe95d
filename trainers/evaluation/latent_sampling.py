"""What likelihood-free patch temperature costs and how far off it is: exact, adaptive batched, and CALM's fixed draws.

    python -m trainers.evaluation.latent_sampling

prints the first table of docs/experiments.md: enumerable distributions, no model. R rows, N draws, V vocabulary.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from modeling_latentforge.latent_sampling import (
    SAMPLERS,
    DrawPool,
    PatchSample,
    log_falling_factorial,
    sample_batched,
    sample_exact,
)

from .speed import only_given_options


Sampler = Callable[..., PatchSample]  # (draw, num_rows, temperature, max_draws, device)


def sample_calm(
    draw: Any,
    num_rows: int,
    temperature: float,
    max_draws: int = 0,
    device: torch.device | str = "cpu",
    num_draws: int = 200,
) -> PatchSample:
    """CALM's algorithm 2 (arXiv 2510.27688), from its description: the reference of comparisons.

    `num_draws` whole patches, counted; those that came up at least n = 1/T times are chosen by the weight C(c, n), and
    if there are none, with n - 1, ... 1. Counting is on tensors here, which the released code does row by row in
    Python. `max_draws` is not used.

    Raises:
        ValueError: 1/T is no whole number.
    """
    n = round(1 / temperature)
    if abs(n * temperature - 1) > 1e-6:
        raise ValueError(f"CALM's algorithm 2 knows temperatures of 1/n only, got {temperature}.")
    rows = torch.arange(num_rows, device=device)
    pool = DrawPool(draw, rows)
    pool.grow(num_draws)
    pool.choose_all_tokens()
    key = pool.keys(2)
    sizes = torch.zeros_like(key).scatter_add_(1, key, torch.ones_like(key)).gather(1, key)
    level = sizes.amax(1, keepdim=True).clamp(max=n).double()
    weights = (log_falling_factorial(sizes, level) - sizes.log()).softmax(1)  # of a draw; a patch has c of them
    ids, logits = pool.take(torch.multinomial(weights, 1)[:, 0])
    met = level[:, 0] == n
    return PatchSample(ids, torch.full_like(rows, num_draws), met, logits)


# -- total variation against draws


def zipf(size: int, power: float) -> torch.Tensor:
    """`(size,)` probabilities falling like rank^-power."""
    weights = torch.arange(1, size + 1).double() ** -power
    return weights / weights.sum()


def spiked(size: int, share: float) -> torch.Tensor:
    """`(size,)` probabilities: one of `share`, the others alike."""
    return torch.cat([torch.tensor([share]), torch.full((size - 1,), (1 - share) / (size - 1))]).double()


DISTRIBUTIONS = {
    "27 patches, Zipf 1": zipf(27, 1.0),
    "256 patches, Zipf 1": zipf(256, 1.0),
    "256 patches, Zipf 0.5": zipf(256, 0.5),
    "300 patches, one of 0.3": spiked(300, 0.3),
}


def draw_from(probabilities: torch.Tensor) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """A `draw` of patches of one id, `(R', count, 1)`."""
    cumulated = probabilities.double().cumsum(0)

    def draw(rows: torch.Tensor, count: int) -> torch.Tensor:
        number = torch.rand(len(rows), count, 1, dtype=torch.float64) * cumulated[-1]
        return torch.searchsorted(cumulated, number, right=True).clamp(max=len(cumulated) - 1)

    return draw


def variation(
    sampler: Sampler, probabilities: torch.Tensor, temperature: float, max_draws: int, num_rows: int = 20_000
) -> dict[str, float]:
    """Total variation of `num_rows` samples to P^(1/T) / Z.

    Returns:
        `variation`; `floor`, the mean of a perfect sampler's with so many rows; `draws` mean per row; `fallback`,
        share of rows that ran into `max_draws` (of CALM's: that found too few repetitions); `collision`, sum_x
        P(x)^2.
    """
    exact = probabilities ** (1 / temperature)
    exact = exact / exact.sum()
    sample = sampler(draw_from(probabilities), num_rows, temperature, max_draws)
    found = torch.bincount(sample.ids[:, 0], minlength=len(exact)) / num_rows
    perfect = torch.distributions.Multinomial(num_rows, exact).sample((50,)) / num_rows
    return {
        "collision": float(probabilities.square().sum()),
        "variation": float((found - exact).abs().sum() / 2),
        "floor": float((perfect - exact).abs().sum(1).mean() / 2),
        "draws": float(sample.draws.double().mean()),
        "fallback": float((~sample.met).double().mean()),
    }


def variation_table(
    temperatures: Sequence[float] = (0.8, 0.5, 0.25),
    distributions: Mapping[str, torch.Tensor] = DISTRIBUTIONS,
    max_draws: int = 1000,
    num_rows: int = 20_000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """[`variation`] of every sampler, one record each. CALM's only where 1/T is a whole number."""
    torch.manual_seed(seed)
    records = []
    for name, probabilities in distributions.items():
        for temperature in temperatures:
            samplers: dict[str, Sampler] = {"exact": sample_exact, "batched": sample_batched}
            samplers["batched, enough 1"] = partial(sample_batched, enough=1.0)
            if abs(1 / temperature - round(1 / temperature)) < 1e-6:
                for count in (50, 200):
                    samplers[f"CALM, {count} draws"] = partial(sample_calm, num_draws=count)
            for form, sampler in samplers.items():
                figures = variation(sampler, probabilities, temperature, max_draws, num_rows)
                records.append({"distribution": name, "temperature": temperature, "sampler": form, **figures})
    return records


def as_markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """One line per distribution and temperature: `variation @ draws` of each sampler."""
    samplers = list(dict.fromkeys(record["sampler"] for record in records))
    lines = ["| patches | sum P^2 | T | floor | " + " | ".join(samplers) + " |", "|---" * (4 + len(samplers)) + "|"]
    groups: dict[tuple, dict[str, Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["distribution"], record["temperature"]), {})[record["sampler"]] = record
    for (name, temperature), group in groups.items():
        first = next(iter(group.values()))
        cells = []
        for sampler in samplers:
            found = group.get(sampler)
            cell = "" if found is None else f"{found['variation']:.3f} @ {found['draws']:.0f}"
            # CALM's has no other way; of ours it says that `max_draws` was too few
            if found is not None and found["fallback"] >= 0.005:
                cell += f" ({found['fallback']:.0%} fallback)"
            cells.append(cell)
        lines.append(
            f"| {name} | {first['collision']:.4f} | {temperature} | {first['floor']:.3f} | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


# -- speed


@contextmanager
def sampler_named(name: str, sampler: Sampler) -> Iterator[list[PatchSample]]:
    """`generate(patch_sampling=name)` runs `sampler` inside the block; yields what it returned."""
    samples: list[PatchSample] = []

    def recorded(*args: Any, **kwargs: Any) -> PatchSample:
        samples.append(sampler(*args, **kwargs))
        return samples[-1]

    before = SAMPLERS.get(name)
    SAMPLERS[name] = recorded
    try:
        yield samples
    finally:
        if before is None:
            del SAMPLERS[name]
        else:
            SAMPLERS[name] = before


def sampling_speed(
    model: Any,
    input_ids: torch.Tensor,
    temperature: float = 0.5,
    max_draws: int = 200,
    new_tokens: int = 64,
    repeats: int = 3,
    samplers: Mapping[str, Sampler] | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Tokens per second of `generate(patch_temperature=...)` with each sampler, in turns, and `plain`: T = 1.

    The first round warms up and does not count. EOS is held back.

    Args:
        model: a student with an energy head and a parallel decoder, in eval mode.
        input_ids: `(B, T)`.
        max_draws: of ours; CALM's draws 200.
        samplers: by name; default exact, batched and CALM's.

    Returns:
        per sampler: `tokens_per_second` (median, all rows together), `runs`, `draws` (mean per row and patch) and
        `fallback`, the share of patches for which `max_draws` were too few: of the exact form those are not exact.
    """
    if samplers is None:
        samplers = {"exact": sample_exact, "batched": sample_batched, "CALM": sample_calm}
    options = {
        "attention_mask": torch.ones_like(input_ids),
        "do_sample": True,
        "top_k": 0,
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "eos_token_id": None,
        "pad_token_id": model.config.pad_token_id or 0,
    }
    runs: dict[str, list[float]] = {name: [] for name in ("plain", *samplers)}
    counted: dict[str, dict[str, float]] = {"plain": {"draws": 1.0, "fallback": 0.0}}
    for turn in range(repeats + 1):
        for name in runs:
            torch.manual_seed(seed + turn)
            started = time.perf_counter()
            with only_given_options(model):
                if name == "plain":
                    model.generate(input_ids, **options)
                else:
                    asked = {"patch_temperature": temperature, "patch_sampling": name, "max_draws": max_draws}
                    with sampler_named(name, samplers[name]) as samples:
                        model.generate(input_ids, **asked, **options)
            if input_ids.is_cuda:
                torch.cuda.synchronize()
            if turn:
                runs[name].append(input_ids.shape[0] * new_tokens / (time.perf_counter() - started))
            if name != "plain":
                counted[name] = {
                    "draws": float(torch.cat([sample.draws for sample in samples]).double().mean()),
                    "fallback": float((~torch.cat([sample.met for sample in samples])).double().mean()),
                }
    return {
        name: {"tokens_per_second": statistics.median(speeds), "runs": speeds, **counted[name]}
        for name, speeds in runs.items()
    }


if __name__ == "__main__":
    sys.stdout.write(as_markdown(variation_table()) + "\n")
