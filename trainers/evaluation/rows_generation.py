"""Rows of `make verify TOPIC=generation`: what a user of any causal LM gets, how fast, and what it costs.

The speed rows compare random weights: the time of a step does not depend on what the weights say.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data import DataArguments, load_blocks
from ..verification import ROOT, Context, Measured, Row
from .benchmark import cache_growth, random_prompts, seed_backbone, seed_models, seed_student
from .latent_sampling import sampling_speed, variation_table
from .likelihood import held_out_likelihood
from .rows_main import run_or_tell
from .speed import decode_speed, drafting_speed, generation_speed, loop_overhead


def _prompts(models: Mapping[str, Any], batch: int, length: int) -> torch.Tensor:
    """Random ids `(batch, length)` of the vocabulary that all models share."""
    return random_prompts(next(iter(models.values())).config.get_text_config().vocab_size, batch, length)


def _speed_figure(speed: dict[str, dict[str, Any]]) -> str:
    return "; ".join(
        f"{name} {values['times_token_lm']:.2f}x ({values['tokens_per_second']:.0f} tokens/s, "
        f"{min(values['runs']):.0f} to {max(values['runs']):.0f})"
        for name, values in speed.items()
    )


def decode(patch_size: int, parallel: float, autoregressive: float) -> Callable[..., Measured]:
    def measure(context: Context, new_tokens: int = 128, repeats: int = 5, **fields: Any) -> Measured:
        models = seed_models(patch_size, **fields)
        speed = decode_speed(models, _prompts(models, 1, 16), new_tokens, repeats)
        passed = (
            speed["parallel"]["times_token_lm"] >= parallel
            and speed["autoregressive"]["times_token_lm"] >= autoregressive
        )
        return Measured(_speed_figure(speed), passed, speed)

    return measure


def decode_grid(
    context: Context,
    batches: Sequence[int] = (1, 8, 32),
    prompts: Sequence[int] = (16, 512, 2048),
    new_tokens: int = 32,
    **fields: Any,
) -> Measured:
    """Batch and prompt sizes at K=8, and a decoder of two layers of 512."""
    models = seed_models(8, **fields)
    models["2 x 512"] = seed_student(seed_backbone(**fields), 8, num_decoder_layers=2, decoder_hidden_size=512)
    found, figures = {}, []
    for batch in batches:
        for prompt in prompts:
            name = f"batch {batch}, prompt {prompt}"
            found[name] = decode_speed(models, _prompts(models, batch, prompt), new_tokens, repeats=1)
            multiples = (f"{model} {values['times_token_lm']:.1f}x" for model, values in found[name].items())
            figures.append(f"{name}: {', '.join(multiples)}")
            context.say(figures[-1])
    return Measured("; ".join(figures), True, found)


# -- overhead and memory


def overhead(context: Context, new_tokens: int = 128, repeats: int = 3, **fields: Any) -> Measured:
    """Share of the decoding time outside the modules: backbone, patch embedding, head, decoder, output matrix."""
    models = seed_models(8, **fields)
    found = {
        name: loop_overhead(model, _prompts(models, 1, 16), new_tokens, repeats)
        for name, model in models.items()
        if name != "token LM"
    }
    figure = "; ".join(f"{name} {values['share']:.1%} of the time" for name, values in found.items())
    return Measured(figure, all(values["share"] <= 0.1 for values in found.values()), found)


def cache_memory(context: Context, tokens: int = 2560, **fields: Any) -> Measured:
    """Growth of the cache between 512 and 2560 tokens, and what does not grow."""
    models = seed_models(8, **{"vocab_size": 512, "max_position_embeddings": 4096, **fields})
    found = {name: cache_growth(model, _prompts(models, 1, tokens)) for name, model in models.items()}
    of_token_lm = found["token LM"]["bytes_per_token"]
    figure = "; ".join(
        f"{name} {values['bytes_per_token'] / 1024:.1f} kB a token "
        f"({of_token_lm / values['bytes_per_token']:.2f} times less), "
        f"{values['constant_bytes'] / 1024:.0f} kB constant"
        for name, values in found.items()
    )
    passed = all(found[name]["bytes_per_token"] <= of_token_lm / 8 for name in ("autoregressive", "parallel"))
    return Measured(figure, passed, found)


# -- drafting


def _demo_folder(context: Context) -> Path:
    """Of a trained demo: the user's, else the one that the topic `main` trained."""
    for folder in (
        ROOT / "runs" / "demo",
        context.shared_dir.parent / "main" / "demo" / "clone" / "runs" / "demo",
    ):
        if (folder / "student" / "config.json").exists():
            return folder
    raise FileNotFoundError("no trained demo: `make demo` first")


