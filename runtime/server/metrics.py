"""What Prometheus is told."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from pascalvl.runtime.generation import Generation

if TYPE_CHECKING:
    from pascalvl.runtime.server.service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counts what one service does; what it is at the moment is looked at when somebody asks."""

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Now(service))
        ProcessCollector(registry=self._registry)

        def counter(name: str, meaning: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(f"pascalvl_{name}", meaning, labels, registry=self._registry)

        def seconds(name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"pascalvl_{name}_seconds", meaning, buckets=buckets, registry=self._registry)

        self.requests = counter("requests", "Requests, by path and status of HTTP.", ("path", "status"))
        self._finished = counter("answers", "Answers, by why they ended.", ("finish_reason",))
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self._cached_tokens = counter("prompt_tokens_cached", "Those of them that were in the KV cache.")
        self._generation_tokens = counter("generation_tokens", "Tokens of answers.")
        self.first_token = seconds("time_to_first_token", "From a request's arrival to its first token.", _FIRST)
        self.between_tokens = seconds("time_between_tokens", "From one token of an answer to the next.", _BETWEEN)
        self.duration = seconds("request_duration", "From a request's arrival to its end.", _FIRST)

    def count(self, generation: Generation) -> None:
        """Of an answer that has ended, or was left."""
        reason = generation.finish_reason
        self._finished.labels(reason.value if reason else "left").inc()
        self._prompt_tokens.inc(generation.prompt_tokens)
        self._cached_tokens.inc(generation.reused_tokens)
        self._generation_tokens.inc(len(generation.token_ids))

    def text(self) -> bytes:
        """In Prometheus's format."""
        return generate_latest(self._registry)


class _Now:
    """Collects figures of this moment."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def describe(self) -> list[Metric]:
        """Nothing is known before there is a model at work."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Figures, by the names that they are told under."""
        scheduler, admission = self._service.model.scheduler, self._service.admission
        features, pool = scheduler.features, scheduler.pool
        for name, value, meaning in (
            ("requests_running", scheduler.running, "Answers at work."),
            ("requests_waiting", scheduler.waiting, "Answers that wait for pages of the KV cache."),
            ("places_taken", admission.taken, "Answers that were asked for and have not ended."),
            ("places", admission.places, "Of these, at most."),
            ("request_memory_bytes", admission.taken_bytes, "Of bodies and decoded pictures."),
            ("kv_pages", len(pool), "Pages of the KV cache."),
            ("kv_pages_used", len(pool) - pool.free, "Pages of answers at work, and of what is kept for later ones."),
            ("kv_pages_kept", len(scheduler.tree), "Pages that are kept for later prompts."),
            ("kv_host_bytes", scheduler.tree.host_bytes, "Pages that wait on the host, without room in the pool."),
            ("picture_cache_entries", len(features), "Pictures whose features are kept."),
            ("picture_cache_bytes", features.nbytes, "Of these features."),
            ("tasks", len(asyncio.all_tasks()), "Tasks of the event loop."),
        ):
            yield GaugeMetricFamily(f"pascalvl_{name}", meaning, value)
        yield CounterMetricFamily(
            "pascalvl_picture_cache_hits", "Pictures that were not looked at again.", features.hits
        )
        yield CounterMetricFamily("pascalvl_picture_cache_misses", "Pictures that were looked at.", features.misses)
