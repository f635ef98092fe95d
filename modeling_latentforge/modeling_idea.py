"""The idea model: a text becomes a few vectors, which are thought about, and read out after any step.

B texts, N ideas, D latent size.

    texts -> LatentEncoder: means of N parts, MLP -> ideas (B, N, D)
    ideas -> middle model, `steps` times -> ideas (B, N, D)
    ideas -> prefix of a frozen language model -> text

It is a wire with one receiver, whose bridge makes all ideas into one prefix, and with a middle model behind the
encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from .configuration_idea import LatentForgeIdeaConfig
from .latent_receiver import Receiver, Template
from .modeling_wire import LatentForgeWire, LatentForgeWireOutput


KINDS = ("linear", "slerp")


@dataclass
class LatentForgeIdeaOutput(LatentForgeWireOutput):
    """`thoughts`: ideas `(B, N, D)` before the first step and after each; `last_hidden_state` is the last of them."""

    thoughts: tuple[torch.FloatTensor, ...] | None = None


class MiddleModel(nn.Module):
    """One step of thinking: `z + MLP(norm(z))` over all ideas of a text together.

    Args:
        size: N x D.
        hidden_size: width between.
        num_layers: linear maps, GELU between them.
    """

    def __init__(self, size: int, hidden_size: int, num_layers: int, eps: float):
        super().__init__()
        sizes = [size, *[hidden_size] * (num_layers - 1), size]
        self.norm = nn.RMSNorm(size, eps=eps)
        maps = [nn.Linear(first, second) for first, second in zip(sizes, sizes[1:], strict=False)]
        between = [part for layer in maps[:-1] for part in (layer, nn.GELU())]
        self.mlp = nn.Sequential(*between, maps[-1])

    def forward(self, ideas: torch.Tensor) -> torch.Tensor:
        """`(B, N, D)` -> `(B, N, D)`."""
        flat = ideas.flatten(1)
        return (flat + self.mlp(self.norm(flat))).view_as(ideas)


def interpolate(
    first: torch.Tensor, second: torch.Tensor, alpha: float, kind: Literal["linear", "slerp"] = "linear"
) -> torch.Tensor:
    """Ideas between two, `(..., D)`.

    Args:
        alpha: 0 is the first and 1 the second, to the bit.
        kind: `linear`, or `slerp`: along the arc between the directions of each pair of vectors (Shoemake, 1985);
            vectors without an arc between them, parallel or opposite ones, are interpolated linearly.

    Raises:
        ValueError: another kind, an alpha outside [0, 1].
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, got {kind!r}.")
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` must lie in [0, 1], got {alpha}: 0 is the first text, 1 the second.")
    if alpha in (0, 1):
        return (second if alpha else first).clone()
    linear = (1 - alpha) * first + alpha * second
    if kind == "linear":
        return linear
    cosine = nn.functional.cosine_similarity(first.double(), second.double(), dim=-1).clamp(-1, 1)[..., None]
    angle = cosine.acos()
    sine = angle.sin()
    arc = ((1 - alpha) * angle).sin() * first + (alpha * angle).sin() * second
    return torch.where(sine > 1e-6, arc / sine.clamp(min=1e-6), linear.double()).to(first.dtype)


class LatentForgeIdea(LatentForgeWire):
    """See the drawing at the top of the file.

    idea = LatentForgeIdea(LatentForgeIdeaConfig())
    idea.attach_tokenizer(tokenizer)
    idea.add_receiver("gpt2", Receiver(model, its_tokenizer))
    idea.generate("a long text")
    [idea.read(z) for z in idea.think(idea.get_latent_vector("a long text", steps=0), steps=3)]
    """

    config_class = LatentForgeIdeaConfig
    base_model_prefix = "idea"

    def __init__(self, config: LatentForgeIdeaConfig):
        super().__init__(config)
        if config.compression_hidden is not None:
            sizes = config.encoder_config.hidden_size, config.compression_hidden, config.latent_size
            self.encoder.to_latent = nn.Sequential(nn.Linear(*sizes[:2]), nn.GELU(), nn.Linear(*sizes[1:]))
        self.middle = MiddleModel(
            config.num_latents * config.latent_size, config.middle_hidden, config.middle_layers, config.rms_norm_eps
        )
        self.post_init()

    def add_receiver(self, name: str, receiver: Receiver, **bridge: Any) -> None:
        """As of a wire; the bridge is a soft one of `prefix_len` vectors unless `bridge` says otherwise."""
        if bridge.get("mode", "soft") == "soft":
            bridge = {"prefix_len": self.config.prefix_len, **bridge}
        super().add_receiver(name, receiver, **bridge)

    # -- text -> ideas

    def _encode(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None,
        num_latents: int | None,
        quantized: bool,
        steps: int | None = None,
        **kwargs: Any,
    ) -> LatentForgeIdeaOutput:
        if num_latents not in (None, self.config.num_latents):
            raise ValueError(
                f"`num_latents` is {num_latents}, and this model thinks with all its {self.config.num_latents} ideas: "
                "leave it out."
            )
        output = super()._encode(input_ids, attention_mask, None, quantized=False)
        thoughts = self.think(output.last_hidden_state, steps)
        if quantized:
            thoughts = [self.quantizer(ideas) for ideas in thoughts]
        return LatentForgeIdeaOutput(
            last_hidden_state=thoughts[-1], latent_mask=output.latent_mask, thoughts=tuple(thoughts)
        )

    def encode(
        self, texts: Sequence[str], num_latents: int | None = None, steps: int | None = None
    ) -> LatentForgeIdeaOutput:
        """[`forward`] of texts.

        Args:
            num_latents: all, or None.
            steps: of thinking; default: the config's.
        """
        return self(*self.ids_of(texts), num_latents=num_latents, steps=steps)

    def think(self, ideas: torch.Tensor, steps: int | None = None) -> list[torch.Tensor]:
        """The ideas as they are, and after each of `steps` steps: `steps + 1` tensors of their shape, `(B, N, D)`, or
        `(N, D)` or `(D,)` of one text.

        Raises:
            ValueError: a negative number of steps, ideas of another shape.
        """
        steps = self.config.steps if steps is None else steps
        if steps < 0:
            raise ValueError(f"`steps` must not be negative, got {steps}.")
        shape = ideas.shape
        ideas = self._ideas(ideas)
        thoughts = [ideas]
        for _ in range(steps):
            thoughts.append(self.middle(thoughts[-1]))
        return [found.view(shape) for found in thoughts]

    def _ideas(self, ideas: torch.Tensor) -> torch.Tensor:
        """As `(B, N, D)`, where the model is."""
        sizes = (self.config.num_latents, self.config.latent_size)
        known = ideas.shape[-2:] == sizes or (sizes[0] == 1 and ideas.shape == sizes[1:])
        if ideas.ndim > 3 or not known:
            raise ValueError(
                f"Ideas have the shape {tuple(ideas.shape)}, this model's are (B, {sizes[0]}, {sizes[1]})."
            )
        return ideas.to(self.device, self.dtype).reshape(-1, *sizes)

    @torch.no_grad()
    def get_latent_vector(self, text: str, steps: int | None = None) -> torch.Tensor:
        """What the model makes of a text and of thinking about it, on the CPU: `(D,)` of a model of one idea, `(N, D)`
        of one of several."""
        ideas = self.encode([text], steps=steps).last_hidden_state[0].cpu()
        return ideas[0] if len(ideas) == 1 else ideas

    # -- ideas -> text

    def _reader(self, receiver: str | None) -> str:
        names = list(self.receivers)
        if receiver is None and len(names) > 1:
            raise ValueError(f"There are several receivers, {', '.join(names)}: say which one reads.")
        name = receiver or (names[0] if names else next(iter(self.bridges), "none"))
        self.receiver(name)  # says what is attached
        return name

    @torch.no_grad()
    def read(
        self,
        ideas: torch.Tensor,
        prompts: Sequence[str] | None = None,
        *,
        receiver: str | None = None,
        **options: Any,
    ) -> list[str]:
        """The text of any ideas, as they are: nothing thinks about them any more.

        Args:
            ideas: `(B, N, D)`, or `(N, D)` or `(D,)` of one text.
            prompts: behind each message; default: none.
            receiver: who reads; default: the one that is attached.
            options: for `generate` of transformers; default: greedy, at most 128 tokens.

        Raises:
            ValueError: ideas of another shape, no receiver.
        """
        ideas = self._ideas(ideas)
        message = LatentForgeWireOutput(ideas, ideas.new_ones(ideas.shape[:2]).bool())
        given = {"max_new_tokens": 128, "do_sample": False, **options}
        prompts = [""] * len(ideas) if prompts is None else prompts
        return super().generate(self._reader(receiver), message, prompts, **given)

    def generate_batch(
        self,
        texts: Sequence[str],
        prompts: Sequence[str] | None = None,
        *,
        steps: int | None = None,
        receiver: str | None = None,
        **options: Any,
    ) -> list[str]:
        """What the model says to each text; arguments as of [`encode`] and [`read`]."""
        with torch.no_grad():
            ideas = self.encode(texts, steps=steps).last_hidden_state
        return self.read(ideas, prompts, receiver=receiver, **options)

    def generate(self, text: str, prompt: str = "", **options: Any) -> str:  # type: ignore[override]  # text to text
        """[`generate_batch`] of one text."""
        return self.generate_batch([text], [prompt], **options)[0]

    def interpolate_and_generate(
        self,
        first: str,
        second: str,
        alpha: float = 0.5,
        kind: Literal["linear", "slerp"] = "linear",
        *,
        steps: int | None = None,
        **options: Any,
    ) -> str:
        """The text between two: alpha 0 gives the first's text and 1 the second's; see [`interpolate`]."""
        ends = self.get_latent_vector(first, steps), self.get_latent_vector(second, steps)
        return self.read(interpolate(ends[0], ends[1], alpha, kind), **options)[0]


__all__ = ["LatentForgeIdea", "LatentForgeIdeaOutput", "Receiver", "Template", "interpolate"]
