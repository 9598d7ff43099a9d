"""/metrics for Prometheus: vLLM's names where they fit, and metrics of images."""

from __future__ import annotations

from functools import partial
from time import monotonic
from typing import Any, TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from earlyfusion.generation.request import (
    Event,
    Finished,
    ImageDone,
    ImageProgress,
    ImageStarted,
    TextDelta,
)
from earlyfusion.serve.driver import Batch
from earlyfusion.serve.replicas import Drivers, Replicas

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
Metric = TypeVar("Metric", Counter, Histogram)
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150, 600)


class Metrics:
    """The metrics of one server; `observe` is called with every event of every reply."""

    def __init__(self, driver: Drivers, model: str) -> None:
        self._registry = CollectorRegistry()
        names, labels = ("model_name",), {"model_name": model}

        def gauge(name: str, help: str) -> Gauge:
            metric = Gauge(f"earlyfusion:{name}", help, names, registry=self._registry)
            return metric.labels(**labels)

        def counter(name: str, help: str) -> Counter:
            metric = Counter(f"earlyfusion:{name}", help, names, registry=self._registry)
            metric.labels(**labels)  # so that it is 0, not missing, before the first request
            return metric

        def seconds(name: str, help: str) -> Histogram:
            metric = Histogram(
                f"earlyfusion:{name}", help, names, buckets=_SECONDS, registry=self._registry
            )
            metric.labels(**labels)
            return metric

        gauge("num_requests_running", "Requests that generate tokens.").set_function(
            lambda: driver.running
        )
        gauge("num_requests_waiting", "Admitted requests without a token.").set_function(
            lambda: driver.waiting
        )
        gauge("kv_cache_usage_perc", "Share of the cache's blocks in use, 0 to 1.").set_function(
            lambda: driver.cache_usage
        )
        gauge("engine_restarts", "Times that the engine's process was started again.").set_function(
            lambda: driver.restarts
        )
        gauge("engines_ready", "Engines that take requests.").set_function(
            lambda: driver.engines_ready
        )
        silent = Gauge(
            "earlyfusion:engine_silent_seconds",
            "Since the engine's last heartbeat.",
            (*names, "engine"),
            registry=self._registry,
        )
        for number, one in enumerate(driver.drivers if isinstance(driver, Replicas) else [driver]):
            silent.labels(model, str(number)).set_function(partial(getattr, one, "silent_seconds"))
        self.preemptions = counter("num_preemptions", "Requests that gave their blocks to another.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.cache_queries = counter("prefix_cache_queries", "Tokens of prompts looked up.")
        self.cache_hits = counter("prefix_cache_hits", "Tokens of prompts that the cache held.")
        self.generation_tokens = counter("generation_tokens", "Tokens of replies.")
        self.images_started = counter("images_started", "Images begun.")
        self.images_done = counter("images_done", "Images generated.")
        self.image_codes = counter("image_codes", "Codes of generated images.")
        self.cancelled = counter("requests_cancelled", "Requests whose client went away.")
        self.first_token = seconds("time_to_first_token_seconds", "Admission to first output.")
        self.latency = seconds("e2e_request_latency_seconds", "Admission to the last token.")
        self.image_latency = seconds("image_seconds", "An image, from its first code to its last.")
        self._success = Counter(
            "earlyfusion:request_success",
            "Requests that were answered.",
            (*names, "finished_reason"),
            registry=self._registry,
        )
        self._errors = Counter(
            "earlyfusion:http_errors", "Error replies.", ("status",), registry=self._registry
        )
        self._driver, self._model, self._seen_preemptions = driver, model, 0
        self._with_labels: dict[tuple[object, ...], Any] = {}

    def _labelled(self, metric: Metric, *labels: str) -> Metric:
        """The metric with these labels, cached, as prometheus_client's lookup is slow."""
        labelled = self._with_labels.get((metric, *labels))
        if labelled is None:
            labelled = self._with_labels[metric, *labels] = metric.labels(*labels)
        return cast(Metric, labelled)

    def observe(self, batch: Batch, index: int, event: Event) -> None:
        """Count one event of request `index` of a batch, under the name of the adapter or the model
        that answers it."""
        if isinstance(event, ImageProgress) or (batch.has_output and isinstance(event, TextDelta)):
            return  # most events
        now, name = monotonic(), batch.requests[0].adapter or self._model
        if isinstance(event, TextDelta | ImageStarted) and not batch.has_output:
            batch.has_output = True
            self._labelled(self.first_token, name).observe(now - batch.admitted_at)
        if isinstance(event, ImageStarted):
            self._labelled(self.images_started, name).inc()
            batch.image_started_at[index] = now
        if isinstance(event, ImageDone):
            self._labelled(self.images_done, name).inc()
            self._labelled(self.image_codes, name).inc(event.codes.size)
            self._labelled(self.image_latency, name).observe(now - batch.image_started_at[index])
        if isinstance(event, Finished):
            self._labelled(self.prompt_tokens, name).inc(event.usage.prompt_tokens)
            self._labelled(self.cache_queries, name).inc(event.usage.prompt_tokens)
            self._labelled(self.cache_hits, name).inc(event.usage.cached_tokens)
            self._labelled(self.generation_tokens, name).inc(event.usage.completion_tokens)
            self._labelled(self.latency, name).observe(now - batch.admitted_at)
            self._labelled(self._success, name, event.reason).inc()

    def count_cancelled(self, batch: Batch) -> None:
        """Count an HTTP request whose client left early."""
        name = batch.requests[0].adapter if batch.requests else ""
        self.cancelled.labels(name or self._model).inc()

    def count_error(self, status: int) -> None:
        """Count an error reply."""
        self._errors.labels(str(status)).inc()

    def text(self) -> bytes:
        """The reply of /metrics."""
        preemptions = self._driver.preemptions
        # The engines count them. One that is restarted begins again at 0, which a counter may not.
        self.preemptions.labels(self._model).inc(max(preemptions - self._seen_preemptions, 0))
        self._seen_preemptions = preemptions
        return generate_latest(self._registry)
