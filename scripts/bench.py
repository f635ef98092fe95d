"""Measure how fast students write, what that costs, and print the tables.

    python scripts/bench.py                                # random weights of the seed's size, 12 x 768, K=8 and K=4
    python scripts/bench.py --model runs/demo/student runs/demo/student_parallel --baseline runs/demo/teacher
    python scripts/bench.py --tables decode --batch_sizes 1 --device cuda --dtype bfloat16 --compile

Tables: decode (tokens/s against a token LM of the same backbone), roofline (time, bytes and operations of a token,
peak memory, and the share of what this machine can), overhead (time outside the modules), memory (cache per token),
sampling (likelihood-free, against CALM's algorithm; for an energy head with a parallel decoder), drafting (the
baseline alone, with each other model as assistant, with prompt lookup). Trained models read --prompts_file, a prompt
a line, and write one sample each; random weights read random ids and write none.

--compile compiles the small decoder with torch.compile, on CUDA with mode="reduce-overhead" (CUDA graphs): the step of
one token of an autoregressive decoder, the layers of a parallel one; prompts, backbone, head and output matrix stay.

Tables go to standard output, progress to standard error, everything to --output_dir/bench_YYYYMMDD_HHMMSS.json (UTC),
which is written anew after every setting that is finished.
"""

import copy
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


TABLE_NAMES = ("decode", "roofline", "overhead", "memory", "sampling", "drafting")
PROMPT_LENGTHS = (16, 512, 2048)
BASELINE = "token LM"  # its name where weights are random


