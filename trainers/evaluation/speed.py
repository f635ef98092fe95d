"""How fast a model writes, how often its backbone runs for it, and what the loop around the modules costs.

`make verify TOPIC=generation` and `scripts/bench.py` call the same functions. B batch, T tokens of the prompt.
"""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig


@dataclass
class StepCounter:
    """`count` forward passes so far."""

    count: int = 0


@contextmanager
def count_backbone_steps(model: Any) -> Iterator[StepCounter]:
    """Count forward passes of a student's backbone, or of a token model's decoder stack, inside the block."""
    base = model.base_model
    with _count_calls(getattr(base, "backbone", base)) as counter:
        yield counter


@contextmanager
def _count_calls(module: Any) -> Iterator[StepCounter]:
    counter = StepCounter()

    def add(*_: Any) -> None:
        counter.count += 1

    handle = module.register_forward_pre_hook(add)
    try:
        yield counter
    finally:
        handle.remove()


# -- writing


def generation_speed(
    models: Mapping[str, Any],
    input_ids: torch.Tensor,
    new_tokens: int = 128,
    do_sample: bool = False,
    repeats: int = 5,
    seed: int = 0,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, dict[str, Any]]:
    """Tokens per second of several models that continue the same prompt, in turns.

    Taking turns, every second time backwards, lets a change of the machine's load fall on all models alike. The first
    round warms up, counts backbone steps and is not timed; on CUDA, where transformers compiles a token model with a
    static cache, a second one warms up without the counter. Every model writes exactly `new_tokens` (EOS is held
    back), with the options given here alone: a generation config that came with a checkpoint may sample, penalise or
    search. Threads and dtype are the models' own: compare like with like.

    Args:
        models: by name; in eval mode, on one device.
        input_ids: `(B, T)`, the prompt, on that device.
        new_tokens: tokens to write per row.
        do_sample: sample at temperature 1, or take the likeliest token.
        repeats: counted rounds.
        seed: of the sampling, the same in every round.
        options: further arguments of `generate`, by model.

    Returns:
        per model, medians over rounds and beside each the rounds themselves: `tokens_per_second` and `runs` (all rows
        together, the prompt's pass included); `first_token_seconds` and `first_token_runs` (until the prompt's
        logits); `seconds_per_token` and `seconds_per_token_runs` (of a row, after its first token; None and empty
        where only one is written); `backbone_steps_per_token` (the prompt's pass included).

    Raises:
        ValueError: `repeats` or `new_tokens` below 1.
    """
    if repeats < 1 or new_tokens < 1:
        raise ValueError(f"`repeats` ({repeats}) and `new_tokens` ({new_tokens}) must be at least 1")
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    steps: dict[str, float] = {}
    warm_up = 2 if input_ids.is_cuda else 1
    for turn in range(repeats + warm_up):
        for name in list(models)[:: -1 if turn % 2 else 1]:
            model = models[name]
            torch.manual_seed(seed)
            own = (options or {}).get(name, {})
            if turn:
                seconds = _write(model, input_ids, new_tokens, do_sample, **own)
            else:
                # a hook would be compiled in
                with count_backbone_steps(model) as counter:
                    seconds = _write(model, input_ids, new_tokens, do_sample, disable_compile=True, **own)
                steps[name] = counter.count / new_tokens
            if turn >= warm_up:
                runs[name].append(seconds)
    return {name: _rates(values, input_ids.shape[0], new_tokens, steps[name]) for name, values in runs.items()}


def _rates(runs: Sequence[tuple[float, float]], batch: int, new_tokens: int, steps: float) -> dict[str, Any]:
    rates = [batch * new_tokens / whole for whole, _ in runs]
    first = [first for _, first in runs]
    after = [(whole - first) / (new_tokens - 1) for whole, first in runs] if new_tokens > 1 else []
    return {
        "tokens_per_second": statistics.median(rates),
        "runs": rates,
        "first_token_seconds": statistics.median(first),
        "first_token_runs": first,
        "seconds_per_token": statistics.median(after) if after else None,
        "seconds_per_token_runs": after,
        "backbone_steps_per_token": steps,
    }


@contextmanager
def only_given_options(model: Any) -> Iterator[None]:
    """Inside, `generate` knows nothing of the model's own generation config but its special tokens."""
    own = model.generation_config
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = GenerationConfig(**{name: getattr(own, name, None) for name in names})
    try:
        yield
    finally:
        model.generation_config = own


