"""Trainer of the student: its own objective and a teacher's."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .base_trainer import IGNORE_INDEX, LatentTrainer
from .callbacks import SIGNAL_KEY, TeacherCallback
from .codec_cache import CodecCache
from .kd_config import KDConfig
from .teachers.base import Teacher, TeacherSignal, check_vocabulary
from .teachers.flow import TeacherUnavailable
from .teachers.identity import weights_hash


PREFETCH = 4  # batches asked about ahead of time where the teacher waits for a network


def _says_nothing(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The distillation of a batch whose teacher stayed away: 0, with a gradient of 0."""
    return 0.0 * logits[:, 0]


class KDTrainer(LatentTrainer):
    """Trains [`LatentForgeForCausalLM`] on text, on a teacher's distributions (arXiv 1503.02531), or both.

    `loss = ce_weight * ce + kd_weight * kd + mse_weight * mse + energy_weight * energy`; the log names the parts.
    A student with an aligned head learns by `ce` from the teacher's noise and not from its distributions: its `ce` is
    that of the text given the noise, no likelihood, and evaluation calls it `eval_ce_given_noise`.

    Evaluation adds `eval_nll`, nats per predicted token (an energy head reads the centre of its noise). Once training
    has ended the teacher is closed, unless its callback's `close_after_training` is False: a later `evaluate` leaves
    out `eval_kd`, and `eval_loss` with it.

    A teacher that stays away ([`TeacherUnavailable`]) ends training after a checkpoint of the last whole step; with
    `teacher_away="continue"` training goes on without it. `kd_coverage` in the log is the share of predicted tokens
    about which a remote or sparse teacher said anything; the `kd` of a training step counts others as 0, the one of
    an evaluation leaves them out.

    With `codec_cache` the frozen codec sees a training block once: what it said is read from there in later epochs,
    in resumed runs and by other processes, with the same losses. Evaluation asks the codec itself.

    Args:
        teacher: gives [`TeacherSignal`]s; owned, checked and closed by a [`TeacherCallback`] (pass your own in
            `callbacks` instead, if you like).

    Raises:
        ValueError: weights that cannot work: `kd_weight` without a teacher or a teacher without `kd_weight`,
            `energy_weight` without an energy head, nothing to learn, a `codec_cache` where nothing asks the codec; a
            teacher of another vocabulary, one that cannot
            score given text, or one that cannot be brought to `kd_temperature`.
    """

    args: KDConfig
    part_names = ("ce", "kd", "mse", "energy")

    def __init__(
        self,
        model: nn.Module | None = None,
        args: KDConfig | None = None,
        teacher: Teacher | None = None,
        callbacks: list[Any] | None = None,
        **kwargs: Any,
    ):
        args = args if args is not None else KDConfig()
        callbacks = list(callbacks or [])
        owners = [callback for callback in callbacks if isinstance(callback, TeacherCallback)]
        if len(owners) + (teacher is not None) > 1:
            raise ValueError("More than one teacher: pass `teacher`, or one TeacherCallback in `callbacks`, not both.")
        if teacher is not None:
            prefetch = args.teacher_prefetch
            if prefetch is None:
                prefetch = PREFETCH if teacher.capabilities.remote else 0
            owners = [TeacherCallback(teacher, prefetch, args.teacher_away)]
            callbacks += owners
        self.teacher_callback: TeacherCallback | None = owners[0] if owners else None
        self._weights = self._check(model, args)
        self._is_aligned = model.config.head_config.head_type == "aligned"  # type: ignore[union-attr]
        self._ahead: tuple[Any, Iterator[Any]] | None = None
        self._covered = self._asked = 0.0  # predicted tokens since the last log
        self._covered_in_batch: float | None = None
        self.codec_cache: CodecCache | None = None
        self._new_rows: list[str] = []  # of this batch, by their keys: not in the cache yet
        super().__init__(model=model, args=args, callbacks=callbacks, **kwargs)

    def _check(self, model: nn.Module | None, args: KDConfig) -> dict[str, float]:
        teacher = self.teacher_callback.teacher if self.teacher_callback is not None else None
        is_aligned = model is not None and model.config.head_config.head_type == "aligned"  # type: ignore[union-attr]
        kd_weight = float(teacher is not None and not is_aligned) if args.kd_weight is None else args.kd_weight
        if is_aligned and (teacher is None or kd_weight or args.teacher_away == "continue"):
            raise ValueError(
                "A student with an aligned head learns from its teacher's noise: it needs a teacher (`--teacher`), "
                f"kd_weight 0 and teacher_away `stop`; there is {'no' if teacher is None else 'a'} teacher, kd_weight "
                f"is {kd_weight:g} and teacher_away {args.teacher_away!r}."
            )
        if kd_weight > 0 and teacher is None:
            raise ValueError(
                f"kd_weight is {kd_weight} but there is no teacher: pass one (`--teacher`), or set kd_weight to 0."
            )
        if kd_weight == 0 and teacher is not None and not is_aligned:
            raise ValueError(
                "There is a teacher but kd_weight is 0: every batch would be sent to it for nothing. Raise kd_weight "
                "or drop the teacher."
            )
        if model is None:
            raise ValueError(
                "KDTrainer needs `model`: `model_init` is not supported, because the teacher is checked against the "
                "model first."
            )
        config: Any = model.config
        has_energy = config.head_config.head_type == "energy"
        energy_weight = float(has_energy) if args.energy_weight is None else args.energy_weight
        if energy_weight > 0 and not has_energy:
            raise ValueError(
                f"energy_weight is {energy_weight} but the student's head is `{config.head_config.head_type}`: set "
                "energy_weight to 0, or build the "
                "student with `head_type` energy."
            )
        weights = {"ce": args.ce_weight, "kd": kd_weight, "mse": args.mse_weight, "energy": energy_weight}
        if not any(weights.values()):
            raise ValueError(
                f"All loss weights are 0 ({weights}), nothing would be learned: set at least one above 0."
            )
        student: Any = model
        if args.codec_cache is not None and not student.asks_codec(weights):
            raise ValueError(
                f"codec_cache is {args.codec_cache}, but nothing asks the codec while this student learns: raise "
                "mse_weight or energy_weight above 0, or drop codec_cache."
            )
        if teacher is not None:
            if not teacher.capabilities.scores_given_tokens:
                raise ValueError(
                    f"{type(teacher).__name__} only writes its own text, distillation asks about given text: use a "
                    "teacher that returns "
                    "log-probabilities of the prompt (a local model, vLLM)."
                )
            aligned = teacher.capabilities.form == "chunks"
            if aligned != (args.kd_alignment == "bytes"):
                raise ValueError(
                    f"kd_alignment is {args.kd_alignment}, and {type(teacher).__name__} gives "
                    f"{teacher.capabilities.form} signals: wrap a teacher with another tokenizer in AlignedTeacher "
                    "and set kd_alignment to bytes, or do neither."
                )
            if args.kd_temperature != 1 and not teacher.capabilities.any_temperature:
                raise ValueError(
                    f"kd_temperature is {args.kd_temperature}, and {type(teacher).__name__} gives its top "
                    "log-probabilities at temperature 1 only: "
                    "set kd_temperature to 1, or use a local teacher with full logits."
                )
            check_vocabulary(config.vocab_size, teacher.vocab_size, teacher.num_tokens)
            others = [weight for name, weight in weights.items() if name != "kd"]
            if self.teacher_callback is not None and self.teacher_callback.away == "continue" and not any(others):
                raise ValueError(
                    "teacher_away is `continue`, but nothing would be learned without the teacher: set ce_weight "
                    "above 0, or teacher_away to stop."
                )
        return weights

    def asked_labels(self, inputs: dict[str, Any]) -> torch.Tensor:
        # nothing predicts a row's first token: no decoder, no teacher and no token LM has seen anything before it
        labels, mask = inputs["labels"], inputs.get("attention_mask")
        first = (
            torch.zeros_like(labels[:, :1])
            if mask is None
            else ((mask != 0).long().cumsum(1) == 0).sum(1, keepdim=True).clamp(max=labels.shape[1] - 1)
        )
        return labels.scatter(1, first, IGNORE_INDEX)

    def count_items(self, labels: torch.Tensor) -> torch.Tensor:
        return (labels[..., 1:] != IGNORE_INDEX).sum()

    def part_weights(self) -> dict[str, float]:
        return self._weights

    def teacher_name(self) -> str | None:
        return getattr(self.teacher_callback.teacher, "name", None) if self.teacher_callback is not None else None

    def forward_kwargs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        away = SIGNAL_KEY in inputs and inputs[SIGNAL_KEY] is None
        signal = inputs.pop(SIGNAL_KEY, None)
        if self.model.training:
            if signal is None and not away and (self._weights["kd"] or self._is_aligned):
                raise RuntimeError(
                    "The teacher is closed (training ended or failed before): build a new teacher and a new KDTrainer."
                )
            weights = self._weights
        else:
            # measured even where it is not trained on, at weight 1: what evaluation reads are the parts
            weights = {name: 1.0 for name, weight in self._weights.items() if weight or name == "ce"}
            if signal is None and not away:
                weights.pop("kd", None)
        kwargs: dict[str, Any] = {"loss_weights": weights, "output_logits": False}
        if self.args.codec_cache is not None and self.model.training:
            kwargs["codec_encoding"] = self._cached_encoding(inputs)
        if self._is_aligned:
            if signal is None:
                raise RuntimeError(
                    "The teacher is closed, and the loss of an aligned head needs its noise: evaluate while it is "
                    "there (TeacherCallback(close_after_training=False))."
                )
            # an evaluation gives the same figure each time
            generator = None if self.model.training else torch.Generator().manual_seed(0)
            kwargs["aligned_noise"] = signal.aligned_noise(inputs["input_ids"], generator)
        elif signal is not None:
            kwargs["distillation"] = signal.distillation(self.model.config.vocab_size, self.args.kd_temperature)
            if signal.starts is not None:
                kwargs["distillation_starts"] = signal.starts
        elif away:
            kwargs["distillation"] = _says_nothing
        owner = self.teacher_callback
        if owner is not None and _may_have_gaps(owner.teacher) and (signal is not None or away):
            self._count_covered(signal, inputs["labels"])
        return kwargs

    # -- the codec's part

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self.codec_cache = None  # a checkpoint that is resumed brings its codec
        return super().train(*args, **kwargs)

    def _cached_encoding(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.codec_cache is None:
            codec: Any = self.model.autoencoder
            if not all(parameter.numel() for parameter in codec.parameters()):
                raise ValueError(
                    "codec_cache needs to know the codec's weights, and DeepSpeed's stage 3 has them in shares: drop "
                    "codec_cache, or take stage 2."
                )
            dtype = torch.bfloat16 if self.args.bf16 else torch.float16 if self.args.fp16 else codec.dtype
            config: Any = self.model.config
            layout = f"{config.decoder_type} {config.pad_token_id} {config.eos_token_id}"
            self.codec_cache = CodecCache(
                str(self.args.codec_cache), f"{weights_hash(codec)} {layout}", dtype, bool(self._weights["energy"])
            )
        keys = self.codec_cache.keys(inputs["input_ids"], inputs.get("attention_mask"))
        encoding = self.codec_cache.get(keys)
        if self.is_fsdp_enabled:  # a codec in shares is gathered by all processes or by none
            missing = torch.tensor(float(encoding is None), device=self.args.device)
            encoding = None if float(self.accelerator.reduce(missing, "sum")) else encoding
        self._new_rows = keys if encoding is None else []
        if encoding is None:
            return None
        mean, log_std = (x.to(inputs["input_ids"].device) for x in encoding)
        return mean, log_std

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self._new_rows and self.codec_cache is not None:
            self.codec_cache.put(self._new_rows, *outputs["codec_encoding"])
            self._new_rows = []
        return (loss, outputs) if return_outputs else loss

    def _count_covered(self, signal: TeacherSignal | None, labels: torch.Tensor) -> None:
        predicted = labels[:, 1:] != IGNORE_INDEX
        known = signal.covered() if signal is not None else torch.zeros_like(labels, dtype=torch.bool)
        both = predicted if known is None else predicted & known.to(predicted.device)[:, :-1]
        covered, asked = torch.stack([both.sum(), predicted.sum()]).tolist()
        self._covered_in_batch = covered
        if self.model.training:
            self._covered, self._asked = self._covered + covered, self._asked + asked

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        owner = self.teacher_callback
        if "loss" in logs and owner is not None and _may_have_gaps(owner.teacher):
            counts = torch.tensor([self._covered, self._asked], device=self.args.device)
            covered, asked = self.accelerator.reduce(counts, "sum").tolist()
            if asked:
                logs["kd_coverage"] = covered / asked
            self._covered = self._asked = 0.0
        super().log(logs, start_time)

    # -- evaluation

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            return super().evaluate(*args, **kwargs)
        except (TeacherUnavailable, ValueError) as error:
            owner = self.teacher_callback
            # after the training too: its steps are worth as much then
            if owner is not None and owner.teacher.capabilities.remote and self.args.world_size == 1:
                self._stop_after_checkpoint(error)
            raise

    def evaluate_batch(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, float]:
        covered, self._covered_in_batch = self._covered_in_batch, None
        return {} if covered is None else {"kd_covered": covered}

    def evaluation_metrics(self, sums: dict[str, float], num_items: float) -> dict[str, float | None]:
        metrics: dict[str, float | None] = {"nll": sums["ce"] / num_items}
        if self._is_aligned:
            return {"ce_given_noise": metrics["nll"]}
        covered = sums.get("kd_covered", num_items)
        if covered < num_items:
            parts = {name: sums[name] / num_items for name in self.part_names if name in sums}
            metrics["kd_coverage"] = covered / num_items
            metrics["kd"] = parts["kd"] = sums["kd"] / covered if covered else math.nan
            metrics["loss"] = math.fsum(weight * parts[name] for name, weight in self._weights.items() if weight)
            if not covered:
                # unknown, and JSON has no word for NaN; where checkpoints or the learning rate go by it, it must be
                # there, and NaN is never best
                chosen = self.args.metric_for_best_model or ""
                for name in {"kd", "loss"} - {chosen.removeprefix("eval_")}:
                    if metrics[name] != metrics[name]:
                        metrics[name] = None
        return metrics

    # -- batches

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        owner = self.teacher_callback
        if owner is not None:
            if self._ahead is None or self._ahead[0] is not epoch_iterator:
                self._ahead = (epoch_iterator, owner.look_ahead(epoch_iterator))
            epoch_iterator = self._ahead[1]
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if owner is not None and owner.teacher.capabilities.remote and not owner.closed:
            self._await_teacher(owner, batches)
        return batches, num_items

    def _await_teacher(self, owner: TeacherCallback, batches: list[dict[str, Any]]) -> None:
        # Before the step's first forward: weights, optimiser and random state are still those of the last whole step,
        # so a checkpoint made now is one that a resumed run continues exactly.
        error: Exception | None = None
        try:
            for batch in batches:
                batch[SIGNAL_KEY] = owner.answer(batch)
        # a key that was revoked, another model after a restart, NaN: waiting helps as little, and the steps so far are
        # worth as much
        except (TeacherUnavailable, ValueError) as caught:
            error = caught
        failed = float(error is not None)
        if self.args.world_size > 1:  # each process asks for itself, and all must stop at the same step
            failed = float(self.accelerator.reduce(torch.tensor(failed, device=self.args.device), "sum"))
        if failed:
            self._stop_after_checkpoint(error or TeacherUnavailable("The teacher of another process stays away."))

    def _stop_after_checkpoint(self, error: Exception) -> None:
        step = self.state.global_step
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if not step:
            raise error
        missing = not folder.exists()
        self.accelerator.wait_for_everyone()  # or a late one would find the others' folder, without a state of its own
        if missing:
            self._save_checkpoint(self.model, trial=None)
        self.accelerator.wait_for_everyone()  # the first that fails ends the others, also one that is still writing
        away = isinstance(error, TeacherUnavailable)
        raise (TeacherUnavailable if away else ValueError)(
            f"{error} Training stopped after step {step}, which is kept in {folder.name}: go on with "
            f"--resume_from_checkpoint true{', or with --teacher_away continue to do without it' if away else ''}."
        ) from error


def _may_have_gaps(teacher: Teacher) -> bool:
    return teacher.capabilities.remote or teacher.capabilities.form == "sparse"
