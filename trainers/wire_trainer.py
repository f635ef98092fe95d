"""Trainer of the wire: latents that frozen language models can read."""

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modeling_latentforge import LatentForgeWire

from .base_trainer import LatentTrainer
from .losses.answers import answer_divergence, answer_loss
from .wire_config import WireConfig


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
        input_ids, attention_mask = self.wire.ids_of(contexts)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": torch.ones(len(rows), 1, dtype=torch.long),  # every example counts alike
            "contexts": contexts,
            "prompts": [row["prompt"] for row in rows],
            "answers": [row["answers"][0] for row in rows],
        }


class WireTrainer(LatentTrainer):
    """Trains encoder, quantizer and bridges of a [`LatentForgeWire`] through its frozen receivers.

    Each step asks one receiver, drawn from the step's number and the seed, so that a resumed run asks the same.
    Evaluation asks all of them: `eval_loss`, and `eval_answer_<name>` for each.

    Args:
        model: a wire with at least one receiver attached.

    Raises:
        ValueError: no receiver attached.
    """

    args: WireConfig
    part_names = ("answer", "kd")

    def __init__(self, model: LatentForgeWire, args: WireConfig | None = None, **kwargs: Any):
        if not model.receivers:
            raise ValueError("No receiver is attached, and nobody would read the latents: call `attach` first.")
        kwargs.setdefault("data_collator", WireCollator(model))
        super().__init__(model=model, args=args if args is not None else WireConfig(), **kwargs)

    def count_items(self, labels: torch.Tensor) -> torch.Tensor:
        return (labels != -100).sum()

    def part_weights(self) -> dict[str, float]:
        return {"answer": self.args.answer_weight, "kd": self.args.kd_weight}

    # -- a step

    def drawn(self) -> tuple[str, int | None]:
        """Receiver and number of latents of this step."""
        draw = random.Random(f"{self.args.seed}/{self.state.global_step}")
        wire = self._wire()
        name = draw.choice(sorted(wire.receivers))
        if self.args.min_latents is None:
            return name, None
        return name, draw.randint(min(self.args.min_latents, wire.config.num_latents), wire.config.num_latents)

    def _wire(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def parts(
        self, model: nn.Module, inputs: dict[str, Any], name: str, num_latents: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Each part of the loss, `(B,)` nats per token of a row's answer."""
        prompts, answers = inputs["prompts"], inputs["answers"]
        output = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            num_latents=num_latents,
            receiver=name,
            prompts=prompts,
            answers=answers,
        )
        logits, targets = output.answer_logits, output.answer_ids
        args, found = self.args, {}
        found["answer"] = answer_loss(logits, targets, args.first_token_weight, args.answer_tokens)
        if args.kd_weight:
            receiver = self._wire().receiver(name)
            with torch.no_grad():
                batch = receiver.compose(receiver.text_injection(inputs["contexts"]), prompts, answers)
                teacher, _ = receiver.answer_logits(None, batch)
            found["kd"] = answer_divergence(logits, teacher, targets, args.kd_temperature, args.answer_tokens)
        return found

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        name, num_latents = self.drawn()
        found = self.parts(model, inputs, name, num_latents)
        count = len(inputs["prompts"]) if num_items_in_batch is None else num_items_in_batch
        sums = {part: values.sum() / count for part, values in found.items()}
        if self._parts_last_step is None:
            self._parts_last_step = self.state.global_step
        for part, value in sums.items():
            self._parts[part] = self._parts.get(part, torch.zeros(())) + value.detach().float()
        if self.args.diagnose_steps and self.state.global_step % self.args.diagnose_steps == 0:
            self._diagnose(sums, name)
        weights = self.part_weights()
        loss = torch.stack([weights[part] * value for part, value in sums.items()]).sum()
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # as transformers does: DDP takes the mean of gradients
        return (loss, {"loss_components": sums}) if return_outputs else loss

    def _diagnose(self, sums: dict[str, torch.Tensor], name: str) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        line: dict[str, Any] = {"step": self.state.global_step, "receiver": name}
        for part, value in sums.items():
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            square = sum(float(gradient.float().square().sum()) for gradient in gradients if gradient is not None)
            line |= {part: float(value), f"gradient_of_{part}": square**0.5}
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
                for part, values in self.parts(model, inputs, name).items():
                    value = float(values[own.to(values.device)].sum())
                    self._eval_sums[f"{part}_{name}"] += value
                    self._eval_sums[part] += value / len(names)
        self._eval_sums["num_items"] += float(own.sum())
        return None, None, None

    def evaluation_metrics(self, sums: dict[str, float], num_items: float) -> Mapping[str, float | None]:
        return {name: value / num_items for name, value in sums.items() if name not in self.part_names}
