"""What all our trainers share: named loss parts in the log, evaluation without gathering logits, events for callbacks
that own a resource."""

import logging
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from .checkpoints import last_checkpoint
from .model_card import KINDS, LICENSE, facts_of_trainer, fill_card, license_of, public_name
from .preemption import TrainingStopped
from .safe_trainer import SafeTrainer
from .sharding import build_whole, in_its_own_class, in_one_group, keep_precision, shard_on_cpu, share_again


logger = logging.getLogger(__name__)

IGNORE_INDEX = -100


def default_report_to() -> str:
    """`trackio` where it is installed, else `none`."""
    return "trackio" if find_spec("trackio") is not None else "none"


@cache
def _say_that_no_tracker_is_there() -> None:
    logger.warning(
        "trackio is not installed: figures of training go to the log and to trainer_state.json only. "
        "`pip install trackio`, name another tracker in `report_to`, or set `report_to` to none."
    )


@dataclass
class LatentTrainingConfig(TrainingArguments):
    """`TrainingArguments` with the defaults that our models need.

    Runs log to trackio, on this machine alone: a Space of theirs is made where one is named, and never for a push of
    the model.

    Raises:
        ValueError: `label_smoothing_factor`: the losses are the models' own; an unknown `nonfinite_loss`.
    """

    report_to: None | str | list[str] = field(
        default=None,
        metadata={
            "help": "Trackers that runs are logged to, `all` that are installed, or `none`. Default: trackio, on this "
            "machine (`trackio show` draws it), where it is installed; else none."
        },
    )
    project: str = field(default="latentforge", metadata={"help": "Trackio's name for what belongs together."})
    nonfinite_loss: str = field(
        default="stop",
        metadata={
            "help": "When a step's loss or gradient is NaN or infinite: stop (its batch is kept beside the "
            "checkpoints), or skip (leave the step out; skipped_steps in the log counts).",
            "choices": ["stop", "skip"],
        },
    )

    def __post_init__(self):
        args: Any = self
        chosen = args.report_to is not None
        if not chosen:
            args.report_to = default_report_to()
        # transformers reads None as: copy the run to a public Space whenever the model is pushed
        if getattr(args, "trackio_static_space_id", False) is None:
            args.trackio_static_space_id = False
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor ({args.label_smoothing_factor}) is not possible: the loss is made in pieces "
                "by the model and never has whole logits. Set it to 0."
            )
        if args.nonfinite_loss not in ("stop", "skip"):
            raise ValueError(f"nonfinite_loss must be `stop` or `skip`, got {args.nonfinite_loss!r}.")
        # without it the order of the data derives from torch.initial_seed() at the moment the loader is built: a
        # resumed run may see other batches
        if args.data_seed is None:
            args.data_seed = args.seed
        # transformers takes every metric whose name does not end in "loss" for an accuracy, and would keep the worst
        # checkpoint by `nll`
        if args.metric_for_best_model is not None and args.greater_is_better is None:
            args.greater_is_better = "acc" in args.metric_for_best_model  # token_accuracy, first_acc
        # a mask embedding gets no gradient in a batch without masked tokens
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = True
        # transformers refuses bf16 on a machine without an accelerator unless told that the CPU is meant
        if args.bf16 and not torch.accelerator.is_available():
            args.use_cpu = True
        super().__post_init__()
        build_whole()
        if not chosen and not args.report_to and args.should_log:
            _say_that_no_tracker_is_there()

    def describe_process(self) -> str:
        """One line for each process to print: a launcher that silently starts fewer processes than asked for is seen
        by it."""
        return f"process {self.process_index}: world_size={self.world_size} pid={os.getpid()} device={self.device}"

    def checkpoint(self) -> str | bool | None:
        """`resume_from_checkpoint` as [`Trainer.train`] takes it: a directory, or True (`true` on the command line)
        for the last in `output_dir`; `auto` is the last where there is one, and a beginning where there is none."""
        value = self.resume_from_checkpoint
        if str(value).lower() == "auto":
            folder = self.output_dir
            return last_checkpoint(folder) if folder is not None else None
        return {"true": True, "false": None}.get(str(value).lower(), value)


