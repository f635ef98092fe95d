"""The codec: K tokens -> 1 latent and back.

B batch, T tokens, K tokens per patch, N = T // K patches, H hidden, D latent, V vocabulary.

    encode: input_ids (B, T) -> embeddings (B, N, K, H) -> token blocks -> squeeze (B, N, H) -> patch blocks
            -> mean, log_std (B, N, D)
    decode: latents (B, N, D) -> patch blocks (B, N, H) -> expand (B, N, K, H) -> token blocks
            -> tied output matrix -> logits (B, N, K, V)

No attention: with it CALM's codec reconstructed better and was learnt worse (arXiv 2510.27688, issue #5 of its
repository).
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import ModelOutput

from .configuration_autoencoder import LatentForgeAutoencoderConfig
from .modeling_token_loss import token_loss


@dataclass
class LatentForgeAutoencoderEncoding(ModelOutput):
    """Posterior of each patch: `mean` and `log_std`, `(B, N, D)`."""

    mean: torch.FloatTensor | None = None
    log_std: torch.FloatTensor | None = None


@dataclass
class LatentForgeAutoencoderOutput(ModelOutput):
    """`loss` and `loss_components` with labels, else `logits` `(B, T, V)`; `last_hidden_state` is the posterior mean
    `(B, N, D)`, the first without labels: the `feature-extraction` pipeline returns it."""

    loss: torch.FloatTensor | None = None
    last_hidden_state: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    log_std: torch.FloatTensor | None = None
    loss_components: dict | None = None


def check_token_ids(input_ids: torch.LongTensor, vocab_size: int) -> None:
    """Raises ValueError for an empty text and for ids outside 0 .. `vocab_size` - 1; an embedding would raise an
    IndexError that names neither, or stop a GPU for good."""
    if torch.compiler.is_compiling():
        return
    if not input_ids.numel():
        raise ValueError(
            f"`input_ids` of shape {tuple(input_ids.shape)} hold no token: give at least one, EOS to start a new text."
        )
    low, high = (int(x) for x in torch.aminmax(input_ids))
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"`input_ids` hold the id {low if low < 0 else high}, and the model knows 0 to {vocab_size - 1}: "
            "tokenize with the tokenizer that was saved beside it."
        )


def check_mask(attention_mask: torch.Tensor, input_ids: torch.LongTensor, past: int = 0) -> None:
    """Raises ValueError for a mask that is not `(B, T)`, nor `(B, past + T)`, to ids `(B, T)`: it would be broadcast,
    or end in a shape's error."""
    if torch.compiler.is_compiling():
        return
    batch, length = input_ids.shape
    if attention_mask.shape not in ((batch, length), (batch, past + length)):
        raise ValueError(
            f"`attention_mask` of shape {tuple(attention_mask.shape)} does not fit `input_ids` ({batch}, {length})"
            f"{f' after {past} tokens in the cache' if past else ''}: pass one number per token, 1 for text and 0 for "
            "padding."
        )


