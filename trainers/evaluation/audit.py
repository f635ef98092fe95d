"""What bandit says of the source and pip-audit of what is installed."""

import json
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..verification import ROOT


SOURCES = ("modeling_latentforge", "trainers", "scripts")
# advisories that do not reach us, and why
EXPLAINED: dict[str, str] = {}


class ServiceAway(OSError):
    """The service of advisories cannot be asked."""


@dataclass(frozen=True)
class Finding:
    """Where, and what of it.

    Attributes:
        kind: of bandit's, or an advisory's id.
        place: file and line, or package and version.
        text: what it is.
    """

    kind: str
    place: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.kind} {self.text}"


def bandit_findings(root: Path = ROOT, sources: tuple[str, ...] = SOURCES) -> list[Finding]:
    """What `pyproject.toml` and the lines themselves do not explain.

    Raises:
        ImportError: bandit is not installed.
        ValueError: it could not read a file.
    """
    command = [sys.executable, "-m", "bandit", "-q", "-c", "pyproject.toml", "-f", "json", "-r", *sources]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if "No module named" in done.stderr:
        raise ImportError("bandit is missing: pip install 'latentforge[dev]'.")
    report = json.loads(done.stdout)
    if report["errors"]:
        raise ValueError(f"bandit could not read {report['errors'][0]['filename']}: {report['errors'][0]['reason']}.")
    return [
        Finding(one["test_id"], f"{one['filename']}:{one['line_number']}", one["issue_text"])
        for one in report["results"]
    ]


@dataclass(frozen=True)
class Advisories:
    """What is known of the packages.

    Attributes:
        findings: that `EXPLAINED` does not explain.
        looked_up: packages that the service knows.
        skipped: names of those that it does not: our own, and builds of somebody's.
    """

    findings: list[Finding]
    looked_up: int
    skipped: list[str]


def advisories(pip_audit: str | Path, packages: str | Path | None = None) -> Advisories:
    """Known faults of the packages in a folder.

    Args:
        pip_audit: the program.
        packages: default: where those of this Python lie.

    Raises:
        FileNotFoundError: there is no such program.
        ServiceAway: it could not ask, or what it asked knows none of the packages, as mirrors do.
    """
    if not Path(pip_audit).exists():
        raise FileNotFoundError(
            f"pip-audit is not at {pip_audit}: `make audit` installs it in an environment of its own."
        )
    folder = packages if packages is not None else sysconfig.get_paths()["purelib"]
    command = [str(pip_audit), "--path", str(folder), "--format", "json", "--progress-spinner", "off"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no word"]
        raise ServiceAway(_nothing_known(f"pip-audit could not ask its service ({said[-1][:200]})")) from None
    skipped = [package["name"] for package in report if "skip_reason" in package]
    if len(skipped) == len(report):
        # pip-audit itself says "No known vulnerabilities found" then, and ends with 0
        raise ServiceAway(_nothing_known(f"the service that was asked knows none of the {len(report)} packages"))
    findings = [
        Finding(
            one["id"],
            f"{package['name']} {package['version']}",
            f"mended in {', '.join(one['fix_versions']) or 'no version'}",
        )
        for package in report
        for one in package.get("vulns", ())
        if not {one["id"], *one.get("aliases", ())} & set(EXPLAINED)
    ]
    return Advisories(findings, len(report) - len(skipped), skipped)


def _nothing_known(why: str) -> str:
    return (
        f"no advisory was looked up: {why}. Nothing is known of the packages until this runs where the service can be "
        "reached."
    )
