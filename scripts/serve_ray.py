"""Serve a student by many replicas: the server of `serve.py`, one engine each, behind Ray Serve.

    python scripts/serve_ray.py --model runs/demo/student --num_replicas 2
    python scripts/serve_ray.py --model my-name/my-student --trust_remote_code --min_replicas 1 --max_replicas 8 \\
        --ray_address auto --replica_gpus 1                      (a running cluster; it scales with the load)

The flags are those of `serve.py`, for each replica, and a few more. Routes, key and limits are the same; streams go
through. `/metrics` is that of the replica that answers: a cluster's are Ray's own. Every machine needs this checkout
at the same place, or an image with it. Ends with SIGTERM or SIGINT, when what has begun is finished.
"""

import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


ROOT = Path(__file__).resolve().parent.parent
# `python scripts/serve_ray.py` finds what stands beside this file, and not the room that it is in
sys.path.insert(0, str(ROOT))

from scripts.serve import ServeArguments  # noqa: E402


NAME = "latentforge"


@dataclass
class RayArguments(ServeArguments):
    """The server's flags, and how many of it."""

    num_replicas: int | None = field(default=None, metadata={"help": "Always so many. Default: 1, or by the load."})
    min_replicas: int | None = field(default=None, metadata={"help": "With max_replicas: by the load, at least."})
    max_replicas: int | None = field(default=None, metadata={"help": "By the load, at most."})
    target_requests: int | None = field(
        default=None, metadata={"help": "Requests of a replica from which on another is started. Default: max_rows."}
    )
    replica_cpus: float = field(default=1.0, metadata={"help": "Cores of each replica."})
    replica_gpus: float = field(default=0.0, metadata={"help": "GPUs of each replica."})
    ray_address: str | None = field(
        default=None, metadata={"help": "Of a running cluster, or auto. Default: a Ray of this machine's own."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        by_load = self.min_replicas is not None or self.max_replicas is not None
        if by_load and self.num_replicas is not None:
            raise ValueError(
                "num_replicas is a fixed number, min_replicas and max_replicas follow the load: drop one."
            )
        if self.target_requests is not None and not by_load:
            raise ValueError("target_requests is about replicas that follow the load: add max_replicas.")
        low = self.min_replicas or 1
        if by_load and not 1 <= low <= (self.max_replicas or low):
            raise ValueError(f"min_replicas ({low}) must lie between 1 and max_replicas ({self.max_replicas}).")
        if self.num_replicas is not None and self.num_replicas < 1:
            raise ValueError(f"num_replicas must be at least 1, got {self.num_replicas}")
        if not self.replica_cpus > 0 or self.replica_gpus < 0:
            raise ValueError(f"replica_cpus ({self.replica_cpus}) must be above 0 and replica_gpus not negative.")
        # replicas start in folders of their own
        if Path(self.model).is_dir():
            self.model = str(Path(self.model).resolve())
        if self.chat_template is not None:
            self.chat_template = str(Path(self.chat_template).resolve())


def deployment(arguments: RayArguments) -> Any:
    """A Ray Serve application: in every replica the server's own, around an engine of its own."""
    from ray import serve

    def build() -> Any:  # in the replica
        import torch

        from scripts.serve import build_service

        if not arguments.replica_gpus:
            torch.set_num_threads(max(1, int(arguments.replica_cpus)))
        app, engine = build_service(arguments)
        app.state.engine = engine
        return app

    class Student:
        def check_health(self) -> None:
            # what Ray wraps around this class keeps the application under this name
            if self._asgi_app.state.engine.status == "failed":  # type: ignore[attr-defined]
                raise RuntimeError("the engine's thread has ended")

    options: dict[str, Any] = {
        "name": NAME,
        "max_ongoing_requests": arguments.max_rows + arguments.max_waiting,
        "graceful_shutdown_timeout_s": arguments.drain_seconds,
        "ray_actor_options": {"num_cpus": arguments.replica_cpus, "num_gpus": arguments.replica_gpus},
    }
    if arguments.max_replicas is not None or arguments.min_replicas is not None:
        low = arguments.min_replicas or 1
        options["autoscaling_config"] = {
            "min_replicas": low,
            "max_replicas": arguments.max_replicas or low,
            "target_ongoing_requests": arguments.target_requests or arguments.max_rows,
        }
    else:
        options["num_replicas"] = arguments.num_replicas or 1
    return serve.deployment(**options)(serve.ingress(build)(Student)).bind()


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, start, wait for a signal."""
    from trainers.arguments import parse_arguments

    (arguments,) = parse_arguments(RayArguments, argv=argv, description=__doc__)
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: pip install 'latentforge[scale]'.") from error
    ray.init(
        address=arguments.ray_address,
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
        include_dashboard=False,
        log_to_driver=True,
    )
    stopped = threading.Event()
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, lambda *_: stopped.set())
    serve.start(http_options={"host": arguments.host, "port": arguments.port})
    serve.run(deployment(arguments), name=NAME, route_prefix="/")
    where = f"http://{arguments.host}:{arguments.port}"
    print(f"serving at {where} (documentation at {where}/docs)", file=sys.stderr, flush=True)
    while not stopped.wait(1.0):
        pass
    serve.delete(NAME)  # waits for what has begun
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    from trainers.command_line import run

    run(main)
