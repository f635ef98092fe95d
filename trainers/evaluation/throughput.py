"""How fast a training goes: tokens a second, the share of the machine's matrix rate, waits for data, peak memory.

    python -m trainers.evaluation.throughput CELL.json

trains a codec or a student of some shape for a few steps with the project's own trainer, in this process alone (its
memory is the training's), and prints one line of JSON. `blocks` of the cell is a folder that `datasets` saved.

    first step            operations counted (torch.utils.flop_counter), not timed
    `warm_up` steps       not timed
    `steps` steps         timed from the end of one to the end of the next: batch, forward, backward, optimizer, log
    last step             profiled, not timed
"""

import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, TrainerCallback

from modeling_latentforge import LatentForgeAutoencoder, LatentForgeAutoencoderConfig, LatentForgeForCausalLM

from ..ae_config import AEConfig
from ..ae_trainer import AETrainer
from ..data import PatchCollator
from ..kd_config import KDConfig
from ..kd_trainer import KDTrainer
from .roofline import MachineRates


TOP = 5  # operators of the profile
MATRIX_SIZES = (1024, 2048)


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        kind: `codec` or `student`.
        layers, width: of the codec's encoder and decoder each, or of the student's backbone.
        blocks: folder of its training blocks.
        rows: of a batch; `accumulation` batches make a step.
        patch_size, vocab_size: K, V.
        dtype: `float32`, or `bfloat16` for autocast.
        mse_weight: a student's; above 0 the frozen codec is asked.
        codec_layers, codec_width: of a student's codec.
        warm_up, steps: see the module.
        threads: of torch.
    """

    kind: str
    layers: int
    width: int
    blocks: str
    rows: int = 4
    accumulation: int = 1
    patch_size: int = 4
    vocab_size: int = 4096
    dtype: str = "float32"
    mse_weight: float = 0.0
    codec_layers: int = 2
    codec_width: int = 512
    warm_up: int = 1
    steps: int = 3
    threads: int = 2

    @property
    def name(self) -> str:
        return f"{self.kind} {self.layers} x {self.width} {'bf16' if self.dtype == 'bfloat16' else 'fp32'}"


def build_codec(cell: Cell, layers: int, width: int) -> LatentForgeAutoencoder:
    return LatentForgeAutoencoder(
        LatentForgeAutoencoderConfig(
            vocab_size=cell.vocab_size,
            patch_size=cell.patch_size,
            hidden_size=width,
            intermediate_size=5 * width // 2,  # the default's proportion
            num_encoder_layers=layers,
            num_decoder_layers=layers,
        )
    )


def build_student(cell: Cell) -> LatentForgeForCausalLM:
    """With the defaults of `scripts/train_student.py`: a regression head, an autoregressive decoder of one layer."""
    heads = max(1, cell.width // 64)
    backbone = LlamaConfig(
        vocab_size=cell.vocab_size,
        hidden_size=cell.width,
        intermediate_size=-(-8 * cell.width // (3 * 32)) * 32,
        num_hidden_layers=cell.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2048,
    )
    codec = build_codec(cell, cell.codec_layers, cell.codec_width)
    return LatentForgeForCausalLM.from_autoencoder(codec, backbone)


def _attention_operations(query: Any, key: Any, value: Any, causal: bool) -> int:
    batch, heads, length, size = query
    operations = 2 * batch * heads * length * key[2] * (size + value[3])
    return operations // 2 if causal else operations


def _attention_forward(query, key, value, dropout=0.0, causal=False, *args, out_shape=None, **kwargs) -> int:
    return _attention_operations(query, key, value, causal)


def _attention_backward(
    gradient, query, key, value, out, logsumexp, dropout=0.0, causal=False, *args, **kwargs
) -> int:
    # four products: of the scores' and of each input's gradient; the scores made again are not counted
    return 2 * _attention_operations(query, key, value, causal)


# torch counts its kernels for GPUs only
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class _Watch(TrainerCallback):
    """Times the ends of steps; counts the first one's operations and profiles the last."""

    def __init__(self, cell: Cell):
        self.counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.last = 1 + cell.warm_up + cell.steps  # the profiled step
        self.ends: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.counter.__enter__()
        elif state.global_step == self.last:
            self.profiler.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.counter.__exit__(None, None, None)
        elif state.global_step == self.last + 1:
            self.profiler.__exit__(None, None, None)
        self.ends.append(time.perf_counter())


