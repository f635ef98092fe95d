"""The questions of docs/experiments.md: each a table of variants, trained side by side and judged on held-out text."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .brier import brier_scores, draw_patches
from .side_by_side import STUDENT, Run, SideBySide


# figure name -> value, of one trained run
Judge = Callable[[SideBySide, Run], dict[str, float]]


def held_out_nll(table: SideBySide, run: Run) -> dict[str, float]:
    """Nats per token, whole and by context length."""
    result = table.result(run)
    return {"NLL": result["nll"]} | {f"at context {name}": nll for name, nll in result["nll_by_context"].items()}


def brier(table: SideBySide, run: Run) -> dict[str, float]:
    """Brier-n of two draws per patch, in percent."""
    model = table.load(run)
    torch.manual_seed(0)
    draws: list[list[torch.Tensor]] = [[], [], []]
    for batch in table.eval_batches():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        patches = ids.unflatten(1, (-1, run.patch_size))[:, 1:]
        whole = mask.unflatten(1, (-1, run.patch_size))[:, 1:].bool().all(-1)
        for kept, values in zip(
            draws, (draw_patches(model, ids, mask), draw_patches(model, ids, mask), patches), strict=True
        ):
            kept.append(values[whole])
    scores = brier_scores(*(torch.cat(kept) for kept in draws))
    return {f"Brier-{n}": 100 * float(score) for n, score in enumerate(scores[:4], start=1)}


def teacher_divergence(table: SideBySide, run: Run) -> dict[str, float]:
    """KL(teacher || student) in nats per token, and the text's own NLL."""
    result = table.result(run)
    return {"KL to the teacher": result["kl_to_teacher"], "NLL": result["nll"]}


@dataclass(frozen=True)
class Experiment:
    """A question and the variants that answer it.

    Attributes:
        question: as it stands in docs/experiments.md.
        variants: name -> what it changes in the base run.
        judge: figures of a trained run.
        needs_codec: variants read a trained codec.
    """

    question: str
    variants: Mapping[str, Callable[[Run], Run]]
    judge: Judge = held_out_nll
    needs_codec: bool = False
    base: Mapping[str, Any] = field(default_factory=dict)


def _student(**fields: Any) -> Callable[[Run], Run]:
    return lambda run: replace(run, student={**run.student, **fields})


def _window(patches: int) -> Callable[[Run], Run]:
    return lambda run: replace(run, student={**run.student, "decoder_window": patches * run.patch_size})


def _weights(**weights: float) -> Callable[[Run], Run]:
    return lambda run: replace(run, weights=weights)


# The token LM that teaches, whatever the students' size.
TEACHER = Run("token_lm", 4e-3, student={"hidden_size": 256, "num_hidden_layers": 4})


def _taught(ce_weight: float = 0.0, **signal: Any) -> Callable[[Run], Run]:
    weights = {"ce_weight": ce_weight, "kd_weight": 1.0 - ce_weight}
    return lambda run: replace(run, weights=weights, teacher=TEACHER, signal=signal)


