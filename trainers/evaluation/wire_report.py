"""What a person reads of a wire's evaluation: Markdown, rate-quality curves, and every answer.

report and records of `WireEvaluation.run`
  -> wire_evaluation.json, wire_evaluation.md, predictions.jsonl, rate_quality_<data set>_<receiver>.png
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..reporting import _figure
from .evaluation_report import ReportTable, Section, _finish, _finite, as_markdown


CURVES = ("latent", "token_budget", "llmlingua2")  # a point for every M
LINES = ("text", "closed_book")  # the same whatever M


def write_wire_evaluation(
    report: Mapping[str, Any], records: Iterable[Mapping[str, Any]], directory: str | Path
) -> dict[str, Path]:
    """Write all files; returns the paths of `json`, `md` and `predictions`.

    Args:
        directory: made if missing.

    Raises:
        ImportError: there is no matplotlib.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    plots = _plots(report, directory)
    sections = [_conditions(report), *_datasets(report, plots)]
    texts = {
        "wire_evaluation.json": json.dumps(_finite(report), indent=1) + "\n",
        "wire_evaluation.md": as_markdown("Evaluation of a wire", sections),
        "predictions.jsonl": "".join(json.dumps(_finite(record)) + "\n" for record in records),
    }
    for name, text in texts.items():
        draft = directory / f"{name}.part"
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, directory / name)
    return {
        "json": directory / "wire_evaluation.json",
        "md": directory / "wire_evaluation.md",
        "predictions": directory / "predictions.jsonl",
    }


def table_of_comparisons(comparisons: Sequence[Mapping[str, Any]]) -> ReportTable:
    """Differences with their intervals and p, of `wire_statistics.compare`."""
    rows = [
        (
            _who(entry),
            _against(entry),
            entry["metric"],
            f"{entry['difference']:+.3f}{_interval(entry['interval'])}",
            f"{entry['p']:.2g}",
            f"{entry['p_holm']:.2g}",
            entry["test"],
            f"{entry['examples']} / {entry['documents']}",
        )
        for entry in comparisons
    ]
    header = ("method", "against", "metric", "difference (95 %)", "p", "p, Holm", "test", "examples / documents")
    return ReportTable(header, rows)


def _who(entry: Mapping[str, Any]) -> str:
    return ", ".join([entry["method"], *_where(entry)])


def _against(entry: Mapping[str, Any]) -> str:
    """Where a method has no receiver or no M of its own, the other side's is told."""
    other = {name: entry.get(f"against_{name}") for name in ("receiver", "latent_len") if entry.get(name) is None}
    return ", ".join([entry["against"], *_where(other)])


def _where(entry: Mapping[str, Any]) -> list[str]:
    parts = [] if entry.get("receiver") is None else [str(entry["receiver"])]
    return parts + ([] if entry.get("latent_len") is None else [f"M {entry['latent_len']}"])


def _interval(ends: Sequence[float] | None) -> str:
    return " (one document)" if ends is None else f" ({ends[0]:.3f} to {ends[1]:.3f})"


def _conditions(report: Mapping[str, Any]) -> Section:
    conditions = report["conditions"]
    settings, machine = conditions["settings"], conditions["machine"]
    changes = ", with uncommitted changes" if conditions["uncommitted_changes"] else ""
    decoding = settings["decoding"]
    rows = [
        *((name, str(conditions[name])) for name in ("command", "data", "receivers", "weights") if name in conditions),
        *((f"parameters of {name}", f"{count:,}") for name, count in conditions["parameters"].items()),
        ("quantizer", conditions["quantizer"]),
        ("seeds", ", ".join(map(str, conditions["seeds"]))),
        ("tokens of an answer, at most", str(decoding["max_new_tokens"])),
        ("first token: top-p, temperature", f"{decoding['first_token_top_p']}, {decoding['first_token_temperature']}"),
        ("first tokens that end nothing", str(decoding["eos_ban_steps"])),
        ("gold tokens that count for NLL", str(settings["nll_tokens"] or "all")),
        ("bootstrap resamples", str(settings["resamples"])),
        ("precision, device", f"{conditions['dtype']}, {conditions['device']}"),
        ("processor", f"{machine['cpu']}, {machine['cores']} cores"),
        ("versions", ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())),
        ("commit", f"{conditions['commit'] or 'unknown'}{changes}"),
        ("date", conditions["date"]),
    ]
    notes = [
        "NLL is of the gold answer's own tokens, its end left out. Tokens: places that stand for the context in the "
        "receiver. Bytes: UTF-8 of the text, or the whole packet of the wire's own quantizer, header included. "
        "Means are over examples, +- the standard deviation over seeds, in brackets intervals of 95 % (BCa, "
        "documents drawn). p is adjusted over all comparisons of this report (Holm).",
    ]
    return Section("Conditions", [ReportTable(("what", ""), rows), *notes])


