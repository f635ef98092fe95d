"""A training that is asked to stop: SIGUSR1, a checkpoint, an end that can be gone on from."""

import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrainingStopped(Exception):
    """Training was asked to stop, and kept a checkpoint.

    Attributes:
        checkpoint: its folder.
        end: leaves the process group; to be called before the process ends.
    """

    def __init__(self, checkpoint: str, end: Callable[[], None]):
        self.checkpoint, self.end = checkpoint, end
        super().__init__(
            f"training was asked to stop (SIGUSR1); it is kept in {checkpoint}: go on with the same command and "
            "--resume_from_checkpoint true (or auto, which begins anew where there is none)"
        )


class StopOnSignal(TrainerCallback, AbstractContextManager):
    """While it is entered, SIGUSR1 makes training end after the running step, with a checkpoint.

    All processes agree before they stop: a signal reaches them in different steps, and a checkpoint needs all.
    transformers' own `enable_jit_checkpoint` (SIGTERM) lets each process stop by itself, and saves between a backward
    and its optimizer step.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.asked = self.stops = False
        self._before: Any = None

    def __enter__(self) -> "StopOnSignal":
        # only the main thread may have handlers, and Windows has no such signal
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGUSR1"):
            self._before = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)
            self._before = None

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        asked = self.asked
        if args.world_size > 1:
            asked = bool(self.accelerator.reduce(torch.tensor(float(asked), device=args.device), "sum"))
        if asked and state.global_step < state.max_steps:
            self.stops = control.should_save = control.should_training_stop = True
