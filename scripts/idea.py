"""An idea model: a text becomes a few vectors, which are thought about and read out.

    python scripts/idea.py --mode train                          (SAMSum, ModernBERT, GPT-2: the first model's data)
    python scripts/idea.py --config scripts/configs/idea/seed.yaml --batch-size 8 --learning-rate 1e-4 --epochs 5 \\
        --max-train-samples 10000
    python scripts/idea.py --mode train --dataset reasoning --data builtin:arithmetic --steps 6
    python scripts/idea.py --mode inference --checkpoint checkpoints/idea         (texts, `interp`, `steps`, `exit`)
    python scripts/idea.py --mode generate --checkpoint checkpoints/idea --input "Your text" --max-length 128 \\
        --temperature 0.7 --top-p 0.9

Training takes every flag of transformers' `TrainingArguments`. It writes the model without its receiver to
`--output_dir`, with `eval_results.json`, `trainer_state.json` (the log), `samples.jsonl` (held-out texts and what was
said of them after every step of thinking) and `README.md` (its card). Data sets are those of `trainers.tasks`: samsum,
dialogsum, reasoning (GSM8K with its steps), text and files of one's own among them.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal


ENCODER = "answerdotai/ModernBERT-base"


@dataclass
class IdeaArguments:
    """What is done, with what model; see `LatentForgeIdeaConfig`."""

    mode: Literal["train", "inference", "generate"] = field(
        default="train", metadata={"help": "inference: texts from the keyboard; generate: of --input."}
    )
    checkpoint: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a model; train goes on from it. Default of other modes: output_dir."},
    )
    receiver: str | None = field(
        default=None,
        metadata={"help": "Language model that reads: folder or Hub id. Default: the checkpoint's, or GPT-2."},
    )
    receiver_dtype: str = field(default="auto", metadata={"help": "Of its weights: auto, float32, bfloat16."})
    encoder: str | None = field(
        default=None, metadata={"help": f"Of a new model: folder or Hub id. Default: {ENCODER}."}
    )
    encoder_layers: int | None = field(default=None, metadata={"help": "Its first so many. Default: all."})
    seed_shapes: bool = field(
        default=False, metadata={"help": "Shapes of the first model: one idea; other flags win over them."}
    )
    num_ideas: int | None = field(default=None, metadata={"help": "Default: 8."})
    latent_size: int | None = field(default=None, metadata={"help": "Numbers of an idea. Default: 256."})
    pooling: Literal["mean", "queries"] | None = field(default=None, metadata={"help": "Default: mean."})
    pooling_layers: int | None = field(
        default=None, metadata={"help": "Blocks in which ideas look at all of the text. Default: 0."}
    )
    compression_hidden: int | None = field(default=None, metadata={"help": "Default: 512."})
    middle_hidden: int | None = field(default=None, metadata={"help": "Default: 512."})
    middle_layers: int | None = field(default=None, metadata={"help": "Linear maps. Default: 3."})
    prefix_len: int | None = field(default=None, metadata={"help": "Vectors for the receiver. Default: 10."})
    steps: int | None = field(
        default=None, metadata={"help": "Of thinking. Default: of a new model 1, else the checkpoint's."}
    )
    lora_r: int = field(
        default=0,
        metadata={"help": "Train the receiver too, by LoRA of this rank on all its layers. Default: frozen."},
    )
    input: str | None = field(default=None, metadata={"help": "generate: the text."})
    max_length: int = field(default=128, metadata={"help": "Tokens of what is said, at most."})
    temperature: float = field(default=0.0, metadata={"help": "0: greedy."})
    top_p: float = field(default=1.0, metadata={"help": "Sample among the likeliest tokens of this mass, in (0, 1]."})
    device: str | None = field(default=None, metadata={"help": "Of inference and generate. Default: cuda, or cpu."})

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}: 1 keeps every token")
        if self.lora_r < 0:
            raise ValueError(f"lora_r must not be negative, got {self.lora_r}")
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")
        if (self.input is None) == (self.mode == "generate"):
            raise ValueError("input is the text of mode generate: give both, or neither")
        if self.checkpoint is not None and self.mode == "train":
            for name in NEW_MODEL:
                if getattr(self, name):
                    raise ValueError(f"{name} ({getattr(self, name)}) is about a new model: drop it, or checkpoint")

    def config_kwargs(self) -> dict[str, Any]:
        """The fields of `LatentForgeIdeaConfig` that are given here."""
        names = {"num_pooling_layers": self.pooling_layers}
        names |= {name: getattr(self, name) for name in NEW_MODEL if name in SHAPES}
        return {name: value for name, value in {**names, "steps": self.steps}.items() if value is not None}

    def generation_options(self) -> dict[str, Any]:
        """For `read` and `generate` of the model."""
        options: dict[str, Any] = {"max_new_tokens": self.max_length}
        if self.temperature:
            options |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return options


SHAPES = "num_ideas latent_size pooling compression_hidden middle_hidden middle_layers prefix_len".split()
NEW_MODEL = ("encoder", "encoder_layers", "seed_shapes", "pooling_layers", *SHAPES)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the final metrics of a training, or what was said under `text`."""
    from trainers.arguments import parse_arguments
    from trainers.idea_config import IdeaConfig
    from trainers.wire_data import IdeaDataArguments
    from trainers.wire_flags import IdeaAliases, apply_aliases

    args, data_args, aliases, training_args = parse_arguments(
        IdeaArguments, IdeaDataArguments, IdeaAliases, IdeaConfig, argv=argv, description=__doc__
    )
    apply_aliases(aliases, data_args, training_args)
    if args.mode == "train":
        return train(args, data_args, training_args)
    idea = load(args, args.checkpoint or training_args.output_dir)
    if args.mode == "generate":
        text = idea.generate(args.input, steps=args.steps, **args.generation_options())
        print(text)
        return {"text": text}
    session(idea, args)
    return {}


