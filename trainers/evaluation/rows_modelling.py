"""Rows of `make verify TOPIC=modelling`: heads that make one-shot patches work, students that begin as a teacher."""

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data import DataArguments, load_blocks
from ..verification import ROOT, Context, Measured, Row
from .brier import patch_outcomes, summarize_brier
from .defaults import faults
from .frontier import LONGEST, Lengths, decode_rates, python_frontier, report
from .likelihood import exact_likelihood
from .one_shot import IMPOSSIBLE, one_shot_figures
from .patch_draws import brier_sums
from .side_by_side import RECORDS, STUDENT, Run, SideBySide


TEACHER = Run("token_lm", 4e-3)


def python_table(context: Context, bf16: bool = True) -> SideBySide:
    """`bf16`: as the tables of the topics `main` and `evaluation`, whose runs are shared."""
    return SideBySide(
        context.shared_dir / "python_2m",
        "builtin:python",
        None,
        vocab_size=1024,
        num_tokens=2 * 10**6,
        bf16=bf16,
        say=context.say,
        records_dir=RECORDS,
        fresh=context.fresh,
    )


# -- what the context is worth


def context_runs(patch_size: int) -> dict[str, Run]:
    """The decoder of the tables alone, students with it, and what has the whole context."""
    whole = {"num_decoder_layers": 4, "decoder_window": 512, "decoder_memory": "none"}

    def run(kind: str, **fields: Any) -> Run:
        return Run(kind, 4e-3, 0, patch_size, {**STUDENT, **fields})

    return {
        "token LM": TEACHER,
        # the strongest without a lookup: what the decoder has and transformers' models have not. Its latents are
        # those of K=8 for every row
        "token LM with the convolution": Run("decoder_alone", 4e-3, 0, 8, {**STUDENT, **whole}),
        "decoder alone": run("decoder_alone"),
        "student without lookup": run("student"),
        "decoder alone, with lookup": run("decoder_alone", decoder_lookup=LONGEST),
        "student": run("student", decoder_lookup=LONGEST),
    }


def context_share(patch_size: int, target: float) -> Callable[[Context], Measured]:
    def measure(context: Context) -> Measured:
        table = python_table(context)
        runs = context_runs(patch_size)
        table.results(list(runs.values()))
        nll = {name: table.result(run)["nll"] for name, run in runs.items()}
        whole = min(nll["token LM"], nll["token LM with the convolution"])
        worth = nll["decoder alone"] - whole
        gained = nll["decoder alone"] - nll["student"]
        of_latents = nll["decoder alone, with lookup"] - nll["student"]
        hurt = table.result(runs["student"])["nll_shuffled"] - nll["student"]
        built = {name: table.build(runs[name]).eval() for name in ("student without lookup", "student")}
        rates = decode_rates(built, Lengths())
        speed = {name: 1 / rate["decode_tokens_per_second"] for name, rate in rates.items()}
        slower = speed["student"] / speed["student without lookup"]
        share = gained / worth if worth > 0 else math.inf
        figure = (
            f"{share:.0%} of {worth:.3f} nats at {slower:.2f}x decode time; latents: {of_latents:+.3f} beside the "
            f"same decoder alone, shuffled cost {hurt:.3f} ("
            + ", ".join(f"{name} {value:.3f}" for name, value in nll.items())
            + f"){table.provenance()}"
        )
        details = {name: table.result(run)["nll_by_context"] for name, run in runs.items()}
        passed = worth >= 0.1 and share >= target and slower <= 1.15
        return Measured(figure, passed, {"nll": nll, "by_context": details, "slower": slower, "latents": of_latents})

    return measure


def equal_speed(context: Context) -> Measured:
    """The frontier of the evaluation's rows, on the text of this topic, with the students that look up."""
    corpus = python_frontier(context.shared_dir / "python_2m", say=context.say, records_dir=RECORDS)
    (entry,) = report([corpus], context.work_dir, speed_again=True).values()
    best = entry["best"]
    if best is None:
        return Measured("no student between two token LMs", False, entry)
    return Measured(
        f"{best['advantage']:+.3f} nats ({best['label']}, {best['tokens_per_second']:.0f} tokens/s)"
        f"{corpus.table.provenance()}",
        best["advantage"] >= 0.1,
        entry,
    )


