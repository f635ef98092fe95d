"""Losses: plain functions of tensors."""

from .chunk_likelihood import chunk_divergence, chunk_likelihood_loss, chunk_logprobs
from .divergence import dense_kl, sampled_tail_kl, sparse_kl


__all__ = ["chunk_divergence", "chunk_likelihood_loss", "chunk_logprobs", "dense_kl", "sampled_tail_kl", "sparse_kl"]
