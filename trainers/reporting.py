"""The report of a demo: what the students gained and what that cost, measured on text that no stage trained on.

measure_generation -> speed and samples       measure_quality -> likelihood and reconstruction
both, and the stages' logs -> write_report -> report.md, report.json, loss_curves.png, reconstruction.png
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .evaluation.likelihood import held_out_likelihood
from .evaluation.reconstruction import reconstruction_accuracy
from .evaluation.speed import generation_speed


NOISE_LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)

# what a curve shows, of the many numbers that a training logs
CURVES = {"loss": ("-", "training"), "ce": (":", "its cross-entropy"), "eval_loss": ("o", "held out")}


def read_history(directory: str | Path) -> list[dict[str, Any]]:
    """The log history of a training: `trainer_state.json` of its folder, else of its newest checkpoint.

    Raises:
        FileNotFoundError: neither is there.
    """
    directory = Path(directory)
    checkpoints = sorted(directory.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for folder in (directory, *reversed(checkpoints)):
        if (folder / "trainer_state.json").exists():
            return json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    raise FileNotFoundError(f"{directory} holds no trainer_state.json: it is not the folder of a training")


def held_out_prompts(
    texts: Any, tokenizer: Any, count: int, prompt_tokens: int, new_tokens: int
) -> list[dict[str, str]]:
    """The first `count` held-out documents that are long enough, cut into prompt and true continuation.

    Args:
        texts: held-out pieces with `text` and `document`, as `load_texts` gives them.
        prompt_tokens, new_tokens: tokens of the prompt and of what follows it.

    Returns:
        `prompt` and `reference`, text; fewer than `count` where the corpus has no more.
    """
    prompts: list[dict[str, str]] = []
    seen = set()
    for piece in texts:
        if len(prompts) == count:
            break
        if piece["document"] in seen:
            continue
        seen.add(piece["document"])
        # a token has a few characters: no need to tokenise a whole book for its first line
        ids = tokenizer(piece["text"][: 40 * (prompt_tokens + new_tokens)], add_special_tokens=False)["input_ids"]
        if len(ids) < prompt_tokens + new_tokens:
            continue
        prompts.append(
            {
                "prompt": tokenizer.decode(ids[:prompt_tokens]),
                "reference": tokenizer.decode(ids[prompt_tokens : prompt_tokens + new_tokens]),
            }
        )
    return prompts


@torch.no_grad()
def measure_generation(
    models: Mapping[str, Any],
    tokenizer: Any,
    prompts: Sequence[Mapping[str, str]],
    new_tokens: int = 64,
    speed_tokens: int = 128,
    repeats: int = 5,
    temperature: float = 0.8,
    seed: int = 0,
) -> dict[str, Any]:
    """Speed at batch 1 and unselected samples of all models, in one run: same machine, threads and dtype.

    Args:
        models: by name, in eval mode, on one device; they share the tokenizer.
        prompts: `prompt` and `reference`, as `held_out_prompts` gives them.
        new_tokens: tokens per sample; `speed_tokens`: tokens per timed run.
        repeats: timed runs per model and mode, after one that warms up.
        temperature: of the samples; speed is measured greedy and at temperature 1.
        seed: set anew before every sample.

    Returns:
        `speed.greedy` and `speed.sampled`, see `generation_speed`; `samples`, a list with `prompt`, `reference` and
        one text per model; `conditions`, what was the same for all.

    Raises:
        ValueError: no prompt.
    """
    if not prompts:
        raise ValueError("no held-out document is long enough for a prompt: give longer texts, or lower prompt_tokens")
    device = next(iter(models.values())).device
    timed = tokenizer(prompts[0]["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"].to(device)
    speed = {
        mode: generation_speed(models, timed, speed_tokens, do_sample, repeats, seed)
        for mode, do_sample in (("greedy", False), ("sampled", True))
    }
    samples = []
    for prompt in prompts:
        ids = tokenizer(prompt["prompt"], add_special_tokens=False, return_tensors="pt")["input_ids"].to(device)
        sample = dict(prompt)
        for name, model in models.items():
            torch.manual_seed(seed)
            written = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
            )
            sample[name] = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        samples.append(sample)
    return {
        "speed": speed,
        "samples": samples,
        "conditions": {
            "batch_size": 1,
            "prompt_tokens": timed.shape[1],
            "timed_tokens": speed_tokens,
            "repeats": repeats,
            "dtype": str(next(iter(models.values())).dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "device": str(device),
            "temperature": temperature,
            "seed": seed,
        },
    }


def measure_quality(
    models: Mapping[str, Any],
    autoencoder: Any,
    tokenizer: Any,
    blocks: Any,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    max_tokens: int | None = None,
    max_codec_tokens: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Held-out likelihood of every model and the codec's free-running reconstruction, on the same blocks.

    Args:
        models: causal LMs by name.
        autoencoder: the codec.
        blocks: held-out blocks of `load_blocks`.
        noise_levels: standard deviations of the noise on the latent.
        max_tokens, max_codec_tokens: stop after so many tokens; default all.
        seed: of the noise.

    Returns:
        `likelihood` by model (`held_out_likelihood`) and `reconstruction`, one entry per noise level
        (`reconstruction_accuracy`).
    """
    return {
        "likelihood": {
            name: held_out_likelihood(model, blocks, tokenizer, max_tokens=max_tokens)
            for name, model in models.items()
        },
        "reconstruction": [
            reconstruction_accuracy(autoencoder, blocks, sigma, seed, max_tokens=max_codec_tokens)
            for sigma in noise_levels
        ],
    }