def _datasets(report: Mapping[str, Any], plots: Mapping[str, Sequence[str]]) -> Iterator[Section]:
    for dataset in report["conditions"]["metrics"]:

        def own(name: str, dataset: str = dataset) -> list[Mapping[str, Any]]:
            return [entry for entry in report[name] if entry["dataset"] == dataset]

        items: list[Any] = [
            "What is sent, bytes a message (how many times fewer than the text):",
            _messages(own("messages")),
        ]
        items += ["What is answered:", _results(own("results"), own("latency"))]
        items += [f"![rate and quality]({name})" for name in plots.get(dataset, ())]
        if own("gain_share"):
            items += ["Share of what the context as text brings, in NLL:", _shares(own("gain_share"))]
        if own("comparisons"):
            items += ["Against text and latents, the same examples:", table_of_comparisons(own("comparisons"))]
        items += [
            f"Not measured: {_who(entry)}, seed {entry['seed']}: {entry['refused']}." for entry in own("refused")
        ]
        yield Section(dataset, items)


def _messages(messages: Sequence[Mapping[str, Any]]) -> ReportTable:
    codecs = list(messages[0]["bytes"])
    rows = [
        (
            "own" if entry["latent_len"] is None else str(entry["latent_len"]),
            f"{entry['latents']:.1f}",
            f"{entry['context_bytes']:.0f}",
            *(f"{entry['bytes'][codec]:.0f} ({entry['bytes_saved'][codec]:.2f}x)" for codec in codecs),
        )
        for entry in messages
    ]
    names = [f"{codec}, fp32" if codec == "none" else codec for codec in codecs]
    return ReportTable(("M", "latents", "text", *names), rows)


def _results(results: Sequence[Mapping[str, Any]], latencies: Sequence[Mapping[str, Any]]) -> ReportTable:
    keys = ("method", "receiver", "latent_len")
    times = {tuple(entry[key] for key in keys): entry for entry in latencies}
    names = list(dict.fromkeys(name for entry in results for name in entry["metrics"] if name != "answer_tokens"))
    rows = []
    for entry in results:
        time = times.get(tuple(entry[key] for key in keys), {})
        rows.append(
            (
                _who(entry),
                *(_mean(entry, name) for name in names),
                _number(entry.get("tokens")),
                "" if not entry.get("tokens_saved") else f"{entry['tokens_saved']:.2f}x",
                "" if entry.get("bytes") is None else f"{entry['bytes']:.0f}",
                *("" if key not in time else f"{time[key]:.1f}" for key in ("encode", "prefill", "token")),
            )
        )
    header = ("method", *names, "tokens", "fewer", "bytes", "encode, ms", "prefill, ms", "ms a token")
    return ReportTable(header, rows)


def _mean(entry: Mapping[str, Any], name: str) -> str:
    if name not in entry["metrics"]:
        return ""
    found = entry["metrics"][name]
    text = f"{found['mean']:.3f}" + ("" if found["std"] is None else f" +- {found['std']:.3f}")
    return text + (_interval(entry["intervals"][name]) if name in entry["intervals"] else "")


def _shares(shares: Sequence[Mapping[str, Any]]) -> ReportTable:
    rows = [
        (_who(entry), entry["refused"], "", "")
        if "refused" in entry
        else (
            _who(entry),
            f"{100 * entry['share']:.1f} %"
            + (
                " (one document)"
                if entry["interval"] is None
                else f" ({100 * entry['interval'][0]:.1f} to {100 * entry['interval'][1]:.1f})"
            ),
            f"{entry['gain']:.3f}{_interval(entry['gain_interval'])}",
            f"{entry['examples']} / {entry['documents']}",
        )
        for entry in shares
    ]
    return ReportTable(("method", "share", "gain of text, nats a token", "examples / documents"), rows)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


# -- curves


def _plots(report: Mapping[str, Any], directory: Path) -> dict[str, list[str]]:
    """Files of each data set: quality over tokens and over bytes, one file a receiver."""
    found: dict[str, list[str]] = {}
    results = [entry for entry in report["results"] if entry["receiver"] is not None and "tokens" in entry]
    for dataset, receiver in dict.fromkeys((entry["dataset"], entry["receiver"]) for entry in results):
        own = [entry for entry in results if (entry["dataset"], entry["receiver"]) == (dataset, receiver)]
        metric = own[0]["metric"]
        figure, panels = _figure(2, "rate and quality")
        for panel, (rate, label) in zip(panels, (("tokens", "tokens"), ("bytes", "bytes")), strict=True):
            for method in CURVES:
                points = sorted(
                    (entry[rate], entry["metrics"][metric]["mean"])
                    for entry in own
                    if entry["method"] == method and entry.get(rate) is not None
                )
                if points:
                    panel.plot(*zip(*points, strict=True), "o-", label=method)
            for method in LINES:
                for entry in own:
                    if entry["method"] != method:
                        continue
                    mean = entry["metrics"][metric]["mean"]
                    panel.axhline(mean, color="k", linestyle="--" if method == "text" else ":", label=method)
                    if entry.get(rate):
                        panel.plot(entry[rate], mean, "k*", markersize=10)
            panel.set(xscale="log", xlabel=f"{label} a context", ylabel=metric, title=f"{dataset}, {receiver}")
            if panel.get_legend_handles_labels()[0]:
                _finish(panel)
        name = re.sub(r"[^\w.-]", "_", f"rate_quality_{dataset}_{receiver}.png")
        figure.savefig(directory / name, dpi=120)
        found.setdefault(dataset, []).append(name)
    return found


__all__ = ["table_of_comparisons", "write_wire_evaluation"]
