"""The student: a causal language model that thinks in patches.

B batch, T tokens, K tokens per patch, N complete patches, C = N + 1 conditions, H backbone width, D latent, V
vocabulary.

    input_ids (B, T) -> patches (B, N, K) -> embeddings (B, N, H) -> backbone -> states (B, N, H)    once per patch
    conditions (B, C, H) = learned start, states: what is known before each patch
    conditions -> head -> latents (B, C, D)                                                          once per patch
    latents, tokens -> decoder -> logits (B, T, V), position t predicts token t + 1                  once per token
    patches -> codec (frozen) -> latent targets (B, N, D)                                            where a loss asks

A parallel decoder makes the K logits of a patch at once, from the latent alone.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache, StaticLayer
from transformers.utils import ModelOutput, logging

from .cache_latentforge import LatentForgeCache
from .configuration_latentforge import LatentForgeConfig, LatentHeadConfig
from .generation_latentforge import PATCH_OPTIONS, LatentGenerationMixin
from .latent_sampling import SAMPLERS, LazyDraws, PatchSampling
from .modeling_autoencoder import (
    CompleteCheckpointMixin,
    LatentForgeAutoencoder,
    LatentForgeDecoder,
    check_mask,
    check_token_ids,
    project_few,
)
from .modeling_latent_heads import HEADS
from .modeling_patch_decoder import LatentForgePatchDecoder, LatentForgeShortConvolution, compact
from .modeling_token_loss import SparseTargets, TokenLoss, token_loss
from .token_lookup import begin_history, extend_history


logger = logging.get_logger(__name__)

# in logits: what exp() of it leaves is 0 in every dtype, and fp16 still holds it
SURE = 2e4

LOSS_PARTS = ("ce", "kd", "mse", "energy")

# Keywords that callers of any causal LM may pass, and that change nothing here: positions follow from the mask.
HARMLESS_KEYWORDS = {"return_dict", "position_ids", "cache_position", "token_type_ids"}


@dataclass
class LatentForgeOutput(ModelOutput):
    """`loss` is the weighted sum of `loss_components`, which are detached and unweighted; `logits` `(B, T, V)`;
    `codec_encoding` what a loss asked the codec, for another `forward` with these rows."""

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    past_key_values: Cache | None = None
    loss_components: dict | None = None
    codec_encoding: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass
class Grid:
    """Rows laid on the patch grid.

    Attributes:
        input_ids, mask: `(B, L)`; `mask` is None where all is real text.
        shift: columns that precede a row's first grid place: `(B,)`, or an int for all rows, negative where the grid
            starts before the row.
    """

    input_ids: torch.LongTensor
    mask: torch.BoolTensor | None
    shift: torch.Tensor | int


def _kept(x: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions of `x (B, T, ...)` that get logits."""
    return x[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


class LatentForgePatchEmbedding(nn.Module):
    """K tokens -> one backbone input: a linear map of the K embeddings plus a gated MLP on them."""

    def __init__(self, config: LatentForgeConfig):
        super().__init__()
        hidden_size = config.backbone_config.hidden_size
        self.patch_size, self.multiplier = config.patch_size, config.embedding_multiplier
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden_size)
        self.mask_embedding = nn.Parameter(torch.zeros(hidden_size))
        self.projection = nn.Linear(config.patch_size * hidden_size, hidden_size, bias=False)
        self.norm = nn.RMSNorm(config.patch_size * hidden_size, eps=config.rms_norm_eps)
        self.gate_up_proj = nn.Linear(config.patch_size * hidden_size, 2 * hidden_size, bias=False)
        self.down_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, input_ids: torch.LongTensor, mask: torch.BoolTensor | None) -> torch.Tensor:
        """`(B, N, K)` ids -> `(B, N, H)`; False in `mask (B, N, K)` reads as the mask embedding."""
        embeds = self.embed_tokens(input_ids)
        if mask is not None:
            embeds = torch.where(mask[..., None], embeds, self.mask_embedding.to(embeds.dtype))
        embeds = embeds.flatten(-2) * self.multiplier  # (B, N, K * H)
        gate, up = self.gate_up_proj(self.norm(embeds)).chunk(2, dim=-1)
        return self.projection(embeds) + self.down_proj(nn.functional.silu(gate) * up)

    @torch.no_grad()
    def become_mean_of(self, token_embeddings: torch.Tensor) -> None:
        """Start from a language model's `token_embeddings (>= V, H)`: a patch is the mean of its tokens' (PatchTrain,
        arXiv 2407.12665)."""
        self.embed_tokens.weight.copy_(token_embeddings[: self.embed_tokens.num_embeddings] / self.multiplier)
        self.mask_embedding.copy_(self.embed_tokens.weight.mean(0))
        eye = torch.eye(self.projection.out_features, dtype=self.projection.weight.dtype) / self.patch_size
        self.projection.weight.copy_(eye.repeat(1, self.patch_size))
        self.down_proj.weight.zero_()


