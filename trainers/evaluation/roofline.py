"""How near a model's decoding comes to what the machine could do at best.

    one text, watched         -> bytes of weights and cache that are read, operations, backbone steps, peak memory
    texts timed in turns      -> seconds of each token
    short loops without model -> the machine's bandwidth and matrix rate

A token cannot take less than `max(bytes / bandwidth, operations / matrix rate)`; the share that a model attains is
that bound over its time. B batch, T tokens of the prompt.
"""

import ctypes
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import StoppingCriteria, StoppingCriteriaList

from .speed import _synchronize, _write, count_backbone_steps


MIB = 2**20


# -- the machine


def _best_seconds(call: Callable[[], Any], device: torch.device, rounds: int, calls: int = 1) -> float:
    """Seconds of one call in the fastest round: what else runs on the machine only ever adds time."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    call()
    best = math.inf
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        best = min(best, (time.perf_counter() - start) / calls)
    return best


class MachineRates:
    """What this machine reads and multiplies at best, with the threads that torch has now; measured when asked for.

    Args:
        device: `cpu`, `cuda`, ...
        dtype: of the matrices.
        rounds: of each loop; the fastest counts.
        smallest, largest: bytes of the sets that are read; caches hold smaller ones, and the largest is beyond all of
            them. Default of `largest`: 256 MiB, on CUDA 1 GiB.
        sizes: of the square matrices. Default: 512 and 1024, on CUDA 4096 and 8192.
    """

    def __init__(
        self,
        device: str | torch.device,
        dtype: torch.dtype,
        rounds: int = 9,
        smallest: int = 4 * MIB,
        largest: int | None = None,
        sizes: tuple[int, ...] | None = None,
    ):
        self.device, self.dtype, self.rounds, self.smallest = torch.device(device), dtype, rounds, smallest
        on_cuda = self.device.type == "cuda"
        self.largest = largest or (1024 * MIB if on_cuda else 256 * MIB)
        self.sizes = sizes or ((4096, 8192) if on_cuda else (512, 1024))
        self._bandwidths: dict[int, float] = {}
        self._matrix_rate: float | None = None

    def bandwidth(self, working_set: int) -> float:
        """Bytes a second that a set of so many bytes is read with, again and again.

        Sets are rounded down to powers of two: what fits into a cache is faster, and a bound must not be too low.
        """
        size = 2 ** int(math.log2(min(max(working_set, self.smallest), self.largest)))
        if size not in self._bandwidths:
            numbers = torch.zeros(size // 4, device=self.device)  # bytes are bytes, and fp32 has the fastest sum
            half = numbers[: len(numbers) // 2]
            other = torch.zeros_like(half)
            calls = max(1, 64 * MIB // size) if self.device.type == "cuda" else 1
            self._bandwidths[size] = size / min(
                _best_seconds(numbers.sum, self.device, self.rounds, calls),
                _best_seconds(partial(other.copy_, half), self.device, self.rounds, calls),
            )
        return self._bandwidths[size]

    @property
    def matrix_rate(self) -> float:
        """Floating-point operations a second of square matrix products, a multiply-add being two."""
        if self._matrix_rate is None:
            rates = []
            for size in self.sizes:
                left, right = torch.randn(2, size, size, device=self.device).to(self.dtype)
                product = partial(torch.matmul, left, right)
                rates.append(2 * size**3 / _best_seconds(product, self.device, self.rounds))
            self._matrix_rate = max(rates)
        return self._matrix_rate

    def record(self) -> dict[str, Any]:
        """What is known so far: `device`, `dtype`, `threads`, `matrix_rate` (operations/s), `bandwidth` (bytes/s by
        bytes of the set)."""
        return {
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "matrix_rate": self._matrix_rate,
            "bandwidth": {str(size): rate for size, rate in sorted(self._bandwidths.items())},
        }


# -- peak memory


@dataclass
class Peak:
    """`growth`: bytes held at the highest moment beyond those held before; None: the system does not tell."""

    growth: int | None = None


def _status_bytes(name: str) -> int:
    """Of `/proc/self/status`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}")


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Watch memory inside the block: on CUDA what torch holds, elsewhere the whole process (Linux only)."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.growth = torch.cuda.max_memory_allocated(device) - before
        return
    try:
        if sys.platform == "linux":
            # what was freed and kept for later would be used again without being seen
            getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the highest so far
        before = _status_bytes("VmRSS")
    except OSError:
        yield peak
        return
    yield peak
    peak.growth = max(0, _status_bytes("VmHWM") - before)


# -- the work


