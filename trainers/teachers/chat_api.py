"""Venice and other chat APIs as teachers that write (sample mode).

A chat API takes messages and no token ids, so it cannot score given text. It writes, and gives the likeliest
alternatives of each of its tokens as bytes, which we map to our ids. Two things stay with the user: that the student's
tokenizer is the teacher's (we notice when it is not, we cannot prove that it is), and that the teacher reads our
prompt through its own chat template.

Tested against the published schemas, never against the real services.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from .base import TeacherCapabilities
from .env import Secret
from .flow import BadReply, FlowConfig
from .http_server import HTTPServer, RequestRefused
from .identity import tokenizer_hash
from .scored import ABSENT
from .written import WrittenText


CONTINUE = "Continue the user's text where it breaks off. Write the continuation only."
VENICE_URL = "https://api.venice.ai/api/v1"
# more than 20 failed requests in 30 s, and Venice answers nobody for 30 s
VENICE_FAILURES = 18


class ChatWriter:
    """A chat API that gives `top_logprobs`.

    Building it connects: the model must be listed and, where the list tells, give log-probabilities.

    Args:
        url: with or without `/v1`.
        model: its name there.
        tokenizer: the student's; must be the model's own.
        key: see [`HTTPServer`].
        k: alternatives per token that are asked for; most services give at most 20.
        max_tokens: per text.
        venice: send Venice's own fields: without them the model also reads a system prompt that we never see.
        instruction: system message that makes a chat model continue text. With a chat template in `tokenizer` there is
            none by default: the prompt is a question then, and the student reads it in the template too.
        seed: for services that take one.
        config: see [`FlowConfig`].

    Raises:
        ValueError: an unknown model, or one without log-probabilities; names those that qualify.
        TeacherUnavailable: no answer.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: Any,
        key: Secret | None = None,
        k: int = 20,
        max_tokens: int = 256,
        venice: bool = False,
        instruction: str | None = None,
        seed: int | None = None,
        config: FlowConfig | None = None,
        url_name: str = "OPENAI_BASE_URL",
    ):
        if k < 1 or max_tokens < 1:
            raise ValueError(f"k ({k}) and max_tokens ({max_tokens}) must be at least 1.")
        if config is None and venice:
            config = FlowConfig(failure_budget=VENICE_FAILURES)
        self.name, self.tokenizer, self.k, self.max_tokens = model, tokenizer, k, max_tokens
        self.venice, self.seed = venice, seed
        self.templated = bool(getattr(tokenizer, "chat_template", None)) and instruction is None
        self.instruction = None if self.templated else (instruction or CONTINUE)
        self.vocab_size, self.num_tokens = len(tokenizer), len(tokenizer)
        self.capabilities = TeacherCapabilities(
            form="sparse", scores_given_tokens=False, any_temperature=False, remote=True
        )
        self.ids_of_bytes = token_bytes(tokenizer)
        self.counts = {"entries": 0, "unknown_entries": 0, "texts": 0, "other_splits": 0}
        self.server = HTTPServer(url, url_name, key, config)
        try:
            self._check_model()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"ChatWriter({self.name!r} at {self.server.url}, k={self.k})"

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "tokenizer": tokenizer_hash(self.tokenizer),
            "k": self.k,
            "max_tokens": self.max_tokens,
            "temperature": 1.0,
            "instruction": self.instruction,
            "template": self.tokenizer.chat_template if self.templated else None,
            "system_prompt_of_the_service": False if self.venice else None,
            "seed": self.seed,
        }

    def _check_model(self) -> None:
        try:
            models = list_models(self.server)
        except RequestRefused as error:
            if error.status in (404, 405) and not self.venice:
                return  # lists nothing; the first reply is checked like all others
            raise
        gives = {name: gives_logprobs(entry) for name, entry in models.items()}
        qualify = ", ".join(sorted(name for name, flag in gives.items() if flag)) or "none"
        if self.name not in models:
            raise ValueError(
                f"{self.server.url} has no model {self.name!r}. Those that give log-probabilities: {qualify}."
            )
        if gives[self.name] is False:
            raise ValueError(
                f"{self.name!r} gives no log-probabilities (supportsLogProbs is false), so there is nothing to distil "
                f"but its text. Models that qualify: {qualify}."
            )

    # -- writing

    def write(self, prompts: Iterable[list[int]]) -> Iterator[WrittenText]:
        """One text for each prompt (token ids), in order.

        Raises:
            BadReply: log-probabilities are missing or short.
            ValueError: the replies show that the model's tokenizer is another one.
            TeacherUnavailable: no answer in time.
        """
        for text in self.server.flow.map(self._write, prompts, work=lambda prompt: self.max_tokens):
            self._check_tokenizer()
            yield text

    def messages(self, text: str) -> list[dict[str, str]]:
        system = [{"role": "system", "content": self.instruction}] if self.instruction else []
        return [*system, {"role": "user", "content": text}]

    def prompt_ids(self, prompt: list[int], text: str) -> list[int]:
        """What the student reads where the teacher reads `text`."""
        if not self.templated:
            return list(prompt)
        rendered = self.tokenizer.apply_chat_template(
            self.messages(text), add_generation_prompt=True, tokenize=False, return_dict=False
        )
        return self.tokenizer(rendered, add_special_tokens=False)["input_ids"]

    async def _write(self, prompt: list[int], max_tokens: int | None = None) -> WrittenText:
        text = self.tokenizer.decode(prompt, skip_special_tokens=True)
        body: dict[str, Any] = {
            "model": self.name,
            "messages": self.messages(text),
            "max_tokens": max_tokens or self.max_tokens,
            # at 1 what the model draws from and what its logprobs say is the same thing
            "temperature": 1.0,
            "top_p": 1.0,
            "logprobs": True,
            "top_logprobs": self.k,
        }
        if self.seed is not None:
            body["seed"] = self.seed
        if self.venice:
            body["venice_parameters"] = {"include_venice_system_prompt": False}
        reply = await self.server.send("POST", "/v1/chat/completions", body)
        return self._read(reply, self.prompt_ids(prompt, text))

    def _read(self, reply: Any, prompt_ids: list[int]) -> WrittenText:
        where = f"{self.server.url}, chat"
        if not isinstance(reply, dict) or not isinstance(reply.get("choices"), list) or not reply["choices"]:
            raise BadReply(f"{where}: the answer holds no choices.")
        if reply.get("model") not in (self.name, None) and not str(reply["model"]).startswith(self.name):
            raise BadReply(f"{where}: asked {self.name!r}, and {reply['model']!r} answered.")
        choice = reply["choices"][0]
        tokens = logprobs_of(choice)
        content = (choice.get("message") or {}).get("content") or ""
        if tokens is None or (content and not tokens):
            raise BadReply(
                f"{where}: {self.name!r} answered without log-probabilities. The service dropped the field or does "
                "not give them for this model: choose one that does (`make check-api`)."
            )
        try:
            spelt = [(_bytes(token), _entries(token)) for token in tokens]
        except (KeyError, TypeError, ValueError):
            raise BadReply(f"{where}: the log-probabilities have an unknown shape.") from None
        said = b"".join(piece for piece, _ in spelt).decode(errors="replace")
        if said.strip() != content.strip():
            raise BadReply(
                f"{where}: the log-probabilities spell {said[:40]!r}, the text is {content[:40]!r}: these are not "
                "about the same tokens."
            )
        ids, top_ids, top_logprobs = [], [], []
        for piece, entries in spelt:
            if len(entries) < self.k:
                raise BadReply(f"{where}: {len(entries)} alternatives of a token, asked for {self.k}.")
            if any(not value <= 1e-3 for _, value in entries):
                raise BadReply(f"{where}: a log-probability of {max(value for _, value in entries)}.")
            if piece not in self.ids_of_bytes:
                break  # what follows was written after a token that the student cannot read
            known = {self.ids_of_bytes[other]: value for other, value in entries if other in self.ids_of_bytes}
            self.counts["entries"] += len(entries)
            self.counts["unknown_entries"] += len(entries) - len(known)
            best = sorted(known.items(), key=lambda item: -item[1])[: self.k]
            best += [(0, ABSENT)] * (self.k - len(best))  # their mass falls into the tail
            ids.append(self.ids_of_bytes[piece])
            top_ids.append([i for i, _ in best])
            top_logprobs.append([max(value, ABSENT) for _, value in best])
        complete = len(ids) == len(spelt)
        self.counts["texts"] += 1
        own = self.tokenizer(said, add_special_tokens=False)["input_ids"]
        self.counts["other_splits"] += not complete or ids[:-1] != own[: len(ids) - 1]
        return WrittenText(prompt_ids, ids, top_ids, top_logprobs, complete and choice.get("finish_reason") == "stop")

    def _check_tokenizer(self) -> None:
        seen = self.counts
        if seen["entries"] > 1000 and seen["unknown_entries"] > 0.1 * seen["entries"]:
            found = f"{seen['unknown_entries']} of {seen['entries']} of its tokens are unknown"
        elif seen["texts"] >= 20 and seen["other_splits"] > 0.5 * seen["texts"]:
            found = f"{seen['other_splits']} of {seen['texts']} of its texts are split otherwise"
        else:
            return
        raise ValueError(
            f"{self.name!r} does not use the student's tokenizer: {found}. Train the codec with the teacher's "
            "tokenizer (`--tokenizer` of train_autoencoder.py), or pick a model that shares it."
        )

    def check(self) -> None:
        """Have one token written: tokens are paid for."""
        prompt = self.tokenizer("The", add_special_tokens=False)["input_ids"]
        self.server.flow.ask(lambda: self._write(prompt, 1))

    def close(self) -> None:
        """Close the connections."""
        self.server.close()


