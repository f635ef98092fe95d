"""Doubles of services that cannot run here, after their published schemas (Venice's swagger of August 2026, TGI's
docs/openapi.json of 3.3), over a tiny model. None was ever compared with the real process."""

import threading
import time
from collections import deque
from typing import Any

import torch

from trainers.evaluation.loopback_servers import LoopbackServer


def bytes_of_ids(tokenizer: Any) -> dict[int, bytes]:
    """Of a byte-level tokenizer without merges, found by encoding characters of one and two bytes."""
    found: dict[int, bytes] = {}
    for code in (*range(128), *range(0x80, 0x800)):
        spelt = chr(code).encode()
        ids = tokenizer(chr(code), add_special_tokens=False)["input_ids"]
        if len(ids) == len(spelt):
            found.update({i: bytes([byte]) for i, byte in zip(ids, spelt, strict=True)})
    return found


class TinyWriter:
    """Draws ASCII from a tiny model, with what it held likely."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model, tokenizer
        self.spelt = bytes_of_ids(tokenizer)
        allowed = torch.zeros(model.config.vocab_size, dtype=torch.bool)
        allowed[[i for i, spelt in self.spelt.items() if spelt.isascii() and spelt.decode().isprintable()]] = True
        allowed[tokenizer.eos_token_id] = True
        self.forbidden = ~allowed
        self.lock = threading.Lock()

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        with self.lock, torch.no_grad():
            logits = self.model(torch.tensor([ids])).logits[0, -1].float()
        return logits.masked_fill(self.forbidden, -torch.inf).log_softmax(-1)

    def write(self, ids: list[int], count: int, seed: int | None) -> tuple[list[int], list[torch.Tensor]]:
        """Up to `count` tokens, the end-of-text token included, and the distribution of each."""
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        written: list[int] = []
        rows = []
        while len(written) < count:
            rows.append(self.logprobs(ids + written))
            written.append(int(torch.multinomial(rows[-1].exp(), 1, generator=generator)))
            if written[-1] == self.tokenizer.eos_token_id:
                break
        return written, rows


class FakeVenice(LoopbackServer):
    """Venice's `/models` and `/chat/completions`.

    Args:
        flat: `choices[].logprobs` as a plain list, as the swagger has it, and not under `content`.
        requests_per_window: refused beyond, with the reset headers; None: no limit.
        drops_logprobs: answers 200 without them, as servers do that do not know a field.
    """

    HIDDEN = "You are a helpful assistant named Venice. "

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        key: str = "venice-key-0123456789",
        flat: bool = False,
        requests_per_window: int | None = None,
        window: float = 1.0,
        drops_logprobs: bool = False,
        fail: Any = lambda number: False,
    ):
        self.writer, self.tokenizer, self.key, self.flat = TinyWriter(model, tokenizer), tokenizer, key, flat
        self.requests_per_window, self.window, self.drops_logprobs = requests_per_window, window, drops_logprobs
        self.fail, self.number = fail, 0
        self.window_start, self.used = time.time(), 0
        self.failures: deque[float] = deque()
        self.banned_until, self.bans, self.refused = 0.0, 0, 0
        self.lock = threading.Lock()
        super().__init__()

    def answer(self, method: str, path: str, body: Any, headers: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        if headers.get("authorization") != f"Bearer {self.key}":
            # services repeat what they were given
            return 401, {}, {"error": f"Invalid API key: {headers.get('authorization', '')}"}
        if path == "/api/v1/models":
            return 200, {}, {"object": "list", "data": [self._entry("teacher", True), self._entry("mute", False)]}
        if path == "/api/v1/api_keys/rate_limits":
            return 200, {}, {"data": {"rateLimits": [{"apiModelId": "teacher", "rateLimits": []}]}}
        if path != "/api/v1/chat/completions":
            return 404, {}, {"error": "Not Found"}
        with self.lock:
            limited = self._limit()
            self.number += 1
            number = self.number - 1
        if limited is not None:
            return limited
        if self.fail(number):
            self._failed()
            return 500, {}, {"error": "inference failed"}
        known = {"model", "messages", "max_tokens", "temperature", "top_p", "logprobs", "top_logprobs", "seed"}
        unknown = set(body) - known - {"venice_parameters"}
        if unknown:  # additionalProperties: false
            return 400, {}, {"error": f"Unrecognized key(s) in object: {sorted(unknown)}"}
        return 200, self._remaining(), self._write(body)

    def _entry(self, name: str, flag: bool) -> dict[str, Any]:
        spec = {"availableContextTokens": 2048, "capabilities": {"supportsLogProbs": flag}}
        return {"id": name, "object": "model", "type": "text", "model_spec": spec}

    def _remaining(self) -> dict[str, str]:
        if self.requests_per_window is None:
            return {}
        return {
            "x-ratelimit-remaining-requests": str(max(self.requests_per_window - self.used, 0)),
            "x-ratelimit-reset-requests": str(self.window_start + self.window),  # a Unix time
            "x-ratelimit-reset-tokens": "0.1",
        }

    def _failed(self) -> None:
        now = time.time()
        self.failures.append(now)
        while self.failures[0] < now - 30:
            self.failures.popleft()
        if len(self.failures) > 20:
            self.banned_until, self.bans = now + 30, self.bans + 1

    def _limit(self) -> tuple[int, dict[str, str], Any] | None:
        now = time.time()
        if now < self.banned_until:
            return 429, {}, {"error": "Too many failed requests"}
        if self.requests_per_window is not None:
            if now >= self.window_start + self.window:
                self.window_start, self.used = now, 0
            if self.used >= self.requests_per_window:
                self._failed()
                self.refused += 1
                return 429, self._remaining(), {"error": "Rate limit exceeded"}
            self.used += 1
        return None

    def _write(self, body: dict[str, Any]) -> dict[str, Any]:
        text = body["messages"][-1]["content"]
        if (body.get("venice_parameters") or {}).get("include_venice_system_prompt", True):
            text = self.HIDDEN + text
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        written, rows = self.writer.write(ids, body["max_tokens"], body.get("seed"))
        ended = written[-1] == self.tokenizer.eos_token_id
        written = written[:-1] if ended else written  # the end is no token of the reply
        content = b"".join(self.writer.spelt[i] for i in written).decode()
        tokens = [
            {**self._token(i, row), "top_logprobs": self._top(row, body["top_logprobs"])}
            for i, row in zip(written, rows, strict=False)
        ]
        logprobs: Any = tokens if self.flat else {"content": tokens}
        if self.drops_logprobs or body["model"] == "mute" or not body.get("logprobs"):
            logprobs = None
        choice = {
            "index": 0,
            "finish_reason": "stop" if ended else "length",
            "message": {"role": "assistant", "content": content},
            "logprobs": logprobs,
        }
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(written)}
        return {
            "id": "chat-0",
            "object": "chat.completion",
            "model": body["model"],
            "choices": [choice],
            "usage": usage,
        }

    def _token(self, i: int, row: torch.Tensor) -> dict[str, Any]:
        spelt = self.writer.spelt.get(i, b"")
        return {"token": spelt.decode(errors="replace"), "logprob": max(row[i].item(), -9999.0), "bytes": list(spelt)}

    def _top(self, row: torch.Tensor, k: int) -> list[dict[str, Any]]:
        return [self._token(int(i), row) for i in row.topk(k).indices]


class FakeTGI(LoopbackServer):
    """TGI's `/info` and its compatible root route.

    Args:
        max_top_n_tokens: as the server's flag, default 5.
        drops: fields that it does not know: `top_n_tokens`, `decoder_input_details`.
    """

    def __init__(self, model: Any, tokenizer: Any, max_top_n_tokens: int = 5, drops: tuple[str, ...] = ()):
        self.writer, self.tokenizer = TinyWriter(model, tokenizer), tokenizer
        self.max_top_n_tokens, self.drops = max_top_n_tokens, drops
        self.replies: list[dict[str, Any]] = []
        super().__init__()

    def answer(self, method: str, path: str, body: Any, headers: dict[str, str]) -> tuple[int, dict[str, str], Any]:
        if path == "/info":
            return (
                200,
                {},
                {
                    "model_id": "teacher",
                    "model_sha": "0123abcd",
                    "max_concurrent_requests": 128,
                    "max_best_of": 2,
                    "max_stop_sequences": 4,
                    "max_input_tokens": 1024,
                    "max_total_tokens": 2048,
                    "validation_workers": 2,
                    "max_client_batch_size": 4,
                    "router": "text-generation-router",
                    "version": "3.3.7",
                },
            )
        asked = {name: value for name, value in body.get("parameters", {}).items() if name not in self.drops}
        count = asked.get("top_n_tokens") or 0
        if count > self.max_top_n_tokens:
            message = f"`top_n_tokens` must be >= 0 and <= {self.max_top_n_tokens}. Given: {count}"
            return 422, {}, {"error": f"Input validation error: {message}", "error_type": "validation"}
        ids = self.tokenizer(body["inputs"])["input_ids"]
        written, rows = self.writer.write(ids, asked.get("max_new_tokens") or 100, asked.get("seed"))
        details: dict[str, Any] = {
            "finish_reason": "eos_token" if written[-1] == self.tokenizer.eos_token_id else "length",
            "generated_tokens": len(written),
            "seed": asked.get("seed"),
            "prefill": self._prefill(ids) if asked.get("decoder_input_details") else [],
            "tokens": [self._token(i, row) for i, row in zip(written, rows, strict=True)],
        }
        if count:
            details["top_tokens"] = [[self._token(int(i), row) for i in row.topk(count).indices] for row in rows]
        reply = {
            "generated_text": self.tokenizer.decode(written),
            "details": details if asked.get("details") else None,
        }
        self.replies.append(reply)
        return 200, {}, [reply] if path == "/" else reply

    def _prefill(self, ids: list[int]) -> list[dict[str, Any]]:
        with self.writer.lock, torch.no_grad():
            rows = self.writer.model(torch.tensor([ids])).logits[0].log_softmax(-1)
        first = {"id": ids[0], "text": self.tokenizer.decode([ids[0]]), "logprob": None}
        return [first] + [
            {"id": i, "text": self.tokenizer.decode([i]), "logprob": rows[place, i].item()}
            for place, i in enumerate(ids[1:])
        ]

    def _token(self, i: int, row: torch.Tensor) -> dict[str, Any]:
        special = i in self.tokenizer.all_special_ids
        return {"id": i, "text": self.tokenizer.decode([i]), "logprob": row[i].item(), "special": special}


# docs/openapi.json of TGI 3.3: GenerateResponse, Details, PrefillToken, Token
TGI_TOKEN = {
    "type": "object",
    "required": ["id", "text", "logprob", "special"],
    "properties": {
        "id": {"type": "integer", "minimum": 0},
        "text": {"type": "string"},
        "logprob": {"type": ["number", "null"]},
        "special": {"type": "boolean"},
    },
}
TGI_PREFILL = {
    "type": "object",
    "required": ["id", "text", "logprob"],
    "properties": {name: TGI_TOKEN["properties"][name] for name in ("id", "text", "logprob")},  # type: ignore[index]
}
TGI_DETAILS = {
    "type": "object",
    "required": ["finish_reason", "generated_tokens", "prefill", "tokens"],
    "properties": {
        "finish_reason": {"enum": ["length", "eos_token", "stop_sequence"]},
        "generated_tokens": {"type": "integer", "minimum": 0},
        "seed": {"type": ["integer", "null"]},
        "prefill": {"type": "array", "items": TGI_PREFILL},
        "tokens": {"type": "array", "items": TGI_TOKEN},
        "top_tokens": {"type": "array", "items": {"type": "array", "items": TGI_TOKEN}},
    },
}
TGI_REPLY = {
    "type": "object",
    "required": ["generated_text"],
    "properties": {"generated_text": {"type": "string"}, "details": {"anyOf": [TGI_DETAILS, {"type": "null"}]}},
}
