"""A local transformers model as teacher, with its full distributions."""

import inspect
import logging
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from .base import DenseSignal, TeacherCapabilities, check_same_tokenizer, speaking_positions


logger = logging.getLogger(__name__)

# Logits held at once by `target_logprobs`, in elements.
TARGET_CHUNK_ELEMENTS = 2**22


class HFTeacher:
    """Any causal LM that transformers loads: `teacher.signal(input_ids, attention_mask)` gives its distribution at
    every position.

    The logits are not made here: the signal keeps the last hidden states and the output matrix, and a student's
    forward asks for one chunk after another. Models that do more than a matrix product after the last hidden state
    (scaling as Cohere and Granite do, soft caps as Gemma 2 does) are found out by [`check`], which compares once; they
    give full logits `(B, T, V)`.

    Args:
        model_or_id: Hub id, directory, or a loaded model (which is used as it is: set eval, never copied, moved only
            by [`to`]).
        tokenizer: the teacher's, or its id; default, that of `model_or_id` where it is an id or directory that holds
            one.
        dtype: of the weights when they are loaded here; default, as saved.
        device: default, where the model is; [`to`] moves it.
        revision: Hub revision.
        trust_remote_code: passed on to transformers.

    Raises:
        ValueError: from [`check`] and [`check_tokenizer`].
        RuntimeError: when used after [`close`].
    """

    def __init__(
        self,
        model_or_id: str | PreTrainedModel,
        tokenizer: Any = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        if isinstance(model_or_id, str):
            self.name = model_or_id
            model = AutoModelForCausalLM.from_pretrained(model_or_id, dtype=dtype or "auto", **hub)
            if tokenizer is None:
                tokenizer = _load_tokenizer(model_or_id, **hub)
        else:
            self.name = getattr(model_or_id.config, "name_or_path", "") or type(model_or_id).__name__
            model = model_or_id
        if isinstance(tokenizer, str):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code)
        self.model: PreTrainedModel | None = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.capabilities = TeacherCapabilities(form="dense")
        self._lazy: bool | None = None
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        head = model.get_output_embeddings()
        self.vocab_size: int = head.weight.shape[0] if head is not None else model.config.get_text_config().vocab_size
        # a tokenizer with more ids than the matrix has columns is not this model's: then only equal sizes are accepted
        self.num_tokens: int | None = None
        if tokenizer is not None and len(tokenizer) <= self.vocab_size:
            self.num_tokens = len(tokenizer)
        if device is not None:
            self.to(device)

    def to(self, device: str | torch.device) -> "HFTeacher":
        """Move the weights."""
        self._alive().to(device)
        return self

    def _alive(self) -> PreTrainedModel:
        if self.model is None:
            raise RuntimeError(f"The teacher {self.name} is closed: its weights are gone. Build a new HFTeacher.")
        return self.model

    @torch.no_grad()
    def signal(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> DenseSignal:
        """`(B, T)` ids and mask -> [`DenseSignal`]. Masked tokens are invisible: the teacher answers as if they were
        not there.

        Raises:
            ValueError: rows longer than the model knows positions for.
        """
        model = self._alive()
        if self._lazy is None:
            self._lazy = self._hidden_states_suffice()
        device = model.device
        input_ids = input_ids.to(device)
        if attention_mask is not None:
            attention_mask = attention_mask.to(device)
            if bool(attention_mask.all()):
                attention_mask = None
        known: dict[str, Any] = {"num_tokens": self.num_tokens, "tokenizer_id": self._tokenizer_id()}
        inputs = {"input_ids": input_ids}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask
            known["positions"] = speaking_positions(attention_mask)
            if self._takes_positions:
                inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        tokens = int(inputs["position_ids"].max()) + 1 if "position_ids" in inputs else input_ids.shape[1]
        if longest is not None and tokens > longest:
            raise ValueError(
                f"The teacher {self.name} reads the text as {tokens} tokens and knows {longest} positions: lower "
                "`block_size`."
            )
        values = self._hidden_states(**inputs) if self._lazy else model(**inputs, use_cache=False).logits
        if attention_mask is not None:
            # a row that may attend to nothing is NaN with some attention kernels, and NaN times a zero weight is NaN
            values = values.masked_fill(attention_mask[..., None] == 0, 0)
        if not self._lazy:
            return DenseSignal.from_logits(values, **known)
        return DenseSignal(hidden_states=values, projection=self._project, vocab_size=self.vocab_size, **known)

    @torch.no_grad()
    def target_logprobs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """`(B, T)` ids and mask, padded on the right -> `(B, T)` fp32: at t the log-probability of token t + 1 after
        the tokens up to t; 0 in the last column.

        Raises:
            ValueError: rows longer than the model knows positions for.
        """
        signal = self.signal(input_ids, attention_mask)
        device = signal.hidden_states.device
        targets = nn.functional.pad(input_ids.to(device)[:, 1:], (0, 1)).flatten()
        step = max(1, TARGET_CHUNK_ELEMENTS // self.vocab_size)
        parts = [
            -nn.functional.cross_entropy(signal.logits(index).float(), targets[index], reduction="none")
            for index in torch.arange(targets.numel(), device=device).split(step)
        ]
        return nn.functional.pad(torch.cat(parts).view(input_ids.shape)[:, :-1], (0, 1))

    def _hidden_states(self, **inputs: torch.Tensor) -> torch.Tensor:
        model = self._alive()
        return getattr(model, model.base_model_prefix)(**inputs, use_cache=False).last_hidden_state

    def _project(self, hidden: torch.Tensor) -> torch.Tensor:
        head: nn.Module = self._alive().get_output_embeddings()
        return head(hidden)

    @torch.no_grad()
    def _hidden_states_suffice(self) -> bool:
        model = self._alive()
        if model.get_output_embeddings() is None or getattr(model, model.base_model_prefix, model) is model:
            return False
        ids = torch.arange(1, 9, device=model.device)[None] % self.vocab_size
        logits = model(input_ids=ids, use_cache=False).logits.float()
        try:
            projected = self._project(self._hidden_states(input_ids=ids)).float()
        except (AttributeError, RuntimeError, TypeError):  # another kind of base model: hidden sizes or outputs differ
            projected = None
        same = (
            projected is not None
            and projected.shape == logits.shape
            and torch.allclose(projected, logits, rtol=1e-3, atol=1e-3)
        )
        if not same:
            logger.warning(
                "The logits of teacher %s are not its output matrix times its last hidden state: every batch will "
                "hold full logits, (batch x block_size x %d) numbers. Lower `per_device_train_batch_size` if memory "
                "runs out.",
                self.name,
                self.vocab_size,
            )
        return same

    def check(self) -> None:
        """One forward pass on eight tokens, with a masked first token.

        Raises:
            ValueError: if the model answers with numbers that are not finite (a corrupt download, fp16 overflow).
        """
        model = self._alive()
        ids = torch.arange(1, 9, device=model.device)[None] % self.vocab_size
        mask = torch.ones_like(ids)
        mask[:, 0] = 0
        logits = self.signal(ids, mask).logits(torch.arange(1, 8))
        if not bool(torch.isfinite(logits).all()):
            raise ValueError(
                f"The teacher {self.name} gives {int((~torch.isfinite(logits)).sum())} logits of "
                f"{logits.numel()} that are not finite in {model.dtype}. Load it in another dtype (`--teacher_dtype "
                "float32` or bfloat16), or check its files."
            )

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a student's tokenizer that reads text as other ids; see [`check_same_tokenizer`].

        Raises:
            ValueError: they differ, or the teacher's is unknown.
        """
        if self.tokenizer is None:
            raise ValueError(
                f"The teacher {self.name} came without a tokenizer, so nothing shows that its ids mean the student's. "
                "Pass HFTeacher(..., tokenizer=...)."
            )
        check_same_tokenizer(tokenizer, self.tokenizer)

    def _tokenizer_id(self) -> str | None:
        return (getattr(self.tokenizer, "name_or_path", "") or None) if self.tokenizer is not None else None

    def close(self) -> None:
        """Drop the weights. Signals made before keep what they need only until they are used: their projection raises
        afterwards."""
        self.model = None


def _load_tokenizer(name: str, **hub: Any) -> Any:
    try:
        return AutoTokenizer.from_pretrained(name, **hub)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("No tokenizer beside the teacher %s (%s).", name, str(error).splitlines()[0])
        return None
