"""Limiter and flow: without a server where a clock suffices, over loopback where a socket matters."""

import asyncio
import gc
import threading
import time
from contextlib import closing
from email.utils import formatdate

import pytest

from trainers.evaluation.loopback_servers import CapacityServer, rate_and_refusals
from trainers.teachers.flow import (
    BadReply,
    Flow,
    FlowConfig,
    Limiter,
    RequestFailed,
    TeacherUnavailable,
    quota_pause,
    told_wait,
)


QUICK = {"deadline": 5.0, "patience": 10.0}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def take(limiter: Limiter, count: int) -> list:
    async def all_of_them():
        return [await limiter.acquire() for _ in range(count)]

    return asyncio.run(all_of_them())


def refused(wait: float | None = 0.0) -> RequestFailed:
    return RequestFailed("429", refused=True, wait=wait)


def test_limit_grows_while_all_goes_well_and_stops_at_its_most():
    """A teacher asked for one row at a time is as slow as its latency."""
    limiter = Limiter(FlowConfig(start=2, most=6), Clock())
    for _ in range(20):
        for ticket in take(limiter, int(limiter.limit)):
            limiter.succeed(ticket)
    assert limiter.limit == 6 and limiter.in_flight == 0


def test_refusal_says_where_the_ceiling_is():
    """Cut to 70 % on each refusal, a server of capacity 6 stays half idle."""
    clock = Clock()
    limiter = Limiter(FlowConfig(start=8), clock)
    tickets = take(limiter, 8)
    for ticket in (tickets[7], tickets[6]):  # in any order
        limiter.fail(ticket, refused())
    for ticket in tickets[:6]:
        limiter.succeed(ticket)
    assert (int(limiter.limit), limiter.ceiling) == (6, 6)


def test_tries_above_the_ceiling_become_rare():
    """Every refusal pauses everybody; a probe per second would be felt."""
    clock = Clock()
    limiter = Limiter(FlowConfig(start=4), clock)
    refusals = []
    while clock.now < 100:
        count = int(limiter.limit)
        tickets = take(limiter, count)
        clock.now += 0.05
        for place, ticket in enumerate(tickets, 1):
            if place > 6:
                limiter.fail(ticket, refused())
                refusals.append(clock.now)
            else:
                limiter.succeed(ticket)
    assert limiter.ceiling == 6
    assert len([moment for moment in refusals if moment > 10]) <= 6


def test_limit_follows_a_ceiling_that_moves_up_or_down():
    """A server restarts with more memory, or somebody else begins to use it."""
    clock = Clock()
    limiter = Limiter(FlowConfig(start=4), clock)
    for capacity in (6, 12, 3):
        end = clock.now + 120
        while clock.now < end:
            tickets = take(limiter, int(limiter.limit))
            clock.now += 0.05
            for place, ticket in enumerate(tickets, 1):
                limiter.fail(ticket, refused()) if place > capacity else limiter.succeed(ticket)
        assert abs(int(limiter.limit) - capacity) <= 1, capacity


def test_slowness_is_overload_too():
    """vLLM never refuses: it queues, and 32 requests wait where 4 would be served as fast."""
    clock = Clock()
    limiter = Limiter(FlowConfig(start=2, most=32), clock)
    for _ in range(300):  # capacity 4: time grows with what runs
        count = int(limiter.limit)
        tickets = take(limiter, count)
        clock.now += 0.1 * max(1.0, count / 4)
        for ticket in tickets:
            limiter.succeed(ticket, work=10)
    assert 4 <= limiter.limit <= 12


def test_failures_cut_the_limit_once_per_event():
    """Eight requests that die together are one event, not eight."""
    limiter = Limiter(FlowConfig(start=16), Clock())
    for ticket in take(limiter, 8):
        limiter.fail(ticket, RequestFailed("500"))
    assert limiter.limit == 12


def test_retry_after_pauses_everybody():
    """Whoever comes earlier is refused again, and counted."""
    clock = Clock()
    limiter = Limiter(FlowConfig(), clock)
    (ticket,) = take(limiter, 1)
    limiter.fail(ticket, refused(wait=7.0))
    assert limiter._wait() == pytest.approx(7.0)


