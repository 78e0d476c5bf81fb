"""Prometheus metrics with vLLM's names and meanings, under our own prefix."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mtp_engine.engine import Engine
from mtp_engine.runtime.answer import Chunk
from mtp_engine.runtime.stats import GenerationStats

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_PER_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


@final
class Metrics:
    """Counters of one served model, in a registry of their own."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Engine(engine, name))

        def counter(key: str, text: str, *labels: str) -> Counter:
            made = Counter(f"mtp_engine:{key}", text, ("model_name", *labels), registry=self._registry)
            return made if labels else made.labels(name)

        def histogram(key: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"mtp_engine:{key}", text, ("model_name",), buckets=buckets, registry=self._registry
            ).labels(name)

        self._name = name
        self.ended = counter("request_success", "Answers by the reason that they ended for", "finished_reason")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts")
        self.tokens = counter("generation_tokens", "Tokens of answers")
        self.drafts = counter("spec_decode_num_drafts", "Steps that verified drafts")
        self.draft_tokens = counter("spec_decode_num_draft_tokens", "Tokens that were drafted")
        self.accepted = counter("spec_decode_num_accepted_tokens", "Drafted tokens that were accepted")
        self.positions = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Drafted tokens that were accepted, by depth", "position"
        )
        self.preemptions = counter("num_preemptions", "Times that a request had to wait again, because memory was full")
        self.first = histogram("time_to_first_token_seconds", "From a request's arrival to its first token", _SECONDS)
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "Between two tokens, per request", _PER_TOKEN
        )
        self.whole = histogram("e2e_request_latency_seconds", "From a request's arrival to its end", _SECONDS)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self._registry)

    @contextmanager
    def request(self, prompt_tokens: int) -> Iterator["Watch"]:
        """Count a request, however it ends."""
        watch = Watch()
        try:
            yield watch
        finally:
            self._count(watch, prompt_tokens)

    def _count(self, watch: "Watch", prompt_tokens: int) -> None:
        if watch.stats:
            self.prompt_tokens.inc(prompt_tokens)
        now = time.perf_counter()
        for sample, stats in watch.stats.items():
            accepted = sum(stats.accepted_per_depth)
            self.ended.labels(self._name, watch.reasons.get(sample, "abort")).inc()
            self.tokens.inc(stats.tokens)
            self.drafts.inc(stats.proposed_per_depth[0] if stats.proposed_per_depth else 0)
            self.draft_tokens.inc(stats.nodes - stats.steps)
            self.accepted.inc(accepted)
            self.preemptions.inc(stats.preemptions)
            for depth, count in enumerate(stats.accepted_per_depth):
                self.positions.labels(self._name, str(depth)).inc(count)
            first = watch.first[sample]
            self.first.observe(first - watch.begin)
            if stats.tokens > 1:
                self.per_token.observe((now - first) / (stats.tokens - 1))
        if watch.stats:
            self.whole.observe(now - watch.begin)


@final
class Watch:
    """What happens to one request: its samples' statistics, and when their first tokens came."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.first: dict[int, float] = {}
        self.stats: dict[int, GenerationStats] = {}
        self.reasons: dict[int, str] = {}

    def note(self, chunk: Chunk) -> None:
        self.first.setdefault(chunk.sample, time.perf_counter())
        self.stats[chunk.sample] = chunk.stats
        if chunk.finished:
            self.reasons[chunk.sample] = chunk.finished.finish_reason


@final
class _Engine(Collector):
    """What is read off the engine when somebody asks."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine, self._name = engine, name

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        scheduler, loop = self._engine.scheduler, getattr(self._engine, "loop", None)
        if scheduler is None or loop is None:
            return
        pages, prefix = loop.memory.pages, loop.memory.prefix
        used = 1 - pages.free / pages.count
        for key, text, value in (
            ("num_requests_running", "Requests that have a slot", len(scheduler.running)),
            ("num_requests_waiting", "Requests that wait for one", len(scheduler.waiting)),
            ("kv_cache_usage_perc", "Share of the KV cache's pages in use, kept beginnings included", used),
        ):
            gauge = GaugeMetricFamily(f"mtp_engine:{key}", text, labels=("model_name",))
            gauge.add_metric((self._name,), value)
            yield gauge
        for key, text, count in (
            ("prefix_cache_queries", "Tokens of prompts that were looked up", prefix.asked_tokens if prefix else 0),
            ("prefix_cache_hits", "Of these what was found", prefix.hit_tokens if prefix else 0),
        ):
            counter = CounterMetricFamily(f"mtp_engine:{key}", text, labels=("model_name",))
            counter.add_metric((self._name,), count)
            yield counter
