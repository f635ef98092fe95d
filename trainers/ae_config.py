"""Arguments of [`AETrainer`]."""

from dataclasses import dataclass, field

from .base_trainer import LatentTrainingConfig


@dataclass
class AEConfig(LatentTrainingConfig):
    """`TrainingArguments` plus what a codec's training asks for.

    Raises:
        ValueError: a negative noise level.
    """

    eval_noise: list[float] = field(
        default_factory=lambda: [0.3],
        metadata={
            "help": "Standard deviations of noise on the latent at which evaluation reconstructs too; 0 is always "
            "measured."
        },
    )

    def __post_init__(self):
        for sigma in self.eval_noise:
            if sigma < 0:
                raise ValueError(f"eval_noise holds standard deviations, none may be negative: got {self.eval_noise}.")
        super().__post_init__()
