"""Judge a model beside others, on text that none has seen, and write one report.

    python scripts/evaluate_model.py runs/demo/student --teacher runs/demo/teacher --quick
    python scripts/evaluate_model.py runs/demo/student --baseline runs/demo/student_parallel
    python scripts/evaluate_model.py my-name/my-student --trust_remote_code --teacher my-org/my-lm --data my_book.txt
    python scripts/evaluate_model.py runs/demo/autoencoder --quick

MODEL is a student, a token model or a codec. Parts: codec (what it gives back, by kind of text and under noise),
likelihood (where there is one), brier (BrierLM, for every kind of model), generation (texts at several temperatures;
the teacher judges them), speed (a short table; scripts/bench.py has the long ones).

Writes evaluation.json, evaluation.md and evaluation.html (one file, plots inside) into MODEL/evaluation, or
--output_dir, and the figures into the model card beside the weights. Finished parts are kept in its folder `parts`: a
command that was interrupted goes on where it stopped. --quick takes minutes, without it expect half an hour on a CPU.
"""

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class EvaluateArguments:
    """Who is judged, beside whom, on what."""

    model: str = field(metadata={"help": "Folder or Hub id; may be written without --model, as the first word."})
    baseline: list[str] = field(
        default_factory=list, metadata={"help": "Other causal LMs of the same tokenizer, scored at the same places."}
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Token model of the same tokenizer that judges texts; it is scored too."},
    )
    quick: bool = field(default=False, metadata={"help": "A first look: 20,000 positions, few and short texts."})
    parts: list[str] = field(
        default_factory=lambda: ["codec", "likelihood", "brier", "generation", "speed"],
        metadata={"help": "Which of codec, likelihood, brier, generation, speed."},
    )
    data: str = field(
        default="builtin:python",
        metadata={"help": "Corpus of the training, whose held-out part is read, in any form of the training scripts."},
    )
    eval_data: str | None = field(default=None, metadata={"help": "Held-out text in place of a part of `data`."})
    eval_fraction: float = field(
        default=0.05,
        metadata={"help": "Held-out share of `data`, as in the training: more would hold text that it has read."},
    )
    domain: list[str] = field(
        default_factory=list,
        metadata={"help": "NAME=TEXT: more kinds of text for the codec, or others for prose, code, numbers."},
    )
    block_size: int = field(default=512, metadata={"help": "Tokens in a row: the longest context."})
    patch_size: int | None = field(
        default=None, metadata={"help": "Tokens per scored patch. Default: the students', 4 where there is none."}
    )
    positions: int | None = field(default=None, metadata={"help": "Patch starts for BrierLM; default 100,000."})
    num_texts: int | None = field(default=None, metadata={"help": "Texts at each temperature; default 512."})
    new_tokens: int | None = field(default=None, metadata={"help": "Tokens of each text; default 64."})
    temperatures: list[float] | None = field(
        default=None, metadata={"help": "Of the texts; default 0.5 0.7 0.85 1 1.2."}
    )
    seed: int = field(default=0, metadata={"help": "Of everything that is drawn."})
    device: str | None = field(default=None, metadata={"help": "Default: cuda where there is one, else cpu."})
    dtype: str = field(default="float32", metadata={"help": "float32 or bfloat16."})
    threads: int | None = field(default=None, metadata={"help": "Threads of the CPU; default: torch's own."})
    output_dir: str | None = field(default=None, metadata={"help": "Default: MODEL/evaluation."})
    card: bool = field(default=True, metadata={"help": "Put the figures into MODEL/README.md, if that is there."})
    cache_dir: str | None = field(default=None, metadata={"help": "Of the tokenised text."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model code of a Hub repository."})

    def __post_init__(self) -> None:
        known = ("codec", "likelihood", "brier", "generation", "speed")
        for part in self.parts:
            if part not in known:
                raise ValueError(f"unknown part {part!r}: known are {', '.join(known)}")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got {self.dtype!r}")
        for name in ("block_size", "patch_size", "positions", "num_texts", "new_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.new_tokens is not None and self.new_tokens < 4:
            raise ValueError(f"new_tokens must be at least 4, got {self.new_tokens}: 4-grams are counted")
        if any(temperature <= 0 for temperature in self.temperatures or ()):
            raise ValueError(f"temperatures must be above 0, got {self.temperatures}: greedy writes one text only")
        for domain in self.domain:
            if "=" not in domain:
                raise ValueError(f"a domain is NAME=TEXT, as in letters=letters.txt, got {domain!r}")
        from trainers.command_line import model_path

        self.model = model_path("model", self.model, self.trust_remote_code)
        self.baseline = [model_path("baseline", path, self.trust_remote_code) for path in self.baseline]
        if self.teacher:
            self.teacher = model_path("teacher", self.teacher, self.trust_remote_code)


def main(argv: Sequence[str] | None = None) -> Path:
    """Parse, load, measure, write; returns the path of the JSON."""
    from trainers.arguments import parse_arguments

    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--model")
    (arguments,) = parse_arguments(EvaluateArguments, argv=argv, description=__doc__)

    import torch
    from transformers.utils import logging

    from trainers.command_line import check_writable, choose_device, progress_bar, say
    from trainers.evaluation.evaluation import Evaluation
    from trainers.evaluation.evaluation_report import write_evaluation
    from trainers.model_card import read_evaluation, update_card, weights_hash

    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = choose_device(arguments.device)
    logging.set_verbosity_error()  # notes of `generate` between the lines of progress
    started = time.perf_counter()
    default = Path(arguments.model) / "evaluation" if Path(arguments.model).is_dir() else None
    output_dir = Path(arguments.output_dir) if arguments.output_dir else default or Path("results/evaluation")
    weights = weights_hash(arguments.model)  # before they are read: a training may go on in that folder
    subjects, notes = _load(arguments, device)
    check_writable(output_dir)
    settings = _settings(arguments)
    report = Evaluation(subjects, settings, output_dir / "parts", arguments.parts, say, progress_bar).run()
    report["conditions"] |= {
        "command": f"python scripts/evaluate_model.py {shlex.join(argv[1:] if argv[0] == '--model' else argv)}",
        "data": arguments.eval_data or f"held-out part of {arguments.data}",
        "quick": arguments.quick,
        "weights": weights,
        "notes": notes,
        "seconds": round(time.perf_counter() - started, 1),
    }
    paths = write_evaluation(report, output_dir)
    if arguments.card and (Path(arguments.model) / "README.md").exists() and default == output_dir:
        if read_evaluation(arguments.model):
            update_card(arguments.model)
        else:
            say(
                f"{arguments.model}/README.md stays as it is: beside it are other .safetensors than were read, or none"
            )
    print(f"{report['conditions']['seconds']:.0f} s; kept in {paths['md']}, {paths['html']}, {paths['json']}")
    return paths["json"]


def _settings(arguments: EvaluateArguments) -> Any:
    from dataclasses import replace

    from trainers.evaluation.evaluation import EvaluationSettings

    settings = EvaluationSettings(seed=arguments.seed)
    if arguments.quick:
        settings = settings.quick()
    given = {name: getattr(arguments, name) for name in ("positions", "num_texts", "new_tokens", "temperatures")}
    given["temperatures"] = given["temperatures"] and tuple(given["temperatures"])
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


def _load(arguments: EvaluateArguments, device: str) -> tuple[Any, list[str]]:
    """Models and text; what a reader should know of them.

    Raises:
        ValueError: models of several tokenizers, a block that is no whole number of patches, too little text.
        OSError: a file or model that cannot be read.
    """
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    import modeling_latentforge  # noqa: F401  (registers our models with the Auto classes)
    from trainers.command_line import check_writes_text
    from trainers.data import DataArguments, load_blocks
    from trainers.evaluation.benchmark import context_length
    from trainers.evaluation.domains import domain_texts
    from trainers.evaluation.evaluation import Subjects
    from trainers.evaluation.patch_draws import is_student

    options = {"trust_remote_code": arguments.trust_remote_code}
    others = [*([arguments.teacher] if arguments.teacher else []), *arguments.baseline]
    paths = list(dict.fromkeys([arguments.model, *others]))
    tokenizers = {path: AutoTokenizer.from_pretrained(path, **options) for path in paths}
    tokenizer = tokenizers[arguments.model]
    for path in paths:
        if tokenizers[path].get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"{path} has another vocabulary ({len(tokenizers[path])} tokens) than {arguments.model} "
                f"({len(tokenizer)}): scores of different tokens compare nothing. Take models of one tokenizer."
            )
    codec_only = AutoConfig.from_pretrained(arguments.model, **options).model_type == "latentforge_autoencoder"
    if codec_only and others:
        raise ValueError(f"{arguments.model} is a codec, and codecs are judged alone: drop --teacher and --baseline")
    for path in others:
        check_writes_text("teacher" if path == arguments.teacher else "baseline", path, **options)
    dtype = getattr(torch, arguments.dtype)
    short = [Path(path).name for path in paths]
    names = [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]
    models: dict[str, Any] = {}
    codec = None
    for name, path in zip(names, paths, strict=True):
        auto = AutoModel if codec_only else AutoModelForCausalLM
        model = auto.from_pretrained(path, dtype=dtype, **options).to(device).eval()
        if codec_only:
            codec = model
        else:
            models[name] = model
    students = {name: model for name, model in models.items() if is_student(model)}
    if students and codec is None:
        codec = next(iter(students.values())).autoencoder
    sizes = {model.config.patch_size for model in [*students.values(), *([codec] if codec_only else [])]}
    patch_size = arguments.patch_size or (min(sizes) if sizes else 4)
    if sizes - {patch_size}:
        raise ValueError(
            f"patches of {', '.join(map(str, sorted(sizes | {patch_size})))} tokens cannot be scored at the same "
            "places: judge students of one patch size at a time"
        )
    for name, model in models.items():
        limit = context_length(model)
        if limit and limit < arguments.block_size:
            raise ValueError(
                f"{name} reads at most {limit} tokens, a row holds {arguments.block_size}: lower --block_size, all "
                "models are given the same text"
            )
    judge = names[paths.index(arguments.teacher)] if arguments.teacher else None
    if judge in students:
        raise ValueError(f"{arguments.teacher} is a student: texts are judged by a token model")

    notes = []
    source: dict[str, Any] = {
        "data": arguments.data,
        "eval_data": arguments.eval_data,
        "eval_fraction": arguments.eval_fraction,
        "cache_dir": arguments.cache_dir,
    }
    text = DataArguments(**source, block_size=arguments.block_size, max_train_tokens=arguments.block_size)
    _, held_out = load_blocks(text, tokenizer, 1, arguments.seed)  # no phases: rows without padding
    rows = torch.from_numpy(held_out["input_ids"][:]).long()
    whole = torch.from_numpy(held_out["attention_mask"][:]).bool().all(1)
    rows = rows[whole]
    if not len(rows) or arguments.block_size // patch_size < 3:
        raise ValueError(
            f"the held-out text fills no row of {arguments.block_size} tokens, or that holds fewer than three patches "
            f"of {patch_size}: give more text or change --block_size"
        )
    blocks = None
    if codec is not None:
        text.block_size = arguments.block_size // patch_size * patch_size
        _, blocks = load_blocks(text, tokenizer, patch_size, arguments.seed)
    domains = {}
    if codec is not None and "codec" in arguments.parts:
        files = dict(domain.split("=", 1) for domain in arguments.domain)
        domains = domain_texts(files, seed=arguments.seed, cache_dir=arguments.cache_dir)
    if arguments.data == "builtin:python" and arguments.eval_data is None:
        notes.append("The held-out text is a part of the Python standard library that the demo's models did not see.")
    return Subjects(models, codec, judge, tokenizer, rows, blocks, patch_size, domains), notes


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
