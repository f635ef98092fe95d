"""A vLLM server as teacher: it scores our token ids (`prompt_logprobs`)."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch

from .base import PROBES, SparseSignal, TeacherCapabilities, TeacherIdentity
from .env import Secret
from .flow import BadReply, FlowConfig
from .http_server import HTTPServer, RequestRefused
from .identity import tokenizer_hash
from .scored import ScoredRow, check_row, check_score_temperature, score_batch


GENERATE, COMPLETIONS = "/inference/v1/generate", "/v1/completions"


class VLLMServerTeacher:
    """vLLM over HTTP, token ids in and out.

    Building it connects: the model must be served, its tokenizer must read our probes as ours does, and one tiny
    request finds the way in - `/inference/v1/generate` (servers started with `--enable-scale-out`; a quarter of the
    front end's work), else `/v1/completions` - and whether the server gives `k` entries. Every reply is checked for
    what was asked, because servers drop fields that they do not know without a word.

    Args:
        url: with or without `/v1`.
        tokenizer: ours; the teacher's must be the same.
        model: name under which it is served; default, the only one there.
        key: see [`HTTPServer`].
        k: entries per token. A server started without `--max-logprobs` gives at most 20.
        temperature: 1; see [`check_score_temperature`].
        vocab_size: columns of the teacher's output matrix, which no server tells; default, our tokenizer's size.
        revision, dtype: of the weights, which a server does not tell either; part of the identity of what is stored.
        config: see [`FlowConfig`].

    Attributes:
        path: the way in that was found.
        max_model_len: the server's; a row must be shorter, because vLLM writes one token even when it only scores.

    Raises:
        ValueError: the server has another model or tokenizer, or cannot do what is asked; says what to do.
        TeacherUnavailable: it does not answer.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Any,
        model: str | None = None,
        key: Secret | None = None,
        k: int = 20,
        temperature: float = 1.0,
        vocab_size: int | None = None,
        revision: str | None = None,
        dtype: str | None = None,
        config: FlowConfig | None = None,
        url_name: str = "VLLM_REMOTE_URL",
    ):
        check_score_temperature(temperature)
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}: that many entries are kept of every distribution.")
        self.tokenizer, self.k = tokenizer, k
        self.num_tokens: int | None = len(tokenizer)
        self.vocab_size = max(vocab_size or 0, len(tokenizer))
        self.revision, self.dtype = revision, dtype
        self.server = HTTPServer(url, url_name, key, config)
        self.capabilities = TeacherCapabilities(
            form="sparse", any_temperature=False, remote=True, parallel_calls=self.server.flow.config.most
        )
        try:
            self.name, self.max_model_len, self.root = self._find_model(model)
            self._check_tokenizer()
            self.path = self._find_way()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"VLLMServerTeacher({self.name!r} at {self.server.url}, k={self.k})"

    @property
    def identity(self) -> TeacherIdentity:
        """What a stored answer depends on; what the server cannot tell must have been declared.

        Raises:
            ValueError: it was not.
        """
        for name, value in (("revision", self.revision), ("dtype", self.dtype)):
            if value in (None, "auto"):
                raise ValueError(
                    f"A server does not tell the {name} of its weights, and answers that are kept must say it: pass "
                    f"--teacher_{name}, or set VLLM_REMOTE_{name.upper()}."
                )
        return TeacherIdentity(self.name, str(self.revision), str(self.dtype), tokenizer_hash(self.tokenizer))

    # -- connecting

    def _find_model(self, model: str | None) -> tuple[str, int | None, str | None]:
        reply = self.server.ask("GET", "/v1/models")
        served = {entry["id"]: entry for entry in _list(reply, "data") if isinstance(entry, dict) and "id" in entry}
        if model is None and len(served) == 1:
            model = next(iter(served))
        if model is None or model not in served:
            wanted = "no model was named" if model is None else f"{model!r} is not among them"
            raise ValueError(
                f"{self.server.url} serves {', '.join(map(repr, served)) or 'nothing'}, and {wanted}: pass "
                "--teacher (VLLM_REMOTE_MODEL) with one of these names."
            )
        entry = served[model]
        return model, entry.get("max_model_len"), entry.get("root")

    def _check_tokenizer(self) -> None:
        for text in PROBES:
            body = {"model": self.name, "prompt": text, "add_special_tokens": False}
            try:
                theirs = _list(self.server.ask("POST", "/tokenize", body), "tokens")
            except RequestRefused as error:
                raise ValueError(
                    f"{self.server.url} has no /tokenize ({error.status}), so nothing shows that its ids mean ours. "
                    "Serve the teacher with vLLM's OpenAI server and let /tokenize through."
                ) from None
            ours = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if theirs != ours:
                raise ValueError(
                    f"The tokenizer of {self.name!r} at {self.server.url} is not the student's: {text[:24]!r} reads "
                    f"{theirs[:6]} there and {ours[:6]} here. Train the codec with the teacher's tokenizer "
                    "(`--tokenizer` of train_autoencoder.py)."
                )

    def _find_way(self) -> str:
        ids = self.tokenizer(PROBES[0], add_special_tokens=False)["input_ids"][:2]
        for path in (GENERATE, COMPLETIONS):
            try:
                self.server.flow.ask(partial(self._score, path, ids))
                return path
            except RequestRefused as error:
                most = re.search(r"max(?:imum)? allowed:? *(\d+)", error.said)
                if error.status == 400 and most:
                    raise ValueError(
                        f"{self.server.url} gives at most {most[1]} log-probabilities per token, asked for {self.k}: "
                        f"start it with --max-logprobs {self.k}, or pass --kd_top_k {most[1]}."
                    ) from None
                if path == COMPLETIONS or error.status not in (403, 404, 405):
                    raise
        raise AssertionError("unreachable: the last path returns or raises")

    # -- asking

    def signal(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SparseSignal:
        """`(B, T)` ids and mask -> the server's `k` most likely ids everywhere. May be called from several threads.

        Raises:
            TeacherUnavailable: no answer in time.
            ValueError: a row that the server cannot take, or an answer that is not what was asked ([`BadReply`]).
        """
        return score_batch(
            input_ids,
            attention_mask,
            self.k,
            self._score_rows,
            self.vocab_size,
            num_tokens=self.num_tokens,
            tokenizer_id=getattr(self.tokenizer, "name_or_path", "") or None,
        )

    def _score_rows(self, rows: Sequence[list[int]]) -> Iterator[ScoredRow]:
        longest = max(map(len, rows), default=0)
        if self.max_model_len is not None and longest >= self.max_model_len:
            raise ValueError(
                f"A row has {longest} tokens, and {self.name!r} takes {self.max_model_len} with the one that it "
                f"always writes: serve it with --max-model-len {longest + 1}, or lower --block_size."
            )
        return self.server.flow.map(partial(self._score, self.path), rows, work=len)

    async def _score(self, path: str, ids: list[int]) -> ScoredRow:
        # temperature 1 is what prompt_logprobs are made at, whatever one sends; one token is always written
        sampling = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": self.k}
        if path == GENERATE:
            body: dict[str, Any] = {
                "model": self.name,
                "token_ids": ids,
                "sampling_params": {**sampling, "detokenize": False},
            }
        else:
            body = {"model": self.name, "prompt": ids, **sampling}
        reply = await self.server.send("POST", path, body)
        return self._read(path, reply, ids)

    def _read(self, path: str, reply: Any, ids: list[int]) -> ScoredRow:
        where = f"{self.server.url}, {path}"
        if not isinstance(reply, dict):
            raise BadReply(f"{where}: the answer is a {type(reply).__name__}, no object.")
        if reply.get("model") not in (self.name, None):
            raise BadReply(f"{where}: asked {self.name!r}, and {reply['model']!r} answered.")
        holder = reply if path == GENERATE else (_list(reply, "choices") or [{}])[0]
        rows = holder.get("prompt_logprobs") if isinstance(holder, dict) else None
        if not isinstance(rows, list):
            raise BadReply(
                f"{where}: the answer holds no prompt_logprobs. The server does not know the field and dropped it: "
                "only vLLM scores given tokens; other servers can be used in sample mode."
            )
        if len(rows) != len(ids):
            raise BadReply(f"{where}: {len(rows)} rows of prompt_logprobs for {len(ids)} tokens.")
        try:
            entry_ids, logprobs = _table(rows[1:])
        except (AttributeError, KeyError, TypeError, ValueError):
            broken = next(place for place, row in enumerate(rows[1:], 1) if not _is_readable(row))
            raise BadReply(f"{where}: token {broken} of {len(ids)} has no log-probabilities.") from None
        for place, (row, target) in enumerate(zip(rows[1:], ids[1:], strict=True), 1):
            if len(row) < self.k or str(target) not in row:
                raise BadReply(
                    f"{where}: token {place} has {len(row)} log-probabilities, asked for the {self.k} most likely ids "
                    "and the given one."
                )
        order = np.lexsort((entry_ids, logprobs), axis=-1)[:, : -self.k - 1 : -1]  # NaN first: the check speaks of it
        top_ids, top_logprobs = (np.take_along_axis(values, order, -1) for values in (entry_ids, logprobs))
        check_row(top_ids, top_logprobs, where)
        return top_ids, top_logprobs

    def check(self) -> None:
        """Score two tokens.

        Raises:
            TeacherUnavailable, ValueError: see [`signal`].
        """
        ids = self.tokenizer(PROBES[0], add_special_tokens=False)["input_ids"][:2]
        self.server.flow.ask(partial(self._score, self.path, ids))

    def close(self) -> None:
        """Close the connections."""
        self.server.close()


def _list(reply: Any, name: str) -> list[Any]:
    value = reply.get(name) if isinstance(reply, dict) else None
    if not isinstance(value, list):
        raise BadReply(f"The answer holds no list `{name}`: this is no vLLM server.")
    return value


def _table(rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Entries of every token (`{id: {"logprob": ...}}`) -> ids and log-probabilities `(T, most entries)`, absent ones
    -inf. Vectors and not a loop over tokens: ten thousand entries come with a row, and the reader shares a core with
    the server or the training.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: some token's entries are none.
    """
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    values = [entry["logprob"] for row in rows for entry in row.values()]
    if not set(map(type, values)) <= {float, int}:
        raise TypeError("a log-probability is no number")
    shape = (len(rows), max(counts, default=0))
    present = np.arange(shape[1]) < counts[:, None]
    ids, logprobs = np.zeros(shape, np.int64), np.full(shape, -np.inf)
    ids[present] = np.fromiter(map(int, chain.from_iterable(rows)), np.int64, len(values))
    logprobs[present] = values
    return ids, logprobs


def _is_readable(row: Any) -> bool:
    try:
        _table([row])
    except (AttributeError, KeyError, TypeError, ValueError):
        return False
    return True
