"""How much memory training a student takes: a formula, part by part, and the measurement that it is held against.

B rows of a micro-batch, T tokens of a row, M = B * T, K tokens per patch, P = M / K patches, C = P + B conditions, H
backbone width, I its MLP's, Q and G widths of all its query and of all its key heads, E and F width and MLP of the
autoregressive decoder, W its window, h its heads, X width of its output matrix, V vocabulary, D latent.

All sizes are bytes. What autograd keeps was read off the operations (a product keeps both factors that get a gradient,
an RMSNorm its input and its normalised input, a linear layer its input) and agrees with what it really keeps
(tests/trainers/evaluation/test_memory.py).
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from modeling_latentforge import LatentForgeAutoencoder, LatentForgeAutoencoderConfig
from modeling_latentforge.modeling_token_loss import chunk_tokens

from ..tokenizer import train_tokenizer
from ..verification import ROOT


FP32 = 4

# The process without any model: Python, torch, transformers, datasets, and what tokenising leaves. Measured on x86-64
# Linux, torch 2.13 without CUDA: 0.49 GB where the tokens were cached, to 0.62 where they were made.
PROCESS_BYTES = 600 * 10**6
# Memory that was freed and is not given back: glibc's heap, where a CPU's tensors below 32 MiB are. Measured over the
# steps of 4 x 256 (much activation, few gradients) and 12 x 768 (the reverse): a fifth of the activations are holes,
# and half of what the backward pass frees is not taken for gradients.
HEAP_HOLES, HEAP_NOT_REUSED = 0.2, 0.5
# What a process holds on a GPU beside its tensors: context, kernels, workspaces. Assumed, not measured.
CUDA_CONTEXT_BYTES = 600 * 10**6

# Bytes of state per trained number: two fp32 moments (Adam), two bytes (8 bit), a momentum, nothing; from the
# optimisers' definitions. Adafactor keeps a number for every row and column.
STATE_BYTES = {
    "adamw_torch_fused": 8,
    "adamw_torch": 8,
    "adamw_8bit": 2,
    "adamw_bnb_8bit": 2,
    "paged_adamw_8bit": 2,
    "lion_32bit": 4,
    "sgd": 0,
    "adafactor": 0,
}


@dataclass(frozen=True)
class TeacherPlan:
    """A teacher beside the training.

    Attributes:
        hidden_size, intermediate_size, vocab_size: of its configuration.
        weight_bytes: of all its weights; 0 where it is elsewhere, or read from a store.
        number_bytes: of one number of its weights and states: 4 in fp32, 2 in bf16.
        top_k: entries per token that the student learns from; None: whole distributions.
    """

    hidden_size: int = 0
    intermediate_size: int = 0
    vocab_size: int = 0
    weight_bytes: int = 0
    number_bytes: int = FP32
    top_k: int | None = None


@dataclass(frozen=True)
class TrainingPlan:
    """What a training asks for, beside its model.

    Attributes:
        batch_size: B, rows of a micro-batch on one device.
        block_size: T.
        device: `cpu` or `cuda`.
        autocast: products in bf16 or fp16; the weights stay fp32.
        optimizer: `optim` of transformers' `TrainingArguments`.
        gradient_checkpointing: the backbone's layers are computed again in the backward pass.
        accumulation_steps: micro-batches of a step.
        num_processes: devices with a copy of the model each (DistributedDataParallel).
        loss_weights: of `ce`, `kd`, `mse`, `energy`.
        teacher: None: there is none.
        starts_from: weight bytes, in fp32, of a language model that is read to start from, and dropped.
    """

    batch_size: int
    block_size: int
    device: str = "cpu"
    autocast: bool = False
    optimizer: str = "adamw_torch_fused"
    gradient_checkpointing: bool = False
    accumulation_steps: int = 1
    num_processes: int = 1
    loss_weights: Mapping[str, float] = field(default_factory=lambda: {"ce": 1.0})
    teacher: TeacherPlan | None = None
    starts_from: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in STATE_BYTES:
            raise ValueError(
                f"The states of optimizer {self.optimizer!r} are not known here: known are {', '.join(STATE_BYTES)}."
            )
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {self.device!r}.")


@dataclass(frozen=True)
class Part:
    """One line of an estimate: `bytes`, and the `formula` in words."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True)
