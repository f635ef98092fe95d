"""Say what the teacher's endpoint has, allows and can do for distillation. Nothing is trained, a few tokens are asked.

    python scripts/check_api.py                                          # TEACHER_BACKEND of .env or the environment
    python scripts/check_api.py --teacher_backend vllm-remote --tokenizer checkpoints/ae

What the endpoint can do is tried: whether it says anything of given tokens (score), and of what it writes (sample).
With `--tokenizer` (a codec's directory, or a Hub id) the teacher is built as training builds it, tokenizer check
included. Exit status: 0 when the endpoint can be a teacher, 1 when it cannot, 2 for a wrong call.
"""

import argparse
from collections.abc import Sequence
from typing import Any


MODELS_SHOWN = 20


def main(argv: Sequence[str] | None = None) -> int:
    from trainers.teachers import BACKENDS, read_env

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--teacher_backend", choices=list(BACKENDS), help="default: TEACHER_BACKEND")
    parser.add_argument("--teacher", help="model; default: the environment's")
    parser.add_argument("--tokenizer", help="the student's: directory or Hub id")
    parser.add_argument("--kd_top_k", type=int)
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds until a silent server counts as away")
    arguments = parser.parse_args(argv)
    try:
        environment = read_env()
        backend = arguments.teacher_backend or environment.get("TEACHER_BACKEND", "hf")
        if backend not in BACKENDS:
            raise ValueError(f"TEACHER_BACKEND is {backend!r}, and can be {', '.join(BACKENDS)}.")
        able, needs = BACKENDS[backend]
        print(f"backend   {backend}: {needs}")
        mode = "score" if able.startswith("scores") else "sample"
        if backend in ("vllm-remote", "venice", "openai"):
            show_endpoint(backend, mode, environment, arguments.timeout, arguments.teacher)
        elif backend == "tgi":
            show_tgi(environment, arguments.timeout)
        else:
            print(f"mode      {mode}: it {able}")
        if arguments.tokenizer is not None:
            try_teacher(backend, environment, arguments)
        elif backend in ("hf", "vllm-local", "tgi"):
            print("next      pass --tokenizer checkpoints/ae to load or ask the teacher itself")
    except (ValueError, ConnectionError, ImportError, OSError) as error:
        print(f"FAILED    {error}")
        return 1
    return 0


def show_endpoint(
    backend: str, mode: str, environment: dict[str, str], timeout: float, teacher: str | None = None
) -> None:
    """Models with what they say about themselves, the limits of the key, and the modes that work.

    Raises:
        ValueError: training with this endpoint, key and model would be refused.
    """
    from trainers.teachers import FlowConfig, Secret
    from trainers.teachers.build import VENICE_MODEL
    from trainers.teachers.chat_api import VENICE_URL, gives_logprobs, list_models
    from trainers.teachers.http_server import HTTPServer, RequestRefused

    prefix, url_name = {
        "vllm-remote": ("VLLM_REMOTE", "VLLM_REMOTE_URL"),
        "venice": ("VENICE", "VENICE_BASE_URL"),
        "openai": ("OPENAI", "OPENAI_BASE_URL"),
    }[backend]
    url = environment.get(url_name, VENICE_URL if backend == "venice" else "")
    if not url:
        raise ValueError(f"{url_name} is not set: put it into .env or the environment.")
    key = Secret(environment.get(f"{prefix}_API_KEY"), f"{prefix}_API_KEY")
    server = HTTPServer(url, url_name, key, FlowConfig(patience=timeout, deadline=timeout))
    print(f"address   {server.url}; key {'set' if key else 'not set'} ({key.name})")
    try:
        models = list_models(server)
        wanted = teacher or environment.get(f"{prefix}_MODEL", VENICE_MODEL if backend == "venice" else None)
        able = {name: gives_logprobs(entry) for name, entry in models.items()}
        shown = sorted(models, key=lambda name: (name != wanted, not able[name], name))
        print(f"models    {len(models)}")
        for name in shown[:MODELS_SHOWN]:
            words = {True: "gives log-probabilities", False: "NO log-probabilities", None: ""}[able[name]]
            length = models[name].get("max_model_len") or (models[name].get("model_spec") or {}).get(
                "availableContextTokens"
            )
            print(f"  {'*' if name == wanted else ' '} {name}  {words}{f'  up to {length} tokens' if length else ''}")
        if len(shown) > MODELS_SHOWN:
            print(f"    ... and {len(shown) - MODELS_SHOWN} more")
        qualify = ", ".join(name for name in shown if able[name] is not False) or "none"
        if wanted is None and len(models) != 1:
            raise ValueError(f"{prefix}_MODEL is not set: choose one of {qualify}.")
        if wanted is not None and wanted not in models:
            named = "--teacher" if teacher else f"{prefix}_MODEL"
            raise ValueError(f"{named} is {wanted!r}, which is not listed. Models that qualify: {qualify}.")
        if wanted is not None and able[wanted] is False:
            raise ValueError(f"{wanted!r} gives no log-probabilities. Models that qualify: {qualify}.")
        if backend == "venice" and not key:
            raise ValueError(f"{key.name} is not set: put it into .env or the environment.")
        if backend == "venice":
            try:
                print(f"limits    {server.ask('GET', '/v1/api_keys/rate_limits')}"[:2000])
            except RequestRefused as error:
                print(f"limits    unknown: {error.said}")
        name = wanted or next(iter(models))
        show_modes(
            {"score": try_scoring(server, name), "sample": try_writing(server, name, backend == "venice")},
            mode,
            f"The backend {backend} needs {mode}, and {server.url}",
        )
    finally:
        server.close()


