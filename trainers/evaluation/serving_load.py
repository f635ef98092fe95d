"""A server as its users see it, under load: for `make verify TOPIC=serving`.

The server is `scripts/serve.py` in a process of its own; the load comes from vLLM's own benchmark client where the
environment of `make setup-vllm` is there, and from coroutines here where something else than time is looked at.
"""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..verification import ROOT


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Served:
    """`scripts/serve.py` of a model, on a free port. A context manager.

    Args:
        model: folder.
        log: file that takes its output.
        flags: more of the script's.

    Attributes:
        seconds_to_health: from the start of the process to the first answer of `/health`.

    Raises:
        RuntimeError: it ends, or does not answer within `patience` seconds.
    """

    def __init__(self, model: Path, log: Path, *flags: str, patience: float = 120.0):
        self.model, self.log, self.flags, self.patience = model.resolve(), log.resolve(), flags, patience
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "Served":
        self.start()
        return self

    def start(self) -> None:
        command = [sys.executable, str(ROOT / "scripts" / "serve.py"), "--model", str(self.model)]
        command += ["--port", str(self.port), "--model_name", "student", *self.flags]
        begun = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.log.parent)
        while True:
            try:
                self.get("/health")
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() - begun > self.patience:
                    self.kill()
                    said = self.log.read_text(errors="replace")[-2000:]
                    raise RuntimeError(f"the server did not come up: {said}") from None
                time.sleep(0.02)
        self.seconds_to_health = time.monotonic() - begun

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as reply:  # nosec B310 # http to our own server
            return reply.read().decode()

    def post(self, path: str, body: dict[str, Any], timeout: float = 120.0) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as reply:  # nosec B310 # http to our own server
            return json.loads(reply.read())

    def metric(self, name: str) -> float:
        """A counter or gauge of `/metrics`, without `latentforge_`."""
        found = re.search(rf"^latentforge_{name}(?:_total)? (\S+)$", self.get("/metrics"), re.MULTILINE)
        if found is None:
            raise ValueError(f"/metrics has no {name}")
        return float(found[1])

    def memory(self) -> int:
        """Bytes of the resident set."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status)[1])  # type: ignore[index]

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def __exit__(self, *error: Any) -> None:
        if self.process.poll() is None:
            self.kill()


@dataclass
class Told:
    """One streamed text.

    Attributes:
        first, last: seconds from the request to its first and its last event.
        text: whole.
        num_tokens: as the server counts.
        error: what went wrong; None: nothing.
    """

    first: float = 0.0
    last: float = 0.0
    text: str = ""
    num_tokens: int = 0
    error: str | None = None
    gaps: list[float] = field(default_factory=list)


async def stream(port: int, body: dict[str, Any], timeout: float = 300.0) -> Told:
    """One `/v1/completions` over a connection of its own."""
    told, begun = Told(), time.monotonic()
    try:
        return await asyncio.wait_for(_stream(port, body, told, begun), timeout)
    except (OSError, asyncio.TimeoutError, ValueError, KeyError, asyncio.IncompleteReadError) as error:
        told.error = f"{type(error).__name__}: {error}"
        return told


async def _stream(port: int, body: dict[str, Any], told: Told, begun: float) -> Told:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        content = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
        writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        await writer.drain()
        status = (await reader.readline()).decode()
        if " 200 " not in status:
            raise ValueError(f"{status.strip()}: {(await reader.read(2000)).decode(errors='replace')[-300:]}")
        ended, before = False, begun
        while line := await reader.readline():
            text = line.decode().strip()
            if not text.startswith("data: "):
                continue
            if text == "data: [DONE]":
                ended = True
                break
            event = json.loads(text.removeprefix("data: "))
            if "error" in event:
                raise ValueError(event["error"]["message"])
            if event.get("usage"):
                told.num_tokens = event["usage"]["completion_tokens"]
                continue
            now = time.monotonic()
            told.first = told.first or now - begun
            told.gaps.append(now - before)
            before, told.last = now, now - begun
            told.text += "".join(choice["text"] for choice in event["choices"])
        if not ended:
            raise ValueError("the stream broke off")
        return told
    finally:
        writer.close()


def bodies(count: int, prompts: Sequence[str], lengths: tuple[int, int] = (16, 128), seed: int = 0) -> list[dict]:
    """Requests of mixed lengths; each its own seed, so that its text can be told from all others'."""
    draw = random.Random(seed)
    return [
        {
            "prompt": draw.choice(prompts),
            "max_tokens": draw.randint(*lengths),
            "seed": number,
            "temperature": 1.0,
            "ignore_eos": True,
        }
        for number in range(count)
    ]


async def closed_loop(port: int, requests: Sequence[dict], clients: int) -> list[Told]:
    """All requests, by so many clients, each of which asks again when it has its answer."""
    waiting = iter(enumerate(requests))
    told: dict[int, Told] = {}

    async def client() -> None:
        for number, body in waiting:
            told[number] = await stream(port, body)

    await asyncio.gather(*(client() for _ in range(clients)))
    return [told[number] for number in range(len(requests))]


