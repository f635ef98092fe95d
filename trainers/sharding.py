"""FSDP2 for our models: what accelerate does for stock ones only, and on accelerators only. DeepSpeed: models that are
built whole."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from transformers.integrations import set_hf_deepspeed_config, unset_hf_deepspeed_config


def shard_on_cpu(accelerator: Any, plugin_kwargs: dict[str, Any] | None) -> None:
    """Let processes on a CPU shard too where FSDP is asked for.

    accelerate 1.15 knows FSDP between accelerators only; between CPUs it drops the request without a word, and
    every process trains a whole copy.

    Args:
        accelerator: as built; where it shards already, or nobody asked, nothing is changed.
        plugin_kwargs: of [`FullyShardedDataParallelPlugin`]; what they leave out is read from the environment that
            `accelerate launch` sets.
    """
    state = accelerator.state
    asked = plugin_kwargs is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not asked or state.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**(plugin_kwargs or {}))
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    state.fsdp_plugin = plugin
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def keep_precision(plugin: FullyShardedDataParallelPlugin | None) -> None:
    """Let FSDP2 compute in bf16 or fp16 without rounding what goes into the model and comes out of it.

    accelerate's policy casts the output: the loss of the log, the sums of an evaluation (which fp16 cannot even hold)
    and what the codec cache keeps; torch's default casts the inputs: what the cache had kept. Inside, autocast chooses
    as it does without shares.
    """
    policy = getattr(plugin, "mixed_precision_policy", None)
    if plugin is not None and isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, output_dtype=None, cast_forward_inputs=False)


def build_whole() -> None:
    """From now on models are built whole, by whatever the flags of a DeepSpeed training say; [`share_again`] ends it.

    Once flags ask for ZeRO-3, transformers builds and loads every model in shares, whatever `zero3_init_flag` says.
    Only the engine of a training gathers them: a codec that is copied into a student, and a teacher, which no engine
    holds, would have no weights.
    """
    unset_hf_deepspeed_config()


def share_again(accelerator: Any) -> None:
    """Tell transformers of the accelerator's DeepSpeed, if it has one: how weights are saved, loaded and counted
    depends on it."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None:
        set_hf_deepspeed_config(plugin.hf_ds_config)


@contextmanager
def in_one_group(model: nn.Module) -> Iterator[None]:
    """While accelerate shards `model`, its embeddings and its output matrix stay with the root.

    accelerate gives them groups of their own, which are gathered when `lm_head.forward` is called. Our losses read
    `lm_head.weight` and never call it: they would meet a shard. The root's group is gathered for the whole forward.
    """

    def unseen(method: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: method() if isinstance(model, FSDPModule) else None

    names = ("get_input_embeddings", "get_output_embeddings")
    for name in names:
        setattr(model, name, unseen(getattr(model, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)


@contextmanager
def in_its_own_class(model: nn.Module) -> Iterator[None]:
    """While it is saved, a sharded model is what it was: FSDP2 makes it a class of torch's, and the code of that would
    be put beside the weights, where it loads nothing."""
    sharded: Any = type(model)
    if issubclass(sharded, FSDPModule):
        model.__class__ = next(kind for kind in sharded.__mro__ if not issubclass(kind, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded
