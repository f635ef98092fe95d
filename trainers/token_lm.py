"""A small causal language model over tokens: the demo's teacher, the baseline, the stand-in for a user's LLM."""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from modeling_latentforge.modeling_token_loss import token_loss

from .base_trainer import LatentTrainingConfig
from .safe_trainer import SafeTrainer


ARCHITECTURES = ("granite", "llama", "gpt_neox", "qwen3")

# Granite is Llama with a factor on its embeddings; with its other factors off and this one on, embeddings of standard
# deviation 0.02 take AdamW's steps 16 times as far. From scratch that is worth 0.8 nats after 1 M tokens
# (docs/experiments.md).
GRANITE = {"embedding_multiplier": 16.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}


def build_token_lm(
    architecture: str,
    tokenizer: PreTrainedTokenizerBase,
    hidden_size: int = 256,
    num_hidden_layers: int = 4,
    num_attention_heads: int | None = None,
    num_key_value_heads: int | None = None,
    intermediate_size: int | None = None,
    max_position_embeddings: int = 2048,
    tie_word_embeddings: bool | None = None,
    **config_kwargs: Any,
) -> PreTrainedModel:
    """Build a token LM with random weights, in float32.

    Args:
        architecture: one of `ARCHITECTURES`; granite is Llama with a factor on its embeddings, which learns faster.
        tokenizer: gives the vocabulary size and the special ids.
        hidden_size: width H.
        num_attention_heads: default one head per 64 of the width.
        num_key_value_heads: default one per attention head (no grouping); gpt_neox knows no grouping.
        intermediate_size: default 8/3 of the width, for gpt_neox (two matrices instead of three) 4 times, rounded up
            to a multiple of 64.
        max_position_embeddings: longest text, in tokens.
        tie_word_embeddings: one matrix reads and writes tokens; default, all but granite, whose factor would make its
            logits 16 times as large.
        config_kwargs: more fields of the architecture's configuration.

    Raises:
        ValueError: unknown architecture, or sizes that do not divide.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {architecture!r}: take one of {', '.join(ARCHITECTURES)}")
    heads = num_attention_heads or max(1, hidden_size // 64)
    check_heads(architecture, hidden_size, heads, num_key_value_heads)
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate_size or _default_intermediate_size(architecture, hidden_size),
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": architecture != "granite" if tie_word_embeddings is None else tie_word_embeddings,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # the pad id's embedding learns nothing; were it EOS, the model would never read where a document ends
        "pad_token_id": None if tokenizer.pad_token_id == tokenizer.eos_token_id else tokenizer.pad_token_id,
    }
    if architecture != "gpt_neox":
        sizes["num_key_value_heads"] = num_key_value_heads or heads
        sizes["head_dim"] = hidden_size // heads
        if architecture == "granite":
            sizes |= {**GRANITE, "attention_multiplier": (hidden_size // heads) ** -0.5}
    config = AutoConfig.for_model(architecture, **{**sizes, **config_kwargs})
    model = AutoModelForCausalLM.from_config(config)
    model.generation_config.pad_token_id = (
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )
    return model


def check_heads(architecture: str, hidden_size: int, heads: int, num_key_value_heads: int | None = None) -> None:
    """Refuse widths and heads that do not divide.

    Raises:
        ValueError: naming both sizes.
    """
    if hidden_size % heads:
        raise ValueError(f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({heads})")
    if (hidden_size // heads) % 2:
        raise ValueError(f"a head's width ({hidden_size} / {heads}) must be even for rotary positions: change either")
    if num_key_value_heads in (None, heads):
        return
    if architecture == "gpt_neox":
        raise ValueError(f"gpt_neox has no grouped heads: drop num_key_value_heads ({num_key_value_heads})")
    if num_key_value_heads < 1 or heads % num_key_value_heads:
        raise ValueError(
            f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({num_key_value_heads})"
        )


def _default_intermediate_size(architecture: str, hidden_size: int) -> int:
    size = 4 * hidden_size if architecture == "gpt_neox" else -(-8 * hidden_size // 3)
    return -(-size // 64) * 64


@dataclass
class TokenLMConfig(LatentTrainingConfig):
    """`TrainingArguments` with defaults for a small LM that is trained from scratch."""

    learning_rate: float = field(default=2e-3, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Course of the learning rate."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps of warm-up, below 1 a share of all steps."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay of the matrices."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second decay rate."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the text; --max_steps overrides it."})
    logging_steps: float = field(default=20, metadata={"help": "Steps between two lines of the log."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "A token LM uses all its parameters in every batch."}
    )


class TokenLMTrainer(SafeTrainer):
    """[`SafeTrainer`] for causal LMs whose output is one matrix (`get_output_embeddings`, without bias).

    In one process the loss goes through that matrix chunk by chunk: same loss and gradients as the model's own, but
    (tokens, vocabulary) logits are never held, which saves their memory and is 15 % faster on two CPU cores
    (measured: 4 x 256, vocabulary 4096). In several processes it is the model's own, since DistributedDataParallel
    must see `forward`.

    `eval_loss` is the mean over batches; for a figure per token use `evaluation.held_out_likelihood`.
    """

    def __init__(self, model: PreTrainedModel, *args: Any, **kwargs: Any):
        use_cache = model.config.use_cache
        super().__init__(model, *args, **kwargs)
        # Trainer switches it off for good, and the saved model would generate without a cache
        model.config.use_cache = use_cache

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        output_layer = self.model.get_output_embeddings()
        scaled = getattr(self.model.config, "logits_scaling", 1.0) != 1.0  # Granite models of others
        if model is not self.model or return_outputs or output_layer.bias is not None or scaled:
            return super().compute_loss(
                model, {**inputs, "use_cache": False}, return_outputs, num_items_in_batch=num_items_in_batch
            )
        with self.accelerator.autocast():
            backbone: Any = self.model.base_model
            hidden = backbone(
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
            ).last_hidden_state[:, :-1]
            targets = inputs["labels"][:, 1:].reshape(-1)
            total, _, _ = token_loss(hidden.reshape(-1, hidden.shape[-1]), output_layer.weight, targets)
        if num_items_in_batch is None:
            num_items_in_batch = (targets != -100).sum().clamp(min=1)
        return total / num_items_in_batch
