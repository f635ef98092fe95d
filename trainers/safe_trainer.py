"""A Trainer that loses nothing: checkpoints that are whole or not there, and steps that are numbers or not taken."""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from .checkpoints import (
    SAVING,
    STATE,
    check_checkpoint,
    is_write_error,
    last_checkpoint,
    put_in_place,
    rotate,
    seal,
    write_failed,
)
from .nonfinite import NonFiniteGuard


class SafeTrainer(Trainer):
    """HF Trainer, with faults in mind.

    * A checkpoint is written beside the others, sealed with sums, and renamed (`checkpoints.py`); older ones are
      removed after that. A disk that is full ends training and leaves the earlier ones as they are.
    * `resume_from_checkpoint=True` takes the newest that is whole, a folder must be.
    * A step whose loss or gradient is not finite ends training, with its batch kept, or is left out and counted
      (`args.nonfinite_loss`, `nonfinite.py`). DeepSpeed's engine holds its own gradients: there the losses are seen.

    Raises:
        ValueError: from `train`, where there is no whole checkpoint to resume from, and where a step is not finite.
        OSError: from `train`, where a checkpoint cannot be written.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._is_saving = False
        self.guard = NonFiniteGuard(self)
        self.add_callback(self.guard)

    # -- steps

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is True:
            folder = str(self.args.output_dir)
            resume_from_checkpoint = last_checkpoint(folder)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"There is no whole checkpoint in {folder} to resume from: begin anew, without "
                    "resume_from_checkpoint, or pass another output_dir."
                )
        elif resume_from_checkpoint:
            check_checkpoint(resume_from_checkpoint)
        self.guard.begin()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.guard.watch(inputs, super().training_step(model, inputs, *args, **kwargs))

    def begin_step(self) -> None:
        """A step begins: remember what a step that is left out must not change."""

    def take_back_step(self) -> None:
        """The step is left out."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.guard.correct(logs)
        super().log(logs, *args, **kwargs)

    # -- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / SAVING) if self._is_saving else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._is_saving:  # it goes on in the background, and the folder is about to be renamed
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        try:
            super().save_model(output_dir, _internal_call)
        except Exception as error:
            if self._is_saving or not is_write_error(error):
                raise
            raise write_failed(error, "The model", Path(str(self.args.output_dir))) from error

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        root = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staged, final = root / SAVING / name, root / name
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            self._name_best(root, staged)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seal(staged)
                put_in_place(staged, final)
        except Exception as error:
            if not is_write_error(error):
                raise
            shutil.rmtree(staged, ignore_errors=True)
            raise write_failed(error, name, root) from error
        finally:
            self._is_saving = False
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate(root, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _name_best(self, root: Path, staged: Path) -> None:
        best = self.state.best_global_step
        if not best:
            return
        # transformers looked for it, and for this one, among what is being written
        if best == self.state.global_step or (root / f"checkpoint-{best}").is_dir():
            self.state.best_model_checkpoint = str(root / f"checkpoint-{best}")
        if self.args.should_save:
            self.state.save_to_json(str(staged / STATE))
