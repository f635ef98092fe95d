"""Who a teacher is, in words that stay true on another machine."""

import hashlib
import json
from typing import Any

import torch

from .base import Teacher, TeacherIdentity, tokenizer_fingerprint


# of a configuration, what says nothing about the answers
VOLATILE = ("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype", "use_cache")


def identity_of(teacher: Teacher) -> TeacherIdentity:
    """A teacher's own `identity`, or that of the transformers model it holds.

    Raises:
        ValueError: it has neither, or no tokenizer that would say what its ids mean.
    """
    identity = getattr(teacher, "identity", None)
    if isinstance(identity, TeacherIdentity):
        return identity
    model, tokenizer = getattr(teacher, "model", None), getattr(teacher, "tokenizer", None)
    if model is None or tokenizer is None:
        lacking = "model" if model is None else "tokenizer"
        raise ValueError(
            f"{type(teacher).__name__} has neither an `identity` nor a {lacking} that would give one: its answers "
            "could not be told from another teacher's. Give it a TeacherIdentity."
        )
    commit = getattr(model.config, "_commit_hash", None)
    if commit:
        name, revision = model.config.name_or_path, commit
    else:
        revision = f"sha256:{weights_hash(model)}"
        name = f"{model.config.model_type} {revision[7:19]}"
    return TeacherIdentity(name, revision, numerics_of(model), tokenizer_hash(tokenizer))


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of [`tokenizer_fingerprint`]."""
    return hashlib.sha256(json.dumps(tokenizer_fingerprint(tokenizer)).encode()).hexdigest()


def numerics_of(model: Any) -> str:
    """`float32`, `bfloat16`, ..., or the method that its weights were quantised by."""
    dtype = str(model.dtype).removeprefix("torch.")
    quantisation = getattr(model.config, "quantization_config", None)
    if quantisation is None:
        return dtype
    asked = quantisation if isinstance(quantisation, dict) else quantisation.to_dict()
    return f"{asked.get('quant_method', 'quantised')} {dtype}"


def weights_hash(model: Any) -> str:
    """sha256 over the configuration and every weight, by name: a copy elsewhere has the same, a further trained one
    not."""
    config = {name: value for name, value in model.config.to_diff_dict().items() if name not in VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if hasattr(tensor, "full_tensor"):  # one process's share
            tensor = tensor.full_tensor()
        values = tensor.detach().cpu().contiguous()
        digest.update(f"\0{name}\0{values.dtype}\0{tuple(values.shape)}\0".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
