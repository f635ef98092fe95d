"""Rows of `make verify TOPIC=generation`: what a user of any causal LM gets, how fast, and what it costs.

The speed rows compare random weights: the time of a step does not depend on what the weights say.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from modeling_latentforge import LatentForgeAutoencoder, LatentForgeAutoencoderConfig, LatentForgeForCausalLM

from ..data import DataArguments, load_blocks
from ..verification import ROOT, Context, Measured, Row
from .latent_sampling import sampling_speed, variation_table
from .likelihood import held_out_likelihood
from .rows_main import run_or_tell
from .side_by_side import STUDENT
from .speed import generation_speed


SEED_BACKBONE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


def seed_models(patch_size: int, decoders: tuple[str, ...] = ("autoregressive", "parallel")) -> dict[str, Any]:
    """A token LM of the seed's default backbone, 12 x 768 with 32k ids, and students of the same; random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(**SEED_BACKBONE, tie_word_embeddings=True)
    codec = LatentForgeAutoencoder(LatentForgeAutoencoderConfig(vocab_size=32000, patch_size=patch_size))
    models: dict[str, Any] = {"token LM": LlamaForCausalLM(config).eval()}
    for decoder in decoders:
        fields = {**STUDENT, "decoder_hidden_size": 256} if decoder == "autoregressive" else {"decoder_type": decoder}
        models[decoder] = LatentForgeForCausalLM.from_autoencoder(codec, config, **fields)
    return models


def decode_speed(
    models: dict[str, Any], batch: int, prompt: int, new_tokens: int = 64, repeats: int = 3
) -> dict[str, dict[str, Any]]:
    """Tokens/s of each, greedy, the token LM with the faster of its dynamic and its static cache."""
    torch.manual_seed(1)
    ids = torch.randint(0, SEED_BACKBONE["vocab_size"], (batch, prompt))
    speed = generation_speed(models, ids, new_tokens=new_tokens, repeats=repeats)
    token_lm = models["token LM"]
    token_lm.generation_config.cache_implementation = "static"
    static = generation_speed({"token LM": token_lm}, ids, new_tokens=new_tokens, repeats=repeats)["token LM"]
    token_lm.generation_config.cache_implementation = None
    if static["tokens_per_second"] > speed["token LM"]["tokens_per_second"]:
        speed["token LM"] = {**static, "cache": "static"}
    for values in speed.values():
        values["times_token_lm"] = values["tokens_per_second"] / speed["token LM"]["tokens_per_second"]
    return speed


def _speed_figure(speed: dict[str, dict[str, Any]]) -> str:
    return "; ".join(
        f"{name} {values['times_token_lm']:.2f}x ({values['tokens_per_second']:.0f} tokens/s, "
        f"{min(values['runs']):.0f} to {max(values['runs']):.0f})"
        for name, values in speed.items()
    )


def decode(patch_size: int, parallel: float, autoregressive: float) -> Callable[[Context], Measured]:
    def measure(context: Context) -> Measured:
        speed = decode_speed(seed_models(patch_size), 1, 16, new_tokens=128, repeats=5)
        passed = (
            speed["parallel"]["times_token_lm"] >= parallel
            and speed["autoregressive"]["times_token_lm"] >= autoregressive
        )
        return Measured(_speed_figure(speed), passed, speed)

    return measure


def decode_grid(context: Context) -> Measured:
    """Batch and prompt sizes at K=8, and a decoder of two layers of 512."""
    models = seed_models(8)
    torch.manual_seed(0)
    codec = LatentForgeAutoencoder(LatentForgeAutoencoderConfig(vocab_size=32000, patch_size=8))
    backbone = LlamaConfig(**SEED_BACKBONE)
    models["2 x 512"] = LatentForgeForCausalLM.from_autoencoder(
        codec, backbone, **{**STUDENT, "num_decoder_layers": 2}, decoder_hidden_size=512
    )
    found = {}
    for batch in (1, 8, 32):
        for prompt in (16, 512, 2048):
            context.say(f"batch {batch}, prompt {prompt}")
            found[f"batch {batch}, prompt {prompt}"] = decode_speed(models, batch, prompt, new_tokens=32, repeats=1)
    figure = "; ".join(
        f"{name}: " + ", ".join(f"{model} {values['times_token_lm']:.1f}x" for model, values in speed.items())
        for name, speed in found.items()
    )
    return Measured(figure, True, found)


