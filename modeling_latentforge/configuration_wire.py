"""Configuration of the wire: text -> latents -> any frozen language model."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_autoencoder import ReadsInWords, check_fields
from .latent_bridge import MODES
from .latent_packet import KINDS


NUM_BYTES = 256  # the ids of a text without a tokenizer; the next one pads


@strict
class LatentForgeWireConfig(ReadsInWords, PreTrainedConfig):
    """Shape of [`LatentForgeWire`].

    Args:
        encoder_config: any HF model's that gives `last_hidden_state`; default a small ModernBERT.
        source: `tokens` of a tokenizer that is saved beside the model, or UTF-8 `bytes`.
        pooling: `ratio` (a latent for every `ratio` tokens), `queries` (`num_latents` learned ones, of which the first
            few serve as well), `mean` (`num_latents` means, of equal parts of the text) or `patches` (of `ratio`
            tokens, in order).
        num_latents: M of `queries` and `mean`; of the other poolings, the slots that have a size of their own.
        ratio: tokens per latent.
        latent_size: D.
        num_pooling_layers: blocks in which the latents look at the text.
        num_refiner_layers: blocks in which the latents look at each other; the first few are then no longer the same
            whoever follows.
        quantizer: `none`, `fp16`, `int8`, `int4` or `fsq`.
        quantizer_levels: of FSQ's dimensions.
        bridges: receiver's name -> what its bridge was built with: the receiver's shape (`hidden_size`, `num_layers`,
            `num_key_value_heads`, `head_dim`, `embed_rms`), `mode` and sizes, and the `template` it learned for.
            [`LatentForgeWire.add_receiver`] fills it.

    Raises:
        ValueError: a misspelt field, a size below 1, FSQ without levels, levels outside 2 to 65535, a bridge that is
            no object.
    """

    model_type = "latentforge_wire"
    sub_configs = {"encoder_config": AutoConfig}

    encoder_config: dict | PreTrainedConfig | None = None
    source: Literal["tokens", "bytes"] = "tokens"
    pooling: Literal["ratio", "queries", "mean", "patches"] = "ratio"
    num_latents: int = 32
    ratio: int = 4
    latent_size: int = 256
    num_pooling_layers: int = 1
    num_refiner_layers: int = 0
    quantizer: str = "none"
    quantizer_levels: list[int] | tuple[int, ...] = (5,) * 16
    bridges: dict | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02

    def __post_init__(self, **kwargs):
        check_fields(kwargs, self.__dataclass_fields__)
        given = self.encoder_config
        if given is None or isinstance(given, dict):
            fields = dict(given or {})
            model_type = fields.pop("model_type", "modernbert")
            if self.source == "bytes":
                fields = {"vocab_size": NUM_BYTES + 1, "pad_token_id": NUM_BYTES, **fields}
            self.encoder_config = AutoConfig.for_model(model_type, **fields)
        self.bridges = dict(self.bridges or {})
        super().__post_init__(**kwargs)
        self.encoder_config._name_or_path = ""  # a folder of the machine that trained

    def validate_wire(self):
        for name in ("num_latents", "ratio", "latent_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("num_pooling_layers", "num_refiner_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.quantizer not in KINDS:
            raise ValueError(f"`quantizer` must be one of {', '.join(KINDS)}, got {self.quantizer!r}.")
        if self.quantizer == "fsq" and not self.quantizer_levels:
            raise ValueError("`quantizer='fsq'` needs `quantizer_levels`, and there are none.")
        wrong = [levels for levels in self.quantizer_levels if not 2 <= levels < 2**16]
        if wrong:
            raise ValueError(f"`quantizer_levels` must lie in 2 to 65535, got {wrong[0]}.")
        for name, bridge in (self.bridges or {}).items():
            if not isinstance(bridge, dict):
                raise ValueError(f"The bridge {name!r} must be an object with its sizes, got {bridge!r:.60}.")
            if bridge.get("mode", "soft") not in MODES:
                raise ValueError(
                    f"The bridge {name!r} has the mode {bridge['mode']!r}: take one of {', '.join(MODES)}."
                )


__all__ = ["LatentForgeWireConfig"]
