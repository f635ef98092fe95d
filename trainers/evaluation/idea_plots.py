"""Pictures of what an idea model makes of texts: the texts between two, and where texts lie."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from modeling_latentforge import LatentForgeIdea

from ..reporting import _figure


ALPHAS = 11  # 0, 0.1, ... 1
LONGEST = 90  # characters of a text in a picture


def interpolation_strip(
    idea: LatentForgeIdea,
    first: str,
    second: str,
    kind: Literal["linear", "slerp"] = "linear",
    count: int = ALPHAS,
    **options: Any,
) -> list[tuple[float, str]]:
    """Alphas from 0 to 1 at equal distances, and what the model says there; `options` as of `read`.

    Raises:
        ValueError: fewer than two.
    """
    if count < 2:
        raise ValueError(f"count must be at least 2, the two texts themselves, got {count}")
    alphas = [place / (count - 1) for place in range(count)]
    return [(alpha, idea.interpolate_and_generate(first, second, alpha, kind, **options)) for alpha in alphas]


def draw_strip(strip: Sequence[tuple[float, str]], path: str | Path) -> None:
    """A line a text, coloured by alpha; a text that is the one above it is grey.

    Raises:
        ImportError: there is no matplotlib.
    """
    figure, (panel,) = _figure(1, Path(path).name)
    figure.set_size_inches(9, 0.34 * len(strip) + 0.4)
    panel.set_axis_off()
    panel.set(xlim=(0, 1), ylim=(len(strip), 0))
    before = None
    for row, (alpha, text) in enumerate(strip):
        panel.barh(row + 0.5, 0.06, color=(0.16 + 0.72 * alpha, 0.45, 0.88 - 0.72 * alpha), height=0.9)
        panel.text(0.03, row + 0.5, f"{alpha:.2g}", va="center", ha="center", color="white", fontsize=8)
        colour = "0.6" if text == before else "black"
        panel.text(0.08, row + 0.5, shortened(text), va="center", color=colour, fontsize=8, parse_math=False)
        before = text
    figure.savefig(path, dpi=150)


def flat_map(ideas: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Ideas `(B, ...)` on the two directions in which they differ most, `(B, 2)`, and these directions' share of their
    variance.

    Raises:
        ValueError: fewer than three, or a number in each: there is no plane.
    """
    points = ideas.detach().cpu().double().flatten(1)
    if len(points) < 3 or points.shape[1] < 2:
        raise ValueError(f"a map needs three ideas of two numbers, got {tuple(points.shape)}")
    centred = points - points.mean(0)
    _, values, directions = torch.linalg.svd(centred, full_matrices=False)
    share = float(values[:2].square().sum() / values.square().sum().clamp(min=1e-12))
    return centred @ directions[:2].T, share


def draw_map(thoughts: Sequence[torch.Tensor], labels: Sequence[str], path: str | Path) -> None:
    """Where texts' ideas lie, and the way that thinking takes them.

    Args:
        thoughts: before the first step and after each, `(B, N, D)`, as `think` gives them; or one alone.
        labels: of the texts.
        path: of the picture.

    Raises:
        ValueError: not one label a text, or as [`flat_map`] says.
        ImportError: there is no matplotlib.
    """
    if any(len(ideas) != len(labels) for ideas in thoughts):
        raise ValueError(f"{len(labels)} labels for {[len(ideas) for ideas in thoughts]} texts: give one of each")
    flat, share = flat_map(torch.cat([ideas.flatten(1) for ideas in thoughts]))
    ways = flat.view(len(thoughts), len(labels), 2)
    figure, (panel,) = _figure(1, Path(path).name)
    figure.set_size_inches(6, 5)
    for number, label in enumerate(labels):
        (line,) = panel.plot(*ways[:, number].T.tolist(), linewidth=1, alpha=0.6)
        panel.plot(*ways[-1:, number].T.tolist(), "o", color=line.get_color(), markersize=4)
        panel.annotate(shortened(label, 24), ways[-1, number].tolist(), fontsize=7, parse_math=False)
    panel.set(xticks=[], yticks=[])
    panel.set_title(f"{share:.0%} of the variance", fontsize=9)
    figure.savefig(path, dpi=150)


def shortened(text: str, length: int = LONGEST) -> str:
    """One line of a text."""
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
    return line if len(line) <= length else f"{line[: length - 1]}…"
