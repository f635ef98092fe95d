"""The documentation: it builds, and what it tells people to type is run."""

import importlib.util
import re
import shlex
import subprocess
import sys

import pytest

from scripts.submit_slurm import main as submit_slurm
from tests.test_readme import COVERED, README, ROOT, commands, kind


PAGES = sorted(
    [ROOT / "docs" / f"{name}.md" for name in ("index", "tutorial", "concepts", "reference")]
    + list((ROOT / "docs" / "how_to").glob("*.md"))
)
# what the README does not have: where it is run
ALSO_COVERED = {
    ".venv/bin/accelerate launch": "tests/trainers/test_distributed.py::test_the_docs_command_shares_a_student",
    ".venv/bin/python scripts/submit_slurm.py": "tests/test_docs.py::test_the_docs_job_is_written",
}


def blocks(language: str) -> list[tuple[str, str]]:
    """(page, block)"""
    return [
        (page.name, block)
        for page in PAGES
        for block in re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    ]


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    """A link into nothing, a page outside the menu, a docstring that cannot be read."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed: pip install -e '.[docs]'")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    for page in PAGES:
        assert (
            tmp_path / page.relative_to(ROOT / "docs").with_suffix("") / "index.html"
        ).exists() or page.stem == "index"


def test_every_command_of_the_docs_is_run_somewhere():
    """A tutorial that nobody runs is wrong after the second change."""
    typed = {line for page in PAGES for line in commands(page.read_text())}
    new = {line for line in typed if line not in commands(README)}
    assert {kind(line) for line in new} == set(ALSO_COVERED)
    assert {kind(line) for line in typed - new} <= set(COVERED)
    for place in ALSO_COVERED.values():
        file, name = place.split("::")
        assert f"def {name}" in (ROOT / file).read_text(encoding="utf-8")


def test_every_block_has_a_language_that_is_checked():
    """A block without one, or in another, is one that no test looks at."""
    for page in PAGES:
        fences = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)
        assert set(fences[::2]) <= {"bash", "python"}, page
        prose = re.sub(r"^```.*?^```$", "", page.read_text().split(":::")[0], flags=re.MULTILINE | re.DOTALL)
        assert not re.search(r"^    \S", prose, re.MULTILINE), f"{page}: an indented block"


def test_python_stands_in_the_tutorial_only():
    """There the demo's test runs it; elsewhere nothing would."""
    assert {page for page, _ in blocks("python")} == {"tutorial.md"}


def test_code_of_experiments_runs():
    """A measurement that nobody can repeat is an opinion."""
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^```(.*)$", page, re.MULTILINE)[::2]) <= {"python"}
    found = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found
    for block in found:
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout, done.stderr


def test_the_docs_job_is_written(capsys: pytest.CaptureFixture):
    """A flag that was renamed."""
    (command,) = [line for page in PAGES for line in commands(page.read_text()) if "submit_slurm" in line]
    job = submit_slurm(shlex.split(command)[2:])
    assert "#SBATCH --signal=B:USR1@300" in job and capsys.readouterr().out == job
