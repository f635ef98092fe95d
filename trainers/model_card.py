"""Model cards: the templates of `model_cards/`, filled with what a run measured.

    trainer, or the folder of a finished run -> CardFacts -> fill_card -> README.md
    evaluation/evaluation.json, of scripts/evaluate_model.py -> update_card -> README.md

A card states what was recorded and nothing else: no figure is a blank, not a guess.
"""

import hashlib
import json
import math
import platform
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id


# beside `trainers/`, in a clone and in an installation alike: setup.cfg installs the folder as package data
TEMPLATES = Path(__file__).resolve().parent.parent / "model_cards"
KINDS = {
    "latentforge_autoencoder": "autoencoder",
    "latentforge": "student",
    "latentforge_wire": "wire",
    "latentforge_idea": "idea",
}
TASKS = {
    "autoencoder": "feature-extraction",
    "student": "text-generation",
    "wire": "feature-extraction",
    "idea": "feature-extraction",
}
LICENSE = "mit"

METRICS = {
    "autoencoder": {
        "nll": "nats per token, from the posterior's mean",
        "token_accuracy": "share of tokens given back, free-running",
        "patch_accuracy": "share of whole patches given back, free-running",
    },
    "student": {
        "nll": "nats per token",
        "kd": "distance from the teacher, nats per token: T^2 times the KL divergence at temperature T, or, with "
        "another tokenizer, the divergence of the likelihoods of whole pieces of text",
    },
    # of each receiver too, see `_metric_names`
    "wire": {
        "answer": "nats per token of the answer",
        "first_acc": "share of answers whose first token is the likeliest",
        "kd": "KL divergence from the same receiver that reads the text, nats per token of the answer",
    },
}
METRICS["idea"] = METRICS["wire"] | {"steps": "nats per token of the texts of single steps"}
# what scripts/evaluate_model.py leaves in a model's folder, and where its figures stand in the card
EVALUATION = "evaluation/evaluation.json"
WIRE_EVALUATION = "evaluation/wire_evaluation.json"  # of scripts/evaluate_wire.py
EVALUATION_START = "<!-- evaluation: written by scripts/evaluate_model.py -->"
EVALUATION_END = "<!-- end of evaluation -->"
EVALUATED = "held-out-text"  # the Hub groups results by this type: apart from those of the training run
REPO_ID_LINE = re.compile(r'^repo_id = ".*"$', re.MULTILINE)


@dataclass
class CardFacts:
    """What a card says beside the model's shape.

    Args:
        repo_id: what the usage code loads: a Hub id, or a folder until there is one.
        num_parameters: of everything in the checkpoint, the codec inside a student included.
        has_tokenizer: the tokenizer lies beside the weights.
        metrics: of the last evaluation, without prefix; only `METRICS` are shown.
        evaluation: what `scripts/evaluate_model.py` wrote about these weights, see [`read_evaluation`].
        data, datasets: the training text in words, and its Hub ids.
        held_out: the text of the metrics, in words; default, a held-out part of `data`.
        teacher, base: whose distributions and whose layers a student learned from, as Hub ids or names.
        training: settings, shown as they are.
        license, language: of the Hub's lists.
    """

    repo_id: str
    num_parameters: int | None = None
    has_tokenizer: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    data: str | None = None
    datasets: list[str] = field(default_factory=list)
    held_out: str | None = None
    teacher: str | None = None
    base: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    license: str = LICENSE
    language: str | list[str] | None = None
    tags: list[str] = field(default_factory=list)


