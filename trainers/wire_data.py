"""Examples of a wire's training and evaluation, from one or several data sets."""

import logging
from dataclasses import dataclass, field, replace
from typing import Literal

from modeling_latentforge import LatentForgeWire

from .tasks import TASKS, Example, TextCut, draw_examples, has_split, hold_out, load_task


logger = logging.getLogger(__name__)

OTHER_NAMES = {"hotpot": "hotpotqa"}
HUB = "hub"  # as a source: the task's own data set


@dataclass
class WireDataArguments:
    """Where examples come from; see `trainers.tasks`.

    Raises:
        ValueError: an unknown data set or mode, not as many sources as data sets, a number below 1.
    """

    dataset: str = field(
        default="squad", metadata={"help": f"Data sets, with commas: {', '.join(TASKS)} (hotpot is hotpotqa)."}
    )
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "A file, folder or Hub id for each data set; hub, or none at all: its own on the Hub."},
    )
    max_train_examples: int | None = field(default=None, metadata={"help": "Of each data set. Default: all."})
    max_eval_examples: int | None = field(default=256, metadata={"help": "Of each data set."})
    subset_seed: int = field(default=0, metadata={"help": "Of the draw of these."})
    hotpot_setting: Literal["distractor", "oracle"] = field(
        default="distractor", metadata={"help": "All paragraphs, or the sentences marked as gold, which nobody has."}
    )
    text_mode: str = field(
        default="continue",
        metadata={"help": "Of the data set text, with commas: continue (what follows), reconstruct (itself)."},
    )
    context_tokens: int = field(default=128, metadata={"help": "text: of a context, 4 characters each."})
    continue_tokens: int = field(default=32, metadata={"help": "text: of what follows."})
    text_field: str = field(default="text", metadata={"help": "text: field that holds it."})

    def __post_init__(self) -> None:
        self.names = [OTHER_NAMES.get(name.strip(), name.strip()) for name in self.dataset.split(",")]
        self.text_modes = [mode.strip() for mode in self.text_mode.split(",")]
        unknown = [name for name in self.names if name not in TASKS]
        if unknown:
            raise ValueError(f"dataset: there is no {unknown[0]!r}: take some of {', '.join(TASKS)}, hotpot.")
        if self.data and len(self.data) != len(self.names):
            raise ValueError(
                f"data names {len(self.data)} sources for the {len(self.names)} data sets {', '.join(self.names)}: "
                "give one for each, `hub` for a data set's own."
            )
        for name in ("max_train_examples", "max_eval_examples", "context_tokens", "continue_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        for mode in self.text_modes:
            TextCut(mode)  # type: ignore[arg-type]  # says what there is

    def sources(self) -> list[tuple[str, str | None]]:
        """Data sets and where they are; None: on the Hub."""
        places = [None if place == HUB else place for place in self.data] or [None] * len(self.names)
        return list(zip(self.names, places, strict=True))

    def describe(self) -> str:
        """In words, for a model's card, which is read elsewhere."""
        from .model_card import hub_id

        def words(name: str, place: str | None) -> str:
            if place is None or hub_id(place):
                return f"{name} (the Hub dataset {place or TASKS[name].hub_id})"
            if place.startswith("builtin:"):
                return f"{name} (made up by LatentForge, {place})"
            return f"{name} (from a local copy)"

        return ", ".join(words(*source) for source in self.sources())


@dataclass
class IdeaDataArguments(WireDataArguments):
    """[`WireDataArguments`] of an idea model, whose first data set was of dialogues."""

    dataset: str = field(default="samsum", metadata={"help": f"Data sets, with commas: {', '.join(TASKS)}."})


def load_examples(args: WireDataArguments, repeat_prompt: str = "") -> tuple[list[Example], list[Example]]:
    """Examples to learn from and to be judged by.

    Judged by the validation split; where a data set has none, by a part of the training split that is held out, whole
    documents at a time.

    Args:
        repeat_prompt: of texts that are to be repeated, where others are to be continued: nothing else tells which.

    Raises:
        FileNotFoundError, ValueError: as `load_task`.
    """
    train: list[Example] = []
    held_out: list[Example] = []
    for name, source in args.sources():
        cuts: list[TextCut | None] = [None]
        if name == "text":
            cuts = [
                TextCut(mode, args.context_tokens, args.continue_tokens, text_field=args.text_field)  # type: ignore[arg-type]
                for mode in args.text_modes
            ]
        for cut in cuts:
            setting = args.hotpot_setting if name == "hotpotqa" else "distractor"

            def load(split: str, limit: int | None, options=(name, source, setting, cut)) -> list[Example]:
                name, source, setting, cut = options
                return load_task(name, split, source, limit, args.subset_seed, setting, text_cut=cut)

            if has_split(name, "validation", source):
                both = [load("train", args.max_train_examples), load("validation", args.max_eval_examples)]
            else:
                sides, limits = hold_out(load("train", None)), (args.max_train_examples, args.max_eval_examples)
                both = [draw_examples(*side, args.subset_seed) for side in zip(sides, limits, strict=True)]
            if cut is not None and cut.mode == "reconstruct" and len(args.names) + len(cuts) > 2:
                both = [[replace(example, prompt=repeat_prompt) for example in side] for side in both]
            train += both[0]
            held_out += both[1]
    return train, held_out


def readable(wire: LatentForgeWire, examples: list[Example]) -> list[Example]:
    """Examples whose context the encoder can read whole.

    Raises:
        ValueError: none is.
    """
    limit = getattr(wire.config.encoder_config, "max_position_embeddings", None)
    if limit is None:
        return examples

    def length(text: str) -> int:
        if wire.config.source == "bytes":
            return len(text.encode())
        return len(wire.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    kept = [example for example in examples if length(example.context) <= limit]
    if len(kept) < len(examples):
        logger.warning(
            "%d of %d examples are longer than the encoder's %d places, and left out",
            len(examples) - len(kept),
            len(examples),
            limit,
        )
    if not kept:
        raise ValueError(f"No text is as short as the encoder's {limit} places: raise encoder_positions, or cut them.")
    return kept
