"""One name for each way to a teacher (`TEACHER_BACKEND`), and what each reads from the environment."""

from collections.abc import Mapping
from typing import Any

from .base import check_vocabulary
from .chat_api import VENICE_FAILURES, VENICE_URL, ChatWriter
from .env import Secret
from .flow import FlowConfig
from .hf_teacher import HFTeacher
from .tgi import TGIWriter
from .vllm_http import VLLMServerTeacher


# backend -> what it can do, and what it needs
SCORES, WRITES = "scores given text", "writes its own text"
BACKENDS = {
    "hf": (SCORES, "a model in this process, with full distributions; --teacher"),
    "vllm-local": (
        SCORES,
        "vLLM in this process, in the environment of make setup-vllm; --teacher or VLLM_LOCAL_MODEL",
    ),
    "vllm-remote": (SCORES, "a vLLM server; VLLM_REMOTE_URL, VLLM_REMOTE_API_KEY, VLLM_REMOTE_MODEL"),
    "venice": (WRITES, "the Venice API; VENICE_API_KEY, VENICE_MODEL, VENICE_BASE_URL"),
    "openai": (WRITES, "another chat API; OPENAI_BASE_URL, OPENAI_API_KEY, OPENAI_MODEL"),
    "tgi": (WRITES, "a text-generation-inference server; TGI_URL, TGI_API_KEY"),
}
VENICE_MODEL = (
    "qwen3-next-80b"  # the first LatentForge's; it gives no log-probabilities, and Venice's list says which do
)


def build_teacher(
    backend: str,
    tokenizer: Any,
    environment: Mapping[str, str],
    model: str | None = None,
    *,
    mode: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    k: int | None = None,
    max_tokens: int = 256,
    seed: int | None = None,
    vocab_size: int | None = None,
    patience: float | None = None,
) -> Any:
    """A [`Teacher`], or a [`Writer`] where the backend only writes.

    Args:
        backend: one of `BACKENDS`.
        tokenizer: the student's.
        environment: from [`read_env`].
        model: overrides the environment's.
        mode: `score` or `sample`, refused where the backend cannot; default, what it can.
        dtype, revision: of the weights; for a server, what the user declares.
        k: entries per token; default 20, or 5 over TGI.
        max_tokens, seed: of written texts.
        vocab_size: the student's; a remote teacher whose ids cannot be the student's is refused.
        patience: seconds to wait for a server that stays away.

    Raises:
        ValueError: an unknown backend, one that cannot do `mode`, or a variable that is missing; says which.
    """
    if backend not in BACKENDS:
        raise ValueError(f"There is no teacher backend {backend!r}: TEACHER_BACKEND is one of {', '.join(BACKENDS)}.")
    can = {SCORES: "score", WRITES: "sample"}[BACKENDS[backend][0]]
    if mode is not None and mode != can:
        able = ", ".join(name for name, (does, _) in BACKENDS.items() if (does == SCORES) == (mode == "score"))
        raise ValueError(
            f"The backend {backend!r} cannot {mode}: it {BACKENDS[backend][0]} only. Backends that can: {able}."
        )

    def get(name: str, what: str) -> str:
        if not environment.get(name):
            raise ValueError(f"The backend {backend!r} needs {name} ({what}): put it into .env or the environment.")
        return environment[name]

    def number(name: str, kind: type) -> Any:
        try:
            return kind(environment[name]) if environment.get(name) else None
        except ValueError:
            raise ValueError(f"{name} must be a number, got {environment[name]!r}.") from None

    def flow(**more: Any) -> FlowConfig:
        return FlowConfig(**more) if patience is None else FlowConfig(patience=patience, **more)

    teacher: Any
    if backend == "hf":
        if model is None:
            raise ValueError("The backend 'hf' needs --teacher: the Hub id or directory of a causal LM.")
        teacher = HFTeacher(model, dtype=dtype, revision=revision)
        teacher.check_tokenizer(tokenizer)
    elif backend == "vllm-local":
        from .vllm_local import VLLMLocalTeacher

        teacher = VLLMLocalTeacher(
            model or get("VLLM_LOCAL_MODEL", "Hub id or directory of the model"),
            tokenizer,
            k=k or 20,
            revision=revision,
            dtype=environment.get("VLLM_DTYPE", "auto") if dtype == "auto" else dtype,
            quantization=environment.get("VLLM_QUANTIZATION"),
            gpu_memory_utilization=number("VLLM_GPU_MEMORY_UTIL", float),
            max_model_len=number("VLLM_MAX_MODEL_LEN", int),
            tensor_parallel_size=number("VLLM_TENSOR_PARALLEL", int),
        )
    elif backend == "vllm-remote":
        teacher = VLLMServerTeacher(
            get("VLLM_REMOTE_URL", "address of the server, as http://10.0.0.5:8000/v1"),
            tokenizer,
            model=model or environment.get("VLLM_REMOTE_MODEL"),
            key=Secret(environment.get("VLLM_REMOTE_API_KEY"), "VLLM_REMOTE_API_KEY"),
            k=k or 20,
            revision=revision or environment.get("VLLM_REMOTE_REVISION"),
            dtype=environment.get("VLLM_REMOTE_DTYPE", "auto") if dtype == "auto" else dtype,
            config=flow(),
        )
    elif backend == "tgi":
        teacher = TGIWriter(
            get("TGI_URL", "address of the server"),
            tokenizer,
            key=Secret(environment.get("TGI_API_KEY"), "TGI_API_KEY"),
            k=k or 5,
            max_tokens=max_tokens,
            seed=seed,
            config=flow(),
        )
    else:
        venice = backend == "venice"
        prefix = "VENICE" if venice else "OPENAI"
        key = Secret(get(f"{prefix}_API_KEY", "your key"), f"{prefix}_API_KEY")
        teacher = ChatWriter(
            environment.get("VENICE_BASE_URL", VENICE_URL)
            if venice
            else get("OPENAI_BASE_URL", "address of the service, as https://api.example.org/v1"),
            model or (environment.get("VENICE_MODEL", VENICE_MODEL) if venice else get("OPENAI_MODEL", "its name")),
            tokenizer,
            key=key,
            k=k or 20,
            max_tokens=max_tokens,
            venice=venice,
            seed=seed,
            config=flow(**({"failure_budget": VENICE_FAILURES} if venice else {})),
            url_name=f"{prefix}_BASE_URL",
        )
    if vocab_size is not None:
        try:
            check_vocabulary(vocab_size, teacher.vocab_size, teacher.num_tokens, teacher.name)
        except ValueError:
            teacher.close()
            raise
    return teacher
