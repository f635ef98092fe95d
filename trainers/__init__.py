"""What makes and judges the weights: trainers, data, losses, teachers, evaluation."""

try:
    import accelerate as _accelerate
    import datasets as _datasets
    import yaml as _yaml
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"Training needs the package {error.name!r} of the extra `train`: pip install 'latentforge[train]'.",
        name=error.name,
    ) from error

from .ae_config import AEConfig
from .ae_trainer import AETrainer
from .arguments import parse_arguments
from .base_trainer import LatentTrainer, LatentTrainingConfig
from .callbacks import TeacherCallback
from .data import DataArguments, PatchCollator, load_blocks, load_texts
from .idea_config import IdeaConfig
from .idea_trainer import IdeaCollator, IdeaTrainer
from .kd_config import KDConfig
from .kd_trainer import KDTrainer
from .token_lm import TokenLMConfig, TokenLMTrainer, build_token_lm
from .tokenizer import train_tokenizer
from .wire_config import WireConfig
from .wire_trainer import WireCollator, WireTrainer


del _accelerate, _datasets, _yaml

__all__ = [
    "AEConfig",
    "AETrainer",
    "DataArguments",
    "IdeaCollator",
    "IdeaConfig",
    "IdeaTrainer",
    "KDConfig",
    "KDTrainer",
    "LatentTrainer",
    "LatentTrainingConfig",
    "PatchCollator",
    "TeacherCallback",
    "TokenLMConfig",
    "TokenLMTrainer",
    "WireCollator",
    "WireConfig",
    "WireTrainer",
    "build_token_lm",
    "load_blocks",
    "load_texts",
    "parse_arguments",
    "train_tokenizer",
]
