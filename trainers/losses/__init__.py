"""Losses: plain functions of tensors."""

from .divergence import dense_kl, sparse_kl


__all__ = ["dense_kl", "sparse_kl"]