def _token_draft(context: Context, demo: Path) -> Path:
    """A token LM with as many layers as the student's backbone and decoder together, of its width, trained on its
    blocks for its steps."""
    folder = context.work_dir / "token_draft"
    if not (folder / "config.json").exists():
        recipe = yaml.safe_load((ROOT / "scripts" / "configs" / "demo.yaml").read_text(encoding="utf-8"))
        own = ("decoder_type", "ce_weight", "kd_weight")
        flags = {name: value for name, value in (recipe["text"] | recipe["student"]).items() if name not in own}
        flags |= {"num_hidden_layers": flags["num_hidden_layers"] + 1, "patch_size": recipe["patch_size"]}
        flags |= {
            "data": recipe["data"],
            "tokenizer": str(demo / "tokenizer"),
            "seed": recipe["seed"],
            "report_to": "none",
        }
        command = [sys.executable, str(ROOT / "scripts" / "train_teacher.py"), "--output_dir", str(folder)]
        run_or_tell([*command, *(part for name, value in flags.items() for part in (f"--{name}", str(value)))])
    return folder


def lossless_greedy(context: Context, num_prompts: int = 200, max_eval_tokens: int = 2**18) -> Measured:
    """The demo's teacher, drafted for by its student and by a token LM of equal size, on held-out prompts of any
    length."""
    demo = _demo_folder(context)
    folders = {"teacher": demo / "teacher", "student": demo / "student", "token draft": _token_draft(context, demo)}
    models = {name: AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in folders.items()}
    tokenizer = AutoTokenizer.from_pretrained(demo / "student")
    arguments = DataArguments(block_size=1024, max_eval_tokens=max_eval_tokens, max_train_tokens=1024)
    _, held_out = load_blocks(arguments, tokenizer, 8, seed=0)
    prompts = [
        torch.tensor([held_out[number % len(held_out)]["input_ids"][: 8 + number]]) for number in range(num_prompts)
    ]
    found = drafting_speed(models.pop("teacher"), models, prompts)
    rates = "; ".join(
        f"{name} {values['tokens_per_second']:.0f} tokens/s, {values['tokens_per_teacher_step']:.2f} a teacher step"
        for name, values in found.items()
    )
    equal = found["student"]["equal"]
    return Measured(f"{equal} of {num_prompts} texts equal; {rates}", equal == num_prompts, found)


# -- likelihood-free sampling


def patch_sampling_variation(context: Context, **table: Any) -> Measured:
    """On enumerable distributions: the exact form at the sampling floor, the batched one no further than CALM's."""
    records = variation_table(**table)
    exact = max(r["variation"] - r["floor"] for r in records if r["sampler"] == "exact" and r["fallback"] < 0.005)
    of_calm = {
        (r["distribution"], r["temperature"]): r["variation"] for r in records if r["sampler"].startswith("CALM")
    }
    worse = [
        f"{r['distribution']} at {r['temperature']}"
        for r in records
        if r["sampler"] == "batched"
        and (r["distribution"], r["temperature"]) in of_calm
        and r["variation"] > of_calm[r["distribution"], r["temperature"]] + 0.002
    ]
    figure = f"exact at most {exact:.4f} above the floor; batched further than CALM's: {', '.join(worse) or 'never'}"
    return Measured(figure, exact <= 0.005 and not worse, {"records": records})


def patch_sampling_speed(context: Context, new_tokens: int = 64, repeats: int = 3, **fields: Any) -> Measured:
    """12 x 768 with an energy head, all samplers at 200 draws a patch: random weights repeat nothing."""
    model = seed_student(seed_backbone(**fields), 8, "parallel", head_config={"head_type": "energy"})
    prompts = _prompts({"student": model}, 1, 16)
    speed = sampling_speed(model, prompts, temperature=0.5, max_draws=200, new_tokens=new_tokens, repeats=repeats)
    calm = next(values for name, values in speed.items() if name.lower().startswith("calm"))["tokens_per_second"]
    figure = "; ".join(
        f"{name} {values['tokens_per_second']:.1f} tokens/s ({values['tokens_per_second'] / calm:.1f}x CALM's)"
        + (f" with too few draws for {values['fallback']:.0%} of patches" if values["fallback"] else "")
        for name, values in speed.items()
    )
    return Measured(figure, speed["batched"]["tokens_per_second"] >= 5 * calm, speed)


