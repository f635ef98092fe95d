"""Text of one kind each, for "by domain" tables: prose, code, numbers, and patches with EOS or padding.

P patches, K tokens per patch.
"""

import ast
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..data import DataArguments, load_texts


BUILTIN = ("prose", "code", "numbers")


def domain_texts(
    files: Mapping[str, str] | None = None,
    max_characters: int = 2**18,
    seed: int = 0,
    cache_dir: str | None = None,
) -> dict[str, str]:
    """A text of each kind.

    Without files: `code` is the held-out part of the standard library's source, `prose` the docstrings of that same
    part (no training on `builtin:python` has seen either), `numbers` are written by [`numbers_text`].

    Args:
        files: name -> text in any form of [`DataArguments`]; replaces or adds to the three.
        max_characters: of each.
        seed: of the numbers.
        cache_dir: of the texts read.
    """
    texts: dict[str, str] = {}
    files = dict(files or {})
    if not {"prose", "code"} <= set(files):
        _, held_out = load_texts(DataArguments(data="builtin:python", cache_dir=cache_dir))
        pieces = list(held_out["text"])
        texts["prose"] = "\n\n".join(_docstrings(pieces))[:max_characters]
        texts["code"] = "".join(pieces)[:max_characters]
    texts["numbers"] = numbers_text(max_characters // 8, seed)
    for name, path in files.items():
        # a domain is judged, not trained on: all of its text counts, whatever share would be held out
        train, held_out = load_texts(DataArguments(data=path, cache_dir=cache_dir))
        texts[name] = "".join([*train["text"], *held_out["text"]])[:max_characters]
    return texts


def numbers_text(characters: int, seed: int = 0) -> str:
    """Lines of integers, decimals, dates, sums and hexadecimal, drawn with a seed."""
    draw = random.Random(seed)
    lines: list[str] = []
    forms = (
        lambda: ", ".join(str(draw.randrange(10 ** draw.randint(1, 7))) for _ in range(8)),
        lambda: " ".join(f"{draw.gauss(0, 100):.{draw.randint(1, 6)}f}" for _ in range(6)),
        lambda: f"{draw.randint(1900, 2030)}-{draw.randint(1, 12):02}-{draw.randint(1, 28):02} {draw.random():.3%}",
        lambda: f"{(a := draw.randrange(999))} + {(b := draw.randrange(999))} = {a + b}",
        lambda: " ".join(f"0x{draw.getrandbits(32):08x}" for _ in range(4)),
    )
    size = 0
    while size < characters:
        lines.append(draw.choice(forms)())
        size += len(lines[-1]) + 1
    return "\n".join(lines)[:characters]


def _docstrings(sources: Sequence[str]) -> list[str]:
    found = []
    for source in sources:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old files hold escapes that today's compiler dislikes
                tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue  # a piece of a file, or one that is broken on purpose
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text.split()) > 4:
                    found.append(text)
    return found


def domain_patches(
    texts: Mapping[str, str], tokenizer: Any, patch_size: int, max_tokens: int
) -> dict[str, np.ndarray]:
    """Ids `(P, K)` of each text, from its start, at most `max_tokens`; a text shorter than a patch is left out."""
    patches = {}
    for name, text in texts.items():
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
        count = len(ids) // patch_size
        if count:
            patches[name] = np.asarray(ids[: count * patch_size]).reshape(-1, patch_size)
    return patches


def special_patches(blocks: Any, patch_size: int, special_ids: Sequence[int], max_patches: int = 4096) -> np.ndarray:
    """Patches `(P, K)` of blocks that hold one of the ids (EOS, padding): the ends and beginnings of documents."""
    ids = np.asarray(blocks[:]["input_ids"]).reshape(-1, patch_size)
    chosen = ids[np.isin(ids, list(special_ids)).any(axis=1)]
    # rows are filled up with padding: patches of nothing else say nothing
    return chosen[~np.isin(chosen, list(special_ids)).all(axis=1)][:max_patches]
