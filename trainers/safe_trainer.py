"""A Trainer that loses nothing: checkpoints that are whole or not there, steps that are numbers or not taken, streams
that go on where they were."""

import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import seed_worker

from .checkpoints import (
    SAVING,
    STATE,
    check_agreement,
    check_checkpoint,
    is_write_error,
    last_checkpoint,
    numbers_only,
    put_in_place,
    recover,
    rotate,
    seal,
    write_failed,
)
from .nonfinite import NonFiniteGuard
from .preemption import StopOnSignal, TrainingStopped
from .streaming import POSITION_KEY, PackedStream, Position


class SafeTrainer(Trainer):
    """HF Trainer, with faults in mind.

    * A checkpoint is written beside the others, sealed with sums, and renamed (`checkpoints.py`); older ones are
      removed after that. A disk that is full ends training and leaves the earlier ones as they are.
    * `resume_from_checkpoint=True` takes the newest that is whole, a folder must be. Nothing of FSDP's shares is run.
    * A step whose loss or gradient is not finite ends training, with its batch kept, or is left out and counted
      (`args.nonfinite_loss`, `nonfinite.py`). DeepSpeed's engine holds its own gradients: there the losses are seen.
    * SIGUSR1 ends training after the running step, with a checkpoint (`preemption.py`): what runs until then loses
      nothing where a cluster takes its machine back.
    * A [`PackedStream`] goes on exactly where the checkpoint was (`streaming.py`).

    Raises:
        TrainingStopped: from `train`, after SIGUSR1.
        ValueError: from `train`, where there is no whole checkpoint to resume from or processes find different ones,
            and where a step is not finite.
        OSError: from `train`, where a checkpoint cannot be written.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._is_saving = False
        self._stream: PackedStream | None = None
        self._begins_anew = self._skips_by_itself = self._resumed = False
        self._second_pass: Iterator[Any] | None = None
        self._read: tuple[int, dict[int, Position]] = (0, {})  # since which step, up to where, by worker
        self._stop: StopOnSignal | None = None
        self.guard = NonFiniteGuard(self)
        self.add_callback(self.guard)

    # -- steps

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        resume_from_checkpoint = self._same_for_all(resume_from_checkpoint)
        self.guard.begin()
        stop = self._stop = StopOnSignal(self.accelerator)
        self.add_callback(stop)
        try:
            with stop:
                output = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.remove_callback(stop)
        if stop.stops:
            checkpoint = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            raise TrainingStopped(str(checkpoint), self.end)
        return output

    def _same_for_all(self, asked: str | bool | None) -> str | None:
        """The whole checkpoint to go on from, None to begin; every process looks for itself, and all must agree."""
        folder, found, error = str(self.args.output_dir), None, None
        try:
            if asked is True:
                found = last_checkpoint(folder)
                if found is None:
                    raise ValueError(
                        f"There is no whole checkpoint in {folder} to resume from: begin anew, without "
                        "resume_from_checkpoint, or pass another output_dir."
                    )
            elif asked:
                check_checkpoint(asked)
                found = str(asked)
        except ValueError as caught:  # the others wait to be told
            error = caught
        told = gather_object([found]) if self.args.world_size > 1 else [found]
        if error is not None:
            raise error
        check_agreement(told)
        return found

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.guard.watch(inputs, super().training_step(model, inputs, *args, **kwargs))

    def begin_step(self) -> None:
        """A step begins: remember what a step that is left out must not change."""

    def take_back_step(self) -> None:
        """The step is left out."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        self.guard.correct(logs)
        super().log(logs, *args, **kwargs)

    # -- streams

    def get_train_dataloader(self) -> DataLoader:
        """Of a [`PackedStream`], this process's share; of any other set as in transformers."""
        if not isinstance(self.train_dataset, PackedStream):
            return super().get_train_dataloader()
        args = self.args
        self._stream = self.train_dataset.for_process(args.process_index, args.world_size)
        # to go on is the stream's affair; transformers would read everything again and throw it away
        self._begins_anew = args.ignore_data_skip and not self._skips_by_itself
        args.ignore_data_skip = self._skips_by_itself = True
        self._second_pass = None
        return DataLoader(
            self._stream,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> Any:
        if self._stream is not None and resume_from_checkpoint is not None and not self._begins_anew:
            self._stream.load(self._position_file(resume_from_checkpoint), self.args.dataloader_num_workers)
            self._resumed = True
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Any]:
        """As in transformers. Where a stream ends, processes that have no more get rows that ask for nothing: shares
        are not of equal length, and all must take part in every step."""
        if self._stream is None:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        self._keep_position()
        batches, most = self._read_on(self._second_pass or epoch_iterator, num_batches, device)
        if not most:
            self._stream.next_pass()
            if self._resumed:  # at the very end: an epoch without a step would end the training
                self._second_pass = iter(self.callback_handler.train_dataloader)
                batches, most = self._read_on(self._second_pass, num_batches, device)
            else:
                self._second_pass = None
                self.control.should_epoch_stop = True
        self._resumed = False
        while most and len(batches) < num_batches:  # fewer would leave their gradient to the next step
            batches.append(self.data_collator([self._stream.empty_row()]))
        return batches, self._get_num_items_in_batch(batches, device)

    def _read_on(
        self, iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], int]:
        """(batches, how many the process with the most has)"""
        batches = list(islice(iterator, num_batches))
        self._read = (self.state.global_step, {})
        for batch in batches:
            position = batch.pop(POSITION_KEY)
            self._read[1][position["worker"]] = position
        most = len(batches)
        if self.args.world_size > 1:
            most = int(self.accelerator.gather(torch.tensor([most], device=device)).max())
        return batches, most

    def _keep_position(self) -> None:
        step, positions = self._read
        if self._stream is not None and self.state.global_step > step:  # what was read was trained on
            self._stream.positions.update(positions)
            self._read = (self.state.global_step, {})

    def _position_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"stream_{self.args.process_index}.json"

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._stream is not None:
            self._keep_position()
            self._stream.save(self._position_file(output_dir), self.args.dataloader_num_workers)

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
            recover(root)
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
            rotate(root, self.args.save_total_limit, self.state.best_model_checkpoint, final)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        # save_strategy `best` saves by this alone, and would drop the checkpoint of a training that is stopped
        return super()._determine_best_metric(metrics, trial) or (self._stop is not None and self._stop.stops)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # with one to be kept, transformers now removes all but the best, in place: also what a stopped training is to
        # go on from, and killed in the middle it leaves half of one
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _name_best(self, root: Path, staged: Path) -> None:
        best = self.state.best_global_step
        if not best:
            return
        # transformers looked for it, and for this one, among what is being written
        if best == self.state.global_step or (root / f"checkpoint-{best}").is_dir():
            self.state.best_model_checkpoint = str(root / f"checkpoint-{best}")
        if self.args.should_save:
            self.state.save_to_json(str(staged / STATE))

    # -- reading them

    def _reading(self, checkpoint: str | None) -> AbstractContextManager[None]:
        return numbers_only(checkpoint) if self.is_fsdp_enabled and checkpoint is not None else nullcontext()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_best_model(self) -> None:
        with self._reading(self.state.best_model_checkpoint):
            super()._load_best_model()

    # -- the end

    def end(self) -> None:
        """Finish trackers and leave the process group; the last line of a script, for every process. The trainer can
        train no more."""
        # Gloo's threads need Python's lock to let go of the last collective's tensors. Destroying the group waits for
        # them without the lock; but where DistributedDataParallel is the last to hold the group, the group goes when
        # that does, with the lock held, and the process hangs for good (torch 2.13).
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()
