"""Trainer of the wire: latents that frozen language models can read."""

import json
import random
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from modeling_latentforge import LatentForgeWire

from .base_trainer import LatentTrainer
from .losses.answers import align_loss, answer_divergence, answer_loss, first_token_accuracy, repeat_loss
from .wire_config import WireConfig
from .wire_lora import adapter_parameters, has_adapter, restore_adapter, set_adapter_dropout, without_adapter
from .wire_models import ADAPTERS, save_beside


LEARNING = "learning_adapters"  # where a wire holds the adapters of its receivers while it is trained
FIRST = "first_acc"  # no part of the loss, but averaged like one


class WireCollator:
    """Examples -> a batch: the encoder's ids, and the texts that a receiver tokenizes itself.

    Args:
        wire: whose ids these are.

    An example is a mapping or an object with `context`, `prompt` and `answers` (the first is learned).
    """

    def __init__(self, wire: LatentForgeWire):
        self.wire = wire

    def __call__(self, examples: Iterable[Any]) -> dict[str, Any]:
        rows = [example if isinstance(example, Mapping) else vars(example) for example in examples]
        contexts = [row["context"] for row in rows]
        input_ids, attention_mask = self.wire.ids_of(contexts, "cpu")
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": torch.ones(len(rows), 1, dtype=torch.long),  # every example counts alike
            "contexts": contexts,
            "prompts": [row["prompt"] for row in rows],
            "answers": [row["answers"][0] for row in rows],
        }


class TextLengthSampler(LengthGroupedSampler):
    """transformers' sampler of texts of similar length, whose order follows from seed and epoch alone: a resumed run
    reads what is left, where the original draws another order.

    Args:
        batch_size: rows of a step.
        lengths: of the texts, in any unit.
        seed: as `args.data_seed`.
    """

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


@dataclass(frozen=True)
class Draw:
    """What a step does: whom it asks, of how many latents (None: all), or of the text itself; how many tokens of the
    answers count (None: all), and whether these are the texts again, which no teacher knows better."""

    receiver: str
    num_latents: int | None = None
    reads_text: bool = False
    answer_tokens: int | None = None
    repeats: bool = False


