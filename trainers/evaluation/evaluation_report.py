"""What a person reads of an evaluation: Markdown, and one HTML page that needs no other file.

figures of `Evaluation.run` -> sections (texts, tables, plots) -> evaluation.json, evaluation.md, evaluation.html
"""

import base64
import html
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..reporting import _fenced, _figure
from .benchmark import TABLES, rates_line
from .evaluation import OTHER_PEOPLE, PEOPLE


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
th, td { border: 1px solid #ccc; padding: .2rem .6rem; text-align: right }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto; white-space: pre-wrap }
"""


@dataclass
class Section:
    """One part of the report: `items` are strings (paragraphs), tables, plots and samples, in order."""

    title: str
    items: list[Any] = field(default_factory=list)


@dataclass
class ReportTable:
    """Cells are text already."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass
class Plot:
    """A PNG and what it shows, in words."""

    caption: str
    png: bytes


@dataclass
class Sample:
    """A text as a model wrote it."""

    title: str
    text: str


def write_evaluation(report: Mapping[str, Any], directory: str | Path) -> dict[str, Path]:
    """Write evaluation.json, evaluation.md and evaluation.html; returns their paths by suffix.

    Args:
        report: of `Evaluation.run`, with `command`, `models` (names) and `notes` in its conditions.
        directory: made if missing.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    sections = list(_sections(report))
    title = f"Evaluation of {next(iter(report['conditions']['parameters']), 'a codec')}"
    texts = {
        "json": json.dumps(_finite(report), indent=1) + "\n",
        "md": as_markdown(title, sections),
        "html": as_html(title, sections),
    }
    paths = {}
    for suffix, text in texts.items():
        paths[suffix] = directory / f"evaluation.{suffix}"
        draft = paths[suffix].with_name(f"{paths[suffix].name}.part")
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, paths[suffix])
    return paths


def as_markdown(title: str, sections: Sequence[Section]) -> str:
    """Plots are named, not shown: they stand in the HTML page."""
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        for item in section.items:
            if isinstance(item, ReportTable):
                lines += ["| " + " | ".join(item.header) + " |", "|---" + "|---:" * (len(item.header) - 1) + "|"]
                lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in item.rows]
            elif isinstance(item, Plot):
                lines.append(f"(plot in evaluation.html: {item.caption})")
            elif isinstance(item, Sample):
                lines += [f"{item.title}:", "", *_fenced(item.text)]
            else:
                lines.append(item)
            lines.append("")
    return "\n".join(lines)


def as_html(title: str, sections: Sequence[Section]) -> str:
    """One page: style and plots are inside."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"]
    parts.append(f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>")
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        for item in section.items:
            if isinstance(item, ReportTable):
                parts.append("<table><tr>" + "".join(f"<th>{html.escape(x)}</th>" for x in item.header) + "</tr>")
                parts += ["<tr>" + "".join(f"<td>{html.escape(x)}</td>" for x in row) + "</tr>" for row in item.rows]
                parts.append("</table>")
            elif isinstance(item, Plot):
                data = base64.b64encode(item.png).decode()
                caption = html.escape(item.caption, quote=True)
                parts.append(f'<img alt="{caption}" src="data:image/png;base64,{data}"><p>{caption}</p>')
            elif isinstance(item, Sample):
                parts.append(f"<h4>{html.escape(item.title)}</h4><pre>{html.escape(item.text)}</pre>")
            else:
                parts.append(f"<p>{html.escape(item)}</p>")
    return "\n".join(parts) + "\n"


# -- sections


def _sections(report: Mapping[str, Any]) -> Iterator[Section]:
    makers = {
        "likelihood": _likelihood,
        "brier": _brier,
        "generation": _generation,
        "speed": _speed,
        "codec": _codec,
    }
    yield _conditions(report)
    for part, make in makers.items():
        if report.get(part):
            yield make(report)
    if report.get("generation"):
        yield _samples(report)


def _conditions(report: Mapping[str, Any]) -> Section:
    conditions = report["conditions"]
    settings, machine, versions = conditions["settings"], conditions["machine"], conditions["versions"]
    changes = ", with uncommitted changes" if conditions["uncommitted_changes"] else ""
    rows = [
        *([("command", conditions["command"])] if "command" in conditions else []),
        *([("held-out text", conditions["data"])] if "data" in conditions else []),
        ("tokens of it, rows", f"{conditions['held_out_tokens']:,} in rows of {conditions['block_size']}, no padding"),
        ("tokens per patch (K)", str(conditions["patch_size"])),
        *((f"parameters of {name}", f"{count:,}") for name, count in conditions["parameters"].items()),
        ("judge of texts, baseline of speed", conditions["judge"] or "none"),
        ("precision, device, threads", f"{conditions['dtype']}, {conditions['device']}, {conditions['threads']}"),
        ("processor", f"{machine['cpu']}, {machine['cores']} cores"),
        ("seed, bootstrap resamples", f"{settings['seed']}, {settings['resamples']}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("commit", f"{conditions['commit'] or 'unknown'}{changes}"),
        ("date", conditions["date"]),
    ]
    return Section("Conditions", [ReportTable(("what", ""), rows), *conditions.get("notes", [])])


def _likelihood(report: Mapping[str, Any]) -> Section:
    rows: list[Sequence[str]] = []
    refusals: list[str] = []
    for name, entry in report["likelihood"].items():
        if "refused" in entry:
            refusals.append(f"{name} has no exact likelihood: {entry['refused']}.")
            rows.append((name, "none", "none", ""))
        else:
            low, high = entry["nats_interval"]
            rows.append(
                (
                    name,
                    f"{_number(entry['nats_per_token'])} ({_number(low)} to {_number(high)})",
                    _number(entry["bits_per_byte"]),
                    f"{entry['num_tokens']:,} ({entry['num_bytes']:,} bytes)",
                )
            )
    limit = report["conditions"]["settings"]["likelihood_tokens"]
    read = "the same rows as BrierLM's" if limit is None else f"the first of BrierLM's rows, up to {limit:,} tokens"
    note = (
        f"Exact, of every token but the first of a row; {read}. In brackets intervals of 95 %, of rows drawn again "
        "with replacement: what other text of this kind would give."
    )
    return Section("Likelihood", [note, ReportTable(("model", "nats/token", "bits/byte", "tokens"), rows), *refusals])


def _brier(report: Mapping[str, Any]) -> Section:
    scores, size = report["brier"], report["conditions"]["patch_size"]
    refused = {name: entry["refused"] for name, entry in scores.items() if "refused" in entry}
    scores = {name: entry for name, entry in scores.items() if name not in refused}
    reasons = [f"{name} is not scored: {reason}." for name, reason in refused.items()]
    if not scores:
        return Section("BrierLM", reasons)
    first = next(iter(scores.values()))["sampled"]
    asked = report["conditions"]["settings"]["positions"]
    items: list[Any] = [
        "BrierLM (CALM, arXiv 2510.27688): 100 times the geometric mean of Brier-1 to Brier-4, higher is better. Two "
        "repairs: each factor is clamped at 0 before the product, and all models are scored at the same patch starts "
        "of the same rows, with the same text before them, at temperature 1.",
        f"{first['positions']:,} positions in {first['rows']} rows"
        + (f" (asked were {asked:,}: the text has no more)" if first["positions"] < asked else "")
        + ". In brackets intervals of 95 %, behind +- standard errors, both of rows drawn again with replacement. "
        "Difference: the judged model's BrierLM less this model's, on the same rows.",
    ]
    for form, note in (
        ("sampled", "From two independent draws, as published; token models are scored by the same code."),
        (
            "smooth",
            "From known probabilities, the low-variance estimator: the same quantity with less noise. Of an energy "
            "head with a parallel decoder it is of the decoder's softmaxes, not of their likeliest tokens.",
        ),
    ):
        shown = [n for n in (1, 2, 3, 4) if n <= size] + ([size] if size > 4 else [])
        rows: list[Sequence[str]] = []
        for name, entry in scores.items():
            found = entry[form]
            low, high = found["brier_lm_interval"]
            difference = found.get("judged_less_this")
            rows.append(
                (
                    name,
                    f"{found['brier_lm']:.2f} ({low:.2f} to {high:.2f})",
                    *(f"{100 * found['brier'][n - 1]:.2f} +- {100 * found['brier_error'][n - 1]:.2f}" for n in shown),
                    ""
                    if difference is None
                    else f"{difference['difference']:+.2f} ({difference['interval'][0]:+.2f} to "
                    f"{difference['interval'][1]:+.2f})",
                )
            )
        header = ("model", "BrierLM", *(f"Brier-{n} x 100" for n in shown), "difference")
        items += [note, ReportTable(header, rows)]
    figure, (panel,) = _figure(1, "Brier")
    for name, entry in scores.items():
        found = entry["smooth"]
        panel.errorbar(
            range(1, size + 1),
            [100 * x for x in found["brier"]],
            [196 * x for x in found["brier_error"]],
            marker="o",
            label=name,
        )
    panel.set(xlabel="first n tokens of the patch", ylabel="Brier-n x 100", title="low-variance estimator")
    _finish(panel)
    items.append(_plot(figure, "Brier-n against n, bars of 95 %"))
    return Section("BrierLM", [*items, *reasons])


def _generation(report: Mapping[str, Any]) -> Section:
    found = report["generation"]
    people = found["people"]
    judged = "judge_nll" in people[PEOPLE]
    columns = {
        "judge_nll": "judge's nats/token",
        "entropy_1": "entropy, 1-grams",
        "entropy_2": "2-grams",
        "entropy_3": "3-grams",
        "distinct_1": "distinct-1",
        "distinct_2": "distinct-2",
        "repetition_4": "repeated 4-grams",
        "mauve": "MAUVE",
    }
    keys = [key for key in columns if judged or key not in ("judge_nll", "mauve")]

    def cells(entry: Mapping[str, Any]) -> list[str]:
        return [_number(entry[key]) if key in entry else "" for key in keys]

    rows: list[Sequence[str]] = [(f"people: {name}", "", *cells(people[name])) for name in (PEOPLE, OTHER_PEOPLE)]
    for name, points in found["models"].items():
        for point in points:
            temperature = f"{point['temperature']:g}"
            if "refused" in point:
                rows.append((name, temperature, *([point["refused"]] + [""] * (len(keys) - 1))))
            else:
                rows.append((name, temperature, *cells(point)))
    items: list[Any] = [
        f"{found['texts']} texts of {found['new_tokens']} tokens after prompts of {found['prompt_tokens']}, each "
        "temperature; all tokens allowed, the end of text held back. Entropies in nats over the n-grams of all texts; "
        "a low NLL is only good beside the entropy of people's text.",
        "MAUVE compares features of the judge and is no figure of other reports; "
        f'"{OTHER_PEOPLE}" is the most that can be had. The judge\'s own texts are judged by itself.'
        if judged
        else "Without --teacher there is no judge: neither its NLL nor MAUVE.",
        ReportTable(("who", "temperature", *(columns[key] for key in keys)), rows),
    ]
    if judged:
        figure, (frontier, distance) = _figure(2, "generation")
        for name, points in found["models"].items():
            done = [point for point in points if "refused" not in point]
            frontier.plot([p["entropy_2"] for p in done], [p["judge_nll"] for p in done], "o-", label=name)
            for point in done:
                frontier.annotate(f"{point['temperature']:g}", (point["entropy_2"], point["judge_nll"]), fontsize=7)
            distance.plot([p["temperature"] for p in done], [p["mauve"] for p in done], "o-", label=name)
        frontier.plot(people[PEOPLE]["entropy_2"], people[PEOPLE]["judge_nll"], "k*", markersize=12, label="people")
        frontier.set(xlabel="entropy of 2-grams (nats)", ylabel="judge's NLL (nats/token)", title="frontier")
        distance.axhline(people[OTHER_PEOPLE]["mauve"], color="k", linestyle=":", label="people")
        distance.set(xlabel="temperature", ylabel="MAUVE", title="nearness to people's text")
        for panel in (frontier, distance):
            _finish(panel)
        items.append(_plot(figure, "NLL under the judge against entropy, temperatures beside the points; MAUVE"))
    return Section("Generation", items)


def _speed(report: Mapping[str, Any]) -> Section:
    found = report["speed"]
    items: list[Any] = []
    for table, rows in ((TABLES["decode"], found["rows"]), (TABLES["roofline"], found["roofline"])):
        shown = [[show(row) for show in table.columns.values()] for row in rows]
        items += [table.note, ReportTable(list(table.columns), shown)]
    return Section("Speed", [*items, rates_line(found["rates"]), "More tables: scripts/bench.py."])


def _codec(report: Mapping[str, Any]) -> Section:
    found = report["codec"]
    items: list[Any] = []
    if "curve" in found:
        size = found["dimensions"]
        items.append("Free-running: posterior mean plus noise, decoded to the likeliest tokens, held-out text.")
        items.append(_accuracies("noise", {f"{entry['sigma']:.1f}": entry for entry in found["curve"]}))
        figure, (panel,) = _figure(1, "codec")
        for key, label in (("token_accuracy", "tokens"), ("patch_accuracy", "whole patches")):
            values = [100 * entry[key] for entry in found["curve"]]
            panel.plot([entry["sigma"] for entry in found["curve"]], values, "o-", label=label)
        panel.set(xlabel="noise on the latent (standard deviation)", ylabel="right (%)", title="codec")
        _finish(panel)
        items.append(_plot(figure, "share given back against noise"))
        items += ["By kind of text, without noise:", _accuracies("text", found["domains"])]
        items.append(
            f"{size['active']} of {size['dimensions']} dimensions are active (variance of the posterior mean over "
            f"patches above 0.01); the posterior's standard deviation is {_number(size['mean_deviation'])} on average."
        )
    if found.get("cycle"):
        rows = [
            (name, _number(entry["error"]), _number(entry["relative"]), f"{entry['patches']:,}")
            for name, entry in found["cycle"].items()
        ]
        items += [
            "Cycle error |enc(dec(z)) - z|, root mean square per dimension: how far latents lie from those of text. "
            "An autoregressive decoder reads its student's latents itself, and nothing asks them to be the codec's.",
            ReportTable(("latents of", "error", "as a share of z", "patches"), rows),
        ]
    return Section("Codec", items)


def _accuracies(header: str, entries: Mapping[str, Mapping[str, Any]]) -> ReportTable:
    rows = [
        (
            name,
            f"{100 * entry['token_accuracy']:.2f} %",
            f"{100 * entry['patch_accuracy']:.2f} %",
            f"{entry['num_tokens']:,}",
        )
        for name, entry in entries.items()
    ]
    return ReportTable((header, "tokens right", "whole patches right", "tokens"), rows)


def _samples(report: Mapping[str, Any]) -> Section:
    found = report["generation"]
    items: list[Any] = ["The first texts of each model and temperature; none is selected."]
    for number, (prompt, reference) in enumerate(
        zip(found["people"]["prompts"], found["people"]["texts"], strict=True)
    ):
        items += [Sample(f"Prompt {number + 1}", prompt), Sample("people", reference)]
        for name, points in found["models"].items():
            items += [
                Sample(f"{name}, temperature {point['temperature']:g}", point["texts"][number])
                for point in points
                if "refused" not in point
            ]
    return Section("Samples", items)


def _plot(figure: Any, caption: str) -> Plot:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return Plot(caption, buffer.getvalue())


def _finish(panel: Any) -> None:
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def _number(value: float) -> str:
    return f"{value:.4g}"


def _finite(value: Any) -> Any:
    """JSON knows no NaN: None in its place."""
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