class CompleteCheckpointMixin:
    """transformers fills weights that a checkpoint lacks with random numbers and a warning; here it is an error: half
    a codec, or a LoRA run's backbone, is no model."""

    # of a class that is one part of a checkpoint: how the names of the others' weights begin
    _beside_me: tuple[str, ...] = ()
    # how the names of weights begin that came later, and what loads a checkpoint from before
    _came_later: tuple[str, str] = ("", "")
    # what a `quantization_config` leaves as it is where it names nothing itself: first parts of modules' names
    _keep_unquantized: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers; a `quantization_config` that names no modules to leave leaves what [`_keep_unquantized`]
        says.

        Raises:
            ValueError: the checkpoint lacks weights of the model, has more, has others' shapes, or is damaged.
        """
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if kwargs.get("quantization_config") is not None and cls._keep_unquantized:
            kwargs["quantization_config"] = cls._with_kept_modules(kwargs["quantization_config"])
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        except Exception as error:
            if type(error).__name__ == "SafetensorError":  # of a package that this room does not import
                raise ValueError(
                    f"The weights in {name} are damaged, most likely cut off ({error}): copy or download them again."
                ) from error
            if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
                raise ValueError(
                    f"The weights in {name} have other shapes than its config says (the table above names them): one "
                    "of the two was edited, or belongs to another model."
                ) from error
            raise
        missing = sorted(info["missing_keys"])
        if missing:
            prefix, remedy = cls._came_later
            if prefix and all(key.startswith(prefix) for key in missing):
                raise ValueError(f"{name} lacks the weights {prefix}*, it is from before there were any: {remedy}.")
            raise ValueError(
                f"{name} is no complete {cls.__name__}: "
                f"{len(missing)} of its weights are missing, {', '.join(missing[:3])} first. It is another model's "
                "checkpoint, one of an older version, or one taken during a LoRA run, whose final folder is complete."
            )
        unexpected = sorted(key for key in info["unexpected_keys"] if not key.startswith(cls._beside_me))
        if unexpected:
            raise ValueError(
                f"{name} holds {len(unexpected)} weights that its config has no place for, "
                f"{', '.join(unexpected[:3])} first: the config was edited (fewer layers?), or is another model's."
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def _with_kept_modules(cls, config: Any) -> Any:
        # not `_keep_in_fp32_modules`, which every quantiser reads too: in fp16 it would make them fp32
        config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.deepcopy(config)
        for field in ("modules_to_not_convert", "llm_int8_skip_modules"):
            if getattr(config, field, ()) is None:
                setattr(config, field, list(cls._keep_unquantized))
        return config


def project_few(output: nn.Module, vectors: torch.Tensor) -> torch.Tensor:
    """`(M, H)` -> `(M, V)`, possibly not contiguous, by an output matrix that is read for a few hundred rows at most.

    On a CPU the large matrix stands on the left: 6.0 against 10.2 ms for 8 rows of 512 times 512 x 32000, 10.5 against
    19.3 for 32, 44 against 60 for 200 (measured, two cores).
    """
    # neither adapter nor quantised
    plain = type(output) is nn.Linear and type(output.weight) is nn.Parameter and output.bias is None
    if vectors.device.type == "cpu" and plain and 1 < len(vectors) <= 256:
        return (output.weight @ vectors.T).T
    return output(vectors)


class LatentForgeMLPBlock(nn.Module):
    """`x + down(silu(gate(norm(x))) * up(norm(x)))` on the last dimension."""

    def __init__(self, hidden_size: int, intermediate_size: int, eps: float):
        super().__init__()
        self.norm = nn.RMSNorm(hidden_size, eps=eps)
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up_proj(self.norm(x)).chunk(2, dim=-1)
        return x + self.down_proj(nn.functional.silu(gate) * up)


# An untrained posterior of standard deviation 1 around means of 0.3 drowns the tokens: 56 % came back after 500 steps,
# with this start 49 % after 100 (measured: K=8, D=256, vocabulary 4096).
INITIAL_LOG_STD = -2.0


def _blocks(config: LatentForgeAutoencoderConfig, count: int) -> nn.Sequential:
    return nn.Sequential(
        *(LatentForgeMLPBlock(config.hidden_size, config.intermediate_size, config.rms_norm_eps) for _ in range(count))
    )


class LatentForgeEncoder(nn.Module):
    """Token embeddings `(..., K, H)` -> mean and log-std `(..., D)`."""

    def __init__(self, config: LatentForgeAutoencoderConfig):
        super().__init__()
        token_blocks = (config.num_encoder_layers + 1) // 2
        self.token_blocks = _blocks(config, token_blocks)
        self.squeeze = nn.Linear(config.patch_size * config.hidden_size, config.hidden_size, bias=False)
        self.patch_blocks = _blocks(config, config.num_encoder_layers - token_blocks)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.to_posterior = nn.Linear(config.hidden_size, 2 * config.latent_size)

    def forward(self, embeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.squeeze(self.token_blocks(embeds).flatten(-2))  # (..., H)
        mean, log_std = self.to_posterior(self.norm(self.patch_blocks(hidden))).chunk(2, dim=-1)
        return mean, (log_std + INITIAL_LOG_STD).clamp(-8.0, 4.0)


class LatentForgeDecoder(nn.Module):
    """Latents `(..., D)` -> hidden vectors `(..., K, H)` that the output matrix turns into logits, K tokens at
    once."""

    def __init__(self, config: LatentForgeAutoencoderConfig):
        super().__init__()
        self.patch_size = config.patch_size
        token_blocks = (config.num_decoder_layers + 1) // 2
        self.from_latent = nn.Linear(config.latent_size, config.hidden_size)
        self.patch_blocks = _blocks(config, config.num_decoder_layers - token_blocks)
        self.expand = nn.Linear(config.hidden_size, config.patch_size * config.hidden_size)
        self.token_blocks = _blocks(config, token_blocks)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def patch_hidden(self, latents: torch.Tensor) -> torch.Tensor:
        """`(..., D)` -> `(..., H)`, what all tokens of a patch share."""
        return self.patch_blocks(self.from_latent(latents))

    def tokens_hidden(self, hidden: torch.Tensor) -> torch.Tensor:
        """`(..., H)` -> `(..., K, H)`."""
        return self.norm(self.token_blocks(self.expand(hidden).unflatten(-1, (self.patch_size, -1))))

    def token_hidden(self, hidden: torch.Tensor, place: int) -> torch.Tensor:
        """`(..., H)` -> `(..., H)`, one token's of K."""
        if type(self.expand) is nn.Linear:
            size = self.expand.out_features // self.patch_size
            part = slice(place * size, (place + 1) * size)
            expanded = nn.functional.linear(hidden, self.expand.weight[part], self.expand.bias[part])
        else:  # quantised or with an adapter: its weight is not to be cut
            expanded = self.expand(hidden).unflatten(-1, (self.patch_size, -1))[..., place, :]
        return self.norm(self.token_blocks(expanded))

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.tokens_hidden(self.patch_hidden(latents))


