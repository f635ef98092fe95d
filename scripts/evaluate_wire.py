"""What a wire's latents are worth to its receivers, beside text, less text, nothing, and other texts' latents.

    W="runs/wire --receivers llama=runs/llama neox=runs/neox"
    python scripts/evaluate_wire.py $W --dataset text --data books/valid --max_examples 200
    python scripts/evaluate_wire.py $W --dataset hotpot,sst2,agnews --latent_len 16,32,64
    python scripts/evaluate_wire.py $W --config scripts/configs/wire/baseline.yaml --dataset squad --data dev.jsonl

MODEL is a folder of a wire. Methods: text, latent, token_budget, closed_book, shuffled, zero, replay, raw, anchor,
adapter, llmlingua2, joint, linear_probe (what each is: trainers/evaluation/wire_methods.py). Lists are written with
commas or spaces.

Writes wire_evaluation.json, wire_evaluation.md, rate-quality curves and predictions.jsonl, every answer, into
MODEL/evaluation, or --output_dir, and the figures into the model card beside the weights; scripts/compare_runs.py
compares two such folders. Finished parts are kept in its folder `parts`: a command that was interrupted goes on where
it stopped. Examples that encoder or receivers cannot read whole are left out for all methods, and counted.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class EvaluateWireArguments:
    """Which wire, which readers, which questions."""

    model: str = field(metadata={"help": "Folder or Hub id; may be written without --model, as the first word."})
    receivers: list[str] = field(metadata={"help": "name=folder or name=hub_id, one for each bridge of the wire."})
    dataset: list[str] = field(
        default_factory=lambda: ["squad"],
        metadata={"help": "Of squad, hotpot, sst2, agnews, trec, gsm8k, text, custom."},
    )
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "A file, folder or Hub id for each data set; hub, or none at all: its own on the Hub."},
    )
    split: str | None = field(default=None, metadata={"help": "Default: validation, or test where there is none."})
    hotpot_setting: str = field(default="distractor", metadata={"help": "distractor or oracle."})
    text_mode: str = field(
        default="continue", metadata={"help": "text: continue (what follows) or reconstruct (itself)."}
    )
    context_tokens: int = field(default=128, metadata={"help": "text: of a context, 4 characters each."})
    continue_tokens: int = field(default=32, metadata={"help": "text: of what follows."})
    text_field: str = field(default="text", metadata={"help": "text: field that holds it."})
    repeat_prompt: str = field(default="", metadata={"help": "text, reconstruct: the prompt, as in the training."})
    methods: list[str] = field(
        default_factory=lambda: ["text,latent,token_budget,closed_book,shuffled,zero"],
        metadata={"help": "See above."},
    )
    latent_len: list[str] = field(
        default_factory=list, metadata={"help": "Numbers of latents; default: as many as the wire makes of its own."}
    )
    seeds: list[str] = field(
        default_factory=lambda: ["42,123,456"], metadata={"help": "Of which examples are drawn, and of all draws."}
    )
    max_examples: int | None = field(default=None, metadata={"help": "Drawn of each data set and seed; default: all."})
    max_new_tokens: int = field(default=24, metadata={"help": "Of every answer alike."})
    first_token_top_p: float | None = field(default=None, metadata={"help": "Draw the first token from these."})
    first_token_temperature: float | None = field(default=None, metadata={"help": "Of that draw; then greedy."})
    eos_ban_steps: int = field(default=0, metadata={"help": "So many first tokens do not end an answer."})
    nll_tokens: int | None = field(default=None, metadata={"help": "Gold tokens that count for NLL; default: all."})
    batch_size: int = field(default=8, metadata={"help": "Examples at once."})
    latency_examples: int = field(default=8, metadata={"help": "Timed one by one; 0: none."})
    resamples: int = field(default=10_000, metadata={"help": "Of the bootstrap."})
    llmlingua_model: str = field(
        default="microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank",
        metadata={"help": "Of the method llmlingua2."},
    )
    device: str | None = field(default=None, metadata={"help": "Default: cuda where there is one, else cpu."})
    dtype: str | None = field(default=None, metadata={"help": "Of the receivers; default: as saved."})
    output_dir: str | None = field(default=None, metadata={"help": "Default: MODEL/evaluation."})

    def __post_init__(self) -> None:
        from trainers.arguments import split_words
        from trainers.command_line import model_path
        from trainers.evaluation.wire_evaluation import WireSettings
        from trainers.evaluation.wire_methods import Decoding
        from trainers.tasks import TASKS, TextCut
        from trainers.wire_data import HUB, OTHER_NAMES
        from trainers.wire_models import parse_receivers

        self.dataset = [OTHER_NAMES.get(name, name) for name in split_words(self.dataset)]
        self.methods = split_words(self.methods)
        for name in self.dataset:
            if name not in TASKS:
                raise ValueError(f"unknown dataset {name!r}: known are {', '.join(TASKS)}, hotpot")
        if not self.dataset:
            raise ValueError("dataset: name at least one")
        if self.data and len(self.data) != len(self.dataset):
            raise ValueError(
                f"data names {len(self.data)} sources for the {len(self.dataset)} data sets "
                f"{', '.join(self.dataset)}: give one for each, `{HUB}` for a data set's own"
            )
        places = [None if place == HUB else place for place in self.data] or [None] * len(self.dataset)
        self.sources: dict[str, str | None] = dict(zip(self.dataset, places, strict=True))
        self.counts = whole_numbers("latent_len", self.latent_len)
        self.numbers = whole_numbers("seeds", self.seeds)
        if not self.numbers:
            raise ValueError("seeds: name at least one")
        if self.max_examples is not None and self.max_examples < 1:
            raise ValueError(f"max_examples must be at least 1, got {self.max_examples}")
        self.text_cut = TextCut(
            self.text_mode,  # type: ignore[arg-type]
            self.context_tokens,
            self.continue_tokens,
            text_field=self.text_field,
        )
        self.settings = WireSettings(
            methods=tuple(self.methods),
            latent_lens=tuple(self.counts) or (None,),
            decoding=Decoding(
                self.max_new_tokens, self.first_token_top_p, self.first_token_temperature, self.eos_ban_steps
            ),
            nll_tokens=self.nll_tokens,
            batch_size=self.batch_size,
            latency_examples=self.latency_examples,
            resamples=self.resamples,
            llmlingua_model=self.llmlingua_model,
        )
        self.places = parse_receivers(self.receivers)
        self.model = model_path("model", self.model)


def whole_numbers(name: str, values: Sequence[str]) -> list[int]:
    """Raises ValueError: something else."""
    from trainers.arguments import split_words

    found = []
    for word in split_words(values):
        try:
            found.append(int(word))
        except ValueError:
            raise ValueError(f"{name}: {word!r} is no whole number; write --{name} 16,32,64") from None
    return found


def main(argv: Sequence[str] | None = None) -> Path:
    """Parse, load, answer, write; returns the path of the JSON."""
    from trainers.arguments import parse_arguments

    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--model")
    (arguments,) = parse_arguments(EvaluateWireArguments, argv=argv, description=__doc__)

    from transformers.utils import logging

    from trainers.command_line import check_writable, progress_bar, say
    from trainers.evaluation.wire_evaluation import WireEvaluation, readable
    from trainers.evaluation.wire_report import write_wire_evaluation
    from trainers.model_card import read_evaluation, update_card, weights_hash
    from trainers.tasks import TASKS
    from trainers.wire_models import load_wire

    logging.set_verbosity_error()  # notes of `generate` between the lines of progress
    started = time.perf_counter()
    folder = Path(arguments.model)
    output_dir = Path(arguments.output_dir or (folder / "evaluation" if folder.is_dir() else "results/evaluation"))
    check_writable(output_dir)
    weights = weights_hash(arguments.model)  # before they are read: a training may go on in that folder
    loaded = _examples(arguments)
    wire = load_wire(arguments.model, arguments.places, arguments.device, arguments.dtype)
    examples = readable(wire, loaded, arguments.settings.decoding.max_new_tokens)
    metrics = {name: TASKS[name].metric for name in arguments.dataset}
    evaluation = WireEvaluation(wire, examples, metrics, arguments.settings, output_dir / "parts", say, progress_bar)
    report, records = evaluation.run()
    report["conditions"] |= {
        "command": f"python scripts/evaluate_wire.py {shlex.join(argv[1:] if argv[0] == '--model' else argv)}",
        "data": ", ".join(f"{name} ({place or 'Hub'})" for name, place in arguments.sources.items()),
        "receivers": ", ".join(f"{name} ({place})" for name, place in arguments.places.items()),
        "weights": weights,
        "seconds": round(time.perf_counter() - started, 1),
    }
    report["conditions"]["left_out"] = {
        f"{name}, seed {seed}": len(loaded[name, seed]) - len(kept) for (name, seed), kept in examples.items()
    }
    paths = write_wire_evaluation(report, records, output_dir)
    if (folder / "README.md").exists() and output_dir == folder / "evaluation" and read_evaluation(folder):
        update_card(folder)
    print(f"{report['conditions']['seconds']:.0f} s; kept in {paths['md']}, {paths['json']}, {paths['predictions']}")
    return paths["json"]


def _examples(arguments: EvaluateWireArguments) -> dict[tuple[str, int], Any]:
    from dataclasses import replace

    from trainers.tasks import has_split, load_task

    found: dict[tuple[str, int], Any] = {}
    for name, source in arguments.sources.items():
        split = arguments.split or ("validation" if has_split(name, "validation", source) else "test")
        options: dict[str, Any] = {"text_cut": arguments.text_cut} if name == "text" else {}
        if name == "hotpotqa":
            options["hotpot_setting"] = arguments.hotpot_setting
        for seed in arguments.numbers if arguments.max_examples else arguments.numbers[:1]:
            found[name, seed] = load_task(name, split, source, arguments.max_examples, seed, **options)
            if name == "text" and arguments.text_mode == "reconstruct":
                found[name, seed] = [replace(x, prompt=arguments.repeat_prompt) for x in found[name, seed]]
        for seed in arguments.numbers:  # without a draw all have the same
            found.setdefault((name, seed), found[name, arguments.numbers[0]])
    return found


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