# -- models


def load(args: IdeaArguments, checkpoint: str) -> Any:
    """A saved model with its receiver.

    Raises:
        ValueError: no idea model, a receiver that nobody knows the place of.
    """
    from trainers.wire_models import load_wire

    name, place = known_receiver(checkpoint, args.receiver)
    return load_wire(checkpoint, {name: place}, args.device, args.receiver_dtype)


def known_receiver(checkpoint: str, given: str | None) -> tuple[str, str]:
    """Name of the only bridge of a saved model, and where its language model lies."""
    from transformers import AutoConfig

    import modeling_latentforge  # noqa: F401  (registers our models with the Auto classes)
    from trainers.command_line import model_path

    config = AutoConfig.from_pretrained(model_path("checkpoint", checkpoint))
    if config.model_type != "latentforge_idea" or len(config.bridges) != 1:
        raise ValueError(
            f"checkpoint: {checkpoint} holds no idea model with one receiver: train one with --mode train."
        )
    place = given or config.receiver
    if place is None:
        raise ValueError(f"{checkpoint} was trained for a model that is not on the Hub: add --receiver FOLDER.")
    return next(iter(config.bridges)), place


def build(args: IdeaArguments) -> Any:
    """A new model with its receiver attached, or the checkpoint's."""
    from transformers import AutoTokenizer

    from modeling_latentforge import LatentForgeIdea, LatentForgeIdeaConfig
    from modeling_latentforge.configuration_idea import SEED
    from trainers.command_line import model_path
    from trainers.model_card import hub_id
    from trainers.wire_build import build_wire, pretrained_backbone, sees_ahead
    from trainers.wire_lora import add_adapter, has_adapter
    from trainers.wire_models import attach_receiver, load_encoder, load_receiver, parse_receivers

    if args.checkpoint is not None:
        name, place = known_receiver(args.checkpoint, args.receiver)
        idea: Any
        idea, folder = load_encoder(args.checkpoint)
        attach_receiver(idea, folder, name, place, args.receiver_dtype)
        if args.steps is not None:
            idea.config.steps = args.steps
    else:
        place = args.receiver or str(LatentForgeIdeaConfig.receiver)
        path = model_path("encoder", args.encoder or ENCODER)
        backbone = pretrained_backbone(path, args.encoder_layers)
        shapes = SEED if args.seed_shapes else {}
        fields = {**shapes, **args.config_kwargs(), "receiver": place if hub_id(place) else None}
        idea = build_wire(backbone, AutoTokenizer.from_pretrained(path), LatentForgeIdea, **fields)
        if not sees_ahead(idea.encoder.backbone):
            print(f"{path}: a {backbone.config.model_type} keeps its causal mask: ideas see less of a text's end.")
        ((name, place),) = parse_receivers([place]).items()
        idea.add_receiver(name, load_receiver(place, dtype=args.receiver_dtype))
    if args.lora_r and not has_adapter(idea.receivers[name]):
        add_adapter(idea.receivers[name], args.lora_r)
    return idea


