"""Token models whose distribution is known on paper: what a score must say of them follows without a sample.

V vocabulary, K tokens per patch.
"""

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def chain_token_lm(transitions: torch.Tensor) -> LlamaForCausalLM:
    """A Llama that is a chain of order 1: `p(v | last token u) = transitions[u, v]`, whatever stands before.

    Its layers add nothing, its embeddings are unit vectors, and its output matrix holds the logarithms.

    Args:
        transitions: `(V, V)`, V even, each row sums to 1; zeros are allowed.
    """
    size = transitions.shape[0]
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=size,
        num_hidden_layers=1,
        num_attention_heads=1,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        # the last norm makes a unit vector sqrt(V) long
        model.lm_head.weight.copy_(transitions.clamp(min=1e-30).log().T / math.sqrt(size))
    return model


def draw_chain(transitions: torch.Tensor, rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Ids `(rows, length)` of a chain, begun far enough before to be stationary."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.zeros(rows, dtype=torch.long)]
    for _ in range(length + 32):
        ids.append(torch.multinomial(transitions[ids[-1]], 1, generator=generator)[:, 0])
    return torch.stack(ids[-length:], dim=1)


def stationary(transitions: torch.Tensor) -> torch.Tensor:
    """`(V,)`, where a chain is in the long run."""
    return torch.linalg.matrix_power(transitions.double(), 4096)[0]


def chain_brier(text: torch.Tensor, model: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Brier-1 .. Brier-K `(K,)` of a chain `model (V, V)` on the text of a chain `text (V, V)`.

    Given the last token, sums over all patches of n tokens of `Q(x) P(x)` and `P(x)^2` are powers of the matrices of
    products: `(Q * P)^n 1` and `(P * P)^n 1`.
    """
    text, model = text.double(), model.double()
    hits = collisions = torch.ones(text.shape[0], dtype=torch.float64)
    scores = []
    for _ in range(patch_size):
        hits, collisions = (text * model) @ hits, (model * model) @ collisions
        scores.append(stationary(text) @ (2 * hits - collisions))
    return torch.stack(scores)


def known_models(size: int = 4, seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of chains by name: the text's and the model's, `(V, V)` each."""
    torch.manual_seed(seed)
    uniform = torch.full((size, size), 1 / size)
    chain = torch.distributions.Dirichlet(torch.full((size, size), 0.3)).sample()
    other = torch.distributions.Dirichlet(torch.full((size, size), 0.3)).sample()
    cycle = torch.eye(size).roll(1, dims=1)  # u is followed by u + 1
    backwards = torch.eye(size).roll(-1, dims=1)
    return {
        "uniform on a uniform text": (uniform, uniform),
        "uniform on a chain": (chain, uniform),
        "deterministic, right": (cycle, cycle),
        "deterministic, wrong": (cycle, backwards),
        "deterministic on a chain": (chain, cycle),
        "the chain itself": (chain, chain),
        "another chain": (chain, 0.5 * chain + 0.5 * other),
    }
