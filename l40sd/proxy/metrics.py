"""What the proxy counts, and as Prometheus text.

Counting runs once a request: a dict entry, two bisections. Text is made only when asked for.
"""

from bisect import bisect_left
from collections.abc import Iterator

from l40sd.routing.routes import Routes

BOUNDS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

CLIENT_GONE = 499
"""What stands for the status where the client left before there was one; nginx's number for it."""


class Histogram:
    """How often a duration fell below each of ``BOUNDS_S``."""

    __slots__ = ("buckets", "sum_s")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def observe(self, duration_s: float) -> None:
        """Count one duration."""
        self.buckets[bisect_left(BOUNDS_S, duration_s)] += 1
        self.sum_s += duration_s

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Yield the samples; ``labels`` is inside the braces, not empty."""
        total = 0
        for bound, count in zip((*BOUNDS_S, "+Inf"), self.buckets, strict=True):
            total += count
            yield f'{name}_bucket{{{labels},le="{bound}"}} {total}'
        yield f"{name}_sum{{{labels}}} {self.sum_s:.6f}"
        yield f"{name}_count{{{labels}}} {total}"


class Timings:
    """How long a model's workers took, in seconds from the whole request on."""

    __slots__ = ("duration", "first_byte")

    def __init__(self) -> None:
        self.first_byte = Histogram()
        self.duration = Histogram()


class Metrics:
    """Counts since the proxy was made.

    Attributes:
        answers: Requests by model and status; the model is empty where none was found, the status ``CLIENT_GONE`` where
            the client left before there was one.
        timings: By model.
        cut: Replies that had begun and broke off.
        gone: Requests whose client left before the end.
        refused_connections: Over the connection limit.
    """

    def __init__(self) -> None:
        self.answers: dict[tuple[str, int], int] = {}
        self.timings: dict[str, Timings] = {}
        self.retried = 0
        self.cut = 0
        self.gone = 0
        self.refused_connections = 0

    def client_gone(self) -> None:
        """Count a request whose client left before the end."""
        self.gone += 1

    def reply_cut(self) -> None:
        """Count a reply that had begun and broke off."""
        self.cut += 1

    def tried_again(self) -> None:
        """Count a further try of a request."""
        self.retried += 1

    def connection_refused(self) -> None:
        """Count a connection that was over a limit."""
        self.refused_connections += 1

    def answered(self, model: str, status: int) -> None:
        """Count a request that was answered, by a worker or here."""
        key = (model, status)
        self.answers[key] = self.answers.get(key, 0) + 1

    def timed(self, model: str, first_byte_s: float, duration_s: float) -> None:
        """Count a worker's whole answer: seconds from the whole request to the first and the last byte."""
        timings = self.timings.get(model)
        if timings is None:
            timings = self.timings[model] = Timings()
        timings.first_byte.observe(first_byte_s)
        timings.duration.observe(duration_s)

    def answered_at_once(self, model: str, status: int, duration_s: float) -> None:
        """Count a worker's whole answer whose first byte came with its last."""
        key = (model, status)
        self.answers[key] = self.answers.get(key, 0) + 1
        timings = self.timings.get(model)
        if timings is None:
            timings = self.timings[model] = Timings()
        slot = bisect_left(BOUNDS_S, duration_s)
        for histogram in (timings.first_byte, timings.duration):
            histogram.buckets[slot] += 1
            histogram.sum_s += duration_s

    @property
    def served(self) -> int:
        """Requests answered below 500, those included whose client left within the answer."""
        return sum(count for (_, status), count in self.answers.items() if status < CLIENT_GONE)

    @property
    def failed(self) -> int:
        """Requests answered with 500 or above, and those cut."""
        return self.cut + sum(count for (_, status), count in self.answers.items() if status >= 500)

    def text(self, routes: Routes, connections: int) -> str:
        """Return everything in Prometheus' text format, version 0.0.4."""
        lines = [*self._request_lines(), *_route_lines(routes)]
        lines += _family("l40sd_proxy_connections", "gauge", "Client connections now.", [("", connections)])
        return "\n".join([*lines, ""])

    def _request_lines(self) -> Iterator[str]:
        yield from _family(
            "l40sd_proxy_requests_total",
            "counter",
            "Requests by model and status.",
            [(f'model="{_escaped(m)}",code="{code}"', n) for (m, code), n in sorted(self.answers.items())],
        )
        for name, text, count in (
            ("retries", "Further workers tried before the first byte.", self.retried),
            ("cut", "Replies that had begun and broke off.", self.cut),
            ("clients_gone", "Requests whose client left before the end.", self.gone),
            ("connections_refused", "Connections over the limit.", self.refused_connections),
        ):
            yield from _family(f"l40sd_proxy_{name}_total", "counter", text, [("", count)])
        timings = sorted(self.timings.items())
        for name, text, histograms in (
            ("first_byte", "From the whole request to the reply's first byte.", [t.first_byte for _, t in timings]),
            ("duration", "From the whole request to the reply's last byte.", [t.duration for _, t in timings]),
        ):
            family = f"l40sd_proxy_{name}_seconds"
            yield from _family(family, "histogram", text, [])
            for (model, _), histogram in zip(timings, histograms, strict=True):
                yield from histogram.lines(family, f'model="{_escaped(model)}"')


def _route_lines(routes: Routes) -> Iterator[str]:
    lines = routes.lines()
    names = [f'model="{_escaped(line.model)}"' for line in lines]
    workers = [(f'worker="{worker}"', worker, tally) for worker, tally in sorted(routes.workers())]
    for name, kind, text, samples in (
        ("model_ready", "gauge", "Workers that may receive requests.", _zip(names, [len(x.routes) for x in lines])),
        ("model_waiting", "gauge", "Requests in the waiting line.", _zip(names, [len(x.waiters) for x in lines])),
        ("worker_in_flight", "gauge", "Requests held.", [(x, routes.in_flight(w)) for x, w, _ in workers]),
        ("worker_served_total", "counter", "Requests answered below 500.", [(x, t.served) for x, _, t in workers]),
        ("worker_failures_total", "counter", "Requests failed.", [(x, t.failed) for x, _, t in workers]),
        ("worker_retries_total", "counter", "Requests taken elsewhere.", [(x, t.retried) for x, _, t in workers]),
        (
            "worker_ejections_total",
            "counter",
            "Times out for failed requests.",
            [(x, t.ejected) for x, _, t in workers],
        ),
    ):
        yield from _family(f"l40sd_{name}", kind, text, samples)


def _zip(labels: list[str], values: list[int]) -> list[tuple[str, int]]:
    return list(zip(labels, values, strict=True))


def _family(name: str, kind: str, text: str, samples: list[tuple[str, int]]) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        yield f"{name}{{{labels}}} {value}" if labels else f"{name} {value}"


def _escaped(label: str) -> str:
    return label.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
