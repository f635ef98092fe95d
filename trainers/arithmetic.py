"""Word problems of 3 to 6 steps with their solutions, made up here: GSM8K's records without its language.

    {"id": ..., "question": "Mia has 14 shells. ... How many shells does Mia have now?",
     "answer": "14 + 5 = 19\\n19 - 3 = 16\\n16 * 2 = 32\\n#### 32"}

Every step changes one number below 100, so that what is hard is to carry it through.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from .data import hash_position


SIZES = {"train": 20_000, "validation": 1_000, "test": 1_000}
# of the hash of a question: no problem is in two splits
PLACES = {"validation": (0.0, 0.1), "test": (0.1, 0.2), "train": (0.2, 1.0)}
STEPS = (3, 6)
LARGEST = 99
NAMES = ("Mia", "Tom", "Ada", "Ben", "Lena", "Omar", "Ivy", "Paul", "Nora", "Sam")
THINGS = ("shells", "coins", "apples", "stamps", "books", "pens", "eggs", "cards", "stones", "nuts")
SENTENCES = {
    "+": (
        "{name} finds {n} more.",
        "Then {name} buys {n} more {things}.",
        "A friend brings {n} {things}.",
        "{name} wins {n}.",
    ),
    "-": (
        "{name} loses {n}.",
        "Then {name} gives {n} {things} away.",
        "{n} of the {things} break.",
        "{name} sells {n}.",
    ),
    "*": (
        "A machine makes {n} of each.",
        "{name} then gets {n} times as many.",
        "The number of {things} grows by a factor of {n}.",
    ),
    "/": ("{name} keeps one of {n} equal parts.", "The {things} are shared by {n}, and {name} keeps one share."),
}


def arithmetic_problems(split: str, count: int | None = None, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Records of a split, the same on every machine.

    Args:
        split: `train`, `validation` or `test`.
        count: default: 20,000 to train on, 1,000 of each other split.
        seed: of all draws.

    Raises:
        ValueError: another split.
    """
    if split not in SIZES:
        raise ValueError(f"builtin:arithmetic has no split {split!r}: take {', '.join(SIZES)}")
    draw = random.Random(f"{seed}/{split}")
    low, high = PLACES[split]
    seen: set[str] = set()
    while len(seen) < (SIZES[split] if count is None else count):
        record = problem(draw, draw.randint(*STEPS))
        question = record["question"]
        if question in seen or not low <= hash_position(question) < high:
            continue
        record["id"] = f"arithmetic-{split}-{len(seen)}"
        seen.add(question)
        yield record


def problem(draw: random.Random, num_steps: int) -> dict[str, Any]:
    """A problem of so many steps, `question` and `answer`."""
    name, things = draw.choice(NAMES), draw.choice(THINGS)
    value = draw.randint(2, 30)
    sentences, steps = [f"{name} has {value} {things}."], []
    for _ in range(num_steps):
        sign, number = _operation(draw, value)
        words = draw.choice(SENTENCES[sign]).format(name=name, n=number, things=things)
        result = {"+": value + number, "-": value - number, "*": value * number, "/": value // number}[sign]
        sentences.append(words)
        steps.append(f"{value} {sign} {number} = {result}")
        value = result
    sentences.append(f"How many {things} does {name} have now?")
    return {"question": " ".join(sentences), "answer": "\n".join([*steps, f"#### {value}"])}


def _operation(draw: random.Random, value: int) -> tuple[str, int]:
    """A sign and a number that leave a whole number from 1 to 99."""
    numbers: dict[str, Sequence[int]] = {
        "+": range(1, min(20, LARGEST - value) + 1),
        "-": range(1, min(21, value)),
        "*": [n for n in (2, 3, 4) if value * n <= LARGEST],
        "/": [n for n in (2, 3, 4, 5) if value % n == 0],
    }
    sign = draw.choice([sign for sign, possible in numbers.items() if possible])
    return sign, draw.choice(numbers[sign])