# -- what services say


def list_models(server: HTTPServer) -> dict[str, dict[str, Any]]:
    """The entries of `/v1/models` by name."""
    reply = server.ask("GET", "/v1/models")
    entries = reply.get("data") if isinstance(reply, dict) else None
    if not isinstance(entries, list):
        raise BadReply(f"{server.url}: /v1/models gives no list of models.")
    return {entry["id"]: entry for entry in entries if isinstance(entry, dict) and "id" in entry}


def gives_logprobs(entry: dict[str, Any]) -> bool | None:
    """What a model's entry says about it; None: nothing."""
    capabilities = (entry.get("model_spec") or {}).get("capabilities") or {}
    flag = capabilities.get("supportsLogProbs", entry.get("supportsLogProbs"))
    return None if flag is None else bool(flag)


def logprobs_of(choice: dict[str, Any]) -> list[Any] | None:
    """The tokens of a choice, each with its alternatives; None: there are none.

    OpenAI: `{content: [token...]}`. Venice's schema: one token, not in a list; also seen: a plain list.
    """
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, dict) and isinstance(logprobs.get("content"), list):
        return logprobs["content"]
    if isinstance(logprobs, dict) and "token" in logprobs:
        return [logprobs]
    return logprobs if isinstance(logprobs, list) else None


