"""A loss or a gradient that is no number: stop with the batch kept, or leave the step out and count it."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


if TYPE_CHECKING:
    from .safe_trainer import SafeTrainer

logger = logging.getLogger(__name__)

MOST_IN_A_ROW = 20  # steps left out, after which nothing is learned any more


class NonFiniteGuard(TrainerCallback):
    """Looks at every step's losses and gradients before the optimizer does.

    Args:
        trainer: whose steps; its `args.nonfinite_loss` says what is done.

    Attributes:
        skipped: steps that were left out since the last line of the log.
    """

    def __init__(self, trainer: "SafeTrainer"):
        self.trainer = trainer
        self.begin()

    def begin(self) -> None:
        """A training begins."""
        self.skipped = 0
        self._taken_back = 0.0  # what other micro-batches of those steps added to the log's loss
        self._in_a_row = 0
        self._last_logged: int | None = None
        self._batches: list[dict[str, Any]] = []
        self._losses: list[torch.Tensor] = []

    def watch(self, inputs: dict[str, Any], loss: torch.Tensor) -> torch.Tensor:
        """Remember a micro-batch; the loss for the log, 0 in the place of what is no number."""
        if self._last_logged is None:
            self._last_logged = self.trainer.state.global_step
        self._batches.append(inputs)
        self._losses.append(loss.detach().float())
        return torch.where(loss.isfinite(), loss, torch.zeros_like(loss))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._batches, self._losses = [], []
        self.trainer.begin_step()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module, **kwargs: Any
    ) -> None:
        losses = torch.stack(self._losses)
        scales = getattr(self.trainer.accelerator, "scaler", None) is not None
        bad = ~losses.isfinite().all()
        if not scales:  # fp16's scaler meets infinite gradients by design, and leaves the step out itself
            bad = bad | ~_gradient_norm(model).isfinite().to(bad.device)
        if args.world_size > 1:  # or one process would stop, and another save what it learned from its gradient
            bad = self.trainer.accelerator.reduce(bad.float(), "sum") > 0
        if not bad:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        skips = getattr(args, "nonfinite_loss", "stop") == "skip"
        if not skips or self._in_a_row > MOST_IN_A_ROW:
            raise ValueError(self._explain(state.global_step + 1, losses.tolist(), self._keep(state, losses), skips))
        logger.warning("Step %d is left out: its losses are %s.", state.global_step + 1, losses.tolist())
        if not scales:
            for parameter in model.parameters():
                parameter.grad = None  # the optimizer passes over it: no moment moves, nothing decays
        self.skipped += 1
        self._taken_back += float(losses.nan_to_num(0.0, 0.0, 0.0).sum())
        self.trainer.take_back_step()

    def correct(self, logs: dict[str, float]) -> None:
        """Make the log's loss the mean over the steps that were learned from, and say how many were not."""
        step, last = self.trainer.state.global_step, self._last_logged
        if "loss" not in logs or last is None:
            return
        if self.skipped:
            steps, taken_back = step - last, torch.tensor(self._taken_back, device=self.trainer.args.device)
            kept, total = steps - self.skipped, float(self.trainer.accelerator.reduce(taken_back, "mean"))
            logs["loss"] = (logs["loss"] * steps - total) / kept if kept else float("nan")
            logs["skipped_steps"] = self.skipped
        self.skipped, self._taken_back, self._last_logged = 0, 0.0, step

    def _keep(self, state: TrainerState, losses: torch.Tensor) -> Path:
        args = self.trainer.args
        folder = Path(str(args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        # the text may be nobody else's: what begins with `_` is never pushed
        path = folder / f"_nonfinite-step-{state.global_step + 1}-process-{args.process_index}.safetensors"
        tensors, words = {}, {}
        for number, batch in enumerate(self._batches):
            for name, value in batch.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{number}.{name}"] = value.detach().cpu().contiguous().clone()
                elif isinstance(value, list) and all(isinstance(text, str) for text in value):
                    words[f"{number}.{name}"] = value
        metadata = {"step": str(state.global_step + 1), "losses": json.dumps([str(x) for x in losses.tolist()])}
        save_file(tensors, path, metadata | {"texts": json.dumps(words)})
        return path

    def _explain(self, step: int, losses: list[float], path: Path, skips: bool) -> str:
        finite = all(-float("inf") < loss < float("inf") for loss in losses)
        where = ", by micro-batch of this process"
        what = f"its losses are {losses}{where}" if not finite else f"a gradient is, with losses {losses}{where}"
        advice = "lower learning_rate, train in float32, or leave such steps out with --nonfinite_loss skip"
        if skips:
            advice = f"{MOST_IN_A_ROW} steps before it were left out already: lower learning_rate or mend the data"
        return (
            f"Step {step} is not finite: {what}. Its batch is kept in {path}, and no weight has changed since step "
            f"{step - 1}. Look at the batch; {advice}; --resume_from_checkpoint true goes on from the last checkpoint."
        )


def _gradient_norm(model: nn.Module) -> torch.Tensor:
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm: Any = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of shards
