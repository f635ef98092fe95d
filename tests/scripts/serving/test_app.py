"""The server over real sockets, by the clients that people have."""

import asyncio
import json
import logging
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch


pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

import uvicorn  # noqa: E402

from scripts.serving import server as serving  # noqa: E402
from scripts.serving.app import Guard, ServerConfig, build_app  # noqa: E402
from scripts.serving.engine import Engine, EngineConfig  # noqa: E402
from scripts.serving.metrics import Metrics  # noqa: E402
from tests.conftest import tiny_student  # noqa: E402
from tests.trainers.training_helpers import byte_tokenizer  # noqa: E402


KEY = "sk-never-to-be-seen"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


class Running:
    """A server on a free port, in a thread."""

    def __init__(self, head="regression", template=TEMPLATE, limits=None, decoder="autoregressive", **config):
        torch.manual_seed(0)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = template
        metrics = Metrics()
        model = tiny_student(head, decoder)
        model.generation_config.eos_token_id = None  # random weights end where they like
        model.config.eos_token_id = None
        self.engine = Engine(model, tokenizer, limits or EngineConfig(), metrics.observe)
        config = ServerConfig(**{"model_name": "student", "deadline": 30.0, **config})
        uvicorn_config = uvicorn.Config(
            build_app(self.engine, config, metrics),
            port=0,
            http=serving.PatientProtocol,
            lifespan="off",
            log_level="error",
            access_log=False,
        )
        self.socket = uvicorn_config.bind_socket()
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = serving.GracefulServer(uvicorn_config, self.engine, 5.0)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)

    def close(self):
        self.server.should_exit = True
        self.thread.join(20)
        self.engine.close()
        self.socket.close()

    def call(self, path, body=None, raw=None, headers=None, method=None):
        """Status, headers and parsed body."""
        data = raw if raw is not None else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"content-type": "application/json", **(headers or {})}, method=method
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as reply:
                return reply.status, reply.headers, _parsed(reply.read())
        except urllib.error.HTTPError as error:
            return error.code, error.headers, _parsed(error.read())

    def events(self, path, body):
        """The JSON of a stream's events."""
        request = urllib.request.Request(
            self.url + path, json.dumps({**body, "stream": True}).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as reply:
            assert reply.headers["content-type"].startswith("text/event-stream")
            lines = [line.decode().removeprefix("data: ").strip() for line in reply if line.strip()]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


def wait_until(happens, seconds=20):
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def _parsed(content):
    try:
        return json.loads(content)
    except ValueError:
        return content.decode(errors="replace")


@pytest.fixture(scope="module")
def server():
    running = Running()
    yield running
    running.close()


@pytest.fixture
def start():
    running = []

    def start(**config):
        running.append(Running(**config))
        return running[-1]

    yield start
    for one in running:
        one.close()


def test_the_first_latentforges_routes_keep_their_fields(server):
    """Programs that were written against it go on working."""
    assert server.call("/")[2] == server.call("/health")[2] == {"status": "ok", "model": "student"}
    info = server.call("/info")[2]
    assert info["patch_size"] == info["compression_factor"] == 4 and info["latent_size"] == 16
    assert info["num_parameters"] == sum(x.numel() for x in server.engine.model.parameters())
    asked = {"prompt": "def main(", "max_new_tokens": 9, "temperature": 0.8, "top_p": 0.9, "top_k": 5, "seed": 42}
    status, _, first = server.call("/generate", asked)
    assert status == 200 and set(first) == {
        "generated_text",
        "prompt",
        "num_tokens_generated",
        "compression_factor",
    }
    assert first["generated_text"].startswith("def main(") and len(first["generated_text"]) > len("def main(")
    assert (first["prompt"], first["num_tokens_generated"], first["compression_factor"]) == ("def main(", 9, 4)
    assert server.call("/generate", asked)[2] == first != server.call("/generate", {**asked, "seed": 43})[2]
    assert server.call("/docs")[0] == 200 and "/generate" in server.call("/openapi.json")[2]["paths"]
    assert server.call("/generate", {"prompt": ""})[0] == 200, "the start of a text"


def test_five_requests_at_once_get_their_own_texts(server):
    """The first LatentForge's own promise; mixed up streams are worse than slow ones."""
    bodies = [{"prompt": f"number {i}", "max_new_tokens": 20 + i, "seed": i, "temperature": 1.0} for i in range(5)]
    alone = [server.call("/generate", body)[2] for body in bodies]
    with ThreadPoolExecutor(5) as threads:
        assert list(threads.map(lambda body: server.call("/generate", body)[2], bodies)) == alone


def test_openai_client_completes_chats_and_streams(server):
    """The client that most programs use."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["student"]
    assert client.models.retrieve("student").id == "student"
    asked = {"model": "student", "prompt": "import ", "max_tokens": 17, "seed": 5}
    whole = client.completions.create(**asked, logprobs=2)
    assert whole.usage.completion_tokens == 17 and whole.usage.prompt_tokens == 7
    assert whole.choices[0].finish_reason == "length" and len(whole.choices[0].logprobs.tokens) == 17
    assert all(len(top) <= 2 for top in whole.choices[0].logprobs.top_logprobs)
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert parts[-1].usage.completion_tokens == 17 and parts[-2].choices[0].finish_reason == "length"
    assert len(parts) == 17 // 4 + 2, "an event for each patch"

    several = client.completions.create(model="student", prompt=["a", "b"], n=2, max_tokens=5, seed=5)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in several.choices}) == 4
    assert client.completions.create(model="student", prompt=[7, 8, 9], max_tokens=5).usage.prompt_tokens == 3

    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    asked = {"model": "student", "messages": messages, "max_completion_tokens": 10, "seed": 1}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert answer.choices[0].message.role == "assistant" and len(answer.choices[0].logprobs.content) == 10
    assert len(answer.choices[0].logprobs.content[0].top_logprobs) == 3
    parts = list(client.chat.completions.create(**asked, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content for part in parts) == answer.choices[0].message.content

    with pytest.raises(openai.NotFoundError, match="There is no model 'gpt'"):
        client.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="student", prompt="x", temperature=-1)


def test_openai_client_works_asynchronously(server):
    """Thirty texts of one event loop."""
    openai = pytest.importorskip("openai")

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def one(seed):
                stream = await client.completions.create(
                    model="student", prompt="x", max_tokens=8 + seed, seed=seed, stream=True
                )
                return "".join([part.choices[0].text async for part in stream])

            return await asyncio.gather(*(one(seed) for seed in range(30)))

    texts = asyncio.run(main())
    for seed in (0, 29):
        body = {"prompt": "x", "max_tokens": 8 + seed, "seed": seed}
        assert server.call("/v1/completions", body)[2]["choices"][0]["text"] == texts[seed]


def test_hub_client_chats(server):
    """`huggingface_hub.InferenceClient(base_url=...)`, as the Hub's pages show it."""
    from huggingface_hub import InferenceClient

    client = InferenceClient(base_url=f"{server.url}/v1", api_key="none")
    messages = [{"role": "user", "content": "Hello"}]
    whole = client.chat_completion(messages, model="student", max_tokens=9, seed=3)
    parts = client.chat_completion(messages, model="student", max_tokens=9, seed=3, stream=True)
    assert "".join(part.choices[0].delta.content for part in parts) == whole.choices[0].message.content


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl on this machine")
def test_curl_streams(server):
    """What a README shows."""
    body = json.dumps({"prompt": "def main(", "max_tokens": 6, "stream": True})
    command = ["curl", "-sN", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    assert said.count("data: ") == 3 and said.endswith("data: [DONE]\n\n")


CLIENTS = Path(os.environ.get("CLIENTS_VENV", Path(__file__).parents[3] / ".venv-clients")) / "bin" / "python"


@pytest.mark.skipif(not CLIENTS.exists(), reason="litellm is not there: make setup-clients")
def test_litellm_completes_and_streams(server):
    """What gateways use; it pins an older openai, so it has an environment of its own."""
    code = f"""
import litellm
options = dict(api_base="{server.url}/v1", api_key="none", max_tokens=9, seed=3)
whole = litellm.text_completion(model="text-completion-openai/student", prompt="import ", **options)
print("TEXT", whole.choices[0].text.encode().hex(), whole.usage.completion_tokens)
messages = [{{"role": "user", "content": "Hello"}}]
chat = litellm.completion(model="openai/student", messages=messages, **options)
parts = litellm.completion(model="openai/student", messages=messages, stream=True, **options)
print("CHAT", chat.choices[0].message.content == "".join(part.choices[0].delta.content or "" for part in parts))
"""
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(
        [CLIENTS, "-c", code], capture_output=True, text=True, check=False, timeout=100, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = server.call("/v1/completions", {"prompt": "import ", "max_tokens": 9, "seed": 3})[2]["choices"][0]
    assert f"TEXT {expected['text'].encode().hex()} 9" in done.stdout and "CHAT True" in done.stdout


def test_stop_strings_end_texts_and_are_not_shown(server):
    """Also where a stream would have shown their beginning."""
    asked = {"prompt": "number", "max_tokens": 40, "temperature": 0}
    text = server.call("/v1/completions", asked)[2]["choices"][0]["text"]
    stop = text[12:15]
    cut = text[: text.index(stop)]
    found = server.call("/v1/completions", {**asked, "stop": [stop]})[2]
    assert (found["choices"][0]["text"], found["choices"][0]["finish_reason"]) == (cut, "stop")
    parts = server.events("/v1/completions", {**asked, "stop": stop})
    assert "".join(part["choices"][0]["text"] for part in parts) == cut


def test_key_guards_what_costs(start):
    """Compared in constant time; what a health check needs stays open."""
    server = start(api_key=KEY)
    for path, body in (("/generate", {"prompt": "x"}), ("/v1/completions", {"prompt": "x"}), ("/v1/models", None)):
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Bearer {KEY}é".encode()}):
            status, got, reply = server.call(path, body, headers=headers)
            assert status == 401 and got["www-authenticate"] == "Bearer", (path, headers)
            assert reply["error"]["code"] == "invalid_api_key" and KEY not in str(reply)
        assert server.call(path, body, headers={"authorization": f"Bearer {KEY}"})[0] == 200
    assert server.call("/health")[0] == server.call("/")[0] == server.call("/metrics")[0] == 200
    assert KEY not in repr(ServerConfig(api_key=KEY))


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/generate", b"\xff\xfe{", 400, "JSON|parsing"),
        ("/generate", b'{"prompt": "x", "temperature": NaN}', 400, "finite"),
        ("/generate", b'{"prompt": "x", "max_new_tokens": -5}', 400, "max_new_tokens"),
        ("/generate", b'{"prompt": "x", "max_new_tokens": 100000000}', 400, "together at most"),
        ("/generate", b'{"prompt": "\\ud800"}', 400, "surrogate"),
        ("/generate", b'{"promt": "x"}', 400, "promt|prompt"),
        ("/generate", b"[" * 100000, 400, ""),
        ("/v1/completions", b'{"prompt": "x", "n": 17}', 400, "n: "),
        ("/v1/completions", b'{"prompt": []}', 400, "prompt"),
        ("/v1/completions", b'{"prompt": [99999]}', 400, "token ids outside"),
        ("/v1/completions", b'{"prompt": "x", "presence_penalty": 1}', 400, "presence_penalty"),
        ("/v1/completions", b'{"prompt": "x", "tools": []}', 400, "tools"),
        ("/v1/completions", b'{"prompt": "x", "stop": ["a", ""]}', 400, "stop"),
        ("/v1/completions", json.dumps({"prompt": "x", "stop": ["a"] * 10000}).encode(), 400, "stop"),
        ("/v1/completions", b'{"prompt": "x", "seed": 1e400}', 400, "seed"),
        ("/v1/completions", b'{"prompt": "x", "model": "gpt"}', 404, "no model 'gpt'"),
        ("/v1/chat/completions", b'{"messages": []}', 400, "messages"),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}', 400, "needs"),
        ("/nowhere", b"{}", 404, "Not Found"),
        ("/info", b"{}", 405, "Not Allowed"),
    ],
)
def test_wrong_requests_get_errors_in_openais_shape(server, path, body, status, said):
    """A traceback, or a text that something else was asked for, is worse than a refusal."""
    import re

    found, headers, reply = server.call(path, raw=body)
    assert found == status, reply
    assert set(reply["error"]) == {"message", "type", "param", "code"} and headers["x-request-id"]
    assert re.search(said, reply["error"]["message"]), reply
    assert len(reply["error"]["message"]) < 1000 and server.call("/health")[0] == 200


def test_models_without_template_or_likelihood_say_so(start):
    """A chat in no template, or numbers that are no probabilities, would look like answers."""
    server = start(head="energy", template=None)
    status, _, reply = server.call("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    assert status == 400 and reply["error"]["code"] == "no_chat_template"
    status, _, reply = server.call("/v1/completions", {"prompt": "x", "logprobs": 1})
    assert status == 400 and "no probability" in reply["error"]["message"]
    info = server.call("/info")[2]
    assert (info["has_likelihood"], info["has_chat_template"]) == (False, False)
    assert server.call("/v1/completions", {"prompt": "x", "max_tokens": 3})[0] == 200


def test_bodies_are_bounded_in_size_and_time(start, monkeypatch):
    """A hundred megabytes are not read; a client that sends a byte a minute does not hold a place."""
    monkeypatch.setattr(serving.PatientProtocol, "HEADER_SECONDS", 1.0)
    server = start(max_body=20000, body_seconds=1.0)
    status, _, reply = server.call("/generate", {"prompt": "x" * 30000})
    assert status == 413 and reply["error"]["code"] == "body_too_large"

    def raw(*parts, wait=0.0):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            for part in parts:
                connection.sendall(part)
                time.sleep(wait)
            said = b""
            while part := connection.recv(65536):
                said += part
            return said

    head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
    assert b" 413 " in raw(head + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 5)
    assert b" 408 " in raw(head + b"Content-Length: 100\r\n\r\n", b"{", wait=0.1)
    assert raw(b"POST /gen") == b"", "half a header: closed"
    assert server.call("/generate", {"prompt": "x", "max_new_tokens": 3})[0] == 200


def test_a_body_in_tiny_pieces_costs_what_its_bytes_cost():
    """Counted from the start at every piece, a megabyte of single bytes keeps the loop from everybody for minutes."""
    measured = [0]

    class Piece(bytes):
        def __len__(self):
            measured[0] += 1
            return 1

    async def receive():
        await asyncio.sleep(0)
        left[0] -= 1
        return {"type": "http.request", "body": Piece(b"x"), "more_body": left[0] > 0}

    left = [2000]
    guard = Guard(None, ServerConfig(), Metrics())
    assert asyncio.run(guard._body(receive, time.monotonic() + 30)) == b"x" * 2000
    assert measured[0] <= 3 * 2000


def test_a_chat_without_a_limit_is_written_as_far_as_memory_goes(start):
    """Clients of OpenAI's name no limit by default; told to ask for fewer tokens, they have nothing to change."""
    server = start(limits=EngineConfig(cache_bytes=1 << 17))
    assert server.engine._bytes_of(1, server.engine.max_tokens // 4) > 1 << 17
    messages = [{"role": "user", "content": "Hello"}]
    status, _, reply = server.call("/v1/chat/completions", {"messages": messages, "temperature": 0})
    assert status == 200 and reply["choices"][0]["finish_reason"] == "length"
    assert server.call("/v1/completions", {"prompt": "x", "max_tokens": 4000})[0] == 400
    status, _, reply = server.call("/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 10000}]})
    assert status == 400 and "The prompt has" in reply["error"]["message"]


def test_the_shortest_request_is_served_by_every_head(start):
    """An aligned head refuses the default temperature of `/generate`: a prompt alone must not be an error."""
    server = start(head="aligned", decoder="parallel")
    assert server.call("/generate", {"prompt": "def main("})[0] == 200
    asked = {"prompt": "def main(", "seed": 3}
    sampled = server.call("/generate", asked)[2]
    assert sampled == server.call("/generate", {**asked, "temperature": 1.0})[2]
    status, _, reply = server.call("/generate", {**asked, "temperature": 0.8})
    assert status == 400 and "temperature must be 0 (greedy) or 1" in reply["error"]["message"]
    assert server.call("/v1/completions", {"prompt": "x"})[0] == 200


def test_a_full_queue_answers_429_with_when_to_come_back(start):
    """Clients of OpenAI's know what to do with that."""
    server = start(limits=EngineConfig(max_rows=1, max_waiting=1))
    long = {"prompt": "x", "max_tokens": 1500}
    with ThreadPoolExecutor(3) as threads:
        busy = [threads.submit(server.call, "/v1/completions", long)]
        wait_until(lambda: server.engine.snapshot().rows == 1)  # before, the second would find the queue full
        busy.append(threads.submit(server.call, "/v1/completions", long))
        wait_until(lambda: server.engine.snapshot().waiting == 1)
        status, headers, reply = server.call("/v1/completions", long)
        assert status == 429 and int(headers["retry-after"]) >= 1 and reply["error"]["type"] == "rate_limit_error"
        assert [future.result()[0] for future in busy] == [200, 200]


def test_clients_that_go_away_free_their_rows(start):
    """Rows of readers who have left would fill the machine."""
    server = start(limits=EngineConfig(max_rows=4))
    body = json.dumps({"prompt": "x", "max_tokens": 4000, "ignore_eos": True}).encode()
    for stream in (b"true", b"false"):
        with_stream = body[:-1] + b', "stream": ' + stream + b"}"
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        for _ in range(6):
            with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
                connection.sendall(f"{head}Content-Length: {len(with_stream)}\r\n\r\n".encode() + with_stream)
                if stream == b"true":
                    assert b"200 OK" in connection.recv(4096)
                else:
                    time.sleep(0.05)
    wait_until(lambda: sum(server.engine.snapshot().finished.values()) == 12)  # the last may not have begun before
    found = server.engine.snapshot()
    assert found.rows == found.waiting == found.cache_bytes == 0 and found.finished == {"cancelled": 12}


def test_a_request_that_takes_too_long_ends_with_504(start):
    """And in a stream, whose status is sent, with an error event."""
    server = start(deadline=0.3)
    long = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True}
    status, _, reply = server.call("/v1/completions", long)
    assert status == 504 and reply["error"]["code"] == "deadline"
    assert server.events("/v1/completions", long)[-1]["error"]["code"] == "deadline"


def test_metrics_and_log_say_what_happened_and_no_prompt(start, caplog):
    """Prompts are somebody's letters."""
    server = start()
    with caplog.at_level(logging.INFO, "latentforge.access"):
        status, headers, _ = server.call(
            "/generate", {"prompt": "my secret", "max_new_tokens": 8}, headers={"x-request-id": "abc"}
        )
        assert status == 200 and headers["x-request-id"] == "abc"
        server.call("/v1/completions", {"prompt": "my secret", "max_tokens": 5, "stream": False})
        time.sleep(0.1)
    lines = [json.loads(record.message) for record in caplog.records]
    assert lines[0] | {"seconds": 0} == {
        "id": "abc",
        "method": "POST",
        "path": "/generate",
        "status": 200,
        "seconds": 0,
        "prompt_tokens": 9,
        "completion_tokens": 8,
    }
    assert "secret" not in caplog.text
    text = server.call("/metrics")[2]
    for line in (
        "latentforge_generated_tokens_total 13.0",
        "latentforge_prompt_tokens_total 18.0",
        'latentforge_finished_total{reason="length"} 2.0',
        "latentforge_time_to_first_token_seconds_count 2.0",
        'latentforge_http_responses_total{path="/generate",status="200"} 1.0',
        "latentforge_rows 0.0",
    ):
        assert line in text, line


def test_browsers_of_named_origins_only(start, server):
    """Open to all by default, any page could use the server of whoever visits it."""
    origin = {"origin": "https://example.org"}
    assert "access-control-allow-origin" not in server.call("/health", headers=origin)[1]
    named = start(cors_origins=("https://example.org",))
    assert named.call("/health", headers=origin)[1]["access-control-allow-origin"] == "https://example.org"
    assert "access-control-allow-origin" not in named.call("/health", headers={"origin": "https://evil.org"})[1]


def test_stopping_finishes_what_has_begun_and_refuses_the_rest(start):
    """A deployment must cut nobody's text."""
    server = start()
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(server.events, "/v1/completions", {"prompt": "x", "max_tokens": 400})
        wait_until(lambda: server.engine.snapshot().rows == 1)
        server.engine.refuse()
        status, _, reply = server.call("/v1/completions", {"prompt": "x"})
        assert status == 503 and reply["error"]["code"] == "stopping"
        assert server.call("/health")[0] == 503
        server.server.should_exit = True
        parts = running.result()
    assert parts[-1]["choices"][0]["finish_reason"] == "length"
    server.thread.join(20)
    assert not server.thread.is_alive()