def plot_loss_curves(histories: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """One panel per training: loss against steps, on the training text and held out."""
    figure, panels = _figure(len(histories), "loss_curves")
    for panel, (name, history) in zip(panels, histories.items(), strict=True):
        for key, (style, label) in CURVES.items():
            points = [(entry["step"], entry[key]) for entry in history if key in entry and "step" in entry]
            if points:
                panel.plot(*zip(*points, strict=True), style, label=label)
        panel.set(title=name, xlabel="step", ylabel="loss (nats)")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.savefig(path, dpi=120)


def plot_reconstruction(reconstruction: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """Token and whole-patch accuracy against the noise on the latent."""
    figure, (panel,) = _figure(1, "reconstruction")
    sigmas = [entry["sigma"] for entry in reconstruction]
    for key, label in (("token_accuracy", "tokens"), ("patch_accuracy", "whole patches")):
        panel.plot(sigmas, [100 * entry[key] for entry in reconstruction], "o-", label=label)
    panel.set(title="codec, held-out text", xlabel="noise on the latent (standard deviation)", ylabel="right (%)")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(path, dpi=120)


def write_report(
    directory: str | Path,
    quality: Mapping[str, Any],
    generation: Mapping[str, Any],
    histories: Mapping[str, Sequence[Mapping[str, Any]]],
    stages: Mapping[str, Mapping[str, Any]],
    setup: Mapping[str, Any],
    baseline: str = "teacher",
) -> None:
    """Write report.md, report.json, loss_curves.png and reconstruction.png.

    Args:
        directory: made if missing.
        quality, generation: of `measure_quality` and `measure_generation`.
        histories: log history by training.
        stages: by name, with `seconds` and `peak_memory_bytes`.
        setup: data, sizes and parameter counts, shown as they are.
        baseline: the model that the others are compared with.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    plot_loss_curves(histories, directory / "loss_curves.png")
    plot_reconstruction(quality["reconstruction"], directory / "reconstruction.png")
    comparison = _compare(quality, generation, baseline)
    report = {
        "setup": dict(setup),
        "comparison": comparison,
        "quality": dict(quality),
        "generation": dict(generation),
        "stages": {name: dict(stage) for name, stage in stages.items()},
    }
    (directory / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = _markdown(report, baseline)
    (directory / "report.md").write_text(text, encoding="utf-8")


def _compare(quality: Mapping[str, Any], generation: Mapping[str, Any], baseline: str) -> dict[str, dict[str, float]]:
    likelihood, speed = quality["likelihood"], generation["speed"]
    comparison = {}
    for name in likelihood:
        comparison[name] = {
            "nats_per_token": likelihood[name]["nats_per_token"],
            "bits_per_byte": likelihood[name]["bits_per_byte"],
            "nats_worse_than_" + baseline: likelihood[name]["nats_per_token"] - likelihood[baseline]["nats_per_token"],
            "backbone_steps_per_token": speed["greedy"][name]["backbone_steps_per_token"],
        }
        for mode in speed:
            rate = speed[mode][name]["tokens_per_second"]
            comparison[name][f"tokens_per_second_{mode}"] = rate
            comparison[name][f"speedup_{mode}"] = rate / speed[mode][baseline]["tokens_per_second"]
    return comparison


def _markdown(report: Mapping[str, Any], baseline: str) -> str:
    comparison, conditions = report["comparison"], report["generation"]["conditions"]
    names = list(comparison)
    others = [name for name in names if name != baseline]
    quality = report["quality"]
    first = quality["likelihood"][names[0]]

    def row(label: str, key: str, form: str) -> str:
        return f"| {label} | " + " | ".join(format(comparison[name][key], form) for name in names) + " |"

    lines = [
        "# Demo report",
        "",
        "Small models, trained for minutes: this shows that every part works, and what it does to speed and",
        "likelihood at this size. It is no claim about quality; those are the rows of `make verify`.",
        "",
        *(f"- {name}: {value}" for name, value in report["setup"].items()),
        "",
        "## Gained and paid",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---:|" * len(names),
        row("tokens/s, greedy", "tokens_per_second_greedy", ".1f"),
        row(f"times the {baseline}, greedy", "speedup_greedy", ".2f"),
        row("tokens/s, sampled", "tokens_per_second_sampled", ".1f"),
        row(f"times the {baseline}, sampled", "speedup_sampled", ".2f"),
        row("backbone steps per token", "backbone_steps_per_token", ".3f"),
        row("held-out nats/token", "nats_per_token", ".3f"),
        row(f"nats/token worse than the {baseline}", f"nats_worse_than_{baseline}", "+.3f"),
        row("held-out bits/byte", "bits_per_byte", ".3f"),
        "",
        f"Speed: batch 1, {conditions['timed_tokens']} tokens after a prompt of {conditions['prompt_tokens']}, "
        f"{conditions['dtype']} on {conditions['device']}, {conditions['threads']} threads, median of "
        f"{conditions['repeats']} runs in turns after one warm-up.",
        f"Likelihood: {first['num_tokens']} held-out tokens ({first['num_bytes']} bytes), the same for all.",
        "",
    ]
    for name in others:
        entry = comparison[name]
        difference = entry[f"nats_worse_than_{baseline}"]
        lines.append(
            f"- **{name}** writes {entry['speedup_greedy']:.2f} times as fast as the {baseline} (greedy; sampled "
            f"{entry['speedup_sampled']:.2f}), and its likelihood is {abs(difference):.3f} nats/token "
            f"{'worse' if difference >= 0 else 'better'}."
        )
    lines += [
        "",
        "A parallel decoder emits the K tokens of a patch independently of each other: its nats/token are those",
        "of that product.",
        "",
        "## Codec",
        "",
        "Free-running, posterior mean plus noise, on held-out text.",
        "",
        "| noise | tokens right | whole patches right |",
        "|---:|---:|---:|",
        *(
            f"| {entry['sigma']:.1f} | {100 * entry['token_accuracy']:.2f} % | {100 * entry['patch_accuracy']:.2f} % |"
            for entry in quality["reconstruction"]
        ),
        "",
        "![reconstruction against noise](reconstruction.png)",
        "",
        "## Training",
        "",
        "| stage | seconds | peak memory |",
        "|---|---:|---:|",
        *(
            f"| {name} | {stage['seconds']:.0f} | {_gigabytes(stage.get('peak_memory_bytes'))} |"
            for name, stage in report["stages"].items()
        ),
        "",
        "![loss curves](loss_curves.png)",
        "",
        "## Samples",
        "",
        f"The first {len(report['generation']['samples'])} held-out documents, none selected; temperature "
        f"{conditions['temperature']:g}, seed {conditions['seed']}.",
    ]
    for number, sample in enumerate(report["generation"]["samples"], 1):
        lines += ["", f"### {number}"]
        for title in ("prompt", "reference", *names):
            lines += ["", f"{title}:", "", *_fenced(sample[title])]
    return "\n".join(lines) + "\n"


def _fenced(text: str) -> list[str]:
    # longer than any run of backticks inside
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence + "text", text, fence]


def _gigabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.2f} GB"


def _figure(panels: int, name: str) -> tuple[Any, list[Any]]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"the plot {name!r} needs matplotlib: pip install 'latentforge[train]'") from error
    figure = Figure(figsize=(4.2 * panels, 3.4), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])
