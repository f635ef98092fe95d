"""The autoregressive decoder: token by token inside a patch, from the patch's latent and the last W tokens.

B batch, T tokens, K tokens per patch, C = T // K + 1 conditions, W window, h heads, d head size, E decoder width, H
backbone width, D latent, V vocabulary, S taps of the short convolution.

Position t predicts token t + 1, which lies in patch (t + 1) // K. Rows start at their first token: nothing right of a
position reaches it, so no padding mask is needed here. With `decoder_memory="patches"` a position also attends to
conditions 0 .. (t + 1) // K, T / K of them. With `decoder_lookup` it also reads which token followed the last time
that the text ended as it does here, wherever that was.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .configuration_latentforge import LatentForgeConfig
from .modeling_autoencoder import LatentForgeMLPBlock
from .token_lookup import ending_sizes, find_continuations


KeyValue = tuple[torch.Tensor, torch.Tensor]
_LARGEST_TABLE = 2**25  # elements: 128 MiB of fp32
_PLAIN = (nn.Embedding, nn.Linear, nn.RMSNorm, nn.Embedding, nn.Embedding)  # what a table is made of


def compact(x: torch.Tensor) -> torch.Tensor:
    """A view that the next step reads, as a tensor of its own where torch.compile looks: it compiles again for every
    other stride or offset."""
    # `contiguous` leaves the strides of dimensions of size 1 as they are
    return x.clone(memory_format=torch.contiguous_format) if torch.compiler.is_compiling() else x


def rotary_angles(positions: torch.Tensor, head_size: int, dtype: torch.dtype) -> KeyValue:
    """`positions (...)` -> cosines and sines `(..., d / 2)` (RoFormer, arXiv 2104.09864). Computed on the fly: a
    non-persistent buffer would be uninitialised memory after `from_pretrained`."""
    half = head_size // 2
    frequencies = 10000.0 ** (-torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angles = positions[..., None].float() * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, angles: KeyValue) -> torch.Tensor:
    """Rotate `x (..., B, h, T, d)` by angles `(T, d / 2)` or `(B, 1, T, d / 2)`."""
    cos, sin = angles
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def window_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int) -> torch.Tensor:
    """Causal attention over the last `window` positions, `(B, h, T, d)` each; time and memory grow with T * window.

    Blocks of `window` queries see their own block and the one before.
    """
    batch, heads, length, size = query.shape
    blocks = -(-length // window)
    pad = blocks * window - length

    def to_blocks(x: torch.Tensor, before: int) -> torch.Tensor:
        x = nn.functional.pad(x, (0, 0, before, pad)) if before or pad else x
        return x.unflatten(2, (-1, window)).transpose(1, 2)  # (B, blocks, h, W, d)

    query = to_blocks(query, 0)
    key, value = (to_blocks(x, window) for x in (key, value))
    key, value = (torch.cat([x[:, :-1], x[:, 1:]], dim=3) for x in (key, value))  # (B, blocks, h, 2W, d)

    distance = (
        torch.arange(window, device=query.device)[:, None] + window - torch.arange(2 * window, device=query.device)
    )
    mask = ((distance >= 0) & (distance < window)).repeat(blocks, 1, 1)  # (blocks, W, 2W)
    mask[0, :, :window] = False
    mask = mask[None, :, None].expand(batch, -1, -1, -1, -1)
    out = nn.functional.scaled_dot_product_attention(
        query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), attn_mask=mask.flatten(0, 1)
    )
    return out.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :length]


class LatentForgeShortConvolution(nn.Module):
    """Causal depthwise convolution over the last S tokens, residual (the "Canon" layer of arXiv 2512.17351).

    Before the first attention it lets a key know the token before its own, which one layer cannot learn otherwise:
    worth as much as a second layer, at no measurable time (docs/experiments.md).
    """

    def __init__(self, width: int, size: int):
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.zeros(size, width))  # the last tap is the current token's

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, T, E)` -> the same, and the inputs with the S - 1 zeros before them `(B, S - 1 + T, E)`."""
        length = x.shape[1]
        inputs = nn.functional.pad(x, (0, 0, self.size - 1, 0))
        # shifted products: 1.3 to 2 times faster on a CPU than a depthwise Conv1d, which wants (B, E, T) (measured)
        for tap in range(self.size):
            x = torch.addcmul(x, inputs[:, tap : tap + length], self.weight[tap].to(x.dtype))
        return x, inputs

    def step(self, x: torch.Tensor, recent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """One token `(B, 1, E)` after `recent (B, S - 1, E)` -> the same, and the next step's `recent`."""
        inputs = torch.cat([recent, x], dim=1)
        return x + (inputs * self.weight).sum(1, keepdim=True), compact(inputs[:, 1:])


class LatentForgeTokenLookup(nn.Module):
    """What [`find_continuations`] found -> what a token adds to its embedding.

    An induction head without its attention, and the part of the context that pays most at small budgets
    (docs/experiments.md).
    """

    def __init__(self, width: int, sizes: tuple[int, ...], eps: float):
        super().__init__()
        self.sizes = sizes
        self._boundaries: torch.Tensor | None = None
        self.projection = nn.Linear(width, width, bias=False)
        self.norm = nn.RMSNorm(width, eps=eps)
        # by level: a longer ending is the surer guess; nothing found gives 0
        self.gate = nn.Embedding(len(sizes) + 1, width, padding_idx=0)
        self.level = nn.Embedding(len(sizes) + 1, width)

    def forward(self, embeds: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """Embeddings `(B, T, E)` of the tokens that followed, and levels `(B, T)` -> `(B, T, E)`."""
        return torch.addcmul(self.level(levels), self.project(embeds), self.gate(levels))

    def boundaries_on(self, device: torch.device) -> torch.Tensor:
        """The sizes, for [`extend_history`]."""
        if torch.compiler.is_compiling():  # a constant there; kept, a CUDA graph's output would outlive its graph
            return torch.tensor(self.sizes, dtype=torch.int8, device=device)
        if self._boundaries is None or self._boundaries.device != device:
            with torch.inference_mode(False):
                self._boundaries = torch.tensor(self.sizes, dtype=torch.int8, device=device)
        return self._boundaries

    def project(self, embeds: torch.Tensor) -> torch.Tensor:
        return self.norm(self.projection(embeds).to(self.norm.weight.dtype))


class LatentForgeWindowAttention(nn.Module):
    """Self-attention over the last W tokens."""

    def __init__(self, config: LatentForgeConfig):
        super().__init__()
        width = config.decoder_hidden_size
        self.num_heads, self.window = config.decoder_num_heads, config.decoder_window
        self.qkv_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def project(self, x: torch.Tensor, angles: KeyValue) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(B, T, E)` -> rotated query and key, and value, `(B, h, T, d)`."""
        qkv = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, h, T, d)
        query, key = rotate(qkv[:2], angles)
        return query, key, qkv[2]

    def forward(self, x: torch.Tensor, angles: KeyValue) -> tuple[torch.Tensor, KeyValue]:
        query, key, value = self.project(x, angles)
        out = window_attention(query, key, value, self.window)
        return self.o_proj(out.transpose(1, 2).flatten(2)), (key, value)

    def step(
        self, x: torch.Tensor, angles: KeyValue, past: KeyValue, past_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, KeyValue]:
        """One token, `(B, 1, E)`; `past` holds at most W - 1 keys and values; `past_mask (B, 1, 1, past + 1)` is False
        where a row has none."""
        query, key, value = self.project(x, angles)
        key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        out = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=past_mask)
        keep = max(0, key.shape[2] - (self.window - 1))
        window = compact(key[:, :, keep:]), compact(value[:, :, keep:])
        return self.o_proj(out.transpose(1, 2).flatten(2)), window


class LatentForgeMemoryAttention(nn.Module):
    """Cross-attention from tokens to the conditions up to their own patch's."""

    def __init__(self, config: LatentForgeConfig):
        super().__init__()
        width, hidden_size = config.decoder_hidden_size, config.backbone_config.hidden_size
        self.num_heads, self.head_size = config.decoder_num_heads, width // config.decoder_num_heads
        self.norm_memory = nn.RMSNorm(hidden_size, eps=config.rms_norm_eps)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.kv_proj = nn.Linear(hidden_size, 2 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def remember(self, conditions: torch.Tensor, positions: torch.Tensor) -> KeyValue:
        """Conditions `(B, C, H)` at patch `positions (C,)` or `(B, 1, C)` -> keys and values `(B, h, C, d)`."""
        conditions = self.norm_memory(conditions.to(self.norm_memory.weight.dtype))
        key, value = self.kv_proj(conditions).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return rotate(key, rotary_angles(positions, self.head_size, key.dtype)), value

    def forward(self, x: torch.Tensor, angles: KeyValue, memory: KeyValue, mask: torch.Tensor | None) -> torch.Tensor:
        """`x (B, T, E)`, the `angles` of its tokens' patches, and what [`remember`] made.

        `mask` broadcasts to `(B, h, T, C)`, True where a condition is seen.
        """
        query = rotate(self.q_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2), angles)
        out = nn.functional.scaled_dot_product_attention(query, *memory, attn_mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class LatentForgePatchDecoderLayer(nn.Module):
    """Window attention, optionally memory attention, gated MLP; each residual, normalised first."""

    def __init__(self, config: LatentForgeConfig, has_memory: bool):
        super().__init__()
        width = config.decoder_hidden_size
        self.norm_window = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.window_attention = LatentForgeWindowAttention(config)
        self.norm_query = nn.RMSNorm(width, eps=config.rms_norm_eps) if has_memory else None
        self.memory_attention = LatentForgeMemoryAttention(config) if has_memory else None
        self.mlp = LatentForgeMLPBlock(width, config.decoder_intermediate_size, config.rms_norm_eps)


class _LookupTable(NamedTuple):
    """What [`LatentForgeTokenLookup`] says of every token, for steps that ask for one at a time."""

    tokens: torch.Tensor  # (V, E), projected
    levels: torch.Tensor  # (L + 1, 2, E): level, gate
    made_of: tuple[tuple[int, int], ...]  # `_state_of` the weights
    weights: tuple[torch.Tensor, ...]  # held, so that no other tensor can take their place in memory


def _state_of(weights: Sequence[torch.Tensor]) -> tuple[tuple[int, int], ...]:
    """Another one after each change that torch counts."""
    return tuple((x.data_ptr(), x._version) for x in weights)


class LatentForgePatchDecoder(nn.Module):
    """Token ids, latents and conditions -> vectors `(B, T, decoder_output_size)` that the output matrix turns into
    next-token logits.

    Each input is normalised on its own: token embeddings of standard deviation 0.02 beside a latent of 1 left the
    decoder blind to its tokens (measured: 6.2 nats after 200 steps, against 5.0).
    """

    def __init__(self, config: LatentForgeConfig):
        super().__init__()
        width = config.decoder_hidden_size
        self.patch_size, self.window, self.head_size = (
            config.patch_size,
            config.decoder_window,
            width // config.decoder_num_heads,
        )
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.mask_embedding = nn.Parameter(torch.zeros(width))
        self.embed_offset = nn.Embedding(config.patch_size, width)  # place in the patch of the token that is predicted
        self.norm_token = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.from_latent = nn.Linear(config.latent_size, width)
        self.norm_latent = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self.convolution = LatentForgeShortConvolution(width, config.decoder_conv_size)
        sizes = ending_sizes(config.decoder_lookup)
        self.lookup = LatentForgeTokenLookup(width, sizes, config.rms_norm_eps) if sizes else None
        self._lookup_table: _LookupTable | None = None
        memory_layer = config.num_decoder_layers // 2 if config.decoder_memory == "patches" else None
        self.layers = nn.ModuleList(
            LatentForgePatchDecoderLayer(config, has_memory=i == memory_layer)
            for i in range(config.num_decoder_layers)
        )
        self.norm = nn.RMSNorm(width, eps=config.rms_norm_eps)
        self._angle_table: tuple[torch.Tensor, torch.Tensor] | None = None  # of `single_angles`
        low_rank = config.decoder_output_size != width
        self.to_output = nn.Linear(width, config.decoder_output_size, bias=False) if low_rank else nn.Identity()

    @property
    def reach(self) -> int:
        """Tokens before a position that its outputs depend on, but for its memory and what is looked up."""
        return len(self.layers) * (self.window - 1) + self.convolution.size - 1

    def embed(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        embeds = self.embed_tokens(input_ids)
        if mask is not None:
            embeds = torch.where(mask[..., None], embeds, self.mask_embedding.to(embeds.dtype))
        return self.norm_token(embeds)

    def embed_lookup(self, ids: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """What was found for each token, `(B, T)` each -> `(B, T, E)`."""
        assert self.lookup is not None
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._lookup_table = None  # as in `train`, where a model learns in eval mode
        return self.lookup(self.embed_tokens(ids), levels)

    def step_lookup(self, ids: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """[`embed_lookup`] of one token of each row, `(B,)` each -> `(B, 1, E)`; from a table where one was made."""
        table = self._table_of_lookup()
        if table is None:
            return self.embed_lookup(ids[:, None], levels[:, None])
        level, gate = table.levels.index_select(0, levels).unbind(1)
        return torch.addcmul(level, table.tokens.index_select(0, ids), gate)[:, None]

    def _table_of_lookup(self) -> _LookupTable | None:
        """Made at the first step after a change of the weights. None where gradients are wanted, weights are no plain
        parameters (LoRA, quantised, offloaded), or the vocabulary is large.

        In eval mode a write through `.data` is not seen: call `eval()` after it.
        """
        lookup, table = self.lookup, self._lookup_table
        assert lookup is not None
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        parts = (self.embed_tokens, lookup.projection, lookup.norm, lookup.gate, lookup.level)
        # before the table: an adapter that wraps a part leaves its weight as it was
        if tuple(map(type, parts)) != _PLAIN:
            return None
        weights = tuple(part.weight for part in parts)
        if any(type(x) is not nn.Parameter or x.is_meta or x.is_inference() for x in weights):
            return None
        if table is not None and table.made_of == _state_of(weights):
            return table
        # dtypes of several kinds need the autocast that is left out below
        if weights[0].numel() > _LARGEST_TABLE or weights[0].dtype != weights[1].dtype:
            return None
        device = self.embed_tokens.weight.device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            self._lookup_table = _LookupTable(
                lookup.project(self.embed_tokens.weight),
                torch.stack([lookup.level.weight, lookup.gate.weight], dim=1),
                _state_of(weights),
                tuple(x.detach() for x in weights),
            )
        return self._lookup_table

    def train(self, mode: bool = True) -> "LatentForgePatchDecoder":
        self._lookup_table = None  # an optimizer may write past the counters that tell a change
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> "LatentForgePatchDecoder":
        self._lookup_table = None
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: a table is made again, and its weights' addresses mean nothing elsewhere."""
        return {**self.__dict__, "_lookup_table": None}

    def embed_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """`(B, C, D)` -> `(B, C, E)`, what every token of the patch adds to its embedding."""
        latents = self.from_latent(latents)
        # under autocast a bf16 product; the fused norm wants its weight's dtype
        return self.norm_latent(latents.to(self.norm_latent.weight.dtype))

    def forward(
        self,
        input_ids: torch.Tensor,
        mask: torch.Tensor | None,
        latents: torch.Tensor,
        conditions: torch.Tensor,
        start: int = 0,
        looked_up: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, list[KeyValue], KeyValue | None]:
        """Whole rows, or the ends of rows.

        Args:
            input_ids, mask: `(B, T)`, each row starting at its first token; False in `mask` reads as the mask
                embedding.
            latents, conditions: `(B, C, D)` and `(B, C, H)`, C = T // K + 1, of patches 0 .. T // K.
            start: tokens before `input_ids`, a multiple of K, that are not read. `latents` then begin with the patch
                at `start`, `conditions` with the first of all. What lies [`reach`] tokens behind the start is exact.
            looked_up: what [`find_continuations`] found for these tokens in the whole rows; needed with a `start`.

        Returns:
            vectors `(B, T, decoder_output_size)`, inputs of the convolution `(B, S - 1 + T, E)`, keys and values of
            every layer's window attention `(B, h, T, d)`, and those of the memory.
        """
        length, num_conditions = input_ids.shape[1], conditions.shape[1]
        target = torch.arange(start + 1, start + length + 1, device=input_ids.device)  # what each position predicts
        patch = target // self.patch_size
        hidden = self.embed(input_ids, mask) + self.embed_offset(target % self.patch_size)
        hidden = hidden + self.embed_latents(latents).repeat_interleave(self.patch_size, dim=1)[:, 1 : length + 1]
        if self.lookup is not None:
            hidden = hidden + self.embed_lookup(*(looked_up or find_continuations(input_ids, mask, self.lookup.sizes)))
        hidden, inputs = self.convolution(hidden)
        angles = rotary_angles(target - 1, self.head_size, hidden.dtype)

        windows, memory = [], None
        for layer in self.layers:
            attended, key_value = layer.window_attention(layer.norm_window(hidden), angles)
            hidden = hidden + attended
            windows.append(key_value)
            if layer.memory_attention is not None:
                places = torch.arange(num_conditions, device=hidden.device)
                memory = layer.memory_attention.remember(conditions, places)
                seen = places <= patch[:, None]  # (T, C)
                angles_patch = rotary_angles(patch, self.head_size, hidden.dtype)
                hidden = hidden + layer.memory_attention(layer.norm_query(hidden), angles_patch, memory, seen)
            hidden = layer.mlp(hidden)
        return self.to_output(self.norm(hidden)), inputs, windows, memory

    def step(
        self,
        token: torch.Tensor,
        mask: torch.Tensor | None,
        latent_embeds: torch.Tensor,
        positions: torch.Tensor | int,
        recent: torch.Tensor,
        windows: list[KeyValue],
        window_mask: torch.Tensor | None,
        memory: KeyValue | None,
        memory_mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, list[KeyValue]]:
        """One token of each row.

        Args:
            token, mask: `(B,)`.
            latent_embeds: `(B, 1, E)`, [`embed_latents`] of the patch that the next token belongs to, plus
                [`embed_lookup`] of what was found for this token.
            positions: how many tokens each row held before this one, `(B,)`, or one number for all.
            recent, windows, window_mask, memory, memory_mask: see [`LatentForgeCache`].

        Returns:
            vectors `(B, 1, decoder_output_size)`, and `recent` and the windows with this token in them.
        """
        hidden = self.embed(token[:, None], None if mask is None else mask[:, None]) + latent_embeds
        if isinstance(positions, int):
            hidden = hidden + self.embed_offset.weight.select(0, (positions + 1) % self.patch_size)
            angles = self.single_angles(positions, hidden)
        else:
            hidden = hidden + self.embed_offset((positions + 1) % self.patch_size)[:, None]
            angles = rotary_angles(positions[:, None, None], self.head_size, hidden.dtype)  # (B, 1, 1, d / 2)
        hidden, recent = self.convolution.step(hidden, recent)
        new_windows = []
        for layer, past in zip(self.layers, windows, strict=True):
            attended, key_value = layer.window_attention.step(layer.norm_window(hidden), angles, past, window_mask)
            hidden = hidden + attended
            new_windows.append(key_value)
            if layer.memory_attention is not None:
                query = layer.norm_query(hidden)
                if isinstance(positions, int):
                    angles_patch = self.single_angles((positions + 1) // self.patch_size, hidden)
                else:
                    patch = ((positions + 1) // self.patch_size)[:, None, None]  # (B, 1, 1)
                    angles_patch = rotary_angles(patch, self.head_size, hidden.dtype)
                hidden = hidden + layer.memory_attention(query, angles_patch, memory, memory_mask)
            hidden = layer.mlp(hidden)
        return self.to_output(self.norm(hidden)), recent, new_windows

    def single_angles(self, position: int, like: torch.Tensor) -> KeyValue:
        """[`rotary_angles`] of one position, `(1, d / 2)`, from a table that grows."""
        table = self._angle_table
        if (
            table is None
            or position >= len(table[0])
            or table[0].device != like.device
            or table[0].dtype != like.dtype
        ):
            # made under `torch.inference_mode()` the table could not take part in a later step with gradients
            with torch.inference_mode(False):
                places = torch.arange(max(1024, 2 * position), device=like.device)
                table = self._angle_table = rotary_angles(places, self.head_size, like.dtype)
        return table[0][position : position + 1], table[1][position : position + 1]

    def memory_of(self, conditions: torch.Tensor, positions: torch.Tensor) -> KeyValue | None:
        """Keys and values of `conditions (B, C, H)` at patch `positions (B, 1, C)` for the layer that has a memory."""
        for layer in self.layers:
            if layer.memory_attention is not None:
                return layer.memory_attention.remember(conditions, positions)
        return None