# -- overhead and memory


@contextmanager
def timed(owner: Any, name: str, clock: list[float]) -> Iterator[None]:
    """Within, `clock[0]` grows by the seconds spent in `owner.name(...)`."""
    original = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            clock[0] += time.perf_counter() - start

    setattr(owner, name, call)
    try:
        yield
    finally:
        delattr(owner, name)


def overhead(context: Context) -> Measured:
    """Share of the decoding time outside the modules: backbone, patch embedding, head, decoder, output matrix."""
    found = {}
    for name, model in seed_models(8).items():
        if name == "token LM":
            continue
        ids = torch.randint(0, 32000, (1, 16))
        shares = []
        for _ in range(4):
            clock = [0.0]
            modules = [(model, "_embed_patches"), (model.model, "forward"), (model, "sample_latents")]
            if name == "autoregressive":
                decoder = model.decoder
                modules += [(decoder, part) for part in ("forward", "step", "embed_latents", "memory_of")]
                modules.append((model.lm_head, "forward"))
            else:
                modules += [(model, "_decode_parallel"), (model.get_output_embeddings(), "forward")]
            start = time.perf_counter()
            with _all_timed(modules, clock):
                model.generate(ids, do_sample=False, min_new_tokens=128, max_new_tokens=128)
            shares.append(1 - clock[0] / (time.perf_counter() - start))
        found[name] = statistics.median(shares[1:])
    figure = "; ".join(f"{name} {share:.1%} of the time" for name, share in found.items())
    return Measured(figure, all(share <= 0.1 for share in found.values()), found)


