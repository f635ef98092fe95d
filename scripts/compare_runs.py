"""Which of two evaluations of the same examples is better, and whether it could be chance.

    python scripts/compare_runs.py runs/a/evaluation runs/b/evaluation
    python scripts/compare_runs.py evaluation_a evaluation_b --methods latent --metrics f1,nll --output d.json

A and B are folders of scripts/evaluate_wire.py. Each method, receiver and number of latents that both have is compared
on its examples, A less B: mean difference with its BCa interval, p of sign flips, McNemar's for right or wrong, and
Holm's adjustment over all that is printed. Runs of other examples, or without a metric that is asked for, are refused.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


# what may be compared, as far as it was measured
METRICS = ("f1", "em", "accuracy", "gsm8k", "token_f1", "rouge_l", "nll", "first_token_top1", "first_token_top5")
GROUP = ("dataset", "receiver", "method", "latent_len")


@dataclass
class CompareArguments:
    """Which runs, and what of them."""

    first: str = field(metadata={"help": "A; may be written without --first, as the first word."})
    second: str = field(metadata={"help": "B; the second word."})
    methods: list[str] = field(default_factory=list, metadata={"help": "Only these; default: all that both have."})
    metrics: list[str] = field(
        default_factory=list, metadata={"help": f"Of {', '.join(METRICS)}; default: all that were measured."}
    )
    resamples: int = field(default=10_000, metadata={"help": "Of bootstrap and sign flips."})
    output: str | None = field(default=None, metadata={"help": "JSON file of the figures."})

    def __post_init__(self) -> None:
        from trainers.arguments import split_words

        self.methods, self.metrics = split_words(self.methods), split_words(self.metrics)
        unknown = [name for name in self.metrics if name not in METRICS]
        if unknown:
            raise ValueError(f"unknown metric {unknown[0]!r}: known are {', '.join(METRICS)}")
        if self.resamples < 1:
            raise ValueError(f"resamples must be at least 1, got {self.resamples}")


def read_records(path: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Records of an evaluation's folder by data set, receiver, method and number of latents.

    Raises:
        ValueError: no evaluation, or a line that is none of its records.
    """
    file = Path(path) / "predictions.jsonl" if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise ValueError(f"{path} holds no evaluation: there is no file {file}. scripts/evaluate_wire.py writes one.")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            groups.setdefault(tuple(record[name] for name in GROUP), []).append(
                {**record, "id": str(record["id"]), "document": str(record["document"]), "example": record["example"]}
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}:{number} is no record of an evaluation ({error!r})") from error
    if not groups:
        raise ValueError(f"{file} is empty: the evaluation measured nothing.")
    return groups


def compare_groups(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], asked: Sequence[str], resamples: int
) -> list[dict[str, Any]]:
    """One entry a metric, of `wire_statistics.compare`.

    Raises:
        ValueError: other examples on one side, the same ids of other examples, a metric that one side lacks.
    """
    from trainers.evaluation.wire_statistics import compare, scores_by_example

    sides = {
        name: {(record["id"], record["example"]) for record in side} for name, side in (("A", ours), ("B", theirs))
    }
    if sides["A"] != sides["B"]:
        only = {name: len(sides[name] - sides[other]) for name, other in (("A", "B"), ("B", "A"))}
        raise ValueError(
            f"the examples differ ({only['A']} only in A, {only['B']} only in B, {len(sides['A'] & sides['B'])} in "
            "both): evaluate both on the same data, seeds and number of examples"
        )
    measured = [{name for name in METRICS if all(x.get(name) is not None for x in side)} for side in (ours, theirs)]
    missing = [name for name in asked or METRICS if (name in measured[0]) != (name in measured[1])]
    missing += [name for name in asked if name not in measured[0] | measured[1]]
    if missing:
        where = [side for side, names in zip("AB", measured, strict=True) if missing[0] not in names]
        raise ValueError(f"the metric {missing[0]!r} is missing in {' and '.join(where)}: it was not measured there")
    documents = {record["id"]: record["document"] for record in ours}
    return [
        {
            "metric": name,
            "a": _mean(pair[0]),
            "b": _mean(pair[1]),
            **compare(*pair, documents, name, resamples),
        }
        for name in asked or [name for name in METRICS if name in measured[0]]
        for pair in [(scores_by_example(ours, name), scores_by_example(theirs, name))]
    ]


def _mean(scores: dict[str, float]) -> float:
    return sum(scores.values()) / len(scores)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse, read, compare, print; returns what `--output` holds."""
    from trainers.arguments import parse_arguments

    argv = list(sys.argv[1:] if argv is None else argv)
    for place, flag in enumerate(("--first", "--second")):
        if len(argv) > 2 * place and not argv[2 * place].startswith("-"):
            argv.insert(2 * place, flag)
    (arguments,) = parse_arguments(CompareArguments, argv=argv, description=__doc__)

    from trainers.evaluation.evaluation_report import Section, as_markdown
    from trainers.evaluation.wire_report import table_of_comparisons
    from trainers.evaluation.wire_statistics import adjust

    runs = read_records(arguments.first), read_records(arguments.second)
    keys = [key for key in runs[0] if key in runs[1] and (not arguments.methods or key[2] in arguments.methods)]
    if not keys:
        have = [", ".join(sorted({str(key[2]) for key in run})) for run in runs]
        raise ValueError(f"nothing of one is in the other: A has {have[0]}; B has {have[1]}")
    comparisons: list[dict[str, Any]] = []
    for key in keys:
        about = dict(zip(GROUP, key, strict=True))
        try:
            found = compare_groups(runs[0][key], runs[1][key], arguments.metrics, arguments.resamples)
        except ValueError as error:
            name = ", ".join(str(part) for part in key if part is not None)
            raise ValueError(f"{name}: {error}") from error
        comparisons += [{**about, "against": f"{entry['a']:.3f} less {entry['b']:.3f}", **entry} for entry in found]
    adjust(comparisons)
    lone = {
        name: [" ".join(str(part) for part in key if part is not None) for key in run if key not in other]
        for name, run, other in (("A", runs[0], runs[1]), ("B", runs[1], runs[0]))
        if not arguments.methods
    }
    sections = []
    for dataset in dict.fromkeys(entry["dataset"] for entry in comparisons):
        own = [entry for entry in comparisons if entry["dataset"] == dataset]
        sections.append(Section(str(dataset), [table_of_comparisons(own)]))
    print(as_markdown(f"A ({arguments.first}) less B ({arguments.second})", sections))
    for name, names in lone.items():
        if names:
            print(f"only in {name}: {'; '.join(names)}")
    report = {"a": arguments.first, "b": arguments.second, "comparisons": comparisons, "only": lone}
    if arguments.output:
        Path(arguments.output).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
