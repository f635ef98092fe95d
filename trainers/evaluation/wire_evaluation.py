"""The evaluation of a wire: methods x data sets x receivers x numbers of latents x seeds, part by part.

    examples of (data set, seed) -> records of (method, receiver, M), one an example -> means, tests, shares of a gain

A finished part lies in `<work_dir>/<part>-<hash>.json`, the hash being of the weights, the examples, the settings and
the code that measures: whoever interrupts an evaluation repeats the command and goes on. A seed is in it only where
something is drawn, so that the same examples are answered once.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from modeling_latentforge import LatentForgeWire

from ..tasks import Example
from ..verification import environment
from .evaluation import _hash, _now, measuring_code, model_identity
from .paired_statistics import seeds_summary
from .wire_methods import (
    METHODS,
    OF_LATENTS,
    Decoding,
    Refused,
    answer_examples,
    answer_jointly,
    latency,
    llmlingua2,
    message_sizes,
    probe_examples,
    task_metrics,
)
from .wire_statistics import adjust, compare, gain_share, mean_interval, scores_by_example


TIMED = ("text", "latent", "token_budget", "closed_book")
SHARED = ("latent", "shuffled", "zero", "token_budget", "llmlingua2")  # their share of the gain is of interest
MEASURED = ("nll", "first_token_top1", "first_token_top5")


@dataclass(frozen=True)
class WireSettings:
    """How much is measured.

    Attributes:
        methods: of `METHODS`.
        latent_lens: numbers of latents M; None: as many as the wire makes of its own.
        decoding: of all answers; its seed is the examples'.
        nll_tokens: only the first so many tokens of a gold answer count; None: all.
        batch_size: of everything but latencies, which are of one example at a time.
        latency_examples: so many are timed; 0: none.
        resamples: of the bootstrap and of sign flips.
        llmlingua_model: of the method llmlingua2.

    Raises:
        ValueError: an unknown method, a number that cannot be.
    """

    methods: tuple[str, ...] = ("text", "latent", "token_budget", "closed_book", "shuffled", "zero")
    latent_lens: tuple[int | None, ...] = (None,)
    decoding: Decoding = Decoding()
    nll_tokens: int | None = None
    batch_size: int = 8
    latency_examples: int = 8
    resamples: int = 10_000
    llmlingua_model: str = "microsoft/llmlingua-2-bert-base-multilingual-cased-meetingbank"

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown or not self.methods:
            raise ValueError(f"unknown method {unknown[0] if unknown else ''!r}: known are {', '.join(METHODS)}")
        for name in ("batch_size", "resamples", "nll_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.latency_examples < 0:
            raise ValueError(f"latency_examples must not be negative, got {self.latency_examples}")
        wrong = [count for count in self.latent_lens if count is not None and count < 1]
        if wrong:
            raise ValueError(f"latent_len must be at least 1, got {wrong[0]}")


def readable(
    wire: LatentForgeWire, examples: Mapping[tuple[str, int], Sequence[Example]], max_new_tokens: int
) -> dict[tuple[str, int], list[Example]]:
    """The examples whose context the encoder, and whose text, answers included, every receiver reads whole: the same
    for all methods.

    Raises:
        ValueError: a data set has none; it says what the first one fails at.
    """

    @cache
    def complaint(example: Example) -> str:
        try:
            wire.ids_of([example.context], "cpu")
            for receiver in wire.receivers.values():
                config = receiver.model.config.get_text_config()
                limit = getattr(config, "max_position_embeddings", None)
                receiver.compose_text([example.context], [example.prompt], example.answers[:1])
                rows = receiver.compose_text([example.context], [example.prompt])
                length = rows.attention_mask.shape[1] + max_new_tokens
                if limit is not None and length > limit:
                    return f"text and answer have {length} tokens, the receiver reads {limit}"
        except ValueError as error:
            return str(error)
        return ""

    found = {key: [example for example in given if not complaint(example)] for key, given in examples.items()}
    for (dataset, _), kept in found.items():
        if not kept:
            first = next(given for (name, _), given in examples.items() if name == dataset)[0]
            raise ValueError(f"No example of {dataset} can be read whole, the first because: {complaint(first)}")
    return found


class WireEvaluation:
    """Answers the examples by every method, keeps the answers, and compares them.

    Args:
        wire: with its receivers attached.
        examples: of (data set, seed); every data set has the same seeds.
        metrics: of the data sets' tasks, see `trainers.tasks.Task`.
        settings: see there.
        work_dir: where finished parts are kept.
        say: takes a line of progress.
        progress: wraps an iterable of the work of a part, with its name: a bar.

    Raises:
        ValueError: no receiver, no examples, numbers of latents that the wire does not have.
        ImportError: llmlingua2 is asked for and not installed.
    """

    def __init__(
        self,
        wire: LatentForgeWire,
        examples: Mapping[tuple[str, int], Sequence[Example]],
        metrics: Mapping[str, str],
        settings: WireSettings,
        work_dir: str | Path,
        say: Callable[[str], None] = lambda line: None,
        progress: Callable[[Iterable[Any], str], Iterable[Any]] = lambda items, name: items,
    ):
        if not wire.receivers:
            raise ValueError("No receiver is attached, and nobody would answer: call `attach` first.")
        if not examples or not all(examples.values()):
            raise ValueError("There are no examples to answer: give a data set.")
        config, asked = wire.config, [count for count in settings.latent_lens if count is not None]
        if config.pooling == "queries" and asked and max(asked) > config.num_latents:
            raise ValueError(f"latent_len {max(asked)} is more than the {config.num_latents} queries of this wire.")
        if config.pooling == "patches" and asked:
            raise ValueError(
                f"latent_len {asked[0]}: this wire makes a latent of every {config.ratio} tokens: leave it out."
            )
        self.wire, self.examples, self.metrics = wire.eval(), dict(examples), metrics
        self.settings, self.work_dir, self.say, self.progress = settings, Path(work_dir), say, progress
        self.compress = None
        if "llmlingua2" in settings.methods:
            self.compress = llmlingua2(settings.llmlingua_model, str(wire.device))
        receivers = {
            name: [
                model_identity(receiver.model),
                asdict(receiver.template),
                hashlib.sha256(receiver.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()[:16],
            ]
            for name, receiver in sorted(wire.receivers.items())
        }
        self._identity = {"wire": model_identity(wire), "receivers": receivers}
        self._environment = environment()
        self._done, self._total = 0, 0

    # -- what is kept

    def _part(self, label: str, key: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """What `measure` found, now or when it last ran with the same key; `{"refused": why}` where it refuses."""
        self._done += 1
        # what draws nothing is the same part for every seed
        name = label.partition(" seed ")[0].replace(" ", "-").replace("/", "-")
        path = self.work_dir / f"{name}-{_hash(dict(key), self._identity, measuring_code())}.json"
        label = f"[{self._done}/{self._total}] {label}"
        if path.exists():
            self.say(f"{label}: kept from an earlier run")
            return json.loads(path.read_text(encoding="utf-8"))
        self.say(f"{label} ...")
        start = time.perf_counter()
        try:
            found = measure()
        except Refused as error:
            self.say(f"{label}: {error}")
            return {"refused": str(error)}
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.{os.getpid()}.part")
        draft.write_text(json.dumps(found) + "\n", encoding="utf-8")
        os.replace(draft, path)  # whoever interrupts this keeps whole parts only
        self.say(f"{label}: {time.perf_counter() - start:.0f} s")
        return found

    def _bar(self, name: str) -> Callable[[Iterable[Any]], Iterable[Any]]:
        return lambda items: self.progress(items, name)

    # -- the whole

    def plan(self) -> list[tuple[str, str | None, int | None]]:
        """(method, receiver or None, M or None) of every data set and seed."""
        names, found = sorted(self.wire.receivers), []
        for method in self.settings.methods:
            for count in self.settings.latent_lens if method in OF_LATENTS else (None,):
                found += [(method, None if method == "joint" else name, count) for name in names]
            if method == "linear_probe":  # of latents, whoever reads; and of states, however many latents
                found = [entry for entry in found if entry[0] != method]
                found += [(method, None, count) for count in self.settings.latent_lens]
                found += [(method, name, None) for name in names]
        return list(dict.fromkeys(found))

    def run(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(report, records): see [`summarize`]; a record is one answer to one example, with `dataset`, `seed`,
        `method`, `receiver`, `latent_len`, `id`, `document` and `example`, a hash of what was asked."""
        plan, settings = self.plan(), self.settings
        timed = [entry for entry in plan if entry[0] in TIMED] if settings.latency_examples else []
        datasets = list(dict.fromkeys(dataset for dataset, _ in self.examples))
        counts = settings.latent_lens
        self._done, self._total = 0, len(self.examples) * (len(plan) + len(counts)) + len(datasets) * len(timed)
        records: list[dict[str, Any]] = []
        refused: list[dict[str, Any]] = []
        sizes: list[dict[str, Any]] = []
        for (dataset, seed), examples in self.examples.items():
            examined = _hash([asdict(example) for example in examples])
            for count in counts:
                label = f"message {dataset} {_latents(count)} seed {seed}"
                sized = self._part(
                    label, {"message": examined, "latents": count}, partial(self._sizes, examples, count)
                )
                sizes += [
                    {"dataset": dataset, "seed": seed, "latent_len": count, "id": example.id, **entry}
                    for example, entry in zip(examples, sized, strict=True)
                ]
            for method, name, count in plan:
                about = {"dataset": dataset, "seed": seed, "method": method, "receiver": name, "latent_len": count}
                found = self._answer(examined, examples, about)
                if "refused" in found:
                    refused.append({**about, **found})
                    continue
                records += [
                    {
                        **about,
                        "id": example.id,
                        "document": example.document,
                        "example": _hash(example.context, example.prompt, example.answers),
                        **entry,
                    }
                    for example, entry in zip(examples, found, strict=True)
                ]
        latencies = []
        for dataset in datasets:
            first = next(examples for (name, _), examples in self.examples.items() if name == dataset)
            for method, receiver, count in timed:
                latencies.append(self._latency(dataset, first[: settings.latency_examples], method, receiver, count))
        latencies = [entry for entry in latencies if "refused" not in entry]  # `refused` says why
        report = {"conditions": self._conditions(), "refused": refused, "latency": latencies}
        return report | summarize(records, sizes, self._metric_of(), settings.resamples), records

    def _metric_of(self) -> dict[str, str]:
        """The main metric of every data set."""
        return {
            dataset: task_metrics(self.metrics[dataset], examples[0])[0]
            for (dataset, _), examples in self.examples.items()
        }

    def _conditions(self) -> dict[str, Any]:
        return {
            **self._environment,
            "date": _now(),
            "device": str(self.wire.device),
            "dtype": str(self.wire.dtype).removeprefix("torch."),
            "settings": asdict(self.settings),
            "seeds": sorted({seed for _, seed in self.examples}),
            "quantizer": self.wire.config.quantizer,
            "metrics": self._metric_of(),
            "parameters": {"wire": self.wire.num_parameters()}
            | {name: receiver.model.num_parameters() for name, receiver in sorted(self.wire.receivers.items())},
            "identity": self._identity["wire"],
        }

    # -- parts

    def _sizes(self, examples: Sequence[Example], count: int | None) -> list[dict[str, Any]]:
        size, found = self.settings.batch_size, []
        for start in range(0, len(examples), size):
            found += message_sizes(self.wire, [x.context for x in examples[start : start + size]], count)
        return found

    def _answer(self, examined: str, examples: Sequence[Example], about: Mapping[str, Any]) -> Any:
        dataset, seed, method, name, count = (
            about[key] for key in ("dataset", "seed", "method", "receiver", "latent_len")
        )
        settings, metric = self.settings, self.metrics[dataset]
        decoding = replace(settings.decoding, seed=seed)
        drawn = method in ("shuffled", "linear_probe") or (decoding.draws and method != "linear_probe")
        key = {
            "examples": examined,
            "metric": metric,
            "method": method,
            "receiver": name,
            "latents": count,
            "decoding": asdict(replace(decoding, seed=seed if drawn else 0)),
            "nll_tokens": settings.nll_tokens,
            "llmlingua": settings.llmlingua_model if method == "llmlingua2" else None,
        }
        label = f"{method} {dataset} {name or 'all'} {_latents(count)} seed {seed}"
        bar, size = self._bar(label), settings.batch_size

        def measure() -> list[dict[str, Any]]:
            if method == "joint":
                return answer_jointly(self.wire, examples, metric, decoding, count, size, bar)
            if method == "linear_probe":
                return probe_examples(self.wire, name, examples, seed, count, size, bar)
            return answer_examples(
                self.wire,
                name,
                method,
                examples,
                metric,
                decoding,
                count,
                settings.nll_tokens,
                size,
                self.compress,
                bar,
            )

        return self._part(label, key, measure)

    def _latency(
        self, dataset: str, examples: Sequence[Example], method: str, name: str | None, count: int | None
    ) -> dict[str, Any]:
        about = {"dataset": dataset, "method": method, "receiver": name, "latent_len": count}
        key = {
            **about,
            "latency": [asdict(example) for example in examples],
            "where": [self._environment["machine"], str(self.wire.device)],  # of all figures these are a machine's
        }
        assert name is not None
        label = f"latency {method} {dataset} {name} {_latents(count)}"
        return {**about, **self._part(label, key, lambda: latency(self.wire, name, method, examples, count))}


