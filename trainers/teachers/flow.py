"""How requests reach a server: as many at once as it bears, patiently, and never without end.

[`Limiter`] decides when the next request may start, [`Flow`] sends, waits and tries again, in a thread with an event
loop of its own, so that any number of threads may ask.
"""

import asyncio
import email.utils
import logging
import random
import re
import statistics
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any, TypeVar


logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")


class TeacherUnavailable(ConnectionError):
    """The teacher stays away: it was asked for as long as one was told to be patient."""


class BadReply(ValueError):
    """The server answered, but not what it was asked. The same request would get the same answer."""


class RequestFailed(Exception):
    """One attempt failed, and another one may not.

    Args:
        reason: for the log and the last message; holds no key.
        refused: the server says that it is too much (429), and works otherwise.
        quota: refused because of a count per time, not of how many run at once.
        wait: seconds that the server asked for.
    """

    def __init__(self, reason: str, refused: bool = False, quota: bool = False, wait: float | None = None):
        super().__init__(reason)
        self.reason, self.refused, self.quota, self.wait = reason, refused, quota, wait


@dataclass(frozen=True)
class FlowConfig:
    """How patient, and how many at once.

    Attributes:
        start, most: requests in flight, at first and at most.
        deadline: seconds for one attempt, from its start to the last byte.
        patience: seconds for one request with all its attempts and pauses.
        max_failures: attempts in a row, of all requests, that fail otherwise than by a refusal; then nothing is sent
            for `cooldown` seconds and whoever asks is told at once.
        cooldown: see there.
        failure_budget: failed requests per `budget_window` seconds that must not be exceeded (Venice shuts out for 30
            s who fails more than 20 times in 30 s); None: no such rule.
        budget_window: see there.
    """

    start: int = 4
    most: int = 32
    deadline: float = 120.0
    patience: float = 600.0
    max_failures: int = 10
    cooldown: float = 30.0
    failure_budget: int | None = None
    budget_window: float = 30.0

    def __post_init__(self):
        if not 1 <= self.start <= self.most:
            raise ValueError(f"start ({self.start}) must lie between 1 and most ({self.most}).")
        for name in ("deadline", "patience", "max_failures"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}.")


@dataclass
class Ticket:
    """One request in flight: when it started, and as how manyth."""

    started: float
    place: int