class LatentForgePreTrainedModel(CompleteCheckpointMixin, PreTrainedModel):
    config: LatentForgeConfig
    config_class = LatentForgeConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _came_later = ("decoder.lookup.", "pass `decoder_lookup=0` to `from_pretrained`, or set it in config.json")
    # fewer bits are for the backbone, where most weights are: token losses read the output matrix as it is, and the
    # codec is one for all students
    _keep_unquantized = (
        "model.patch_embedding",
        "model.latent_projection",
        "head",
        "decoder",
        "lm_head",
        "autoencoder",
    )

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As in transformers, and as a codec's: nothing may be missing.

        Raises:
            ValueError: see [`LatentForgeAutoencoder`]; a `distributed_config` whose `tp_size` cuts a head of attention
                in two.
        """
        loaded = super().from_pretrained(*args, **kwargs)
        size = getattr(kwargs.get("distributed_config"), "tp_size", None) or 1
        config = (loaded[0] if isinstance(loaded, tuple) else loaded).config.backbone_config
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, name, None)
            if heads is not None and heads % size:
                raise ValueError(
                    f"tp_size ({size}) must divide {name} of the backbone ({heads}): a process has whole heads."
                )
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, (LatentForgePatchEmbedding, LatentForgePatchDecoder)):
            init.normal_(module.mask_embedding, std=std)
        elif isinstance(module, LatentForgeShortConvolution):
            bound = module.size**-0.5 if module.size > 1 else 0.0
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, LatentForgeModel):
            init.normal_(module.start, std=std)


class LatentForgeModel(LatentForgePreTrainedModel):
    """Patches -> conditions: what is known before each patch."""

    _beside_me = ("head.", "decoder.", "lm_head.", "autoencoder.")

    def __init__(self, config: LatentForgeConfig):
        super().__init__(config)
        hidden_size = config.backbone_config.hidden_size
        if config.input_mode == "tokens":
            self.patch_embedding = LatentForgePatchEmbedding(config)
        else:
            self.latent_projection = nn.Linear(config.latent_size, hidden_size)
        self.start = nn.Parameter(torch.zeros(hidden_size))  # stands for the state before the first patch
        # a dtype stored inside backbone_config would win over the model's: build in the ambient one
        self.backbone = AutoModel.from_config(config.backbone_config, dtype=torch.get_default_dtype())
        if any(getattr(module, "is_causal", True) is False for module in self.backbone.modules()):
            raise ValueError(
                f"A {config.backbone_config.model_type} backbone that reads in both directions would see the patches "
                "that it is to predict: take a decoder's configuration (`is_decoder=True` where there is one)."
            )
        # never used, and a parameter without gradient breaks DDP
        self.backbone.set_input_embeddings(None)
        (self.backbone.tp_plan or {}).pop("embed_tokens", None)
        # a table of learned positions ends; other positions go on, at most with worse text
        self.has_position_table = any(isinstance(module, nn.Embedding) for module in self.backbone.modules())
        self.post_init()

    def forward(
        self,
        patch_embeds: torch.Tensor,
        patch_mask: torch.Tensor | None = None,
        positions: torch.LongTensor | None = None,
        cache: Cache | None = None,
        use_cache: bool = False,
    ) -> torch.Tensor:
        """`(B, N, H)` embeddings of new patches -> their states `(B, N, H)`. `patch_mask (B, past + N)` and `positions
        (B, N)` as in any decoder."""
        return self.backbone(
            inputs_embeds=patch_embeds,
            attention_mask=patch_mask,
            position_ids=positions,
            past_key_values=cache if use_cache else None,
            use_cache=use_cache,
        ).last_hidden_state


class LatentForgeForCausalLM(LatentForgePreTrainedModel, LatentGenerationMixin):
    """Causal LM whose backbone runs once per K tokens; see the drawing at the top of the file."""

    def __init__(self, config: LatentForgeConfig):
        super().__init__(config)
        codec = config.autoencoder_config
        self.model = LatentForgeModel(config)
        self.head = HEADS[config.head_config.head_type](config)
        self.autoencoder = LatentForgeAutoencoder(codec)
        if config.decoder_type == "autoregressive":
            self.decoder = LatentForgePatchDecoder(config)
            self.lm_head = nn.Linear(config.decoder_output_size, codec.vocab_size, bias=False)
            if config.tie_word_embeddings:
                self._tied_weights_keys = {"lm_head.weight": "decoder.embed_tokens.weight"}
        elif config.train_decoder:
            self.decoder = LatentForgeDecoder(codec)
            self.lm_head = nn.Linear(codec.hidden_size, codec.vocab_size, bias=False)
        self.autoencoder.requires_grad_(False)
        self.post_init()

    @property
    def is_aligned(self) -> bool:
        """Whether the head's noise is the choice of tokens itself."""
        return self.config.head_config.head_type == "aligned"

    # -- construction

    @classmethod
    def from_autoencoder(
        cls, autoencoder: LatentForgeAutoencoder, backbone_config: PreTrainedConfig | dict, **config_kwargs
    ) -> "LatentForgeForCausalLM":
        """A new student around a trained codec, which is copied in and frozen. `config_kwargs` are fields of
        [`LatentForgeConfig`].

        Raises:
            TypeError: one that is none; a config read from a file keeps what it does not know, a call means it.
        """
        known = {*LatentForgeConfig.__dataclass_fields__, "attn_implementation"}
        unknown = [name for name in config_kwargs if name not in known]
        if unknown:
            of_head = [name for name in unknown if name in LatentHeadConfig.__dataclass_fields__]
            hint = f" `{of_head[0]}` is a field of `head_config`: pass head_config={{...}}." if of_head else ""
            raise TypeError(f"LatentForgeConfig has no field {', '.join(map(repr, unknown))}.{hint}")
        config = LatentForgeConfig(
            backbone_config=copy.deepcopy(backbone_config),
            autoencoder_config=copy.deepcopy(autoencoder.config),
            **config_kwargs,
        )
        model = cls(config)
        model.autoencoder.load_state_dict(autoencoder.state_dict())
        if config.decoder_type == "parallel" and config.train_decoder:
            model.decoder.load_state_dict(autoencoder.decoder.state_dict())
            with torch.no_grad():
                model.lm_head.weight.copy_(autoencoder.lm_head.weight)
        return model.train(False)

    @classmethod
    def from_teacher(
        cls,
        teacher: PreTrainedModel | str,
        autoencoder: LatentForgeAutoencoder,
        layers: list[int] | None = None,
        **config_kwargs: Any,
    ) -> "LatentForgeForCausalLM":
        """A student whose backbone starts as a pretrained language model's.

        Args:
            teacher: a causal LM, or the id or path of one.
            autoencoder: the codec; its ids must be the teacher's.
            layers: which of the teacher's layers to keep, in order; default all.
            config_kwargs: fields of [`LatentForgeConfig`].

        Layers, norms and token embeddings are copied; a patch starts as the mean of its tokens' embeddings. An
        autoregressive decoder as wide as the teacher also starts from the teacher's token embeddings and output
        matrix.

        Raises:
            ValueError: a codec with more ids than the teacher, or a layer that the teacher does not have.
        """
        if not isinstance(teacher, PreTrainedModel):
            teacher = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        base = teacher.base_model
        num_embeddings = teacher.get_input_embeddings().weight.shape[0]
        if autoencoder.config.vocab_size > num_embeddings:
            raise ValueError(
                f"The codec has {autoencoder.config.vocab_size} token ids, the teacher {num_embeddings}: "
                "train the codec with the teacher's tokenizer."
            )
        num_layers = base.config.num_hidden_layers
        layers = list(range(num_layers)) if layers is None else list(layers)
        if not layers or len(set(layers)) < len(layers) or any(not 0 <= layer < num_layers for layer in layers):
            raise ValueError(
                f"`layers` must name some of the teacher's layers 0 to {num_layers - 1}, each once, got {layers}."
            )

        backbone_config = copy.deepcopy(base.config)
        backbone_config.num_hidden_layers = len(layers)
        if getattr(backbone_config, "layer_types", None) is not None:
            backbone_config.layer_types = [base.config.layer_types[layer] for layer in layers]
        config_kwargs.setdefault("embedding_multiplier", 1.0)
        config_kwargs.setdefault("tie_word_embeddings", bool(getattr(teacher.config, "tie_word_embeddings", False)))
        model = cls.from_autoencoder(autoencoder, backbone_config, **config_kwargs)

        (stack,) = [
            name
            for name, module in base.named_modules()
            if isinstance(module, nn.ModuleList) and len(module) == num_layers
        ][:1]
        new_index = {old: new for new, old in enumerate(layers)}
        state = {}
        for name, tensor in base.state_dict().items():
            if name.startswith(f"{stack}."):
                old, rest = name[len(stack) + 1 :].split(".", 1)
                if int(old) not in new_index:
                    continue
                name = f"{stack}.{new_index[int(old)]}.{rest}"
            state[name] = tensor
        target = model.model.backbone
        missing = set(target.state_dict()) - set(state)
        if missing:
            raise ValueError(
                f"{type(base).__name__} has no weights named {sorted(missing)[:4]}: its layers cannot be copied."
            )
        target.load_state_dict({name: tensor for name, tensor in state.items() if name in target.state_dict()})
        if model.config.input_mode == "tokens":
            # through the module: some models scale what they look up
            ids = torch.arange(autoencoder.config.vocab_size, device=teacher.device)
            with torch.no_grad():
                model.model.patch_embedding.become_mean_of(teacher.get_input_embeddings()(ids))
        if (
            model.config.decoder_type == "autoregressive"
            and model.config.decoder_hidden_size == base.config.hidden_size
        ):
            vocab_size, output = model.config.vocab_size, teacher.get_output_embeddings().weight
            with torch.no_grad():
                model.decoder.embed_tokens.weight.copy_(teacher.get_input_embeddings().weight[:vocab_size])
                if model.config.decoder_output_size == output.shape[1]:
                    # Granite divides its logits; a tied matrix reads tokens too and must stay as it is
                    tied = model.lm_head.weight is model.decoder.embed_tokens.weight
                    scaling = 1.0 if tied else getattr(teacher.config, "logits_scaling", 1.0)
                    model.lm_head.weight.copy_(output[:vocab_size] / scaling)
        return model

    def train(self, mode: bool = True) -> "LatentForgeForCausalLM":
        super().train(mode)
        # `from_pretrained` makes every float parameter trainable again and then calls `eval()`: this is the place that
        # always runs last
        if hasattr(self, "autoencoder"):
            self.autoencoder.eval()
            self.autoencoder.requires_grad_(False)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return (
            self.model.patch_embedding.embed_tokens
            if self.config.input_mode == "tokens"
            else self.autoencoder.embed_tokens
        )

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head if hasattr(self, "lm_head") else self.autoencoder.lm_head

    def resize_token_embeddings(self, *args, **kwargs):
        raise ValueError(
            "The vocabulary is the codec's: train a codec on the new tokenizer instead of resizing the student."
        )

    def save_pretrained(self, save_directory, **kwargs):
        # with this mark, which transformers sets on its own, entries that it does not know are dropped when loaded
        if any(getattr(self.generation_config, name, None) is not None for name in PATCH_OPTIONS):
            self.generation_config._from_model_config = False
        # `register_for_auto_class` records one auto class per model class; AutoModel must find the student too
        if self.is_remote_code():
            reference = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), "AutoModel": reference}
        return super().save_pretrained(save_directory, **kwargs)

    # -- what is too much, or does not fit

    def _check_context(self, num_tokens: int) -> None:
        if torch.compiler.is_compiling():
            return
        limit = getattr(self.config.backbone_config, "max_position_embeddings", None)
        if limit and self.model.has_position_table and num_tokens // self.config.patch_size > limit:
            raise ValueError(
                f"A text of {num_tokens} tokens has {num_tokens // self.config.patch_size} patches, and the "
                f"backbone's table of positions ends at {limit} ({limit * self.config.patch_size} tokens): shorten "
                "the text, or lower `max_new_tokens`."
            )

    def _check_slots(self, cache: Cache | None, num_tokens: int) -> None:
        if torch.compiler.is_compiling():
            return
        layers = getattr(getattr(cache, "backbone", cache), "layers", ())
        sizes = [layer.max_cache_len for layer in layers if isinstance(layer, StaticLayer) and not layer.is_sliding]
        num_patches = num_tokens // self.config.patch_size
        if sizes and num_patches > min(sizes):
            raise ValueError(
                f"A text of {num_tokens} tokens fills {num_patches} slots, one a patch of {self.config.patch_size}, "
                f"and the static cache has {min(sizes)}: pass one with `max_cache_len={num_patches}`, or lower "
                "`max_new_tokens`."
            )

    # -- the grid

    def _lay_out(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, patch_offset: int | None
    ) -> Grid:
        mask = None
        if attention_mask is not None:
            check_mask(attention_mask, input_ids)
            mask = attention_mask.bool()
        if self.config.decoder_type == "parallel":
            offset = -input_ids.shape[1] % self.config.patch_size if patch_offset is None else patch_offset
            if not 0 <= offset < self.config.patch_size:
                raise ValueError(
                    f"`patch_offset` must lie in 0 to {self.config.patch_size - 1} (`patch_size` - 1), got {offset}."
                )
            if offset:
                mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
                mask = nn.functional.pad(mask, (offset, 0))
                input_ids = nn.functional.pad(input_ids, (offset, 0), value=self._filler)
            if mask is not None:
                input_ids = input_ids.masked_fill(~mask, self._filler)
            return Grid(input_ids, mask, -offset)
        if mask is None:
            return Grid(input_ids, None, 0)
        # what stands right of a token never reaches it: shift leading padding out and no mask is needed
        shift = (mask.long().cumsum(1) == 0).sum(1)  # (B,)
        source = torch.arange(input_ids.shape[1], device=input_ids.device) + shift[:, None]
        inside = source < input_ids.shape[1]
        source = source.clamp(max=input_ids.shape[1] - 1)
        mask = mask.gather(1, source) & inside
        return Grid(input_ids.gather(1, source).masked_fill(~mask, self._filler), mask, shift)

    @property
    def _filler(self) -> int:
        """Id under the mask; only the codec ever reads it."""
        pad, eos = self.config.pad_token_id, self.config.eos_token_id
        return pad if pad is not None else (eos if isinstance(eos, int) else 0)

    def _off_grid(self, grid_values: torch.Tensor, grid: Grid, length: int) -> torch.Tensor:
        """`(B, L, ...)` on the grid -> `(B, length, ...)` at the columns of `input_ids`."""
        if isinstance(grid.shift, int):
            return grid_values[:, -grid.shift : length - grid.shift]
        source = (torch.arange(length, device=grid_values.device) - grid.shift[:, None]).clamp(min=0)
        return grid_values.gather(1, source[..., None].expand(-1, -1, grid_values.shape[-1]))

    def _on_grid(self, values: torch.Tensor, grid: Grid, fill: int) -> torch.Tensor:
        """`(B, T)` at the columns of `input_ids` -> `(B, L)` on the grid."""
        if isinstance(grid.shift, int):
            return nn.functional.pad(values, (-grid.shift, 0), value=fill)
        source = torch.arange(values.shape[1], device=values.device) + grid.shift[:, None]
        inside = source < values.shape[1]
        return values.gather(1, source.clamp(max=values.shape[1] - 1)).masked_fill(~inside, fill)

    # -- patches -> conditions -> latents

    def _encode(self, input_ids: torch.LongTensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, N * K)` -> the frozen codec's mean and log-std, `(B, N, D)` each."""
        with torch.no_grad():
            mean, log_std = self.autoencoder.encode(input_ids).to_tuple()
        return mean, log_std

    def _embed_patches(
        self, input_ids: torch.LongTensor, mask: torch.BoolTensor | None, latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`(B, N, K)` -> `(B, N, H)`; `latents (B, N, D)`, where the codec was asked for them before."""
        if self.config.input_mode == "tokens":
            return self.model.patch_embedding(input_ids, mask)
        if latents is None:
            latents, _ = self._encode(input_ids.flatten(1))
        return self.model.latent_projection(latents.to(self.model.latent_projection.weight.dtype))

    def _conditions(
        self, grid: Grid, cache: Cache | None, use_cache: bool, latents: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Conditions `(B, C, H)` of patches 0 .. N, and the parallel grid's patch mask `(B, N)`; `latents (B, N, D)`
        of these patches, where they are known."""
        patch_size = self.config.patch_size
        num_patches = grid.input_ids.shape[1] // patch_size
        start = self.model.start.expand(grid.input_ids.shape[0], 1, -1)
        if num_patches == 0:
            return start, None

        def to_patches(x: torch.Tensor) -> torch.Tensor:
            return x[:, : num_patches * patch_size].unflatten(1, (-1, patch_size))

        mask = None if grid.mask is None else to_patches(grid.mask)
        embeds = self._embed_patches(to_patches(grid.input_ids), mask, latents)
        if self.config.decoder_type == "autoregressive" or mask is None:
            states = self.model(embeds, cache=cache, use_cache=use_cache)
            return torch.cat([start.to(states.dtype), states], dim=1), None
        # a left-padded row begins with patches that hold nothing
        patch_mask = mask.any(-1)  # (B, N)
        count = patch_mask.long().cumsum(1)
        states = self.model(embeds, patch_mask.long(), (count - 1).clamp(min=0), cache, use_cache)
        start = start.to(states.dtype)
        return torch.cat([start, torch.where(count[..., None] > 0, states, start)], dim=1), patch_mask

    def sample_latents(self, condition: torch.Tensor, sample_noise: bool | float = False) -> torch.Tensor:
        """`(B, C, H)` -> latents `(B, C, D)`. A head that reads noise gets fresh noise, or its centre without
        `sample_noise`; an aligned head noise below `sample_noise`."""
        noise = None
        if sample_noise and self.head.noise_size:
            noise = self.head.draw_noise(condition.shape[:-1], condition)
            if self.is_aligned:
                noise = noise * float(sample_noise)
        return self.head.sample(condition, noise)

    def _decode_parallel(self, latents: torch.Tensor) -> torch.Tensor:
        """`(B, C, D)` -> `(B, C * K, hidden_size of the codec)`, one vector per token."""
        decoder = self.decoder if self.config.train_decoder else self.autoencoder.decoder
        return decoder(latents.to(decoder.from_latent.weight.dtype)).flatten(1, 2)

    def _patch_logits(self, vectors: torch.Tensor) -> torch.Tensor:
        """`(B, K, hidden_size of the codec)` -> logits `(B, K, V)`. An aligned head's noise has chosen the tokens
        already: its logits are sure of them."""
        logits = project_few(self.get_output_embeddings(), vectors.flatten(0, 1))
        logits = logits.contiguous().unflatten(0, vectors.shape[:2])
        if not self.is_aligned:
            return logits
        return (logits.float().log_softmax(-1) - SURE).scatter_(2, logits.argmax(-1, keepdim=True), 0.0)

    def _noise_of_patches(self, noise: torch.Tensor, grid: Grid, num_conditions: int) -> torch.Tensor:
        """`(B, T)` a token -> `(B, C, K)`; 0 where the grid has no token."""
        on_grid = self._on_grid(noise, grid, 0)
        missing = num_conditions * self.config.patch_size - on_grid.shape[1]
        return nn.functional.pad(on_grid, (0, missing)).unflatten(1, (num_conditions, self.config.patch_size))

    def draws(self, condition: torch.Tensor) -> LazyDraws:
        """Independent patches of a parallel decoder, given the conditions `(B, H)` of its rows."""

        def sample_latents(condition: torch.Tensor, count: int) -> torch.Tensor:
            return self.head.sample(condition, self.head.draw_noise((condition.shape[0], count), condition))

        decoder = self.decoder if self.config.train_decoder else self.autoencoder.decoder
        return LazyDraws(sample_latents, decoder, self.get_output_embeddings(), condition)

    def _sampled_patch_logits(self, condition: torch.Tensor, sampling: PatchSampling) -> torch.Tensor:
        """`(B, H)` -> logits `(B, K, V)` that are sure of one sampled patch.

        Its tokens get 0, all others what the latent that it was drawn from gives them, less `SURE`: a processor that
        forbids a sampled token leaves the next best of that latent.
        """
        ended = None if sampling.ended is None else sampling.ended()
        rows = torch.arange(len(condition), device=condition.device) if ended is None else (~ended).nonzero()[:, 0]
        vocab_size, patch_size = self.config.vocab_size, self.config.patch_size
        if not len(rows):
            return condition.new_zeros(len(condition), patch_size, vocab_size, dtype=torch.float32)
        sample = SAMPLERS[sampling.form](
            self.draws(condition[rows]), len(rows), sampling.temperature, sampling.max_draws, condition.device
        )
        logits = (sample.logits.float().log_softmax(-1) - SURE).scatter_(2, sample.ids[..., None], 0.0)
        if len(rows) == len(condition):
            return logits
        return logits.new_zeros(len(condition), patch_size, vocab_size).index_copy_(0, rows, logits)

    # -- forward

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        patch_offset: int | None = None,
        sample_noise: bool | float | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        loss_weights: Mapping[str, float] | None = None,
        distillation: TokenLoss | SparseTargets | None = None,
        distillation_starts: torch.BoolTensor | None = None,
        output_logits: bool = True,
        inputs_embeds: torch.Tensor | None = None,
        patch_sampling: PatchSampling | None = None,
        aligned_noise: torch.Tensor | None = None,
        codec_encoding: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs,
    ) -> LatentForgeOutput:
        """Predict the next token at every position.

        Args:
            input_ids: `(B, T)`; with a filled cache, only the new tokens.
            attention_mask: `(B, T)`, or `(B, past + T)` with a cache. Leading zeros are padding; zeros inside a row
                read as a learned mask.
            past_key_values: a [`LatentForgeCache`], or an empty cache for the backbone, which is then wrapped.
            labels: `(B, T)` unshifted ids, -100 where nothing is to be learned.
            logits_to_keep: only the last so many positions get logits, 0 means all; or the places of those that do.
            patch_offset: parallel decoders: places missing left of the first patch, 0 to K - 1. Default: the grid ends
                with the row.
            sample_noise: whether a head that reads noise gets random noise (default: in training) or its centre; for
                an aligned head also a share p: noise below p, which is nucleus sampling.
            num_items_in_batch: predicted tokens that all losses are divided by; default, those of this batch.
            loss_weights: weight of each part, `ce`, `kd`, `mse`, `energy`. Default: `ce`, for an energy head `energy`,
                and both with an autoregressive decoder.
            distillation: teacher's loss per token (nats), see `modeling_token_loss`; part `kd`. Its index points into
                the flattened `(B * T)` positions, which are also the rows of [`SparseTargets`].
            distillation_starts: `(B, T)`, False where `distillation` of a position needs the logits of the one before
                in the same call.
            output_logits: False, with labels: logits are never made whole.
            patch_sampling: parallel decoders with a cache: the next patch is sampled here, and its tokens' logits are
                sure of it. `generate(patch_temperature=...)` passes it.
            aligned_noise: `(B, T)` in [0, 1), for an aligned head: each token's place among a teacher's choices. The
                loss needs it; the logits are then those of the patches that these numbers stand for.
            codec_encoding: with labels, the `codec_encoding` of an earlier output for these rows: the codec is not
                asked again.

        `loss` sums parts in nats per token; `mse` is the mean over D of the squared error to the codec's mean,
        `energy` the energy score, both of a patch and weighted by its predicted tokens.

        Raises:
            TypeError: a keyword that means nothing here, unless it is None or False.
            ValueError: `inputs_embeds`, a `patch_offset` out of range, an unknown loss part, all weights zero, `kd`
                without `distillation`, `energy` without an energy head, a foreign filled cache, a mask of another
                width, a `codec_encoding` of other rows, a static cache with too few slots, more patches than a table
                of positions has. Rotary positions go on beyond `max_position_embeddings` as in any transformers model;
                `generate` refuses such prompts.
        """
        if inputs_embeds is not None:
            raise ValueError(
                "LatentForge reads patches of token ids: `inputs_embeds` is not possible, pass `input_ids`."
            )
        unknown = {name for name, value in kwargs.items() if value is not None and value is not False}
        if unknown - HARMLESS_KEYWORDS:
            raise TypeError(
                f"LatentForgeForCausalLM.forward() knows no {', '.join(sorted(unknown - HARMLESS_KEYWORDS))}."
            )
        if (
            sample_noise is None
            and labels is None
            and past_key_values is None
            and self.config.decoder_type == "parallel"
            and self.head.noise_size
            and not self.is_aligned
            and not (self.training or torch.compiler.is_compiling())
        ):
            logger.warning_once(
                "Logits of a parallel decoder with an energy head are taken at the centre of its noise: they are "
                "those of greedy decoding, and no likelihood of what sampling writes, which can be drawn from and not "
                "computed. Judge samples instead (Brier scores), or pass `sample_noise=False` where this is meant."
            )
        if (aligned_noise is not None) != (self.is_aligned and labels is not None):
            if aligned_noise is None:
                raise ValueError(
                    "An aligned head learns what a teacher's noise stands for: with `labels` it needs "
                    "`aligned_noise (B, T)`, which KDTrainer takes from its teacher."
                )
            if not self.is_aligned or use_cache:
                raise ValueError(
                    f"`aligned_noise` is for aligned heads, without a cache; this head is "
                    f"`{self.config.head_config.head_type}`."
                )
        sample_noise = self.training if sample_noise is None else sample_noise
        # Trainer switches off only the top config's use_cache: no cache is built while learning
        use_cache = (
            (past_key_values is not None or (labels is None and not self.training)) if use_cache is None else use_cache
        )
        if use_cache and labels is None:
            cache = self._as_latentforge_cache(past_key_values)
            if cache.seq_length:
                return self._forward_cached(
                    input_ids, attention_mask, cache, logits_to_keep, sample_noise, patch_sampling
                )
        else:
            if isinstance(past_key_values, LatentForgeCache) and past_key_values.seq_length:
                raise ValueError(
                    f"A cache of {past_key_values.seq_length} tokens goes with `use_cache` and without `labels`: "
                    "losses are computed over whole rows."
                )
            cache = None

        length = input_ids.shape[1]
        if not input_ids.numel():
            check_token_ids(input_ids, self.config.vocab_size)
        grid = self._lay_out(input_ids, attention_mask, patch_offset)
        if input_ids.device.type == "cpu":  # elsewhere a look at the values waits for the device; `generate` looks
            check_token_ids(grid.input_ids, self.config.vocab_size)
        self._check_context(grid.input_ids.shape[1])
        self._check_slots(cache, grid.input_ids.shape[1])
        weights = None if labels is None else self._loss_weights(loss_weights, distillation)
        if codec_encoding is not None:
            self._check_encoding(codec_encoding, weights, grid)
        elif weights is not None and self.asks_codec(weights):
            whole = grid.input_ids.shape[1] // self.config.patch_size * self.config.patch_size
            codec_encoding = self._encode(grid.input_ids[:, :whole])
        conditions, patch_mask = self._conditions(
            grid,
            None if cache is None else cache.backbone,
            cache is not None,
            None if codec_encoding is None else codec_encoding[0],
        )
        reads_tokens = weights is None or output_logits or weights.get("ce") or weights.get("kd")
        latents = hidden = None
        fill: Callable[..., None] | None = None
        if not reads_tokens:  # the energy score draws its own latents
            latents = self.sample_latents(conditions, sample_noise) if weights.get("mse") else None
        elif self.config.decoder_type == "autoregressive":
            latents = self.sample_latents(conditions, sample_noise)
            hidden, inputs, windows, memory = self.decoder(grid.input_ids, grid.mask, latents, conditions)
            fill = partial(self._fill_cache, cache, grid, length, latents, inputs, windows, memory)
        elif cache is not None and patch_sampling is not None:
            hidden = None
            fill = partial(self._fill_parallel_cache, cache, grid, length, None, patch_mask)
        elif cache is not None and not cache.is_recording and isinstance(logits_to_keep, int) and logits_to_keep == 1:
            latents = self.sample_latents(conditions[:, -1:], sample_noise)
            hidden = None
            fill = partial(self._fill_parallel_cache, cache, grid, length, self._decode_parallel(latents), patch_mask)
        else:
            if aligned_noise is None:
                latents = self.sample_latents(conditions, sample_noise)
            else:
                latents = self.head.sample(
                    conditions, self._noise_of_patches(aligned_noise, grid, conditions.shape[1])
                )
            vectors = self._decode_parallel(latents)
            hidden = vectors[:, 1 : grid.input_ids.shape[1] + 1]  # place t predicts token t + 1
            fill = partial(self._fill_parallel_cache, cache, grid, length, vectors, patch_mask)
        if cache is not None and fill is not None:
            fill()
            if cache.is_recording:
                cache.record_prompt(fill)
            if patch_sampling is not None:
                cache.patch_logits = self._sampled_patch_logits(conditions[:, -1], patch_sampling)

        output = LatentForgeOutput(past_key_values=cache)
        if hidden is None and reads_tokens:
            output.logits = cache.patch_logits[:, grid.input_ids.shape[1] % self.config.patch_size, None]
            return output
        hidden = self._off_grid(hidden, grid, length) if reads_tokens else None
        if labels is not None:
            output.loss, output.loss_components = self._losses(
                hidden,
                conditions,
                latents,
                grid,
                labels,
                num_items_in_batch,
                weights,
                distillation,
                distillation_starts,
                codec_encoding,
            )
            output.codec_encoding = codec_encoding
        if output_logits or labels is None:
            output.logits = self.get_output_embeddings()(_kept(hidden, logits_to_keep))
        return output

    def asks_codec(self, weights: Mapping[str, float]) -> bool:
        """Whether a loss of these parts needs the frozen codec's encoding of the text."""
        return bool(weights.get("mse") or weights.get("energy") or self.config.input_mode == "latents")

    def _check_encoding(self, encoding, weights: Mapping[str, float] | None, grid: Grid) -> None:
        if weights is None:
            raise ValueError("`codec_encoding` is what a loss needs: pass `labels`, or leave it out.")
        expected = (
            grid.input_ids.shape[0],
            grid.input_ids.shape[1] // self.config.patch_size,
            self.config.latent_size,
        )
        if any(tuple(x.shape) != expected for x in encoding):
            raise ValueError(
                f"`codec_encoding` of shapes {[tuple(x.shape) for x in encoding]} is not these rows': theirs is "
                f"{expected}, (rows, patches, latent size)."
            )

    def _loss_weights(self, weights: Mapping[str, float] | None, distillation: object) -> Mapping[str, float]:
        """Those given, else the default of this student. Raises ValueError where they ask for what is not there."""
        has_energy = self.config.head_config.head_type == "energy"
        if weights is None:
            weights = {"energy": 1.0} if has_energy else {}
            if not has_energy or hasattr(self, "decoder"):  # a decoder of its own has nothing else to learn from
                weights["ce"] = 1.0
        unknown = set(weights) - set(LOSS_PARTS)
        if unknown:
            raise ValueError(f"Unknown loss parts {sorted(unknown)}; known are {list(LOSS_PARTS)}.")
        if weights.get("kd") and distillation is None:
            raise ValueError(
                f"The loss part `kd` has weight {weights['kd']} but no `distillation` was passed: it needs a teacher."
            )
        if weights.get("energy") and not has_energy:
            raise ValueError(
                f"The loss part `energy` has weight {weights['energy']} but the head is "
                f"`{self.config.head_config.head_type}`."
            )
        if not any(weights.get(part) for part in LOSS_PARTS):
            raise ValueError(f"All loss weights are zero: {dict(weights)}.")
        return weights

    def _losses(
        self,
        hidden,
        conditions,
        latents,
        grid,
        labels,
        num_items,
        weights,
        distillation,
        distillation_starts,
        codec_encoding,
    ):
        # nothing predicts a row's first token: column 0, or the first that is no padding
        labels = labels.clone()
        labels[:, 0] = -100
        if grid.mask is not None:
            first = (grid.mask.long().cumsum(1) == 0).sum(1) + grid.shift  # (B,)
            labels.scatter_(1, first.clamp(0, labels.shape[1] - 1)[:, None], -100)
        if num_items is None:
            num_items = (labels != -100).sum().clamp(min=1)
        components = {}
        loss = 0.0
        if weights.get("ce") or weights.get("kd"):
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            distillation = distillation if weights.get("kd") else None
            total, ce, kd = token_loss(
                hidden.flatten(0, 1),
                self.get_output_embeddings().weight,
                targets.flatten(),
                weights.get("ce", 0.0),
                distillation,
                weights.get("kd", 0.0),
                None if distillation is None else distillation_starts,
            )
            loss = loss + total / num_items
            components["ce"] = ce / num_items
            if distillation is not None:
                components["kd"] = kd / num_items

        if weights.get("mse") or weights.get("energy"):
            patch_size, num_patches = self.config.patch_size, grid.input_ids.shape[1] // self.config.patch_size
            whole = num_patches * patch_size
            tokens_per_patch = (
                self._on_grid(labels, grid, -100)[:, :whole].unflatten(1, (-1, patch_size)) != -100
            ).sum(-1)  # (B, N)
            target_mean, target_log_std = codec_encoding
            if weights.get("mse"):
                error = (latents[:, :num_patches].float() - target_mean.float()).square().mean(-1)  # (B, N)
                components["mse"] = (error * tokens_per_patch).sum() / num_items
                loss = loss + weights["mse"] * components["mse"]
            if weights.get("energy"):
                score = self.head.loss(
                    conditions[:, :num_patches].flatten(0, 1), target_mean.flatten(0, 1), target_log_std.flatten(0, 1)
                )
                components["energy"] = (score * tokens_per_patch.flatten()).sum() / num_items
                loss = loss + weights["energy"] * components["energy"]
        return loss, {name: value.detach() for name, value in components.items()}

    # -- cache

    def _as_latentforge_cache(self, cache: Cache | None) -> LatentForgeCache:
        if isinstance(cache, LatentForgeCache):
            return cache
        if cache is None:
            cache = DynamicCache(config=self.config.backbone_config)
        elif int(cache.get_seq_length()) > 0:
            raise ValueError(
                f"`past_key_values` is a {type(cache).__name__} of {int(cache.get_seq_length())} positions, made by "
                "another model: pass the cache that this model returned, or an empty one."
            )
        return LatentForgeCache(cache)

    def _begin_cache(self, cache: LatentForgeCache, grid: Grid, length: int, lengths: list[int]) -> torch.Tensor:
        """What both decoders remember; returns `lengths` as `(B,)`."""
        patch_size, device = self.config.patch_size, grid.input_ids.device
        cache.seq_length, cache.lengths = length, lengths
        counts = torch.tensor(lengths, device=device)
        cache.num_patches = (counts // patch_size)[:, None]
        places = cache.num_patches * patch_size + torch.arange(patch_size, device=device)
        places = places.clamp(max=grid.input_ids.shape[1] - 1)
        cache.pending_ids = grid.input_ids.gather(1, places)
        cache.pending_mask = None if grid.mask is None else grid.mask.gather(1, places)
        return counts

    def _fill_cache(self, cache, grid, length, latents, inputs, windows, memory, removed: int = 0) -> None:
        """`removed`: go back so many tokens from the end of the row that was read."""
        batch, device, patch_size = grid.input_ids.shape[0], grid.input_ids.device, self.config.patch_size
        length -= removed
        lengths = (
            [length] * batch if isinstance(grid.shift, int) else [length - shift for shift in grid.shift.tolist()]
        )
        if removed and min(lengths) < 1:
            raise ValueError(f"Going back {removed} tokens leaves a row of nothing but padding.")
        counts = self._begin_cache(cache, grid, length, lengths)
        # `inputs` begins with S - 1 zeros: its places n .. n + S - 2 are the last inputs of a row of n tokens
        last = counts[:, None] + torch.arange(self.config.decoder_conv_size - 1, device=device)
        cache.recent = inputs.gather(1, last[..., None].expand(-1, -1, inputs.shape[-1]))
        keep = self.config.decoder_window - 1
        if min(lengths) == length:  # no row is padded
            lengths = lengths[0]
            cache.windows = [
                tuple(compact(x[:, :, max(0, lengths - keep) : lengths]) for x in pair) for pair in windows
            ]
            num_patches = lengths // patch_size
            current = latents[:, num_patches, None]
            if memory is not None:
                cache.memory = tuple(compact(x[:, :, : num_patches + 1]) for x in memory)
        else:
            self._check_full_attention()
            num_patches = latents.shape[1] - 1
            # the last W - 1 tokens of each row, right-aligned; shorter rows have gaps on the left
            places = counts[:, None] - keep + torch.arange(keep, device=device)  # (B, W - 1)
            cache.window_mask = places >= 0
            index = places.clamp(min=0)[:, None, :, None]
            cache.windows = [
                tuple(x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in pair) for pair in windows
            ]
            current = latents.gather(1, cache.num_patches[..., None].expand(-1, -1, latents.shape[-1]))
            # rows with fewer patches have garbage in the backbone's last slots, and so has a row that went back
            slots = torch.arange(latents.shape[1], device=device)
            cache.patch_mask = slots[:-1] < cache.num_patches
            if memory is not None:
                cache.memory = memory
                cache.memory_mask = slots <= cache.num_patches
        if removed:
            cache.backbone.crop(num_patches - int(cache.backbone.get_seq_length()))
        cache.latent_embeds = self.decoder.embed_latents(current)
        if self.decoder.lookup is not None:
            sizes = self.decoder.lookup.sizes
            cache.history, cache.runs = begin_history(grid.input_ids, grid.mask, cache.lengths, sizes)

    def _check_full_attention(self) -> None:
        config = self.config.backbone_config
        kinds = set(getattr(config, "layer_types", None) or ())
        if not kinds and getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
            kinds = {"sliding_attention"}
        if kinds - {"full_attention"}:
            raise ValueError(
                f"A {config.model_type} backbone with {', '.join(sorted(kinds - {'full_attention'}))} counts the gaps "
                "between rows of unequal length as patches: generate from one prompt at a time, or from prompts "
                "of one length without padding."
            )

    def _fill_parallel_cache(self, cache, grid, length, vectors, patch_mask, removed: int = 0) -> None:
        """`vectors` of all patches, of the last, or None where its logits come from elsewhere; `removed`: go back
        so many tokens from the end of the row."""
        patch_size, places = self.config.patch_size, grid.input_ids.shape[1] - removed
        self._begin_cache(cache, grid, length - removed, [places] * grid.input_ids.shape[0])
        num_patches = places // patch_size
        if patch_mask is not None:
            cache.patch_mask = patch_mask[:, :num_patches]
            cache.num_patches = cache.patch_mask.long().sum(1, keepdim=True)
        if removed:
            cache.backbone.crop(num_patches - int(cache.backbone.get_seq_length()))
        if vectors is None:
            return
        first = num_patches * patch_size if vectors.shape[1] > patch_size else 0
        cache.patch_logits = self._patch_logits(vectors[:, first : first + patch_size])

    def _forward_cached(
        self, input_ids, attention_mask, cache, logits_to_keep, sample_noise, patch_sampling
    ) -> LatentForgeOutput:
        self._check_context(max(cache.lengths) + input_ids.shape[1])
        mask = None
        if attention_mask is not None:
            check_mask(attention_mask, input_ids, cache.seq_length)
            mask = attention_mask[:, -input_ids.shape[1] :].bool()
            if 0 in cache.lengths:
                raise ValueError(
                    "The cache holds a row of nothing but padding: a left-padded prompt must be read in one piece "
                    "(no `prefill_chunk_size`)."
                )
        logits = []
        for column in range(input_ids.shape[1]):
            token_mask = None if mask is None else mask[:, column]
            # of the patches that a long input completes, only the last is still to be written
            sampling = patch_sampling if input_ids.shape[1] - column <= self.config.patch_size else None
            logits.append(self._step(input_ids[:, column], token_mask, cache, sample_noise, sampling))
        return LatentForgeOutput(logits=_kept(torch.cat(logits, dim=1), logits_to_keep), past_key_values=cache)

    def _step(
        self,
        token: torch.Tensor,
        mask: torch.Tensor | None,
        cache: LatentForgeCache,
        sample_noise: bool,
        patch_sampling: PatchSampling | None = None,
    ) -> torch.Tensor:
        """One token of each row, `(B,)` -> logits `(B, 1, V)`."""
        patch_size = self.config.patch_size
        if cache.is_recording:
            cache.record()
        if mask is not None:
            token = token.masked_fill(~mask, self._filler)
            if cache.pending_mask is None:
                cache.pending_mask = torch.ones_like(cache.pending_ids, dtype=torch.bool)
        ragged = cache.is_ragged
        new = (
            None
            if cache.pending_mask is None
            else (torch.ones_like(token, dtype=torch.bool) if mask is None else mask)
        )
        if ragged:
            positions: torch.Tensor | int = torch.tensor(cache.lengths, device=token.device)  # (B,)
            places = positions[:, None] % patch_size
            cache.pending_ids.scatter_(1, places, token[:, None])
            if new is not None:
                cache.pending_mask.scatter_(1, places, new[:, None])
        else:
            positions = cache.lengths[0]
            # `select`, not an index: torch.compile would make one graph for every place in the patch
            cache.pending_ids.select(1, positions % patch_size).copy_(token)
            if new is not None:
                cache.pending_mask.select(1, positions % patch_size).copy_(new)
        cache.lengths = [length + 1 for length in cache.lengths]
        cache.seq_length += 1
        complete = [length % patch_size == 0 for length in cache.lengths]

        if any(complete):
            completed = torch.tensor(complete, device=token.device)[:, None]  # (B, 1)
            embeds = self._embed_patches(
                cache.pending_ids[:, None], None if cache.pending_mask is None else cache.pending_mask[:, None]
            )
            filled = completed
            if cache.patch_mask is not None:
                if self.config.decoder_type == "parallel" and cache.pending_mask is not None:
                    filled = completed & cache.pending_mask.any(1, keepdim=True)
                cache.patch_mask = torch.cat([cache.patch_mask, filled], dim=1)
            elif ragged:
                raise AssertionError("a ragged cache has a patch mask from its prompt on")
            patch_mask = None if cache.patch_mask is None else cache.patch_mask.long()
            condition = self.model(embeds, patch_mask, cache.num_patches, cache.backbone, use_cache=True)  # (B, 1, H)
            cache.num_patches = cache.num_patches + filled
            if patch_sampling is not None:
                cache.patch_logits = self._sampled_patch_logits(condition[:, 0], patch_sampling)
            elif self.config.decoder_type == "parallel":
                latents = self.sample_latents(condition, sample_noise)
                cache.patch_logits = self._patch_logits(self._decode_parallel(latents))
            else:
                latents = self.sample_latents(condition, sample_noise)
                latent_embeds = self.decoder.embed_latents(latents)
                cache.latent_embeds = (
                    torch.where(completed[..., None], latent_embeds, cache.latent_embeds) if ragged else latent_embeds
                )
                if cache.memory is not None:
                    new = self.decoder.memory_of(condition, cache.num_patches[:, None])
                    cache.memory = tuple(torch.cat(pair, dim=2) for pair in zip(cache.memory, new, strict=True))
                    if cache.memory_mask is not None:
                        cache.memory_mask = torch.cat([cache.memory_mask, completed], dim=1)

        if self.config.decoder_type == "parallel":
            return cache.patch_logits.narrow(1, cache.lengths[0] % patch_size, 1)

        window_mask = None
        if cache.window_mask is not None:
            seen = torch.cat([cache.window_mask, cache.window_mask.new_ones(len(cache.lengths), 1)], dim=1)
            window_mask, cache.window_mask = seen[:, None, None], seen[:, 1:]
        memory_mask = None if cache.memory_mask is None else cache.memory_mask[:, None, None]
        embeds = cache.latent_embeds
        if self.decoder.lookup is not None:
            cache.history, cache.runs, ids, levels = extend_history(
                cache.history, cache.runs, token, mask, self.decoder.lookup.boundaries_on(token.device)
            )
            embeds = embeds + self.decoder.step_lookup(ids, levels)
        hidden, cache.recent, cache.windows = self.decoder.step(
            token,
            mask,
            embeds,
            positions,
            cache.recent,
            cache.windows,
            window_mask,
            cache.memory,
            memory_mask,
        )
        return self.lm_head(hidden)


__all__ = ["LatentForgeForCausalLM", "LatentForgeModel", "LatentForgeOutput", "LatentForgePreTrainedModel"]