@dataclass
class Work:
    """What a model did.

    Attributes:
        weight_bytes: of weights that operators read, each time they did; of an embedding the rows that were looked up.
        cache_bytes: of keys and values that torch's `scaled_dot_product_attention` read; other attention is not seen.
        operations: of matrix products, floating-point; a multiply-add is two.
        backbone_steps: forward passes of the backbone.
        working_set: bytes of the weights that were read, once each.
    """

    weight_bytes: int = 0
    cache_bytes: int = 0
    operations: int = 0
    backbone_steps: int = 0
    working_set: int = 0


class _Watch(TorchDispatchMode):
    """Adds to `work` what operators read of `model`'s weights, and their operations."""

    def __init__(self, model: Any):
        super().__init__()
        tensors = [*model.parameters(), *model.buffers()]
        self.weights = {tensor.untyped_storage().data_ptr() for tensor in tensors} - {0}
        self.work = Work()
        self.touched: dict[int, int] = {}
        self.in_attention = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        written = {x.untyped_storage().data_ptr() for x in tree_leaves(found) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves((args, kwargs)):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage().data_ptr()
            if storage not in self.weights or storage in written:  # a view reads nothing
                continue
            # of a table only rows are read
            size = min(_own_bytes(tensor), _own_bytes(found)) if "embedding" in func.__name__ else _own_bytes(tensor)
            self.work.weight_bytes += size
            self.touched[storage] = max(self.touched.get(storage, 0), size)
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None and not self.in_attention:
            self.work.operations += formula(*args, **kwargs, out_val=found)
        return found

    def take(self) -> Work:
        """The work so far; it begins anew."""
        work, self.work = self.work, Work()
        work.working_set = sum(self.touched.values())
        self.touched = {}
        return work


class _WatchAttention(TorchFunctionMode):
    """Attention is seen whole: which of its kernels runs, and whether that is a matrix product to torch, differs."""

    def __init__(self, watch: _Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        named = (
            dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)) | kwargs
        )
        query, key, value = named["query"], named["key"], named["value"]
        work = self.watch.work
        work.cache_bytes += _own_bytes(key) + _own_bytes(value)
        pairs = query.numel() // query.shape[-1] * key.shape[-2] * 2 * (query.shape[-1] + value.shape[-1])
        work.operations += pairs // 2 if named.get("is_causal") else pairs
        self.watch.in_attention = True
        try:
            return func(*args, **kwargs)
        finally:
            self.watch.in_attention = False


def _own_bytes(tensor: torch.Tensor) -> int:
    """Bytes of its numbers, repeated ones (`expand`) once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride or not size) * tensor.element_size()


class _EachToken(StoppingCriteria):
    """Calls back after each token; never stops."""

    def __init__(self, call: Callable[[], None]):
        self.call = call

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        _synchronize(input_ids)
        self.call()
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def watch_work(model: Any, input_ids: torch.Tensor, new_tokens: int) -> tuple[Work, Work]:
    """The work of one greedy text: of the prompt with the first token, and of the tokens after it.

    What is compiled runs uncompiled here, since its kernels cannot be watched.

    Args:
        model: a student or a token model, in eval mode.
        input_ids: `(B, T)`, on its device.
        new_tokens: tokens to write per row, at least 2.

    Raises:
        ValueError: `new_tokens` below 2.
    """
    if new_tokens < 2:
        raise ValueError(f"`new_tokens` ({new_tokens}) must be at least 2: the first token is the prompt's")
    with torch.compiler.set_stance("force_eager"):
        # a first step makes what later ones read, the lookup's table
        _write(model, input_ids, 2, False, disable_compile=True)
    watch = _Watch(model)
    first: list[Work] = []
    with count_backbone_steps(model) as steps:

        def take() -> None:
            if not first:
                first.append(watch.take())
                first[0].backbone_steps = steps.count

        criteria = StoppingCriteriaList([_EachToken(take)])
        with torch.compiler.set_stance("force_eager"), _WatchAttention(watch), watch:
            _write(model, input_ids, new_tokens, False, disable_compile=True, stopping_criteria=criteria)
        rest = watch.take()
        rest.backbone_steps = steps.count - first[0].backbone_steps
    return first[0], rest


# -- the time


def token_seconds(model: Any, input_ids: torch.Tensor, new_tokens: int) -> tuple[float, list[float]]:
    """Seconds until the prompt's logits, and of each token of one greedy text after the prompt's own next one.

    Args:
        model, input_ids: as in [`watch_work`].
        new_tokens: tokens to write per row; the list has one less.
    """
    times: list[float] = []
    criteria = StoppingCriteriaList([_EachToken(lambda: times.append(time.perf_counter()))])
    _, first = _write(model, input_ids, new_tokens, False, stopping_criteria=criteria)
    return first, [later - earlier for earlier, later in zip(times[:-1], times[1:], strict=True)]


def percentile(values: list[float], share: float) -> float:
    """The least of the values that `share` (0 to 1) of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


# -- both


