"""Evaluation: how good a codec or a student is, in numbers with units."""

from .reconstruction import ReconstructionCounts, count_reconstructed, reconstruction_accuracy


__all__ = ["ReconstructionCounts", "count_reconstructed", "reconstruction_accuracy"]
