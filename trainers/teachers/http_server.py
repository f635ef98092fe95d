"""One server, spoken to through the OpenAI client: its paths, its errors, its key."""

import importlib
import json
from typing import Any

from .env import Secret, check_url
from .flow import Flow, FlowConfig, RequestFailed, quota_pause, told_wait


# what another attempt may cure; everything else above 399 is said once and for all
PASSING = {408, 409, 425, 500, 502, 503, 504, 520, 522, 524, 529}
LONGEST_COMPLAINT = 300  # characters of a server's own words in our messages


class RequestRefused(ValueError):
    """The server will not do this, however often it is asked.

    Attributes:
        status: HTTP's.
        said: the server's own words, without the key.
    """

    def __init__(self, message: str, status: int, said: str):
        super().__init__(message)
        self.status, self.said = status, said


class HTTPServer:
    """An OpenAI-compatible server.

    Args:
        url: with or without `/v1`.
        name: of the variable or flag that `url` came from, for messages.
        key: sent as bearer token; an empty one sends none.
        config: see [`FlowConfig`].

    Raises:
        ImportError: the extra `teachers` is not installed.
        ValueError: `url` is no plain address.
    """

    def __init__(self, url: str, name: str = "url", key: Secret | None = None, config: FlowConfig | None = None):
        try:
            import openai
        except ImportError as error:
            raise ImportError(
                "A teacher behind HTTP needs the openai package: pip install 'latentforge[teachers]'."
            ) from error
        self.url = check_url(url, name)
        self.root = self.url.removesuffix("/v1")
        self.key = Secret(None, "no key") if key is None else key
        self.flow = Flow(self.url, config)
        # its own retries would hide refusals from the limiter; its timeout is per read, ours is per request
        self._client = openai.AsyncOpenAI(
            base_url=self.url, api_key=self.key.reveal() or "none", max_retries=0, timeout=self.flow.config.deadline
        )
        self._openai = openai
        self._response = _response_type(self._client)
        self.flow.at_close(self._client.close)

    def __repr__(self) -> str:
        return f"HTTPServer({self.url})"

    async def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One attempt. `path` is taken from the server's root (`/v1/models`, `/tokenize`); gives the parsed reply.

        Raises:
            RequestFailed: another attempt may help.
            RequestRefused: none will.
        """
        client, openai = self._client, self._openai
        try:
            if method == "GET":
                response = await client.get(self.root + path, cast_to=self._response)
            else:
                response = await client.post(self.root + path, body=body, cast_to=self._response)
            content = await response.aread()
        except openai.APIStatusError as error:
            raise self._status(path, error.response) from None
        except (openai.APIConnectionError, OSError) as error:
            # a timeout, a closed socket, half a body; the class says which, the text may repeat the request
            reason = type(error.__cause__ or error).__name__
            raise RequestFailed(f"no whole answer ({reason})") from None
        except Exception as error:
            if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2"):
                raise
            raise RequestFailed(f"no whole answer ({type(error).__name__})") from None
        pause = quota_pause(response.headers, self.flow.limiter.in_flight)
        if pause:
            self.flow.limiter.pause(pause)
        try:
            return _parse(content)
        except ValueError:
            raise RequestFailed(f"{path} answered with {len(content)} bytes that are no JSON") from None

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """[`send`] with retries, and wait for it."""
        return self.flow.ask(lambda: self.send(method, path, body))

    def _status(self, path: str, response: Any) -> Exception:
        status, said = response.status_code, self.key.redact(_message(response))[:LONGEST_COMPLAINT]
        if status == 429:
            wait, quota = told_wait(response.headers)
            return RequestFailed(f"429 {said}".strip(), refused=True, quota=quota, wait=wait)
        if status in PASSING:
            wait, _ = told_wait(response.headers)
            return RequestFailed(f"{status} {said}".strip(), wait=wait)
        hint = ""
        if status in (401, 403) and path.startswith("/v1"):
            hint = f" Check {self.key.name} ({'set' if self.key else 'not set'})."
        return RequestRefused(f"{self.url}: {path} answers {status}: {said}{hint}", status, said)

    def close(self) -> None:
        self.flow.close()


def _response_type(client: Any) -> Any:
    # "give me the response as it is" is asked with the class of the package below; openai moved from httpx to httpx2
    roots = {base.__module__.partition(".")[0] for base in type(client._client).__mro__}
    return importlib.import_module("httpx2" if "httpx2" in roots else "httpx").Response


def _parse(content: bytes) -> Any:
    try:
        import jiter  # comes with openai; five times as fast on replies of a megabyte, with Python's lock held
    except ImportError:
        return json.loads(content)
    return jiter.from_json(content)


def _message(response: Any) -> str:
    """A server's complaint in one line, whole: cut before the key is taken out, it would end in half a key."""
    try:
        said = json.loads(response.content)
    except ValueError:
        said = response.text
    for name in ("error", "message", "detail"):
        said = said.get(name, said) if isinstance(said, dict) else said
    return " ".join(str(said).split())