class LatentTrainer(SafeTrainer):
    """[`SafeTrainer`] for models that return `loss_components` next to `loss`.

    Contract with the model: `forward(..., labels, num_items_in_batch)` divides every part, and `loss`, by
    `num_items_in_batch`; so parts add up over micro-batches and processes. Subclasses say how labels are counted
    ([`count_items`]), how parts make the loss ([`part_weights`]), and what else `forward` gets ([`forward_kwargs`]).

    In the log, each part is averaged exactly as `loss` is. Evaluation gives `eval_loss` and `eval_<part>`, per item,
    over exactly the rows of the dataset (copies that even out processes do not count), in a random state of its own:
    whether and when a run evaluates does not change what it learns.

    Callbacks may define two events beside the stock ones: `on_inputs(args, state, control, inputs, model)` sees and
    may fill every batch before its forward, `on_train_failed(args, state, control)` is told that training raised.

    Raises:
        ValueError: with several GPUs in one process (DataParallel): token positions and loss parts do not survive its
            splitting.
    """

    part_names: tuple[str, ...] = ()

    def __init__(self, model: nn.Module | None = None, args: TrainingArguments | None = None, **kwargs: Any):
        config = getattr(model, "config", None)
        before = vars(config).get("use_cache") if config is not None else None
        super().__init__(model=model, args=args, **kwargs)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process. Start one process per GPU (`accelerate launch "
                "script.py ...` or "
                "`torchrun --nproc_per_node N script.py ...`), or show it one (`CUDA_VISIBLE_DEVICES=0`)."
            )
        # Trainer sets it to False for good, and the saved model would then generate without a cache; ours builds none
        # while learning
        if config is not None and vars(config).pop("use_cache", None) is not None and before is not None:
            config.use_cache = before
        self._parts: dict[str, torch.Tensor] = {}
        self._parts_before: dict[str, torch.Tensor] = {}
        self._parts_last_step: int | None = None
        self._eval_sums: dict[str, float] | None = None
        self._card_arguments: dict[str, Any] = {}

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        keep_precision(plugin)
        self.is_fsdp_enabled = plugin is not None
        share_again(self.accelerator)

    # -- what subclasses say

    def count_items(self, labels: torch.Tensor) -> torch.Tensor:
        """Number of labels `(B, T)` that the model's loss is divided by, a scalar tensor."""
        raise NotImplementedError

    def asked_labels(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The labels `(B, T)` of a batch that the model is really asked for, -100 elsewhere."""
        return inputs["labels"]

    def part_weights(self) -> dict[str, float]:
        """Weight of each loss part in `loss`."""
        raise NotImplementedError

    def forward_kwargs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """More arguments for `forward`; may take entries out of `inputs`."""
        return {}

    def evaluate_batch(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, float]:
        """More sums over one evaluation batch, by name; handed to [`evaluation_metrics`], summed over batches and
        processes."""
        return {}

    def evaluation_metrics(self, sums: dict[str, float], num_items: float) -> Mapping[str, float | None]:
        """Metrics, without prefix, from the sums of [`evaluate_batch`] and those of the parts (`sums[part]`); None
        takes one out."""
        return {}

    def teacher_name(self) -> str | None:
        """Of the model whose distributions are learned from: a Hub id or a folder."""
        return None

    # -- training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._parts.clear()
        self._parts_last_step = None
        try:
            return super().train(*args, **kwargs)
        except TrainingStopped:
            raise
        except BaseException:
            self._dispatch("on_train_failed")
            raise

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: str | None
    ) -> Any:
        with self._sharding():
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _sharding(self) -> AbstractContextManager[None]:
        return in_one_group(self.model) if self.is_fsdp_enabled else nullcontext()

    def begin_step(self) -> None:
        self._parts_before = dict(self._parts)

    def take_back_step(self) -> None:
        self._parts = self._parts_before

    def _dispatch(self, event: str, **kwargs: Any) -> None:
        # transformers knows no event that carries the batch, and none for failure
        for callback in self.callback_handler.callbacks:
            handler = getattr(callback, event, None)
            if handler is not None:
                handler(self.args, self.state, self.control, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | None:
        # counted here and not by name: transformers counts shifted labels for every class called ...ForCausalLM and
        # unshifted ones for all others
        if not batch_samples:
            return None
        if "labels" not in batch_samples[0]:
            raise ValueError(
                f"The batches have no `labels`, only {sorted(batch_samples[0])}: use the rows of "
                "`load_blocks`, or set `labels` to the ids and -100."
            )
        count = torch.stack([self.count_items(self.asked_labels(batch)).to(device) for batch in batch_samples]).sum()
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
            # ranks that share a batch (tensor, context or sequence parallel) count it once each
            count = count / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())
        return count.clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        inputs = dict(inputs)
        inputs["labels"] = self.asked_labels(inputs)
        self._dispatch("on_inputs", inputs=inputs, model=self.model)
        inputs.update(self.forward_kwargs(inputs))
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            if self._parts_last_step is None:  # not at the start of `train`: resuming sets global_step later
                self._parts_last_step = self.state.global_step
            for name, value in (outputs["loss_components"] or {}).items():
                self._parts[name] = self._parts.get(name, 0.0) + value.detach().float()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # here and not in a callback: what a callback adds to `logs` reaches neither the trackers nor log_history
        if "loss" in logs and self._parts and self._parts_last_step is not None:
            steps = max(self.state.global_step - self._parts_last_step - self.guard.skipped, 1)
            names = sorted(self._parts)
            values = torch.stack([self._parts[name] for name in names])
            # parts were divided by the count of all processes, or each by its own
            values = (
                self.accelerator.reduce(values, "sum" if self.args.average_tokens_across_devices else "mean") / steps
            )
            logs.update(zip(names, values.tolist(), strict=True))
            self._parts.clear()
            self._parts_last_step = self.state.global_step
        super().log(logs, start_time)

    # -- evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        if self._eval_sums is None:
            raise RuntimeError("`prediction_step` is called by `evaluate` and `predict`; call those.")
        inputs = dict(self._prepare_inputs(inputs))
        inputs["labels"] = self.asked_labels(inputs).masked_fill(
            ~self._own_rows(inputs["labels"])[:, None], IGNORE_INDEX
        )
        num_items = self.count_items(inputs["labels"])
        batch = dict(inputs)
        self._dispatch("on_inputs", inputs=batch, model=self.model)
        batch.update(self.forward_kwargs(batch))
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**batch, num_items_in_batch=1)  # sums
            sums = {**outputs["loss_components"], **self.evaluate_batch(model, inputs), "num_items": num_items}
        for name, value in sums.items():
            self._eval_sums[name] += float(value)
        return None, None, None

    def _own_rows(self, labels: torch.Tensor) -> torch.Tensor:
        """`(B,)`, False for rows that were repeated so that every process has a full last batch."""
        rows = torch.arange(labels.shape[0], device=labels.device) + self.args.process_index * labels.shape[0]
        if self.args.world_size == 1:
            return torch.ones_like(rows, dtype=torch.bool)
        return torch.isin(rows, self.gather_function(rows))

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._eval_sums = defaultdict(float)
        devices = [torch.cuda.current_device()] if self.args.device.type == "cuda" else []
        try:
            # noise of a head or a codec must be the same in every evaluation, and must not move the training's random
            # state
            with (
                torch.random.fork_rng(devices=devices) if self.args.device.type in ("cpu", "cuda") else nullcontext(),
                self._sharding(),
            ):
                torch.manual_seed(self.args.seed)
                output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
            sums = self._reduced_sums()
        finally:
            self._eval_sums = None
        num_items = sums.pop("num_items", 0.0)
        if not num_items:
            raise ValueError("No label to evaluate on: every label is -100, or the evaluation set is empty.")
        weights = {name: weight for name, weight in self.part_weights().items() if weight}
        metrics = {name: value / num_items for name, value in sums.items() if name in self.part_names}
        if set(weights) <= set(metrics):
            metrics["loss"] = math.fsum(weight * metrics[name] for name, weight in weights.items())
        known = {**metrics, **self.evaluation_metrics(sums, num_items)}
        output.metrics.update(
            {f"{metric_key_prefix}_{name}": value for name, value in known.items() if value is not None}
        )
        return output

    def _reduced_sums(self) -> dict[str, float]:
        assert self._eval_sums is not None
        names = sorted(self._eval_sums)
        if not names:
            return {}
        # fp64 on the CPU where a device has none
        dtype = torch.float32 if self.args.device.type == "mps" else torch.float64
        values = torch.tensor([self._eval_sums[name] for name in names], dtype=dtype, device=self.args.device)
        return dict(zip(names, self.accelerator.reduce(values, "sum").tolist(), strict=True))

    # -- saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; with sharded checkpoints too, the folder of the run gets the whole model, which
        `from_pretrained` loads anywhere (transformers writes nothing there)."""
        super().save_model(output_dir, _internal_call)
        if self.is_fsdp_enabled and output_dir in (None, self.args.output_dir):
            plugin = self.accelerator.state.fsdp_plugin
            if "SHARDED_STATE_DICT" in str(plugin.state_dict_type):
                self._save(self.args.output_dir, state_dict=self.accelerator.get_state_dict(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with in_its_own_class(self.model):
            super()._save(output_dir, state_dict=state_dict)

    # -- card

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write `README.md` in `output_dir` from `model_cards/`; only the first process does.

        Args: as in transformers. `dataset` is the training text in words, `dataset_tags` its Hub ids, `dataset_args`
            the held-out text in words. `license` defaults to the teacher's, `unknown` where that cannot be read, and
            to this project's without a teacher. `model_name` and `tasks` follow from the model.
        """
        config: Any = self.model.config
        given = {
            "language": language,
            "license": license,
            "tags": tags,
            "finetuned_from": finetuned_from,
            "dataset": dataset,
            "dataset_tags": dataset_tags,
            "dataset_args": dataset_args,
        }
        # `push_to_hub` asks for a card too, and knows less than the script that trained
        self._card_arguments |= {name: value for name, value in given.items() if value is not None}
        if not self.is_world_process_zero():
            return
        if config.model_type not in KINDS:
            super().create_model_card(**self._card_arguments, model_name=model_name, tasks=tasks)
            return
        told = self._card_arguments
        base, teacher = told.get("finetuned_from"), self.teacher_name()
        others = [name for name in (base, teacher) if name is not None]
        output_dir = Path(self.args.output_dir)
        card = fill_card(
            config,
            facts_of_trainer(
                self,
                repo_id=self.hub_model_id or (output_dir.name if output_dir.is_absolute() else output_dir.as_posix()),
                data=_words(told.get("dataset")),
                datasets=_listed(told.get("dataset_tags")),
                held_out=_words(told.get("dataset_args")),
                base=public_name(base) if base is not None else None,
                teacher=public_name(teacher) if teacher is not None else None,
                license=told.get("license") or (license_of(others[0]) or "unknown" if others else LICENSE),
                language=told.get("language"),
                tags=_listed(told.get("tags")),
            ),
        )
        card.save(output_dir / "README.md")


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _words(value: str | list[str] | None) -> str | None:
    return ", ".join(_listed(value)) or None
