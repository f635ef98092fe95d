"""LoRA on receivers, by peft: beside the model, so that the model itself stays as everybody else has it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from modeling_latentforge import Receiver


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # peft's names


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA on a receiver needs peft: pip install 'latentforge[train]'.") from error
    return peft


def add_adapter(
    receiver: Receiver, r: int, alpha: float | None = None, dropout: float = 0.0, targets: str = "all-linear"
) -> None:
    """W + (alpha / r) B A on linear maps of a receiver (arXiv 2106.09685); B begins at 0, so that nothing changes yet.

    Args:
        r: rank.
        alpha: default: twice r.
        dropout: on what A reads, while it learns.
        targets: names of layers with commas, or `all-linear`, all but the output matrix.

    Raises:
        ValueError: a rank below 1, an adapter that is there already.
    """
    if r < 1:
        raise ValueError(f"lora_r must be at least 1, got {r}.")
    if has_adapter(receiver):
        raise ValueError("The receiver has an adapter already: train that one, or start from the bare model.")
    names = [name.strip() for name in targets.split(",")]
    config = _peft().LoraConfig(
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=targets if names == ["all-linear"] else names,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in receiver.model.modules()),  # GPT-2's
    )
    # no task type: peft's causal-LM wrapper would pass inputs_embeds a second time
    receiver.model = _peft().get_peft_model(receiver.model, config).eval()


def has_adapter(receiver: Receiver) -> bool:
    return hasattr(receiver.model, "disable_adapter")  # of peft's models alone


def adapter_parameters(receiver: Receiver) -> dict[str, torch.nn.Parameter]:
    """Weights of the adapter by name; empty where there is none."""
    if not has_adapter(receiver):
        return {}
    return {name: parameter for name, parameter in receiver.model.named_parameters() if "lora_" in name}


@contextmanager
def without_adapter(receiver: Receiver) -> Iterator[None]:
    """Within, the receiver is the frozen model that everybody has."""
    if not has_adapter(receiver):
        yield
        return
    with receiver.model.disable_adapter():
        yield


def set_adapter_dropout(receiver: Receiver, active: bool) -> None:
    """The adapter's dropout; the model's own stays off."""
    if has_adapter(receiver):
        for name, module in receiver.model.named_modules():
            if "lora_dropout" in name:
                module.train(active)


def save_adapter(receiver: Receiver, folder: Path) -> None:
    """As peft does, without its card and without the place of the model, which is a folder of this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    config = receiver.model.peft_config["default"]
    kept, config.base_model_name_or_path = config.base_model_name_or_path, ""
    config.save_pretrained(folder)
    config.base_model_name_or_path = kept
    state = _peft().get_peft_model_state_dict(receiver.model)
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, folder / WEIGHTS)


def load_adapter(receiver: Receiver, folder: Path) -> None:
    """Put the adapter of [`save_adapter`] on a bare receiver, frozen."""
    receiver.model = _peft().PeftModel.from_pretrained(receiver.model, str(folder)).eval().requires_grad_(False)


def restore_adapter(receiver: Receiver, folder: Path) -> None:
    """Its weights, into an adapter of the same shape."""
    _peft().set_peft_model_state_dict(receiver.model, load_file(folder / WEIGHTS))