class LatentForgeAutoencoder(CompleteCheckpointMixin, PreTrainedModel):
    """MLP-only variational codec of CALM (arXiv 2510.27688, section 3). Its whole face is [`encode`] and
    [`decode`]."""

    config: LatentForgeAutoencoderConfig
    config_class = LatentForgeAutoencoderConfig
    base_model_prefix = "autoencoder"
    main_input_name = "input_ids"
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}
    # `set_attn_implementation` on a student asks every part, attention or not
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: LatentForgeAutoencoderConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        # stands for a dropped token: id 0 would be a real token
        self.mask_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.encoder = LatentForgeEncoder(config)
        self.decoder = LatentForgeDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LatentForgeAutoencoder):
            init.normal_(module.mask_embedding, std=self.config.initializer_range)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def to_patches(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """`(B, T)` -> `(B, N, K)`. Raises ValueError where T is no multiple of K."""
        if input_ids.shape[-1] % self.config.patch_size:
            raise ValueError(
                f"The codec reads whole patches: {input_ids.shape[-1]} tokens are no multiple of `patch_size` "
                f"({self.config.patch_size}). Pad the text to a multiple, with `pad_token_id` or EOS."
            )
        return input_ids.unflatten(-1, (-1, self.config.patch_size))

    def _fill_last_patch(self, input_ids: torch.Tensor) -> torch.Tensor:
        eos = self.config.eos_token_id
        filler = self.config.pad_token_id
        if filler is None:
            filler = eos[0] if isinstance(eos, list) else eos
        missing = -input_ids.shape[1] % self.config.patch_size
        if filler is None or not missing:
            return input_ids
        return nn.functional.pad(input_ids, (0, missing), value=filler)

    def encode(self, input_ids: torch.LongTensor) -> LatentForgeAutoencoderEncoding:
        """`(B, T)` ids -> posterior mean and log standard deviation, `(B, N, D)`. In training, tokens are dropped
        (`token_dropout`)."""
        if input_ids.device.type == "cpu":  # elsewhere a look at the values waits for the device
            check_token_ids(input_ids, self.config.vocab_size)
        embeds = self.embed_tokens(self.to_patches(input_ids))  # (B, N, K, H)
        if self.training and self.config.token_dropout:
            dropped = torch.rand(embeds.shape[:-1], device=embeds.device) < self.config.token_dropout
            embeds = torch.where(dropped[..., None], self.mask_embedding.to(embeds.dtype), embeds)
        return LatentForgeAutoencoderEncoding(*self.encoder(embeds))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents `(..., D)` -> logits `(..., K, V)`."""
        return self.lm_head(self.decoder(latents))

    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> LatentForgeAutoencoderOutput:
        """Reconstruct.

        Args:
            input_ids: `(B, T)`, with labels T a multiple of K; without, the last patch is filled up with
                `pad_token_id`, else EOS. Padding is a token like any other: a codec must give it back.
            attention_mask: accepted because tokenizers send it; the codec has no use for it.
            labels: `(B, T)` ids to reconstruct, -100 where nothing is asked. Then `loss` is set and `logits` are never
                made.
            num_items_in_batch: label count that the loss is divided by; default, that of this batch.

        `loss` = K * cross-entropy per token + `kl_weight` * KL per patch, both in nats; `loss_components` names them
        `reconstruction` (times K) and `kl` (before its weight, clamped).
        """
        length = input_ids.shape[1]
        if labels is None:
            input_ids = self._fill_last_patch(input_ids)
        encoding = self.encode(input_ids)
        latents = encoding.mean
        if self.training:
            latents = latents + torch.randn_like(latents) * encoding.log_std.exp()
            latents = nn.functional.dropout(latents, self.config.latent_dropout)
        output = LatentForgeAutoencoderOutput(last_hidden_state=encoding.mean, log_std=encoding.log_std)
        if labels is None:
            output.logits = self.decode(latents).flatten(1, 2)[:, :length]  # (B, T, V)
            return output

        num_items = num_items_in_batch if num_items_in_batch is not None else (labels != -100).sum().clamp(min=1)
        hidden = self.decoder(latents)
        reconstruction, *_ = token_loss(hidden.flatten(0, -2), self.lm_head.weight, labels.flatten())
        reconstruction = self.config.patch_size * reconstruction / num_items
        # KL(N(mean, std) || N(0, 1)) per dimension; the clamp is per dimension, before the sum
        dtype = torch.promote_types(latents.dtype, torch.float32)
        mean, log_std = encoding.mean.to(dtype), encoding.log_std.to(dtype)
        kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std  # (B, N, D)
        tokens_per_patch = (self.to_patches(labels) != -100).sum(-1)  # (B, N)
        kl = (kl.clamp(min=self.config.kl_clamp).sum(-1) * tokens_per_patch).sum() / num_items
        output.loss = reconstruction + self.config.kl_weight * kl
        output.loss_components = {"reconstruction": reconstruction.detach(), "kl": kl.detach()}
        return output


__all__ = ["LatentForgeAutoencoder", "LatentForgeAutoencoderEncoding", "LatentForgeAutoencoderOutput"]
