"""What `scripts/bench.py` and the speed rows of `make verify` measure: models of the seed's size, caches, tables.

The measuring of time stands in `speed.py`, `roofline.py` and `latent_sampling.py`. B batch, T tokens, K tokens per
patch, V vocabulary, W decoder window, C conditions, h heads, d head size.
"""

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_latentforge import LatentForgeAutoencoder, LatentForgeAutoencoderConfig, LatentForgeForCausalLM

from .latent_sampling import sampling_speed
from .roofline import MachineRates, attained
from .side_by_side import STUDENT
from .speed import decode_speed, drafting_speed, loop_overhead


SEED_BACKBONE = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}


# -- models of random weights: the time of a step does not depend on what the weights say


def seed_backbone(hidden_size: int = 768, **fields: Any) -> LlamaConfig:
    """The seed's default backbone, 12 x 768 with 32k ids; another width keeps its proportions.

    Args:
        hidden_size: its heads are 64 wide, its MLP 8/3 as wide, in steps of 32.
        fields: of `LlamaConfig`, in place of the seed's.
    """
    shape = {
        "hidden_size": hidden_size,
        "intermediate_size": -(-8 * hidden_size // 96) * 32,
        "num_attention_heads": max(1, hidden_size // 64),
    }
    return LlamaConfig(**{**SEED_BACKBONE, **shape, **fields})


def seed_token_lm(backbone: LlamaConfig, seed: int = 0) -> LlamaForCausalLM:
    """A token LM of this backbone and of random weights, its embeddings tied, in eval mode."""
    config = copy.deepcopy(backbone)
    config.tie_word_embeddings = True
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).eval()


def seed_student(
    backbone: LlamaConfig,
    patch_size: int,
    decoder: str = "autoregressive",
    codec: Mapping[str, Any] | None = None,
    seed: int = 0,
    **fields: Any,
) -> LatentForgeForCausalLM:
    """A student of this backbone and of random weights, in eval mode.

    Args:
        backbone: its `vocab_size` is the codec's too.
        patch_size: K.
        decoder: `autoregressive`, one layer of 256 with a memory of the patches, or `parallel`.
        codec: fields of `LatentForgeAutoencoderConfig`; default, the seed's.
        fields: of `LatentForgeConfig`, in place of those.

    Raises:
        ValueError: what the two configurations refuse.
    """
    torch.manual_seed(seed)
    config = LatentForgeAutoencoderConfig(vocab_size=backbone.vocab_size, patch_size=patch_size, **(codec or {}))
    shape = {**STUDENT, "decoder_hidden_size": 256} if decoder == "autoregressive" else {"decoder_type": decoder}
    return LatentForgeForCausalLM.from_autoencoder(LatentForgeAutoencoder(config), backbone, **{**shape, **fields})


def seed_models(
    patch_size: int, decoders: Sequence[str] = ("autoregressive", "parallel"), **fields: Any
) -> dict[str, Any]:
    """`token LM`, and by name of its decoder a student of the same backbone; `fields` are of [`seed_backbone`]."""
    backbone = seed_backbone(**fields)
    students = {decoder: seed_student(backbone, patch_size, decoder) for decoder in decoders}
    return {"token LM": seed_token_lm(backbone), **students}


def random_prompts(vocab_size: int, batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Ids `(batch, length)`, uniform."""
    torch.manual_seed(seed)
    return torch.randint(0, vocab_size, (batch, length))


def tiled_prompts(prompts: Sequence[Sequence[int]], batch: int, length: int) -> torch.Tensor:
    """Ids `(batch, length)`: row b is prompt b (those start again where there are fewer), repeated and cut to length.

    Raises:
        ValueError: no prompt, or one without ids.
    """
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token")
    rows = [prompts[row % len(prompts)] for row in range(batch)]
    return torch.tensor([(list(ids) * -(-length // len(ids)))[:length] for ids in rows])


def context_length(model: Any) -> int | None:
    """Tokens that a model reads at most, those it writes included; None where its configuration sets no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit and limit * getattr(model.config, "patch_size", 1)


# -- the small decoder, compiled


class FixedShapeStep:
    """A patch decoder's `step`, compiled, with tensors of one shape at every token.

    As it is, `step` reads windows and a memory that grow: it would be compiled, and on CUDA recorded, again and again.
    Here windows are padded on the left to W - 1 places and the memory on the right to a multiple of `block`, masks
    hide the padding, and the position is a tensor. The result is `step`'s, to rounding. Rows of unequal length, which
    have masks already, take `step` itself.

    Args:
        decoder: a `LatentForgePatchDecoder`.
        block: conditions; a text is compiled for anew whenever it outgrows a multiple.
        options: of `torch.compile`.
    """

    def __init__(self, decoder: Any, block: int = 64, **options: Any):
        self.window, self.block = decoder.window, block
        self.step = decoder.step
        self.compiled = _compiled(decoder.step, **options)
        self._padded: tuple[Any, Any, torch.Tensor | None] = (None, None, None)

    def __call__(
        self, token, mask, latent_embeds, positions, recent, windows, window_mask, memory, memory_mask
    ) -> tuple[torch.Tensor, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        if not isinstance(positions, int) or window_mask is not None or memory_mask is not None:
            return self.step(token, mask, latent_embeds, positions, recent, windows, window_mask, memory, memory_mask)
        # a column of the growing text: torch would compile for each of its strides
        token = token.clone(memory_format=torch.contiguous_format)
        places = self.window - 1
        held = windows[0][0].shape[2]
        window_mask = torch.arange(-places, 1, device=token.device)[None, None, None] >= -held  # (1, 1, 1, W)
        windows = [tuple(nn.functional.pad(x, (0, 0, places - held, 0)) for x in pair) for pair in windows]
        if memory is not self._padded[0]:  # a new one only where a patch is complete
            self._padded = (memory, *self._pad(memory))
        hidden, recent, windows = self.compiled(
            token,
            mask,
            latent_embeds,
            torch.full_like(token, positions),
            recent,
            windows,
            window_mask,
            *self._padded[1:],
        )
        held = min(held + 1, places)
        return hidden, recent, [tuple(x[:, :, places - held :] for x in pair) for pair in windows]

    def _pad(self, memory: Any) -> tuple[Any, torch.Tensor | None]:
        if memory is None:
            return None, None
        count = memory[0].shape[2]  # C
        missing = -count % self.block
        mask = torch.arange(count + missing, device=memory[0].device)[None, None, None] < count
        return tuple(nn.functional.pad(x, (0, 0, 0, missing)) for x in memory), mask


def compile_decoder(model: Any, **options: Any) -> None:
    """Compile, in place, what a student runs at every token or patch beside its backbone, with `torch.compile`.

    Of an autoregressive decoder that is the step of one token ([`FixedShapeStep`]), of a parallel one the layers that
    make the K vectors of one patch; whole prompts, the output matrix, head and backbone stay as they are. Models
    without a patch decoder (token LMs) are left alone: transformers compiles those itself where it pays. Each shape
    is compiled when it first comes, so warm up.

    Args:
        model: a student in eval mode, on its device and in its dtype.
        options: of `torch.compile`; `mode="reduce-overhead"` records CUDA graphs.
    """
    if not hasattr(model, "sample_latents"):
        return
    if model.config.decoder_type == "autoregressive":
        model.decoder.step = FixedShapeStep(model.decoder, **options)
        return
    plain = model._decode_parallel
    compiled = _compiled(plain, **options)
    model._decode_parallel = lambda latents: compiled(latents) if latents.shape[1] == 1 else plain(latents)


def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    # every model, batch and memory is a shape of its own: beyond the default of 8 torch would fall back, in silence
    torch._dynamo.config.recompile_limit = 1024
    torch._dynamo.config.accumulated_recompile_limit = 4096
    compiled = torch.compile(function, dynamic=False, **options)
    if options.get("mode") != "reduce-overhead":
        return compiled

    def call(*arguments: Any) -> Any:
        # what a CUDA graph returns is overwritten when it runs again, and a cache keeps it for longer
        torch.compiler.cudagraph_mark_step_begin()
        return torch.utils._pytree.tree_map(torch.clone, compiled(*arguments))

    return call


# -- memory


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


@torch.no_grad()
def cache_growth(model: Any, input_ids: torch.Tensor, short: int = 512) -> dict[str, float]:
    """How a cache grows from `short` to T tokens, and what does not grow. Exact where both are whole patches.

    Args:
        model: in eval mode.
        input_ids: `(1, T)`, on its device.
        short: tokens, below T.

    Returns:
        `bytes_per_token` and `constant_bytes`.

    Raises:
        ValueError: `short` not between 1 and T - 1.
    """
    length = input_ids.shape[1]
    if not 0 < short < length:
        raise ValueError(f"`short` ({short}) must lie between 1 and {length - 1}, one less than the prompt's tokens")
    small, large = (
        cache_bytes(model(input_ids[:, :tokens], use_cache=True, logits_to_keep=1).past_key_values)
        for tokens in (short, length)
    )
    growth = (large - small) / (length - short)
    return {"bytes_per_token": growth, "constant_bytes": small - short * growth}


# -- tables: rows as they are measured, JSON each, and how a person reads them


def decode_rows(
    models: Mapping[str, Any],
    prompts: Callable[[int, int], torch.Tensor],
    batch_sizes: Sequence[int],
    prompt_lengths: Sequence[int],
    new_tokens: int = 64,
    repeats: int = 3,
    baseline: str | None = "token LM",
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[list[dict[str, Any]]]:
    """[`decode_speed`] at every batch size and prompt length, one row per model.

    Args:
        prompts: `(batch, length) -> ids (batch, length)` on the models' device.
        new_tokens: tokens per row after the first, which the prompt's pass gives: a multiple of K counts each patch
            once.
        say: takes a line of progress.

    Yields:
        the rows of one setting: `batch`, `prompt`, `model`, what `decode_speed` returns, `prompt_tokens_per_second`,
        and with a baseline `times_after_first` (its seconds per token over the model's).
    """
    for batch in batch_sizes:
        for length in prompt_lengths:
            say(f"decode: batch {batch}, prompt {length}")
            speed = decode_speed(models, prompts(batch, length), new_tokens + 1, repeats, baseline)
            rows = []
            for name, values in speed.items():
                row = {"batch": batch, "prompt": length, "model": name, **values}
                row["prompt_tokens_per_second"] = batch * length / values["first_token_seconds"]
                if baseline is not None:
                    row["times_after_first"] = speed[baseline]["seconds_per_token"] / values["seconds_per_token"]
                rows.append(row)
            yield rows


def roofline_rows(
    models: Mapping[str, Any],
    prompts: Callable[[int, int], torch.Tensor],
    batch_sizes: Sequence[int],
    prompt_lengths: Sequence[int],
    rates: MachineRates,
    new_tokens: int = 64,
    repeats: int = 3,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[list[dict[str, Any]]]:
    """[`attained`] at every batch size and prompt length, one row per model.

    Args:
        prompts, new_tokens: as in [`decode_rows`].
        rates: of the models' device and dtype.

    Yields:
        the rows of one setting: `batch`, `prompt`, `model` and what `attained` returns.
    """
    for batch in batch_sizes:
        for length in prompt_lengths:
            say(f"roofline: batch {batch}, prompt {length}")
            found = attained(models, prompts(batch, length), rates, new_tokens, repeats)
            yield [{"batch": batch, "prompt": length, "model": name, **values} for name, values in found.items()]


def overhead_rows(
    models: Mapping[str, Any],
    input_ids: torch.Tensor,
    new_tokens: int = 64,
    repeats: int = 3,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[list[dict[str, Any]]]:
    """[`loop_overhead`] of each model, `model` and what that returns; arguments as there."""
    for name, model in models.items():
        say(f"overhead: {name}")
        yield [{"model": name, **loop_overhead(model, input_ids, new_tokens, repeats)}]


def memory_rows(
    models: Mapping[str, Any],
    input_ids: torch.Tensor,
    short: int,
    baseline: str | None = "token LM",
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[list[dict[str, Any]]]:
    """[`cache_growth`] of each model, the baseline first.

    Args:
        input_ids, short: as there.
        baseline: the token LM that the others are compared with; None: no comparison.

    Yields:
        `model`, `tokens` (both lengths), what `cache_growth` returns, and with a baseline `times_less`.
    """
    order = [baseline, *(name for name in models if name != baseline)] if baseline is not None else list(models)
    of_baseline = 0.0
    for name in order:
        say(f"memory: {name}")
        row: dict[str, Any] = {
            "model": name,
            "tokens": [short, input_ids.shape[1]],
            **cache_growth(models[name], input_ids, short),
        }
        if baseline is not None:
            of_baseline = of_baseline or row["bytes_per_token"]
            row["times_less"] = of_baseline / row["bytes_per_token"]
        yield [row]


def samples_whole_patches(model: Any) -> bool:
    """Whether `generate(patch_temperature=...)` is for this model: a student with energy head and parallel decoder."""
    config = model.config
    return hasattr(model, "sample_latents") and config.decoder_type == "parallel" and model.head.noise_size > 0


def sampling_rows(
    models: Mapping[str, Any],
    input_ids: torch.Tensor,
    new_tokens: int = 64,
    repeats: int = 3,
    temperature: float = 0.5,
    max_draws: int = 200,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[list[dict[str, Any]]]:
    """[`sampling_speed`] of each model that [`samples_whole_patches`]: a row per sampler, with `times_calm`."""
    for name, model in models.items():
        if samples_whole_patches(model):
            say(f"sampling: {name}")
            speed = sampling_speed(model, input_ids, temperature, max_draws, new_tokens, repeats)
            calm = speed["CALM"]["tokens_per_second"]
            yield [
                {"model": name, "sampler": sampler, **values, "times_calm": values["tokens_per_second"] / calm}
                for sampler, values in speed.items()
            ]


def drafting_rows(
    teacher: Any,
    students: Mapping[str, Any],
    prompts: Sequence[torch.Tensor],
    new_tokens: int = 64,
    repeats: int = 3,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[list[dict[str, Any]]]:
    """[`drafting_speed`] as rows: `model` is who drafts; with `times_alone` and `texts`, the count of prompts."""
    say(f"drafting: {len(prompts)} prompts")
    speed = drafting_speed(teacher, students, prompts, new_tokens, repeats=repeats)
    alone = speed["alone"]["tokens_per_second"]
    yield [
        {"model": name, **values, "times_alone": values["tokens_per_second"] / alone, "texts": len(prompts)}
        for name, values in speed.items()
    ]


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def spread(values: Sequence[float], scale: float = 1.0) -> str:
    """Median and, where there are several values, the range: `12.3 (11.9..14)`; each times `scale`."""
    if not values:
        return ""
    median = _number(scale * statistics.median(values))
    if len(values) == 1:
        return median
    return f"{median} ({_number(scale * min(values))}..{_number(scale * max(values))})"


@dataclass(frozen=True)
class Table:
    """How a person reads the rows of a table.

    Attributes:
        title, note: above it.
        columns: header and what a measured row shows under it.
    """

    title: str
    note: str
    columns: Mapping[str, Callable[[Mapping[str, Any]], str]]

    def markdown(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """Title, note and one line per row; a row with `not_measured`, the reason, shows that and what else it names.

        Args:
            rows: as the functions above yield them, with `device`.
        """
        lines = [f"## {self.title}", "", self.note, ""]
        lines += ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        for row in rows:
            if "not_measured" in row:
                # what a row may name before it is measured; the reason stands where a model would
                named = {**row, "model": f"not measured ({row['not_measured']})"}
                cells = [str(named.get(header, "")) for header in self.columns]
            else:
                cells = [show(row) for show in self.columns.values()]
            lines.append("| " + " | ".join(cells) + " |")
        return "\n".join(lines)


def _column(key: str) -> Callable[[Mapping[str, Any]], str]:
    def show(row: Mapping[str, Any]) -> str:
        value = row.get(key)
        return _number(value) if isinstance(value, float) else "" if value is None else str(value)

    return show


def _spread_column(key: str, scale: float = 1.0) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: spread(row[key], scale)


def _mb_column(key: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda row: "" if row[key] is None else _number(row[key] / 2**20)


def _spread_share(row: Mapping[str, Any]) -> str:
    return spread(row["runs"], 100 / row["bound_tokens_per_second"])


def rates_line(record: Mapping[str, Any]) -> str:
    """What [`MachineRates.record`] says, for a person."""
    sets = ", ".join(
        f"{rate / 1e9:.3g} (sets of {int(size) // 2**20} MB)" for size, rate in record["bandwidth"].items()
    )
    return (
        f"This machine, {record['device']}, {record['threads']} threads, at best: reads {sets} GB/s; "
        f"multiplies {record['matrix_rate'] / 1e9:.3g} Gflop/s in {record['dtype']}."
    )


TABLES = {
    "decode": Table(
        "Decoding",
        "Greedy. tokens/s: all rows together, the prompt's pass included; ms a token: of a row, after its first; "
        "times: against the token LM with the faster of its dynamic and its static cache.",
        {
            "device": _column("device"),
            "batch": _column("batch"),
            "prompt": _column("prompt"),
            "model": lambda row: row["model"] + (f" ({row['cache']} cache)" if "cache" in row else ""),
            "tokens/s": _spread_column("runs"),
            "times": _column("times_token_lm"),
            "ms a token": _spread_column("seconds_per_token_runs", 1e3),
            "times, after the first": _column("times_after_first"),
            "first token, ms": _spread_column("first_token_runs", 1e3),
            "prompt tokens/s": _column("prompt_tokens_per_second"),
            "backbone steps a token": _column("backbone_steps_per_token"),
        },
    ),
    "roofline": Table(
        "Roofline",
        "What a token after the first costs, per token of all rows (ms: of a row), and how near that is to what the "
        "machine can: at most 1 / max(bytes / its bandwidth, operations / its matrix rate) tokens/s. Greedy, each "
        "model with its default cache. p95 of a student is a token that begins a patch. Peak: weights, and what "
        "prompt and text add at most.",
        {
            "device": _column("device"),
            "batch": _column("batch"),
            "prompt": _column("prompt"),
            "model": _column("model"),
            "ms a token, p50": lambda row: _number(1e3 * row["token_seconds_p50"]),
            "p95": lambda row: _number(1e3 * row["token_seconds_p95"]),
            "tokens a backbone step": _column("steps_reduction"),
            "weights, MB a token": _mb_column("weight_bytes_per_token"),
            "cache, MB": _mb_column("cache_bytes_per_token"),
            "Mflop": lambda row: _number(row["operations_per_token"] / 1e6),
            "tokens/s": _spread_column("runs"),
            "at most": _column("bound_tokens_per_second"),
            "bound by": _column("bound_by"),
            "% of that": _spread_share,
            "prompt, % of its bound": lambda row: _number(100 * row["prompt_share"]),
            "peak, MB": _mb_column("peak_bytes"),
        },
    ),
    "overhead": Table(
        "Loop overhead",
        "Share of the decoding time outside the modules' own calls: our steps and transformers' loop. Greedy, "
        "batch 1, prompt 16.",
        {
            "device": _column("device"),
            "model": _column("model"),
            "% of the time": _spread_column("runs", 1e2),
            "us a token": _spread_column("seconds_per_token_runs", 1e6),
        },
    ),
    "memory": Table(
        "Cache memory",
        "Growth of the cache per token between two lengths, and what does not grow. Counted, so without spread.",
        {
            "device": _column("device"),
            "model": _column("model"),
            "kB a token": lambda row: _number(row["bytes_per_token"] / 1024),
            "times less": _column("times_less"),
            "constant, kB": lambda row: _number(row["constant_bytes"] / 1024),
            "at 2048 tokens, MB": lambda row: _number((row["constant_bytes"] + 2048 * row["bytes_per_token"]) / 2**20),
        },
    ),
    "sampling": Table(
        "Likelihood-free sampling",
        "Temperature 0.5 on whole patches, at most 200 draws a patch; CALM's algorithm 2 always makes 200. Too few "
        "draws: patches chosen with what there was, of `exact` not exactly. plain: temperature 1, token by token. "
        "Batch 1, prompt 16.",
        {
            "device": _column("device"),
            "model": _column("model"),
            "sampler": _column("sampler"),
            "tokens/s": _spread_column("runs"),
            "times CALM's": _column("times_calm"),
            "draws a patch": _column("draws"),
            "too few draws": lambda row: f"{row['fallback']:.0%}",
        },
    ),
    "drafting": Table(
        "Drafting",
        "The teacher's greedy text: alone, drafted for by a student, by prompt lookup. A teacher's step alone gives "
        "one token; what is more was drafted and accepted. Batch 1: transformers drafts for one text at a time.",
        {
            "device": _column("device"),
            "model": _column("model"),
            "tokens/s": _spread_column("runs"),
            "times alone": _column("times_alone"),
            "tokens a teacher step": _column("tokens_per_teacher_step"),
            "texts equal": lambda row: f"{row['equal']} of {row['texts']}",
        },
    ),
}
