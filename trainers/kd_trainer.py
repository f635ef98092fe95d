"""Trainer of the student: its own objective and a teacher's."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from .base_trainer import IGNORE_INDEX, LatentTrainer
from .callbacks import SIGNAL_KEY, TeacherCallback
from .kd_config import KDConfig
from .teachers.base import Teacher, check_vocabulary


class KDTrainer(LatentTrainer):
    """Trains [`LatentForgeForCausalLM`] on text, on a teacher's distributions (arXiv 1503.02531), or both.

    `loss = ce_weight * ce + kd_weight * kd + mse_weight * mse + energy_weight * energy`; the log names the parts.
    Evaluation adds `eval_nll`, nats per predicted token (an energy head reads the centre of its noise). Once training
    has ended the teacher is closed, unless its callback's `close_after_training` is False: a later `evaluate` leaves
    out `eval_kd`, and `eval_loss` with it.

    Args:
        teacher: gives [`TeacherSignal`]s; owned, checked and closed by a [`TeacherCallback`] (pass your own in
            `callbacks` instead, if you like).

    Raises:
        ValueError: weights that cannot work: `kd_weight` without a teacher or a teacher without `kd_weight`,
            `energy_weight` without an energy head, nothing to learn; a teacher of another vocabulary, one that cannot
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
            owners = [TeacherCallback(teacher, int(teacher.capabilities.remote) if prefetch is None else prefetch)]
            callbacks += owners
        self.teacher_callback: TeacherCallback | None = owners[0] if owners else None
        self._weights = self._check(model, args)
        self._ahead: tuple[Any, Iterator[Any]] | None = None
        super().__init__(model=model, args=args, callbacks=callbacks, **kwargs)

    def _check(self, model: nn.Module | None, args: KDConfig) -> dict[str, float]:
        teacher = self.teacher_callback.teacher if self.teacher_callback is not None else None
        kd_weight = float(teacher is not None) if args.kd_weight is None else args.kd_weight
        if kd_weight > 0 and teacher is None:
            raise ValueError(
                f"kd_weight is {kd_weight} but there is no teacher: pass one (`--teacher`), or set kd_weight to 0."
            )
        if kd_weight == 0 and teacher is not None:
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
        signal = inputs.pop(SIGNAL_KEY, None)
        if self.model.training:
            if signal is None and self._weights["kd"]:
                raise RuntimeError(
                    "The teacher is closed (training ended or failed before): build a new teacher and a new KDTrainer."
                )
            weights = self._weights
        else:
            # measured even where it is not trained on, at weight 1: what evaluation reads are the parts
            weights = {name: 1.0 for name, weight in self._weights.items() if weight or name == "ce"}
            if signal is None:
                weights.pop("kd", None)
        kwargs: dict[str, Any] = {"loss_weights": weights, "output_logits": False}
        if signal is not None:
            kwargs["distillation"] = partial(signal.loss, temperature=self.args.kd_temperature)
            if signal.starts is not None:
                kwargs["distillation_starts"] = signal.starts
        return kwargs

    def evaluation_metrics(self, sums: dict[str, float], num_items: float) -> dict[str, float]:
        return {"nll": sums["ce"] / num_items}

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        if self.teacher_callback is not None:
            if self._ahead is None or self._ahead[0] is not epoch_iterator:
                self._ahead = (epoch_iterator, self.teacher_callback.look_ahead(epoch_iterator))
            epoch_iterator = self._ahead[1]
        return super().get_batch_samples(epoch_iterator, num_batches, device)
