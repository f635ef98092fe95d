"""The rooms and the arrows between them, read from the sources without importing them."""

import ast
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("modeling_latentforge", "trainers", "scripts", "tests")
# what travels with the weights must load where nothing of ours is installed
MODELING_MAY_IMPORT = {"torch", "transformers", "huggingface_hub"}
# a room may not import these rooms
CLOSED_TO = {
    "modeling_latentforge": {"trainers", "scripts", "tests"},
    "trainers": {"scripts", "tests"},
    "scripts": {"tests"},
}


def sources(room: str) -> list[Path]:
    return sorted(path for path in (ROOT / room).rglob("*.py") if "__pycache__" not in path.parts)


def imports(source: str) -> Iterator[ast.Import | ast.ImportFrom]:
    # everywhere in the file: a never called function and `if TYPE_CHECKING` break loading like any other place
    return (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Import | ast.ImportFrom))


def imported_packages(source: str) -> set[str]:
    """First names of all absolute imports."""
    names: set[str] = set()
    for node in imports(source):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif node.level == 0:
            names.add(str(node.module).partition(".")[0])
    return names


def flat_violations(source: str, siblings: set[str]) -> list[str]:
    """What in a modelling file `save_pretrained` would not copy, or what would not load elsewhere."""
    found = []
    for package in sorted(imported_packages(source) - MODELING_MAY_IMPORT - set(sys.stdlib_module_names)):
        found.append(f"imports {package}")
    for node in imports(source):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level > 1:
            found.append(f"line {node.lineno}: imports from a parent folder")
        elif node.level == 1 and not node.module:
            found.append(f"line {node.lineno}: `from . import` is not copied")
        elif node.level == 1 and node.module not in siblings:
            found.append(f"line {node.lineno}: .{node.module} is no sibling file")
        elif node.module == "__future__" and any(alias.name == "annotations" for alias in node.names):
            found.append(f"line {node.lineno}: turns off the type checks of @strict configs")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if any(line.strip().startswith("from .") for line in node.value.splitlines()):
                found.append(f"line {node.lineno}: a text line that begins `from .` is taken for an import")
    return found


@pytest.mark.parametrize("room", CLOSED_TO)
def test_arrows_go_one_way(room: str):
    """A model that imports its trainer does not load from the Hub; a trainer that imports a script is not reusable."""
    files = sources(room)
    assert files, f"no sources in {room}"
    wrong = {
        str(path.relative_to(ROOT)): sorted(forbidden)
        for path in files
        if (forbidden := imported_packages(path.read_text(encoding="utf-8")) & CLOSED_TO[room])
    }
    assert not wrong


def test_modelling_files_survive_flat_copying():
    """`save_pretrained` copies by basename what its pattern finds; anything else loads here and nowhere else."""
    files = sources("modeling_latentforge")
    siblings = {path.stem for path in files}
    wrong = {
        path.name: violations
        for path in files
        if (violations := flat_violations(path.read_text(encoding="utf-8"), siblings))
    }
    assert not wrong


def test_the_modelling_room_is_flat():
    """A nested file is not found when a checkpoint is saved: FileNotFoundError after hours of training."""
    assert all(path.parent == ROOT / "modeling_latentforge" for path in sources("modeling_latentforge"))


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ("import numpy", "imports numpy"),
        ("def never_called():\n    import trainers.data", "imports trainers"),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from trainers import x", "imports trainers"),
        ("from modeling_latentforge.layers import X", "imports modeling_latentforge"),
        ("from . import layers", "is not copied"),
        ("from ..layers import X", "parent folder"),
        ("from .common.layers import X", "no sibling"),
        ("from __future__ import annotations", "type checks"),
        ('"""Use it so:\n\n    from .layers import X\n"""', "taken for an import"),
    ],
)
def test_each_trap_of_flat_copying_is_seen(source: str, complaint: str):
    """A guard that finds nothing may be one that looks at nothing."""
    assert any(complaint in violation for violation in flat_violations(source, {"layers"}))
    assert not flat_violations("import math\n\nimport torch\nfrom .layers import X\n", {"layers"})


def test_no_script_is_named_like_a_library():
    """`accelerate launch scripts/x.py` puts scripts/ first on the path: a datasets.py there shadows the library."""
    taken = set(sys.stdlib_module_names) | set(importlib.metadata.packages_distributions())
    names = {path.stem for path in (ROOT / "scripts").glob("*.py")} | {
        path.name for path in (ROOT / "scripts").iterdir() if path.is_dir()
    }
    assert not {name for name in names if name in taken}


def test_every_test_folder_is_a_package():
    """`tests/trainers` without `__init__.py` is imported as `trainers`, and the real one is never tested."""
    folders = {path.parent for path in sources("tests")}
    assert all((folder / "__init__.py").exists() for folder in folders)


@pytest.mark.parametrize("room", ["trainers", "scripts"])
def test_argument_classes_keep_their_types(room: str):
    """HfArgumentParser reads annotations; as strings they lose the types of every flag."""
    for path in sources(room):
        source = path.read_text(encoding="utf-8")
        postponed = any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in imports(source))
        assert not (postponed and "@dataclass" in source), path


def test_no_file_names_a_place_of_one_machine():
    """A path of the machine it was written on works nowhere else."""
    places = ("/" + "root/", "/" + "work/", "/" + "opt/", "/" + "home/")
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            if path.suffix in (".py", ".yaml", ".md") and "__pycache__" not in path.parts:
                text = path.read_text(encoding="utf-8")
                assert not [place for place in places if place in text], path
