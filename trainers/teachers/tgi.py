"""text-generation-inference as a teacher that writes (sample mode).

TGI takes text, not token ids, and gives alternatives for the tokens that it writes, at most five of them unless it was
started with `--max-top-n-tokens`; of given text it tells only each token's own probability. So it cannot score.

Tested against the published schema (docs/openapi.json of 3.3), never against a TGI process. TGI is in maintenance
since December 2025; its authors recommend vLLM.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from .base import PROBES, TeacherCapabilities
from .env import Secret, check_url
from .flow import BadReply, Flow, FlowConfig, RequestFailed, told_wait
from .http_server import PASSING, RequestRefused
from .identity import tokenizer_hash
from .scored import ABSENT
from .written import WrittenText


class TGIWriter:
    """TGI through `huggingface_hub`.

    Building it connects, and has one token written after each of five probes, to see that TGI reads them as our
    tokenizer does (`prefill`).

    Args:
        url: of the server.
        tokenizer: the student's; must be the model's own.
        key: sent as bearer token. Without one none is sent, in particular not the Hub's.
        k: alternatives per token.
        max_tokens: per text.
        seed: of the first text; the next one's is one more.
        config: see [`FlowConfig`].

    Raises:
        ValueError: another tokenizer, or `k` is more than the server gives.
        TeacherUnavailable: no answer.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Any,
        key: Secret | None = None,
        k: int = 5,
        max_tokens: int = 256,
        seed: int | None = None,
        config: FlowConfig | None = None,
        url_name: str = "TGI_URL",
    ):
        from huggingface_hub import AsyncInferenceClient

        if k < 1 or max_tokens < 1:
            raise ValueError(f"k ({k}) and max_tokens ({max_tokens}) must be at least 1.")
        self.url = check_url(url, url_name)
        self.key = key or Secret(None, "TGI_API_KEY")
        self.tokenizer, self.k, self.max_tokens, self.seed = tokenizer, k, max_tokens, seed
        self.vocab_size, self.num_tokens = len(tokenizer), len(tokenizer)
        self.capabilities = TeacherCapabilities(
            form="sparse", scores_given_tokens=False, any_temperature=False, remote=True
        )
        self.flow = Flow(self.url, config)
        # without a key of its own the client would send the token of `hf auth login` to whatever address this is
        self._client = AsyncInferenceClient(
            model=self.url,
            provider="hf-inference",
            api_key=self.key.reveal() or "none",
            timeout=self.flow.config.deadline,
        )
        self.flow.at_close(self._client.close)
        self.info: dict[str, Any] = {}
        self.name = "text-generation-inference"
        try:
            self.info = self.flow.ask(self._info)
            self.name = self.info.get("model_id") or self.name
            self._check_tokenizer()
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"TGIWriter({self.name!r} at {self.url}, k={self.k})"

    def describe(self) -> dict[str, Any]:
        return {
            "model": self.name,
            "revision": self.info.get("model_sha"),
            "tokenizer": tokenizer_hash(self.tokenizer),
            "k": self.k,
            "max_tokens": self.max_tokens,
            "temperature": 1.0,
            "seed": self.seed,
        }

    async def _info(self) -> dict[str, Any]:
        return await self._attempt(self._client.get_endpoint_info)

    def _check_tokenizer(self) -> None:
        for text in PROBES:
            ours = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            reply = self.flow.ask(lambda text=text: self._generate(text, 1, None))  # type: ignore[misc]
            theirs = _prefill(reply, self.url)
            if theirs[-len(ours) :] != ours:
                raise ValueError(
                    f"The tokenizer of {self.name!r} at {self.url} is not the student's: {text[:24]!r} reads "
                    f"{theirs[:6]} there and {ours[:6]} here. Train the codec with the teacher's tokenizer "
                    "(`--tokenizer` of train_autoencoder.py)."
                )

    # -- writing

    def write(self, prompts: Iterable[list[int]]) -> Iterator[WrittenText]:
        """One text for each prompt (token ids), in order. The student's prompt is what TGI says that it has read.

        Raises:
            BadReply: log-probabilities are missing or short.
            TeacherUnavailable: no answer in time.
        """
        return self.flow.map(self._write, enumerate(prompts), work=lambda item: self.max_tokens)

    async def _write(self, item: tuple[int, list[int]]) -> WrittenText:
        number, prompt = item
        text = self.tokenizer.decode(prompt, skip_special_tokens=True)
        reply = await self._generate(text, self.max_tokens, None if self.seed is None else self.seed + number)
        details = reply.details
        ids = [token.id for token in details.tokens]
        tops = details.top_tokens
        if tops is None or len(tops) != len(ids):
            raise BadReply(
                f"{self.url}: {len(tops or [])} rows of top_tokens for {len(ids)} tokens: the server dropped "
                "`top_n_tokens`."
            )
        top_ids, top_logprobs = [], []
        for row in tops:
            pairs = ((float(_field(token, "logprob")), _field(token, "id")) for token in row)
            entries = sorted(pairs, reverse=True)[: self.k]
            if len(entries) < self.k or any(not value <= 1e-3 for value, _ in entries):
                raise BadReply(f"{self.url}: a row of top_tokens holds {entries[:3]}..., asked for {self.k} entries.")
            top_ids.append([i for _, i in entries])
            top_logprobs.append([max(value, ABSENT) for value, _ in entries])
        # the end is a token of TGI's text, with its alternatives: nothing is to be appended
        return WrittenText(_prefill(reply, self.url), ids, top_ids, top_logprobs, ended=False)

    async def _generate(self, text: str, max_tokens: int, seed: int | None) -> Any:
        async def send():
            return await self._client.text_generation(
                text,
                details=True,
                decoder_input_details=True,
                top_n_tokens=self.k,
                max_new_tokens=max_tokens,
                do_sample=True,
                seed=seed,
            )

        reply = await self._attempt(send)
        if getattr(reply, "details", None) is None:
            raise BadReply(f"{self.url}: the answer holds no details: this is no text-generation-inference server.")
        return reply

    async def _attempt(self, send: Any) -> Any:
        from huggingface_hub.errors import HfHubHTTPError, InferenceTimeoutError, TextGenerationError

        try:
            return await send()
        except InferenceTimeoutError:
            raise RequestFailed("no answer in time") from None
        except (HfHubHTTPError, TextGenerationError) as error:
            cause = error if isinstance(error, HfHubHTTPError) else error.__cause__
            response = getattr(cause, "response", None)
            status = getattr(response, "status_code", 0)
            said = self.key.redact(" ".join(str(error).split()))[:300]
            if status == 429:
                wait, quota = told_wait(getattr(response, "headers", {}))
                raise RequestFailed(f"429 {said}", refused=True, quota=quota, wait=wait) from None
            if status in PASSING:
                raise RequestFailed(f"{status} {said}") from None
            hint = " Lower --kd_top_k, or start TGI with --max-top-n-tokens." if "top_n_tokens" in said else ""
            raise RequestRefused(f"{self.url} answers {status}: {said}{hint}", status, said) from None
        except (OSError, json.JSONDecodeError) as error:
            raise RequestFailed(f"no whole answer ({type(error).__name__})") from None
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
                raise
            raise RequestFailed(f"no whole answer ({type(error).__name__})") from None

    def check(self) -> None:
        """Have one token written."""
        self.flow.ask(lambda: self._generate(PROBES[0], 1, None))

    def close(self) -> None:
        """Close the connections."""
        self.flow.close()


def _field(token: Any, name: str) -> Any:
    # the client parses lists, and leaves what is in lists of lists (huggingface_hub 2.4)
    return token[name] if isinstance(token, dict) else getattr(token, name)


def _prefill(reply: Any, url: str) -> list[int]:
    prefill = reply.details.prefill
    if not prefill:
        raise BadReply(f"{url}: the answer holds no prefill: the server dropped `decoder_input_details`.")
    return [token.id for token in prefill]
