"""Trainer of the idea model: ideas that say their text, encoders that find them, a middle model that thinks."""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from modeling_latentforge import LatentForgeIdea
from modeling_latentforge.modeling_wire import LatentForgeWireOutput

from .idea_config import IdeaConfig
from .losses.answers import answer_loss
from .wire_trainer import Draw, WireCollator, WireTrainer, beginning


logger = logging.getLogger(__name__)

Stage = Literal["align", "encoder", "middle"]
ENCODER = ("encoder.", "refiner.", "quantizer.")  # how the names of what finds an idea begin
MIDDLE = "middle."


class IdeaCollator(WireCollator):
    """As a wire's, with the texts of an example's `steps`, where it has any."""

    def __call__(self, examples: Iterable[Any]) -> dict[str, Any]:
        rows = [example if isinstance(example, Mapping) else vars(example) for example in examples]
        return {**super().__call__(rows), "steps": [tuple(row.get("steps") or ()) for row in rows]}


class IdeaTrainer(WireTrainer):
    """Trains an idea model through its frozen receiver, in three stages:

        stage    steps                      what learns                 what is said
        align    the first `align_steps`    bridge                      the text itself, of ideas as they are
        encoder  `encoder_steps` more       bridge, encoder             the same
        middle   all others                 all, or the middle model    the answer, after the last step of thinking

    In the last stage each earlier step of an example with a chain of thought is read too: after step i the ideas say
    step i's text, and from the chain's last step on the answer. So as many steps as the longest chain serve shorter
    ones as well, and nothing has to know how long a chain is.

    Evaluation is always of the last stage. With it held-out texts are answered into `samples.jsonl`, every step read.

    Args:
        model: an idea model with its receiver attached; its backbone is frozen unless `train_backbone`.

    Raises:
        ValueError: as [`WireTrainer`]; `middle_alone` of a model that takes no step.
    """

    args: IdeaConfig
    part_names = (*WireTrainer.part_names, "steps")

    def __init__(self, model: LatentForgeIdea, args: IdeaConfig | None = None, **kwargs: Any):
        args = args if args is not None else IdeaConfig()
        if args.middle_alone and not model.config.steps:
            raise ValueError("middle_alone is set, and the model takes no step of thinking: raise steps.")
        model.encoder.backbone.requires_grad_(args.train_backbone)
        kwargs.setdefault("data_collator", IdeaCollator(model))
        super().__init__(model=model, args=args, **kwargs)
        self._learners: dict[str, nn.Parameter] = {}  # what may learn at all, while it trains
        self._reads_steps = bool(args.steps_weight and model.config.steps > 1) and any(
            row["steps"] if isinstance(row, Mapping) and "steps" in row else getattr(row, "steps", ())
            for dataset in (self.train_dataset, self.eval_dataset)
            for row in dataset or ()
        )

    def part_weights(self) -> dict[str, float]:
        return {**super().part_weights(), "steps": self.args.steps_weight if self._reads_steps else 0.0}

    # -- stages

    def stage(self) -> Stage:
        """Of this step; evaluation is of the last."""
        step = self.state.global_step
        if not self.model.training or step >= self.args.align_steps + self.args.encoder_steps:
            return "middle"
        return "align" if step < self.args.align_steps else "encoder"

    def learns(self, name: str, stage: Stage) -> bool:
        """Whether a parameter learns in a stage."""
        if stage == "middle":
            return name.startswith(MIDDLE) or not self.args.middle_alone
        if name.startswith(ENCODER):
            return stage == "encoder"
        return not name.startswith(MIDDLE)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            for parameter in self._learners.values():
                parameter.requires_grad_(True)
            self._learners = {}

    def drawn(self) -> Draw:
        draw = super().drawn()
        if self.stage() == "middle":
            return draw
        return Draw(draw.receiver, answer_tokens=self.args.repeat_tokens, repeats=True)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if not self._learners:  # adapters of receivers are among them only now
            self._learners = {name: x for name, x in self._wire().named_parameters() if x.requires_grad}
        stage = self.stage()
        for name, parameter in self._learners.items():
            parameter.requires_grad_(self.learns(name, stage))
        return super().compute_loss(model, inputs, *args, **kwargs)

    def forward_kwargs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"steps": None if self.stage() == "middle" else 0}

    def parts(self, model: nn.Module, inputs: dict[str, Any], draw: Draw) -> dict[str, torch.Tensor]:
        if draw.repeats:
            # one token more than counts: whether a text that was cut goes on is not asked
            tokenizer = self._wire().receiver(draw.receiver).tokenizer
            texts = [beginning(tokenizer, text, self.args.repeat_tokens + 1) for text in inputs["contexts"]]
            inputs = {**inputs, "prompts": [""] * len(texts), "answers": texts}
        return super().parts(model, inputs, draw)

    def more_parts(self, output: Any, inputs: dict[str, Any], draw: Draw) -> dict[str, torch.Tensor]:
        if not self._reads_steps or draw.repeats or draw.reads_text:
            return {}
        found = output.latent_mask.new_zeros(len(inputs["prompts"]), dtype=torch.float32)
        rows = [row for row, steps in enumerate(inputs["steps"]) if steps]
        between = output.thoughts[1:-1]
        if not rows:
            return {"steps": found}
        texts = [
            inputs["steps"][row][number] if number + 1 < len(inputs["steps"][row]) else inputs["answers"][row]
            for number in range(len(between))
            for row in rows
        ]
        ideas = torch.cat([thought[rows] for thought in between])
        message = LatentForgeWireOutput(ideas, ideas.new_ones(ideas.shape[:2]).bool())
        prompts = [inputs["prompts"][row] for row in rows] * len(between)
        nats = answer_loss(*self._wire().ask(draw.receiver, message, prompts, texts))
        return {
            "steps": found.index_copy(0, torch.tensor(rows, device=found.device), nats.view(-1, len(rows)).mean(0))
        }

    # -- samples

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = super().evaluate(*args, **kwargs)
        if self.args.sample_outputs and self.eval_dataset is not None and self.is_world_process_zero():
            self._write_samples()
        return metrics

    @torch.no_grad()
    def _write_samples(self) -> None:
        """What the model says of held-out texts, a line each of samples.jsonl and of the log."""
        idea = self._wire()
        was_training = idea.training
        idea.eval()
        folder = Path(str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        chosen = [self.eval_dataset[row] for row in range(min(self.args.sample_outputs, len(self.eval_dataset)))]
        with (folder / "samples.jsonl").open("a", encoding="utf-8") as file, self.compute_loss_context_manager():
            for example in chosen:
                row = example if isinstance(example, Mapping) else vars(example)
                thoughts = torch.cat(idea.encode([row["context"]]).thoughts)
                prompts = [row["prompt"]] * len(thoughts)
                for name in sorted(idea.receivers):
                    said = idea.read(thoughts, prompts, receiver=name, max_new_tokens=self.args.sample_tokens)
                    line = {"step": self.state.global_step, "receiver": name, "context": row["context"]}
                    line |= {"answer": row["answers"][0], "said_after_each_step": said}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    logger.info("step %d, %s: %s", self.state.global_step, name, said[-1])
        idea.train(was_training)
