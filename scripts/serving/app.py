"""The HTTP side of the engine: the first LatentForge's routes, and OpenAI's."""

import asyncio
import contextlib
import hmac
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from . import engine as engines
from . import schemas
from .metrics import Metrics
from .sampling import Sampling


access_log = logging.getLogger("latentforge.access")


@dataclass(frozen=True)
class ServerConfig:
    """What the HTTP side allows.

    Attributes:
        model_name: under which the model is served.
        api_key: that callers must send as bearer token; None: none. From the environment, never a flag.
        cors_origins: that browsers may call from; none by default.
        max_body: bytes of a request.
        body_seconds: until a request's body must have come.
        deadline: seconds for one request; None: no limit.
        log_prompts: whether prompts and texts are logged.
        version: of LatentForge.
    """

    model_name: str = "latentforge"
    api_key: str | None = field(default=None, repr=False)
    cors_origins: tuple[str, ...] = ()
    max_body: int = 2 << 20
    body_seconds: float = 30.0
    deadline: float | None = 600.0
    log_prompts: bool = False
    version: str = "0"


class APIError(HTTPException):
    """An answer other than 200. One of Starlette's, which FastAPI lets through where it reads a body."""

    def __init__(
        self, status: int, message: str, kind: str, code: str | None = None, headers: dict[str, str] | None = None
    ):
        super().__init__(status, message, headers)
        self.status, self.message, self.kind, self.code = status, message, kind, code


def error_response(
    status: int, message: str, kind: str, code: str | None = None, param: str | None = None, headers: Any = None
) -> JSONResponse:
    body = schemas.Error(error=schemas.ErrorBody(message=message, type=kind, param=param, code=code))
    return JSONResponse(body.model_dump(), status_code=status, headers=headers)


# -- around every request


class Guard:
    """Outermost: request ids, the size and the time of bodies, one line in the log, counts.

    Plain ASGI: a middleware of Starlette's own kind hides from a route that its client has gone.
    """

    def __init__(self, app: Any, config: ServerConfig, metrics: Metrics):
        self.app, self.config, self.metrics = app, config, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if given.isascii() and given.isprintable() and 0 < len(given) <= 64 else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        facts: dict[str, Any] = {}
        scope["state"]["log"] = facts
        started, status = time.monotonic(), 0
        waiting: list[Any] = []

        async def replay() -> Any:
            return waiting.pop() if waiting else await receive()  # behind the body comes that the client has gone

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            length = headers.get(b"content-length", b"0")
            if length.isdigit() and int(length) > self.config.max_body:
                raise too_large(self.config.max_body)
            # whole, before a route begins: FastAPI would make its own error of what is wrong with it
            body = await self._body(receive, started + self.config.body_seconds)
            if body is None:
                return  # the client has gone
            waiting.append({"type": "http.request", "body": body, "more_body": False})
            await self.app(scope, replay, answer)
        except APIError as error:
            if status:  # the answer has begun
                raise
            if error.status == 413:
                await _drain(receive, 4 * self.config.max_body, 1.0)
            # the rest of the body is not read: the connection cannot be used again
            closing = {"connection": "close"}
            reply = error_response(error.status, error.message, error.kind, error.code, headers=closing)
            await reply(scope, receive, answer)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.responses.labels(path, str(status)).inc()
            line = {
                "id": request_id,
                "method": scope["method"],
                "path": path,
                "status": status,
                "seconds": round(time.monotonic() - started, 4),
                **facts,
            }
            access_log.info(json.dumps(line, ensure_ascii=False))

    async def _body(self, receive: Any, ends: float) -> bytes | None:
        """The request's body; None: the client has gone.

        Raises:
            APIError: it is too large, or does not come in time.
        """
        parts: list[bytes] = []
        size = 0
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(ends - time.monotonic(), 0.001))
            except asyncio.TimeoutError:
                raise APIError(408, "The body did not come in time.", "invalid_request_error") from None
            if message["type"] != "http.request":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.config.max_body:
                raise too_large(self.config.max_body)
            if not message.get("more_body"):
                return b"".join(parts)


