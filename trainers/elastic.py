"""How many rows fit into free memory: a plan from sizes, before anything runs.

A plan is an estimate. [`WireConfig.elastic`] therefore also sets transformers' `auto_find_batch_size`, which begins
again with fewer rows where memory runs out.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


ACTIVATIONS_PER_LAYER = 34  # numbers that a layer keeps per token and unit of width (arXiv 2205.05198, section 4.1)
LOGITS_KEPT = 3  # in float32: the logits, their log-softmax, the gradient


@dataclass(frozen=True)
class ElasticPlan:
    """`per_device_batch_size` rows on each device, `accumulation_steps` times a step; `rows` of a step, at least those
    that were asked for."""

    per_device_batch_size: int
    accumulation_steps: int
    num_devices: int

    @property
    def rows(self) -> int:
        return self.per_device_batch_size * self.accumulation_steps * self.num_devices


def elastic_plan(
    rows: int, free_bytes: Sequence[int], fixed_bytes: int, row_bytes: int, share: float = 0.75
) -> ElasticPlan:
    """As many rows at once as fit, and as many times as make the step.

    Args:
        rows: of a step, over all devices.
        free_bytes: of each device; the smallest decides, since all take as many rows.
        fixed_bytes: that a device needs whatever the rows: weights that are not loaded yet, gradients, optimizer.
        row_bytes: that one row needs.
        share: of the free memory that may be used.

    Returns:
        a plan with at least one row a device, though it may not fit: then nothing does.

    Raises:
        ValueError: no device, a number below 1, a share outside (0, 1].
    """
    if not free_bytes or rows < 1 or row_bytes < 1:
        raise ValueError(
            f"a plan needs a device, and at least one row and byte: got {len(free_bytes)} devices, {rows} rows, "
            f"{row_bytes} bytes a row."
        )
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}.")
    devices = len(free_bytes)
    fitting = int((min(free_bytes) * share - fixed_bytes) // row_bytes)
    wanted = -(-rows // devices)
    steps = -(-wanted // max(1, min(fitting, wanted)))
    return ElasticPlan(-(-wanted // steps), steps, devices)


def training_bytes(model: torch.nn.Module) -> int:
    """Of gradients and AdamW's two moments, in the weights' own precision."""
    return sum(3 * x.numel() * x.element_size() for x in model.parameters() if x.requires_grad)


def sequence_bytes(config: Any, num_tokens: int, num_logits: int = 0, element_size: int = 4) -> int:
    """That one row keeps for its gradient in a transformer.

    Args:
        config: of the model.
        num_tokens: of the row.
        num_logits: of its tokens that logits are made for.
        element_size: bytes of a number.
    """
    config = config.get_text_config()
    kept = num_tokens * config.num_hidden_layers * config.hidden_size * ACTIVATIONS_PER_LAYER * element_size
    return kept + num_logits * config.vocab_size * 4 * LOGITS_KEPT


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