def fill_card(config: Any, facts: CardFacts) -> ModelCard:
    """The card of a codec, a student, a wire or an idea model.

    Args:
        config: of one of these.

    Raises:
        ValueError: the configuration of another kind of model.
        ImportError: there is no jinja2.
    """
    if config.model_type not in KINDS:
        raise ValueError(
            f"there is no card for a {config.model_type!r} model: LatentForge has them for {', '.join(KINDS)}"
        )
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("a model card needs jinja2: pip install 'latentforge[train]'") from error
    kind = KINDS[config.model_type]
    results = _results(facts.metrics, _metric_names(kind, config))
    held_out = facts.held_out or (f"a held-out part of {facts.data}" if facts.data else "held-out text")
    models = [name for name in (facts.base, facts.teacher) if name is not None and hub_id(name)]
    data = ModelCardData(
        license=facts.license,
        language=facts.language,
        library_name="transformers",
        pipeline_tag=TASKS[kind],
        tags=["latentforge", "custom_code", *facts.tags],
        base_model=list(dict.fromkeys(models)) or None,
        datasets=facts.datasets or None,
        model_name=facts.repo_id.rpartition("/")[2],
        eval_results=[
            EvalResult(
                task_type=TASKS[kind],
                dataset_type=facts.datasets[0] if facts.datasets else "text",
                dataset_name=held_out,
                metric_type=result["type"],
                metric_name=result["name"],
                metric_value=result["value"],
            )
            for result in results
            if math.isfinite(result["value"])  # YAML's .nan is refused by the Hub; the table still shows it
        ]
        + _evaluation_metadata(facts.evaluation, TASKS[kind])
        or None,
    )
    # ModelCard.from_template knows no second file, and what both cards share stands in one
    environment = jinja2.Environment(  # nosec B701 # Markdown, which the Hub cleans; & must stay &
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["thousands"] = "{:,}".format
    text = environment.get_template(f"{kind}.md.j2").render(
        metadata=data.to_yaml(),
        config=config,
        facts=facts,
        results=results,
        held_out=held_out,
        evaluation=_evaluation_text(facts.evaluation),
    )
    return ModelCard(re.sub(r"\n{3,}", "\n\n", text))


def _metric_names(kind: str, config: Any) -> dict[str, str]:
    names = dict(METRICS[kind])
    for receiver in config.bridges if kind in ("wire", "idea") else ():
        names |= {f"{name}_{receiver}": f"{words}, read by {receiver}" for name, words in METRICS[kind].items()}
    return names


def _results(metrics: Mapping[str, float], names: Mapping[str, str]) -> list[dict[str, Any]]:
    results = []
    for metric, value in metrics.items():
        name, _, sigma = metric.partition("_noise")
        if name in names:
            noise = f", noise of standard deviation {sigma} on the latent" if sigma else ""
            results.append({"type": metric, "name": names[name] + noise, "value": round(float(value), 6)})
    return results


# -- the evaluation


def weights_hash(folder: str | Path) -> str:
    """Hash of the weights in a folder, `""` where there are none."""
    files = sorted(Path(folder).glob("*.safetensors"))
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as weights:
            while chunk := weights.read(2**22):
                digest.update(chunk)
    return digest.hexdigest()[:16] if files else ""


def read_evaluation(folder: str | Path) -> dict[str, Any]:
    """The evaluation beside a model's weights; empty where there is none, or one of other weights."""
    report = _read_json(Path(folder) / EVALUATION) or _read_json(Path(folder) / WIRE_EVALUATION)
    kept = report.get("conditions", {}).get("weights")
    return report if kept and kept == weights_hash(folder) else {}


def _evaluation_results(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Figures of the judged model: `type`, `name`, `value` and `text`, the value as a person reads it."""
    results = []

    def add(metric: str, name: str, value: float | None, text: str = "") -> None:
        if value is not None:
            results.append({"type": metric, "name": name, "value": value, "text": text or f"{value:.4g}"})

    for entry in report.get("results", []):  # of a wire, beside what its receivers do with the text itself
        if entry["method"] in ("latent", "text"):
            tokens = f", {entry['tokens']:.0f} tokens a context"
            found = entry["metrics"][entry["metric"]]["mean"]
            name = f"{entry['metric']} of {entry['receiver']} from {entry['method']}s, {entry['dataset']}{tokens}"
            add(entry["metric"], name.replace("from texts", "from the text"), found)
    judged = next(iter(report.get("conditions", {}).get("parameters", {})), None)
    likelihood = report.get("likelihood", {}).get(judged, {})
    add("nats_per_token", "nats per token, exact", likelihood.get("nats_per_token"))
    add("bits_per_byte", "bits per byte, exact", likelihood.get("bits_per_byte"))
    brier = report.get("brier", {}).get(judged, {}).get("sampled")
    if brier is not None:  # scored, not refused
        low, high = brier["brier_lm_interval"]
        name = f"BrierLM, {brier['positions']:,} positions, 95 % interval"
        add("brier_lm", name, brier["brier_lm"], f"{brier['brier_lm']:.2f} ({low:.2f} to {high:.2f})")
    for entry in report.get("codec", {}).get("curve", []):
        if entry["sigma"] in (0.0, 0.3):
            noise = f", noise of standard deviation {entry['sigma']:g} on the latent" if entry["sigma"] else ""
            suffix = f"_noise{entry['sigma']:g}" if entry["sigma"] else ""
            for unit, words in (("token", "tokens"), ("patch", "whole patches")):
                add(f"{unit}_accuracy{suffix}", f"share of {words} given back{noise}", entry[f"{unit}_accuracy"])
    return results


def _evaluation_metadata(report: Mapping[str, Any], task: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task,
            dataset_type=EVALUATED,
            dataset_name=_evaluated_text(report),
            metric_type=result["type"],
            metric_name=result["name"],
            metric_value=round(float(result["value"]), 6),
        )
        for result in _evaluation_results(report)
    ]


def _evaluated_text(report: Mapping[str, Any]) -> str:
    # a card is read elsewhere: of a path, its last part
    return " ".join(Path(word).name or word for word in str(report["conditions"].get("data", "held-out text")).split())


def _evaluation_text(report: Mapping[str, Any]) -> str:
    results = _evaluation_results(report) if report else []
    if not results:
        return ""
    conditions = report["conditions"]
    script = "evaluate_wire.py" if "gain_share" in report else "evaluate_model.py"
    lines = [
        f"By `scripts/{script}`, on {_evaluated_text(report)}, {conditions['dtype']}, commit "
        f"{str(conditions['commit'])[:12]}:",
        "",
        "| metric | value |",
        "|---|---:|",
        *(f"| {result['name']} | {result['text']} |" for result in results),
    ]
    return "\n".join(lines)


def update_card(folder: str | Path) -> None:
    """Put the figures of `evaluation/evaluation.json` into the card beside it, in place of those of an earlier one.

    Raises:
        ValueError: there is no evaluation of these weights.
    """
    report = read_evaluation(folder)
    if not report:
        raise ValueError(
            f"{folder} holds no evaluation of its weights: run scripts/evaluate_model.py on it, or evaluate_wire.py"
        )
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    block = f"{EVALUATION_START}\n{_evaluation_text(report)}\n{EVALUATION_END}"
    text = card.text
    if EVALUATION_START in text and EVALUATION_END in text:
        before, _, rest = text.partition(EVALUATION_START)
        text = before + block + rest.partition(EVALUATION_END)[2]
    else:  # a card of an earlier version, or by hand
        title = "\n## Training data" if "\n## Training data" in text else None
        before, _, rest = text.partition(title) if title else (text, "", "")
        text = f"{before.rstrip()}\n\n{block}\n{title or ''}{rest}"
    # what the card said when no more was known
    for line in ("Nothing else was measured for this card", "No figure was recorded with these weights"):
        text = re.sub(rf"^{line}.*\n", "", text, flags=re.MULTILINE)
    task = card.data.pipeline_tag or "text-generation"
    kept = [result for result in card.data.eval_results or [] if result.dataset_type != EVALUATED]
    card.data.eval_results = kept + _evaluation_metadata(report, task) or None
    if card.data.eval_results and not card.data.model_name:
        card.data.model_name = Path(folder).resolve().name
    text = re.sub(r"\n{3,}", "\n\n", text).lstrip("\n")
    path.write_text(f"---\n{card.data.to_yaml()}\n---\n\n{text}", encoding="utf-8")


def address_card(card: ModelCard, repo_id: str, license: str | None = None) -> ModelCard:
    """The same card, with the usage code, the model's name (and the licence, where given) of a repository."""
    addressed = ModelCard(REPO_ID_LINE.sub(f'repo_id = "{repo_id}"', card.content))
    if addressed.data.eval_results:
        addressed.data.model_name = repo_id.rpartition("/")[2]
    if license is not None:
        addressed.data.license = license
    return addressed


def card_of_folder(
    folder: str | Path, config: Any, repo_id: str, num_parameters: int | None = None, license: str | None = None
) -> ModelCard:
    """A card from what a finished run left in its folder: `eval_results.json`, `trainer_state.json`, the tokenizer."""
    folder = Path(folder)
    state = _read_json(folder / "trainer_state.json")
    metrics = _read_json(folder / "eval_results.json") or last_evaluation(state.get("log_history", []))
    facts = CardFacts(
        repo_id,
        num_parameters,
        has_tokenizer=(folder / "tokenizer_config.json").exists(),
        metrics=_without_prefix(metrics),
        evaluation=read_evaluation(folder),
        training={"steps": state["global_step"]} if "global_step" in state else {},
        # whether a teacher's weights or words are in it, the folder does not say
        license=license or (LICENSE if config.model_type == "latentforge_autoencoder" else "unknown"),
    )
    return fill_card(config, facts)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def last_evaluation(log_history: list[dict[str, Any]]) -> dict[str, float]:
    """The newest entry of a log that holds an evaluation; empty where none does."""
    return next((entry for entry in reversed(log_history) if "eval_loss" in entry or "eval_nll" in entry), {})


def _without_prefix(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name.removeprefix("eval_"): value for name, value in metrics.items() if name.startswith("eval_")}


def facts_of_trainer(trainer: Any, repo_id: str, **given: Any) -> CardFacts:
    """What a [`LatentTrainer`] knows about its run; `given` are more fields of [`CardFacts`]."""
    args, state = trainer.args, trainer.state
    training: dict[str, Any] = {
        "steps": state.global_step,
        "rows per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
    }
    length = _row_length(trainer.eval_dataset)
    if length is not None:
        training["tokens per row"] = length
    weights = {name: weight for name, weight in trainer.part_weights().items() if weight}
    if getattr(args, "kd_alignment", "none") != "none":
        training["distillation"] = "likelihoods of whole pieces of text, from a teacher with another tokenizer"
    elif trainer.teacher_name() is not None and hasattr(args, "kd_temperature"):
        training["temperature T of the distillation"] = f"{args.kd_temperature:g}"
    training |= {
        "learning rate": f"{args.learning_rate:g}, {getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}",
        "weight decay": f"{args.weight_decay:g}",
        "loss": " + ".join(f"{weight:g} {name}" for name, weight in weights.items()),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        "seed": args.seed,
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    return CardFacts(
        repo_id,
        trainer.model.num_parameters(),
        has_tokenizer=trainer.processing_class is not None,
        metrics=_without_prefix(last_evaluation(state.log_history)),
        evaluation=read_evaluation(args.output_dir),
        training=training,
        **given,
    )


def _row_length(dataset: Any) -> int | None:
    try:
        return len(dataset[0]["input_ids"])
    except (TypeError, KeyError, IndexError, NotImplementedError):
        return None  # a stream, several sets, or rows of another kind


def describe_data(data_args: Any) -> dict[str, Any]:
    """The data arguments of `create_model_card` for [`DataArguments`]: `dataset`, `dataset_tags` (Hub ids), and as
    `dataset_args` what the held-out text is."""
    held_out = None
    if data_args.eval_data is not None:
        held_out = _describe_text(data_args.eval_data, data_args.eval_split or data_args.split, None)
    elif data_args.eval_split is not None:
        held_out = _describe_text(data_args.data, data_args.eval_split, data_args.dataset_config)
    return {
        "dataset": _describe_text(data_args.data, data_args.split, data_args.dataset_config),
        "dataset_tags": data_args.data if hub_id(data_args.data) else None,
        "dataset_args": held_out,
    }


def _describe_text(data: str, split: str, config: str | None) -> str:
    if data == "builtin:python":
        return f"the source code of Python {platform.python_version()}'s standard library"
    if hub_id(data):
        return f"the Hub dataset {data} (split {split}{f', configuration {config}' if config else ''})"
    return f"text that is not on the Hub ({Path(data).name})"


def hub_id(name: str) -> bool:
    """Whether a model's or data set's name is a Hub id: `owner/name`, and no file or folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not Path(name).exists()


def public_name(name: str) -> str:
    """A Hub id as it is; of a folder, its last part only: cards are read elsewhere."""
    return name if hub_id(name) else f"a model that is not on the Hub ({Path(name).name})"


def license_of(model: str) -> str | None:
    """The licence that a model's own card names; None where there is no card, or none to be had."""
    readme = Path(model) / "README.md"
    if not readme.exists() and not hub_id(model):
        return None
    try:
        return ModelCard.load(readme if readme.exists() else model, ignore_metadata_errors=True).data.license
    except Exception:  # no network, no access, metadata that does not parse: a finished run must not end on it
        return None


def license_of_all(models: Iterable[str]) -> str:
    """The licence that all models name that it learned from, or `unknown`."""
    found = {license_of(model) for model in models}
    return found.pop() or "unknown" if len(found) == 1 else "unknown"