def test_used_up_quota_pauses_and_cuts_nothing():
    """Fifty requests a minute say nothing about how many may run at once."""
    limiter = Limiter(FlowConfig(start=8), Clock())
    for ticket in take(limiter, 8):
        limiter.fail(ticket, RequestFailed("429", refused=True, quota=True, wait=20.0))
    assert limiter.limit == 8 and limiter._wait() == pytest.approx(20.0)


def test_failure_budget_is_never_exceeded():
    """Venice shuts out for 30 s who fails more than 20 times in 30 s."""
    clock = Clock()
    limiter = Limiter(FlowConfig(start=8, most=8, failure_budget=18), clock)
    moments = []
    while clock.now < 200:
        wait = limiter._wait()
        if wait > 0:
            clock.now += wait
            continue
        for ticket in take(limiter, 1):
            limiter.fail(ticket, RequestFailed("500"))
            moments.append(clock.now)
    for moment in moments:
        assert len([other for other in moments if moment <= other < moment + 30]) <= 20


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, (None, False)),
        ({"Retry-After": "3"}, (3.0, False)),
        ({"retry-after-ms": "300", "retry-after": "1"}, (0.3, False)),
        ({"retry-after": "soon"}, (None, False)),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1m30s"}, (90.0, True)),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "12.5"}, (12.5, True)),
        (
            {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-remaining-tokens": "77",
                "x-ratelimit-reset-requests": "4",
                "x-ratelimit-reset-tokens": "50",
            },
            (4.0, True),
        ),
        ({"x-ratelimit-reset-requests": "2", "x-ratelimit-reset-tokens": "20ms"}, (0.02, False)),
    ],
)
def test_what_servers_say_about_coming_back_is_read(headers, expected):
    """The OpenAI client ignores the reset headers and refuses a Retry-After above two minutes."""
    assert told_wait(headers) == pytest.approx(expected)


def test_dates_and_unix_times_are_read():
    """Venice's reset of requests is a moment, its reset of tokens a duration."""
    wait, quota = told_wait(
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": str(time.time() + 9)}
    )
    assert wait == pytest.approx(9, abs=1) and quota
    wait, _ = told_wait({"retry-after": formatdate(time.time() + 20, usegmt=True)})
    assert wait == pytest.approx(20, abs=2)
    headers = {"x-ratelimit-remaining-requests": "2", "x-ratelimit-reset-requests": str(time.time() + 9)}
    assert quota_pause(headers, in_flight=2) == 0
    assert quota_pause(headers, in_flight=3) == pytest.approx(9, abs=1)


@pytest.fixture
def flow():
    flow = Flow("http://teacher", FlowConfig(**QUICK))
    flow.BACKOFF = 0.01
    yield flow
    flow.close()


def failing(times: int, error: Exception | None = None):
    """A request that fails so often, and then answers with the number of attempts."""
    attempts = []

    async def send():
        attempts.append(time.monotonic())
        if len(attempts) <= times:
            raise error or RequestFailed("503 busy")
        return len(attempts)

    return send, attempts


def test_passing_failures_are_tried_again(flow):
    """A restart of the server in the night must not end the run."""
    send, _ = failing(3)
    assert flow.ask(send) == 4
    assert flow.counts == {"attempts": 4, "refused": 0, "failed": 3, "answered": 1}


def test_wrong_answers_are_not_tried_again(flow):
    """The same question gets the same answer, ten minutes later and at the same price."""
    send, attempts = failing(3, BadReply("no logprobs"))
    with pytest.raises(BadReply, match="no logprobs"):
        flow.ask(send)
    assert len(attempts) == 1 and flow.limiter.in_flight == 0


def test_retry_after_is_waited_for(flow):
    """Sooner it is refused again."""
    send, attempts = failing(1, refused(wait=0.3))
    flow.ask(send)
    assert attempts[1] - attempts[0] >= 0.3


