"""Configuration of the student: a causal backbone over patches, a head (hidden state -> latent) and a decoder (latent
-> K tokens)."""

import copy
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from .configuration_autoencoder import LatentForgeAutoencoderConfig, ReadsInWords, check_fields
from .token_lookup import LARGEST_ENDING


@strict
class LatentHeadConfig(ReadsInWords, PreTrainedConfig):
    """The head: what is known before a patch -> the patch's latent.

    Args:
        head_type: `regression` (one vector), `energy` (noise in, energy score as loss; CALM, arXiv 2510.27688,
            section 3.2), or `aligned` (the noise is a number per token of the patch, its place among a teacher's
            choices; arXiv 2512.21323; for parallel decoders).
        num_layers: residual MLP blocks.
        intermediate_size: width inside a block; default twice the backbone's hidden size.
        noise_size: numbers of uniform noise that an energy head reads.
        num_samples: latents drawn per patch for the energy score, at least 2.
        num_targets: draws from the codec's posterior per patch for the energy score.
        exponent: power of the distance in the energy score; a proper score for 0 < exponent < 2.
        num_frequencies: octaves of sine and cosine in which an aligned head reads each number.
    """

    model_type = "latentforge_head"
    base_config_key = "head_config"

    head_type: Literal["regression", "energy", "aligned"] = "regression"
    num_layers: int = 1
    intermediate_size: int | None = None
    noise_size: int = 64
    num_samples: int = 8
    num_targets: int = 16
    exponent: int | float = 1.0
    num_frequencies: int = 6

    def __post_init__(self, **kwargs):
        check_fields(kwargs, self.__dataclass_fields__)
        super().__post_init__(**kwargs)

    def validate_head(self):
        if self.num_layers < 0:
            raise ValueError(f"`head_config.num_layers` must not be negative, got {self.num_layers}.")
        if self.head_type == "energy":
            if not 0 < self.exponent < 2:
                raise ValueError(
                    f"`head_config.exponent` ({self.exponent}) must lie between 0 and 2: outside, "
                    "the energy score is not strictly proper."
                )
            if self.num_samples < 2 or self.num_targets < 1 or self.noise_size < 1:
                raise ValueError(
                    "An energy head needs `num_samples` >= 2, `num_targets` >= 1 and `noise_size` >= 1, got "
                    f"{self.num_samples}, {self.num_targets} and {self.noise_size}."
                )
        if self.num_frequencies < 0:
            raise ValueError(f"`head_config.num_frequencies` must not be negative, got {self.num_frequencies}.")


