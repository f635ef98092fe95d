"""New wires: an encoder from a pretrained model's layers, or from sizes."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from modeling_latentforge import LatentForgeWire
from modeling_latentforge.latent_quantizer import LatentQuantizer


# ids that a new encoder has no use for: a message is its text alone
NO_SPECIAL_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"))


def pretrained_backbone(path: str, num_layers: int | None = None) -> PreTrainedModel:
    """The first layers of a pretrained model, in float32, which see all of the text where they used to see its past
    only.

    Args:
        path: folder or Hub id of any model that gives `last_hidden_state`.
        num_layers: default: all.

    Raises:
        ValueError: more layers than it has.
    """
    config = AutoConfig.from_pretrained(path).get_text_config()
    count = config.num_hidden_layers
    if num_layers is not None:
        if not 1 <= num_layers <= count:
            raise ValueError(f"encoder_layers must lie in 1 to {count}, what {path} has, got {num_layers}.")
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:num_layers]
    config.is_causal = False
    config.use_cache = False
    return AutoModel.from_pretrained(path, config=config, dtype=torch.float32)


def new_encoder_config(
    vocab_size: int | None,
    pad_token_id: int | None,
    hidden_size: int = 256,
    num_layers: int = 2,
    num_heads: int | None = None,
    intermediate_size: int | None = None,
    max_positions: int = 8192,
) -> PreTrainedConfig | dict[str, Any]:
    """A small ModernBERT; of bytes where `vocab_size` is None.

    Args:
        num_heads: default: one per 64 of the width.
        intermediate_size: default: 3/2 of the width, of which its gated MLP makes two.
        max_positions: longest text, in tokens or bytes.

    Raises:
        ValueError: a size below 1, or sizes that do not divide.
    """
    heads = max(1, hidden_size // 64) if num_heads is None else num_heads
    sizes = {
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "intermediate_size": 3 * hidden_size // 2 if intermediate_size is None else intermediate_size,
        "max_position_embeddings": max_positions,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"The encoder's {name} must be at least 1, got {size}.")
    if hidden_size % heads or hidden_size // heads % 2:
        raise ValueError(
            f"encoder_hidden_size ({hidden_size}) must give each of encoder_heads ({heads}) an even width: change "
            "either."
        )
    ids = {} if vocab_size is None else {"vocab_size": vocab_size, "pad_token_id": pad_token_id}
    return {"model_type": "modernbert", **sizes, **NO_SPECIAL_IDS, **ids}


def build_wire(
    backbone: PreTrainedModel | None,
    tokenizer: Any,
    model_class: type[LatentForgeWire] = LatentForgeWire,
    **config: Any,
) -> Any:
    """A wire without receivers.

    Args:
        backbone: a pretrained one, whose weights the encoder starts from; None: new weights, of `encoder_config`.
        tokenizer: the encoder's; None: it reads bytes.
        model_class: of the wire, or an idea model's.
        config: fields of its configuration.
    """
    if backbone is not None:
        config["encoder_config"] = backbone.config.to_dict()
    wire = model_class(model_class.config_class(source="bytes" if tokenizer is None else "tokens", **config))
    if backbone is not None:
        wire.encoder.backbone.load_state_dict(backbone.state_dict())
    if tokenizer is not None:
        wire.attach_tokenizer(tokenizer)
    return wire


@torch.no_grad()
def sees_ahead(backbone: PreTrainedModel) -> bool:
    """Whether a text's end changes what is made of its beginning: not every architecture can do without its causal
    mask."""
    was_training = backbone.training
    backbone.eval()
    ids = torch.zeros(2, 3, dtype=torch.long, device=backbone.device)
    ids[1, -1] = 1
    states = backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    backbone.train(was_training)
    return not torch.equal(states[0, 0], states[1, 0])


def replace_quantizer(wire: LatentForgeWire, kind: str, levels: Sequence[int] | None = None) -> None:
    """Give a trained wire another quantizer, in place. FSQ's two maps are new, and are to be trained with the rest;
    a wire that has this quantizer already keeps it as it was trained.

    Args:
        kind: see [`LatentQuantizer`].
        levels: of FSQ's dimensions; default: the config's.

    Raises:
        ValueError: an unknown kind, or too few levels.
    """
    config = wire.config
    levels = config.quantizer_levels if levels is None else levels
    quantizer = LatentQuantizer(kind, config.latent_size, levels if kind == "fsq" else ())
    if (quantizer.kind, quantizer.levels) == (wire.quantizer.kind, wire.quantizer.levels):
        return
    wire.quantizer = quantizer.to(wire.device, wire.dtype)
    config.quantizer, config.quantizer_levels = kind, tuple(levels)