@dataclass
class _Setting:
    """One model's figures of one batch and prompt, as they come; times by round, those of tokens one by one."""

    prompt: Work
    text: Work
    peak: Peak
    first_token: list[float] = field(default_factory=list)
    tokens: list[list[float]] = field(default_factory=list)


def attained(
    models: Mapping[str, Any], input_ids: torch.Tensor, rates: MachineRates, new_tokens: int = 64, repeats: int = 3
) -> dict[str, dict[str, Any]]:
    """What prompt and text cost each model, and how near that is to the machine's bound.

    Each model writes once to be watched, which warms up (on CUDA, where transformers may compile, once more), and then
    in turns, every second round in reverse, to be timed.

    Args:
        models: by name; in eval mode, on one device.
        input_ids: `(B, T)`, on that device.
        rates: of that device, in the models' dtype.
        new_tokens: tokens per row after the first, which is the prompt's: a multiple of K counts each patch once.
        repeats: timed rounds.

    Returns:
        per model, of the prompt: `first_token_seconds` (median, until its logits), `first_token_runs`,
        `prompt_tokens_per_second` (of all rows) and `prompt_share` (0 to 1, of the bound). Of the text after its first
        token: `tokens_per_second` (of all rows, median) and `runs`; `token_seconds_p50` and `token_seconds_p95` (of a
        row, over all tokens of all rounds); per token of all rows `weight_bytes_per_token`, `cache_bytes_per_token`
        (None where attention was not seen) and `operations_per_token`; `backbone_steps` and `steps_reduction` (tokens
        of a row per step); the bound as `bandwidth` (bytes/s), `matrix_rate` (operations/s), `bound_by` (`memory` or
        `matrices`) and `bound_tokens_per_second`; `share` (0 to 1). Of both: `peak_bytes` (weights, and what is added
        at most; None where the system does not tell).

    Raises:
        ValueError: `repeats` or `new_tokens` below 1.
    """
    if repeats < 1 or new_tokens < 1:
        raise ValueError(f"`repeats` ({repeats}) and `new_tokens` ({new_tokens}) must be at least 1")
    settings: dict[str, _Setting] = {}
    for name, model in models.items():
        watch_work(model, input_ids[:1, -1:], 2)  # what is loaded at the first use of all is nobody's peak
        with peak_memory(input_ids.device) as peak:
            prompt, text = watch_work(model, input_ids, new_tokens + 1)
        settings[name] = _Setting(prompt, text, peak)
        if input_ids.is_cuda:
            token_seconds(model, input_ids, new_tokens + 1)
    names = list(models)
    for turn in range(repeats):
        # each neighbour comes before and after: what one leaves in caches falls on all
        for name in names[::-1] if turn % 2 else names:
            first, seconds = token_seconds(models[name], input_ids, new_tokens + 1)
            settings[name].first_token.append(first)
            settings[name].tokens.append(seconds)
    return {
        name: _figures(setting, rates, tuple(input_ids.shape), models[name].get_memory_footprint())
        for name, setting in settings.items()
    }


def _figures(setting: _Setting, rates: MachineRates, shape: tuple[int, ...], weight_bytes: int) -> dict[str, Any]:
    batch, length = shape
    work, tokens = setting.text, batch * len(setting.tokens[0])
    runs = [tokens / sum(seconds) for seconds in setting.tokens]
    pooled = [seconds for run in setting.tokens for seconds in run]
    first = statistics.median(setting.first_token)
    reading, multiplying = _least_seconds(work, rates)
    bound = tokens / max(reading, multiplying)
    return {
        "first_token_seconds": first,
        "first_token_runs": setting.first_token,
        "prompt_tokens_per_second": batch * length / first,
        "prompt_share": max(_least_seconds(setting.prompt, rates)) / first,
        "tokens_per_second": statistics.median(runs),
        "runs": runs,
        "token_seconds_p50": percentile(pooled, 0.5),
        "token_seconds_p95": percentile(pooled, 0.95),
        "weight_bytes_per_token": work.weight_bytes / tokens,
        "cache_bytes_per_token": work.cache_bytes / tokens or None,
        "operations_per_token": work.operations / tokens,
        "backbone_steps": work.backbone_steps,
        "steps_reduction": tokens / batch / work.backbone_steps if work.backbone_steps else None,
        "peak_bytes": None if setting.peak.growth is None else weight_bytes + setting.peak.growth,
        "bandwidth": rates.bandwidth(work.working_set),
        "matrix_rate": rates.matrix_rate,
        "bound_by": "memory" if reading >= multiplying else "matrices",
        "bound_tokens_per_second": bound,
        "share": statistics.median(runs) / bound,
    }


def _least_seconds(work: Work, rates: MachineRates) -> tuple[float, float]:
    """That reading and that multiplying take at least."""
    read = work.weight_bytes + work.cache_bytes
    return read / rates.bandwidth(work.working_set), work.operations / rates.matrix_rate
