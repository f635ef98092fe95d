"""Evaluation: how good a codec or a student is, in numbers with units."""

from .brier import brier_lm, brier_scores, summarize_brier
from .likelihood import exact_likelihood, held_out_likelihood
from .patch_draws import brier_sums, draw_after_text
from .reconstruction import ReconstructionCounts, count_reconstructed, reconstruction_accuracy


__all__ = [
    "ReconstructionCounts",
    "brier_lm",
    "brier_scores",
    "brier_sums",
    "count_reconstructed",
    "draw_after_text",
    "exact_likelihood",
    "held_out_likelihood",
    "reconstruction_accuracy",
    "summarize_brier",
]
