"""Prometheus metrics: vLLM's names under ``glm4:``, so that its dashboards carry over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from glm4runtime.engine.request import Timing
    from glm4serve.models import Models

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
_MODEL = ("model_name",)


class Metrics:
    """Totals are read from the engines when they're asked for; times are noted as answers come."""

    def __init__(self, models: Models) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Engines(models))
        self._first = self._histogram("time_to_first_token_seconds", "From a request's arrival to its first token.")
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens of an answer.")
        self._whole = self._histogram("e2e_request_latency_seconds", "From a request's arrival to its answer's end.")
        self._queue = self._histogram("request_queue_time_seconds", "Waiting for a slot.")
        self._prefill = self._histogram("request_prefill_time_seconds", "From a slot to the first token.")
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last.")
        self.responses = Counter(
            "glm4:http_responses", "Answers by path and status; 499: gone.", ("path", "status"), registry=self._registry
        )

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"glm4:{name}", text, _MODEL, buckets=_SECONDS, registry=self._registry)

    def between(self, model: str, seconds: float, tokens: int) -> None:
        """So many tokens of an answer came so long after those before."""
        for _ in range(tokens):
            self._between.labels(model).observe(seconds / tokens)

    def finished(self, model: str, timing: Timing) -> None:
        """A request was answered to its end."""
        started, first, finished = timing.started, timing.first_token, timing.finished
        if started is not None:
            self._queue.labels(model).observe(started)
        if first is not None:
            self._first.labels(model).observe(first)
        if started is not None and first is not None:
            self._prefill.labels(model).observe(first - started)
        if first is not None and finished is not None:
            self._decode.labels(model).observe(finished - first)
        if finished is not None:
            self._whole.labels(model).observe(finished)

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self._registry)


class _Engines(Collector):
    """The engines' own numbers at this moment."""

    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[Metric]:
        """Called at each scrape."""
        gauges = {
            "num_requests_running": "Answers that have a slot.",
            "num_requests_waiting": "Answers that wait for one.",
            "kv_cache_usage_perc": "Share of the cache that answers hold, 1: all of it. A slot's rows are its own.",
            "engine_last_step_age_seconds": "Since the engine last came round.",
            "prefix_cache_bytes": "Memory of kept prompts.",
        }
        counters = {
            "prompt_tokens": "Prompt tokens of requests that got a slot and have ended.",
            "generation_tokens": "Tokens written for them, failed ones too.",
            "prefix_cache_queries": "Prompt tokens that were looked for in the prefix cache.",
            "prefix_cache_hits": "Those found there.",
            "prefix_cache_evictions": "Blocks that others took the place of.",
            "spec_decode_num_draft_tokens": "Tokens that a draft bundle guessed.",
            "spec_decode_num_accepted_tokens": "Those that proved right.",
        }
        found: dict[str, Metric] = {
            name: GaugeMetricFamily(f"glm4:{name}", text, labels=_MODEL) for name, text in gauges.items()
        }
        found |= {name: CounterMetricFamily(f"glm4:{name}", text, labels=_MODEL) for name, text in counters.items()}
        success = CounterMetricFamily(
            "glm4:request_success", "Answers by how they ended.", labels=("model_name", "finished_reason")
        )
        for generator in self._models.bundles:  # an adapter's numbers are its bundle's
            stats, name = generator.engine.stats(), generator.name
            kept = stats.prefixes
            values = {
                "num_requests_running": stats.scheduler.running,
                "num_requests_waiting": stats.scheduler.waiting,
                "kv_cache_usage_perc": stats.scheduler.running / stats.slots,
                "engine_last_step_age_seconds": stats.last_step_age,
                "prompt_tokens": stats.prompt_tokens,
                "generation_tokens": stats.completion_tokens,
                "prefix_cache_bytes": 0 if kept is None else kept.stored_bytes,
                "prefix_cache_queries": 0 if kept is None else kept.query_tokens,
                "prefix_cache_hits": 0 if kept is None else kept.hit_tokens,
                "prefix_cache_evictions": 0 if kept is None else kept.evictions,
                "spec_decode_num_draft_tokens": stats.drafted_tokens,
                "spec_decode_num_accepted_tokens": stats.accepted_tokens,
            }
            for key, value in values.items():
                found[key].add_metric([name], value)  # type: ignore[attr-defined]
            for reason, count in stats.finished.items():
                success.add_metric([name, reason], count)
        for embedder in self._models.embedders.values():
            pending = embedder.pending
            found["num_requests_running"].add_metric([embedder.name], min(pending, 1))  # type: ignore[attr-defined]
            found["num_requests_waiting"].add_metric([embedder.name], max(pending - 1, 0))  # type: ignore[attr-defined]
        yield from found.values()
        yield success