async def poisson(port: int, requests: Sequence[dict], rate: float, seed: int = 0) -> list[Told]:
    """Requests that come `rate` times a second, at times that know nothing of each other."""
    draw = random.Random(seed)
    tasks = []
    for body in requests:
        tasks.append(asyncio.create_task(stream(port, body)))
        await asyncio.sleep(draw.expovariate(rate))
    return list(await asyncio.gather(*tasks))


VLLM_CLIENT = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def vllm_benchmark(python: Path, served: Served, tokenizer: Path, work_dir: Path, **flags: Any) -> dict[str, Any]:
    """What vLLM's own `bench serve` finds; `flags` are its own.

    Its command is called by its module: the build for CPUs has another name than the command looks for.
    """
    result = work_dir / "vllm_bench.json"
    result.unlink(missing_ok=True)
    command = [str(python), "-c", VLLM_CLIENT, "--backend", "openai", "--base-url", served.url]
    command += ["--endpoint", "/v1/completions", "--model", "student", "--tokenizer", str(tokenizer)]
    command += ["--save-result", "--result-dir", str(work_dir), "--result-filename", result.name]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    environment = {**os.environ, "OPENAI_API_KEY": "none"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode or not result.exists():
        raise RuntimeError(f"vLLM's benchmark ended with {done.returncode}: {(done.stdout + done.stderr)[-1500:]}")
    return json.loads(result.read_text(encoding="utf-8"))


def quantile(values: Sequence[float], share: float) -> float:
    """Of at least one value; the nearest one above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# -- abuse


def raw(port: int, *parts: bytes, wait: float = 0.0, timeout: float = 60.0) -> bytes:
    """Bytes over a socket, one part after the other; what comes back until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(wait)
        except OSError:
            pass  # the server has closed: what it said before is what counts
        said = b""
        try:
            while part := connection.recv(65536):
                said += part
        except OSError:
            pass
        return said


def status_of(reply: bytes) -> int:
    """HTTP's, 0 where the connection was closed without a word."""
    found = re.match(rb"HTTP/1.1 (\d+)", reply)
    return int(found[1]) if found else 0


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"


def with_body(content: bytes) -> bytes:
    return HEAD + f"Content-Length: {len(content)}\r\n\r\n".encode() + content


def abuses(port: int) -> dict[str, tuple[Callable[[], int], set[int]]]:
    """What is done to the server -> its status, and those that are right."""
    megabyte = b"x" * 2**20
    chunks = [b"100000\r\n" + megabyte + b"\r\n"] * 100
    stops = json.dumps({"prompt": "x", "stop": ["stop"] * 10_000}).encode()
    return {
        "100 MB body, announced": (
            lambda: status_of(raw(port, HEAD + b"Content-Length: 104857600\r\n\r\n", *[megabyte] * 100)),
            {413},
        ),
        "100 MB body, in chunks": (
            lambda: status_of(raw(port, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *chunks)),
            {413},
        ),
        "10,000 stop strings": (lambda: status_of(raw(port, with_body(stops))), {400}),
        "invalid UTF-8": (lambda: status_of(raw(port, with_body(b'{"prompt": "\xff\xfe"}'))), {400}),
        "no JSON": (lambda: status_of(raw(port, with_body(b"prompt=x"))), {400}),
        "NaN temperature": (
            lambda: status_of(raw(port, with_body(b'{"prompt": "x", "temperature": NaN}'))),
            {400},
        ),
        "negative tokens": (lambda: status_of(raw(port, with_body(b'{"prompt": "x", "max_tokens": -5}'))), {400}),
        "a million tokens": (
            lambda: status_of(raw(port, with_body(b'{"prompt": "x", "max_tokens": 1000000}'))),
            {400},
        ),
        "nested a hundred thousand deep": (lambda: status_of(raw(port, with_body(b"[" * 100_000))), {400}),
        "no HTTP": (lambda: status_of(raw(port, b"\x16\x03\x01\x02\x00" * 100)), {400, 0}),
        "header of 1 MB": (
            lambda: status_of(raw(port, b"GET / HTTP/1.1\r\nX: " + megabyte + b"\r\n\r\n")),
            {400, 431, 0},
        ),
    }


def slow_loris(port: int, count: int, seconds: float) -> tuple[int, int]:
    """Half a header each, a byte now and then: how many were still open after so many seconds, and how many opened."""
    connections = []
    for _ in range(count):
        connection = socket.create_connection(("127.0.0.1", port), timeout=5)
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: ")
        connections.append(connection)
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        for connection in connections:
            try:
                connection.sendall(b"x")
            except OSError:
                pass
        time.sleep(1.0)
    still_open = 0
    for connection in connections:
        connection.settimeout(0.1)
        try:
            still_open += connection.recv(1) != b""
        except TimeoutError:
            still_open += 1
        except OSError:
            pass
        connection.close()
    return still_open, count


async def disconnects(port: int, count: int, at_once: int = 25) -> int:
    """Streams whose reader leaves after the first event; returns how many had begun."""
    body = json.dumps({"prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}).encode()
    begun, waiting = 0, iter(range(count))

    async def client() -> None:
        nonlocal begun
        for _ in waiting:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(with_body(body))
            has_begun = b"200 OK" in await reader.readline()  # first: other clients count while this one waits
            begun += has_begun
            await reader.readline()
            writer.transport.abort()

    await asyncio.gather(*(client() for _ in range(at_once)))
    return begun
