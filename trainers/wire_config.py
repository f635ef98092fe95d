"""Arguments of [`WireTrainer`]."""

from dataclasses import dataclass, field

from .base_trainer import LatentTrainingConfig


@dataclass
class WireConfig(LatentTrainingConfig):
    """`TrainingArguments` plus what a wire learns by: parts in nats per token of the answer, all examples alike.

    Raises:
        ValueError: a negative weight, nothing to learn, a temperature that is not above 0, a number below 1, a sampler
            of token ids.
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
    gist_weight: float = field(
        default=0.0, metadata={"help": "Weight of the text's own beginning, written by the receiver (cross-entropy)."}
    )
    gist_target_len: int = field(default=48, metadata={"help": "Tokens of that beginning."})
    repeat_prompt: str = field(
        default="\nThe text again:",
        metadata={
            "help": "Asks for the text itself: with gist_weight, and where text is both continued and repeated."
        },
    )
    align_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of the distance between a message's vectors and its answer's embeddings (ablation)."
        },
    )
    text_warmup_steps: int = field(
        default=0,
        metadata={
            "help": "In the first so many steps every other one reads the text itself, and teaches what learns from "
            "that: LoRA, align_weight."
        },
    )
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
    elastic: bool = field(
        default=False,
        metadata={
            "help": "Fit per_device_train_batch_size to the free memory, with more accumulation for the same step; "
            "where memory runs out all the same, go on with fewer rows."
        },
    )
    debug: str = field(
        default="",
        metadata={"help": "Alone or `true`: stop where a number overflows (underflow_overflow).", "nargs": "?"}
        | {"const": "underflow_overflow"},
    )

    def __post_init__(self):
        self.check()
        self.debug = {"true": "underflow_overflow", "false": ""}.get(str(self.debug).lower(), self.debug)
        if self.elastic:
            self.auto_find_batch_size = True
        self.remove_unused_columns = False  # texts are no tensors that a signature names
        super().__post_init__()

    def check(self) -> None:
        """Raises ValueError, see above; once more where a field was changed."""
        weights = ("answer_weight", "kd_weight", "gist_weight", "align_weight")
        for name in (*weights, "first_token_weight", "text_warmup_steps"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not any(getattr(self, name) for name in weights):
            raise ValueError(f"{', '.join(weights)} are all 0, nothing would be learned: raise one.")
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy batch_rebalance counts token ids, and examples here are texts: take "
                "group_by_length."
            )
        if not self.kd_temperature > 0:
            raise ValueError(f"kd_temperature must be above 0, got {self.kd_temperature}.")
        for name in ("answer_tokens", "min_latents", "gist_target_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
