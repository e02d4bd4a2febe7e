"""Ray's metrics: what Prometheus finds at the metrics port of the node that the main process runs on.

Ray puts `ray_` before each name and `_total` behind that of a counter: `ray_fedpeat_clients_total`. A process hands its
values over every ten seconds.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

_TAGS = ("run", "algorithm")

GAUGES = {
    "fedpeat_round": "Rounds that are complete.",
    "fedpeat_perplexity": "exp of the mean loss a label on held-out private data, when it was last evaluated.",
    "fedpeat_train_loss": "Mean over completed clients of the round, nats per token.",
    "fedpeat_virtual_seconds": "The simulated clock at the end of the round.",
    "fedpeat_clients_per_second": "Clients completed in the round, per second that their training took.",
}
COUNTERS = {
    "fedpeat_download_bytes": "Received by simulated devices.",
    "fedpeat_upload_bytes": "Sent by simulated devices.",
    "fedpeat_energy_joules": "Spent by simulated devices, computing and on radio.",
}
CLIENTS = "fedpeat_clients"
METRIC = "fedpeat_metric"


class RayMetrics:
    """Gauges of the last round and counters of all since this process began, with the run's name and algorithm."""

    def __init__(self, run: str, algorithm: str):
        def of_this_run(kind: Any, name: str, about: str, *more: str) -> Any:
            return kind(name, about, (*_TAGS, *more)).set_default_tags({"run": run, "algorithm": algorithm})

        self._gauges = {name: of_this_run(Gauge, name, about) for name, about in GAUGES.items()}
        self._counters = {name: of_this_run(Counter, name, about) for name, about in COUNTERS.items()}
        about = "What the task measures on held-out private data, by name, when it was last evaluated."
        self._metric = of_this_run(Gauge, METRIC, about, "metric")
        about = "Clients sampled, by what became of them."
        self._clients = of_this_run(Counter, CLIENTS, about, "outcome", "drop_reason")

    def round(self, row: Mapping[str, Any], clients: Mapping[str, Any]) -> None:
        """Set and count; Ray hands it over when it is time."""
        wall_s = row["wall_train_s"]
        now = {
            "fedpeat_round": row["round"],
            "fedpeat_perplexity": row["perplexity"],
            "fedpeat_train_loss": row["train_loss"],
            "fedpeat_virtual_seconds": row["virtual_s"],
            "fedpeat_clients_per_second": row["num_completed"] / wall_s if wall_s else None,
        }
        for name, value in now.items():
            self._gauges[name].set(value)  # nothing if there is none
        for name, value in row["metrics"].items():
            self._metric.set(value, {"metric": name})
        more = {
            "fedpeat_download_bytes": row["download_bytes"],
            "fedpeat_upload_bytes": row["upload_bytes"],
            "fedpeat_energy_joules": row["energy_j"],
        }
        for name, value in more.items():
            if value > 0:  # Ray refuses to count nothing
                self._counters[name].inc(value)
        for (outcome, reason), number in Counts(zip(clients["outcome"], clients["drop_reason"], strict=True)).items():
            self._clients.inc(number, {"outcome": outcome, "drop_reason": reason or ""})

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Nothing: the last round has said it."""

    def close(self) -> None:
        """Nothing: Ray shows the last values as long as this process lives."""