async def _drain(receive: Any, limit: int, seconds: float) -> None:
    """Read a little of what nobody wants: whoever closes on unread bytes resets the connection, and a client that is
    still sending never sees the answer."""
    ends = time.monotonic() + seconds
    while limit > 0:
        try:
            message = await asyncio.wait_for(receive(), max(ends - time.monotonic(), 0.001))
        except asyncio.TimeoutError:
            return
        if message["type"] != "http.request" or not message.get("more_body"):
            return
        limit -= len(message.get("body", b""))


def too_large(limit: int) -> APIError:
    return APIError(413, f"The body has more than {limit} bytes.", "invalid_request_error", "body_too_large")


# -- texts


class Writing:
    """The texts of one call: submitted together, cancelled together.

    Args:
        engine: writes.
        asked: one request for each choice; their `on_output` is set here.

    Raises:
        APIError: the engine refuses one; then none is written.
    """

    def __init__(self, engine: engines.Engine, asked: Sequence[engines.Request]):
        self.requests = list(asked)
        self.queue: asyncio.Queue[tuple[int, engines.Output]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listener(index: int) -> Callable[[engines.Output], None]:
            def tell(output: engines.Output) -> None:
                # the loop may be closed already: nobody listens any more
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(self.queue.put_nowait, (index, output))

            return tell

        try:
            for index, request in enumerate(self.requests):
                request.on_output = listener(index)
                engine.submit(request)
        except Exception as error:
            self.cancel()
            raise _as_api_error(error) from error

    def cancel(self) -> None:
        for request in self.requests:
            request.cancel()

    async def outputs(self) -> AsyncIterator[tuple[int, engines.Output]]:
        """`(choice, output)` as they come.

        Raises:
            APIError: one of the texts could not be finished.
        """
        open_choices = len(self.requests)
        while open_choices:
            index, output = await self.queue.get()
            if output.finish_reason in ("error", "deadline", "cancelled"):
                self.cancel()
                raise _unfinished(output)
            open_choices -= output.finish_reason is not None
            yield index, output

    def usage(self) -> schemas.Usage:
        prompts = {id(request.prompt_ids): len(request.prompt_ids) for request in self.requests}
        prompt, written = sum(prompts.values()), sum(request.num_tokens for request in self.requests)
        return schemas.Usage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)


def _as_api_error(error: Exception) -> Exception:
    if isinstance(error, engines.EngineBusy):
        headers = {"retry-after": str(round(error.retry_after))}
        return APIError(429, str(error), "rate_limit_error", "queue_full", headers)
    if isinstance(error, engines.EngineClosed):
        return APIError(503, str(error), "server_error", "stopping", {"retry-after": "1"})
    if isinstance(error, ValueError):
        return APIError(400, str(error), "invalid_request_error")
    return error


def _unfinished(output: engines.Output) -> APIError:
    if output.finish_reason == "deadline":
        return APIError(504, "The text was not finished in time.", "server_error", "deadline")
    if output.finish_reason == "cancelled":
        return APIError(503, "The server is stopping.", "server_error", "stopping", {"retry-after": "1"})
    return APIError(500, "The text could not be written; the server's log says why.", "server_error")