def _build_backbone_config(config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        config = copy.deepcopy(config)
        # generation would end texts at the backbone's ids where the codec has none
        config.bos_token_id = config.eos_token_id = config.pad_token_id = None
        return config
    fields = dict(config or {})
    model_type = fields.pop("model_type", "llama")
    fields |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    try:
        built = AutoConfig.for_model(model_type, **fields)
    except ValueError as error:
        raise ValueError(
            f"`backbone_config.model_type` {model_type!r} is no decoder that this transformers knows: {error}"
        ) from error
    known = {*built.__dataclass_fields__, *built.attribute_map}
    # checkpoints of the field carry more than their family's fields
    check_fields({name: value for name, value in fields.items() if name not in known}, known, of_others=True)
    return built


@strict
class LatentForgeConfig(ReadsInWords, PreTrainedConfig):
    """Shape of [`LatentForgeForCausalLM`].

    Args:
        backbone_config: any decoder configuration that `AutoModel.from_config` builds. Its positions are patches, its
            `vocab_size` unused.
        autoencoder_config: the codec, whose weights travel inside the checkpoint, frozen. `patch_size`, `latent_size`
            and `vocab_size` are its.
        head_config: see [`LatentHeadConfig`].
        input_mode: what a patch looks like to the backbone: its `tokens` (embeddings through an MLP) or its `latents`
            (a linear map of the codec's mean).
        decoder_type: `autoregressive` (token by token inside the patch, exact likelihood) or `parallel` (the codec's K
            softmaxes at once).
        train_decoder: a parallel decoder that is the student's own trained copy of the codec's.
        num_decoder_layers, decoder_hidden_size, decoder_intermediate_size, decoder_num_heads: shape of the
            autoregressive decoder; sizes default to the backbone's hidden size, 8/3 of the decoder's width, and one
            head per 64.
        decoder_window: W, tokens that a decoder layer attends to, the current one included; default `2 * patch_size`.
            With the convolution's S - 1 before the first of them, L layers see L * (W - 1) + S tokens.
        decoder_conv_size: S, taps of the causal convolution over the decoder's inputs, the current token's included;
            1: no mixing, a factor per channel only.
        decoder_memory: `none`, or `patches`: one decoder layer also attends to all conditions up to its own patch's.
        decoder_lookup: longest ending of the text (1, 2, 4, .. tokens up to this) that is looked up in the text before
            it: the decoder reads which token followed there last. 0: none; at most 64.
        embedding_multiplier: what a token's embedding is multiplied by before it enters its patch: small weights under
            AdamW learn faster (measured, docs/experiments.md). Default 16, or 1 for a backbone that multiplies its
            inputs itself (Granite). `from_teacher` takes 1: the teacher's embeddings have their size.
        decoder_output_size: width of the output matrix; default, the decoder's width. Smaller makes the output
            low-rank.
        tie_word_embeddings: the autoregressive decoder's output matrix is its embedding matrix (needs the two widths
            equal).

    Raises:
        ValueError: parts that do not fit each other, with both values; a misspelt field.
    """

    model_type = "latentforge"
    keys_to_ignore_at_inference = ["past_key_values", "loss_components"]
    # built in __post_init__: transformers changed how it builds nested configs between 5.19 and 5.23
    sub_configs = {
        "backbone_config": AutoConfig,
        "autoencoder_config": LatentForgeAutoencoderConfig,
        "head_config": LatentHeadConfig,
    }

    backbone_config: dict | PreTrainedConfig | None = None
    autoencoder_config: dict | PreTrainedConfig | None = None
    head_config: dict | PreTrainedConfig | None = None
    input_mode: Literal["tokens", "latents"] = "tokens"
    decoder_type: Literal["autoregressive", "parallel"] = "autoregressive"
    train_decoder: bool = False
    num_decoder_layers: int = 1
    decoder_hidden_size: int | None = None
    decoder_intermediate_size: int | None = None
    decoder_num_heads: int | None = None
    decoder_window: int | None = None
    decoder_conv_size: int = 4
    decoder_memory: Literal["none", "patches"] = "patches"
    decoder_lookup: int = 16
    decoder_output_size: int | None = None
    embedding_multiplier: float | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    # tied, the residual path predicts the current token again, which costs 0.5 nats after 90 steps (experiments.md)
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        self.backbone_config = _build_backbone_config(self.backbone_config)
        parts = {
            "head_config": LatentHeadConfig,
            "backbone_config": type(self.backbone_config),
            "autoencoder_config": LatentForgeAutoencoderConfig,
        }
        of_parts = {name: set(part.__dataclass_fields__) for name, part in parts.items()}
        check_fields(kwargs, self.__dataclass_fields__, of_parts)
        for name, kind in (("autoencoder_config", LatentForgeAutoencoderConfig), ("head_config", LatentHeadConfig)):
            value = getattr(self, name)
            # a copy: sizes that follow from this backbone must not stay in a config that another student shares
            filled = kind(**(value or {})) if value is None or isinstance(value, dict) else copy.deepcopy(value)
            setattr(self, name, filled)
        super().__post_init__(**kwargs)
        for part in (self.backbone_config, self.autoencoder_config, self.head_config):
            part._name_or_path = ""  # a folder of the machine that trained, which would travel with the weights
        if self.decoder_hidden_size is None:
            self.decoder_hidden_size = self.backbone_config.hidden_size
        if self.decoder_intermediate_size is None:
            self.decoder_intermediate_size = -(-8 * self.decoder_hidden_size // (3 * 32)) * 32
        if self.decoder_num_heads is None:
            self.decoder_num_heads = max(1, self.decoder_hidden_size // 64)
        if self.decoder_window is None:
            self.decoder_window = 2 * self.patch_size
        if self.decoder_output_size is None:
            self.decoder_output_size = self.decoder_hidden_size
        if self.embedding_multiplier is None:
            scaled = getattr(self.backbone_config, "embedding_multiplier", 1.0) != 1.0
            self.embedding_multiplier = 1.0 if scaled else 16.0
        if self.head_config.intermediate_size is None:
            self.head_config.intermediate_size = 2 * self.backbone_config.hidden_size
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(self.autoencoder_config, name))

    def validate_decoder(self):
        if self.decoder_type == "autoregressive" and self.head_config.head_type == "aligned":
            raise ValueError(
                "`head_config.head_type='aligned'` chooses the tokens of a whole patch, and an autoregressive decoder "
                "chooses them one by one: set `decoder_type='parallel'`, or take a regression head."
            )
        if self.decoder_type == "autoregressive" and self.decoder_hidden_size is not None:
            if self.train_decoder:
                raise ValueError(
                    "`train_decoder` is for `decoder_type='parallel'`: an autoregressive decoder is "
                    "always the student's own."
                )
            if self.num_decoder_layers < 1:
                raise ValueError(f"`num_decoder_layers` must be at least 1, got {self.num_decoder_layers}.")
            for name in (
                "decoder_hidden_size",
                "decoder_num_heads",
                "decoder_intermediate_size",
                "decoder_output_size",
            ):
                if (getattr(self, name) or 0) < 1:
                    raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
            if self.decoder_hidden_size % (2 * self.decoder_num_heads):
                raise ValueError(
                    f"`decoder_hidden_size` ({self.decoder_hidden_size}) must be a multiple of twice "
                    f"`decoder_num_heads` ({self.decoder_num_heads}): heads are of equal, even width."
                )
            if self.decoder_window < self.patch_size:
                raise ValueError(
                    f"`decoder_window` ({self.decoder_window}) must hold at least the patch's own tokens: "
                    f"`patch_size` is {self.patch_size}."
                )
            if self.decoder_conv_size < 1:
                raise ValueError(f"`decoder_conv_size` must be at least 1 (no mixing), got {self.decoder_conv_size}.")
            if not 0 <= self.decoder_lookup <= LARGEST_ENDING:
                raise ValueError(
                    f"`decoder_lookup` must lie in 0 (no lookup) to {LARGEST_ENDING}, got {self.decoder_lookup}."
                )
            if self.tie_word_embeddings and self.decoder_output_size != self.decoder_hidden_size:
                raise ValueError(
                    f"`tie_word_embeddings` needs `decoder_output_size` ({self.decoder_output_size}) equal to "
                    f"`decoder_hidden_size` ({self.decoder_hidden_size}): set it to False for a low-rank output."
                )

    def get_text_config(self, decoder=None, encoder=None):
        # caches, masks and tensor parallelism go through this: hand them the decoder that owns the attention cache
        return self.backbone_config

    @property
    def patch_size(self) -> int:
        return self.autoencoder_config.patch_size

    @property
    def latent_size(self) -> int:
        return self.autoencoder_config.latent_size

    @property
    def vocab_size(self) -> int:
        return self.autoencoder_config.vocab_size


__all__ = ["LatentForgeConfig", "LatentHeadConfig"]
