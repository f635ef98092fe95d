"""`trainers/evaluation/memory.py`: the formula against what autograd, the optimizer and the model really hold."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPTNeoXConfig, LlamaConfig, Qwen3Config

from modeling_latentforge import LatentForgeAutoencoder, LatentForgeAutoencoderConfig, LatentForgeForCausalLM
from trainers.evaluation.memory import TeacherPlan, TrainingPlan, estimate_memory, kept_by_autograd


VOCAB = 500
SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = {"num_key_value_heads": 1, "head_dim": 64}
BACKBONES = {
    "llama": lambda: LlamaConfig(**SHAPE, **GROUPED, vocab_size=VOCAB),
    "qwen3": lambda: Qwen3Config(**SHAPE, **GROUPED, vocab_size=VOCAB),
    "gpt_neox": lambda: GPTNeoXConfig(**SHAPE, vocab_size=VOCAB),
}
PLAN = TrainingPlan(batch_size=2, block_size=240)  # as many patches as no weight has rows


def build(backbone: str = "llama", lora: int = 0, **fields: Any) -> LatentForgeForCausalLM:
    codec = LatentForgeAutoencoderConfig(
        vocab_size=VOCAB, patch_size=4, latent_size=64, hidden_size=64, intermediate_size=160
    )
    model = LatentForgeForCausalLM.from_autoencoder(LatentForgeAutoencoder(codec), BACKBONES[backbone](), **fields)
    if lora:
        model.model.backbone = get_peft_model(model.model.backbone, LoraConfig(r=lora, target_modules="all-linear"))
    return model.train()


def really_kept(model: nn.Module, plan: TrainingPlan) -> int:
    """Bytes of all tensors that autograd keeps of one forward pass, beside the weights and their bf16 copies."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(module.weight.shape) for module in model.modules() if isinstance(module, nn.Linear)}
    shapes |= {shape[::-1] for shape in shapes}
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        is_copy = tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
        if storage.data_ptr() not in weights and not is_copy:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    ids = torch.randint(0, VOCAB, (plan.batch_size, plan.block_size))
    autocast = torch.autocast("cpu", torch.bfloat16) if plan.autocast else nullcontext()
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            labels=ids,
            output_logits=False,
            loss_weights=dict(plan.loss_weights),
        )
    output: Any = model.get_output_embeddings().weight  # type: ignore[operator]
    return sum(storage.nbytes() for storage in kept.values()) - output.requires_grad * output.numel() * 4


ENERGY = {"head_config": {"head_type": "energy"}}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({}, {}),
        ({"backbone": "qwen3"}, {}),
        ({"backbone": "gpt_neox"}, {}),
        ({"lora": 8}, {}),
        ({}, {"gradient_checkpointing": True}),
        ({"num_decoder_layers": 2, "decoder_memory": "none", "decoder_hidden_size": 64}, {}),
        ({"decoder_output_size": 64}, {}),
        ({"input_mode": "latents"}, {}),
        ({"decoder_type": "parallel"}, {}),
        ({"decoder_type": "parallel", "train_decoder": True}, {}),
        ({"decoder_type": "parallel", **ENERGY}, {"loss_weights": {"energy": 1.0}}),
        (ENERGY, {"loss_weights": {"ce": 1.0, "energy": 1.0}}),
    ],
    ids=str,
)
def test_activations_are_what_autograd_keeps(fields: dict[str, Any], changes: dict[str, Any], autocast: bool):
    """A formula of its own has no use: an operation that keeps another copy must be seen here, not in a crash."""
    model, plan = build(**fields), replace(PLAN, autocast=autocast, **changes)
    if plan.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    expected = really_kept(model, plan)
    assert kept_by_autograd(model.config, plan, fields.get("lora", 0)).total == pytest.approx(expected, rel=0.06)


def part(estimate, name: str, moment: str = "") -> int:
    return sum(x.bytes for x in (estimate.moments[moment] if moment else estimate.always) if x.name == name)


@pytest.mark.parametrize("lora", [0, 4])
def test_weights_gradients_and_states_are_those_of_a_step(lora: int):
    """They are most of a large model's memory, and need no approximation."""
    model = build(lora=lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    ids = torch.randint(0, VOCAB, (1, 16))
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    # a batch without masked tokens gives the mask embeddings no gradient
    masks = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and p.grad is None)
    optimizer.step()
    states = sum(x.numel() for state in optimizer.state.values() for name, x in state.items() if name != "step")
    estimate = estimate_memory(model, PLAN)
    assert part(estimate, "weights") == 4 * sum(p.numel() for p in model.parameters())
    assert part(estimate, "optimizer", "step") == 4 * (states + 2 * masks)
    gradients = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
    assert part(estimate, "gradients", "step") == 4 * (gradients + masks)


def test_a_model_without_memory_for_its_weights_gives_the_same_estimate():
    """Asking what a billion weights need must not need them."""
    with torch.device("meta"):
        shapes = build()
    assert estimate_memory(shapes, PLAN) == estimate_memory(build(), PLAN)


def test_what_a_plan_adds_is_in_the_estimate():
    """A teacher, a second micro-batch or a second process that cost nothing would be believed."""
    model = build()
    plain = estimate_memory(model, PLAN)
    gradients = part(plain, "gradients", "step")
    several = estimate_memory(model, replace(PLAN, accumulation_steps=2))
    assert part(several, "gradients", "loss") == gradients and part(plain, "gradients", "loss") == 0
    assert part(estimate_memory(model, replace(PLAN, num_processes=2)), "buckets") == gradients
    half = estimate_memory(model, replace(PLAN, optimizer="adamw_8bit"))
    assert 4 * part(half, "optimizer", "step") == part(plain, "optimizer", "step")
    local = TeacherPlan(hidden_size=64, intermediate_size=128, vocab_size=VOCAB, weight_bytes=10**6, number_bytes=2)
    taught = estimate_memory(model, replace(PLAN, teacher=local, loss_weights={"ce": 0.5, "kd": 0.5}))
    assert part(taught, "teacher's weights") == 10**6 and "teacher" in taught.moments
    assert part(taught, "teacher's states", "loss") == 480 * 64 * 2
    stored = replace(PLAN, teacher=TeacherPlan(top_k=20), loss_weights={"ce": 0.5, "kd": 0.5})
    assert part(estimate_memory(model, stored), "teacher's entries", "loss") == 480 * 20 * 40
    assert plain.total < taught.total and "process" not in estimate_memory(model, replace(PLAN, device="cuda")).table()


def test_the_table_adds_up_to_its_peak():
    """A reader sums the lines to see whether to believe the last."""
    estimate = estimate_memory(build(), PLAN)
    lines = [line.split("|") for line in estimate.table().splitlines() if line.startswith("| ")][1:]
    *parts, peak = [int(line[2].strip(" *").replace(",", "")) for line in lines]
    assert abs(sum(parts) - peak) <= len(parts) and peak == round(estimate.total / 1e6)


def test_an_optimizer_whose_states_are_unknown_is_refused():
    """Taken for one without states it would promise a third of the memory."""
    with pytest.raises(ValueError, match="known are adamw_torch_fused"):
        replace(PLAN, optimizer="galore_adamw")
    with pytest.raises(ValueError, match="cpu or cuda"):
        replace(PLAN, device="tpu")
