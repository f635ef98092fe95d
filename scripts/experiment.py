"""Answer questions of docs/experiments.md: train their variants side by side and print their tables.

    python scripts/experiment.py --name decoder_window
    python scripts/experiment.py --name parallel_head input_mode --patch_size 4 --seeds 0 1

Trained runs are kept in --work_dir and not trained again; a stopped run goes on from its last checkpoint.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class ExperimentArguments:
    """The questions, and the text and budget that their variants share."""

    name: list[str] = field(metadata={"help": "Which experiments; an unknown one names those there are."})
    data: str = field(default="builtin:python", metadata={"help": "As in the training scripts."})
    eval_data: str | None = field(default=None, metadata={"help": "Held-out text; default: a part of data."})
    vocab_size: int = field(default=4096, metadata={"help": "Entries of the tokenizer that is trained on data."})
    num_tokens: int = field(default=2_000_000, metadata={"help": "Training tokens per run."})
    block_size: int = field(default=512, metadata={"help": "Tokens in a row."})
    patch_size: int = field(default=8, metadata={"help": "Tokens per patch."})
    hidden_size: int = field(default=256, metadata={"help": "Width of the backbone."})
    num_hidden_layers: int = field(default=4, metadata={"help": "Layers of the backbone."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Highest learning rate."})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "A run per variant and seed."})
    work_dir: str = field(default="runs/experiments", metadata={"help": "Where runs are kept."})
    records: bool = field(default=False, metadata={"help": "Keep figures in, and take them from, docs/runs (in git)."})


def main(argv: Sequence[str] | None = None) -> str:
    """Parse, train, judge, print; returns the tables."""
    from pathlib import Path

    from trainers.arguments import parse_arguments
    from trainers.evaluation.experiments import EXPERIMENTS, answer, runs
    from trainers.evaluation.side_by_side import RECORDS, SideBySide

    (arguments,) = parse_arguments(ExperimentArguments, argv=argv, description=__doc__)
    for name in arguments.name:
        if name not in EXPERIMENTS:
            raise SystemExit(f"unknown experiment {name!r}: known are {', '.join(EXPERIMENTS)}")
    table = SideBySide(
        Path(arguments.work_dir),
        arguments.data,
        arguments.eval_data,
        arguments.vocab_size,
        arguments.num_tokens,
        block_size=arguments.block_size,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        records_dir=RECORDS if arguments.records else None,
    )
    setting = (table, arguments.patch_size, arguments.learning_rate, arguments.seeds)
    # all at once: the cores stay busy, and a run that two questions ask for is trained once
    table.results([run for name in arguments.name for variant in runs(name, *setting).values() for run in variant])
    text = "\n\n".join(answer(name, *setting) for name in arguments.name)
    print(text)
    return text


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