# -- heads of parallel decoders


def one_shot_runs(codec: str, seed: int = 0, patch_size: int = 4) -> dict[str, Run]:
    """Heads on the codec's parallel decoder, frozen unless said otherwise; K=4."""

    def run(head: str, weights: Mapping[str, float], teacher: Run | None = None, **fields: Any) -> Run:
        student = {"decoder_type": "parallel", "head_config": {"head_type": head}, **fields}
        return Run("student", 4e-3, seed, patch_size, student, dict(weights), teacher, codec)

    return {
        # these two first: they are compared by their time, and train side by side
        "energy": run("energy", {"ce_weight": 0.0, "energy_weight": 1.0}),
        "aligned": run("aligned", {"ce_weight": 1.0}, TEACHER),
        "aligned, trained decoder": run("aligned", {"ce_weight": 1.0}, TEACHER, train_decoder=True),
        "regression": run("regression", {"ce_weight": 1.0}),
    }


def judged(table: SideBySide, run: Run, folder: Path, num_rows: int, positions: int) -> dict[str, Any]:
    """Brier scores and what the teacher says, kept in `folder`."""
    path = folder / f"{table.name(run)}.json"
    if path.exists():
        return json.loads(path.read_text())
    table.say(f"samples of {table.name(run)}")
    model, rows = table.load(run).eval(), whole_rows(table)
    sums = brier_sums(model, rows, run.patch_size, positions)
    found = {
        "brier": summarize_brier(sums["sampled"], sums["counts"]),
        "one_shot": one_shot_figures(model, table.load(TEACHER).eval(), rows[:num_rows]),
        "seconds": table.result(run)["seconds"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def whole_rows(table: SideBySide) -> torch.Tensor:
    """Held-out rows without padding."""
    _, held_out = table.blocks()
    rows = torch.as_tensor(held_out["input_ids"][:]).long()
    return rows[torch.as_tensor(held_out["attention_mask"][:]).bool().all(1)]


def aligned(context: Context, num_rows: int = 64, positions: int = 20_000) -> Measured:
    """The aligned head beside the energy head and regression: same codec, backbone, text and tokens."""
    table = python_table(context, bf16=False)
    table.load(TEACHER)
    runs = one_shot_runs(table.codec(4))
    table.results(list(runs.values()))
    found = {name: judged(table, run, context.work_dir, num_rows, positions) for name, run in runs.items()}
    context.say("what the teacher writes itself")
    own = one_shot_figures(None, table.load(TEACHER).eval(), whole_rows(table)[: num_rows // 4])
    energy, ours = found["energy"], found["aligned"]
    higher = all(a > b for a, b in zip(ours["brier"]["brier"][:4], energy["brier"]["brier"][:4], strict=True))
    fewer = energy["one_shot"]["impossible"] / max(ours["one_shot"]["impossible"], 1e-9)
    more = {
        name: ours["one_shot"][f"accepted_{name}"] / max(energy["one_shot"][f"accepted_{name}"], 1e-9)
        for name in ("greedy", "sampled")
    }
    in_time = ours["seconds"] <= 1.05 * energy["seconds"]
    parts = []
    for name, one in found.items():
        brier = "/".join(f"{100 * value:.2f}" for value in one["brier"]["brier"][:4])
        says = one["one_shot"]
        parts.append(
            f"{name}: Brier-1..4 {brier} %, {says['impossible']:.0%} impossible, drafts {says['accepted_greedy']:.2f} "
            f"greedy {says['accepted_sampled']:.2f} sampled, {one['seconds']:.0f} s"
        )
    figure = (
        f"Brier {'all higher' if higher else 'not all higher'}, {fewer:.2f}x fewer impossible, drafts "
        f"{more['greedy']:.2f}x (greedy) and {more['sampled']:.2f}x (sampled); {'; '.join(parts)}; the teacher's own: "
        f"{own['impossible']:.0%} impossible{table.provenance()}"
    )
    passed = higher and fewer >= 2 and min(more.values()) >= 1.3 and in_time
    return Measured(figure, passed, {**found, "teacher": own})


# -- CALM at several patch sizes


@torch.no_grad()
def brier_of_texts(model: Any, rows: torch.Tensor, num_rows: int = 256, num_tokens: int = 4) -> dict[str, Any]:
    """Brier-1..n of texts that `generate` goes on with, twice, after the first 64, 128, .. tokens of a row.

    So models of any patch size are judged alike. An energy head draws latents, which are decoded to their likeliest
    tokens.
    """
    rows = rows[:num_rows]
    places = range(64, rows.shape[1] - num_tokens, 64)
    sums = torch.zeros(len(rows), num_tokens, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for place in places:
            for part in torch.arange(len(rows)).split(64):
                prompts = rows[part, :place].repeat(2, 1)
                written = model.generate(
                    prompts,
                    attention_mask=torch.ones_like(prompts),
                    max_new_tokens=num_tokens,
                    do_sample=True,
                    top_k=1,
                    eos_token_id=-1,
                )[:, place:]
                targets = rows[part, place : place + num_tokens]
                sums[part] += patch_outcomes(written[: len(part)], written[len(part) :], targets)
    return summarize_brier(sums, torch.full((len(rows),), len(places)))


def calm_shape(context: Context, patch_sizes: Sequence[int] = (1, 2, 4, 8)) -> Measured:
    """CALM's head and decoder at several patch sizes: same text, tokens and backbone."""
    table = python_table(context, bf16=False)
    student = {"decoder_type": "parallel", "head_config": {"head_type": "energy"}}
    weights = {"ce_weight": 0.0, "energy_weight": 1.0}
    runs = {k: Run("student", 4e-3, 0, k, student, weights, None, table.codec(k)) for k in patch_sizes}
    table.results(list(runs.values()))
    rows = whole_rows(table)
    found: dict[str, Any] = {}
    for k, run in runs.items():
        path = context.work_dir / f"{table.name(run)}.json"
        if not path.exists():
            table.say(f"texts of {table.name(run)}")
            path.write_text(json.dumps(brier_of_texts(table.load(run).eval(), rows)) + "\n")
        found[str(k)] = json.loads(path.read_text()) | {"seconds": table.result(run)["seconds"]}
    scores = {k: one["brier_lm"] for k, one in found.items()}
    figure = "; ".join(
        f"K={k}: BrierLM {one['brier_lm']:.2f} ({one['brier_lm_interval'][0]:.2f} to "
        f"{one['brier_lm_interval'][1]:.2f}), Brier-1 {100 * one['brier'][0]:.2f} %, {one['seconds']:.0f} s"
        for k, one in found.items()
    )
    best = max(scores, key=scores.__getitem__)
    return Measured(f"best at K={best}; {figure}{table.provenance()}", best == "4", found)


# -- from a teacher


def from_teacher(
    context: Context, patch_size: int = 4, lookup: int = LONGEST, steps: int = 244, limit: float = 0.1
) -> Measured:
    """`scripts/train_student.py` with the backbone frozen but for LoRA; the teacher is the table's token LM."""
    table = python_table(context, bf16=False)
    table.load(TEACHER)
    teacher = table.work_dir / table.name(TEACHER) / "model"
    output = context.work_dir / "student"
    for folder in (teacher, Path(table.codec(patch_size))):
        table.tokenizer.save_pretrained(folder)  # scripts find it beside the weights
    if not (output / "model.safetensors").exists():
        flags = {
            "autoencoder": table.codec(patch_size),
            "teacher": str(teacher),
            "init_from_teacher": "true",
            "lora_r": "16",
            "decoder_lookup": str(lookup),
            "data": "builtin:python",
            "output_dir": str(output),
            "block_size": "512",
            "max_train_tokens": "2000000",
            "max_eval_tokens": str(2**17),
            "max_steps": str(steps),  # of 8192 tokens
            "per_device_train_batch_size": "4",
            "gradient_accumulation_steps": "4",
            "learning_rate": "4e-3",
            "lr_scheduler_type": "cosine",
            "warmup_steps": "30",
            "ce_weight": "0.5",
            "kd_weight": "0.5",
            "eval_strategy": "steps",
            "eval_steps": "61",
            "save_steps": "61",
            "save_total_limit": "1",
            "report_to": "none",
            "seed": "0",
        }
        if list(output.glob("checkpoint-*")):
            flags["resume_from_checkpoint"] = "true"
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        subprocess.run([sys.executable, str(ROOT / "scripts" / "train_student.py"), *words], check=True)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    curve = {entry["step"] * 8192: entry["eval_nll"] for entry in history if "eval_nll" in entry}
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    arguments = DataArguments(data="builtin:python", block_size=512, max_eval_tokens=2**17, max_train_tokens=1024)
    _, held_out = load_blocks(arguments, tokenizer, patch_size, seed=0)
    nll = {
        name: exact_likelihood(AutoModelForCausalLM.from_pretrained(folder).eval(), held_out)["nats_per_token"]
        for name, folder in (("teacher", teacher), ("student", output))
    }
    within = [tokens for tokens, value in sorted(curve.items()) if value - nll["teacher"] <= limit]
    figure = (
        f"{nll['student'] - nll['teacher']:+.3f} nats after {steps * 8192 / 1e6:.1f} M tokens (teacher "
        f"{nll['teacher']:.3f}); within {limit:g} "
        + (f"after {within[0] / 1e6:.1f} M" if within else "never")
        + f"; by tokens: {', '.join(f'{t / 1e6:.1f} M {v:.3f}' for t, v in sorted(curve.items()))}"
    )
    return Measured(figure, nll["student"] - nll["teacher"] <= limit, {"curve": curve, **nll})


# -- defaults


def defaults(context: Context) -> Measured:
    found = faults(ROOT / "docs")
    return Measured("every default has its source" if not found else "; ".join(found), not found)


PYTHON = "4 x 256, V=1024, builtin:python, 2 M tokens, seed 0, rate 4e-3"
CONTEXT = (
    f"{PYTHON}, bf16 autocast; share: of the distance from the decoder alone (no lookup, window of two patches) to "
    "the better of two token LMs of 4 layers with the whole context, one of them with the decoder's convolution; "
    "decode time beside the same student without lookup, one row, one thread, medians of 15"
)
ROWS = [
    Row(
        "defaults",
        "defaults of the configuration classes that point to their table",
        "all",
        defaults,
        setup="docs/defaults.md against the classes and the headings of docs/experiments.md",
    ),
    Row(
        "aligned",
        "aligned head against energy head, frozen parallel decoder, K=4, equal training time",
        "higher Brier-1..4, >= 2x fewer impossible patches, >= 1.3x accepted draft tokens",
        aligned,
        long=True,
        setup=f"{PYTHON}, fp32; teacher: the token LM of 4 x 256 on the same text, in process; impossible: a "
        f"token of the sampled patch has less than {IMPOSSIBLE:g} by the teacher; Brier at 20,000 places",
    ),
    Row(
        "calm_shape",
        "energy head x frozen parallel decoder at K=1, 2, 4, 8",
        "CALM's shape: K=4 best, K=8 worse",
        calm_shape,
        long=True,
        setup=f"{PYTHON}, fp32; codecs of latent size 32 K, 500 steps; "
        "Brier-1..4 of 4 tokens by `generate` at 7 places of 256 rows",
    ),
    *(
        Row(
            f"from_teacher_{name}",
            f"student that begins as its teacher, backbone frozen but for LoRA, K={k}{without}",
            "<= 0.1 nats above the teacher within 5 M tokens",
            partial(from_teacher, patch_size=k, lookup=lookup),
            long=True,
            setup=f"{PYTHON}, fp32; teacher: the token LM of 4 x 256 on the same text; LoRA rank 16, ce 0.5 + kd 0.5",
        )
        for name, k, lookup, without in (
            ("k4", 4, LONGEST, ""),
            ("k8", 8, LONGEST, ""),
            ("k4_no_lookup", 4, 0, ", decoder without lookup"),
        )
    ),
    *(
        Row(
            f"context_share_k{k}",
            f"share of the context's worth that the default student has, K={k}, Python code",
            f">= {share:.0%} at <= 1.15x of the decode time without",
            context_share(k, share),
            long=True,
            setup=CONTEXT,
        )
        for k, share in ((8, 0.7), (4, 0.85))
    ),
    Row(
        "equal_speed",
        "best student against the token LM of equal decode tokens/s, Python code",
        "held-out NLL >= 0.1 nats better",
        equal_speed,
        long=True,
        setup=f"{PYTHON}, bf16 autocast; 4 token LMs and 10 students; the best one chosen on other held-out "
        "text; token LMs have no lookup; speeds greedy, batch 1, one thread, median of 15",
    ),
]
