"""Who is written when: requests come, wait, are read, are written together, and leave. No HTTP here.

One thread owns the model. Each turn it reads a piece of the waiting prompts (at most `prefill_tokens`, so that a long
prompt does not stall the others) and writes one patch of every row. Rows join and leave between patches.
"""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .patch_batch import PLACES_STEP, Noise, PatchBatch, Prefill, room_for
from .sampling import Sampling, sample
from .text import TextStream


logger = logging.getLogger(__name__)


class RequestRefused(ValueError):
    """The request can never be served by this engine; the message says why."""


class EngineBusy(RuntimeError):
    """The queue is full. `retry_after` (seconds): when a place may be free."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class EngineClosed(RuntimeError):
    """The engine takes nothing more."""


@dataclass(frozen=True)
class EngineConfig:
    """Limits.

    Attributes:
        max_rows: that are written together.
        max_waiting: requests in the queue.
        max_tokens: prompt and text of one request together; None: what the backbone was made for.
        cache_bytes: of keys and values of all rows.
        prefill_tokens: of a prompt that are read between two patches of the others.
    """

    max_rows: int = 32
    max_waiting: int = 256
    max_tokens: int | None = None
    cache_bytes: int = 2 << 30
    prefill_tokens: int = 512

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_waiting", "cache_bytes", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class TokenLogprob:
    """A token's log-probability under the model at temperature 1, and the likeliest tokens beside it."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Output:
    """What one patch brought: text that may be shown, its tokens, and at the end why it ended.

    Attributes:
        finish_reason: `stop` (EOS or a stop string), `length`, `cancelled`, `deadline`, or `error`; None: more comes.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None


@dataclass(eq=False)
class Request:
    """A text to be written.

    Args:
        prompt_ids: at least one token.
        max_new_tokens: at most.
        sampling: see [`Sampling`].
        seed: the same seed gives the same text, alone or in a crowd; -2**63 to 2**63 - 1. None: another each time.
        stop: strings that end the text; they are not part of it.
        logprobs: likeliest tokens that are reported with each token; None: no log-probabilities at all.
        ignore_eos: go on behind EOS (for measurements).
        deadline: seconds until it ends unfinished.
        on_output: called by the engine's thread for every [`Output`]; must return at once.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    deadline: float | None = None
    on_output: Callable[[Output], Any] = lambda output: None

    def __post_init__(self) -> None:
        self.cancelled = False
        self.submitted = time.monotonic()
        self.first_output: float | None = None
        self.num_tokens = 0

    def cancel(self) -> None:
        """End it at the next patch."""
        self.cancelled = True


@dataclass(eq=False)
class _Row:
    """A request that is being written."""

    request: Request
    text: TextStream
    random: random.Random
    noise: Noise | None  # of a head that reads it
    new: Output = field(default_factory=Output)
    finish_reason: str | None = None


@dataclass
class Statistics:
    """Counters since the start, and what is going on now."""

    requests: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    backbone_steps: int = 0
    patches: int = 0  # of single rows
    rows: int = 0
    waiting: int = 0
    cache_bytes: int = 0


