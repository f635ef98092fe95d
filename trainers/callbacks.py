"""`TeacherCallback`: owns a teacher from the first health check to its last word."""

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .teachers.base import Teacher, TeacherSignal
from .teachers.flow import TeacherUnavailable


logger = logging.getLogger(__name__)

SIGNAL_KEY = "teacher_signal"


class TeacherCallback(TrainerCallback):
    """Checks the teacher when training begins, gives every batch its signal, and closes the teacher when training
    ends, also when it raises.

    [`KDTrainer`] builds one around its `teacher`. The signal arrives in the batch under `teacher_signal`.

    Args:
        teacher: what to own.
        prefetch: batches whose signal is computed ahead of the training, by as many threads as the teacher allows
            (`capabilities.parallel_calls`). The signals are the same, and so is the result; it pays where the teacher
            waits for a network. A local model would only fight the student for the same cores.
        away: what a teacher that stays away ([`TeacherUnavailable`]) does: `stop` raises, `continue` goes on without
            its signal, batch by batch until it answers again. [`KDTrainer`] writes a checkpoint before it lets the
            error out.

    Raises:
        ValueError: another `away`.

    Attributes:
        close_after_training: set to False where an evaluation after the training asks the teacher too; then the caller
            closes.
    """

    def __init__(self, teacher: Teacher, prefetch: int = 0, away: str = "stop"):
        if away not in ("stop", "continue"):
            raise ValueError(f"away must be `stop` or `continue`, got {away!r}.")
        self.teacher = teacher
        self.prefetch = prefetch
        self.away = away
        self.closed = False
        self.close_after_training = True
        self._said_away = False
        self._worker: ThreadPoolExecutor | None = None
        self._pending: set[Future[TeacherSignal]] = set()

    # -- life

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.closed:
            raise RuntimeError(
                "The teacher was closed at the end of an earlier training: build a new teacher and a new trainer."
            )
        if hasattr(self.teacher, "to"):
            self.teacher.to(args.device)
        self.teacher.check()
        if self.prefetch:
            threads = min(self.prefetch + 1, self.teacher.capabilities.parallel_calls)
            self._worker = ThreadPoolExecutor(max_workers=threads, thread_name_prefix="teacher")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.drain()
        statistics = getattr(self.teacher, "statistics", None)
        if statistics is not None:
            logger.info("KD store, this process: %s", statistics.describe())
            state.log_history.append(
                {"step": state.global_step, **{f"kd_store_{name}": value for name, value in vars(statistics).items()}}
            )
        if self.close_after_training:
            self.close()

    def on_train_failed(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # the failure of training is what the user must read, not one of closing on top of it
        try:
            self.close()
        except Exception:
            logger.exception("Closing the teacher failed too.")

    def drain(self) -> None:
        """Take back the questions that wait, and let the running one finish; its answer, and its failure, is
        dropped."""
        for future in list(self._pending):
            if not future.cancel():
                future.exception()
        self._pending.clear()

    def close(self) -> None:
        """Drain, stop the thread, close the teacher. May be called twice."""
        if self.closed:
            return
        self.closed = True
        remote = self.teacher.capabilities.remote
        try:
            if remote:
                self.teacher.close()  # takes back what is under way: a server that hangs must not hold us up
            self.drain()
            if self._worker is not None:
                self._worker.shutdown(wait=True)
                self._worker = None
        finally:
            if not remote:
                self.teacher.close()

    # -- batches

    def on_inputs(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        inputs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Put the teacher's signal into `inputs`; after the end of training evaluation goes on without."""
        if not self.closed:
            inputs[SIGNAL_KEY] = self.answer(inputs)

    def answer(self, inputs: dict[str, Any]) -> TeacherSignal | None:
        """The signal of a batch, asked for now or before; None where the teacher stays away and training goes on.

        Raises:
            TeacherUnavailable: it stays away, and `away` is `stop`.
        """
        waiting = inputs.get(SIGNAL_KEY)
        try:
            if isinstance(waiting, Future):
                self._pending.discard(waiting)
                return waiting.result()
            if SIGNAL_KEY in inputs:
                return waiting
            if self._worker is not None:
                return self._worker.submit(self._ask, inputs).result()
            return self._ask(inputs)
        except TeacherUnavailable as error:
            if self.away == "stop":
                raise
            if not self._said_away:
                logger.warning("%s Training goes on without it, see kd_coverage in the log.", error)
                self._said_away = True
            return None

    def look_ahead(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The same batches, each already asked about while the ones before it are trained on."""
        return LookAhead(batches, self) if self._worker is not None else batches

    def submit(self, batch: dict[str, Any]) -> None:
        """Ask about `batch` in the thread; [`on_inputs`] waits for the answer."""
        if self._worker is not None:
            batch[SIGNAL_KEY] = self._worker.submit(self._ask, batch)
            self._pending.add(batch[SIGNAL_KEY])

    def _ask(self, inputs: dict[str, Any]) -> TeacherSignal:
        with torch.no_grad():
            return self.teacher.signal(inputs["input_ids"], inputs.get("attention_mask"))


class LookAhead(Iterator[dict[str, Any]]):
    """Reads `callback.prefetch` batches further than it gives, and submits each as it is read."""

    def __init__(self, source: Iterator[dict[str, Any]], callback: TeacherCallback):
        self.source, self.callback = source, callback
        self._read: list[dict[str, Any]] = []
        self._exhausted = False

    def __next__(self) -> dict[str, Any]:
        while not self._exhausted and len(self._read) <= self.callback.prefetch:
            try:
                batch = next(self.source)
            except StopIteration:
                self._exhausted = True
                break
            self.callback.submit(batch)
            self._read.append(batch)
        if not self._read:
            raise StopIteration
        return self._read.pop(0)
