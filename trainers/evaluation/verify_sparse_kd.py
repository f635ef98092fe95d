"""Rows of `make verify TOPIC=teachers` about what a student loses to a few stored ids."""

import os
import statistics
from pathlib import Path
from typing import Any

from ..verification import ROOT, Context, Measured, Row
from .experiments import runs
from .side_by_side import RECORDS, SideBySide


# -- what a student loses to stored ids

SPARSE_SEEDS = (0, 1, 2)
SPARSE_FULL, SPARSE_DEFAULT, SPARSE_BUCKET = "full distributions", "12 exact + 8 draws", "top 20 + tail bucket"


def sparse_table(context: Context, **budget: int) -> SideBySide:
    """Small students, so that fifteen of them fit into an hour; the teacher's size is the experiment's."""
    folder = Path(os.environ.get("LATENTFORGE_DATA", ROOT.parent / "shared" / "data")) / "books"
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there: set LATENTFORGE_DATA to the folder that holds `books`")
    sizes: dict[str, Any] = {
        "vocab_size": 4096,
        "num_tokens": 2 * 10**6,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        **budget,
    }
    return SideBySide(
        context.shared_dir / "books_sparse",
        str(folder / "train"),
        str(folder / "valid"),
        **sizes,
        say=context.say,
        records_dir=RECORDS,
        fresh=context.fresh,
    )


def sparse_gap(context: Context) -> Measured:
    return sparse_gap_of(sparse_table(context))


def sparse_gap_of(table: SideBySide) -> Measured:
    """Gaps are those of the same seed, averaged."""
    variants = runs("sparse_kd", table, patch_size=4, learning_rate=4e-3, seeds=SPARSE_SEEDS)
    table.results([run for of_variant in variants.values() for run in of_variant])
    kl = {name: [table.result(run)["kl_to_teacher"] for run in of_variant] for name, of_variant in variants.items()}
    nll = {name: [table.result(run)["nll"] for run in of_variant] for name, of_variant in variants.items()}
    gaps = {
        name: [value - full for value, full in zip(values, kl[SPARSE_FULL], strict=True)]
        for name, values in kl.items()
        if name != SPARSE_FULL
    }
    mean = {name: statistics.mean(values) for name, values in gaps.items()}
    figure = "; ".join(
        f"{name} {mean[name]:+.4f} ({min(values):+.4f} to {max(values):+.4f})" for name, values in gaps.items()
    )
    figure += f" nats; full distributions at KL {statistics.mean(kl[SPARSE_FULL]):.4f}" + table.provenance()
    passed = mean[SPARSE_DEFAULT] <= 0.02 and mean[SPARSE_DEFAULT] <= mean[SPARSE_BUCKET] / 4
    return Measured(figure, passed, {"kl_to_teacher": kl, "nll": nll, "gaps": gaps})


ROWS = [
    Row(
        "sparse_gap",
        "held-out KL to the teacher, above that of learning from full distributions: 12 exact ids and 8 draws",
        "<= 0.02 nats/token, and <= 1/4 of top 20 with a tail bucket",
        sparse_gap,
        long=True,
        setup="books, V=4096, 2 M tokens; student 2 x 128, K=4, decoder 1 x 128; teacher a token LM 4 x 256; KD only "
        "(but for the row with 0.1 CE), rate 4e-3, seeds 0, 1, 2, bf16 autocast, 131k held-out tokens",
    ),
]