def stock_tools(context: Context) -> Measured:
    """The tests behind every line of docs/stock_tools.md."""
    names = ("stock_tools", "drafting", "remote_code", "compile", "quantization", "lm_eval")
    files = [*(f"tests/modeling_latentforge/test_{name}.py" for name in names), "tests/scripts/test_push_to_hub.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    summary = run_or_tell(command, cwd=ROOT).strip().splitlines()[-1]
    return Measured(summary, True)


# -- fewer bits


def stored_bytes(module: torch.nn.Module) -> int:
    """Bytes of all parameters, of quantised ones what they hold."""
    total = 0
    for parameter in module.parameters():
        names = parameter.__tensor_flatten__()[0] if hasattr(parameter, "__tensor_flatten__") else None
        parts = [parameter] if names is None else [getattr(parameter, name) for name in names]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


def quantisation(context: Context, max_eval_tokens: int = 2**16, new_tokens: int = 128, repeats: int = 5) -> Measured:
    """The demo's student, its backbone's weights in fp32, bf16, int8 and int4: held-out likelihood, speed, size."""
    try:
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError("this row needs torchao >= 0.18: pip install -e '.[dev]'") from error
    folder = _demo_folder(context)
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    arguments = DataArguments(block_size=1024, max_eval_tokens=max_eval_tokens, max_train_tokens=1024)
    _, held_out = load_blocks(arguments, tokenizer, 8, seed=0)
    # torchao's defaults would change torch's settings for every form that is measured
    int8 = Int8WeightOnlyConfig(set_inductor_config=False)
    forms: dict[str, tuple[torch.dtype, Any]] = {
        "fp32": (torch.float32, None),
        "bf16": (torch.bfloat16, None),
        "int8": (torch.float32, int8),
        "int8, else bf16": (torch.bfloat16, int8),
        "int4": (torch.float32, Int4WeightOnlyConfig(group_size=32, set_inductor_config=False)),
        "int4 of the CPU": (torch.float32, PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False)),
        "int4 of the CPU, else bf16": (
            torch.bfloat16,
            PrototypeInt4WeightOnlyConfig(group_size=32, set_inductor_config=False),
        ),
    }
    models: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, (dtype, config) in forms.items():
        context.say(f"likelihood, {name}")
        model = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=dtype).eval()
        backbone = model.model.backbone
        try:
            if config is not None:
                quantize_(backbone, config)
            nll = held_out_likelihood(model, held_out)["nats_per_token"]
        except (ImportError, NotImplementedError, RuntimeError, AssertionError) as error:
            if config is None:
                raise
            found[name] = {"refused": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
            continue
        models[name] = model
        found[name] = {"nats_per_token": nll, "backbone_megabytes": stored_bytes(backbone) / 2**20}
    ids = torch.as_tensor(held_out[0]["input_ids"][:16])[None]
    for name, values in generation_speed(models, ids, new_tokens, repeats=repeats).items():
        found[name] |= values
    figure = "; ".join(
        f"{name}: "
        + (
            f"no kernel ({values['refused']})"
            if "refused" in values
            else f"{values['nats_per_token']:.4f} nats, {values['tokens_per_second']:.0f} tokens/s, "
            f"{values['backbone_megabytes']:.1f} MB"
        )
        for name, values in found.items()
    )
    return Measured(figure, True, found)


SHAPE = "backbone 12 x 768, V=32000, random weights, fp32, all threads; decoder 1 x 256; greedy"
ROWS = [
    Row(
        "decode_k8",
        "decode tokens/s at K=8, batch 1, against Llama of the same backbone with its faster cache",
        "parallel >= 6.4x, autoregressive >= 4x",
        decode(8, 6.4, 4.0),
        setup=SHAPE + "; prompt 16, 128 new tokens, medians of 5",
    ),
    Row(
        "decode_k4",
        "the same at K=4",
        "parallel >= 3.3x, autoregressive >= 2.6x",
        decode(4, 3.3, 2.6),
        setup=SHAPE + "; prompt 16, 128 new tokens, medians of 5",
    ),
    Row(
        "decode_grid",
        "the same at K=8, batch 1, 8, 32, prompt 16, 512, 2048; decoder 2 x 512 too",
        "reported",
        decode_grid,
        long=True,
        setup=SHAPE + "; 32 new tokens, one reading",
    ),
    Row(
        "overhead",
        "share of the decoding time beyond the modules' forward calls",
        "<= 10 %",
        overhead,
        setup=SHAPE + "; K=8, batch 1, transformers' loop included",
    ),
    Row(
        "cache_memory",
        "growth of the cache per token, against the token model's",
        "<= 1/K, and a constant",
        cache_memory,
        setup="backbone 12 x 768, K=8, fp32, 512 to 2560 tokens",
    ),
    Row(
        "lossless_greedy",
        "teacher.generate(assistant_model=student), greedy, against the teacher alone",
        "200 of 200 texts equal",
        lossless_greedy,
        setup="the demo's teacher, its student, a token LM of 5 x 256 on the student's text and steps; held-out "
        "prompts of 8 to 207 tokens, 32 new tokens",
    ),
    Row(
        "patch_sampling_variation",
        "likelihood-free sampling at T of 0.8, 0.5, 0.25: total variation on enumerable distributions",
        "exact at the sampling floor (+ 0.005), batched nowhere further than CALM's 200 draws",
        patch_sampling_variation,
        setup="27 to 300 patches, 20,000 rows, at most 1000 draws, seed 0",
    ),
    Row(
        "patch_sampling_speed",
        "likelihood-free sampling at T=0.5, tokens/s against CALM's algorithm at equal draws",
        ">= 5x",
        patch_sampling_speed,
        setup="backbone 12 x 768, energy head, V=32000, K=8, random weights, fp32, 200 draws a patch, batch 1",
    ),
    Row(
        "stock_tools",
        "every line of docs/stock_tools.md",
        "every test passes",
        stock_tools,
        setup="tiny models of random weights, on real text",
    ),
    Row(
        "quantisation",
        "the student's backbone in fp32, bf16, int8 and int4 weights: held-out NLL, decode tokens/s, its size",
        "reported",
        quantisation,
        setup="the demo's student, 4 x 256, K=8; 65,536 held-out tokens; prompt 16, 128 new tokens, batch 1, greedy, "
        "medians of 5; torchao, int4 in groups of 32",
    ),
]
