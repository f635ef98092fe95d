"""Wires and their receivers, from folders and back.

    name=folder or Hub id -> load_receiver -> Receiver (model, tokenizer, template)
    folder of a wire      -> load_wire     -> LatentForgeWire with its tokenizer, its receivers and their adapters

    <directory>/                   weights of encoder, quantizer and bridges, config, the encoder's tokenizer
    <directory>/receivers/<name>/  LoRA of a receiver, where it has one

Where a receiver lies is never written down: whoever loads a wire says it again. What a bridge was trained with, the
template, is in the config, and comes back by itself.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modeling_latentforge import LatentForgeWire, Receiver, Template
from modeling_latentforge.configuration_wire import NUM_BYTES

from .command_line import choose_device, model_path
from .wire_lora import has_adapter, load_adapter, save_adapter


TEMPLATES = ("auto", "plain", "chat")
ADAPTERS = "receivers"  # folder of a checkpoint


def parse_receivers(entries: Sequence[str]) -> dict[str, str]:
    """`name=folder_or_hub_id`, or the place alone, whose last part is then the name with `_` for what a name cannot
    hold.

    Returns:
        name -> place

    Raises:
        ValueError: two of one name, a name that holds more than letters, digits, `_` and `-`, an empty place.
    """
    receivers: dict[str, str] = {}
    for entry in entries:
        name, equals, place = entry.partition("=")
        if not equals or "/" in name:  # a folder whose name holds `=`
            place = entry
            name = re.sub(r"[^\w-]", "_", Path(entry.rstrip("/")).name)
        if not place or not name:
            raise ValueError(f"receivers: {entry!r} must read name=folder, name=hub_id, or the folder or id alone.")
        if not re.fullmatch(r"[\w-]+", name):
            raise ValueError(f"receivers: the name {name!r} may hold letters, digits, _ and - only, no dots: mend it.")
        if name in receivers:
            raise ValueError(
                f"receivers: the name {name!r} is given twice, for {receivers[name]} and {place}: write name=place."
            )
        receivers[name] = place
    return receivers


def load_receiver(
    path: str,
    *,
    template: str | Template = "auto",
    anchor: str = "",
    bos: bool | None = None,
    dtype: str | None = None,
    device: str | None = None,
) -> Receiver:
    """A causal LM with its tokenizer, frozen.

    Args:
        path: folder or Hub id.
        template: `plain`, `chat` (of the tokenizer), `auto` (chat where the tokenizer has one), or a whole one.
        anchor: begins the answer.
        bos: whether rows begin with BOS; default: as template and tokenizer do.
        dtype: of its weights, `float32` or `bfloat16`, say; default: as saved.
        device: default: the CPU.

    Raises:
        ValueError: no such folder, a codec, an unknown template or dtype, no chat template where one is asked for.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = model_path("receivers", path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    found = template if isinstance(template, Template) else _template(tokenizer, template, anchor, bos)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=_dtype(dtype))
    return Receiver(model if device is None else model.to(device), tokenizer, found)


def _template(tokenizer: Any, kind: str, anchor: str, bos: bool | None) -> Template:
    if kind not in TEMPLATES:
        raise ValueError(f"template must be one of {', '.join(TEMPLATES)}, got {kind!r}.")
    if kind == "plain" or (kind == "auto" and not tokenizer.chat_template):
        return Template(bos=bos, anchor=anchor)
    chat = Template.of_chat(tokenizer, anchor)
    return chat if bos is None else Template(bos, chat.before, chat.after, chat.anchor)


def _dtype(name: str | None) -> Any:
    import torch

    if name is None or name == "auto":
        return "auto"
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {name!r}.")
    return found


def load_wire(
    directory: str, receivers: Mapping[str, str], device: str | None = None, dtype: str | None = None
) -> LatentForgeWire:
    """A saved wire with the encoder's tokenizer, every receiver behind its bridge, and their adapters.

    Args:
        directory: folder or Hub id, of [`save_wire`].
        receivers: name of each bridge -> folder or Hub id of its language model.
        device: of all; default: cuda where there is one, else cpu.
        dtype: of the receivers; default: as saved.

    Raises:
        ValueError: a receiver that the wire has no bridge for, or none for one of its bridges; a model of another
            shape.
    """
    wire, folder = load_encoder(directory)
    known = ", ".join(wire.bridges) or "none"
    unknown = [name for name in receivers if name not in wire.bridges]
    if unknown:
        raise ValueError(f"{directory} has no bridge to {', '.join(unknown)}: it has {known}.")
    missing = [name for name in wire.bridges if name not in receivers]
    if missing:
        raise ValueError(
            f"{directory} has bridges to {known}, and nothing says where {', '.join(missing)} lies: add name=folder "
            "or name=hub_id to the receivers."
        )
    device = choose_device(device)
    for name, path in receivers.items():
        attach_receiver(wire, folder, name, path, dtype)
    for receiver in wire.receivers.values():
        receiver.model.to(device)
    return wire.to(device).eval()


def load_encoder(directory: str) -> tuple[LatentForgeWire, Path]:
    """A saved wire with the encoder's tokenizer and without receivers, and the folder it lies in.

    Raises:
        ValueError: there is no wire.
    """
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    path = Path(model_path("wire", directory))
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        path = Path(snapshot_download(directory))
    if not (path / "config.json").exists():
        raise ValueError(f"{directory} holds no model: there is no config.json.")
    model_type = AutoConfig.from_pretrained(path).model_type
    if model_type not in ("latentforge_wire", "latentforge_idea"):
        raise ValueError(f"{directory} holds a {model_type} model, no wire: train one with train_wire.py.")
    wire: LatentForgeWire = AutoModel.from_pretrained(path)
    if wire.config.source == "tokens":
        wire.attach_tokenizer(AutoTokenizer.from_pretrained(path))
    return wire, path


def attach_receiver(wire: LatentForgeWire, folder: str | Path, name: str, path: str, dtype: str | None = None) -> None:
    """Put a language model back behind its bridge, with the adapter that lies in the wire's folder."""
    receiver = load_receiver(path, template=wire.template(name), dtype=dtype)
    wire.attach(name, receiver)
    adapter = Path(folder) / ADAPTERS / name
    if adapter.is_dir():
        load_adapter(receiver, adapter)


def save_wire(wire: LatentForgeWire, directory: str | Path) -> None:
    """Weights, config, tokenizer and adapters; receivers themselves are not copied."""
    wire.save_pretrained(directory)
    save_beside(wire, directory)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """What a wire of bytes does by itself, for tools that ask for a tokenizer: a text's UTF-8 bytes are its ids."""
    backend = Tokenizer(models.BPE(vocab={mark: byte for byte, mark in bytes_to_unicode().items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", padding_side="right")
    assert tokenizer.pad_token_id == NUM_BYTES
    return tokenizer


def save_beside(wire: LatentForgeWire, directory: str | Path) -> None:
    """What [`save_wire`] writes beside the weights."""
    tokenizer = byte_tokenizer() if wire.config.source == "bytes" else wire.tokenizer
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    for name, receiver in wire.receivers.items():
        if has_adapter(receiver):
            save_adapter(receiver, Path(directory) / ADAPTERS / name)
