"""What Prometheus reads."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from .engine import Engine


SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TIMES = {
    "time_to_first_token": "Seconds from the request to its first token.",
    "time_per_token": "Seconds between two tokens of one text.",
    "request": "Seconds from the request to its end.",
    "queue": "Seconds that a request waited for a row.",
}


class Metrics:
    """Counters and histograms of one server.

    `engine` is set once there is one; its own counters are read when they are asked for.
    """

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.registry = CollectorRegistry()
        self.responses = Counter(
            "latentforge_http_responses", "Answers by path and status.", ["path", "status"], registry=self.registry
        )
        self.times = {
            name: Histogram(f"latentforge_{name}_seconds", text, buckets=SECONDS, registry=self.registry)
            for name, text in TIMES.items()
        }
        self.registry.register(self)  # type: ignore[arg-type]

    def observe(self, name: str, seconds: float) -> None:
        """For [`Engine`]."""
        self.times[name].observe(seconds)

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        """The engine's counters now, for `prometheus_client`."""
        if self.engine is None:
            return
        now = self.engine.snapshot()
        gauges = {"rows": "Requests being written.", "waiting": "Requests in the queue.", "cache_bytes": "Of memory."}
        for name, text in gauges.items():
            yield GaugeMetricFamily(f"latentforge_{name}", text, value=getattr(now, name))
        counters: dict[str, tuple[str, Any]] = {
            "requests": ("Requests taken.", now.requests),
            "prompt_tokens": ("Tokens read.", now.prompt_tokens),
            "generated_tokens": ("Tokens written.", now.generated_tokens),
            "backbone_steps": ("Times that the backbone ran for all rows.", now.backbone_steps),
            "row_patches": ("Patches written, of single rows.", now.patches),
            "steps_saved": (
                "Steps of a backbone that runs once per token and row, less those of this one.",
                max(now.generated_tokens - now.patches, 0),
            ),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"latentforge_{name}", text, value=value)
        finished = CounterMetricFamily("latentforge_finished", "Requests by their end.", labels=["reason"])
        for reason, count in now.finished.items():
            finished.add_metric([reason], count)
        yield finished

    def text(self) -> bytes:
        return generate_latest(self.registry)