def show_tgi(environment: dict[str, str], timeout: float) -> None:
    """The model of a text-generation-inference server, its limits, and that its texts come with alternatives.

    Raises:
        ValueError: training with it would be refused.
    """
    from trainers.teachers import FlowConfig, Secret
    from trainers.teachers.http_server import HTTPServer

    if not environment.get("TGI_URL"):
        raise ValueError("TGI_URL is not set: put it into .env or the environment.")
    key = Secret(environment.get("TGI_API_KEY"), "TGI_API_KEY")
    server = HTTPServer(environment["TGI_URL"], "TGI_URL", key, FlowConfig(patience=timeout, deadline=timeout))
    print(f"address   {server.url}; key {'set' if key else 'not set'} ({key.name})")
    try:
        info = server.ask("GET", "/info")
        if not isinstance(info, dict) or "model_id" not in info:
            raise ValueError(f"{server.url}: /info names no model: this is no text-generation-inference server.")
        print(f"model     {info['model_id']} {info.get('model_sha') or ''}".rstrip())
        limits = {name: info[name] for name in sorted(info) if name.startswith("max_")}
        print(f"limits    {limits}")
        parameters = {"max_new_tokens": 1, "details": True, "decoder_input_details": True, "top_n_tokens": 1}
        reply = server.ask("POST", "/generate", {"inputs": "The", "parameters": parameters})
        details = reply.get("details") if isinstance(reply, dict) else None
        lacks = [name for name in ("prefill", "top_tokens") if not (details or {}).get(name)]
        show_modes(
            {
                "score": "of given text it tells each token's own probability alone",
                "sample": f"its texts come without {' and '.join(lacks)}" if lacks else None,
            },
            "sample",
            f"The backend tgi needs sample, and {server.url}",
        )
    finally:
        server.close()


def show_modes(found: dict[str, str | None], needed: str, who: str) -> None:
    """Of each mode why it does not work; None: it does.

    Raises:
        ValueError: the one that is needed does not.
    """
    for mode, problem in found.items():
        print(f"mode      {mode}: {'yes' if problem is None else f'no, {problem}'}")
    if found[needed] is not None:
        raise ValueError(f"{who} cannot: {found[needed]}")


def try_scoring(server: Any, model: str) -> str | None:
    """Whether it gives log-probabilities of given token ids; None: it does, else what came instead."""
    from trainers.teachers.vllm_http import COMPLETIONS, GENERATE

    sampling = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 1}
    problem = ""
    for path, body in (
        (GENERATE, {"token_ids": [1, 2], "sampling_params": sampling}),
        (COMPLETIONS, {"prompt": [1, 2], **sampling}),
    ):
        try:
            reply = server.ask("POST", path, {"model": model, **body})
            holder = reply if path == GENERATE else reply["choices"][0]
            if len(holder["prompt_logprobs"]) == 2:
                return None
            problem = f"{path} says nothing of each given token"
        except (KeyError, IndexError, TypeError):
            problem = f"{path} dropped the field prompt_logprobs without a word"
        except (ValueError, ConnectionError) as error:
            problem = str(error)
    return problem


def try_writing(server: Any, model: str, venice: bool) -> str | None:
    """Whether what it writes comes with log-probabilities; None: it does, else what came instead."""
    from trainers.teachers.chat_api import logprobs_of

    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": "The"}],
        "max_tokens": 1,
        "temperature": 1.0,
        "logprobs": True,
        "top_logprobs": 1,
    }
    if venice:
        body["venice_parameters"] = {"include_venice_system_prompt": False}
    try:
        reply = server.ask("POST", "/v1/chat/completions", body)
        choice = reply["choices"][0]
        # a text that ended at once has none
        if logprobs_of(choice) or logprobs_of(choice) is not None and not choice["message"].get("content"):
            return None
        return "its texts come without log-probabilities"
    except (KeyError, IndexError, TypeError, AttributeError):
        return "its texts come without log-probabilities"
    except (ValueError, ConnectionError) as error:
        return str(error)


def try_teacher(backend: str, environment: dict[str, str], arguments: argparse.Namespace) -> None:
    """Build it as training does, and ask it once."""
    from transformers import AutoTokenizer

    from trainers.command_line import model_path
    from trainers.teachers import build_teacher

    tokenizer = AutoTokenizer.from_pretrained(model_path("--tokenizer", arguments.tokenizer))
    teacher_name = arguments.teacher
    if teacher_name is not None and backend in ("hf", "vllm-local"):  # a server gives its models names of its own
        teacher_name = model_path("--teacher", teacher_name)
    teacher = build_teacher(
        backend,
        tokenizer,
        environment,
        teacher_name,
        k=arguments.kd_top_k,
        max_tokens=4,
        patience=arguments.timeout,
    )
    try:
        teacher.check()
        print(f"teacher   {teacher!r}")
        for name in ("path", "max_model_len", "k"):
            if getattr(teacher, name, None) is not None:
                print(f"  {name}: {getattr(teacher, name)}")
        print("OK        it answers as training needs it")
    finally:
        teacher.close()


if __name__ == "__main__":
    from trainers.command_line import run

    run(main, returns_status=True)
