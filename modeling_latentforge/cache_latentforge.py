"""What a student remembers between two tokens.

B batch, K tokens per patch, C conditions so far, W decoder window, h heads, d head size, E decoder width, V
vocabulary, S taps of the decoder's short convolution.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache


class LatentForgeCache(Cache):
    """The backbone's cache, counted in patches, and around it what belongs to the unfinished patch.

    To transformers it is a cache of tokens: [`get_seq_length`] counts columns of `input_ids`. Rows of a left-padded
    batch start at different columns, so with an autoregressive decoder they complete their patches at different
    times; a backbone slot that a row did not fill is masked.

    Attributes:
        backbone: cache of the backbone.
        lengths: tokens per row, leading padding not counted (parallel: places on the grid, the same for all rows).
        pending_ids, pending_mask: `(B, K)`, the unfinished patch.
        num_patches: `(B, 1)`, complete patches per row: the backbone's next position.
        patch_mask: `(B, slots)` or None, which backbone slots hold a patch of the row.
        recent: `(B, S - 1, E)`, the decoder's last inputs, zeros where a row has fewer.
        windows: per decoder layer, keys and values `(B, h, <= W - 1, d)`; `window_mask (B, <= W - 1)` or None.
        memory: keys and values `(B, h, C, d)` of the conditions; `memory_mask (B, C)` or None.
        latent_embeds: `(B, 1, E)`, the latent of the patch being written.
        history, runs: `(B, P)` and `(B, P - 1)`, the rows' tokens, newest first, and how far they match its end (see
            `token_lookup`), or None.
        patch_logits: `(B, K, V)`, parallel decoders: all logits of the patch being written.

    A token cannot be taken out of the fields above, since the last patch may be inside the backbone already. After
    [`activate_past_recording`] the cache keeps the state before each token, and [`crop`] goes back to it.
    """

    STATE = (
        "seq_length",
        "lengths",
        "pending_ids",
        "pending_mask",
        "num_patches",
        "patch_mask",
        "recent",
        "windows",
        "window_mask",
        "memory",
        "memory_mask",
        "latent_embeds",
        "history",
        "runs",
        "patch_logits",
    )
    MAX_RECORDED = 1024  # tokens; drafts are some ten long

    def __init__(self, backbone: Cache):
        super().__init__(layers=[])
        self.backbone = backbone
        self.is_recording = False
        self._clear()

    def _clear(self) -> None:
        self.seq_length = 0
        self.lengths: list[int] = []
        self.pending_ids: torch.Tensor | None = None
        self.pending_mask: torch.Tensor | None = None
        self.num_patches: torch.Tensor | None = None
        self.patch_mask: torch.Tensor | None = None
        self.recent: torch.Tensor | None = None
        self.windows: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.window_mask: torch.Tensor | None = None
        self.memory: tuple[torch.Tensor, torch.Tensor] | None = None
        self.memory_mask: torch.Tensor | None = None
        self.latent_embeds: torch.Tensor | None = None
        self.history: torch.Tensor | None = None
        self.runs: torch.Tensor | None = None
        self.patch_logits: torch.Tensor | None = None
        self._forget()

    def _forget(self) -> None:
        self._recorded: deque[tuple[dict[str, Any], int]] = deque(maxlen=self.MAX_RECORDED)
        # of the prompt: refills the fields as they were some tokens earlier
        self._refill_prompt: Callable[[int], None] | None = None
        self._prompt_length = self._prompt_valid = 0  # tokens that it was, and of them those still in the cache

    @property
    def is_ragged(self) -> bool:
        """Whether rows hold different numbers of tokens."""
        return min(self.lengths) != max(self.lengths)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seq_length

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        return self.is_recording

    def activate_past_recording(self) -> None:
        """From now on keep what [`crop`] needs; transformers asks for it before it drafts."""
        self.is_recording = True
        self.backbone.activate_past_recording()

    def stop_recording(self) -> None:
        self.is_recording = False
        self._forget()

    def record(self) -> None:
        """Keep the state as it is, before another token is read."""
        state = {name: getattr(self, name) for name in self.STATE}
        for name in ("pending_ids", "pending_mask"):  # the only ones that a step writes into
            state[name] = None if state[name] is None else state[name].clone()
        self._recorded.append((state, int(self.backbone.get_seq_length())))

    def record_prompt(self, refill: Callable[[int], None]) -> None:
        """`refill(n)` fills the fields as they were after the prompt less its last n tokens."""
        self._prompt_length = self._prompt_valid = self.seq_length
        self._refill_prompt = refill

    def crop(self, tokens_to_remove: int) -> None:
        """Go back `-tokens_to_remove` tokens (negative, as in transformers), and keep no state from before.

        Raises:
            ValueError: a positive number, or more tokens than were recorded.
        """
        removed = -int(tokens_to_remove)
        length = self.seq_length - removed
        if removed < 0 or length < 0:
            raise ValueError(
                f"`crop({tokens_to_remove})` of a cache of {self.seq_length} tokens: pass how many to remove, as a "
                f"number of -{self.seq_length} to 0."
            )
        if length == 0:
            # `reset` alone keeps the slots, of zeros, on transformers 5.16
            self.backbone.crop(-int(self.backbone.get_seq_length()))
            self.reset()
            return
        before = len(self._recorded) - removed
        if removed and before >= 0:
            state, slots = self._recorded[before]
            for name, value in state.items():
                setattr(self, name, value)
            self.backbone.crop(slots - int(self.backbone.get_seq_length()))
        elif removed:
            if self._refill_prompt is None or length > self._prompt_valid:
                raise ValueError(
                    f"The cache has recorded its last {len(self._recorded)} tokens and cannot go back {removed}: call "
                    "`activate_past_recording()` before its first token."
                )
            self._refill_prompt(self._prompt_length - length)
        self._recorded.clear()
        self._prompt_valid = min(self._prompt_valid, length)
        if length > self._prompt_length:  # drafts only grow: what the refill holds is no longer needed
            self._refill_prompt = None

    def reset(self) -> None:
        self.backbone.reset()
        self._clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.backbone.reorder_cache(beam_idx)
        self._select_rows(lambda x: x.index_select(0, beam_idx.to(x.device)), beam_idx.tolist())

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.backbone.batch_select_indices(indices)
        rows = torch.arange(len(self.lengths))[indices.cpu()].tolist()
        self._select_rows(lambda x: x[indices.to(x.device)], rows)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.backbone.batch_repeat_interleave(repeats)
        rows = [row for row in range(len(self.lengths)) for _ in range(repeats)]
        self._select_rows(lambda x: x.repeat_interleave(repeats, dim=0), rows)

    def _select_rows(self, select: Callable[[torch.Tensor], torch.Tensor], rows: list[int]) -> None:
        self.lengths = [self.lengths[row] for row in rows]
        self._forget()  # what was recorded is of the rows before
        for name in (
            "pending_ids",
            "pending_mask",
            "num_patches",
            "patch_mask",
            "recent",
            "window_mask",
            "memory_mask",
            "latent_embeds",
            "history",
            "runs",
            "patch_logits",
        ):
            if getattr(self, name) is not None:
                setattr(self, name, select(getattr(self, name)))
        self.windows = [(select(key), select(value)) for key, value in self.windows]
        if self.memory is not None:
            self.memory = (select(self.memory[0]), select(self.memory[1]))