def test_hanging_request_is_ended_by_its_deadline():
    """The OpenAI client waits 600 s, three times; and its timeout is per read, so a trickle never ends."""
    flow = Flow("http://teacher", FlowConfig(deadline=0.2, patience=1.0))

    async def hang():
        await asyncio.sleep(60)

    start = time.monotonic()
    with pytest.raises(TeacherUnavailable, match="http://teacher gave no answer for 1 s; last: no answer within"):
        flow.ask(hang)
    assert time.monotonic() - start < 3
    assert flow.counts["failed"] >= 2
    flow.close()


def test_too_many_failures_in_a_row_are_told_to_everybody_at_once():
    """Hundreds of waiting rows, each patient for ten minutes, would hide a dead server for hours."""
    flow = Flow("http://teacher", FlowConfig(max_failures=3, cooldown=0.3, patience=30))
    flow.BACKOFF = 0.001
    send, attempts = failing(3)
    with pytest.raises(TeacherUnavailable, match="stays away: 3 failures in a row, the last one: 503 busy"):
        flow.ask(send)
    with pytest.raises(TeacherUnavailable):
        flow.ask(send)
    assert len(attempts) == 3, "nothing is sent while it is away"
    time.sleep(0.35)
    assert flow.ask(send) == 4, "afterwards it may be back"
    flow.close()


def test_results_come_in_order_and_are_not_read_far_ahead():
    """Answers to other rows would still be plausible distributions; an endless corpus must not be queued whole."""
    flow = Flow("http://teacher", FlowConfig(start=4, most=4))
    read = []

    def items():
        for number in range(40):
            read.append(number)
            yield number

    async def send(number):
        await asyncio.sleep(0.02 if number % 3 == 0 else 0.001)
        return number

    seen = []
    for result in flow.map(send, items()):
        seen.append(result)
        assert len(read) - len(seen) <= 8
    assert seen == list(range(40))
    flow.close()


def test_failures_that_nobody_waits_for_are_not_reported(capfd, caplog):
    """Ten tracebacks of asyncio stood before the one line that says what happened."""
    with closing(Flow("http://teacher", FlowConfig(**QUICK))) as flow:

        async def wrong(item):
            await asyncio.sleep(0.01 * (item == 0))
            raise BadReply("no such field")

        with pytest.raises(BadReply):
            list(flow.map(wrong, range(8)))
    gc.collect()
    assert "never retrieved" not in caplog.text + capfd.readouterr().err


def test_close_ends_what_runs_and_leaves_no_thread():
    """A notebook that is interrupted must not keep a server busy."""
    flow = Flow("http://teacher", FlowConfig(**QUICK))

    async def hang():
        await asyncio.sleep(60)

    future = flow.submit(hang)
    time.sleep(0.05)
    flow.close()
    flow.close()
    assert future.cancelled()
    assert not [thread for thread in threading.enumerate() if thread.name == "teacher-requests"]
    with pytest.raises(RuntimeError, match="is closed"):
        flow.submit(hang)


@pytest.mark.slow
def test_server_with_a_capacity_is_used_and_not_pestered():
    """Over loopback, in short; `make verify TOPIC=teachers ROW=aimd` measures a minute."""
    openai = pytest.importorskip("openai")
    assert openai
    from trainers.teachers.http_server import HTTPServer

    with CapacityServer(capacity=4, seconds=0.1, retry_after=0.2) as server:
        client = HTTPServer(server.url)
        rate, share = rate_and_refusals(
            server, lambda items: client.flow.map(lambda _: client.send("POST", "/x", {}), items), 3, 4
        )
        client.close()
    assert rate > 0.4 * 4 / 0.1  # the machine is busy with other tests
    assert share < 0.1


@pytest.mark.parametrize("turns", range(1, 6))
def test_close_takes_back_a_request_that_is_just_being_started(turns):
    """A cancellation that meets a finished wait is swallowed; whoever closed then waited for the server to hang up."""
    flow = Flow("server", FlowConfig(start=4))

    async def hang():
        await asyncio.sleep(5)

    async def start_and_shut() -> float:
        asyncio.ensure_future(flow._request(hang, 1.0))
        for _ in range(turns):
            await asyncio.sleep(0)
        begun = time.monotonic()
        await flow._shut()
        return time.monotonic() - begun

    assert asyncio.run_coroutine_threadsafe(start_and_shut(), flow._loop).result() < 2
    flow.close()