def _bytes(token: dict[str, Any]) -> bytes:
    spelt = token.get("bytes")
    return bytes(spelt) if spelt is not None else token["token"].encode()


def _entries(token: dict[str, Any]) -> list[tuple[bytes, float]]:
    return [(_bytes(entry), float(entry["logprob"])) for entry in token["top_logprobs"]]


def token_bytes(tokenizer: Any) -> dict[bytes, int]:
    """The bytes of every ordinary token -> its id. Special tokens are left out: text that looks like one is none.

    Knows byte-level BPE (GPT-2, Llama 3, Qwen) and sentencepiece vocabularies (`▁`, `<0x0A>`).
    """
    special = set(tokenizer.all_special_ids)
    vocabulary = {token: i for token, i in tokenizer.get_vocab().items() if i not in special}
    alphabet = _byte_alphabet()
    letters = {letter for token in vocabulary for letter in token}
    byte_level = "Ġ" in letters or (letters <= set(alphabet) and "▁" not in letters)
    known: dict[bytes, int] = {}
    for token, i in sorted(vocabulary.items(), key=lambda item: item[1]):
        if byte_level:
            spelt = (
                bytes(alphabet[letter] for letter in token)
                if all(letter in alphabet for letter in token)
                else token.encode()  # an added word, kept as it is
            )
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            spelt = bytes([int(token[3:5], 16)])
        else:
            spelt = token.replace("▁", " ").encode()
        if spelt:
            known.setdefault(spelt, i)
    return known


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes printable Latin-1 bytes as themselves and the others as letters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    alphabet = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return alphabet | {chr(256 + place): byte for place, byte in enumerate(others)}
