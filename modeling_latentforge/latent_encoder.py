"""Text -> the latents of a message.

B messages, T tokens, C channels of the backbone, M latents, D latent size, G tokens that share a latent.

    input_ids (B, T) -> any HF backbone (B, T, C) -> M queries, which look at all of them (B, M, C) -> (B, M, D)

Queries are learned (`queries`: a fixed M, of which the first few serve as well), or the means of what lies side by
side (`ratio`: one for every G tokens; `mean`: M equal parts of any text, one part being all of it; `patches`: their
concatenation).
"""

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig

from .modeling_autoencoder import LatentForgeMLPBlock


class LatentPoolingBlock(nn.Module):
    """Queries look at the states, then an MLP; residual. No query sees another, so the first few are the same whoever
    follows."""

    def __init__(self, size: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.norm_queries, self.norm_states = nn.RMSNorm(size, eps=eps), nn.RMSNorm(size, eps=eps)
        self.query = nn.Linear(size, size, bias=False)
        self.key_value = nn.Linear(size, 2 * size, bias=False)
        self.out = nn.Linear(size, size, bias=False)
        self.mlp = LatentForgeMLPBlock(size, -(-8 * size // (3 * 32)) * 32, eps)

    def forward(self, queries: torch.Tensor, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`(B, M, C)`, `(B, T, C)`, which queries see which tokens `(B, 1 or M, T)` -> `(B, M, C)`."""

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        key, value = self.key_value(self.norm_states(states)).chunk(2, dim=-1)
        seen = nn.functional.scaled_dot_product_attention(
            heads(self.query(self.norm_queries(queries))), heads(key), heads(value), attn_mask=mask[:, None]
        )
        return self.mlp(queries + self.out(seen.transpose(1, 2).flatten(2)))


class LatentEncoder(nn.Module):
    """See the drawing at the top of the file.

    Args:
        backbone_config: any HF model's that gives `last_hidden_state`.
        pooling: `queries`, `ratio`, `mean` or `patches`.
        num_latents: M of `queries`, at most, and of `mean`.
        ratio: G of the other two.
        latent_size: D.
        num_pooling_layers: blocks of queries that look at the states.
    """

    def __init__(
        self,
        backbone_config: PreTrainedConfig,
        pooling: str,
        num_latents: int,
        ratio: int,
        latent_size: int,
        num_pooling_layers: int,
        eps: float,
    ):
        super().__init__()
        size = backbone_config.hidden_size
        self.pooling, self.num_latents, self.ratio = pooling, num_latents, ratio
        self.backbone = AutoModel.from_config(backbone_config, dtype=torch.get_default_dtype())
        if pooling == "queries":
            self.queries = nn.Parameter(torch.empty(num_latents, size))
        if pooling == "patches":
            self.from_patch = nn.Linear(ratio * size, size)
        heads = next(count for count in range(max(1, size // 64), 0, -1) if not size % count)
        self.layers = nn.ModuleList(LatentPoolingBlock(size, heads, eps) for _ in range(num_pooling_layers))
        self.norm = nn.RMSNorm(size, eps=eps)
        self.to_latent = nn.Linear(size, latent_size)

    def forward(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None = None, num_latents: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and which of them are there.

        Args:
            input_ids: `(B, T)`, padded on the right.
            attention_mask: `(B, T)`.
            num_latents: of each message: the first so many queries, or so many groups of tokens of equal size.
                Default: M; of `ratio` as many as make `ratio` tokens a latent.

        Returns:
            `(B, M, D)`, zeros where there is none, and `(B, M)`.

        Raises:
            ValueError: an empty message, padding that is not on the right, a `num_latents` that cannot be had.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask.bool()
        lengths = mask.sum(1)
        if not bool((lengths > 0).all()):
            raise ValueError("A message is empty: give every text at least one token.")
        if not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]):
            raise ValueError("Messages are padded on the right: set the encoder's tokenizer to padding_side='right'.")
        states = self.backbone(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
        states = states.masked_fill(~mask[..., None], 0.0)
        queries, present = self._queries(states, lengths, num_latents)
        for layer in self.layers:
            queries = layer(queries, states, mask[:, None])
        latents = self.to_latent(self.norm(queries))
        return latents * present[..., None], present

    def _queries(
        self, states: torch.Tensor, lengths: torch.Tensor, num_latents: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, M, C)` and which of them are there `(B, M)`."""
        batch, length = states.shape[:2]
        if num_latents is not None and num_latents < 1:
            raise ValueError(f"`num_latents` must be at least 1, got {num_latents}.")
        if self.pooling == "queries":
            count = self.num_latents if num_latents is None else num_latents
            if count > self.num_latents:
                raise ValueError(f"`num_latents` ({count}) is more than the {self.num_latents} queries of this model.")
            return self.queries[:count].expand(batch, -1, -1), lengths.new_ones(batch, count).bool()
        if self.pooling == "patches":
            if num_latents is not None:
                raise ValueError("`num_latents` is for other poolings: patches hold `ratio` tokens each.")
            padded = nn.functional.pad(states, (0, 0, 0, -length % self.ratio))
            counts = -(-lengths // self.ratio)
            queries = self.from_patch(padded.unflatten(1, (-1, self.ratio)).flatten(2))
        elif self.pooling == "mean":
            return self._means(states, lengths, self.num_latents if num_latents is None else num_latents)
        else:
            counts = -(-lengths // self.ratio) if num_latents is None else lengths.clamp(max=num_latents)
            places = torch.arange(length, device=states.device).expand(batch, -1)
            # tokens of a message go to its latents in order, groups differ by one token at most
            group = places * counts[:, None] // lengths[:, None]
            group = torch.where(places < lengths[:, None], group, counts.max())
            total = int(counts.max()) + 1
            sums = states.new_zeros(batch, total, states.shape[2])
            sums = sums.scatter_add(1, group[..., None].expand_as(states), states)
            sizes = states.new_zeros(batch, total).scatter_add(1, group, states.new_ones(batch, length))
            queries = (sums / sizes.clamp(min=1)[..., None])[:, :-1]
        present = torch.arange(queries.shape[1], device=states.device) < counts[:, None]
        return queries, present

    def _means(self, states: torch.Tensor, lengths: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `count` equal parts, whose borders share a token where the length does not divide: a text of fewer tokens
        has as many latents as any other."""
        number = torch.arange(count, device=states.device)
        begin = (number * lengths[:, None] // count)[..., None]  # (B, M, 1)
        end = -(-(number + 1) * lengths[:, None] // count)[..., None]
        places = torch.arange(states.shape[1], device=states.device)
        within = ((places >= begin) & (places < end)).to(states.dtype)  # (B, M, T)
        return within @ states / within.sum(-1, keepdim=True), lengths.new_ones(len(lengths), count).bool()
