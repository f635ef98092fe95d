"""Serve a student over HTTP: the first LatentForge's routes and OpenAI's.

    python scripts/serve.py --model runs/demo/student
    curl http://127.0.0.1:7860/generate -H 'Content-Type: application/json' -d '{"prompt": "def main("}'
    python -c "from openai import OpenAI; print(OpenAI(base_url='http://127.0.0.1:7860/v1', api_key='none')
        .completions.create(model='student', prompt='def main(').choices[0].text)"

Requests are written together, a patch at a time, and join and leave between patches. A key that callers must send
comes from LATENTFORGE_API_KEY, of `.env` or the environment. SIGTERM finishes what has begun and ends with 0. One line
of JSON per request goes to standard error; prompts only with --log_prompts.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


# `python scripts/serve.py` finds what stands beside this file, and not the room that it is in
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@dataclass
class ServeArguments:
    """What to serve, where, and how much at once."""

    model: str = field(
        default="checkpoints/student",
        metadata={"help": "Directory of a trained student, or a Hub id.", "aliases": ["--student"]},
    )
    host: str = field(default="127.0.0.1", metadata={"help": "0.0.0.0 for callers from elsewhere; then set a key."})
    port: int = field(default=7860, metadata={"help": "0 takes a free one."})
    model_name: str | None = field(default=None, metadata={"help": "For callers. Default: the last part of --model."})
    device: str | None = field(default=None, metadata={"help": "Default: cuda where there is one, else cpu."})
    bf16: bool = field(default=False, metadata={"help": "Run in bfloat16."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model code of a Hub repository."})
    chat_template: str | None = field(
        default=None, metadata={"help": "File with a Jinja template of chats. Default: the tokenizer's own."}
    )
    max_rows: int = field(default=32, metadata={"help": "Texts that are written together."})
    max_waiting: int = field(default=256, metadata={"help": "Requests in the queue; more are told to come back."})
    max_tokens: int | None = field(
        default=None, metadata={"help": "Prompt and text of a request. Default: what the model was made for."}
    )
    cache_gib: float = field(default=2.0, metadata={"help": "Memory for keys and values."})
    prefill_tokens: int = field(default=512, metadata={"help": "Of prompts, read between two patches of the others."})
    max_body: int = field(default=2 << 20, metadata={"help": "Bytes of a request."})
    deadline: float = field(default=600.0, metadata={"help": "Seconds for one request; 0 for no limit."})
    drain_seconds: float = field(default=30.0, metadata={"help": "For what has begun, when the server is stopped."})
    max_connections: int = field(default=1024, metadata={"help": "At once; more get 503."})
    cors_origins: list[str] | None = field(
        default=None, metadata={"help": "Origins that browsers may call from; * for all. Default: none."}
    )
    log_prompts: bool = field(default=False, metadata={"help": "Write prompts to the log."})

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port must lie between 0 and 65535, got {self.port}")
        for name in ("deadline", "drain_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more seconds, got {getattr(self, name)}")
        for name in ("cache_gib", "max_body", "max_connections"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.chat_template is not None and not Path(self.chat_template).is_file():
            raise ValueError(f"chat_template: there is no file {self.chat_template}")
        from trainers.command_line import model_path

        self.model = model_path("model", self.model, self.trust_remote_code)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, load, serve until a signal comes."""
    from trainers.arguments import parse_arguments

    (arguments,) = parse_arguments(ServeArguments, argv=argv, description=__doc__)
    try:
        from scripts.serving.server import serve
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: pip install 'latentforge[serve]'.") from error
    app, engine = build_service(arguments)
    serve(app, engine, arguments.host, arguments.port, arguments.drain_seconds, arguments.max_connections)


def build_service(arguments: ServeArguments) -> tuple[Any, Any]:
    """The application, and the engine behind it, running.

    Raises:
        ValueError: no student, or limits that leave no room for a row.
    """
    from scripts.serving.app import ServerConfig, build_app
    from scripts.serving.engine import Engine, EngineConfig
    from scripts.serving.metrics import Metrics
    from trainers.teachers.env import read_env

    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("latentforge").setLevel(logging.INFO)
    model, tokenizer = load(arguments)
    metrics = Metrics()
    limits = EngineConfig(
        arguments.max_rows,
        arguments.max_waiting,
        arguments.max_tokens,
        int(arguments.cache_gib * 2**30),
        arguments.prefill_tokens,
    )
    engine = Engine(model, tokenizer, limits, metrics.observe)
    key = read_env().get("LATENTFORGE_API_KEY")
    if key is None and arguments.host not in ("127.0.0.1", "localhost", "::1"):
        print(f"anybody who reaches {arguments.host} may use this server: set LATENTFORGE_API_KEY", file=sys.stderr)
    config = ServerConfig(
        arguments.model_name or Path(arguments.model).name,
        key,
        tuple(arguments.cors_origins or ()),
        arguments.max_body,
        deadline=arguments.deadline or None,
        log_prompts=arguments.log_prompts,
        version=version(),
    )
    return build_app(engine, config, metrics), engine


def load(arguments: ServeArguments) -> tuple[Any, Any]:
    """Model and tokenizer, on their device.

    Raises:
        ValueError: no student.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import modeling_latentforge  # noqa: F401  (registers our models with the Auto classes)
    from trainers.command_line import check_writes_text, choose_device

    device, trust = choose_device(arguments.device), arguments.trust_remote_code
    check_writes_text("model", arguments.model, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16 if arguments.bf16 else torch.float32, trust_remote_code=trust
    )
    if not hasattr(model.config, "patch_size"):
        raise ValueError(
            f"model: {arguments.model} is a {model.config.model_type} of tokens, and this server writes patches: "
            "serve it with vLLM or transformers, or pass a student."
        )
    if arguments.chat_template is not None:
        tokenizer.chat_template = Path(arguments.chat_template).read_text(encoding="utf-8")
    return model.to(device).eval(), tokenizer


def version() -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("latentforge")
    except PackageNotFoundError:
        return "0"


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
