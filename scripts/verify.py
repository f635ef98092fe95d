"""Measure the targets of a topic, print target, figure and verdict, and keep them in results/verify_<topic>.json.

    python scripts/verify.py --topic main                  # every row that is not measured yet
    python scripts/verify.py --topic main --row NAME       # one row, also a long one, again
    python scripts/verify.py --topic main --list

Exit status: 0 when every row meets its target, 1 while one falls short or is missing, 2 for a wrong call.
"""

import argparse
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--topic", default="main", help="which table of targets (default: main)")
    parser.add_argument("--row", help="measure only this row, even if it is long or measured already")
    parser.add_argument("--long", action="store_true", help="also rows that take more than 30 minutes")
    parser.add_argument("--fresh", action="store_true", help="measure again what is measured already")
    parser.add_argument("--list", action="store_true", help="print the rows and their targets, measure nothing")
    parser.add_argument("--results_dir", default="results")
    parser.add_argument("--work_dir", default="runs/verify", help="where rows keep what they train")
    arguments = parser.parse_args(argv)

    from trainers.verification import load_topic, run_topic

    try:
        rows = load_topic(arguments.topic)
        if arguments.list:
            for row in rows:
                print(f"{row.name}{' (long)' if row.long else ''}: {row.what}\n    target {row.target}")
                if row.setup:
                    print(f"    setup  {row.setup}")
            return 0
        return run_topic(
            arguments.topic,
            rows,
            only=arguments.row,
            results_dir=arguments.results_dir,
            work_dir=arguments.work_dir,
            long=arguments.long,
            fresh=arguments.fresh,
            say=lambda line: print(line, flush=True),
        )
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    from trainers.command_line import run

    run(main, returns_status=True)
