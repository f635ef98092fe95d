"""Arguments of [`IdeaTrainer`]."""

from dataclasses import dataclass, field

from .wire_config import WireConfig


@dataclass
class IdeaConfig(WireConfig):
    """[`WireConfig`] plus the stages of an idea model: first what an idea says, then what a text's idea is, and then
    how one follows from another.

    Raises:
        ValueError: as [`WireConfig`]; a negative number, a number of latents to draw.
    """

    output_dir: str | None = field(default="checkpoints/idea", metadata={"help": "Where the model goes."})
    align_steps: int = field(
        default=0, metadata={"help": "In the first so many steps the bridge alone learns, to say the text itself."}
    )
    encoder_steps: int = field(
        default=0, metadata={"help": "In so many steps after them encoder and bridge do; nothing is thought yet."}
    )
    repeat_tokens: int = field(
        default=32, metadata={"help": "Tokens of a text that are said again in these two stages."}
    )
    middle_alone: bool = field(
        default=False, metadata={"help": "Afterwards the middle model alone learns. Default: all that may."}
    )
    train_backbone: bool = field(default=False, metadata={"help": "The encoder's backbone learns too."})
    steps_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the texts of single steps, where examples have them (cross-entropy)."},
    )
    sample_outputs: int = field(
        default=3, metadata={"help": "At each evaluation so many held-out texts are answered, into samples.jsonl."}
    )
    sample_tokens: int = field(default=48, metadata={"help": "Of such an answer, at most."})

    def check(self) -> None:
        super().check()
        for name in ("align_steps", "encoder_steps", "steps_weight", "sample_outputs"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        for name in ("repeat_tokens", "sample_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.min_latents is not None:
            raise ValueError(
                f"min_latents ({self.min_latents}) draws numbers of latents, and an idea model thinks with all of its "
                "ideas: leave it out."
            )