@dataclass
class BenchArguments:
    """What to measure, on what."""

    model: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Directories of trained students, or Hub ids, and of token LMs beside them (a smaller one, say); "
            "none: random weights of the sizes below."
        },
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Directory or Hub id of the token LM that they are compared with."}
    )
    prompts_file: str = field(default="prompts.txt", metadata={"help": "A prompt a line, for trained models."})
    tables: list[str] = field(
        default_factory=lambda: ["decode", "roofline", "overhead", "memory"],
        metadata={"help": f"Which of {', '.join(TABLE_NAMES)}."},
    )
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 8, 32], metadata={"help": "Of the tables decode and roofline."}
    )
    prompt_lengths: list[int] | None = field(
        default=None,
        metadata={"help": "Of these two, in tokens; default 16 512 2048, as far as the models read that much."},
    )
    new_tokens: int = field(
        default=64,
        metadata={
            "help": "Tokens to write per row and sample; timed are so many after the prompt's own next token, so a "
            "multiple of K counts each patch once."
        },
    )
    repeats: int = field(default=3, metadata={"help": "Timed rounds, in turns, after one that warms up."})
    device: str | None = field(default=None, metadata={"help": "Default: cuda where there is one, else cpu."})
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16."})
    threads: int | None = field(default=None, metadata={"help": "Threads of the CPU; default: torch's own."})
    compile: bool = field(default=False, metadata={"help": "Compile the small decoder, see above."})
    output_dir: str = field(default="results", metadata={"help": "Where the JSON goes."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model code of a Hub repository."})
    # -- random weights
    patch_size: list[int] = field(default_factory=lambda: [8, 4], metadata={"help": "K of the random students."})
    decoder: list[str] = field(
        default_factory=lambda: ["1x256", "2x512"],
        metadata={"help": "Layers x width of the random autoregressive decoders."},
    )
    hidden_size: int = field(default=768, metadata={"help": "Width of the random backbones."})
    num_hidden_layers: int = field(default=12, metadata={"help": "Layers of the random backbones."})
    small_layers: int | None = field(
        default=None,
        metadata={"help": "Layers of a smaller random token LM beside them; default, a quarter of those."},
    )
    vocab_size: int = field(default=32000, metadata={"help": "Token ids of the random models."})
    codec_hidden_size: int = field(
        default=512, metadata={"help": "Width of the random codecs, and so of the parallel decoders."}
    )

    def __post_init__(self) -> None:
        unknown = [name for name in self.tables if name not in TABLE_NAMES]
        if unknown:
            raise ValueError(f"unknown table {unknown[0]!r}: known are {', '.join(TABLE_NAMES)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        for name in (
            "batch_sizes",
            "prompt_lengths",
            "new_tokens",
            "repeats",
            "threads",
            "patch_size",
            "hidden_size",
            "small_layers",
        ):
            value = getattr(self, name)
            values = value if isinstance(value, list) else [] if value is None else [value]
            if any(number < 1 for number in values):
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.baseline is not None and not self.model:
            raise ValueError("a baseline needs a --model to compare with it")
        if "drafting" in self.tables and self.baseline is None:
            raise ValueError("the table drafting needs --model and --baseline: random weights accept no drafts")
        from trainers.command_line import model_path

        self.model = [model_path("model", path, self.trust_remote_code) for path in self.model]
        if self.baseline is not None:
            self.baseline = model_path("baseline", self.baseline, True)  # a token LM needs no code of its own
        self.decoder_shapes()

    def decoder_shapes(self) -> list[tuple[int, int]]:
        """Layers and width of each of `decoder`.

        Raises:
            ValueError: one that is not two numbers with an x between them.
        """
        shapes = []
        for shape in self.decoder:
            layers, _, width = shape.partition("x")
            if not (layers.isdigit() and width.isdigit() and int(layers) and int(width)):
                raise ValueError(f"a decoder is layers x width, as in 2x512, got {shape!r}")
            shapes.append((int(layers), int(width)))
        return shapes


@dataclass
class Bench:
    """Who is measured, on which text.

    Attributes:
        models: by name, in eval mode on `device`; the baseline first.
        baseline: its name, None where there is none.
        whole_patches: those of the sampling table.
        device: of all.
        texts, tokenizer: prompts and what reads them; without a tokenizer, weights and ids are random.
    """

    models: dict[str, Any]
    baseline: str | None
    whole_patches: dict[str, Any]
    device: str
    texts: list[str] = field(default_factory=list)
    tokenizer: Any = None

    def prompt_ids(self) -> list[list[int]]:
        """Ids of each text, as they are."""
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.texts]

    def ids(self, batch: int, length: int) -> Any:
        """Ids `(batch, length)` on the device."""
        from trainers.evaluation.benchmark import random_prompts, tiled_prompts

        if self.tokenizer is not None:
            return tiled_prompts(self.prompt_ids(), batch, length).to(self.device)
        models = {**self.models, **self.whole_patches}
        return random_prompts(next(iter(models.values())).config.vocab_size, batch, length).to(self.device)

    def write_samples(self, new_tokens: int) -> list[dict[str, str]]:
        """One continuation of each text by each model, sampled at temperature 0.8 with one seed; none is selected."""
        from trainers.reporting import measure_generation

        if self.tokenizer is None:
            return []
        prompts = [{"prompt": text} for text in self.texts]
        # what it says of speed is not wanted: one token is enough
        return measure_generation(self.models, self.tokenizer, prompts, new_tokens, speed_tokens=1, repeats=1)[
            "samples"
        ]


def main(argv: Sequence[str] | None = None) -> Path:
    """Parse, build or load, measure, print; returns the path of the JSON."""
    from trainers.arguments import parse_arguments

    (arguments,) = parse_arguments(BenchArguments, argv=argv, description=__doc__)

    import torch

    from trainers.command_line import choose_device
    from trainers.evaluation.benchmark import TABLES, compile_decoder, rates_line
    from trainers.evaluation.roofline import MachineRates
    from trainers.verification import environment

    device = choose_device(arguments.device)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    bench = _load(arguments, device) if arguments.model else _build(arguments, device)
    lengths, too_long = _lengths(arguments, bench.models)
    if arguments.compile:
        for model in bench.models.values():
            compile_decoder(model, **({"mode": "reduce-overhead"} if device.startswith("cuda") else {}))

    started = time.gmtime()
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", started),
        "finished": False,
        "arguments": asdict(arguments),
        "device": device,
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
        **environment(),
        "models": {name: _describe(model) for name, model in {**bench.models, **bench.whole_patches}.items()},
        "tables": {},
        "samples": [],
    }
    rates = MachineRates(device, getattr(torch, arguments.dtype))
    path = Path(arguments.output_dir) / f"bench_{time.strftime('%Y%m%d_%H%M%S', started)}.json"
    _save(report, path)
    print(
        f"# Benchmark\n\n{'trained' if arguments.model else 'random'} weights, {arguments.dtype} on {device}, "
        f"{torch.get_num_threads()} threads{', small decoder compiled' if arguments.compile else ''}; "
        f"{arguments.new_tokens} new tokens, medians of {arguments.repeats} (least..most)\n",
        flush=True,
    )
    print(f"figures so far are in {path}", file=sys.stderr)
    for name in dict.fromkeys(arguments.tables):
        rows = report["tables"][name] = []
        for group in _measure(name, arguments, bench, lengths, rates):
            rows += [{"device": device, **row} for row in group]
            _save(report, path)
        if name in ("decode", "roofline"):
            rows += [
                {"device": device, "prompt": length, "not_measured": reason} for length, reason in too_long.items()
            ]
        if not device.startswith("cuda"):
            missing = "run with --device cuda" if torch.cuda.is_available() else "no GPU"
            rows.append({"device": "cuda", "not_measured": missing})
        print(TABLES[name].markdown(rows) + "\n", flush=True)
        if name == "roofline":
            report["rates"] = rates.record()
            print(rates_line(report["rates"]) + "\n", flush=True)
        _save(report, path)
    report["samples"] = bench.write_samples(arguments.new_tokens)
    report["finished"] = True
    _save(report, path)
    _print_samples(report["samples"])
    print(f"kept in {path}", flush=True)
    return path