def _write(
    model: Any, input_ids: torch.Tensor, new_tokens: int, do_sample: bool, **options: Any
) -> tuple[float, float]:
    """Seconds of the whole, and until the prompt's logits."""
    options |= {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} if do_sample else {"do_sample": False}
    read = [0.0]

    def prompt_was_read(*_: Any) -> None:
        _synchronize(input_ids)
        read[0] = time.perf_counter()
        handle.remove()  # of all calls only the first

    handle = model.register_forward_hook(prompt_was_read)
    try:
        _synchronize(input_ids)
        start = time.perf_counter()
        with only_given_options(model):
            written = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                **options,
            )
        _synchronize(input_ids)
        seconds = time.perf_counter() - start
    finally:
        handle.remove()
    if written.shape[1] != input_ids.shape[1] + new_tokens:
        raise RuntimeError(f"asked for {new_tokens} new tokens, got {written.shape[1] - input_ids.shape[1]}")
    return seconds, read[0] - start


def _synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def decode_speed(
    models: Mapping[str, Any],
    input_ids: torch.Tensor,
    new_tokens: int = 64,
    repeats: int = 3,
    baseline: str | None = "token LM",
) -> dict[str, dict[str, Any]]:
    """[`generation_speed`] of each, greedy, the baseline with the faster of its dynamic and its static cache.

    Args:
        models: by name; in eval mode, on one device.
        input_ids: `(B, T)`.
        new_tokens, repeats: as in `generation_speed`.
        baseline: the token LM that the others are compared with; None: no comparison.

    Returns:
        what `generation_speed` does; with a baseline also `times_token_lm` (tokens per second over the baseline's)
        and, of the baseline, `cache`, which of the two was faster.

    Raises:
        ValueError: `repeats` or `new_tokens` below 1, a baseline that is none of the models.
    """
    if baseline is not None and baseline not in models:
        raise ValueError(f"the baseline {baseline!r} is none of the models: {', '.join(models)}")
    ways, options, static = dict(models), {}, f"{baseline}, static cache"
    # transformers' mark of models that take a static cache
    if baseline is not None and getattr(models[baseline], "_can_compile_fullgraph", False):
        ways[static], options[static] = models[baseline], {"cache_implementation": "static"}
    speed = generation_speed(ways, input_ids, new_tokens=new_tokens, repeats=repeats, options=options)
    if baseline is None:
        return speed
    speed[baseline]["cache"] = "dynamic"
    of_static = speed.pop(static, None)
    if of_static is not None and of_static["tokens_per_second"] > speed[baseline]["tokens_per_second"]:
        speed[baseline] = {**of_static, "cache": "static"}
    for values in speed.values():
        values["times_token_lm"] = values["tokens_per_second"] / speed[baseline]["tokens_per_second"]
    return speed


# -- the loop around the modules


@contextmanager
def timed(owner: Any, name: str, clock: list[float]) -> Iterator[None]:
    """Within, `clock[0]` grows by the seconds spent in `owner.name(...)`; on CUDA, until its work is done.

    Of calls with one clock inside each other, the outermost counts.
    """
    original, own = getattr(owner, name), name in vars(owner)

    def call(*args: Any, **kwargs: Any) -> Any:
        before, start = clock[0], time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            clock[0] = before + time.perf_counter() - start

    setattr(owner, name, call)
    try:
        yield
    finally:
        if own:  # a compiled step, say, that hides the class's
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def module_calls(model: Any) -> list[tuple[Any, str]]:
    """The calls, as owner and name, that hold all of a model's mathematics while it writes.

    Of a student: patch embedding, backbone, head, decoder and output matrix; of a token model: decoder stack and
    output matrix.
    """
    output = (model.get_output_embeddings(), "forward")
    if not hasattr(model, "sample_latents"):
        return [(model.base_model, "forward"), output]
    calls = [(model, "_embed_patches"), (model.model, "forward"), (model, "sample_latents"), output]
    if model.config.decoder_type == "parallel":
        return [*calls, (model, "_decode_parallel"), (model, "_patch_logits")]
    return [*calls, *((model.decoder, part) for part in ("forward", "step", "embed_latents", "memory_of"))]


