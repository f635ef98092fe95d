"""Configuration of the idea model: text -> a few vectors -> thinking -> text."""

from typing import Any, Literal

from huggingface_hub.dataclasses import strict

from .configuration_wire import LatentForgeWireConfig


POOLINGS = ("mean", "queries")  # those that make as many ideas of every text
SEED = {
    "num_ideas": 1,
    "latent_size": 256,
    "compression_hidden": 512,
    "middle_hidden": 512,
    "middle_layers": 3,
    "prefix_len": 10,
}


@strict
class LatentForgeIdeaConfig(LatentForgeWireConfig):
    """Shape of [`LatentForgeIdea`]; what is not here is as in [`LatentForgeWireConfig`].

    Args:
        num_latents: ideas of a text, N; `num_ideas` is another word for it.
        pooling: `mean` (of N equal parts of the text; one part is all of it) or `queries`.
        num_pooling_layers: blocks in which the ideas look at all of the text.
        compression_hidden: width between the encoder's states and an idea; None: one linear map.
        middle_hidden, middle_layers: width of the middle model, and its linear maps.
        steps: how often it thinks, unless told otherwise.
        prefix_len: vectors that a receiver is given, made of all ideas.
        receiver: Hub id of the language model that reads; None where it is not on the Hub.

    Raises:
        ValueError: as [`LatentForgeWireConfig`]; a pooling whose number of vectors follows the text.
    """

    model_type = "latentforge_idea"
    attribute_map = {"num_ideas": "num_latents"}

    num_latents: int = 8
    pooling: Literal["ratio", "queries", "mean", "patches"] = "mean"
    num_pooling_layers: int = 0
    compression_hidden: int | None = 512
    middle_hidden: int = 512
    middle_layers: int = 3
    steps: int = 1
    prefix_len: int = 10
    receiver: str | None = "openai-community/gpt2"

    def __post_init__(self, **kwargs):
        self.num_latents = kwargs.pop("num_ideas", self.num_latents)
        super().__post_init__(**kwargs)

    @classmethod
    def seed(cls, **kwargs: Any) -> "LatentForgeIdeaConfig":
        """The shapes of the first Latent-Space Reasoning Model: one idea of 256 numbers from ModernBERT-base by
        768-512-256, a middle model of 256-512-512-256, ten vectors for GPT-2."""
        return cls(**{**SEED, **kwargs})

    def validate_idea(self):
        if self.pooling not in POOLINGS:
            raise ValueError(
                f"An idea model's `pooling` must be one of {', '.join(POOLINGS)}, which make as many ideas of every "
                f"text, got {self.pooling!r}."
            )
        for name in ("middle_hidden", "middle_layers", "prefix_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.compression_hidden is not None and self.compression_hidden < 1:
            raise ValueError(f"`compression_hidden` must be at least 1, or None, got {self.compression_hidden}.")
        if self.steps < 0:
            raise ValueError(f"`steps` must not be negative, got {self.steps}.")


__all__ = ["LatentForgeIdeaConfig"]