def _build(arguments: BenchArguments, device: str) -> Bench:
    """Models of random weights."""
    import torch

    from trainers.evaluation.benchmark import seed_backbone, seed_student, seed_token_lm

    lengths = arguments.prompt_lengths or PROMPT_LENGTHS
    backbone = seed_backbone(
        arguments.hidden_size,
        num_hidden_layers=arguments.num_hidden_layers,
        vocab_size=arguments.vocab_size,
        max_position_embeddings=max(4096, max(lengths) + arguments.new_tokens + 1),
    )
    codec = {"hidden_size": arguments.codec_hidden_size, "intermediate_size": arguments.codec_hidden_size * 5 // 2}
    dtype = getattr(torch, arguments.dtype)
    models: dict[str, Any] = {}
    if set(arguments.tables) - {"sampling"}:
        models[BASELINE] = seed_token_lm(backbone)
        smaller = copy.deepcopy(backbone)
        smaller.num_hidden_layers = arguments.small_layers or max(1, arguments.num_hidden_layers // 4)
        models[f"{BASELINE}, layers: {smaller.num_hidden_layers}"] = seed_token_lm(smaller)
        for patch_size in dict.fromkeys(arguments.patch_size):
            models[f"K={patch_size} parallel"] = seed_student(backbone, patch_size, "parallel", codec)
            for layers, width in arguments.decoder_shapes():
                models[f"K={patch_size} autoregressive {layers}x{width}"] = seed_student(
                    backbone, patch_size, codec=codec, num_decoder_layers=layers, decoder_hidden_size=width
                )
    whole_patches = {}
    if "sampling" in arguments.tables:
        for patch_size in dict.fromkeys(arguments.patch_size):
            whole_patches[f"K={patch_size} parallel, energy head"] = seed_student(
                backbone, patch_size, "parallel", codec, head_config={"head_type": "energy"}
            )
    for model in (*models.values(), *whole_patches.values()):
        model.to(device, dtype)
    return Bench(models, BASELINE if models else None, whole_patches, device)


def _load(arguments: BenchArguments, device: str) -> Bench:
    """Trained models, their one tokenizer, and the prompts.

    Raises:
        ValueError: two models that read other ids, no prompt, no model for the sampling table.
        OSError: a file or model that cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import modeling_latentforge  # noqa: F401  (registers our models with the Auto classes)
    from trainers.command_line import check_writes_text
    from trainers.evaluation.benchmark import samples_whole_patches

    texts = _read_prompts(arguments.prompts_file)
    paths = list(dict.fromkeys([arguments.baseline, *arguments.model] if arguments.baseline else arguments.model))
    short = [Path(path).name for path in paths]
    names = [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]
    options = {"trust_remote_code": arguments.trust_remote_code}
    for path in paths:
        check_writes_text("model", path, **options)
    tokenizers = [AutoTokenizer.from_pretrained(path, **options) for path in paths]
    for path, tokenizer in zip(paths, tokenizers, strict=True):
        if tokenizer.get_vocab() != tokenizers[0].get_vocab():
            raise ValueError(
                f"{path} has another vocabulary ({len(tokenizer)} tokens) than {paths[0]} ({len(tokenizers[0])}): "
                "their tokens a second are of different text. Compare models of one tokenizer."
            )
    models = {
        name: AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, arguments.dtype), **options)
        .to(device)
        .eval()
        for name, path in zip(names, paths, strict=True)
    }
    whole_patches = {name: model for name, model in models.items() if samples_whole_patches(model)}
    if "sampling" in arguments.tables and not whole_patches:
        raise ValueError(
            "the table sampling needs a student with an energy head and a parallel decoder: "
            f"none of {', '.join(names)} is one"
        )
    return Bench(models, names[0] if arguments.baseline else None, whole_patches, device, texts, tokenizers[0])


def _read_prompts(path: str) -> list[str]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read --prompts_file {path}: {error.strerror}") from error
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts_file {path} holds no prompt: write one a line")
    return prompts


def _lengths(arguments: BenchArguments, models: dict[str, Any]) -> tuple[list[int], dict[int, str]]:
    """Prompt lengths of the decode table, and by length why one of the defaults is left out.

    Raises:
        ValueError: a length that was asked for is more than a model reads.
    """
    from trainers.evaluation.benchmark import context_length

    lengths, too_long = [], {}
    for length in arguments.prompt_lengths or PROMPT_LENGTHS:
        whole = length + arguments.new_tokens + 1
        limits = {name: context_length(model) for name, model in models.items()}
        below = [f"{name} reads {limit}" for name, limit in limits.items() if limit and limit < whole]
        if not below:
            lengths.append(length)
        elif arguments.prompt_lengths and {"decode", "roofline"} & set(arguments.tables):
            raise ValueError(
                f"a prompt of {length} and {arguments.new_tokens} new tokens after its first are {whole} tokens, "
                f"{below[0]}: lower --prompt_lengths or --new_tokens"
            )
        else:
            too_long[length] = f"{whole} tokens, {below[0]}"
    return lengths, too_long


def _measure(
    table: str, arguments: BenchArguments, bench: Bench, lengths: Sequence[int], rates: Any
) -> Iterator[list[dict[str, Any]]]:
    """The rows of a table, as they are measured."""
    import torch

    from trainers.evaluation import benchmark

    models, baseline = bench.models, bench.baseline
    written: dict[str, Any] = {"new_tokens": arguments.new_tokens, "repeats": arguments.repeats, "say": _say}
    if table == "decode":
        return benchmark.decode_rows(models, bench.ids, arguments.batch_sizes, lengths, baseline=baseline, **written)
    if table == "roofline":
        return benchmark.roofline_rows(models, bench.ids, arguments.batch_sizes, lengths, rates, **written)
    if table == "overhead":
        return benchmark.overhead_rows(models, bench.ids(1, 16), **written)
    if table == "memory":
        short, long = _memory_lengths(models)
        return benchmark.memory_rows(models, bench.ids(1, long), short, baseline, _say)
    if table == "sampling":
        return benchmark.sampling_rows(bench.whole_patches, bench.ids(1, 16), **written)
    assert baseline is not None, "drafting without a baseline is refused with the arguments"
    students = {name: model for name, model in models.items() if name != baseline}
    prompts = [torch.tensor([ids], device=bench.device) for ids in bench.prompt_ids()]
    return benchmark.drafting_rows(models[baseline], students, prompts, **written)


def _memory_lengths(models: dict[str, Any]) -> tuple[int, int]:
    """512 and 2560 tokens, or less where a model reads less, in whole patches of all."""
    from math import lcm

    from trainers.evaluation.benchmark import context_length

    patch = lcm(*(getattr(model.config, "patch_size", 1) for model in models.values()))
    long = min([2560, *(limit for model in models.values() if (limit := context_length(model)))])
    return max(patch, long // 5 // patch * patch), long // patch * patch


def _describe(model: Any) -> dict[str, Any]:
    """What of a model its figures depend on."""
    from trainers.evaluation.benchmark import context_length

    config = model.config
    described: dict[str, Any] = {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocab_size": config.vocab_size,
        "context": context_length(model),
    }
    if not hasattr(model, "sample_latents"):
        return described
    described |= {
        "patch_size": config.patch_size,
        "latent_size": config.latent_size,
        "decoder_type": config.decoder_type,
        "head_type": config.head_config.head_type,
    }
    if config.decoder_type == "autoregressive":
        names = ("num_decoder_layers", "decoder_hidden_size", "decoder_window", "decoder_memory")
        described |= {name: getattr(config, name) for name in names}
    return described


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _save(report: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.part")
    draft.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)  # whoever interrupts this keeps what is measured


def _print_samples(samples: Sequence[dict[str, str]]) -> None:
    if not samples:
        return
    print("## Samples\n\nOne of each, temperature 0.8, none selected.")
    for sample in samples:
        print()
        for title, text in sample.items():
            print(f"{title}:\n\n" + "".join(f"    {line}\n" for line in text.splitlines() or [""]))


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
