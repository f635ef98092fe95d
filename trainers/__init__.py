"""What makes and judges the weights: trainers, data, losses, teachers, evaluation."""

from .ae_config import AEConfig
from .ae_trainer import AETrainer
from .arguments import parse_arguments
from .base_trainer import LatentTrainer, LatentTrainingConfig
from .callbacks import TeacherCallback
from .data import DataArguments, PatchCollator, load_blocks, load_texts
from .kd_config import KDConfig
from .kd_trainer import KDTrainer
from .token_lm import TokenLMConfig, TokenLMTrainer, build_token_lm
from .tokenizer import train_tokenizer


__all__ = [
    "AEConfig",
    "AETrainer",
    "DataArguments",
    "KDConfig",
    "KDTrainer",
    "LatentTrainer",
    "LatentTrainingConfig",
    "PatchCollator",
    "TeacherCallback",
    "TokenLMConfig",
    "TokenLMTrainer",
    "build_token_lm",
    "load_blocks",
    "load_texts",
    "parse_arguments",
    "train_tokenizer",
]