class WireTrainer(LatentTrainer):
    """Trains encoder, quantizer and bridges of a [`LatentForgeWire`] through its frozen receivers, and the adapters
    (LoRA) of those that have one.

    Each step asks one receiver, drawn from the step's number and the seed, so that a resumed run asks the same.
    Evaluation asks all of them: `eval_loss`, and `eval_answer_<name>` and `eval_first_acc_<name>` for each.

    Args:
        model: a wire with at least one receiver attached.

    Raises:
        ValueError: no receiver attached; an objective that none of them can learn by.
    """

    args: WireConfig
    part_names: tuple[str, ...] = ("answer", "kd", "gist", "align")

    def __init__(self, model: LatentForgeWire, args: WireConfig | None = None, **kwargs: Any):
        if not model.receivers:
            raise ValueError("No receiver is attached, and nobody would read the latents: call `attach` first.")
        args = args if args is not None else WireConfig()
        modes = {name: model.bridges[name].mode for name in model.receivers}
        if args.align_weight and set(modes.values()) != {"soft"}:
            raise ValueError(f"align_weight compares vectors with embeddings, which soft bridges alone send: {modes}.")
        adapted = [name for name, receiver in model.receivers.items() if has_adapter(receiver)]
        self._learn_from_text = sorted(model.receivers) if args.align_weight else sorted(adapted)
        if args.text_warmup_steps and not self._learn_from_text:
            raise ValueError(
                f"text_warmup_steps is {args.text_warmup_steps}, and nothing here learns from the text itself: add "
                "lora_r or align_weight."
            )
        kwargs.setdefault("data_collator", WireCollator(model))
        super().__init__(model=model, args=args, **kwargs)
        for receiver in model.receivers.values():
            receiver.model.to(self.args.device)
        self._last_step: tuple[int, float] | None = None  # number and time
        self._seconds: float | None = None

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        args, dataset = self.args, self.train_dataset if train_dataset is None else train_dataset
        if args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(dataset)
        lengths = [len((row if isinstance(row, Mapping) else vars(row))["context"]) for row in dataset]
        return TextLengthSampler(
            args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            lengths,
            args.seed if args.data_seed is None else args.data_seed,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        # transformers looks for lengths here, too
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def count_items(self, labels: torch.Tensor) -> torch.Tensor:
        return (labels != -100).sum()

    def part_weights(self) -> dict[str, float]:
        return {part: getattr(self.args, f"{part}_weight") for part in self.part_names}

    # -- adapters learn as parameters of the wire: optimizer, clipping and DDP then know them; files do not

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        wire = self._wire()
        found = {
            f"{name}-{path}".replace(".", "-"): parameter.requires_grad_(True)
            for name, receiver in wire.receivers.items()
            for path, parameter in adapter_parameters(receiver).items()
        }
        if found:
            setattr(wire, LEARNING, nn.ParameterDict(found))
        return super().create_optimizer(model)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self._release_adapters()

    def _release_adapters(self) -> None:
        wire = self._wire()
        if hasattr(wire, LEARNING):
            getattr(wire, LEARNING).requires_grad_(False)
            delattr(wire, LEARNING)
        for receiver in wire.receivers.values():
            set_adapter_dropout(receiver, False)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        wire = self._wire()
        state = wire.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {name: value for name, value in state.items() if not name.startswith(LEARNING)})
        if self.args.should_save:
            save_beside(wire, output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._restore_adapters(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._release_adapters()  # the file does not know them, and transformers would say that they are missing
        super()._load_best_model()
        self._restore_adapters(str(self.state.best_model_checkpoint))

    def _restore_adapters(self, folder: str) -> None:
        for name, receiver in self._wire().receivers.items():
            if has_adapter(receiver):
                restore_adapter(receiver, Path(folder) / ADAPTERS / name)

    # -- a step

    def drawn(self) -> Draw:
        """What this step does."""
        args, step = self.args, self.state.global_step
        draw = random.Random(f"{args.seed}/{step}")
        wire = self._wire()
        if step < args.text_warmup_steps and step % 2 == 0:
            name = draw.choice(self._learn_from_text)
            return Draw(name, reads_text=True, answer_tokens=args.answer_tokens)
        found = Draw(draw.choice(sorted(wire.receivers)), answer_tokens=args.answer_tokens)
        if args.min_latents is None:
            return found
        count = draw.randint(min(args.min_latents, wire.config.num_latents), wire.config.num_latents)
        return replace(found, num_latents=count)

    def _wire(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def parts(self, model: nn.Module, inputs: dict[str, Any], draw: Draw) -> dict[str, torch.Tensor]:
        """Each part of the loss, `(B,)` nats per token of a row's answer, and `first_acc`.

        A step that reads the text has the part `text` in the place of `answer`, and beside it `align` only.
        """
        args, prompts, answers, contexts = self.args, inputs["prompts"], inputs["answers"], inputs["contexts"]
        wire = self._wire()
        receiver = wire.receiver(draw.receiver)
        set_adapter_dropout(receiver, model.training)
        for module in (wire.encoder.backbone, wire.encoder, wire.refiner):
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()  # a frozen one gives what it will give
        needs_latents = not draw.reads_text or args.align_weight
        output = model(
            input_ids=inputs["input_ids"] if needs_latents else None,
            attention_mask=inputs["attention_mask"] if needs_latents else None,
            num_latents=draw.num_latents,
            receiver=draw.receiver,
            prompts=prompts,
            answers=answers,
            texts=contexts if draw.reads_text else None,
            **self.forward_kwargs(inputs),
        )
        logits, targets = output.answer_logits, output.answer_ids
        found = {
            "text" if draw.reads_text else "answer": answer_loss(
                logits, targets, args.first_token_weight, draw.answer_tokens
            )
        }
        if args.align_weight:
            embeddings = receiver.embed(targets.clamp(min=0))
            found["align"] = align_loss(output.slots, output.slot_mask, embeddings, targets)
        if args.kd_weight and not draw.reads_text and not draw.repeats:
            with torch.no_grad(), without_adapter(receiver):
                batch = receiver.compose(receiver.text_injection(contexts), prompts, answers)
                teacher, _ = receiver.answer_logits(None, batch)
            found["kd"] = answer_divergence(logits, teacher, targets, args.kd_temperature, draw.answer_tokens)
        if args.gist_weight and not draw.reads_text and not draw.repeats:
            beginnings = [beginning(receiver.tokenizer, text, args.gist_target_len) for text in contexts]
            words, ids = wire.ask(draw.receiver, output, [args.repeat_prompt] * len(contexts), beginnings)
            found["gist"] = repeat_loss(words, ids, args.gist_target_len)
        found |= self.more_parts(output, inputs, draw)
        found[FIRST] = first_token_accuracy(logits, targets)
        return found

    def more_parts(self, output: Any, inputs: dict[str, Any], draw: Draw) -> dict[str, torch.Tensor]:
        """Parts `(B,)` of a model that does more than a wire, from its output."""
        return {}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        draw = self.drawn()
        self._time_step()
        found = self.parts(model, inputs, draw)
        count = len(inputs["prompts"]) if num_items_in_batch is None else num_items_in_batch
        sums = {part: values.sum() / count for part, values in found.items()}
        if self._parts_last_step is None:
            self._parts_last_step = self.state.global_step
        for part, value in sums.items():
            self._parts[part] = self._parts.get(part, torch.zeros_like(value)) + value.detach().float()
        accuracy = sums.pop(FIRST)
        weights = {**self.part_weights(), "text": self.args.answer_weight}
        loss = torch.stack([weights[part] * value for part, value in sums.items()]).sum()
        if self.args.diagnose_steps and self.state.global_step % self.args.diagnose_steps == 0:
            self._diagnose(sums, draw, loss.item(), accuracy.item(), inputs)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # as transformers does: DDP takes the mean of gradients
        return (loss, {"loss_components": sums}) if return_outputs else loss

    def _time_step(self) -> None:
        now, step = time.perf_counter(), self.state.global_step
        if self._last_step is not None and step > self._last_step[0]:
            self._seconds = (now - self._last_step[1]) / (step - self._last_step[0])
        if self._last_step is None or step != self._last_step[0]:
            self._last_step = (step, now)

    def _diagnose(
        self, sums: dict[str, torch.Tensor], draw: Draw, loss: float, accuracy: float, inputs: dict[str, Any]
    ) -> None:
        """A line of diagnostics.jsonl; losses and accuracy are shares of this process's micro-batch."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        line: dict[str, Any] = {
            "step": self.state.global_step,
            "mode": "text" if draw.reads_text else "latent",
            "receiver": draw.receiver,
            "num_latents": draw.num_latents,
            "input_shape": list(inputs["input_ids"].shape),
            "loss": loss,
            FIRST: accuracy,
            "sec_per_step": self._seconds,
        }
        for part, value in sums.items():
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            square = sum(float(gradient.float().square().sum()) for gradient in gradients if gradient is not None)
            line |= {part: float(value.detach()), f"gradient_of_{part}": square**0.5}
        if self.args.should_save:
            folder = Path(str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "diagnostics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

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
        own = self._own_rows(inputs["labels"])
        names = sorted(self._wire().receivers)
        with torch.no_grad(), self.compute_loss_context_manager():
            for name in names:
                for part, values in self.parts(
                    model, inputs, Draw(name, answer_tokens=self.args.answer_tokens)
                ).items():
                    value = float(values[own.to(values.device)].sum())
                    self._eval_sums[f"{part}_{name}"] += value
                    self._eval_sums[part] += value / len(names)
        self._eval_sums["num_items"] += float(own.sum())
        return None, None, None

    def evaluation_metrics(self, sums: dict[str, float], num_items: float) -> Mapping[str, float | None]:
        return {name: value / num_items for name, value in sums.items() if name not in self.part_names}


def beginning(tokenizer: Any, text: str, num_tokens: int) -> str:
    """The part of a text that its first tokens hold."""
    encoded = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, truncation=True, max_length=num_tokens
    )
    return text[: encoded["offset_mapping"][-1][1]]