class _WaitsTimed:
    """Of a trainer: `waits`, seconds until each step's batches were there and their labels counted."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.waits: list[float] = []
        super().__init__(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        start = time.perf_counter()
        found = super().get_batch_samples(epoch_iterator, num_batches, device)  # type: ignore[misc]
        self.waits.append(time.perf_counter() - start)
        return found


class _TimedAETrainer(_WaitsTimed, AETrainer):
    pass


class _TimedKDTrainer(_WaitsTimed, KDTrainer):
    pass


@contextmanager
def codec_timed() -> Iterator[list[float]]:
    """Seconds of every time that a codec encodes, inside the block."""
    seconds: list[float] = []
    encode = LatentForgeAutoencoder.encode

    def timed(self: LatentForgeAutoencoder, input_ids: Any) -> Any:
        start = time.perf_counter()
        found = encode(self, input_ids)
        seconds.append(time.perf_counter() - start)
        return found

    LatentForgeAutoencoder.encode = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        LatentForgeAutoencoder.encode = encode  # type: ignore[method-assign]


def build_trainer(cell: Cell, output_dir: str, watch: _Watch) -> "_TimedAETrainer | _TimedKDTrainer":
    common: dict[str, Any] = {
        "output_dir": output_dir,
        "max_steps": watch.last + 1,
        "per_device_train_batch_size": cell.rows,
        "gradient_accumulation_steps": cell.accumulation,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": cell.dtype == "bfloat16",
    }
    data: dict[str, Any] = {
        "train_dataset": datasets.load_from_disk(cell.blocks),
        "data_collator": PatchCollator(cell.patch_size),
        "callbacks": [watch],
    }
    if cell.kind == "codec":
        return _TimedAETrainer(build_codec(cell, cell.layers, cell.width), AEConfig(**common), **data)
    return _TimedKDTrainer(build_student(cell), KDConfig(**common, mse_weight=cell.mse_weight), **data)


def _trained_numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _peak_bytes() -> int:
    try:  # ru_maxrss of a child starts at its parent's
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _matrix_rate(cell: Cell) -> float:
    return MachineRates("cpu", getattr(torch, cell.dtype), sizes=MATRIX_SIZES).matrix_rate


def measure(cell: Cell) -> dict[str, Any]:
    """Train; returns

    `tokens_per_second`, `seconds` (median of the timed steps, and all of them), `operations` of a step (products of
    matrices, forward and backward; attention under a causal mask counts half), `matrix_rate` (operations/s of large
    products in the same dtype with the same threads, the best found before and after), `utilisation` (the share of it
    that training attains), `waits` (share of time until batches are there), `codec` (share of a frozen codec's
    encoding), `peak_bytes`, `top` (operators with the largest share of the CPU's time), `trained_numbers`.
    """
    torch.set_num_threads(cell.threads)
    torch.manual_seed(0)
    before = _matrix_rate(cell)
    watch = _Watch(cell)
    with tempfile.TemporaryDirectory() as folder, codec_timed() as encoding:
        trainer = build_trainer(cell, folder, watch)
        trainer.train()
    rate = max(before, _matrix_rate(cell))  # a virtual machine's changes by a third within minutes
    begin = watch.last - cell.steps  # the step before the first timed one, from 1
    ends = watch.ends[begin - 1 : watch.last]
    seconds = [later - earlier for earlier, later in zip(ends[:-1], ends[1:], strict=True)]
    waits = trainer.waits[begin : watch.last]
    asked = len(encoding) // (watch.last + 1)  # times a step; none where nothing asks
    step = statistics.median(seconds)
    length = len(trainer.train_dataset[0]["input_ids"])  # type: ignore[index]
    operations = watch.counter.get_total_flops()
    profile = watch.profiler.key_averages()
    busy = sum(event.self_cpu_time_total for event in profile)
    top = sorted(profile, key=lambda event: -event.self_cpu_time_total)[:TOP]
    return {
        "cell": asdict(cell) | {"blocks": None},
        "tokens_per_second": cell.rows * cell.accumulation * length / step,
        "seconds": {"median": step, "all": seconds},
        "operations": operations,
        "matrix_rate": rate,
        "utilisation": operations / step / rate,
        "waits": sum(waits) / sum(seconds),
        "codec": sum(encoding[begin * asked : watch.last * asked]) / sum(seconds) if cell.kind == "student" else 0.0,
        "peak_bytes": _peak_bytes(),
        "trained_numbers": _trained_numbers(trainer.model),
        "top": [{"name": event.key, "share": event.self_cpu_time_total / busy, "calls": event.count} for event in top],
    }


def main(path: str) -> int:
    cell = Cell(**json.loads(Path(path).read_text(encoding="utf-8")))
    sys.stdout.write("\n" + json.dumps(measure(cell)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
