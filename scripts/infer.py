"""Continue a text with a student (or any causal LM), printed as it is written.

    python scripts/infer.py --model runs/demo/student --prompt "def main(" --max_new_tokens 64
    python scripts/infer.py --model runs/demo/student --temperature 0          # greedy, from an empty prompt
    python scripts/infer.py --model runs/demo/student --interactive            # a prompt a line, until an empty one

With --interactive, --prompt is the first of the prompts. Text goes to standard output, speed and the count of backbone
steps to standard error.
"""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any


@dataclass
class InferArguments:
    """What to write, and how."""

    model: str = field(
        default="checkpoints/student",
        metadata={"help": "Directory of a trained student, or a Hub id.", "aliases": ["--student"]},
    )
    prompt: str = field(default="", metadata={"help": "Text to continue; empty starts a new document."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens to write at most."})
    temperature: float | None = field(
        default=None,
        metadata={"help": "0 always takes the likeliest token (greedy). Default: 0.8; 1 for an aligned head."},
    )
    top_p: float = field(default=1.0, metadata={"help": "Sample among the likeliest tokens of this mass, in (0, 1]."})
    top_k: int = field(default=0, metadata={"help": "Sample among so many likeliest tokens; 0 for all."})
    seed: int = field(default=42, metadata={"help": "Seed of the sampling."})
    bf16: bool = field(default=False, metadata={"help": "Run in bfloat16."})
    use_kv_cache: bool = field(
        default=True, metadata={"help": "Keep keys and values; without, slower and equal (greedy)."}
    )
    interactive: bool = field(
        default=False, metadata={"help": "Read prompts from standard input, one a line; --prompt is the first."}
    )
    device: str | None = field(default=None, metadata={"help": "Default: cuda where there is one, else cpu."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model code of a Hub repository."})

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p}: 1 keeps every token")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, got {self.top_k}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        from trainers.command_line import model_path

        self.model = model_path("model", self.model, self.trust_remote_code)


def main(argv: Sequence[str] | None = None) -> None:
    from trainers.arguments import parse_arguments

    (arguments,) = parse_arguments(InferArguments, argv=argv, description=__doc__)

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import modeling_latentforge  # noqa: F401  (registers our models with the Auto classes)
    from trainers.command_line import check_writes_text, choose_device, describe

    device = choose_device(arguments.device)
    trust = arguments.trust_remote_code
    check_writes_text("model", arguments.model, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.bfloat16 if arguments.bf16 else torch.float32, trust_remote_code=trust
    )
    model.to(device).eval()
    head = getattr(model.config, "head_config", None)
    if arguments.temperature is None:  # an aligned head's noise chooses whole patches: there is no other temperature
        arguments.temperature = 1.0 if head is not None and head.head_type == "aligned" else 0.8
    if head is not None and head.head_type != "regression" and arguments.temperature and not arguments.use_kv_cache:
        raise ValueError(
            f"a head of type {head.head_type} samples with its cache only: drop --no_use_kv_cache, or set "
            "--temperature 0"
        )
    if not arguments.interactive:
        _continue(arguments.prompt, arguments, model, tokenizer)
        return
    print("a prompt a line; an empty line ends", file=sys.stderr)
    first = [arguments.prompt] if arguments.prompt.strip() else []
    for prompt in chain(first, (line.rstrip("\n") for line in sys.stdin)):
        if not prompt.strip():
            break
        try:
            _continue(prompt, arguments, model, tokenizer)
        except ValueError as error:  # of this line: the next may be shorter
            print(f"error: {describe(error)}", file=sys.stderr)


def _continue(prompt: str, arguments: InferArguments, model: Any, tokenizer: Any) -> None:
    from transformers import TextStreamer, set_seed

    from trainers.evaluation.speed import count_backbone_steps

    input_ids = encode_prompt(prompt, tokenizer).to(model.device)
    set_seed(arguments.seed)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if arguments.temperature:
        sampling = {
            "do_sample": True,
            "temperature": arguments.temperature,
            "top_p": arguments.top_p,
            "top_k": arguments.top_k,
        }
    start = time.perf_counter()
    with count_backbone_steps(model) as steps:
        written = model.generate(
            input_ids,
            max_new_tokens=arguments.max_new_tokens,
            use_cache=arguments.use_kv_cache,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
            **sampling,
        )
    seconds = time.perf_counter() - start
    count = written.shape[1] - input_ids.shape[1]
    print(
        f"{count} tokens in {seconds:.2f} s ({count / seconds:.1f} tokens/s), {steps.count} backbone steps",
        file=sys.stderr,
    )


def encode_prompt(prompt: str, tokenizer: Any) -> Any:
    """Ids `(1, T)` of a prompt, without the EOS that a tokenizer may add; an empty prompt is the start of a document.

    Raises:
        ValueError: an empty prompt for a tokenizer that has neither BOS nor EOS.
    """
    import torch

    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if not ids:
        start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
        if start is None:
            raise ValueError("the prompt is empty and the tokenizer has no BOS or EOS to start from: give a prompt")
        ids = [start]
    return torch.tensor([ids])


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
