"""Configuration of the codec: K tokens -> 1 latent and back."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

# written into configs by transformers and the Hub
FOREIGN_FIELDS = {"auto_map", "quantization_config", "use_cache", "custom_pipelines", "attn_implementation"}


def nearest_name(name: str, names: Iterable[str], by_words: bool = True) -> str | None:
    """The one of `names` that `name` most likely means: spelt nearly so, or, `by_words`, holding all its words."""
    names, words = list(names), set(name.split("_"))
    near = difflib.get_close_matches(name, names, 1, 0.85)
    if by_words and not near:
        near = [known for known in names if words < set(known.split("_"))]
    return near[0] if near else None


def check_fields(
    kwargs: Mapping[str, object],
    fields: Iterable[str],
    parts: Mapping[str, Iterable[str]] | None = None,
    of_others: bool = False,
) -> None:
    """transformers keeps every key that a config does not know, and a misspelt field would keep its default, silently.

    Args:
        kwargs: keys that are no fields, and their values.
        fields: of the config.
        parts: name of a config inside it -> that one's fields.
        of_others: a config of another library, which may hold more: only what is nearly a field counts.

    Raises:
        ValueError: a key that is nearly a field, or a field of a part.
    """
    for name, value in kwargs.items():
        # other special tokens' ids (`eot_token_id`) are near the known ones, and meant
        known = name.startswith("_") or hasattr(PreTrainedConfig, name) or name.endswith(("_token", "_token_id"))
        if known or name in FOREIGN_FIELDS:
            continue
        for part, of_part in (parts or {}).items():
            if name in of_part:
                raise ValueError(f"`{name}` ({value!r}) is a field of `{part}`: pass {part}={{'{name}': {value!r}}}.")
        meant = nearest_name(name, fields, by_words=not of_others)
        if meant:
            raise ValueError(f"The config has no field `{name}` (value {value!r}): did you mean `{meant}`?")
        if not of_others:
            logger.warning("The config has no field `%s` (value %r): it is kept and changes nothing.", name, value)


class ReadsInWords:
    """Of a config: what a damaged config.json makes transformers raise (an AttributeError of an int, say) says which
    file is at fault."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own.

        Raises:
            ValueError: a value that cannot be read.
        """
        try:
            return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]
        except Exception as error:
            checked = error.__cause__ if isinstance(error, StrictDataclassError) else error
            if isinstance(checked, (ValueError, OSError)) or (checked is not error and isinstance(checked, TypeError)):
                raise
            raise ValueError(
                f"A {cls.__name__} cannot be read from its fields ({type(error).__name__}: {error}): config.json is "
                "damaged, or was written for another class."
            ) from error

    def validate_dtype(self):
        """Raises:
        ValueError: a `dtype` that names no number of torch; transformers would write it, and not read it again.
        """
        dtype = self.dtype  # type: ignore[attr-defined]
        named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype  # saving makes it a name
        if dtype is not None and not isinstance(named, torch.dtype):
            raise ValueError(f"`dtype` must be one of torch's, as 'float32' or 'bfloat16', or None, got {dtype!r}.")


@strict
class LatentForgeAutoencoderConfig(ReadsInWords, PreTrainedConfig):
    """Shape and objective of [`LatentForgeAutoencoder`].

    Args:
        vocab_size: number of token ids.
        patch_size: K, tokens per patch.
        latent_size: D, numbers per latent; default `32 * patch_size` (CALM's rule, arXiv 2510.27688, section 4).
        hidden_size, intermediate_size: width of the blocks and of their gated MLP.
        num_encoder_layers, num_decoder_layers: blocks on each side; half of them (rounded up) see single tokens, the
            others the whole patch.
        token_dropout: share of input tokens replaced by the mask embedding in training.
        latent_dropout: share of latent numbers set to zero in training.
        kl_weight: factor of the KL term.
        kl_clamp: nats per latent dimension below which the KL term does not push (free bits): without it most
            dimensions collapse.
        tie_word_embeddings: the output matrix is the embedding matrix.

    Raises:
        ValueError: a size below 1, a dropout outside [0, 1), a negative weight, a misspelt field.
    """

    model_type = "latentforge_autoencoder"

    vocab_size: int = 32000
    patch_size: int = 8
    latent_size: int | None = None
    hidden_size: int = 512
    intermediate_size: int = 1280
    num_encoder_layers: int = 2
    num_decoder_layers: int = 2
    token_dropout: int | float = 0.15
    latent_dropout: int | float = 0.15
    kl_weight: int | float = 1e-3
    kl_clamp: int | float = 0.5
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        check_fields(kwargs, self.__dataclass_fields__)
        if self.latent_size is None:
            self.latent_size = 32 * self.patch_size
        super().__post_init__(**kwargs)

    def validate_sizes(self):
        for name in (
            "vocab_size",
            "patch_size",
            "latent_size",
            "hidden_size",
            "intermediate_size",
            "num_encoder_layers",
            "num_decoder_layers",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")

    def validate_objective(self):
        for name in ("token_dropout", "latent_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is a probability below 1, got {getattr(self, name)}.")
        for name in ("kl_weight", "kl_clamp"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")


__all__ = ["LatentForgeAutoencoderConfig"]
