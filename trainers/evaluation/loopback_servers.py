"""Servers on 127.0.0.1 for measurements: one with a capacity, and a stand-in for vLLM.

`FakeVLLM` has the reply shapes measured on vLLM 0.32 over a local transformers model. It is a double: what real vLLM
does beyond these shapes it does not show.
"""

import asyncio
import json
import math
import socket
import threading
import time
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch


class Cut(Exception):
    """Close the connection in the middle of the answer."""


class LoopbackServer:
    """An HTTP server on a free port of 127.0.0.1; subclasses say what it answers. A context manager.

    Attributes:
        url: where it is.
        requests: `(method, path, body, headers)` of all that came.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Any, dict[str, str]]] = []
        self.stopping = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._serve("GET", None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                self._serve("POST", json.loads(body or b"null"))

            def _serve(self, method: str, body: Any) -> None:
                headers = {name.lower(): value for name, value in self.headers.items()}
                outer.requests.append((method, self.path, body, headers))
                try:
                    status, more, reply = outer.answer(method, self.path, body, headers)
                except Cut:
                    # promise more than comes
                    self.send_response(200)
                    self.send_header("content-length", "100000")
                    self.end_headers()
                    self.wfile.write(b'{"choices": [')
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                content = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                try:
                    self.send_response(status)
                    self.send_header("content-type", "application/json")
                    self.send_header("content-length", str(len(content)))
                    for name, value in more.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the client gave up
                    self.close_connection = True

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def answer(self, method: str, path: str, body: Any, headers: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        """Status, headers, and JSON or bytes."""
        raise NotImplementedError

    def sleep(self, seconds: float) -> None:
        """Wait, or until the server stops."""
        self.stopping.wait(seconds)

    def close(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


Fault = str | tuple[int, dict[str, str]] | None


MADE_UP = "made up"


def _made_up_rows(ids: list[int], k: int) -> bytes:
    """JSON of made-up `prompt_logprobs` as text: a server that only sleeps must not take a core for its answers."""
    entries = [f'"{i}":{{"logprob":{-3.0 - 0.1 * i:.6f},"rank":{i + 1},"decoded_token":null}}' for i in range(k)]
    likely, last = ",".join(entries), f'{{"logprob":-9.0,"rank":{k + 1},"decoded_token":null}}'
    return ("[null" + "".join(f',{{"{target}":{last},{likely}}}' for target in ids[1:]) + "]").encode()


class FakeVLLM(LoopbackServer):
    """vLLM's OpenAI server, as far as a scoring client sees it.

    Args:
        model, tokenizer: of transformers; what it serves. None for the model: answers are made up, at no cost.
        name: under which it is served.
        scale_out: whether `/inference/v1/generate` is open (`--enable-scale-out`).
        max_logprobs, max_model_len: as the server's flags.
        key: `--api-key`; guards `/v1` and `/inference`, not `/tokenize`.
        latency: seconds that an answer takes beside the forward.
        fault: of the n-th scoring request (from 0), or None: `hang`, `cut`, `truncate`, `html`, `wrong_model`,
            `missing`, `short`, `null`, `nan`, `absent`, or `(status, headers)`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str = "teacher",
        scale_out: bool = True,
        max_logprobs: int = 20,
        max_model_len: int = 2048,
        key: str | None = None,
        latency: float = 0.0,
        fault: Callable[[int], Fault] = lambda number: None,
    ):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.scale_out, self.max_logprobs, self.max_model_len = scale_out, max_logprobs, max_model_len
        self.key, self.latency, self.fault = key, latency, fault
        self.scored = 0
        self._lock = threading.Lock()
        super().__init__()

    def answer(self, method: str, path: str, body: Any, headers: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        guarded = path.startswith(("/v1", "/inference"))
        if self.key is not None and guarded and headers.get("authorization") != f"Bearer {self.key}":
            return 401, {}, {"error": f"Unauthorized: {headers.get('authorization')}"}
        if path == "/v1/models":
            entry = {"id": self.name, "object": "model", "root": "somewhere", "max_model_len": self.max_model_len}
            return 200, {}, {"object": "list", "data": [entry]}
        if path == "/version":
            return 200, {}, {"version": "0.32.0"}
        if path == "/tokenize":
            ids = self.tokenizer(body["prompt"], add_special_tokens=body.get("add_special_tokens", True))["input_ids"]
            return 200, {}, {"count": len(ids), "max_model_len": self.max_model_len, "tokens": ids, "token_strs": None}
        if path == "/inference/v1/generate":
            if not self.scale_out:
                return _error(403, "the endpoint needs --enable-scale-out")
            sampling = body.get("sampling_params", {})
            return self._score(body["token_ids"], sampling.get("prompt_logprobs"), sampling["max_tokens"], True, body)
        if path == "/v1/completions":
            return self._score(body["prompt"], body.get("prompt_logprobs"), body.get("max_tokens", 16), False, body)
        return _error(404, "Not Found")

    def _score(
        self, ids: Any, k: int | None, max_tokens: int, generate: bool, body: dict[str, Any]
    ) -> tuple[int, dict[str, str], Any]:
        if body.get("model") not in (self.name, None):
            return _error(404, f"The model `{body['model']}` does not exist. Valid aliases: {self.name}")
        if not isinstance(ids, list) or not ids:
            return _error(400, "the prompt must be a non-empty list of token ids")
        if max_tokens < 1:
            return _error(400, "max_tokens must be at least 1")
        if k is not None and k > self.max_logprobs:
            return _error(
                400, f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            )
        if len(ids) + max_tokens > self.max_model_len:
            return _error(400, f"the prompt has {len(ids)} tokens, the model's length is {self.max_model_len}")
        output = None if self.model is None else self.model.get_output_embeddings()
        vocab_size = len(self.tokenizer) if output is None else output.weight.shape[0]
        if max(ids) >= vocab_size:
            return _error(400, f"Token id {max(ids)} is out of vocabulary")
        with self._lock:
            number, self.scored = self.scored, self.scored + 1
        fault = self.fault(number)
        self.sleep(self.latency)
        if isinstance(fault, tuple):
            return fault[0], fault[1], {"error": {"message": "slow down", "type": "overloaded"}}
        if fault == "hang":
            self.sleep(30)
        if fault == "cut":
            raise Cut
        made_up = self.model is None and fault is None and k is not None
        rows: Any = MADE_UP if made_up else None if k is None else self._prompt_logprobs(ids, k, generate)
        if rows is not None and not made_up:
            rows = _spoil(rows, fault)
        if fault == "missing":
            rows = None
        name = "another" if fault == "wrong_model" else self.name
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        reply: dict[str, Any]
        if generate:
            choice = {"index": 0, "token_ids": [0], "logprobs": None, "finish_reason": "length"}
            reply = {"request_id": uuid.uuid4().hex, "model": name, "usage": usage, "choices": [choice]}
            reply["prompt_logprobs"] = rows
        else:
            choice = {"index": 0, "text": "?", "logprobs": None, "finish_reason": "length", "prompt_logprobs": rows}
            reply = {"id": "cmpl-0", "object": "text_completion", "model": name, "usage": usage, "choices": [choice]}
        content = json.dumps(reply).encode()
        if made_up:
            content = content.replace(json.dumps(MADE_UP).encode(), _made_up_rows(ids, k or 0))
        if fault == "truncate":
            content = content[: len(content) // 2]
        if fault == "html":
            content = b"<html>Bad gateway</html>"
        return 200, {}, content

    def _prompt_logprobs(self, ids: list[int], k: int, generate: bool) -> list[Any]:
        if self.model is None:  # with a fault
            return json.loads(_made_up_rows(ids, k))
        with self._lock, torch.no_grad():
            logprobs = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        values, tops = logprobs.topk(max(k, 1))
        rows: list[Any] = [None]
        for place, target in enumerate(ids[1:]):
            value = logprobs[place, target]
            rank = int((logprobs[place] > value).sum()) + 1
            text = None if generate else self.tokenizer.decode([target])
            # the given token first, then the ranks; one entry where the given token is among them
            row = {str(target): {"logprob": value.item(), "rank": rank, "decoded_token": text}}
            for number in range(k):
                top = int(tops[place, number])
                text = None if generate else self.tokenizer.decode([top])
                entry = {"logprob": values[place, number].item(), "rank": number + 1, "decoded_token": text}
                row.setdefault(str(top), entry)
            rows.append(row)
        return rows


def _spoil(rows: list[Any], fault: Fault) -> list[Any]:
    if fault == "short":
        return [row if row is None else dict(list(row.items())[: len(row) // 2]) for row in rows]
    if fault == "null":
        return [None for _ in rows]
    if fault in ("nan", "absent") and len(rows) > 1:
        value = math.nan if fault == "nan" else -9999.0
        *_, last = rows[-1]  # the least likely entry
        rows[-1][last]["logprob"] = value
    return rows


def _error(status: int, message: str) -> tuple[int, dict[str, str], Any]:
    return status, {}, {"error": {"message": message, "type": "invalid_request_error", "code": status}}


class CapacityServer:
    """Answers `capacity` requests at a time, each in `seconds`; refuses what is more with 429.

    Args:
        capacity, seconds: see above; the ideal rate is their ratio.
        retry_after: seconds in the header of a refusal; None: no header.
    """

    def __init__(self, capacity: int, seconds: float, retry_after: float | None = None):
        self.capacity, self.seconds, self.retry_after = capacity, seconds, retry_after
        self.served = self.refused = self._running = 0
        self._loop = asyncio.new_event_loop()
        ready = threading.Event()
        port: list[int] = []

        def run() -> None:
            asyncio.set_event_loop(self._loop)
            server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
            port.append(server.sockets[0].getsockname()[1])
            ready.set()
            self._loop.run_forever()

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()
        ready.wait()
        self.url = f"http://127.0.0.1:{port[0]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                lengths = [line.partition(":")[2] for line in head.split("\r\n") if line.startswith("content-length")]
                await reader.readexactly(int(lengths[0]) if lengths else 0)
                if self._running >= self.capacity:
                    self.refused += 1
                    after = "" if self.retry_after is None else f"retry-after: {self.retry_after}\r\n"
                    writer.write(f"HTTP/1.1 429 Too Many Requests\r\n{after}content-length: 2\r\n\r\n{{}}".encode())
                else:
                    self._running += 1
                    try:
                        await asyncio.sleep(self.seconds)
                    finally:
                        self._running -= 1
                    self.served += 1
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}")
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def __enter__(self) -> "CapacityServer":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()


def rate_and_refusals(
    server: CapacityServer, ask: Callable[[Any], Any], warm_up: float, seconds: float
) -> tuple[float, float]:
    """Answers per second and the share of requests that were refused, over `seconds` after `warm_up`.

    Args:
        ask: takes an endless iterator of items and yields as they are answered.
    """
    start = time.monotonic()

    def items() -> Any:
        while time.monotonic() - start < warm_up + seconds:
            yield None

    mark: tuple[float, int, int] | None = None
    for _ in ask(items()):
        if mark is None and time.monotonic() - start >= warm_up:
            mark = (time.monotonic(), server.served, server.refused)
    if mark is None:
        return 0.0, 1.0
    served, refused = server.served - mark[1], server.refused - mark[2]
    return served / (time.monotonic() - mark[0]), refused / max(served + refused, 1)
