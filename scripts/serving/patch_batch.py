"""Rows of different lengths that are written together, a patch at a time.

B rows, K tokens per patch, T tokens of a prompt, N patches of a row, P places (patches that a row has room for), W
decoder window, S taps of its convolution, h heads, d head size, H backbone width, V vocabulary.

All rows complete their patches at the same moment, whatever they hold: a row that begins in the middle of a patch
waits until the others have come to that place. So the backbone runs once per K tokens for everybody. `generate` does
not do that: there each row of a ragged batch completes patches when its own tokens say so, and the backbone runs for
all rows each time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from modeling_latentforge.token_lookup import MISSING, begin_history, extend_history, find_continuations


PLACES_STEP = 32  # places are added by so many: growing copies everything
# of `token_lookup`, a column a token, newest first; what stands behind shorter rows
GROWING = {"history": MISSING, "runs": 0}


def room_for(rows: int, places: int) -> tuple[int, int]:
    """What is set aside for so many rows and places: rows double, places grow in steps, since growing copies all."""
    return 1 << (rows - 1).bit_length(), -(-places // PLACES_STEP) * PLACES_STEP


class Noise(NamedTuple):
    """What a row's head reads: `generator`'s noise; an aligned head's numbers stay below `top_p`."""

    generator: torch.Generator
    top_p: float = 1.0


@dataclass
class RowState:
    """A prompt that has been read: what a row of [`PatchBatch`] begins with.

    Attributes:
        length: places on the patch grid that are filled.
        num_patches: those that the backbone holds.
        fixed: tensors `(1, ...)` whose size does not grow, and what `token_lookup` remembers.
        placed: tensors `(1, h, n, d)` with one entry per patch.
        logits: `(1, V)`, of the next token.
    """

    length: int
    num_patches: int
    fixed: dict[str, torch.Tensor]
    placed: dict[str, torch.Tensor]
    logits: torch.Tensor