def loop_overhead(model: Any, input_ids: torch.Tensor, new_tokens: int = 128, repeats: int = 3) -> dict[str, Any]:
    """Share of the decoding time, greedy, outside the modules' own calls: our steps and transformers' loop.

    The first round warms up and does not count.

    Args:
        model: a student or a token model, in eval mode.
        input_ids: `(B, T)`.
        new_tokens: tokens to write per row; EOS is held back.
        repeats: counted rounds.

    Returns:
        `share` (0 to 1, median) and `runs`; `seconds_per_token` (median, of a row) and `seconds_per_token_runs`.

    Raises:
        ValueError: `repeats` or `new_tokens` below 1.
    """
    if repeats < 1 or new_tokens < 1:
        raise ValueError(f"`repeats` ({repeats}) and `new_tokens` ({new_tokens}) must be at least 1")
    shares, seconds = [], []
    for turn in range(repeats + 1):
        clock = [0.0]
        with ExitStack() as stack:
            for owner, name in module_calls(model):
                stack.enter_context(timed(owner, name, clock))
            whole, _ = _write(model, input_ids, new_tokens, do_sample=False)
        if turn:
            shares.append(1 - clock[0] / whole)
            seconds.append((whole - clock[0]) / new_tokens)
    return {
        "share": statistics.median(shares),
        "runs": shares,
        "seconds_per_token": statistics.median(seconds),
        "seconds_per_token_runs": seconds,
    }


# -- drafting


def drafting_speed(
    teacher: Any,
    assistants: Mapping[str, Any],
    prompts: Sequence[torch.Tensor],
    new_tokens: int = 32,
    lookup_tokens: int = 8,
    repeats: int = 1,
) -> dict[str, dict[str, Any]]:
    """The teacher's greedy text: alone, drafted for by each assistant, and by prompt lookup, prompt by prompt, every
    second round backwards.

    The first prompt is written once more before, to warm up.

    Args:
        teacher: a causal LM in eval mode.
        assistants: models of the same tokenizer, by name.
        prompts: ids `(1, T)` each, on the models' device.
        new_tokens: tokens to write at most; EOS ends a text.
        lookup_tokens: length of a draft of prompt lookup.
        repeats: rounds over all prompts.

    Returns:
        for `alone`, each assistant and `prompt lookup`: `tokens_per_second` (median over rounds) and `runs`;
        `seconds` of all rounds; `tokens` and `teacher_steps` of one round; `tokens_per_teacher_step`; `equal`, how
        many of the texts are the teacher's own.

    Raises:
        ValueError: no prompt, `repeats` or `new_tokens` below 1, an assistant named like one of the other two.
    """
    if not prompts:
        raise ValueError("drafting needs at least one prompt")
    if repeats < 1 or new_tokens < 1:
        raise ValueError(f"`repeats` ({repeats}) and `new_tokens` ({new_tokens}) must be at least 1")
    taken = {"alone", "prompt lookup"} & set(assistants)
    if taken:
        raise ValueError(f"an assistant may not be named {', '.join(sorted(taken))}: that is another way to write")
    ways: dict[str, dict[str, Any]] = {
        "alone": {},
        **{name: {"assistant_model": model} for name, model in assistants.items()},
        "prompt lookup": {"prompt_lookup_num_tokens": lookup_tokens},
    }

    def write(ids: torch.Tensor, way: dict[str, Any]) -> torch.Tensor:
        text = teacher.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens, **way
        )
        _synchronize(ids)
        return text

    for way in ways.values():
        write(prompts[0], way)
    found: dict[str, dict[str, Any]] = {
        name: {"rounds": [], "tokens": 0, "teacher_steps": 0, "equal": 0} for name in ways
    }
    for turn in range(repeats):
        for record in found.values():
            record["rounds"].append(0.0)
        for ids in prompts:
            own: torch.Tensor | None = None
            for name, way in list(ways.items())[:: -1 if turn % 2 else 1]:
                record = found[name]
                with _count_calls(teacher) as calls:
                    start = time.perf_counter()
                    text = write(ids, way)
                    record["rounds"][-1] += time.perf_counter() - start
                own = text if own is None else own
                if not turn:
                    record["tokens"] += text.shape[1] - ids.shape[1]
                    record["teacher_steps"] += calls.count
                    record["equal"] += torch.equal(text, own)
    return {name: _drafted(**record) for name, record in found.items()}


def _drafted(rounds: Sequence[float], tokens: int, teacher_steps: int, equal: int) -> dict[str, Any]:
    runs = [tokens / seconds for seconds in rounds]
    return {
        "tokens_per_second": statistics.median(runs),
        "runs": runs,
        "seconds": sum(rounds),
        "tokens": tokens,
        "teacher_steps": teacher_steps,
        "tokens_per_teacher_step": tokens / teacher_steps,
        "equal": equal,
    }
