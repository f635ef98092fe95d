"""The rules of SECURITY.md, read from the sources."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from tests.test_rooms import ROOT, sources
from trainers.evaluation import audit


ROOMS = ("modeling_latentforge", "trainers", "scripts")  # tests load what they have saved themselves
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# places where code of a repository runs without a flag of the caller's, and whose code that is
TRUSTED = {
    "scripts/push_to_hub.py": "what the caller has just pushed, in a process of its own",
    "scripts/space/app.py": "the models that the Space's owner names",
}


def violations(source: str) -> list[str]:
    """What of a file runs code that it reads, or lets a repository's code run unasked."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]
            found += [f"line {node.lineno}: imports {name}" for name in names if name.split(".")[0] in PICKLES]
        if isinstance(node, ast.Call):
            found += _calls(node)
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and _is(node.value, True):
            found.append(f"line {node.value.lineno}: trust_remote_code")
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            if any(_is(key, "trust_remote_code") and _is(value, True) for key, value in pairs):
                found.append(f"line {node.lineno}: trust_remote_code")
    return found


def _is(node: ast.AST | None, value: object) -> bool:
    return (
        isinstance(node, ast.Constant)
        and node.value is value
        or (isinstance(value, str) and isinstance(node, ast.Constant) and node.value == value)
    )


def _calls(node: ast.Call) -> list[str]:
    name = ast.unparse(node.func)
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    wrong = [
        name == "torch.load" and not _is(given.get("weights_only"), True),
        name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
        name in ("eval", "os.system", "os.popen"),
        name in ("np.load", "numpy.load") and "allow_pickle" in given,
        _is(given.get("shell"), True),
        name == "tempfile.mktemp",
    ]
    return [f"line {node.lineno}: {name}"] * any(wrong)


@pytest.mark.parametrize("room", ROOMS)
def test_nothing_that_is_read_is_run(room: str):
    """A checkpoint, a recipe or a data set of somebody else's is then a program of theirs."""
    wrong = {}
    for path in sources(room):
        name, found = path.relative_to(ROOT).as_posix(), violations(path.read_text(encoding="utf-8"))
        if name in TRUSTED:
            found = [one for one in found if not one.endswith("trust_remote_code")]
        if found:
            wrong[name] = found
    assert sources(room) and not wrong


def test_code_of_repositories_is_off_unless_a_person_turns_it_on():
    """A default of True is somebody else's program on every machine that loads a model."""
    for path in sources("scripts") + sources("trainers"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not re.search(r"trust_remote_code: bool.*= *(field\(default=)?True", line), path


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text, Loader=yaml.Loader)",
        "subprocess.run('ls', shell=True)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
    ],
)
def test_each_of_them_is_seen(source: str):
    """A guard that finds nothing may be one that looks at nothing."""
    assert violations(source)
    assert not violations("torch.load(path, weights_only=True)\nyaml.safe_load(text)\nmodel.eval()\n")


def test_no_key_stands_in_the_repository():
    """What was committed once is public for ever."""
    keys = re.compile(rb"\b(hf_[A-Za-z]{30,}|sk-[A-Za-z0-9]{32,}|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY)")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("no checkout of git")
    for name in filter(None, listed.stdout.decode().split("\0")):
        path = ROOT / name
        assert not path.is_file() or not keys.search(path.read_bytes()), name


# -- bandit and pip-audit


@pytest.mark.slow  # `make audit` in CI
def test_bandit_finds_nothing_that_is_not_explained():
    """A finding among hundreds that nobody has looked at is one that nobody sees."""
    pytest.importorskip("bandit")
    assert not [str(finding) for finding in audit.bandit_findings()]


def test_every_exception_says_why():
    """`# nosec` alone hides the next fault of the same line too."""
    for room in ROOMS:
        for path in sources(room):
            for line in path.read_text(encoding="utf-8").splitlines():
                assert "# nosec" not in line or re.search(r"# nosec B\d{3} # \S+", line), f"{path}: {line}"


def program(folder: Path, text: str) -> Path:
    path = folder / "pip-audit"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_an_advisory_is_a_finding_and_silence_is_none(tmp_path):
    """A service that cannot be reached must not look like a clean report."""
    known = '{"name": "x", "version": "1", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}]}'
    unknown = '{"name": "ours", "skip_reason": "not found"}'
    said = program(tmp_path, f"echo '{{\"dependencies\": [{known}, {unknown}]}}'; exit 1")
    found = audit.advisories(said, tmp_path)
    assert [str(one) for one in found.findings] == ["x 1: PYSEC-1 mended in 2"]
    assert (found.looked_up, found.skipped) == (1, ["ours"])
    with pytest.raises(audit.ServiceAway, match="no advisory was looked up.*Could not connect"):
        audit.advisories(program(tmp_path, "echo 'ERROR: Could not connect' >&2; exit 1"), tmp_path)
    # a mirror without advisories: pip-audit is content
    with pytest.raises(audit.ServiceAway, match="knows none of the 1 packages"):
        audit.advisories(program(tmp_path, f"echo '{{\"dependencies\": [{unknown}]}}'"), tmp_path)
    with pytest.raises(FileNotFoundError, match="make audit"):
        audit.advisories(tmp_path / "none", tmp_path)