class MemoryEstimate:
    """`always` is there throughout; of the `moments` one is the highest, and the peak is its sum and that."""

    always: list[Part]
    moments: dict[str, list[Part]]

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: sum(part.bytes for part in self.moments[name]))

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.at(self.peak_moment)

    def at(self, moment: str) -> int:
        """Bytes at a moment."""
        return sum(part.bytes for part in [*self.always, *self.moments[moment]])

    def table(self) -> str:
        """Markdown: the parts of the peak, its sum, and the sums of the other moments, in MB (10^6 bytes)."""
        peak = self.peak_moment
        lines = ["| part | MB | formula |", "|---|---|---|"]
        lines += [f"| {part.name} | {part.bytes / 1e6:,.0f} | {part.formula} |" for part in self.always]
        lines += [f"| {peak}: {part.name} | {part.bytes / 1e6:,.0f} | {part.formula} |" for part in self.moments[peak]]
        lines.append(f"| **peak** | **{self.total / 1e6:,.0f}** | {peak} |")
        others = "; ".join(f"{name} {self.at(name) / 1e6:,.0f}" for name in self.moments if name != peak)
        return "\n".join(lines) + (f"\n\nMB at other moments: {others}\n" if others else "\n")


# -- what autograd keeps, in bytes


@dataclass(frozen=True)
class Kept:
    """What the forward pass leaves for the backward pass, by part of the model.

    Attributes:
        embedding, backbone, head, decoder: bytes.
        layer: of one backbone layer, in `backbone` as often as there are layers.
        held: what the forward itself still holds when the loss is made, beside what autograd keeps.
    """

    embedding: int
    backbone: int
    head: int
    decoder: int
    layer: int
    held: int

    @property
    def total(self) -> int:
        return self.embedding + self.backbone + self.head + self.decoder


def _norm(width: int, consumers: int, autocast: bool) -> int:
    """An RMSNorm in fp32: its input, its normalised input and what `consumers` linear layers read: one fp32 tensor for
    all, under autocast a bf16 copy each."""
    return width * (2 * FP32 + (2 * consumers if autocast else FP32))


def _gated(width: int, intermediate: int, autocast: bool, frozen: bool = False) -> int:
    """`LatentForgeMLPBlock`: norm, both halves of gate_up, silu, product. With frozen weights a linear layer's input
    and a norm's normalised input are not kept."""
    number = 2 if autocast else FP32
    if frozen:
        return width * FP32 + 3 * intermediate * number
    return _norm(width, 1, autocast) + 4 * intermediate * number


