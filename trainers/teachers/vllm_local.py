"""vLLM in this process as teacher: the fastest way to score, with no server between.

Needs the environment of `make setup-vllm` (vLLM pins an older transformers than this project's newest). A script that
builds one must guard its body by `if __name__ == "__main__"`: vLLM starts processes that import it.
"""

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .base import SparseSignal, TeacherCapabilities, TeacherIdentity, check_same_tokenizer
from .flow import BadReply
from .identity import tokenizer_hash
from .scored import ScoredRow, check_row, check_score_temperature, score_batch


class VLLMLocalTeacher:
    """vLLM's `LLM`, token ids in and flat arrays out: nothing is decoded to text.

    Args:
        model: Hub id or directory.
        tokenizer: the student's; the teacher's must be the same.
        k: entries per token.
        temperature: 1; see [`check_score_temperature`].
        revision: Hub revision; for a directory, what the user declares.
        dtype: of the weights: auto, float32, bfloat16, ...
        quantization: gptq, awq, fp8, ...; default, what the checkpoint says.
        gpu_memory_utilization: share of the GPU's memory that vLLM takes; leave room for the student.
        max_model_len: longest row plus one.
        tensor_parallel_size: GPUs.
        engine: passed on to vLLM as it is.

    Raises:
        ImportError: there is no vLLM here.
        ValueError: another tokenizer.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        k: int = 20,
        temperature: float = 1.0,
        revision: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        gpu_memory_utilization: float | None = None,
        max_model_len: int | None = None,
        tensor_parallel_size: int | None = None,
        **engine: Any,
    ):
        check_score_temperature(temperature)
        try:
            from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            raise ImportError(
                "TEACHER_BACKEND=vllm-local runs vLLM in this process and needs its environment: `make setup-vllm`, "
                "then `make train-student-vllm-local`. A vLLM server is reached with TEACHER_BACKEND=vllm-remote."
            ) from error
        given = {
            "revision": None if _is_directory(model) else revision,
            "quantization": quantization,
            "gpu_memory_utilization": gpu_memory_utilization,
            "max_model_len": max_model_len,
            "tensor_parallel_size": tensor_parallel_size,
            **engine,
        }
        given = {name: value for name, value in given.items() if value is not None}
        self.name, self.k, self.tokenizer = model, k, tokenizer
        self._llm: Any = LLM(model=model, dtype=dtype, max_logprobs=k, **given)
        self._sampling = SamplingParams(
            max_tokens=1, temperature=1.0, prompt_logprobs=k, flat_logprobs=True, detokenize=False
        )
        config = self._llm.llm_engine.model_config
        self.max_model_len: int = config.max_model_len
        self.vocab_size: int = config.get_vocab_size()
        self.num_tokens: int | None = len(tokenizer)
        self.revision = getattr(config.hf_config, "_commit_hash", None) or revision
        self.numerics = config.quantization or str(config.dtype).removeprefix("torch.")
        self.capabilities = TeacherCapabilities(form="sparse", any_temperature=False)
        check_same_tokenizer(tokenizer, self._llm.get_tokenizer())

    def __repr__(self) -> str:
        return f"VLLMLocalTeacher({self.name!r}, k={self.k})"

    @property
    def identity(self) -> TeacherIdentity:
        """What a stored answer depends on.

        Raises:
            ValueError: the weights are a directory's, and no revision was declared.
        """
        if self.revision is None:
            raise ValueError("The weights of a directory have no revision: pass --teacher_revision to name them.")
        return TeacherIdentity(self.name, self.revision, self.numerics, tokenizer_hash(self.tokenizer))

    def signal(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SparseSignal:
        """`(B, T)` ids and mask -> the `k` most likely ids everywhere."""
        return score_batch(
            input_ids,
            attention_mask,
            self.k,
            self._score,
            self.vocab_size,
            num_tokens=self.num_tokens,
            tokenizer_id=getattr(self.tokenizer, "name_or_path", "") or None,
        )

    def _score(self, rows: Sequence[list[int]]) -> Iterator[ScoredRow]:
        if self._llm is None:
            raise RuntimeError(f"The teacher {self.name} is closed. Build a new VLLMLocalTeacher.")
        longest = max(map(len, rows), default=0)
        if longest >= self.max_model_len:
            raise ValueError(
                f"A row has {longest} tokens, and the teacher takes {self.max_model_len} with the one that vLLM "
                f"always writes: set VLLM_MAX_MODEL_LEN={longest + 1}, or lower --block_size."
            )
        prompts = [{"prompt_token_ids": row} for row in rows]
        for row, output in zip(rows, self._llm.generate(prompts, self._sampling, use_tqdm=False), strict=True):
            flat = output.prompt_logprobs
            width = self.k + 1  # the given token, then the ranks 1..k
            if flat is None or len(flat.logprobs) != (len(row) - 1) * width:
                raise BadReply(
                    f"vLLM gave {0 if flat is None else len(flat.logprobs)} log-probabilities for {len(row) - 1} "
                    f"tokens of {width}."
                )
            ids = np.asarray(flat.token_ids, dtype=np.int64).reshape(-1, width)[:, 1:]
            logprobs = np.asarray(flat.logprobs, dtype=np.float64).reshape(-1, width)[:, 1:]
            check_row(ids, logprobs, "vLLM")
            yield ids, logprobs

    def check(self) -> None:
        """Score two tokens."""
        next(iter(self._score([[0, 1]])))

    def close(self) -> None:
        """End vLLM's processes and give the memory back."""
        llm, self._llm = self._llm, None
        core = getattr(getattr(llm, "llm_engine", None), "engine_core", None)
        if core is not None and hasattr(core, "shutdown"):
            core.shutdown()
        del llm, core
        gc.collect()


def _is_directory(name: str) -> bool:
    from pathlib import Path

    return Path(name).is_dir()