async def while_connected(request: Request, work: Awaitable[Any], writing: Writing) -> Any:
    """The result of `work`; where the client goes away first, the texts are cancelled."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise APIError(499, "The client has gone.", "invalid_request_error")
        return task.result()
    finally:
        writing.cancel()
        for one in (task, leaving):
            one.cancel()


class EventStream(StreamingResponse):
    """Server-sent events; the texts are cancelled however it ends."""

    def __init__(self, content: AsyncIterator[str], writing: Writing):
        super().__init__(content, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.writing = writing

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.writing.cancel()


# -- the application


def build_app(engine: engines.Engine, config: ServerConfig, metrics: Metrics | None = None) -> FastAPI:
    """The application around an engine; it owns neither."""
    metrics = metrics or Metrics()
    metrics.engine = engine
    created = int(time.time())
    bearer = HTTPBearer(auto_error=False)

    def authorise(credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        sent = "" if credentials is None else credentials.credentials
        if not hmac.compare_digest(sent.encode(), str(config.api_key).encode()):
            raise APIError(
                401,
                "The API key is missing or wrong: send it as bearer token.",
                "authentication_error",
                "invalid_api_key",
                {"www-authenticate": "Bearer"},
            )

    guarded = [Depends(authorise)] if config.api_key else []
    statuses = {400: "Refused", 404: "Not here", 408: "Too slow", 413: "Too large"}
    statuses |= {429: "The queue is full", 500: "Failed", 503: "Stopping", 504: "Not finished in time"}
    if config.api_key:
        statuses[401] = "No key"
    failures: dict[int | str, dict[str, Any]] = {
        status: {"model": schemas.Error, "description": text} for status, text in statuses.items()
    }
    app = FastAPI(title="LatentForge", version=config.version, description="Texts, a patch of tokens at a time.")
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Guard, config=config, metrics=metrics)
    _handle_errors(app)
    model, tokenizer = engine.model, engine.tokenizer

    def encode(prompt: str | list[int]) -> list[int]:
        if not isinstance(prompt, str):
            return prompt
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        start = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
        return ids or ([] if start is None else [start])

    def check_model(name: str | None) -> None:
        if name not in (None, config.model_name):
            raise APIError(
                404,
                f"There is no model {name!r}: this server has {config.model_name!r}.",
                "invalid_request_error",
                "model_not_found",
            )

    def requests_of(body: schemas.Common, prompts: list[list[int]], count: int | None, logprobs: int | None) -> Any:
        """One request for every choice: all of the first prompt, then all of the next."""
        stop = [body.stop] if isinstance(body.stop, str) else list(body.stop or ())
        sampling = Sampling(
            1.0 if body.temperature is None else body.temperature,
            1.0 if body.top_p is None else body.top_p,
            body.top_k or 0,
        )
        if len(prompts) * (body.n or 1) > schemas.MOST_CHOICES:
            raise APIError(400, f"At most {schemas.MOST_CHOICES} texts in one call.", "invalid_request_error")
        return [
            engines.Request(
                prompt,
                engine.most_new_tokens(len(prompt)) if count is None else count,
                sampling,
                None if body.seed is None else _nth_seed(body.seed, number),
                stop,
                logprobs,
                body.ignore_eos,
                config.deadline,
            )
            for prompt in prompts
            for number in range(body.n or 1)
        ]

    def note(request: Request, writing: Writing, prompts: Any) -> None:
        facts = request.scope["state"]["log"]
        facts |= writing.usage().model_dump(exclude={"total_tokens"})
        if config.log_prompts:
            facts["prompt"] = prompts

    # -- the first LatentForge's

    @app.get("/", tags=["status"], response_model=schemas.Status)
    async def root() -> Any:
        """That it is there."""
        return schemas.Status(status="ok", model=config.model_name)

    @app.get("/health", tags=["status"], response_model=schemas.Status, responses={503: {"model": schemas.Status}})
    async def health() -> Any:
        """Whether it takes requests."""
        status = engine.status
        body = schemas.Status(status=status, model=config.model_name)
        return JSONResponse(body.model_dump(), status_code=200 if status == "ok" else 503)

    @app.get("/info", tags=["status"], response_model=schemas.Info, dependencies=guarded, responses=failures)
    async def info() -> Any:
        """What is served."""
        return schemas.Info(
            model=config.model_name,
            patch_size=engine.patch_size,
            latent_size=model.config.latent_size,
            compression_factor=engine.patch_size,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
            head=model.config.head_config.head_type,
            decoder=model.config.decoder_type,
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            max_tokens=engine.max_tokens,
            has_likelihood=engine.has_likelihood,
            has_chat_template=bool(tokenizer.chat_template),
            version=config.version,
        )

    @app.post(
        "/generate", tags=["text"], response_model=schemas.GenerateResponse, dependencies=guarded, responses=failures
    )
    async def generate(body: schemas.GenerateRequest, request: Request) -> Any:
        """Continue a text."""
        ids = await run_in_threadpool(encode, body.prompt)
        temperature = body.temperature
        if model.is_aligned and "temperature" not in body.model_fields_set:
            temperature = 1.0  # the only one at which it samples
        sampling = Sampling(temperature, body.top_p, body.top_k)
        seed = None if body.seed is None else _nth_seed(body.seed, 0)
        asked = engines.Request(ids, body.max_new_tokens, sampling, seed, deadline=config.deadline)
        writing = Writing(engine, [asked])

        async def collect() -> str:
            return "".join([output.text async for _, output in writing.outputs()])

        try:
            text = await while_connected(request, collect(), writing)
        finally:
            note(request, writing, body.prompt)
        return schemas.GenerateResponse(
            generated_text=body.prompt + text,
            prompt=body.prompt,
            num_tokens_generated=asked.num_tokens,
            compression_factor=engine.patch_size,
        )

    # -- OpenAI's

    entry = schemas.ModelEntry(id=config.model_name, created=created, max_model_len=engine.max_tokens)

    @app.get("/v1/models", tags=["openai"], response_model=schemas.ModelList, dependencies=guarded, responses=failures)
    async def list_models() -> Any:
        return schemas.ModelList(data=[entry])

    @app.get(
        "/v1/models/{name:path}",
        tags=["openai"],
        response_model=schemas.ModelEntry,
        dependencies=guarded,
        responses=failures,
    )
    async def show_model(name: str) -> Any:
        check_model(name)
        return entry

    @app.post(
        "/v1/completions",
        tags=["openai"],
        response_model=schemas.Completion,
        dependencies=guarded,
        responses={**failures, 200: {"content": {"text/event-stream": {}}}},
    )
    async def complete(body: schemas.CompletionRequest, request: Request) -> Any:
        """Continue texts."""
        check_model(body.model)
        given: list[Any] = (
            [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else list(body.prompt)
        )
        prompts = await run_in_threadpool(lambda: [encode(prompt) for prompt in given])
        writing = Writing(engine, requests_of(body, prompts, body.max_tokens or 16, body.logprobs))
        head: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": config.model_name,
        }
        offsets = [0] * len(writing.requests)

        def logprobs_of(index: int, entries: list[engines.TokenLogprob]) -> schemas.CompletionLogprobs | None:
            if body.logprobs is None:
                return None
            tokens = [_spelt(tokenizer, one.token_id) for one in entries]
            places = []
            for token in tokens:
                places.append(offsets[index])
                offsets[index] += len(token)
            return schemas.CompletionLogprobs(
                tokens=tokens,
                token_logprobs=[one.logprob for one in entries],
                top_logprobs=[{_spelt(tokenizer, i): value for i, value in one.top} for one in entries],
                text_offset=places,
            )

        def choice(index: int, output: engines.Output) -> schemas.CompletionChoice:
            return schemas.CompletionChoice(
                index=index,
                text=output.text,
                logprobs=logprobs_of(index, output.logprobs),
                finish_reason=output.finish_reason,  # type: ignore[arg-type]
            )

        if body.stream:

            async def events() -> AsyncIterator[str]:
                async for index, output in writing.outputs():
                    yield schemas.Completion(**head, choices=[choice(index, output)]).model_dump_json()
                if body.stream_options is not None and body.stream_options.include_usage:
                    yield schemas.Completion(**head, choices=[], usage=writing.usage()).model_dump_json()

            return EventStream(_as_events(events(), lambda: note(request, writing, given)), writing)
        try:
            outputs = await while_connected(request, _gather(writing), writing)
        finally:
            note(request, writing, given)
        choices = [choice(index, output) for index, output in enumerate(outputs)]
        return schemas.Completion(**head, choices=choices, usage=writing.usage())

    @app.post(
        "/v1/chat/completions",
        tags=["openai"],
        response_model=schemas.ChatCompletion,
        dependencies=guarded,
        responses={**failures, 200: {"content": {"text/event-stream": {}}}},
    )
    async def chat(body: schemas.ChatRequest, request: Request) -> Any:
        """Answer messages, in the words of the tokenizer's chat template."""
        check_model(body.model)
        if not tokenizer.chat_template:
            raise APIError(
                400,
                "This model has no chat template: use /v1/completions, or start the server with --chat_template.",
                "invalid_request_error",
                "no_chat_template",
            )
        if body.top_logprobs and not body.logprobs:
            raise APIError(400, "top_logprobs needs logprobs to be true.", "invalid_request_error")
        messages = [
            {
                "role": "system" if message.role == "developer" else message.role,
                "content": message.content
                if isinstance(message.content, str)
                else "".join(part.text for part in message.content),
            }
            for message in body.messages
        ]
        prompt = await run_in_threadpool(_templated, tokenizer, messages)
        count = body.max_completion_tokens or body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        writing = Writing(engine, requests_of(body, [prompt], count, logprobs))
        head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": config.model_name,
        }

        def logprobs_of(entries: list[engines.TokenLogprob]) -> Any:
            if not body.logprobs:
                return None
            return {
                "content": [
                    {
                        **_described(tokenizer, one.token_id, one.logprob),
                        "top_logprobs": [_described(tokenizer, i, value) for i, value in one.top],
                    }
                    for one in entries
                ]
            }

        if body.stream:
            chunk = {**head, "object": "chat.completion.chunk"}

            async def events() -> AsyncIterator[str]:
                begun = set()
                async for index, output in writing.outputs():
                    delta = {"content": output.text}
                    if index not in begun:
                        begun.add(index)
                        delta = {"role": "assistant", **delta}
                    one = {"index": index, "delta": delta, "finish_reason": output.finish_reason}
                    one["logprobs"] = logprobs_of(output.logprobs)
                    yield json.dumps({**chunk, "choices": [one]}, ensure_ascii=False)
                if body.stream_options is not None and body.stream_options.include_usage:
                    yield json.dumps({**chunk, "choices": [], "usage": writing.usage().model_dump()})

            return EventStream(_as_events(events(), lambda: note(request, writing, messages)), writing)
        try:
            outputs = await while_connected(request, _gather(writing), writing)
        finally:
            note(request, writing, messages)
        choices = [
            schemas.ChatChoice(
                index=index,
                message=schemas.ChatMessage(content=output.text),
                logprobs=logprobs_of(output.logprobs),
                finish_reason=output.finish_reason,
            )
            for index, output in enumerate(outputs)
        ]
        return schemas.ChatCompletion(**head, choices=choices, usage=writing.usage())

    @app.get("/metrics", tags=["status"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def read_metrics() -> Response:
        """For Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    schema = app.openapi

    def openapi() -> dict[str, Any]:
        described = schema()
        for path in described["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)  # FastAPI's own; what is wrong is 400 here, as at OpenAI's
        return described

    app.openapi = openapi  # type: ignore[method-assign]
    return app


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(APIError)
    async def on_api_error(request: Request, error: APIError) -> JSONResponse:
        return error_response(error.status, error.message, error.kind, error.code, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        # the input itself is not repeated: it may be long, secret, or no JSON (NaN)
        found = error.errors()[0]
        where = ".".join(str(part) for part in found["loc"] if part != "body")
        message = f"{where}: {found['msg']}" if where else str(found["msg"])
        return error_response(400, message[:500], "invalid_request_error", param=where or None)

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), "invalid_request_error", headers=error.headers)

    @app.exception_handler(Exception)
    async def on_fault(request: Request, error: Exception) -> JSONResponse:
        return error_response(500, "The server failed; its log says why.", "server_error")


async def _gather(writing: Writing) -> list[engines.Output]:
    whole = [engines.Output() for _ in writing.requests]
    async for index, output in writing.outputs():
        whole[index].text += output.text
        whole[index].logprobs += output.logprobs
        whole[index].finish_reason = output.finish_reason
    return whole


async def _as_events(lines: AsyncIterator[str], at_end: Callable[[], None]) -> AsyncIterator[str]:
    try:
        async for line in lines:
            yield f"data: {line}\n\n"
    except APIError as error:  # the answer has begun: the status is sent
        body = schemas.ErrorBody(message=error.message, type=error.kind, code=error.code)
        yield f"data: {schemas.Error(error=body).model_dump_json()}\n\n"
    finally:
        at_end()
    yield "data: [DONE]\n\n"


def _head(prefix: str, model_name: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}


def _nth_seed(seed: int, number: int) -> int:
    """Other texts for one call's choices, and the first as with `n` of 1; torch takes 0 to 2**63 - 1."""
    return (seed + number) % 2**63


def _spelt(tokenizer: Any, token_id: int) -> str:
    return tokenizer.decode([token_id])


def _described(tokenizer: Any, token_id: int, logprob: float) -> dict[str, Any]:
    text = _spelt(tokenizer, token_id)
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _templated(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    import jinja2

    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except jinja2.TemplateError as error:  # "roles must alternate"
        raise APIError(400, f"The chat template refuses these messages: {error}", "invalid_request_error") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]
