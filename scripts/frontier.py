"""Quality against decoding speed: token LMs of several sizes and students, of the same tokens, in one picture.

    python scripts/frontier.py                                 # Python's standard library, half an hour on 2 cores
    python scripts/frontier.py --corpus python books --records true   # novels too; figures of docs/runs are taken
    python scripts/frontier.py --speed_again true              # only the speeds once more, on a quiet machine

writes frontier.png, frontier.md and frontier.json to --output_dir. Trained runs are kept in --work_dir; a stopped one
goes on from its last checkpoint. `books` needs the environment variable LATENTFORGE_DATA, a folder that holds
`books/train` and `books/valid`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class FrontierArguments:
    """What to train, and where it goes."""

    corpus: list[str] = field(default_factory=lambda: ["python"], metadata={"help": "python, books, or both."})
    work_dir: str = field(default="runs/frontier", metadata={"help": "Where runs are kept."})
    output_dir: str = field(default="results/frontier", metadata={"help": "Where picture, table and figures go."})
    speed_again: bool = field(default=False, metadata={"help": "Measure kept speeds again."})
    records: bool = field(default=False, metadata={"help": "Keep figures in, and take them from, docs/runs (in git)."})


def main(argv: Sequence[str] | None = None) -> str:
    """Parse, train, time, draw; returns the tables."""
    from pathlib import Path

    from trainers.arguments import parse_arguments
    from trainers.evaluation.frontier import CORPORA, report
    from trainers.evaluation.side_by_side import RECORDS

    (arguments,) = parse_arguments(FrontierArguments, argv=argv, description=__doc__)
    for name in arguments.corpus:
        if name not in CORPORA:
            raise SystemExit(f"unknown corpus {name!r}: known are {', '.join(CORPORA)}")
    records = RECORDS if arguments.records else None
    output_dir = Path(arguments.output_dir)
    frontiers = [CORPORA[name](Path(arguments.work_dir), records_dir=records) for name in arguments.corpus]
    found = report(frontiers, output_dir, arguments.speed_again)
    text = (output_dir / "frontier.md").read_text(encoding="utf-8")
    print(text)
    for title, entry in found.items():
        best = entry["best"]
        verdict = (
            "no student has token LMs of both higher and lower speed"
            if best is None
            else (f"{best['label']} is {best['advantage']:+.3f} nats/token ahead of the token LM of its speed")
        )
        print(f"{title}: {verdict}")
    print(f"kept in {output_dir}")
    return text


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
