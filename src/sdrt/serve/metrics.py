"""What `/metrics` shows, in Prometheus' text format."""

from __future__ import annotations

import threading
import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_WINDOW_S = 10.0
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_IMAGES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)


class Metrics:
    """The server's figures; every method may be called from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._lock = threading.Lock()
        self._steps: deque[float] = deque()
        self.requests = Counter(
            "sdrt_http_requests",
            "Answers by method, route and status.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "sdrt_http_seconds",
            "From a request's head to the last byte of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.grpc_requests = Counter(
            "sdrt_grpc_requests", "Answers over gRPC by method and code.", ["method", "code"], registry=self.registry
        )
        self.grpc_seconds = Histogram(
            "sdrt_grpc_seconds",
            "From a call's beginning to the end of its answer.",
            ["method"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.phases = Histogram(
            "sdrt_phase_seconds",
            "Of one picture: queue, waiting for a place; prepare, up to its first step; denoise, the steps with the "
            "waiting for those of others; decode; encode, to a file's bytes.",
            ["model", "phase"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch = Histogram(
            "sdrt_batch_images", "Pictures that share one call of the U-Net.", buckets=_IMAGES, registry=self.registry
        )
        self.steps = Counter(
            "sdrt_steps", "Steps of the sampler, counted for each picture.", ["model"], registry=self.registry
        )
        self.queue_depth = Gauge("sdrt_queue_depth", "Pictures that wait for a place.", registry=self.registry)
        self.running = Gauge("sdrt_running_images", "Pictures that are being made.", registry=self.registry)
        self.ready = Gauge("sdrt_ready", "1 if requests for pictures are accepted.", registry=self.registry)
        rate = Gauge("sdrt_steps_per_second", "Over the last ten seconds, for all pictures.", registry=self.registry)
        rate.set_function(self._rate)
        # Resident and virtual memory, processor time and open files, under names that dashboards know.
        ProcessCollector(registry=self.registry)

    def count_step(self, model: str) -> None:
        """Count one step of one picture."""
        self.steps.labels(model).inc()
        with self._lock:
            self._steps.append(time.monotonic())
            self._forget()

    def phase_totals(self, model: str) -> dict[str, tuple[int, float]]:
        """Give for each phase how many of a model's pictures have gone through it, and the seconds of all."""
        totals: dict[str, list[float]] = {}
        for sample in next(iter(self.phases.collect())).samples:
            if sample.labels["model"] == model and sample.name.endswith(("_count", "_sum")):
                total = totals.setdefault(sample.labels["phase"], [0, 0.0])
                total[sample.name.endswith("_sum")] = sample.value
        return {phase: (int(count), seconds) for phase, (count, seconds) in totals.items()}

    def _rate(self) -> float:
        with self._lock:
            self._forget()
            return len(self._steps) / _WINDOW_S

    def _forget(self) -> None:
        oldest = time.monotonic() - _WINDOW_S
        while self._steps and self._steps[0] < oldest:
            self._steps.popleft()

    def text(self) -> bytes:
        """Write all figures down."""
        return generate_latest(self.registry)
