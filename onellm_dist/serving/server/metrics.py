"""What the server measures, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class ServerMetrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "onellm_requests",
            "Requests for completions, by HTTP status.",
            ["status"],
            registry=self._registry,
        )
        self.abandoned = Counter(
            "onellm_abandoned_requests",
            "Requests whose client left before the end of the answer.",
            registry=self._registry,
        )
        self.waiting = Gauge(
            "onellm_waiting_requests", "Requests that wait.", registry=self._registry
        )
        self.preparing = Gauge(
            "onellm_unprepared_requests",
            "Requests that wait until their media can be read.",
            registry=self._registry,
        )
        self.running = Gauge(
            "onellm_running_requests",
            "Requests that are being answered.",
            registry=self._registry,
        )
        self._prompts = Counter(
            "onellm_prompt_tokens", "Positions of prompts, media included.", registry=self._registry
        )
        self._answers = Counter(
            "onellm_completion_tokens", "Tokens of answers.", registry=self._registry
        )
        self._batches = Histogram(
            "onellm_batch_size",
            "Requests that are answered together, whenever some have joined.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self._registry,
        )
        self._continued = Counter(
            "onellm_continued_positions",
            "Positions of the answers under way, summed over all steps.",
            registry=self._registry,
        )
        self._padding = Counter(
            "onellm_padding_positions",
            "Padding between them, which the steps attend to needlessly.",
            registry=self._registry,
        )
        self.first_token = Histogram(
            "onellm_first_token_seconds",
            "From a request to the first text of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.seconds = Histogram(
            "onellm_request_seconds",
            "From a request to the end of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def count_batch(self, requests: int) -> None:
        """Count a batch that requests have joined.

        Args:
            requests: how many are answered together now.
        """
        self._batches.observe(requests)

    def count_tokens(self, positions: int, tokens: int) -> None:
        """Count the tokens of an answer.

        Args:
            positions: of the prompt, media included.
            tokens: new ones.
        """
        self._prompts.inc(positions)
        self._answers.inc(tokens)

    def count_positions(self, positions: int, padding: int) -> None:
        """Count what the steps of a batch attended to.

        Args:
            positions: real ones of its rows.
            padding: the others.
        """
        self._continued.inc(positions)
        self._padding.inc(padding)

    def write(self) -> bytes:
        """Format all metrics in Prometheus' text format."""
        return generate_latest(self._registry)