def _latents(count: int | None) -> str:
    return "M own" if count is None else f"M {count}"


# -- what comes of the records


def summarize(
    records: Sequence[Mapping[str, Any]],
    sizes: Sequence[Mapping[str, Any]],
    metric_of: Mapping[str, str],
    resamples: int = 10_000,
) -> dict[str, Any]:
    """Figures of a reader: `messages` (bytes), `results` (means), `comparisons` (tests against text and latent,
    Holm-adjusted over all of them), `gain_share`.

    Args:
        records: see [`WireEvaluation.run`].
        sizes: of [`message_sizes`], with `dataset`, `seed`, `latent_len` and `id`.
        metric_of: the main metric of every data set.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        key = tuple(record[name] for name in ("dataset", "receiver", "method", "latent_len"))
        groups.setdefault(key, []).append(record)
    packets = {(x["dataset"], x["latent_len"], x["id"]): x for x in sizes}
    results = [_result(key, group, packets, metric_of[key[0]], resamples) for key, group in groups.items()]
    comparisons = _comparisons(groups, metric_of, resamples)
    adjust(comparisons)
    return {
        "messages": _messages(sizes),
        "results": results,
        "comparisons": comparisons,
        "gain_share": _gain_shares(groups, resamples),
    }


def _about(key: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(("dataset", "receiver", "method", "latent_len"), key, strict=True))


def _documents(group: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    return {record["id"]: record["document"] for record in group}


def _messages(sizes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for entry in sizes:
        groups.setdefault((entry["dataset"], entry["latent_len"]), {})[entry["id"]] = entry
    found = []
    for (dataset, count), entries in groups.items():
        text = _mean(entry["context_bytes"] for entry in entries.values())
        codecs = next(iter(entries.values()))["bytes"]
        sent = {codec: _mean(entry["bytes"][codec] for entry in entries.values()) for codec in codecs}
        found.append(
            {
                "dataset": dataset,
                "latent_len": count,
                "messages": len(entries),
                "latents": _mean(entry["latents"] for entry in entries.values()),
                "codec": next(iter(entries.values()))["codec"],
                "context_bytes": text,
                "bytes": sent,
                "bytes_saved": {codec: text / size for codec, size in sent.items()},
            }
        )
    return found


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _result(
    key: tuple[Any, ...],
    group: Sequence[Mapping[str, Any]],
    packets: Mapping[tuple[Any, ...], Mapping[str, Any]],
    metric: str,
    resamples: int,
) -> dict[str, Any]:
    by_seed: dict[int, list[Mapping[str, Any]]] = {}
    for record in group:
        by_seed.setdefault(record["seed"], []).append(record)
    plain = [
        name
        for name, value in group[0].items()
        if isinstance(value, float) and name not in ("sent", "tokens", "context_tokens")
    ]
    entry: dict[str, Any] = {**_about(key), "examples": len({record["id"] for record in group}), "metric": metric}
    entry["metrics"] = {
        name: seeds_summary({seed: _mean(x[name] for x in part) for seed, part in by_seed.items()}) for name in plain
    }
    documents = _documents(group)
    entry["intervals"] = {}
    for name in (metric, "nll"):
        if name in plain:
            scores = scores_by_example(group, name)
            entry["intervals"][name] = mean_interval(
                list(scores.values()), [documents[example] for example in scores], resamples
            )
    if "tokens" in group[0]:
        tokens, whole = _mean(x["tokens"] for x in group), _mean(x["context_tokens"] for x in group)
        entry |= {"tokens": tokens, "context_tokens": whole, "tokens_saved": whole / tokens if tokens else None}
        if group[0]["sent"] is not None:
            entry["bytes"] = _mean(x["sent"] for x in group)
        else:
            dataset, _, method, count = key
            sent = [packets[dataset, count, x["id"]] for x in group if (dataset, count, x["id"]) in packets]
            if sent and method == "latent":
                entry["bytes"] = _mean(x["bytes"][x["codec"]] for x in sent)
    return entry


def _comparisons(
    groups: Mapping[tuple[Any, ...], Sequence[Mapping[str, Any]]], metric_of: Mapping[str, str], resamples: int
) -> list[dict[str, Any]]:
    """Every method against text and against latent, where both answered: of the same receiver, or of each where a
    method has none; of the same number of latents, or of each where a method has none."""
    found = []
    for key, group in groups.items():
        dataset, receiver, method, count = key
        for other_key, other in groups.items():
            if other_key[0] != dataset or other_key[2] not in ("text", "latent") or other_key[2] == method:
                continue
            if method == "text":  # latent against text says it already
                continue
            if receiver is not None and other_key[1] != receiver:
                continue
            if count is not None and other_key[3] is not None and other_key[3] != count:
                continue
            metric = metric_of[dataset]
            names = [metric, *(["em"] if metric == "f1" else []), "nll"]
            for name in names:
                if name not in group[0] or name not in other[0]:
                    continue
                pair = scores_by_example(group, name), scores_by_example(other, name)
                about = {**_about(key), "against": other_key[2], "against_receiver": other_key[1]}
                about |= {"against_latent_len": other_key[3], "metric": name}
                found.append({**about, **compare(*pair, _documents(group), name, resamples)})
    return found


def _gain_shares(
    groups: Mapping[tuple[Any, ...], Sequence[Mapping[str, Any]]], resamples: int
) -> list[dict[str, Any]]:
    found = []
    for key, group in groups.items():
        dataset, receiver, method, _ = key
        sides = [groups.get((dataset, receiver, side, None)) for side in ("closed_book", "text")]
        if method not in SHARED or sides[0] is None or sides[1] is None:
            continue
        closed, own, text = (scores_by_example(side, "nll") for side in (sides[0], group, sides[1]))
        documents = _documents(group)
        closed, own, text = ({name: scores[name] for name in own} for scores in (closed, own, text))
        try:
            share = gain_share(
                list(closed.values()),
                list(own.values()),
                list(text.values()),
                [documents[name] for name in own],
                resamples=resamples,
            )
        except ValueError as error:
            share = {"refused": str(error)}
        found.append({**_about(key), **share})
    return found


__all__ = ["WireEvaluation", "WireSettings", "summarize"]
