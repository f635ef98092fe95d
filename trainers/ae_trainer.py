"""Trainer of the codec."""

from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from .ae_config import AEConfig
from .base_trainer import IGNORE_INDEX, LatentTrainer
from .evaluation.reconstruction import ReconstructionCounts, count_reconstructed


class AETrainer(LatentTrainer):
    """Trains [`LatentForgeAutoencoder`] (CALM, arXiv 2510.27688, section 3).

    The log names `reconstruction` (times K) and `kl`. Evaluation adds `eval_nll` (nats per token, given the posterior
    mean) and, free-running, `eval_token_accuracy` and `eval_patch_accuracy`, the same at each level of
    `args.eval_noise` as `eval_token_accuracy_noise0.3`; tokens whose label is -100 are not asked for.
    """

    args: AEConfig
    part_names = ("reconstruction", "kl")

    def __init__(self, model: nn.Module | None = None, args: AEConfig | None = None, **kwargs: Any):
        super().__init__(model=model, args=args if args is not None else AEConfig(), **kwargs)
        self._noise: torch.Generator | None = None
        self._evaluates = False

    def asked_labels(self, inputs: dict[str, Any]) -> torch.Tensor:
        """In training also the padding of patches that hold text: generation decodes such patches whole."""
        labels, mask = inputs["labels"], inputs.get("attention_mask")
        if self._evaluates or mask is None:
            return labels
        patch_size = self.model.config.patch_size
        holds_text = (mask != 0).unflatten(1, (-1, patch_size)).any(-1).repeat_interleave(patch_size, dim=1)
        return torch.where((mask == 0) & holds_text, inputs["input_ids"], labels)

    def count_items(self, labels: torch.Tensor) -> torch.Tensor:
        return (labels != IGNORE_INDEX).sum()  # not shifted: a codec gives back every token, the first too

    def part_weights(self) -> dict[str, float]:
        return {"reconstruction": 1.0, "kl": float(self.model.config.kl_weight)}

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._noise = torch.Generator().manual_seed(self.args.seed + self.args.process_index)
        self._evaluates = True
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            self._evaluates = False

    def evaluate_batch(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, float]:
        asked = inputs["labels"] != IGNORE_INDEX
        codec = self.accelerator.unwrap_model(model)
        sums: dict[str, float] = {}
        for sigma in self._levels():
            counts = count_reconstructed(codec, inputs["input_ids"], asked, sigma, self._noise)
            sums.update({f"{name}@{sigma:g}": value for name, value in vars(counts).items()})
        return sums

    def evaluation_metrics(self, sums: dict[str, float], num_items: float) -> dict[str, float]:
        metrics = {"nll": sums["reconstruction"] / num_items / self.model.config.patch_size}
        for sigma in self._levels():
            names = vars(ReconstructionCounts())
            counts = ReconstructionCounts(**{name: int(sums[f"{name}@{sigma:g}"]) for name in names})
            suffix = f"_noise{sigma:g}" if sigma else ""
            metrics.update({f"{name}{suffix}": value for name, value in counts.accuracy().items()})
        return metrics

    def _levels(self) -> list[float]:
        return list(dict.fromkeys([0.0, *self.args.eval_noise]))