@contextmanager
def _all_timed(places: list[tuple[Any, str]], clock: list[float]) -> Iterator[None]:
    if not places:
        yield
        return
    with timed(*places[0], clock), _all_timed(places[1:], clock):
        yield


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache of either kind holds."""
    seen: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = max(seen.get(storage.data_ptr(), 0), value.numel() * value.element_size())
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif isinstance(value, dict):
            add(list(value.values()))
        elif hasattr(value, "__dict__") and not isinstance(value, type):
            add({name: item for name, item in vars(value).items() if not callable(item)})

    add(cache)
    return sum(seen.values())


def cache_memory(context: Context) -> Measured:
    """Growth of the cache between 512 and 2560 tokens, and what does not grow."""
    torch.manual_seed(0)
    sizes = {**SEED_BACKBONE, "vocab_size": 512}
    codec = LatentForgeAutoencoder(LatentForgeAutoencoderConfig(vocab_size=512, patch_size=8))
    models = {
        "token LM": LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=4096)).eval(),
        "autoregressive": LatentForgeForCausalLM.from_autoencoder(
            codec, LlamaConfig(**sizes), **STUDENT, decoder_hidden_size=256
        ),
        "parallel": LatentForgeForCausalLM.from_autoencoder(codec, LlamaConfig(**sizes), decoder_type="parallel"),
    }
    grown, constant = {}, {}
    for name, model in models.items():
        small, large = (
            cache_bytes(model(torch.randint(0, 512, (1, length)), use_cache=True).past_key_values)
            for length in (512, 2560)
        )
        grown[name] = (large - small) / 2048
        constant[name] = small - 512 * grown[name]
    figure = "; ".join(
        f"{name} {bytes_per_token / 1024:.1f} kB a token ({grown['token LM'] / bytes_per_token:.2f} times less), "
        f"{constant[name] / 1024:.0f} kB constant"
        for name, bytes_per_token in grown.items()
    )
    passed = all(grown[name] <= grown["token LM"] / 8 for name in ("autoregressive", "parallel"))
    return Measured(figure, passed, {"bytes_per_token": grown, "constant": constant})


# -- drafting


def lossless_greedy(context: Context) -> Measured:
    """The demo's teacher, drafted for by its student, on held-out prompts of any length."""
    folder = ROOT / "runs" / "demo"
    if not (folder / "student" / "config.json").exists():
        folder = context.shared_dir.parent / "main" / "demo" / "clone" / "runs" / "demo"
    if not (folder / "student" / "config.json").exists():
        raise FileNotFoundError("no trained demo: `make demo` first")
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder / name).eval() for name in ("teacher", "student"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    arguments = DataArguments(block_size=1024, max_eval_tokens=2**18, max_train_tokens=1024)
    _, held_out = load_blocks(arguments, tokenizer, 8, seed=0)
    equal, new_tokens, counted = 0, 0, 0
    seconds = {"alone": 0.0, "student": 0.0, "prompt lookup": 0.0}
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    for number in range(200):
        ids = torch.tensor([held_out[number % len(held_out)]["input_ids"][: 8 + number]])
        options = {"do_sample": False, "max_new_tokens": 32}
        texts = {}
        for name, kwargs in (
            ("alone", {}),
            ("student", {"assistant_model": student}),
            ("prompt lookup", {"prompt_lookup_num_tokens": 8}),
        ):
            calls[0] = 0
            handle = teacher.register_forward_pre_hook(count)
            start = time.perf_counter()
            texts[name] = teacher.generate(ids, **options, **kwargs)
            seconds[name] += time.perf_counter() - start
            handle.remove()
            if name == "student":
                counted += calls[0]
        new_tokens += texts["alone"].shape[1] - ids.shape[1]
        equal += torch.equal(texts["alone"], texts["student"])
    rates = "; ".join(f"{name} {new_tokens / value:.0f} tokens/s" for name, value in seconds.items())
    figure = f"{equal} of 200 texts equal; {new_tokens / counted:.2f} tokens a teacher step with the student; {rates}"
    return Measured(figure, equal == 200, {"seconds": seconds, "tokens": new_tokens, "teacher_steps": counted})


# -- likelihood-free sampling


def patch_sampling_variation(context: Context) -> Measured:
    """On enumerable distributions: the exact form at the sampling floor, the batched one no further than CALM's."""
    records = variation_table()
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


def patch_sampling_speed(context: Context) -> Measured:
    """12 x 768 with an energy head, all samplers at 200 draws a patch: random weights repeat nothing."""
    torch.manual_seed(0)
    codec = LatentForgeAutoencoder(LatentForgeAutoencoderConfig(vocab_size=32000, patch_size=8))
    model = LatentForgeForCausalLM.from_autoencoder(
        codec, LlamaConfig(**SEED_BACKBONE), decoder_type="parallel", head_config={"head_type": "energy"}
    )
    speed = sampling_speed(model, torch.randint(0, 32000, (1, 16)), temperature=0.5, max_draws=200, new_tokens=64)
    calm = next(values for name, values in speed.items() if name.lower().startswith("calm"))["tokens_per_second"]
    figure = "; ".join(
        f"{name} {values['tokens_per_second']:.1f} tokens/s ({values['tokens_per_second'] / calm:.1f}x CALM's)"
        for name, values in speed.items()
    )
    return Measured(figure, speed["batched"]["tokens_per_second"] >= 5 * calm, speed)


def stock_tools(context: Context) -> Measured:
    """The tests behind every line of docs/stock_tools.md."""
    folder = "tests/modeling_latentforge/"
    files = [folder + name for name in ("test_stock_tools.py", "test_drafting.py", "test_remote_code.py")]
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


def quantisation(context: Context) -> Measured:
    """The demo's student, its backbone's weights in fp32, bf16, int8 and int4: held-out likelihood, speed, size."""
    try:
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ImportError("this row needs torchao >= 0.18: pip install -e '.[dev]'") from error
    folder = ROOT / "runs" / "demo"
    if not (folder / "student" / "config.json").exists():
        folder = context.shared_dir.parent / "main" / "demo" / "clone" / "runs" / "demo"
    if not (folder / "student" / "config.json").exists():
        raise FileNotFoundError("no trained demo: `make demo` first")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    arguments = DataArguments(block_size=1024, max_eval_tokens=2**16, max_train_tokens=1024)
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
    for name, values in generation_speed(models, ids, new_tokens=128, repeats=5).items():
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
        setup="the demo's teacher and student; held-out prompts of 8 to 207 tokens, 32 new tokens",
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
