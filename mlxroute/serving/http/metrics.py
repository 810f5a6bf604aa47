"""The figures of an endpoint in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mlxroute.serving.scheduler import AnswerScheduler
from mlxroute.types import RunStats, Token

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
OTHER_ROUTE: Final = "other"
"""Stands for the route of a request that no route has handled."""

_CALL_BUCKETS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_ANSWER_BUCKETS_S: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_SPEED_BUCKETS: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500)
_STATES: Final = (
    ("running", "Answers that are being written."),
    ("queued", "Answers that wait for their turn."),
    ("cache_entries", "KV caches that are kept for later prompts."),
    ("cache_bytes", "Memory of these KV caches."),
    (
        "batch_bytes",
        "Memory of the batch's KV caches; an answer that is written alone has its own.",
    ),
)
_TOTALS: Final = (
    ("cache_hits", "Prompts that began with a kept KV cache."),
    ("cache_misses", "Prompts that did not."),
)


def count_request(app: Any, route: str, status: int) -> None:
    """Count a request to an application; one that still loads its models has no figures."""
    if (endpoint := app.state.endpoint) is not None:
        endpoint.metrics.on_request(route, status)


class _SchedulerCollector(Collector):
    """The present state of a scheduler, and its totals."""

    def __init__(self, scheduler: AnswerScheduler) -> None:
        self._scheduler = scheduler

    def collect(self) -> Iterable[Metric]:
        figures = self._scheduler.figures()
        for name, text in _STATES:
            yield GaugeMetricFamily(f"mlxroute_{name}", text, value=getattr(figures, name))
        for name, text in _TOTALS:
            yield CounterMetricFamily(f"mlxroute_{name}", text, value=getattr(figures, name))


class EndpointMetrics:
    """Counts requests and answers. Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"mlxroute_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"mlxroute_{name}", text, buckets=buckets, registry=self.registry)

        self._requests = counter("requests", "Requests by route and status.", "route", "status")
        self._answers = counter("answers", "Answers by model and end.", "model", "finish_reason")
        self._tokens = counter("tokens", "Committed tokens by the model they are from.", "source")
        self._escalated = counter("escalations", "Positions that the large model decided.")
        self._agreed = counter("agreements", "Escalations where it chose the small one's token.")
        self._unchecked = counter("unchecked", "Positions that it should have decided but did not.")
        self._failures = counter("large_failures", "Calls to the large model that failed.")
        self._calls = counter("large_calls", "Calls to the large model.")
        self._call_s = histogram("large_call_seconds", "Time of a call.", _CALL_BUCKETS_S)
        self._stall_s = counter("stall_seconds", "Time in which answers waited for calls.")
        self._uploaded_tokens = counter("uploaded_tokens", "Prompt tokens of calls.")
        self._uploaded_bytes = counter("uploaded_bytes", "Size of the bodies of calls.")
        self._cost = counter("estimated_cost", "Estimated cost of calls, where prices are set.")
        self._forwarded = counter("forwarded_requests", "Requests that the large model answered.")
        self._forwarded_tokens = counter("forwarded_tokens", "Tokens of its answers to them.")
        self._forwarded_s = histogram("forwarded_seconds", "Time of them.", _ANSWER_BUCKETS_S)
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self._cached_tokens = counter("cached_prompt_tokens", "Those that a KV cache held.")
        self._ttft_s = histogram("ttft_seconds", "Time to the first token.", _ANSWER_BUCKETS_S)
        self._queue_s = histogram("queue_seconds", "Time in the queue.", _ANSWER_BUCKETS_S)
        self._speed = histogram("answer_tokens_per_second", "Speed of an answer.", _SPEED_BUCKETS)

    def watch(self, scheduler: AnswerScheduler) -> None:
        """Report the present state of a scheduler."""
        self.registry.register(_SchedulerCollector(scheduler))

    def on_request(self, route: str, status: int) -> None:
        """Count a request."""
        self._requests.labels(route, str(status)).inc()

    def on_answer(
        self,
        model: str,
        stats: RunStats,
        tokens: Iterable[Token],
        *,
        queue_wait_s: float,
        has_failed: bool,
    ) -> None:
        """Count an answer, complete or not; `has_failed` if an error ended it."""
        end = "error" if has_failed else stats.finish_reason.value
        self._answers.labels(model, end).inc()
        self._tokens.labels("small").inc(stats.tokens - stats.large_tokens)
        self._tokens.labels("large").inc(stats.large_tokens)
        self._escalated.inc(stats.escalated)
        self._agreed.inc(stats.agreed)
        self._unchecked.inc(stats.unchecked)
        self._failures.inc(stats.fallbacks)
        self._calls.inc(stats.calls)
        self._stall_s.inc(stats.stall_s)
        self._uploaded_tokens.inc(max(0, stats.uploaded_tokens))
        self._uploaded_bytes.inc(max(0, stats.uploaded_bytes))
        self._cost.inc(max(0.0, stats.cost_estimate or 0.0))
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._cached_tokens.inc(stats.cached_prompt_tokens)
        self._queue_s.observe(queue_wait_s)
        if stats.tokens:
            self._ttft_s.observe(stats.ttft_s)
        if stats.tokens_per_s:
            self._speed.observe(stats.tokens_per_s)
        for token in tokens:
            call = token.escalation
            if call is not None and not (call.prefetched or call.withheld):
                self._call_s.observe(call.latency_s)

    def on_forwarded(self, *, tokens: int, prompt_tokens: int, cost: float, seconds: float) -> None:
        """Count a request that the large model has answered alone."""
        self._forwarded.inc()
        self._forwarded_tokens.inc(tokens)
        self._forwarded_s.observe(seconds)
        self._uploaded_tokens.inc(prompt_tokens)
        self._cost.inc(max(0.0, cost))

    def text(self) -> bytes:
        """Return all figures."""
        return generate_latest(self.registry)