class Engine:
    """Writes any number of requests on one model.

    Args:
        model: a `LatentForgeForCausalLM`; put in eval mode.
        tokenizer: its own.
        config: see [`EngineConfig`].
        observe: told `(name, seconds)` of `time_to_first_token`, `time_per_token`, `request`, `queue`.

    Raises:
        ValueError: a backbone that rows of different lengths cannot share, or limits that leave no room for any.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: EngineConfig | None = None,
        observe: Callable[[str, float], Any] = lambda name, seconds: None,
    ):
        self.model, self.tokenizer, self.config = model.eval(), tokenizer, config or EngineConfig()
        self.observe = observe
        self.patch_size = model.config.patch_size
        eos = model.generation_config.eos_token_id
        eos = model.config.eos_token_id if eos is None else eos
        self.eos_ids = {eos} if isinstance(eos, int) else set(eos or ())
        limit = getattr(model.config.backbone_config, "max_position_embeddings", None)
        self.max_tokens = min(
            x for x in (self.config.max_tokens, limit and limit * self.patch_size, 1 << 30) if x is not None
        )
        # an energy head draws its latent: what it says of a token is no probability of the model
        self.has_likelihood = not model.head.noise_size
        self.statistics = Statistics()
        self._batch = PatchBatch(model)
        self._rows: list[_Row] = []
        self._waiting: deque[Request] = deque()
        self._reading: list[_Row] = []  # whose prompts are being read, by `_prefill`
        self._prefill: Prefill | None = None
        self._changed = threading.Condition()
        self._put_off = False  # prompts, by a patch
        self._closing = False
        self._bytes_per_place = self._measure_place()
        if self._bytes_of(1, 1) > self.config.cache_bytes:
            raise ValueError(
                f"cache_bytes ({self.config.cache_bytes}) leaves no room for one row, which needs "
                f"{self._bytes_of(1, 1)}."
            )
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # -- from any thread

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestRefused: it is too long, or asks for what the model cannot do.
            EngineBusy: the queue is full.
            EngineClosed: the engine is stopping.
        """
        count = len(request.prompt_ids)
        if not count:
            raise RequestRefused("The prompt is empty: give at least one token.")
        if request.max_new_tokens < 1:
            raise RequestRefused(f"max_tokens must be at least 1, got {request.max_new_tokens}.")
        if count + request.max_new_tokens > self.max_tokens:
            raise RequestRefused(
                f"The prompt has {count} tokens and {request.max_new_tokens} more are asked for: together at most "
                f"{self.max_tokens}."
            )
        size = self.model.config.vocab_size
        if not all(0 <= i < size for i in request.prompt_ids):
            raise RequestRefused(f"The prompt holds token ids outside of 0 to {size - 1}.")
        if request.seed is not None and not -(2**63) <= request.seed < 2**63:
            raise RequestRefused(f"seed must lie between -2**63 and 2**63 - 1, got {request.seed}.")
        if request.logprobs is not None and not self.has_likelihood:
            raise RequestRefused(
                "This model draws a latent for each patch, and its tokens have no probability that could be computed: "
                "leave logprobs out."
            )
        sampling = request.sampling
        if self.model.is_aligned and (sampling.temperature not in (0, 1) or sampling.top_k):
            raise RequestRefused(
                "This model's noise chooses whole patches: top_p shapes it, temperature must be 0 (greedy) or 1, and "
                "top_k must be left out."
            )
        if self._bytes_of(1, self._places(request)) > self.config.cache_bytes:
            raise RequestRefused(
                f"{count + request.max_new_tokens} tokens need more memory than the server sets aside: ask for fewer."
            )
        with self._changed:
            if self._closing:
                raise EngineClosed("The server is stopping.")
            if len(self._waiting) >= self.config.max_waiting:
                raise EngineBusy(f"{len(self._waiting)} requests are waiting already.", self._expected_wait())
            self.statistics.requests += 1
            self._waiting.append(request)
            self._changed.notify_all()

    def most_new_tokens(self, prompt_tokens: int) -> int:
        """That a prompt of so many may be followed by; 1 where nothing fits, which [`submit`] refuses."""
        places = self.config.cache_bytes // self._bytes_per_place // PLACES_STEP * PLACES_STEP
        in_memory = (places - 1) * self.patch_size - 1  # see `_places`
        return max(1, min(self.max_tokens, in_memory) - prompt_tokens)

    def snapshot(self) -> Statistics:
        """The statistics now."""
        with self._changed:
            self.statistics.rows, self.statistics.waiting = len(self._rows), len(self._waiting)
            self.statistics.cache_bytes = self._batch.num_bytes
            return Statistics(**{**vars(self.statistics), "finished": dict(self.statistics.finished)})

    @property
    def status(self) -> str:
        """`ok`, `stopping`, or `failed`: its thread has ended."""
        return "stopping" if self._closing else "ok" if self._thread.is_alive() else "failed"

    def refuse(self) -> None:
        """Take nothing more. May be called by a signal's handler."""
        self._closing = True

    def close(self, patience: float = 0.0) -> None:
        """Take nothing more, let what is there finish for so many seconds, cancel the rest, and end."""
        self.refuse()
        with self._changed:
            self._changed.notify_all()
        self._thread.join(patience)
        with self._changed:
            for request in [*self._waiting, *(row.request for row in [*self._rows, *self._reading])]:
                request.cancel()
            self._changed.notify_all()
        self._thread.join()

    def _expected_wait(self) -> float:
        # half of the rows' places become free in the time that a row takes on average
        return max(1.0, len(self._waiting) / self.config.max_rows)

    # -- memory

    def _places(self, request: Request) -> int:
        return (len(request.prompt_ids) + request.max_new_tokens) // self.patch_size + 2

    def _bytes_of(self, rows: int, places: int) -> int:
        rows, places = room_for(rows, places)
        return rows * places * self._bytes_per_place

    @torch.inference_mode()
    def _measure_place(self) -> int:
        """Bytes that one patch of one row takes; also the first, slow, use of every part of the model."""
        eos = next(iter(self.eos_ids), 0)
        prefill = Prefill(self.model, [[eos] * (self.patch_size + 1)])
        prefill.advance(2)
        batch = PatchBatch(self.model)
        batch.join(prefill.finish([None]), [2], [None])
        tokens = torch.tensor([eos], device=self.model.device)
        for place in [*range(batch.phase(0), self.patch_size), 0]:
            batch.read(place, tokens, [True])
        rows, places = batch.capacity
        return batch.num_bytes // (rows * places)

    def _has_room(self, request: Request) -> bool:
        rows = len(self._rows) + len(self._reading) + 1
        if rows > self.config.max_rows:
            return False
        reading = [self._places(row.request) for row in self._reading]
        places = max([self._places(request), *reading, *self._batch.places])
        return self._bytes_of(rows, places) <= self.config.cache_bytes

    # -- the engine's thread

    def _run(self) -> None:
        with torch.inference_mode():
            while self._wait():
                try:
                    self._read_prompts()
                    if self._rows:
                        self._write_patch()
                except Exception as error:  # of memory, say: whoever is there is told, and the next ones are served
                    logger.exception("A step failed; its requests are ended.")
                    self._fail(f"{type(error).__name__}: {error}")

    def _wait(self) -> bool:
        """Until there is work; False: it is over."""
        with self._changed:
            while not (self._rows or self._waiting or self._reading):
                if self._closing:
                    return False
                self._changed.wait()
            return True

    def _fail(self, message: str) -> None:
        requests = [row.request for row in [*self._rows, *self._reading]]
        with self._changed:
            self._rows, self._reading, self._prefill, self._batch = [], [], None, PatchBatch(self.model)
        for request in requests:
            self._end(request, Output(finish_reason="error", error=message))

    def _end(self, request: Request, output: Output) -> None:
        reason = str(output.finish_reason)
        with self._changed:
            self.statistics.finished[reason] = self.statistics.finished.get(reason, 0) + 1
        self.observe("request", time.monotonic() - request.submitted)
        self._tell(request, output)

    def _tell(self, request: Request, output: Output) -> None:
        now = time.monotonic()
        if request.first_output is None and output.token_ids:
            request.first_output = now
            self.observe("time_to_first_token", now - request.submitted)
        try:
            request.on_output(output)
        except Exception:
            logger.exception("A request's listener failed; the request is cancelled.")
            request.cancel()

    def _given_up(self, request: Request) -> str | None:
        if request.cancelled:
            return "cancelled"
        if request.deadline is not None and time.monotonic() - request.submitted > request.deadline:
            return "deadline"
        return None

    def _read_prompts(self) -> None:
        """Read prompts, for so many tokens; those that are whole join."""
        self._end_given_up()
        # where most places are taken, who comes waits for one patch, so that more prompts are read at once: +7 to 12 %
        # tokens/s of a full server (measured)
        self._put_off = not (self._put_off or self._reading) and 2 * len(self._rows) > self.config.max_rows
        if self._put_off:
            return
        budget = max(1, self.config.prefill_tokens // self.patch_size)  # patches
        while budget > 0:
            if not self._reading and not self._begin(budget):
                return
            assert self._prefill is not None
            if all(self._given_up(row.request) for row in self._reading):
                reading, self._reading, self._prefill = self._reading, [], None
                for row in reading:
                    self._end(row.request, Output(finish_reason=self._given_up(row.request)))
                continue
            steps = min(budget, max(self._prefill.remaining, 1))
            self._prefill.advance(steps)
            budget -= steps
            if not self._prefill.remaining:
                self._join()

    def _end_given_up(self) -> None:
        """Who waits for nothing any more gives its place in the queue to others, also behind one that has no room."""
        with self._changed:
            ended = {request: reason for request in self._waiting if (reason := self._given_up(request))}
            if ended:
                self._waiting = deque(request for request in self._waiting if request not in ended)
        for request, reason in ended.items():
            self._end(request, Output(finish_reason=reason))

    def _begin(self, budget: int) -> bool:
        """Take the next requests that there is room for, first come, first served: as many short ones as can be read
        at once within the budget, or one long one."""
        patches = 0
        with self._changed:
            while self._waiting:
                request = self._waiting[0]
                patches += len(request.prompt_ids) // self.patch_size + 1
                full = self._reading and patches > budget
                if full or not self._has_room(request):
                    break
                self._reading.append(self._row_of(self._waiting.popleft()))
        if self._reading:
            self._prefill = Prefill(self.model, [row.request.prompt_ids for row in self._reading])
        return bool(self._reading)

    def _row_of(self, request: Request) -> _Row:
        self.observe("queue", time.monotonic() - request.submitted)
        seed = random.getrandbits(63) if request.seed is None else request.seed
        noise = None
        if self.model.head.noise_size and request.sampling.temperature > 0:
            below = request.sampling.top_p if self.model.is_aligned else 1.0
            noise = Noise(torch.Generator().manual_seed(seed), below)
        text = TextStream(self.tokenizer, request.prompt_ids, request.stop)
        return _Row(request, text, random.Random(seed), noise)

    def _join(self) -> None:
        assert self._prefill is not None
        states = self._prefill.finish([row.noise for row in self._reading])
        with self._changed:
            self._batch.join(
                states, [self._places(row.request) for row in self._reading], [row.noise for row in self._reading]
            )
            self._rows += self._reading
            self.statistics.prompt_tokens += sum(len(row.request.prompt_ids) for row in self._reading)
            self._reading, self._prefill = [], None

    def _write_patch(self) -> None:
        """Every row writes to the end of its patch."""
        started, rows = time.monotonic(), self._rows
        for row in rows:
            row.finish_reason = self._given_up(row.request)
        before = self.statistics.generated_tokens
        self._write_places()
        written = self.statistics.generated_tokens - before
        if written:
            self.observe("time_per_token", (time.monotonic() - started) * len(rows) / written)

    def _write_places(self) -> None:
        batch = self._batch
        for place in range(self.patch_size):
            active = [row.finish_reason is None and batch.phase(r) == place for r, row in enumerate(self._rows)]
            if not any(active):
                continue
            tokens = self._choose(active)
            if place == self.patch_size - 1:
                # everybody is told before the backbone's step, for which nobody has to wait; who has ended takes no
                # part in it
                order = self._deliver()
                if order:
                    batch.read(place, tokens[torch.tensor(order, device=tokens.device)], [True] * len(order))
                    self.statistics.backbone_steps += 1
                    self.statistics.patches += len(order)
                return
            active = [
                is_active and row.finish_reason is None for is_active, row in zip(active, self._rows, strict=True)
            ]
            if any(active):
                batch.read(place, tokens, active)
        self._deliver()

    def _choose(self, active: list[bool]) -> torch.Tensor:
        """A token for every active row `(B,)`; rows that it ends get their reason."""
        batch, rows = self._batch, self._rows
        assert batch.logits is not None
        numbers = [r for r, is_active in enumerate(active) if is_active]
        everybody = len(numbers) == len(rows)
        index = None if everybody else torch.tensor(numbers, device=batch.logits.device)
        logits = batch.logits if index is None else batch.logits[index]
        chosen = sample(logits, [rows[r].request.sampling for r in numbers], [rows[r].random for r in numbers])
        ids = chosen.tolist()
        told = self._logprobs(logits, ids, [rows[r].request.logprobs for r in numbers])
        for place, r in enumerate(numbers):
            row, token = rows[r], ids[place]
            request = row.request
            request.num_tokens += 1
            self.statistics.generated_tokens += 1
            if token in self.eos_ids and not request.ignore_eos:
                row.finish_reason = "stop"
                continue
            row.new.token_ids.append(token)
            if told[place] is not None:
                row.new.logprobs.append(told[place])
            if request.stop:
                row.new.text += row.text.push([token])
                if row.text.stopped:
                    row.finish_reason = "stop"
                    continue
            if request.num_tokens >= request.max_new_tokens:
                row.finish_reason = "length"
        return chosen if index is None else chosen.new_zeros(len(rows)).index_copy(0, index, chosen)

    def _logprobs(self, logits: torch.Tensor, ids: list[int], counts: list[int | None]) -> list[Any]:
        asked = [place for place, count in enumerate(counts) if count is not None]
        told: list[TokenLogprob | None] = [None] * len(ids)
        if asked:
            logprobs = logits[torch.tensor(asked, device=logits.device)].log_softmax(-1)
            values, names = logprobs.topk(min(max(counts[place] or 0 for place in asked) or 1, logprobs.shape[1]))
            for line, place in enumerate(asked):
                count = counts[place] or 0
                top = tuple(zip(names[line, :count].tolist(), values[line, :count].tolist(), strict=True))
                told[place] = TokenLogprob(ids[place], float(logprobs[line, ids[place]]), top)
        return told

    def _deliver(self) -> list[int]:
        """Tell everybody what the patch brought, and let go of who has ended; returns whose rows remain, by their old
        numbers in their new order."""
        ended = []
        outputs = []
        for r, row in enumerate(self._rows):
            if not row.request.stop:
                row.new.text += row.text.push(row.new.token_ids, last=row.finish_reason is not None)
            elif row.finish_reason is not None and not row.text.stopped:
                row.new.text += row.text.push([], last=True)
            row.new.finish_reason = row.finish_reason
            outputs.append((row.request, row.new))
            row.new = Output()
            if row.finish_reason is not None:
                ended.append(r)
        rows = self._rows
        with self._changed:
            order = self._batch.leave(ended)
            self._rows = [rows[r] for r in order]
        for request, output in outputs:
            if output.finish_reason is not None:
                self._end(request, output)
            elif output.token_ids:
                self._tell(request, output)
        return order