# -- training


def train(args: IdeaArguments, data_args: Any, training_args: Any) -> dict[str, float]:
    """Build, train, evaluate, save; returns the final metrics."""
    from transformers import set_seed

    from trainers.command_line import check_writable
    from trainers.idea_trainer import IdeaTrainer
    from trainers.model_card import license_of_all
    from trainers.wire_data import load_examples, readable

    training_args.check()
    if training_args.should_save:
        check_writable(training_args.output_dir)
    print(training_args.describe_process(), flush=True)
    set_seed(training_args.seed)
    idea = build(args)
    train_dataset, eval_dataset = (readable(idea, examples) for examples in load_examples(data_args))
    trainer = IdeaTrainer(idea, training_args, train_dataset=train_dataset, eval_dataset=eval_dataset)
    trained = sum(x.numel() for x in idea.parameters() if x.requires_grad)
    print(f"idea: {idea.num_parameters() / 1e6:.2f} M parameters, {trained / 1e6:.2f} M of them trained", flush=True)
    trainer.train(resume_from_checkpoint=training_args.checkpoint())
    metrics = trainer.evaluate()
    trainer.save_model()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    base, reader = args.checkpoint or args.encoder or ENCODER, args.receiver or idea.config.receiver
    trainer.create_model_card(
        finetuned_from=None if args.checkpoint else base,
        dataset=data_args.describe(),
        license=license_of_all([base, str(reader)]),
    )
    if trainer.is_world_process_zero():
        print("held-out:", {name: round(value, 6) for name, value in metrics.items() if name.startswith("eval_")})
    trainer.end()
    return metrics


# -- from the keyboard


def session(idea: Any, args: IdeaArguments) -> None:
    """Answer texts until `exit` or the end of the input.

    `interp` asks for two texts and says what lies between them, `interp slerp` the same on the arc; `steps` asks for a
    text and says what is read after every step of thinking.
    """
    print("a text, interp, interp slerp, steps or exit")
    options = args.generation_options()
    while True:
        try:
            line = input("> ").strip()
            if line == "exit":
                return
            if line in ("interp", "interp slerp"):
                texts = [input("first: "), input("second: ")]
                for alpha in (0, 0.25, 0.5, 0.75, 1):
                    kind = line.removeprefix("interp").strip() or "linear"
                    said = idea.interpolate_and_generate(*texts, alpha, kind, steps=args.steps, **options)
                    print(f"{alpha:4.2f}  {said}")
            elif line == "steps":
                for number, ideas in enumerate(idea.think(idea.get_latent_vector(input("text: "), 0), args.steps)):
                    print(f"{number:4d}  {idea.read(ideas, **options)[0]}")
            elif line:
                print(idea.generate(line, steps=args.steps, **options))
        except EOFError:
            return
        except ValueError as error:  # a text that is too long ends no session
            print(error, file=sys.stderr)


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
