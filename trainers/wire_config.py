"""Arguments of [`WireTrainer`]."""

from dataclasses import dataclass, field

from .base_trainer import LatentTrainingConfig


@dataclass
class WireConfig(LatentTrainingConfig):
    """`TrainingArguments` plus what a wire learns by: parts in nats per token of the answer, all examples alike.

    Raises:
        ValueError: a negative weight, nothing to learn, a temperature that is not above 0, a `min_latents` below 1.
    """

    answer_weight: float = field(default=1.0, metadata={"help": "Weight of the answers (cross-entropy)."})
    first_token_weight: float = field(
        default=0.0, metadata={"help": "What an answer's first token counts more than the others, which count 1."}
    )
    answer_tokens: int | None = field(default=None, metadata={"help": "Only the first so many tokens count."})
    kd_weight: float = field(
        default=0.0, metadata={"help": "Weight of the KL to the same receiver that reads the text itself."}
    )
    kd_temperature: float = field(default=1.0, metadata={"help": "Of both distributions."})
    min_latents: int | None = field(
        default=None,
        metadata={
            "help": "Each step draws a number of latents between this and all, so that one checkpoint serves every "
            "length. Default: always all."
        },
    )
    diagnose_steps: int = field(
        default=0,
        metadata={"help": "Every so many steps, norms of each part's gradient go to diagnostics.jsonl; 0: never."},
    )

    def __post_init__(self):
        for name in ("answer_weight", "first_token_weight", "kd_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not self.answer_weight and not self.kd_weight:
            raise ValueError("answer_weight and kd_weight are both 0, nothing would be learned: raise one.")
        if not self.kd_temperature > 0:
            raise ValueError(f"kd_temperature must be above 0, got {self.kd_temperature}.")
        for name in ("answer_tokens", "min_latents"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.remove_unused_columns = False  # texts are no tensors that a signature names
        super().__post_init__()
