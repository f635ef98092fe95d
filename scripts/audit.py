"""Look for what a security team would find: bandit over the source, pip-audit over what is installed.

    python scripts/audit.py --pip_audit .venv-audit/bin/pip-audit      # make audit installs it there

Exit status: 0 when nothing is unexplained, 1 where something is, 3 where the service of advisories cannot be reached.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


# `python scripts/audit.py` finds what stands beside this file, and not the room that it is in
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--pip_audit", default=".venv-audit/bin/pip-audit", help="the program")
    arguments = parser.parse_args(argv)

    from trainers.evaluation.audit import ServiceAway, advisories, bandit_findings

    found = bandit_findings()
    print(f"bandit: {len(found)} unexplained", *found, sep="\n  ")
    try:
        known = advisories(arguments.pip_audit)
    except ServiceAway as error:
        print(f"pip-audit: {error}", file=sys.stderr)
        return 1 if found else 3
    print(f"pip-audit: {len(known.findings)} unexplained in {known.looked_up} packages", *known.findings, sep="\n  ")
    print(f"  not known to the service: {', '.join(known.skipped) or 'none'}")
    return 1 if found or known.findings else 0


if __name__ == "__main__":
    from trainers.command_line import run

    run(main, returns_status=True)
