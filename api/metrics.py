"""Prometheus metrics, all named `jaxserve_…`. A scrape reads the engine's statistics from its last report."""

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jaxserve.engine.client import EngineClient

_TTFT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The metrics of one process, in their own registry."""

    def __init__(self, client: EngineClient) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(client))
        self.requests = Counter("jaxserve_requests", "Accepted requests.", ["endpoint"], registry=self._registry)
        self.aborts = Counter("jaxserve_aborted_requests", "Requests that ended early.", registry=self._registry)
        self.prompt_tokens = Counter("jaxserve_prompt_tokens", "Prompt tokens.", registry=self._registry)
        self.output_tokens = Counter("jaxserve_output_tokens", "Output tokens.", registry=self._registry)
        self.ttft = Histogram(
            "jaxserve_time_to_first_token_seconds", "Arrival to first token.", buckets=_TTFT_S, registry=self._registry
        )
        self.inter_token = Histogram(
            "jaxserve_inter_token_latency_seconds",
            "Time between tokens of a choice.",
            buckets=_TOKEN_S,
            registry=self._registry,
        )
        self.request = Histogram(
            "jaxserve_e2e_request_latency_seconds",
            "Time from arrival to the end of a request.",
            buckets=_REQUEST_S,
            registry=self._registry,
        )

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class RequestTimer:
    """Measures the latencies of one request from its arrival."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = time.perf_counter()
        self._last: dict[int, float] = {}

    def token(self, choice: int) -> None:
        """Record that a choice received text or tokens."""
        now = time.perf_counter()
        last = self._last.get(choice)
        if last is None:
            self._metrics.ttft.observe(now - self._start)
        else:
            self._metrics.inter_token.observe(now - last)
        self._last[choice] = now

    def end(self) -> None:
        """Record the end of the request."""
        self._metrics.request.observe(time.perf_counter() - self._start)


class _EngineCollector(Collector):
    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def collect(self) -> Iterable[Metric]:
        s = self._client.stats
        hit_rate = s.num_cached_tokens / s.num_prompt_tokens if s.num_prompt_tokens else 0.0
        for name, text, value in (
            ("running_requests", "Choices in the running batch.", s.num_running),
            ("queued_requests", "Choices waiting in the queue.", s.num_waiting),
            ("pages", "Pages of the key/value pool.", s.num_pages),
            ("used_pages", "Pages that running choices hold.", s.num_used_pages),
            ("prefix_cache_hit_rate", "Share of prompt tokens that came from the prefix cache.", hit_rate),
        ):
            yield GaugeMetricFamily(f"jaxserve_{name}", text, value=value)
        for name, text, value in (
            ("cached_prompt_tokens", "Prompt tokens that came from the prefix cache.", s.num_cached_tokens),
            ("preemptions", "Preempted choices: their pages were freed and recomputed.", s.num_preemptions),
            ("compiles", "Programs that XLA compiled.", s.num_compiles),
            ("compiles_after_ready", "Programs compiled while serving; should stay 0.", s.num_compiles_after_ready),
        ):
            yield CounterMetricFamily(f"jaxserve_{name}", text, value=value)
