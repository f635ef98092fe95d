"""What a student remembers between two tokens.

B batch, K tokens per patch, C conditions so far, W decoder window, h heads, d head size, E decoder width, V
vocabulary, S taps of the decoder's short convolution.
"""

from collections.abc import Callable

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
        patch_logits: `(B, K, V)`, parallel decoders: all logits of the patch being written.
    """

    def __init__(self, backbone: Cache):
        super().__init__(layers=[])
        self.backbone = backbone
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
        self.patch_logits: torch.Tensor | None = None

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
        return False

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "A LatentForgeCache cannot be cropped: its last patch may already be inside the backbone. "
            "Start from a new cache."
        )

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
        for name in (
            "pending_ids",
            "pending_mask",
            "num_patches",
            "patch_mask",
            "recent",
            "window_mask",
            "memory_mask",
            "latent_embeds",
            "patch_logits",
        ):
            if getattr(self, name) is not None:
                setattr(self, name, select(getattr(self, name)))
        self.windows = [(select(key), select(value)) for key, value in self.windows]
        if self.memory is not None:
            self.memory = (select(self.memory[0]), select(self.memory[1]))