class Prefill:
    """Reads prompts, some patches at a time, so that long ones do not stall the rows that are being written.

    Several prompts are read as one row, behind each other, where each sees only itself: nothing is filled up.

    Args:
        model: a `LatentForgeForCausalLM`, in eval mode.
        prompts: ids of each, at least one.
    """

    def __init__(self, model: Any, prompts: Sequence[Sequence[int]]):
        self.model = model
        patch_size, filler = model.config.patch_size, model._filler
        # a parallel decoder's grid ends with the prompt, and begins in the middle of a patch
        parallel = model.config.decoder_type == "parallel"
        offsets = [-len(prompt) % patch_size if parallel else 0 for prompt in prompts]
        grids = [[filler] * offset + list(prompt) for offset, prompt in zip(offsets, prompts, strict=True)]
        self.grids = [torch.tensor([grid], device=model.device) for grid in grids]
        self.num_patches = [len(grid) // patch_size for grid in grids]
        whole = [grid[:, : count * patch_size] for grid, count in zip(self.grids, self.num_patches, strict=True)]
        self.input_ids = torch.cat(whole, dim=1).unflatten(1, (-1, patch_size))  # (1, N of all, K)
        self.mask: torch.Tensor | None = None
        if any(offsets):
            known = [torch.arange(ids.shape[1]) >= offset for ids, offset in zip(whole, offsets, strict=True)]
            self.mask = torch.cat(known)[None].unflatten(1, (-1, patch_size)).to(model.device)
        counts = torch.tensor(self.num_patches)
        self.positions = torch.cat([torch.arange(count) for count in self.num_patches]).to(model.device)
        self.owners = torch.arange(len(prompts)).repeat_interleave(counts).to(model.device)
        self.cache = DynamicCache(config=model.config.backbone_config)
        self.states: list[torch.Tensor] = []
        self.done = 0  # patches

    @property
    def remaining(self) -> int:
        """Patches that have not been read."""
        return sum(self.num_patches) - self.done

    def advance(self, count: int) -> None:
        """Run the backbone over at most `count` more patches."""
        begin, end = self.done, self.done + min(count, self.remaining)
        if end == begin:
            return
        embeds = self.model._embed_patches(
            self.input_ids[:, begin:end], None if self.mask is None else self.mask[:, begin:end]
        )
        seen = None
        if len(self.num_patches) > 1:
            places = torch.arange(end, device=embeds.device)
            seen = (self.owners[begin:end, None] == self.owners[:end]) & (places[begin:, None] >= places)
            seen = backbone_mask(self.model, seen[None, None])
        positions = self.positions[None, begin:end]
        self.states.append(self.model.model(embeds, seen, positions, self.cache, use_cache=True))
        self.done = end

    def finish(self, noises: Sequence[Noise | None]) -> list[RowState]:
        """The rows, once nothing remains. `noises` are what their heads read; None takes the centre."""
        start = self.model.model.start[None, None]
        states = torch.cat([start[:, :0], *self.states], dim=1).split(self.num_patches, dim=1)
        parts = [
            self._finish(row, torch.cat([start.to(x.dtype), x], dim=1), noise)
            for row, (x, noise) in enumerate(zip(states, noises, strict=True))
        ]
        last = torch.cat([part[0] for part in parts])
        # one product for all rows: reading the matrix is what takes long
        logits = (last if self.model.config.decoder_type == "parallel" else self.model.lm_head(last)).float()
        return [
            RowState(grid.shape[1], count, fixed, placed, row[None])
            for grid, count, (_, fixed, placed), row in zip(self.grids, self.num_patches, parts, logits, strict=True)
        ]

    def _finish(
        self, row: int, conditions: torch.Tensor, noise: Noise | None
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """`fixed`, `placed` and before them what the last token's logits are made of; of a parallel decoder, they."""
        config, patch_size, grid = self.model.config, self.model.config.patch_size, self.grids[row]
        length, num_patches = grid.shape[1], self.num_patches[row]
        first = sum(self.num_patches[:row])
        mine = slice(first, first + num_patches)
        placed: dict[str, torch.Tensor] = {}
        for number, layer in enumerate(self.cache.layers):
            if getattr(layer, "keys", None) is not None:
                placed[f"key{number}"] = layer.keys[:, :, mine]
                placed[f"value{number}"] = layer.values[:, :, mine]
        pending = grid[:, num_patches * patch_size :]
        fixed = {"pending_ids": torch.nn.functional.pad(pending, (0, patch_size - pending.shape[1]))}
        if config.decoder_type == "parallel":
            latents = sample_latents(self.model, conditions[:, -1:], [noise])
            fixed["patch_logits"] = self.model._patch_logits(self.model._decode_parallel(latents))
            return fixed["patch_logits"][:, 0], fixed, placed

        decoder = self.model.decoder
        start = max(0, (length - decoder.reach - patch_size) // patch_size * patch_size)
        latents = sample_latents(self.model, conditions[:, start // patch_size :], [noise])
        looked_up = None
        if decoder.lookup is not None:
            sizes = decoder.lookup.sizes
            looked_up = tuple(x[:, start:] for x in find_continuations(grid, None, sizes))
            fixed["history"], fixed["runs"] = begin_history(grid, None, [length], sizes)
        hidden, inputs, windows, memory = decoder(grid[:, start:], None, latents, conditions, start, looked_up)
        keep, taps = decoder.window - 1, decoder.convolution.size - 1
        known = min(keep, length - start)
        fixed["window_mask"] = torch.arange(keep, device=hidden.device)[None] >= keep - known
        fixed["recent"] = inputs[:, inputs.shape[1] - taps :]
        fixed["latent_embeds"] = decoder.embed_latents(latents[:, -1:])
        for number, pair in enumerate(windows):
            for name, x in zip(("key", "value"), pair, strict=True):
                last = x[:, :, x.shape[2] - known :]
                fixed[f"window_{name}{number}"] = torch.nn.functional.pad(last, (0, 0, keep - known, 0))
        if memory is not None:
            placed["memory_key"], placed["memory_value"] = memory
        return hidden[:, -1], fixed, placed


def _widened(name: str, x: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[1]), value=GROWING[name])


def _stacked(name: str, parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if name in GROWING:
        width = max(x.shape[1] for x in parts)
        parts = [_widened(name, x, width) for x in parts]
    return torch.cat(list(parts))


def backbone_mask(model: Any, seen: torch.Tensor) -> torch.Tensor:
    """`seen (..., queries, keys)` as the backbone takes it: eager attention adds its mask, and True would be a 1."""
    if model.model.backbone.config._attn_implementation != "eager":
        return seen
    return torch.zeros_like(seen, dtype=model.dtype).masked_fill_(~seen, torch.finfo(model.dtype).min)


def sample_latents(model: Any, conditions: torch.Tensor, noises: Sequence[Noise | None]) -> torch.Tensor:
    """`(B, C, H)` -> latents `(B, C, D)`, with each row's own noise, or without (None)."""
    if not model.head.noise_size or all(one is None for one in noises):
        return model.head.sample(conditions)
    count = conditions.shape[1]
    noise = [
        torch.zeros(1, count, model.head.noise_size)
        if one is None
        else model.head.draw_noise((1, count), torch.zeros(()), one.generator) * one.top_p
        for one in noises
    ]
    return model.head.sample(conditions, torch.cat(noise).to(conditions.device))


class _RowLayer(DynamicLayer):
    """One backbone layer's keys and values, rows of `batch`; written where each row is."""

    def __init__(self, batch: "PatchBatch", number: int):
        super().__init__()
        self.batch, self.number = batch, number
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        batch = self.batch
        held = []
        for name, states in ((f"key{self.number}", key_states), (f"value{self.number}", value_states)):
            store = batch.store(name, states)
            store[batch.row_index, :, batch.num_patches] = states[:, :, 0]
            held.append(store[: batch.num_rows, :, : batch.width])
        return held[0], held[1]

    def get_seq_length(self) -> int:
        return self.batch.width - 1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.batch.width, 0


@dataclass
class PatchBatch:
    """The rows that are being written.

    Row r belongs to whoever joined at r; when one leaves, the last row takes its place.

    Args:
        model: a `LatentForgeForCausalLM`, in eval mode. Backbones that attend to less than the whole past are refused:
            they would take the gaps behind shorter rows for patches.

    Attributes:
        num_rows: B.
        logits: `(B, V)`, of each row's next token.
        noises: of each row.

    Raises:
        ValueError: see above.
    """

    model: Any
    num_rows: int = 0
    logits: torch.Tensor | None = None
    lengths: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # that each row may come to need
    noises: list[Noise | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model._check_full_attention()
        layers = self.model.config.backbone_config.num_hidden_layers
        self.cache = Cache(layers=[_RowLayer(self, number) for number in range(layers)])
        self._release()

    def _release(self) -> None:
        self.fixed: dict[str, torch.Tensor] = {}
        self.placed: dict[str, torch.Tensor] = {}
        self.capacity = (0, 0)  # rows, places
        self.num_patches = torch.zeros(0, dtype=torch.long, device=self.model.device)
        self.logits = None
        self.width = 0

    @property
    def num_bytes(self) -> int:
        """Of what grows with rows and patches; other threads may ask while it grows."""
        return sum(x.numel() * x.element_size() for x in list(self.placed.values()))

    def store(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """The `(rows, h, P, d)` of a name; made when first asked for."""
        if name not in self.placed:
            rows, places = self.capacity
            self.placed[name] = like.new_zeros(rows, like.shape[1], places, like.shape[3])
        return self.placed[name]

    def reserve(self, rows: int, places: int) -> None:
        """Make room; what is there is kept, and what is far too much is given back."""
        now_rows, now_places = self.capacity
        rows, places = room_for(rows, places)
        if rows <= now_rows and places <= now_places and now_rows * now_places <= 4 * rows * places:
            return
        self.capacity = rows, places
        used = min(self.width, places, now_places)
        for name, old in list(self.placed.items()):
            new = old.new_zeros(rows, old.shape[1], places, old.shape[3])
            new[: self.num_rows, :, :used] = old[: self.num_rows, :, :used]
            self.placed[name] = new

    def join(self, states: Sequence[RowState], places: Sequence[int], noises: Sequence[Noise | None]) -> None:
        """Add rows behind the others, each of which may come to so many `places` (patches)."""
        self.places += places
        self.reserve(self.num_rows + len(states), max(self.places))
        for row, state in enumerate(states, self.num_rows):
            for name, x in state.placed.items():
                self.store(name, x)[row, :, : x.shape[2]] = x[0]
        together = [state.fixed for state in states]
        if self.num_rows:
            together = [self.fixed, *together]
        self.fixed = {name: _stacked(name, [fixed[name] for fixed in together]) for name in together[0]}
        logits = [state.logits for state in states]
        self.logits = torch.cat(logits if self.logits is None else [self.logits, *logits])
        self.lengths += [state.length for state in states]
        self.noises += noises
        counts = self.num_patches.new_tensor([state.num_patches for state in states])
        self.num_patches = torch.cat([self.num_patches, counts])
        self.num_rows += len(states)
        self._measure()

    def _measure(self) -> None:
        self.row_index = torch.arange(self.num_rows, device=self.num_patches.device)
        self.width = int(self.num_patches.max()) + 1 if self.num_rows else 0
        places = torch.arange(self.width, device=self.num_patches.device)
        self.seen = (places <= self.num_patches[:, None])[:, None, None]  # (B, 1, 1, width)

    def leave(self, rows: Sequence[int]) -> list[int]:
        """Take rows out; returns for each remaining row the number that it had, in their new order."""
        gone = set(rows)
        if not gone:
            return list(range(self.num_rows))
        remaining = [row for row in range(self.num_rows) if row not in gone]
        count = len(remaining)
        order = list(range(self.num_rows))
        # rows behind the new end move into the gaps before it: few rows are copied, and not all
        gaps = [row for row in range(count) if row in gone]
        for gap, row in zip(gaps, [row for row in remaining if row >= count], strict=True):
            order[gap] = row
            used = int(self.num_patches[row]) + 1
            for x in self.placed.values():
                x[gap, :, :used] = x[row, :, :used]
        order = order[:count]
        self.num_rows = count
        self.lengths = [self.lengths[row] for row in order]
        self.places = [self.places[row] for row in order]
        self.noises = [self.noises[row] for row in order]
        if not count:
            self._release()
            return order
        index = torch.tensor(order, device=self.num_patches.device)
        self.fixed = {name: x.index_select(0, index) for name, x in self.fixed.items()}
        if "history" in self.fixed:
            longest = max(self.lengths)
            self.fixed["history"] = self.fixed["history"][:, :longest]
            self.fixed["runs"] = self.fixed["runs"][:, : longest - 1]  # of all tokens but the newest
        assert self.logits is not None
        self.logits = self.logits.index_select(0, index)
        self.num_patches = self.num_patches.index_select(0, index)
        self._measure()
        return order

    def phase(self, row: int) -> int:
        """The place in its patch that a row's next token takes."""
        return self.lengths[row] % self.model.config.patch_size

    def read(self, place: int, tokens: torch.Tensor, active: Sequence[bool]) -> None:
        """Every active row reads one token, which takes `place` in its patch; then `logits` are of the next ones.

        Args:
            tokens: `(B,)`; those of rows that are not active may be any.
            active: rows that are written; the others stay as they are, unless they have ended.
        """
        assert self.logits is not None
        everybody = all(active)
        chosen = None if everybody else torch.tensor(list(active), device=tokens.device)
        pending = self.fixed["pending_ids"][:, place]
        pending.copy_(tokens if chosen is None else torch.where(chosen, tokens, pending))
        before = torch.tensor(self.lengths, device=tokens.device)
        self.lengths = [length + is_active for length, is_active in zip(self.lengths, active, strict=True)]
        patch_size = self.model.config.patch_size
        if place == patch_size - 1:
            # whoever is not active now has ended: what becomes of it does not matter
            self._complete_patch()
        if self.model.config.decoder_type == "parallel":
            logits = self.fixed["patch_logits"][:, (place + 1) % patch_size].float()
        else:
            logits = self._decode(tokens, before, chosen)
        self.logits = logits if chosen is None else torch.where(chosen[:, None], logits, self.logits)

    def _complete_patch(self) -> None:
        embeds = self.model._embed_patches(self.fixed["pending_ids"][:, None], None)
        # a row that has ended goes on to the end of its patch
        self.reserve(self.num_rows, max(*self.places, self.width + 1))
        seen = backbone_mask(self.model, self.seen)
        condition = self.model.model(embeds, seen, self.num_patches[:, None], self.cache, use_cache=True)
        self.num_patches = self.num_patches + 1
        latents = sample_latents(self.model, condition, self.noises)
        if self.model.config.decoder_type == "parallel":
            self.fixed["patch_logits"] = self.model._patch_logits(self.model._decode_parallel(latents))
        else:
            self.fixed["latent_embeds"] = self.model.decoder.embed_latents(latents)
            memory = self.model.decoder.memory_of(condition, self.num_patches[:, None, None])
            if memory is not None:
                for name, x in zip(("memory_key", "memory_value"), memory, strict=True):
                    self.store(name, x)[self.row_index, :, self.num_patches] = x[:, :, 0]
        self._measure()

    def _decode(self, tokens: torch.Tensor, before: torch.Tensor, chosen: torch.Tensor | None) -> torch.Tensor:
        decoder, fixed = self.model.decoder, self.fixed
        windows = [(fixed[f"window_key{i}"], fixed[f"window_value{i}"]) for i in range(len(decoder.layers))]
        seen = torch.cat([fixed["window_mask"], fixed["window_mask"].new_ones(self.num_rows, 1)], dim=1)
        memory: Any = None
        if "memory_key" in self.placed:
            memory = tuple(self.placed[f"memory_{x}"][: self.num_rows, :, : self.width] for x in ("key", "value"))
        embeds, new = fixed["latent_embeds"], {}
        if decoder.lookup is not None:
            new["history"], new["runs"], ids, levels = extend_history(
                fixed["history"], fixed["runs"], tokens, None, decoder.lookup.boundaries_on(tokens.device)
            )
            embeds = embeds + decoder.step_lookup(ids, levels)
            for name, x in new.items():
                fixed[name] = _widened(name, fixed[name], x.shape[1])
        hidden, recent, windows = decoder.step(
            tokens,
            None,
            embeds,
            before,
            fixed["recent"],
            windows,
            seen[:, None, None],
            memory,
            self.seen,
        )
        new |= {"recent": recent, "window_mask": seen[:, 1:]}
        for number, (key, value) in enumerate(windows):
            new[f"window_key{number}"], new[f"window_value{number}"] = key, value
        for name, x in new.items():
            keep = chosen is not None and fixed[name]
            fixed[name] = x if chosen is None else torch.where(chosen.view(-1, *[1] * (x.dim() - 1)), x, keep)
        return self.model.lm_head(hidden[:, 0]).float()
