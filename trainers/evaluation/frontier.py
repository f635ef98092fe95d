"""Quality against decoding speed: token LMs of several sizes, and students, of the same training tokens.

A student that is faster than a token LM and worse has shown nothing: a smaller token LM is that too. So each student
is compared with the token LM of its own speed, which lies between two that were measured.

Three parts, each kept, so that one can be repeated without the others: trainings (`SideBySide`), Brier scores, and
speeds. Speed depends on no weight: it is taken of untrained models, all in one session, and can be taken again on
a quiet machine.
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from modeling_latentforge import LatentForgeConfig

from ..reporting import _figure
from ..verification import environment
from .brier import summarize_brier
from .patch_draws import brier_sums
from .rows_main import books
from .side_by_side import STUDENT, Run, SideBySide
from .speed import generation_speed


SERIES = ("token LM", "student", "student, taught", "student, parallel decoder")

NLL, BRIER = "held-out nats per token", "BrierLM"


@dataclass(frozen=True)
class Candidate:
    """One point of the picture.

    Attributes:
        label: unique within its corpus.
        series: one of `SERIES`.
        runs: the same model at one or several learning rates; the better one on the rows that choose is the point.
        brier: score it by BrierLM too. All that are must have one patch size, so that all are scored at the
            same places.
    """

    label: str
    series: str
    runs: tuple[Run, ...]
    brier: bool = False

    def __post_init__(self) -> None:
        if self.series not in SERIES:
            raise ValueError(f"unknown series {self.series!r}: take one of {', '.join(SERIES)}")
        if not self.runs:
            raise ValueError(f"{self.label!r} has no run: give it at least one")


@dataclass(frozen=True)
class Lengths:
    """What is measured of each model beside its likelihood.

    Attributes:
        prompt: tokens before the first that is timed.
        new_tokens: tokens to write.
        repeats: counted rounds over all models.
        positions: patch starts behind each Brier score.
        brier_patch_size: K of the models that are scored so.
    """

    prompt: int = 64
    new_tokens: int = 256
    repeats: int = 15
    positions: int = 20_000
    brier_patch_size: int = 4


@dataclass
class Frontier:
    """One corpus: the text and budget, and what is trained on it.

    Attributes:
        title: of its panels.
        table: text and budget.
        candidates: points.
        lengths: of speed and Brier measurements.
    """

    title: str
    table: SideBySide
    candidates: Sequence[Candidate]
    lengths: Lengths = field(default_factory=Lengths)

    def __post_init__(self) -> None:
        labels = [candidate.label for candidate in self.candidates]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two candidates are named {', '.join(twice)}: a label must be unique")

    # -- trainings

    def train(self) -> None:
        """Train what has no figures yet, and score what is to be scored. Resumable."""
        # the largest stand last in the lists: begun first, none keeps one core busy alone at the end
        self.table.results([run for candidate in reversed(self.candidates) for run in candidate.runs])
        for candidate in self.candidates:
            if candidate.brier:
                self.brier(self.best(candidate))

    def best(self, candidate: Candidate) -> Run:
        return candidate.runs[0] if len(candidate.runs) == 1 else self.table.best(candidate.runs)

    def brier(self, run: Run) -> dict[str, Any]:
        """[`summarize_brier`] of two draws a place, held-out rows without padding, kept beside the run's figures."""
        lengths = self.lengths
        name = f"brier-{lengths.brier_patch_size}-{lengths.positions}-{self.table.name(run)}.json"
        files = [self.table.work_dir / name]
        if self.table.records_dir is not None:
            files.append(Path(self.table.records_dir) / self.table.work_dir.name / name)
        for path in files:
            if path.exists():
                return json.loads(path.read_text())
        self.table.say(f"Brier scores of {self.table.name(run)}")
        _, held_out = self.table.blocks()
        rows = torch.as_tensor(held_out["input_ids"][:]).long()
        rows = rows[torch.as_tensor(held_out["attention_mask"][:]).bool().all(1)]
        sums = brier_sums(self.table.load(run), rows, lengths.brier_patch_size, lengths.positions)
        summary = summarize_brier(sums["sampled"], sums["counts"])
        for path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(summary, indent=1) + "\n")
        return summary

    # -- speed

    def speed(self, path: Path, again: bool = False) -> dict[str, Any]:
        """Tokens per second of every candidate, kept in `path`; one that is missing there makes all be measured anew,
        since rates of two sessions on one machine differ by more than models do.

        Returns:
            `models`: by shape (see [`shape`]) what `generation_speed` says, `decode_tokens_per_second` with its `low`
            and `high` round, and of a token LM the faster `cache`; `machine`.
        """
        shapes = {self.shape(candidate): candidate for candidate in self.candidates}
        if path.exists() and not again:
            kept = json.loads(path.read_text())
            if set(shapes) <= set(kept["models"]):
                return kept
        self.table.say(f"speed of {len(shapes)} models")
        models: dict[str, Any] = {}
        for shape, candidate in shapes.items():
            model = self.table.build(candidate.runs[0]).eval()
            if candidate.series == "token LM" and getattr(model, "_can_compile_fullgraph", False):
                static = copy.deepcopy(model)
                static.generation_config.cache_implementation = "static"
                models[f"{shape} static"] = static
            models[shape] = model
        kept = {"models": decode_rates(models, self.lengths), "machine": environment()["machine"] | {"threads": 1}}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(kept, indent=1) + "\n")
        return kept

    def shape(self, candidate: Candidate) -> str:
        """All that a candidate's speed depends on, as text; its rate, seed, loss and teacher are not among it."""
        run = candidate.runs[0]
        fixed = {name: self.table.shared[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
        patch = run.patch_size if run.kind != "token_lm" else 1
        lengths = [self.lengths.prompt, self.lengths.new_tokens]
        return json.dumps([run.kind, patch, run.student, fixed, lengths], sort_keys=True)

    # -- together

    def points(self, speed: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Figures of every candidate: `label`, `series`, `learning_rate`, `nll` and `nll_choice` (nats per token),
        `nll_shuffled` of a student, `training_seconds`, `tokens_per_second`, `low`, `high`, `cache`, and `brier` (what
        `summarize_brier` says) where it was asked for."""
        found = []
        for candidate in self.candidates:
            run = self.best(candidate)
            result, rate = self.table.result(run), speed["models"][self.shape(candidate)]
            point = {
                "label": candidate.label,
                "series": candidate.series,
                "patch_size": run.patch_size if run.kind != "token_lm" else 1,
                "learning_rate": run.learning_rate,
                "learning_rates_tried": [tried.learning_rate for tried in candidate.runs],
                "nll": result["nll"],
                "nll_choice": result["nll_choice"],
                "nll_shuffled": result.get("nll_shuffled"),
                "training_seconds": result["seconds"],
                "tokens_per_second": rate["decode_tokens_per_second"],
                **{name: rate[name] for name in ("low", "high", "cache") if name in rate},
            }
            if candidate.brier:
                point["brier"] = self.brier(run)
            found.append(point)
        return found


# -- speed


def decode_rates(models: Mapping[str, Any], lengths: Lengths) -> dict[str, dict[str, Any]]:
    """Greedy decoding of one row by one thread, all models in turns; of `X` and `X static` the faster is kept as `X`.

    Raises:
        ValueError: fewer than two tokens to write: the first is the prompt's.
    """
    if lengths.new_tokens < 2:
        raise ValueError(f"`new_tokens` ({lengths.new_tokens}) must be at least 2: the first one is the prompt's")
    vocabulary = min(model.config.get_text_config().vocab_size for model in models.values())
    prompt = torch.randint(vocabulary, (1, lengths.prompt), generator=torch.Generator().manual_seed(0))
    with one_thread():
        measured = generation_speed(models, prompt, lengths.new_tokens, repeats=lengths.repeats)
    rates: dict[str, dict[str, Any]] = {}
    for name, values in measured.items():
        seconds = values["seconds_per_token_runs"]
        values |= {
            "decode_tokens_per_second": 1 / values["seconds_per_token"],
            "low": 1 / max(seconds),
            "high": 1 / min(seconds),
        }
        shape = name.removesuffix(" static")
        if f"{shape} static" in measured:
            values["cache"] = "static" if name != shape else "dynamic"
        if shape not in rates or values["decode_tokens_per_second"] > rates[shape]["decode_tokens_per_second"]:
            rates[shape] = values
    return rates


@contextmanager
def one_thread() -> Iterator[None]:
    """Products this small gain nothing from a second thread, and wait for it where anything else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- at equal speed


def pareto(points: Sequence[Mapping[str, Any]], quality: str = "nll") -> list[Mapping[str, Any]]:
    """The points that no other beats in speed and quality, fastest first; lower `quality` is better."""
    kept: list[Mapping[str, Any]] = []
    for point in sorted(points, key=lambda point: (-point["tokens_per_second"], point[quality])):
        if not kept or point[quality] < kept[-1][quality]:
            kept.append(point)
    return kept


def at_speed(token_lms: Sequence[Mapping[str, Any]], tokens_per_second: float, quality: str = "nll") -> float | None:
    """Nats per token of the token LM that would write so fast: between two that were measured, on a line over the
    logarithm of the speed.

    Only token LMs that no other token LM beats in both count. None outside their speeds: what a faster or a larger
    one would have reached is not known, and a guess could favour a student.
    """
    line = pareto(token_lms, quality)
    for fast, slow in zip(line, line[1:], strict=False):
        if slow["tokens_per_second"] <= tokens_per_second <= fast["tokens_per_second"]:
            span = math.log(fast["tokens_per_second"]) - math.log(slow["tokens_per_second"])
            share = (math.log(fast["tokens_per_second"]) - math.log(tokens_per_second)) / span
            return fast[quality] + share * (slow[quality] - fast[quality])
    return None


def advantages(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each student with a likelihood is ahead of the token LM of its speed.

    Returns:
        per student `label`, `series`, `advantage` (nats per token, positive: the student is better; None where no
        token LMs lie on both sides) and `advantage_choice`, the same on the rows that choose.
    """
    token_lms = [point for point in points if point["series"] == "token LM"]
    found = []
    for point in points:
        if point["series"] not in ("student", "student, taught"):
            continue
        entry: dict[str, Any] = {name: point[name] for name in ("label", "series", "tokens_per_second")}
        for name, quality in (("advantage", "nll"), ("advantage_choice", "nll_choice")):
            rival = at_speed(token_lms, point["tokens_per_second"], quality)
            entry[name] = None if rival is None else rival - point[quality]
        found.append(entry)
    return found


def best_advantage(points: Sequence[Mapping[str, Any]], series: str = "student") -> dict[str, Any] | None:
    """The student of a series that is furthest ahead on the rows that choose; None: none has rivals on both sides."""
    known = [entry for entry in advantages(points) if entry["series"] == series and entry["advantage"] is not None]
    known = [entry for entry in known if entry["advantage_choice"] is not None]
    return max(known, key=lambda entry: entry["advantage_choice"], default=None)


# -- on paper


def markdown(corpora: Mapping[str, Sequence[Mapping[str, Any]]], notes: Mapping[str, str]) -> str:
    """A table per corpus, fastest first, under what all its rows share."""
    lines: list[str] = []
    for title, points in corpora.items():
        ahead = {entry["label"]: entry["advantage"] for entry in advantages(points)}
        lines += [f"## {title}", "", notes[title], ""]
        lines += ["| model | tokens/s (range) | nats/token | ahead of the token LM of its speed | BrierLM (95 %) |"]
        lines += ["|---|---:|---:|---:|---:|"]
        for point in sorted(points, key=lambda point: -point["tokens_per_second"]):
            speed = f"{point['tokens_per_second']:.0f} ({point['low']:.0f} to {point['high']:.0f})"
            advantage = ahead.get(point["label"])
            if advantage is None:
                cell = "no token LMs of higher and lower speed" if point["label"] in ahead else ""
            else:
                cell = f"{advantage:+.3f}"
            brier = point.get("brier")
            score = (
                ""
                if brier is None
                else "{:.2f} ({:.2f} to {:.2f})".format(brier["brier_lm"], *brier["brier_lm_interval"])
            )
            nll = "" if point["series"] == "student, parallel decoder" else f"{point['nll']:.3f}"
            lines.append(f"| {point['label']} | {speed} | {nll} | {cell} | {score} |")
        lines.append("")
    return "\n".join(lines)


STYLES = {
    "token LM": ("o", "tab:gray"),
    "student": ("s", "tab:blue"),
    "student, taught": ("^", "tab:green"),
    "student, parallel decoder": ("D", "tab:red"),
}


def draw(corpora: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """One panel per corpus and quality, every point with its name; the line joins the token LMs that count."""
    panels = [(title, NLL, points) for title, points in corpora.items()]
    panels += [
        (title, BRIER, points) for title, points in corpora.items() if any("brier" in point for point in points)
    ]
    figure, axes = _figure(len(panels), path.name)  # says it where there is no matplotlib
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    for axis, (title, quality, points) in zip(axes, panels, strict=True):
        shown = [(point, value) for point in points if (value := _quality(point, quality)) is not None]
        for series in SERIES:
            own = [(point, value) for point, value in shown if point["series"] == series]
            if own:
                marker, colour = STYLES[series]
                speeds = [point["tokens_per_second"] for point, _ in own]
                axis.plot(speeds, [value for _, value in own], marker, color=colour, label=series)
        sign = -1 if quality == BRIER else 1  # lower is better
        line = pareto(
            [{**point, "cost": sign * value} for point, value in shown if point["series"] == "token LM"], "cost"
        )
        heights = [sign * corner["cost"] for corner in line]
        axis.plot([corner["tokens_per_second"] for corner in line], heights, color=STYLES["token LM"][1])
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.margins(x=0.2, y=0.1)
        axis.set(title=title, xlabel="decoded tokens per second, batch 1", ylabel=quality)
        axis.legend(fontsize=7)
        _name_points(axis, {(point["tokens_per_second"], value): point["label"] for point, value in shown})
    figure.savefig(path, dpi=110)


# of a name from its point, in points of the page, and which end of it stands there
NAME_OFFSETS = [
    (5, 3, "left"),
    (5, -8, "left"),
    (-5, 3, "right"),
    (-5, -8, "right"),
    (0, 8, "center"),
    (0, -14, "center"),
]


def _name_points(axis: Any, names: Mapping[tuple[float, float], str]) -> None:
    """A name beside each point where it covers neither a point nor a name; else where the first try was."""
    from matplotlib.transforms import Bbox

    axis.figure.canvas.draw()  # before that nothing has a place
    frame, taken = axis.get_window_extent(), [axis.get_legend().get_window_extent()]
    for place in names:
        x, y = axis.transData.transform(place)
        taken.append(Bbox.from_extents(x - 4, y - 4, x + 4, y + 4))
    for place, name in sorted(names.items()):
        tries = 0
        for x, y, end in [*NAME_OFFSETS, NAME_OFFSETS[0]]:
            text = axis.annotate(name, place, (x, y), textcoords="offset points", fontsize=6, ha=end)
            box = text.get_window_extent()
            tries += 1
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
            if tries > len(NAME_OFFSETS) or (inside and not any(box.overlaps(other) for other in taken)):
                break
            text.remove()
        taken.append(box)


def _quality(point: Mapping[str, Any], quality: str) -> float | None:
    if quality == BRIER:
        return point["brier"]["brier_lm"] if "brier" in point else None
    # independent softmaxes: a likelihood of another kind, of a model that is not made for it
    return None if point["series"] == "student, parallel decoder" else point["nll"]


# -- what is compared


def _token_lm(layers: int, width: int, *rates: float, brier: bool = False) -> Candidate:
    # at the comparison's own size the run is the one of its other tables
    sizes = {} if (layers, width) == (4, 256) else {"hidden_size": width, "num_hidden_layers": layers}
    runs = tuple(Run("token_lm", rate, student=sizes) for rate in rates)
    return Candidate(f"{layers} x {width}", "token LM", runs, brier)


def _student(label: str, patch_size: int, rate: float, brier: bool = False, **fields: Any) -> Candidate:
    run = Run("student", rate, 0, patch_size, {**STUDENT, **fields})
    return Candidate(f"K={patch_size}{label}", "student", (run,), brier)


LONGEST = LatentForgeConfig.decoder_lookup
BIG_BACKBONE = {"hidden_size": 384, "num_hidden_layers": 8}


def python_candidates(codec: str) -> list[Candidate]:
    """On 2 M tokens of Python's standard library: `experiments.EXPERIMENTS`' runs with K=8, and others around them.

    Args:
        codec: folder of a trained codec of K=4, for the parallel decoders.
    """
    parallel = {"decoder_type": "parallel"}
    energy = {**parallel, "head_config": {"head_type": "energy"}}
    energy_weights = {"ce_weight": 0.0, "energy_weight": 1.0}
    named = "student, parallel decoder"
    return [
        _token_lm(1, 128, 4e-3, 8e-3, brier=True),
        _token_lm(1, 256, 4e-3, 8e-3, brier=True),
        _token_lm(2, 256, 4e-3, brier=True),
        _token_lm(4, 256, 4e-3, brier=True),
        _student("", 8, 4e-3),
        _student(", no memory", 8, 4e-3, decoder_memory="none"),
        _student(", window 32", 8, 4e-3, decoder_window=32),
        _student(", decoder 2 x 256", 8, 4e-3, num_decoder_layers=2),
        _student(", decoder 1 x 128", 8, 4e-3, decoder_hidden_size=128),
        _student(", backbone 8 x 384", 8, 4e-3, backbone=BIG_BACKBONE, decoder_hidden_size=256),
        _student(", lookup", 8, 4e-3, decoder_lookup=LONGEST),
        _student("", 4, 4e-3, brier=True),
        Candidate("K=4, regression", named, (Run("student", 4e-3, 0, 4, parallel, {}, None, codec),), True),
        Candidate("K=4, energy", named, (Run("student", 4e-3, 0, 4, energy, energy_weights, None, codec),), True),
    ]


def books_candidates() -> list[Candidate]:
    """On 5 M tokens of novels: the runs of `make verify TOPIC=main`'s student rows, and others around them."""
    taught = {"ce_weight": 0.5, "kd_weight": 0.5}
    teacher = Run("token_lm", 4e-3)
    return [
        _token_lm(1, 128, 4e-3, 8e-3),
        _token_lm(1, 256, 4e-3, 8e-3),
        _token_lm(2, 256, 4e-3),
        _token_lm(4, 256, 2e-3, 4e-3, 8e-3),
        _student("", 8, 8e-3),
        _student("", 4, 8e-3),
        _student(", decoder 2 x 256", 8, 4e-3, num_decoder_layers=2),
        _student(", decoder 1 x 128", 8, 8e-3, decoder_hidden_size=128),
        _student(", backbone 8 x 384", 8, 4e-3, backbone=BIG_BACKBONE, decoder_hidden_size=256),
        *(
            Candidate(
                f"K={k}, taught", "student, taught", (Run("student", 8e-3, 0, k, STUDENT, taught, teacher),), False
            )
            for k in (8, 4)
        ),
    ]


def python_frontier(work_dir: Path, **options: Any) -> Frontier:
    """Of `builtin:python`, vocabulary 1024, 2 M tokens. `options` are fields of [`SideBySide`]."""
    table = SideBySide(work_dir, "builtin:python", None, vocab_size=1024, num_tokens=2 * 10**6, **options)
    return Frontier("Python code", table, python_candidates(table.codec(4)))


def books_frontier(work_dir: Path, **options: Any) -> Frontier:
    """Of the novels of the shared data, vocabulary 4096, 5 M tokens.

    Raises:
        FileNotFoundError: the data is not there.
    """
    table = SideBySide(work_dir, **books(), vocab_size=4096, num_tokens=5 * 10**6, **options)
    return Frontier("books", table, books_candidates())


CORPORA = {"python": python_frontier, "books": books_frontier}


def setting(frontier: Frontier, speed: Mapping[str, Any]) -> str:
    """What the figures of a corpus share, in a sentence or two."""
    shared, lengths, machine = frontier.table.shared, frontier.lengths, speed["machine"]
    return (
        f"{shared['data']}, vocabulary {shared['vocab_size']}, {shared['num_tokens']:,} training tokens in blocks of "
        f"{shared['block_size']}, {shared['eval_tokens'] // 2:,} held-out tokens, one seed; students' backbone "
        f"{shared['num_hidden_layers']} x {shared['hidden_size']} and decoder 1 x {shared['hidden_size']} where "
        f"nothing else is said. Speed: {lengths.new_tokens} tokens after {lengths.prompt}, greedy, batch 1, fp32, "
        f"one thread, median of {lengths.repeats} rounds in turns, token LMs with the faster of their caches, "
        f"{machine['cpu']}{frontier.table.provenance()}."
    )


def report(frontiers: Sequence[Frontier], output_dir: Path, speed_again: bool = False) -> dict[str, Any]:
    """Train what is missing, then measure speeds, then write `frontier.json`, `frontier.md` and `frontier.png`.

    Args:
        frontiers: corpora of different titles.
        output_dir: also keeps `speed_<title>.json`.
        speed_again: measure speeds that are kept there once more.

    Returns:
        what `frontier.json` holds: by title `points`, `setting`, `advantages`, and `best` and `best_taught`, the
        students that are furthest ahead of the token LM of their speed, or None.
    """
    for frontier in frontiers:  # all of them, before anything is timed
        frontier.train()
    found: dict[str, Any] = {}
    for frontier in frontiers:
        name = frontier.title.lower().replace(" ", "_")
        speed = frontier.speed(output_dir / f"speed_{name}.json", speed_again)
        points = frontier.points(speed)
        found[frontier.title] = {
            "setting": setting(frontier, speed),
            "points": points,
            "advantages": advantages(points),
            "best": best_advantage(points),
            "best_taught": best_advantage(points, "student, taught"),
        }
    output_dir.mkdir(parents=True, exist_ok=True)
    corpora = {title: entry["points"] for title, entry in found.items()}
    (output_dir / "frontier.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = markdown(corpora, {title: entry["setting"] for title, entry in found.items()})
    (output_dir / "frontier.md").write_text(text, encoding="utf-8")
    draw(corpora, output_dir / "frontier.png")
    return found