class Limiter:
    """How many requests may run at once: more while all goes well, fewer when the server is overloaded (AIMD).

    Overload shows as a refusal (429), as a failure (5xx, no answer), or only as time: servers that queue never refuse.
    A refusal also says *where* the ceiling is: one below the place of the request that was refused. The limit returns
    there at once and tries one more only now and then, twice as rarely after each try that was refused: a pause that
    every refusal costs everybody would otherwise eat what the limit gains.

    Not for several threads: everything happens in one event loop.

    Args:
        config: see [`FlowConfig`].
        clock: seconds; replaced in tests.
    """

    SLOW = 2.0  # times the best time per unit of work: requests wait in the server's queue
    FIRST_GAP, LONGEST_GAP = 1.0, 30.0  # seconds between two tries above the ceiling

    def __init__(self, config: FlowConfig, clock: Callable[[], float] = time.monotonic):
        self.config, self.clock = config, clock
        self.limit = float(config.start)
        self.in_flight = 0
        self.ceiling: int | None = None
        self.paused_until = 0.0
        self._cut_at = float("-inf")
        self._gap, self._next_try = self.FIRST_GAP, 0.0
        self._in_row = 0  # refusals without any success between them
        self._tried = 0  # successes since the limit went above the ceiling
        self._failures: deque[float] = deque()
        self._times: list[float] = []
        self._best: float | None = None
        self._freed = asyncio.Event()

    # -- starting

    async def acquire(self) -> Ticket:
        """Wait for a place; [`release`], [`succeed`] or [`fail`] gives it back."""
        while True:
            wait = self._wait()
            if wait > 0:
                await asyncio.sleep(wait)
            elif self.in_flight < int(self.limit):
                self.in_flight += 1
                return Ticket(self.clock(), self.in_flight)
            else:
                self._freed.clear()
                await self._freed.wait()

    def _wait(self) -> float:
        now = self.clock()
        wait = self.paused_until - now
        budget = self.config.failure_budget
        if budget is not None:
            while self._failures and self._failures[0] <= now - self.config.budget_window:
                self._failures.popleft()
            # each one in flight may fail too
            if self._failures and len(self._failures) + self.in_flight >= budget:
                wait = max(wait, self._failures[0] + self.config.budget_window - now, 0.01)
        return wait

    def pause(self, seconds: float) -> None:
        """Start nothing for so long."""
        self.paused_until = max(self.paused_until, self.clock() + seconds)

    # -- ending

    def release(self, ticket: Ticket) -> None:
        """The request ended in a way that says nothing about load."""
        self.in_flight -= 1
        self._freed.set()

    def succeed(self, ticket: Ticket, work: float = 1.0) -> None:
        """An answer came, for `work` units (tokens)."""
        now = self.clock()
        if ticket.started > self._cut_at:
            self._in_row = 0
            if ticket.place >= int(self.limit):  # the limit was what held it
                self._grow(now)
        self._watch_time((now - ticket.started) / work)
        self.release(ticket)

    def _grow(self, now: float) -> None:
        most = float(self.config.most)
        if self.ceiling is None:
            self.limit = min(self.limit + 0.5, most)
        elif self.limit > self.ceiling:
            self._tried += 1
            if self._tried > 2 * self.ceiling:  # two rounds above it: it has moved
                self.ceiling, self._gap, self._next_try = int(self.limit), self.FIRST_GAP, now
        elif self.limit < self.ceiling:
            self.limit = min(self.limit + 1 / self.limit, float(self.ceiling))
        elif now >= self._next_try:
            self.limit, self._tried = min(self.ceiling + 1.0, most), 0

    def fail(self, ticket: Ticket, failure: RequestFailed) -> None:
        """The server refused, broke down, or said nothing in time."""
        now = self.clock()
        self._failures.append(now)
        first = ticket.started > self._cut_at  # of those that were under way when the limit was cut last, one counts
        if failure.refused:
            if failure.wait is not None:
                self.pause(failure.wait)
            elif first:
                self._in_row += 1
                self.pause(min(30.0, 0.1 * 2**self._in_row) * random.uniform(0.5, 1.0))
            if not failure.quota:
                self._lower(ticket.place - 1, first, now)
        elif first:
            self._lower(int(0.75 * self.limit), True, now)
        self.release(ticket)

    def _lower(self, to: int, first: bool, now: float) -> None:
        to = max(1, to)
        if first:
            known = self.ceiling is not None and self.limit <= self.ceiling
            if known:  # refused at a number that it bore before: there is less room than there was
                to = min(to, max(1, int(0.75 * self.limit)))
            else:
                self._gap = min(2 * self._gap, self.LONGEST_GAP)
            self._cut_at = now
        elif self.ceiling is not None:
            to = min(to, self.ceiling)
        self.ceiling, self.limit = to, float(min(to, self.config.most))
        self._next_try = now + self._gap * random.uniform(0.8, 1.2)

    def _watch_time(self, seconds: float) -> None:
        self._times.append(seconds)
        if len(self._times) < max(8, int(self.limit)):
            return
        usual = statistics.median(self._times)
        self._times.clear()
        # the best one ages: a server that became slower for good is no reason to go down to one request
        self._best = usual if self._best is None else min(1.02 * self._best, usual)
        if usual > self.SLOW * self._best and self.limit > 1:
            now = self.clock()
            self.limit = max(1.0, 0.8 * self.limit)
            self.ceiling = int(self.limit)
            self._cut_at, self._next_try = now, now + self._gap


