"""The latents of a message -> what one frozen language model can read.

B messages, M latents, D latent size, S slots, H the receiver's hidden size, h its key-value heads, d their size, L its
layers.

    soft         S = M vectors in the place of token embeddings; or S of them, each made of all latents (`prefix_len`)
    kv           keys and values of S = M places, in every layer (deep prefix)
    pooled_kv    the same of a few places, made of the mean of the latents (coprocessor)
    cross        some layers look at the latents themselves, through gates that begin at 0 (latent adapters)

`static_slots` learned vectors, the same for every message, stand before any of them (prefix).
"""

import math
from dataclasses import dataclass

import torch
from torch import nn


MODES = ("soft", "kv", "pooled_kv", "cross")
CALIBRATIONS = ("embed_rms", "none")


@dataclass
class Injection:
    """What stands for a context before a receiver's own tokens; None where a mode has none.

    Attributes:
        embeds, mask: `(B, S, H)` and which of them are there `(B, S)`.
        keys_values, key_value_mask: `(key, value)` a layer, `(B, h, S, d)` each, and `(B, S)`.
        latents, latent_mask: `(B, M, D)` that adapters look at, and `(B, M)`.
    """

    embeds: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    keys_values: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    key_value_mask: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    latent_mask: torch.Tensor | None = None


@dataclass(frozen=True)
class ReceiverShape:
    """What a bridge must know of its language model.

    Attributes:
        hidden_size, num_layers, num_key_value_heads, head_dim: its.
        embed_rms: root of the mean square of its embedding matrix.
    """

    hidden_size: int
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    embed_rms: float

    @classmethod
    def of(cls, model: nn.Module) -> "ReceiverShape":
        """Of any causal LM of transformers."""
        config = model.config.get_text_config()
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        weight = model.get_input_embeddings().weight
        return cls(
            config.hidden_size,
            config.num_hidden_layers,
            getattr(config, "num_key_value_heads", None) or heads,
            head_dim,
            float(weight.detach().float().square().mean().sqrt()),
        )


