"""How near labelling a data set comes to what the real vLLM can do: tokens/s into a store, against tokens/s that
nobody reads. Runs in the environment of `make setup-vllm`:

    .venv-vllm/bin/python -m trainers.evaluation.vllm_labelling DIRECTORY STORE               # vLLM in this process
    .venv-vllm/bin/python -m trainers.evaluation.vllm_labelling DIRECTORY STORE --url http://127.0.0.1:8000

`DIRECTORY` holds a model and its tokenizer. Prints one line of JSON, the last one.
"""

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np


LENGTH, K = 512, 20
IN_FLIGHT = (4, 8, 16)  # requests at once; the ceiling is the fastest


def rows_of_text(tokenizer: Any, count: int, length: int = LENGTH) -> list[list[int]]:
    """Rows of the standard library's source, no two alike."""
    ids: list[int] = []
    for path in sorted(Path(json.__file__).parent.parent.glob("*.py")):
        ids += tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        if len(ids) >= count * length:
            return [ids[start : start + length] for start in range(0, count * length, length)]
    raise ValueError(f"the standard library has {len(ids)} tokens, asked for {count * length}")


def raw_http(url: str, rows: Sequence[list[int]], path: str, model: str, in_flight: int) -> float:
    """Seconds until every row was scored by the server and its answer thrown away unread."""
    import http.client
    from urllib.parse import urlsplit

    waiting, lock = iter(rows), threading.Lock()

    def work() -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=600)
        while True:
            with lock:
                row = next(waiting, None)
            if row is None:
                break
            sampling = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": K, "detokenize": False}
            body = (
                {"model": model, "token_ids": row, "sampling_params": sampling}
                if "generate" in path
                else {"model": model, "prompt": row, "max_tokens": 1, "prompt_logprobs": K}
            )
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            reply = connection.getresponse()
            while reply.read(2**16):
                pass
            if reply.status != 200:
                raise RuntimeError(f"{path} answers {reply.status}")
        connection.close()

    start = time.perf_counter()
    with ThreadPoolExecutor(in_flight) as pool:
        for done in [pool.submit(work) for _ in range(in_flight)]:
            done.result()
    return time.perf_counter() - start


def labelled(teacher: Any, rows: Sequence[list[int]], store: Path, batch_size: int) -> float:
    """Seconds until every row's answer lies in a store of its own, and is whole."""
    from ..teachers.labelling import TeacherPool, label
    from ..teachers.store import Shape, SQLiteStore

    for file in store.parent.glob(f"{store.name}*"):
        file.unlink()
    ids = np.asarray(rows)
    columns = _Columns({"input_ids": ids, "attention_mask": np.ones_like(ids)})
    kept = SQLiteStore(store)
    start = time.perf_counter()
    statistics_ = label(columns, TeacherPool([teacher]), kept, Shape(K), batch_size)
    seconds = time.perf_counter() - start
    if statistics_.asked != len(rows) or statistics_.unanswered or len(kept) != len(rows):
        raise RuntimeError(f"{len(kept)} of {len(rows)} rows are in the store: {statistics_}")
    kept.close()
    return seconds


class _Columns:
    """What `label` needs of a data set."""

    def __init__(self, columns: dict[str, np.ndarray]):
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, part: slice) -> dict[str, np.ndarray]:
        return {name: values[part] for name, values in self.columns.items()}


def compare(
    raw: dict[str, Callable[[], float]], kept: Callable[[], float], num_tokens: int, rounds: int
) -> dict[str, Any]:
    """Tokens/s of both, in turns, every second round backwards; medians. `share` is the median over rounds of the
    ratio to the `raw` whose median is the fastest: a shared machine's speed changes from round to round by more than
    what is measured (5,400 to 7,300 tokens/s of the same work within minutes)."""
    ways: dict[str, Callable[[], float]] = {**raw, "labelled": kept}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name in list(ways) if turn % 2 == 0 else reversed(ways):
            times[name].append(ways[name]())
    rates = {name: num_tokens / statistics.median(values) for name, values in times.items()}
    best = max(raw, key=rates.__getitem__)
    shares = [alone / labelled for alone, labelled in zip(times[best], times["labelled"], strict=True)]
    return {"tokens_per_second": rates, "share": statistics.median(shares), "shares": shares, "seconds": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--url", help="of a server that serves the folder; default: vLLM in this process")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=6)
    arguments = parser.parse_args()
    from transformers import AutoTokenizer

    from trainers.teachers import VLLMLocalTeacher, VLLMServerTeacher

    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    rows = rows_of_text(tokenizer, arguments.rows)
    teacher: Any
    raw: dict[str, Callable[[], float]]
    if arguments.url:
        teacher = VLLMServerTeacher(arguments.url, tokenizer, k=K, revision="1", dtype="float32")
        raw = {
            f"{number} at once": partial(raw_http, arguments.url, rows, teacher.path, teacher.name, number)
            for number in IN_FLIGHT
        }
    else:
        teacher = VLLMLocalTeacher(
            str(arguments.folder),
            tokenizer,
            k=K,
            dtype="float32",
            max_model_len=LENGTH + 1,
            revision="1",
            enforce_eager=True,
        )
        raw = {"vLLM alone": lambda: _generate(teacher, rows)}
    try:
        labelled(teacher, rows[:32], arguments.store, 32)  # warm
        found = compare(
            raw, lambda: labelled(teacher, rows, arguments.store, 64), len(rows) * LENGTH, arguments.rounds
        )
        found["path"] = getattr(teacher, "path", "in process")
    finally:
        teacher.close()
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def _generate(teacher: Any, rows: Sequence[list[int]]) -> float:
    """Seconds of vLLM's own scoring, in its fastest form, its answers dropped."""
    prompts = [{"prompt_token_ids": row} for row in rows]
    start = time.perf_counter()
    teacher._llm.generate(prompts, teacher._sampling, use_tqdm=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
    # with the result printed and the engine shut down, vLLM's threads abort now and then while Python ends
    sys.stdout.flush()
    os._exit(0)
