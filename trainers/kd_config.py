"""Arguments of [`KDTrainer`]."""

from dataclasses import dataclass, field
from typing import Literal

from .base_trainer import LatentTrainingConfig


WEIGHTS = ("ce_weight", "kd_weight", "mse_weight", "energy_weight")


@dataclass
class KDConfig(LatentTrainingConfig):
    """`TrainingArguments` plus the weights of a student's loss parts, each in nats (or squared latent units) per
    predicted token.

    Raises:
        ValueError: a negative weight, all weights zero, a temperature that is not above 0, or not 1 across tokenizers,
            an unknown `teacher_away`.
    """

    ce_weight: float = field(default=1.0, metadata={"help": "Weight of the text's own tokens (cross-entropy)."})
    kd_weight: float | None = field(
        default=None,
        metadata={"help": "Weight of the teacher's distributions (KL). Default: 1 with a teacher, 0 without."},
    )
    mse_weight: float = field(default=0.0, metadata={"help": "Weight of the distance to the codec's latent."})
    energy_weight: float | None = field(
        default=None, metadata={"help": "Weight of the energy score. Default: 1 for an energy head, 0 for any other."}
    )
    kd_temperature: float = field(
        default=1.0,
        metadata={
            "help": "Both distributions are taken at this temperature; other than 1 needs a teacher with full logits."
        },
    )
    kd_alignment: Literal["none", "bytes"] = field(
        default="none",
        metadata={
            "help": "bytes: the teacher has another tokenizer, and likelihoods of the pieces of text that both have "
            "in common are matched (arXiv 2503.20083). none: such a teacher is refused."
        },
    )
    teacher_prefetch: int | None = field(
        default=None,
        metadata={
            "help": "Batches that threads ask the teacher about ahead of time. Default: 4 for a remote teacher, 0 "
            "for a local one."
        },
    )
    teacher_away: str = field(
        default="stop",
        metadata={
            "help": "When a remote teacher stays away: stop (write a checkpoint, then raise) or continue (without it; "
            "kd_coverage in the log says for how much of the text).",
            "choices": ["stop", "continue"],
        },
    )
    codec_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder where the codec's encoding of each training block is kept: later epochs and runs on the "
            "same blocks do not ask the codec again. Pays where mse_weight, energy_weight or input_mode latents ask a "
            "codec that is large beside the student; a latent number takes 4 bytes (bf16: 2), with energy twice. "
            "Default: encoded at every step."
        },
    )

    def __post_init__(self):
        for name in WEIGHTS:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}: set it to 0 to leave that part out.")
        if all(getattr(self, name) == 0 for name in WEIGHTS):
            raise ValueError(
                "All loss weights are 0, nothing would be learned: set ce_weight, kd_weight, mse_weight or "
                "energy_weight above 0."
            )
        if not self.kd_temperature > 0:
            raise ValueError(
                f"kd_temperature must be above 0, got {self.kd_temperature}: 1 takes the distributions as they are."
            )
        if self.kd_alignment not in ("none", "bytes"):
            raise ValueError(f"kd_alignment must be none or bytes, got {self.kd_alignment!r}.")
        if self.kd_alignment == "bytes" and self.kd_temperature != 1:
            raise ValueError(
                f"kd_temperature is {self.kd_temperature}, and likelihoods of text (kd_alignment bytes) are those at "
                "temperature 1: set it to 1."
            )
        if self.teacher_prefetch is not None and self.teacher_prefetch < 0:
            raise ValueError(
                f"teacher_prefetch must not be negative, got {self.teacher_prefetch}: 0 asks the teacher batch by "
                "batch."
            )
        if self.teacher_away not in ("stop", "continue"):
            raise ValueError(f"teacher_away must be `stop` or `continue`, got {self.teacher_away!r}.")
        super().__post_init__()