class Flow:
    """Sends requests through a [`Limiter`], retries what may be retried, and gives up in time.

    Args:
        name: of the server, for messages; holds no key.
        config: see [`FlowConfig`].

    Attributes:
        counts: attempts, refusals (429), failures and answers so far.
    """

    BACKOFF, LONGEST_BACKOFF = 0.25, 8.0

    def __init__(self, name: str, config: FlowConfig | None = None):
        self.name, self.config = name, config or FlowConfig()
        self.limiter = Limiter(self.config)
        self.counts = {"attempts": 0, "refused": 0, "failed": 0, "answered": 0}
        self._in_row = 0
        self._away_until, self._why = 0.0, ""
        self._at_close: list[Callable[[], Awaitable[Any]]] = []
        self._lock, self._closed = threading.Lock(), False
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(_report)
        self._thread = threading.Thread(target=self._loop.run_forever, name="teacher-requests", daemon=True)
        self._thread.start()

    # -- asking, from any thread

    def submit(self, send: Callable[[], Awaitable[Result]], work: float = 1.0) -> "Future[Result]":
        """Start `send()`, which raises [`RequestFailed`] where another attempt makes sense; anything else that it
        raises ends the request."""
        # under the lock: what is given to a loop that has been stopped is never answered
        with self._lock:
            if self._closed:
                raise RuntimeError(f"The connection to {self.name} is closed. Build a new teacher.")
            return asyncio.run_coroutine_threadsafe(self._request(send, work), self._loop)

    def ask(self, send: Callable[[], Awaitable[Result]], work: float = 1.0) -> Result:
        """[`submit`], and wait.

        Raises:
            TeacherUnavailable: no answer within `patience`, or too many failures in a row.
        """
        return self._result(self.submit(send, work))

    def map(
        self,
        send: Callable[[Item], Awaitable[Result]],
        items: Iterable[Item],
        work: Callable[[Item], float] = lambda item: 1.0,
    ) -> Iterator[Result]:
        """`send(item)` of every item, in their order; reads at most twice as far ahead as requests may run."""
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(self.submit(lambda item=item: send(item), work(item)))  # type: ignore[misc]
                while len(waiting) >= 2 * self.limiter.limit:
                    yield self._result(waiting.popleft())
            while waiting:
                yield self._result(waiting.popleft())
        finally:
            for future in waiting:
                future.cancel()

    def _result(self, future: "Future[Result]") -> Result:
        try:
            return future.result()
        except CancelledError:
            raise RuntimeError(f"The connection to {self.name} was closed while a request waited.") from None

    def at_close(self, close: Callable[[], Awaitable[Any]]) -> None:
        """`await close()` when the flow closes, in its loop."""
        self._at_close.append(close)

    def close(self) -> None:
        """Take back what runs, close connections, end the thread. May be called twice."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _shut(self) -> None:
        running = {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}
        # again and again: before Python 3.12 `wait_for` swallows a cancellation that arrives with its result, and the
        # request goes on to its next step, which may hang
        while running:
            for task in running:
                task.cancel()
            _, running = await asyncio.wait(running, timeout=0.1)
        for close in self._at_close:
            await close()

    # -- in the loop

    async def _request(self, send: Callable[[], Awaitable[Result]], work: float) -> Result:
        end = time.monotonic() + self.config.patience
        attempt = 0
        last = "no place among the requests in flight"
        while True:
            self._raise_if_away()
            try:
                ticket = await asyncio.wait_for(self.limiter.acquire(), end - time.monotonic())
            except asyncio.TimeoutError:
                raise self._gave_up(last) from None
            try:
                self._raise_if_away()
                self.counts["attempts"] += 1
                seconds = min(self.config.deadline, max(end - time.monotonic(), 0.0))
                try:
                    reply = await asyncio.wait_for(send(), seconds)
                except asyncio.TimeoutError:
                    raise RequestFailed(f"no answer within {seconds:.3g} s") from None
            except RequestFailed as failure:
                last = failure.reason
                self._count(failure)
                self.limiter.fail(ticket, failure)
                wait = failure.wait or 0.0
                # with jitter: those that were refused together must not come back together
                pause = wait + random.uniform(0, min(self.LONGEST_BACKOFF, self.BACKOFF * 2**attempt, wait or 60.0))
                if time.monotonic() + pause >= end:
                    raise self._gave_up(last) from None
                logger.info("%s: %s; again in %.2f s", self.name, failure.reason, pause)
                attempt += 1
                await asyncio.sleep(pause)
            except BaseException:
                self.limiter.release(ticket)
                raise
            else:
                self._in_row = 0
                self.counts["answered"] += 1
                self.limiter.succeed(ticket, work)
                return reply

    def _count(self, failure: RequestFailed) -> None:
        self.counts["refused" if failure.refused else "failed"] += 1
        if failure.refused:
            return  # it is there, and says so
        self._in_row += 1
        if self._in_row >= self.config.max_failures:
            self._away_until = time.monotonic() + self.config.cooldown
            self._why = f"{self._in_row} failures in a row, the last one: {failure.reason}"

    def _raise_if_away(self) -> None:
        if time.monotonic() < self._away_until:
            raise TeacherUnavailable(f"{self.name} stays away: {self._why}.")

    def _gave_up(self, last: str) -> TeacherUnavailable:
        return TeacherUnavailable(f"{self.name} gave no answer for {self.config.patience:.3g} s; last: {last}.")


def _report(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # a request that fails after its asker went away (one before it failed) fails for nobody
    if context.get("message") != "Task exception was never retrieved":
        loop.default_exception_handler(context)


# -- what a server says about when to come back


def told_wait(headers: Mapping[str, str]) -> tuple[float | None, bool]:
    """Seconds until a refused request may come again, and whether a quota (requests or tokens per time) is used up.

    `retry-after-ms`, `retry-after` (seconds or a date), else the `x-ratelimit-reset-*` of what has nothing remaining:
    a Unix time (Venice's requests), seconds (its tokens), or a duration like `1m30s` (OpenAI). (None, ...) where
    nothing is said.
    """
    get = {name.lower(): value.strip() for name, value in headers.items()}.get
    used_up = [kind for kind in ("requests", "tokens") if get(f"x-ratelimit-remaining-{kind}") in ("0", "0.0")]
    resets = {kind: _seconds(get(f"x-ratelimit-reset-{kind}")) for kind in ("requests", "tokens")}
    milliseconds, after = _number(get("retry-after-ms")), get("retry-after")
    wait: float | None = None
    if milliseconds is not None:
        wait = milliseconds / 1000
    elif after is not None:
        wait = _number(after)
        if wait is None:
            date = email.utils.parsedate_tz(after)
            wait = None if date is None else email.utils.mktime_tz(date) - time.time()
    else:
        known = [seconds for kind, seconds in resets.items() if seconds is not None and kind in used_up]
        wait = max(known) if known else min((s for s in resets.values() if s is not None), default=None)
    return (None if wait is None else max(wait, 0.0)), bool(used_up)


def quota_pause(headers: Mapping[str, str], in_flight: int) -> float:
    """Seconds to pause after an answer that leaves nothing for a request beside those in flight; 0: go on."""
    get = {name.lower(): value.strip() for name, value in headers.items()}.get
    remaining = _number(get("x-ratelimit-remaining-requests"))
    reset = _seconds(get("x-ratelimit-reset-requests"))
    return max(reset, 0.0) if remaining is not None and reset is not None and remaining < in_flight else 0.0


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and 0 <= value < 1e12 else None


UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(text: str | None) -> float | None:
    value = _number(text)
    if value is not None:
        return value - time.time() if value > 1e8 else value  # a Unix time
    parts = re.findall(r"([\d.]+)(ms|s|m|h|d)", text or "")
    return sum(float(number) * UNITS[unit] for number, unit in parts) if parts else None