EXPERIMENTS = {
    "context": Experiment(
        "What does each kind of model make of a long context?",
        {
            "token LM": lambda run: Run("token_lm", run.learning_rate, run.seed),
            "decoder alone": lambda run: replace(run, kind="decoder_alone"),
            "student, one latent per patch": _student(decoder_memory="none"),
            "student, memory of patches": lambda run: run,
        },
    ),
    "decoder_window": Experiment(
        "How many tokens back should the decoder see?",
        {f"{n} patches": _window(n) for n in (1, 2, 4)},
    ),
    "decoder_memory": Experiment(
        "Does the decoder gain from all earlier patch states, beside its own patch's latent?",
        {"none": _student(decoder_memory="none"), "patches": _student(decoder_memory="patches")},
    ),
    "decoder_depth": Experiment("One decoder layer or two?", {str(n): _student(num_decoder_layers=n) for n in (1, 2)}),
    "mse_weight": Experiment(
        "Does pulling the latent to the codec's help?",
        {f"{weight:g}": _weights(ce_weight=1.0, mse_weight=weight) for weight in (0.0, 0.1, 1.0)},
        needs_codec=True,
    ),
    "input_mode": Experiment(
        "Should the backbone read token embeddings or the codec's latents?",
        {mode: _student(input_mode=mode) for mode in ("tokens", "latents")},
        needs_codec=True,
    ),
    "parallel_head": Experiment(
        "With the codec's parallel decoder: one vector, or samples trained with the energy score?",
        {
            "regression (ce 1, mse 1)": lambda run: replace(
                run, student={"decoder_type": "parallel"}, weights={"ce_weight": 1.0, "mse_weight": 1.0}
            ),
            "regression (ce 1)": lambda run: replace(run, student={"decoder_type": "parallel"}),
            "energy": lambda run: replace(
                run,
                student={"decoder_type": "parallel", "head_config": {"head_type": "energy"}},
                weights={"ce_weight": 0.0, "energy_weight": 1.0},
            ),
        },
        judge=brier,
        needs_codec=True,
    ),
    "sparse_kd": Experiment(
        "What does a student lose that learns from twenty stored ids per token?",
        {
            "full distributions": _taught(),
            "12 exact + 8 draws": _taught(k=20, num_draws=8),
            "top 20 + tail bucket": _taught(k=20, num_draws=0),
            "top 20 + tail bucket, 0.1 CE": _taught(0.1, k=20, num_draws=0),
            "top 20 renormalised (negative)": _taught(k=20, num_draws=0, renormalised=True),
        },
        judge=teacher_divergence,
    ),
}


def runs(
    name: str, table: SideBySide, patch_size: int = 8, learning_rate: float = 2e-3, seeds: Sequence[int] = (0,)
) -> dict[str, list[Run]]:
    """Variant -> its runs, one a seed.

    Raises:
        ValueError: an unknown experiment.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"unknown experiment {name!r}: known are {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[name]
    codec = table.codec(patch_size) if experiment.needs_codec else None
    bases = [Run("student", learning_rate, seed, patch_size, dict(STUDENT), autoencoder=codec) for seed in seeds]
    return {variant: [change(base) for base in bases] for variant, change in experiment.variants.items()}


def answer(
    name: str, table: SideBySide, patch_size: int = 8, learning_rate: float = 2e-3, seeds: Sequence[int] = (0,)
) -> str:
    """Train what is missing and return the experiment's table in Markdown: mean over seeds, and their range.

    Raises:
        ValueError: an unknown experiment.
    """
    variants = runs(name, table, patch_size, learning_rate, seeds)
    experiment = EXPERIMENTS[name]
    rows: list[list[str]] = []
    columns: list[str] = []
    table.results([run for of_variant in variants.values() for run in of_variant])
    for variant, of_variant in variants.items():
        figures: dict[str, list[float]] = {}
        for run in of_variant:
            for column, value in experiment.judge(table, run).items():
                figures.setdefault(column, []).append(value)
            figures.setdefault("training, s", []).append(table.result(run)["seconds"])
        columns = list(figures)
        rows.append([variant, *(_cell(column, values) for column, values in figures.items())])
    lines = [["", *columns], ["---"] * (len(columns) + 1), *rows]
    setting = _setting(table, patch_size, learning_rate, seeds) + table.provenance()
    return f"{experiment.question}\n\n{setting}\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _setting(table: SideBySide, patch_size: int, learning_rate: float, seeds: Sequence[int]) -> str:
    """What every variant shares, as one line under the question."""
    names = {"num_tokens": "training tokens", "tokens_per_step": "tokens a step", "eval_tokens": "held-out tokens"}
    shared = [f"{names.get(name, name)} {value}" for name, value in table.shared.items() if value is not None]
    return f"K={patch_size}, rate {learning_rate:g}, seeds {', '.join(map(str, seeds))}; " + ", ".join(shared) + "."


def _cell(column: str, values: Sequence[float]) -> str:
    digits = 0 if column.endswith(", s") else 3
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 or not digits else f"{mean} ({min(values):.3f} to {max(values):.3f})"
