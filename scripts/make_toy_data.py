"""Write a toy corpus: short made-up documents, a JSON line with a "text" field each; a seed always writes one file.

    python scripts/make_toy_data.py                                   # data/toy.jsonl, 600 documents
    python scripts/make_toy_data.py --output toy.jsonl --num_documents 2000 --seed 1

Stories, letters, recipes, weather, sums and code, from templates: for trying the commands out, not for judging models.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


NAMES = "Ada Ben Carla Dmitri Elif Farid Grace Hugo Ines Jonas Keiko Lena Mateo Nora Omar Priya Quinn Rosa".split()
PLACES = (
    "the harbour",
    "the old mill",
    "a quiet library",
    "the night train",
    "the market square",
    "a mountain hut",
)
THINGS = "lantern map violin kettle compass letter bicycle notebook telescope basket clock umbrella".split()
MOODS = "curious tired cheerful nervous proud puzzled calm hungry brave lonely".split()
WEATHER = "rain|fog|bright sun|heavy snow|a warm wind|thunder|light clouds".split("|")
FOODS = "lentils tomatoes barley mushrooms apples carrots rice onions beans pumpkin".split()
SEASONS = ("spring", "summer", "autumn", "winter")
VERBS = "sort filter count reverse merge split scale sum".split()


@dataclass
class ToyArguments:
    """What is written, and where."""

    output: str = field(default="data/toy.jsonl", metadata={"help": "File to write."})
    num_documents: int = field(default=600, metadata={"help": "Documents, a line each."})
    seed: int = field(default=0, metadata={"help": "Seed of the text."})

    def __post_init__(self) -> None:
        if self.num_documents < 1:
            raise ValueError(f"num_documents must be >= 1, got {self.num_documents}")


def story(random: random.Random) -> str:
    hero, friend = random.sample(NAMES, 2)
    thing, place, mood = random.choice(THINGS), random.choice(PLACES), random.choice(MOODS)
    endings = (
        f"In the end the {thing} was where it had always been.",
        f"They gave the {thing} to a child who had none.",
        f"Nobody ever asked about the {thing} again.",
    )
    return (
        f"{hero} found a {thing} near {place}. {friend} felt {random.choice(MOODS)} that day, and {hero} was {mood}. "
        f'"Whose {thing} is this?" asked {friend}. "I do not know," said {hero}, "but we can ask at '
        f'{random.choice(PLACES)}." They walked for {random.randint(2, 90)} minutes through {random.choice(WEATHER)}. '
        f"{random.choice(endings)}"
    )


def letter(random: random.Random) -> str:
    sender, receiver = random.sample(NAMES, 2)
    return (
        f"Dear {receiver},\n\nthank you for the {random.choice(THINGS)}. It lies beside the {random.choice(THINGS)} "
        f"from {random.choice(PLACES)}. We had {random.choice(WEATHER)} for {random.randint(2, 30)} days and I am "
        f"rather {random.choice(MOODS)}. Will you visit in {random.choice(SEASONS)}?\n\nYours,\n{sender}"
    )


def recipe(random: random.Random) -> str:
    first, second, third = random.sample(FOODS, 3)
    return (
        f"Soup of {first} and {second}\n- {random.randint(100, 900)} g {first}\n"
        f"- {random.randint(1, 6)} cups of {second}\n- a handful of {third}\n"
        f"Chop the {first}. Boil everything for {random.randint(10, 80)} minutes, stir, add the {third} last and "
        f"serve it to {random.choice(NAMES)}, who is {random.choice(MOODS)}."
    )


def weather(random: random.Random) -> str:
    days = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    lines = [f"{day}: {random.choice(WEATHER)}, {random.randint(-9, 35)} degrees." for day in days]
    return f"Forecast for {random.choice(PLACES)}\n" + "\n".join(lines)


def arithmetic(random: random.Random) -> str:
    lines = []
    for _ in range(random.randint(5, 12)):
        left, right = random.randint(1, 99), random.randint(1, 99)
        lines.append(random.choice([f"{left} + {right} = {left + right}", f"{left} * {right} = {left * right}"]))
    return f"{random.choice(NAMES)} practises sums:\n" + "\n".join(lines)


def code(random: random.Random) -> str:
    verb, thing = random.choice(VERBS), random.choice(THINGS)
    return (
        f"def {verb}_{thing}s({thing}s, limit={random.randint(2, 50)}):\n"
        f'    """{verb.title()} at most `limit` {thing}s."""\n'
        f"    result = []\n    for index, {thing} in enumerate({thing}s):\n        if index >= limit:\n"
        f"            break\n        result.append({random.choice(VERBS)}({thing}, {random.randint(1, 9)}))\n"
        f"    return result\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    from trainers.arguments import parse_arguments

    (arguments,) = parse_arguments(ToyArguments, argv=argv, description=__doc__)
    generator = random.Random(arguments.seed)
    kinds = (story, letter, recipe, weather, arithmetic, code)
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for index in range(arguments.num_documents):
            file.write(json.dumps({"text": kinds[index % len(kinds)](generator)}) + "\n")
    print(f"{path}: {arguments.num_documents} documents, {path.stat().st_size} bytes")


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