def _backbone_layer(config: Any, autocast: bool, lora_rank: int) -> int:
    """One layer, per patch.

    Gated layers (Llama, Qwen3): two norms, query, key, value and what attention gives, gate, up, silu and product, in
    fp32 `6 H + 2 Q + 2 G + 4 I` numbers; Qwen3 also norms queries and keys. GPT-NeoX: `3 H + 2 Q + 2 G + 2 I`.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    query, key = heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size
    number = 2 if autocast else FP32
    attention = (2 * query + 2 * key) * number
    if config.model_type == "gpt_neox":
        # LayerNorms keep their input and no normalised copy, and read one input where the residual is parallel
        inputs = 1 if config.use_parallel_residual else 2
        return hidden * (inputs * FP32 + 2 * FP32) + attention + 2 * inner * number
    # transformers' own RMSNorm brings its input to fp32 and its normalised input back
    norms = hidden * (2 * (FP32 + 2) + 5 * 2 if autocast else 6 * FP32)
    if config.model_type.startswith(("qwen3", "gemma3", "olmo2")):
        norms += (query + key) * (FP32 + number)
    if lora_rank:
        # frozen norms keep no normalised input; A's output is kept for B, and its bf16 input beside attention's output
        norms -= 2 * hidden * number
        attention += (7 * lora_rank + (query if autocast else 0)) * number
    return norms + attention + 4 * inner * number


def kept_by_autograd(config: Any, plan: TrainingPlan, lora_rank: int = 0) -> Kept:
    """Bytes that autograd keeps of one micro-batch, by part, for a student of this [`LatentForgeConfig`].

    `lora_rank` above 0: the backbone is frozen but for adapters of this rank.
    """
    autocast, number = plan.autocast, 2 if plan.autocast else FP32
    backbone, codec, head = config.backbone_config, config.autoencoder_config, config.head_config
    hidden, latent, patch_size = backbone.hidden_size, config.latent_size, config.patch_size
    tokens = plan.batch_size * plan.block_size
    patches = tokens // patch_size
    conditions = patches + plan.batch_size

    if config.input_mode == "tokens":
        # K embeddings, scaled and normalised; the gated MLP on them
        per_patch = _norm(patch_size * hidden, 2, autocast) + 4 * hidden * number
    else:
        per_patch = latent * number
    embedding = patches * per_patch

    layer = patches * _backbone_layer(backbone, autocast, lora_rank)
    # checkpointed, a layer keeps its input
    layers = patches * hidden * number if plan.gradient_checkpointing else layer
    whole_backbone = backbone.num_hidden_layers * layers + patches * hidden * 2 * FP32

    blocks = head.num_layers * _gated(hidden, head.intermediate_size, autocast)
    one_sample = blocks + _norm(hidden, 1, autocast) + latent * FP32
    # an energy score alone draws its own latents and decodes none
    decodes = bool(plan.loss_weights.get("ce") or plan.loss_weights.get("kd"))
    samples = conditions if decodes or plan.loss_weights.get("mse") else 0
    if head.head_type == "energy":
        one_sample += head.noise_size * number
        whole_head = samples * (one_sample + _norm(hidden, head.num_layers + 1, autocast))
        if plan.loss_weights.get("energy"):
            # the samples, their distances to targets and to each other, and the targets
            distances = head.num_samples * (head.num_targets + 2 * head.num_samples)
            per_patch = head.num_samples * one_sample + (3 * distances + head.num_targets * latent) * FP32
            whole_head += patches * per_patch
    else:
        if head.head_type == "aligned":
            one_sample += patch_size * (1 + 2 * head.num_frequencies) * number
        whole_head = samples * one_sample

    decoder = held = 0
    if decodes and config.decoder_type == "autoregressive":
        width, inner, window = config.decoder_hidden_size, config.decoder_intermediate_size, config.decoder_window
        heads = config.decoder_num_heads
        # the token's norm, the convolution's input
        per_token = 3 * width * FP32
        # the latent's norm
        decoder = conditions * (latent * number + 2 * width * FP32)
        # what attention gives is laid out by heads and then by tokens
        out = width * (2 if heads > 1 else 1)
        # queries, keys and values in blocks of which each sees the one before, and its mask
        attention = (width + 4 * width + out + 2 * window) * number
        per_layer = _norm(width, 1, autocast) + attention + _gated(width, inner, autocast)
        per_token += config.num_decoder_layers * per_layer
        if config.decoder_lookup:
            per_token += width * number + _norm(width, 1, autocast) + 2 * width * FP32
        if config.decoder_memory == "patches":
            per_token += _norm(width, 1, autocast) + (width + out) * number
            decoder += conditions * (_norm(hidden, 1, autocast) + 3 * width * number)
            decoder += plan.block_size * (plan.block_size // patch_size + 1) * number
        # the last norm with its output, and its gradient
        per_token += 4 * width * FP32
        if config.decoder_output_size != width:
            per_token += (config.decoder_output_size - width) * FP32
        decoder += tokens * per_token
        # keys and values of the windows, for a cache that training does not fill; the last norm's, by column
        held = tokens * (config.num_decoder_layers * 5 * width * number + width * FP32)
    elif decodes:
        width, inner, count = codec.hidden_size, codec.intermediate_size, codec.num_decoder_layers
        block = _gated(width, inner, autocast, frozen=not config.train_decoder)
        per_token_blocks = (count + 1) // 2
        slots = conditions * patch_size
        decoder = conditions * (count - per_token_blocks) * block + slots * per_token_blocks * block
        # latents; the last norm's input, with trained weights its normalised input, and its gradient
        decoder += conditions * (latent + width) * number + slots * width * (2 + config.train_decoder) * FP32
        held = 2 * slots * width * FP32  # what the last norm gave, by slot and by column
    return Kept(embedding, whole_backbone, whole_head, decoder, layer, held)


# -- the estimate


def weight_bytes(model: nn.Module, number_bytes: int = FP32) -> int:
    """Of all weights, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters()) * number_bytes