class LatentAdapter(nn.Module):
    """`x + tanh(gate) * MLP(attention(norm(x), latents))`; the gate begins at 0: an untrained one changes nothing."""

    def __init__(self, hidden_size: int, latent_size: int, num_heads: int, eps: float):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key_value = nn.Linear(latent_size, 2 * hidden_size, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 2 * hidden_size), nn.GELU(), nn.Linear(2 * hidden_size, hidden_size)
        )
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: torch.Tensor, latents: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`(B', T, H)` with B' a multiple of B (beams, several samples a prompt), `(B, M, D)`, `(B, M)`."""
        repeats = hidden.shape[0] // latents.shape[0]
        if repeats != 1:
            latents, mask = latents.repeat_interleave(repeats, 0), mask.repeat_interleave(repeats, 0)

        def heads(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        key, value = self.key_value(latents).chunk(2, dim=-1)
        inner = self.norm(hidden.to(self.query.weight.dtype))
        seen = nn.functional.scaled_dot_product_attention(
            heads(self.query(inner)), heads(key), heads(value), attn_mask=mask[:, None, None]
        )
        update = self.mlp(seen.transpose(1, 2).flatten(2)) * self.gate.tanh()
        return hidden + update.to(hidden.dtype)


def _of_slots(values: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` rows; the last one stands for those that are not there."""
    return values[torch.arange(count, device=values.device).clamp(max=len(values) - 1)]


class LatentBridge(nn.Module):
    """See the drawing at the top of the file.

    Args:
        shape: of the receiver.
        latent_size: D.
        mode: one of `MODES`.
        max_slots: slots with a size (`soft`) or a place (`kv`) of their own; further ones share the last's.
        hidden_size: of the MLP; default twice D.
        pooled_slots: of `pooled_kv`.
        static_slots: before the message's.
        prefix_len: of `soft`: S slots made of all latents together by one linear map; `max_slots` is then their
            number M, which all messages have. Default: a slot of each latent, by an MLP.
        calibration: of the slots of `soft`: `embed_rms` brings each to the receiver's embedding size, `none` leaves
            them as they are.
        adapter_layers: of `cross`; default every fourth, from the third on.

    Keys of `kv` stand at no position, so without places a receiver could not tell one slot from another: the second
    token of a text would be looked for in all of them (measured: docs/experiments.md).

    Slots of `soft` are normalised and brought to the receiver's embedding size, message by message: outside it frozen
    layers read noise.

    Raises:
        ValueError: an unknown mode or calibration, adapters of layers that the receiver does not have.
    """

    def __init__(
        self,
        shape: ReceiverShape,
        latent_size: int,
        mode: str = "soft",
        max_slots: int = 64,
        hidden_size: int | None = None,
        pooled_slots: int = 2,
        static_slots: int = 0,
        prefix_len: int | None = None,
        calibration: str = "embed_rms",
        adapter_layers: tuple[int, ...] | None = None,
        eps: float = 1e-6,
    ):
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"A bridge's `mode` must be one of {', '.join(MODES)}, got {mode!r}.")
        if calibration not in CALIBRATIONS:
            raise ValueError(f"`calibration` must be one of {', '.join(CALIBRATIONS)}, got {calibration!r}.")
        if prefix_len is not None and (mode != "soft" or prefix_len < 1):
            raise ValueError(f"`prefix_len` ({prefix_len}) is of a soft bridge and at least 1; the mode is {mode!r}.")
        self.shape, self.mode, self.pooled_slots, self.eps = shape, mode, pooled_slots, eps
        self.prefix_len = prefix_len
        self.is_calibrated = calibration == "embed_rms"
        hidden_size = hidden_size or 2 * latent_size
        self.log_start = math.log(max(shape.embed_rms, 1e-6))
        self.static = (
            nn.Parameter(torch.randn(static_slots, shape.hidden_size) * shape.embed_rms) if static_slots else None
        )
        if mode == "cross":
            if adapter_layers is None:
                adapter_layers = tuple(range(min(2, shape.num_layers - 1), shape.num_layers, 4))
            if not adapter_layers or not all(0 <= layer < shape.num_layers for layer in adapter_layers):
                raise ValueError(
                    f"`adapter_layers` {adapter_layers} must lie in 0 to {shape.num_layers - 1}, the receiver's "
                    "layers."
                )
            heads = next(n for n in range(max(1, shape.hidden_size // 64), 0, -1) if not shape.hidden_size % n)
            self.adapters = nn.ModuleDict(
                {str(layer): LatentAdapter(shape.hidden_size, latent_size, heads, eps) for layer in adapter_layers}
            )
            return
        self.norm = nn.RMSNorm(latent_size, eps=eps)
        if prefix_len is not None:
            self.out = nn.Linear(max_slots * latent_size, prefix_len * shape.hidden_size)
            if self.is_calibrated:
                self.log_size = nn.Parameter(torch.full((prefix_len,), self.log_start))
            return
        self.mlp = nn.Sequential(nn.Linear(latent_size, hidden_size), nn.GELU())
        if mode == "soft":
            self.out = nn.Linear(hidden_size, shape.hidden_size)
            self.skip = nn.Linear(latent_size, shape.hidden_size, bias=False)
            if self.is_calibrated:
                self.log_size = nn.Parameter(torch.full((max_slots,), self.log_start))
        else:
            slots = pooled_slots if mode == "pooled_kv" else 1
            if mode == "kv":
                self.place = nn.Parameter(torch.zeros(max_slots, latent_size))
            self.out = nn.Linear(
                hidden_size, slots * shape.num_layers * 2 * shape.num_key_value_heads * shape.head_dim
            )

    def forward(self, latents: torch.Tensor, mask: torch.Tensor | None = None) -> Injection:
        """`(B, M, D)` and which of them are there `(B, M)`."""
        if mask is None:
            mask = latents.new_ones(latents.shape[:2]).bool()
        injection = Injection()
        if self.mode == "cross":
            injection.latents, injection.latent_mask = latents, mask
        elif self.mode == "soft":
            inner = self.norm(latents)
            if self.prefix_len is not None:
                slots = self.out(inner.flatten(1)).unflatten(1, (self.prefix_len, -1))
                mask = mask.new_ones(slots.shape[:2])
            else:
                slots = self.out(self.mlp(inner)) + self.skip(inner)
            if self.is_calibrated:
                slots = slots * (slots.float().square().mean(-1, keepdim=True) + self.eps).rsqrt().to(slots.dtype)
                slots = slots * _of_slots(self.log_size, slots.shape[1]).exp()[:, None]
            injection.embeds, injection.mask = slots, mask
        else:
            inner = self.norm(latents)
            if self.mode == "pooled_kv":
                weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
                inner = (inner * weights[..., None]).sum(1, keepdim=True)
                mask = mask.new_ones(len(mask), self.pooled_slots)
            else:
                inner = inner + _of_slots(self.place, inner.shape[1])
            shape = self.shape
            sizes = (-1, shape.num_layers, 2, shape.num_key_value_heads, shape.head_dim)
            of_slots = self.out(self.mlp(inner)).flatten(1).unflatten(1, sizes)  # (B, S, L, 2, h, d)
            of_layers = of_slots.permute(2, 3, 0, 4, 1, 5)  # (L, 2, B, h, S, d)
            injection.keys_values = [(key, value) for key, value in of_layers]
            injection.key_value_mask = mask
        if self.static is not None:
            static = self.static.expand(len(latents), -1, -1)
            present = mask.new_ones(static.shape[:2])
            before = [] if injection.embeds is None else [injection.embeds.to(static.dtype)]
            injection.embeds = torch.cat([static, *before], dim=1)
            injection.mask = present if injection.mask is None else torch.cat([present, injection.mask], dim=1)
        return injection