def _bytes(module: nn.Module | None, trained: bool | None = None) -> int:
    if module is None:
        return 0
    return sum(
        parameter.numel() * FP32 for parameter in module.parameters() if trained in (None, parameter.requires_grad)
    )


def _linear_bytes(module: nn.Module, trained: bool | None = None) -> int:
    """Of the weights of linear layers, in fp32."""
    weights = (linear.weight for linear in module.modules() if isinstance(linear, nn.Linear))
    return sum(weight.numel() * FP32 for weight in weights if trained in (None, weight.requires_grad))


def _optimizer_bytes(model: nn.Module, optimizer: str) -> int:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if optimizer == "adafactor":
        return sum(
            FP32 * (parameter.numel() // parameter.shape[-1] + parameter.shape[-1])
            if parameter.ndim > 1
            else FP32 * parameter.numel()
            for parameter in trained
        )
    return sum(parameter.numel() for parameter in trained) * STATE_BYTES[optimizer]


def _loss_chunk_bytes(config: Any, plan: TrainingPlan, output_width: int) -> tuple[int, str]:
    """Of the buffers that one chunk of the token loss needs (modeling_token_loss.py)."""
    tokens = min(chunk_tokens(config.vocab_size, plan.device), plan.batch_size * plan.block_size)
    copies, words = 1, "logits, which become their gradient"
    dense = plan.teacher is not None and plan.teacher.top_k is None and plan.loss_weights.get("kd")
    if dense:
        copies, words = 5, "logits of student and teacher, their logarithms, the teacher's probabilities"
    size = copies * tokens * config.vocab_size * FP32
    formula = f"{copies} x {tokens} tokens x V x 4 ({words})"
    if plan.autocast:
        size += 2 * tokens * config.vocab_size * 2 + config.vocab_size * output_width * 4
        formula += ", bf16 copies, the matrix in bf16 and its gradient's part"
    return size, formula


def estimate_memory(model: nn.Module, plan: TrainingPlan) -> MemoryEstimate:
    """Peak memory of training `model` on one device.

    Args:
        model: [`LatentForgeForCausalLM`], of which only shapes are read (`torch.device("meta")` will do), with its
            adapters.
        plan: how it is trained.

    The peak is what is always there, and the highest of: the batch's loss (all that autograd keeps, one chunk of
    logits, the output matrix's gradient), the backward pass where it enters the backbone (what the backbone keeps, the
    gradients so far) and where it ends (all gradients), the teacher's forward; where a model starts from another one,
    also the reading of both.
    """
    student: Any = model
    config = student.config
    cpu = plan.device == "cpu"
    backbone = student.model.backbone
    lora_rank = max(
        (parameter.shape[0] for name, parameter in backbone.named_parameters() if "lora_A" in name), default=0
    )
    kept = kept_by_autograd(config, plan, lora_rank)
    output = student.get_output_embeddings().weight
    tokens = plan.batch_size * plan.block_size
    patches = tokens // config.patch_size

    frozen, weights = _bytes(model, trained=False), _bytes(model)
    always = [
        Part("process", PROCESS_BYTES, "Python, torch, transformers: measured")
        if cpu
        else Part("CUDA context", CUDA_CONTEXT_BYTES, "assumed, not measured"),
        Part("weights", weights, f"4 x {weights // FP32:,} numbers, {frozen // FP32:,} of them frozen"),
    ]
    if cpu:
        codec = _bytes(student.autoencoder)
        always.append(Part("codec that was read", codec, f"4 x {codec // FP32:,}: the script's own, beside its copy"))
    teacher = plan.teacher
    if teacher is not None and teacher.weight_bytes:
        count = teacher.weight_bytes // teacher.number_bytes
        formula = f"{teacher.number_bytes} x {count:,} numbers"
        always.append(Part("teacher's weights", teacher.weight_bytes, formula))
    states = Part(
        "optimizer",
        _optimizer_bytes(model, plan.optimizer),
        f"{plan.optimizer}, {STATE_BYTES[plan.optimizer]} a number",
    )
    all_gradients = _bytes(model, trained=True)
    heap = []
    if cpu:
        size = int(HEAP_HOLES * kept.total + HEAP_NOT_REUSED * min(kept.total, all_gradients))
        formula = f"{HEAP_HOLES} x activations + {HEAP_NOT_REUSED} x (activations or gradients, the fewer): measured"
        heap.append(Part("heap", size, formula))
    if plan.num_processes > 1:
        always.append(Part("buckets", all_gradients, "a copy of all gradients, which processes exchange"))

    # what every moment of a step has, beside `always`
    running = [states, *heap]
    if plan.autocast:
        casts = _linear_bytes(model) - _linear_bytes(student.autoencoder)
        casts -= 0 if output is student.autoencoder.lm_head.weight else output.numel() * FP32
        if config.decoder_type == "parallel" and not config.train_decoder:
            casts += _linear_bytes(student.autoencoder.decoder)
        if plan.gradient_checkpointing:  # only what gets a gradient is kept in bf16 beyond its layer
            casts -= _linear_bytes(backbone, trained=False)
        running.append(Part("bf16 weights", casts // 2, "2 x numbers of linear layers, until the backward pass"))
    if teacher is not None:
        if teacher.weight_bytes and teacher.top_k is None:
            size = tokens * teacher.hidden_size * teacher.number_bytes
            running.append(Part("teacher's states", size, f"M x {teacher.hidden_size} x {teacher.number_bytes}"))
        elif teacher.top_k is not None:
            # ids as they came and as int64, log-probabilities, weights, a mask: 40 bytes an entry
            running.append(Part("teacher's entries", tokens * teacher.top_k * 40, f"M x {teacher.top_k} x 40"))

    accumulates = plan.accumulation_steps > 1
    output_gradient = output.numel() * FP32 if output.requires_grad else 0
    chunk, chunk_formula = _loss_chunk_bytes(config, plan, output.shape[1])
    gradients = "4 x trained numbers"
    moments: dict[str, list[Part]] = {}

    loss_gradients = [Part("output matrix's gradient", output_gradient, "4 x V x X")]
    if accumulates:
        loss_gradients.insert(0, Part("gradients", all_gradients, f"{gradients}, of the micro-batches before"))
    beside = [Part("one chunk of logits", chunk, chunk_formula)]
    if kept.held:
        beside.append(Part("windows", kept.held, "what the forward holds for a cache: M x 5 E"))
    first_backward = _first_backward_bytes(config, plan)
    if first_backward > chunk + kept.held:
        beside = [Part("gradients of activations", first_backward, "M x (2 E + 3 F) of the first block")]
    moments["loss"] = [
        *running,
        Part("activations of the decoder", kept.decoder, "per token, see kept_by_autograd"),
        Part("activations of the head", kept.head, "per condition"),
        Part("activations of the backbone", kept.backbone, "per patch and layer"),
        Part("activations of the patches", kept.embedding, "per patch"),
        *loss_gradients,
        *beside,
    ]

    # the decoder is done; its weights' gradients are there
    above = all_gradients - _bytes(student.model, trained=True)
    transient = patches * (2 * config.backbone_config.hidden_size + 3 * config.backbone_config.intermediate_size)
    once_more = kept.layer if plan.gradient_checkpointing else 0
    moments["backward through the backbone"] = [
        *running,
        Part("activations of the backbone", kept.backbone + once_more, "per patch and layer"),
        Part("activations of the patches", kept.embedding, "per patch"),
        Part("gradients", all_gradients if accumulates else above, gradients + ("" if accumulates else " above it")),
        Part("gradients of activations", transient * FP32, "P x (2 H + 3 I) of one layer"),
    ]
    moments["step"] = [states, *heap, Part("gradients", all_gradients, gradients)]

    if teacher is not None and teacher.weight_bytes:
        size = tokens * (4 * teacher.hidden_size + 3 * teacher.intermediate_size) * teacher.number_bytes
        moments["teacher"] = [states, *heap, Part("teacher's forward", size, "M x (4 H + 3 I) of one layer")]
        if accumulates:
            moments["teacher"].append(Part("gradients", all_gradients, f"{gradients}, of the micro-batches before"))
    if plan.starts_from and cpu:
        moments["start"] = [Part("model to start from", plan.starts_from, "4 x its numbers, dropped afterwards")]
    return MemoryEstimate(always, moments)


def _first_backward_bytes(config: Any, plan: TrainingPlan) -> int:
    """Gradients of activations of the decoder's last block, while all that autograd keeps is still there."""
    tokens, number = plan.batch_size * plan.block_size, 2 if plan.autocast else FP32
    if config.decoder_type == "autoregressive":
        width, inner = config.decoder_hidden_size, config.decoder_intermediate_size
    else:
        width, inner = config.autoencoder_config.hidden_size, config.autoencoder_config.intermediate_size
    return tokens * (2 * width + 3 * inner) * number


# -- the measurement


MEASURE = (
    "import re, sys\n"
    "from scripts.train_student import main\n"
    "main(sys.argv[1:])\n"
    # ru_maxrss of a child starts at its parent's
    "print('peak', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read()).group(1))\n"
)


def save_stand_ins(
    folder: Path,
    codec: LatentForgeAutoencoderConfig,
    teacher: PreTrainedConfig | None = None,
    teacher_dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Save a codec and a teacher of these shapes, with random weights and a small tokenizer, which memory does not
    depend on; returns the flags of `scripts/train_student.py` that name them."""
    tokenizer = train_tokenizer(Dataset.from_dict({"text": ["a text"]}), 258)
    models: dict[str, PreTrainedModel] = {"autoencoder": LatentForgeAutoencoder(codec)}
    if teacher is not None:
        models["teacher"] = AutoModelForCausalLM.from_config(teacher, dtype=teacher_dtype)
    flags = []
    for name, model in models.items():
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        flags += [f"--{name}", str(folder / name)]
    return flags


def measure_memory(argv: Sequence[str], folder: Path, block_size: int, steps: int = 3) -> int:
    """Largest resident set, in bytes, of `scripts/train_student.py` with these flags, in a process of its own that
    trains so many steps on Python's standard library (VmHWM of Linux).

    Args:
        argv: flags, with those of [`save_stand_ins`].
        folder: for what it writes.
        block_size: T.
        steps: at least 2, since the optimizer's states come with the first.

    Raises:
        RuntimeError: the training failed.
    """
    flags = {
        "data": "builtin:python",
        "max_train_tokens": 64 * block_size,
        "max_eval_tokens": block_size,
        "per_device_eval_batch_size": 1,
        "max_steps": steps,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "output_dir": folder / "output",
        "cache_dir": folder / "cache",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-c", MEASURE, *argv, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = re.search(r"^peak (\d+)$", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        raise RuntimeError(f"The training ended with {done.returncode}: {done.stdout[-1500:]}{done.stderr[-1500:]}")
    return int(found.group(1)) * 1024
