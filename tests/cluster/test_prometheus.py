"""A run on a Ray head, as a real Prometheus sees it."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import stays
import tiny_runs
from clusters import environment_with_token, free_ports, head

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs prometheus (Debian's package of that name)"),
]

PATIENCE_S = 120


@contextlib.contextmanager
def prometheus(discovery: Path, folder: Path) -> Iterator[str]:
    """A server with our configuration, but for the file that says where to look, and how often; gives its address."""
    config = (tiny_runs.REPOSITORY / "cluster/watching/prometheus.yml").read_text()
    assert config.count("/tmp/ray/prom_metrics_service_discovery.json") == 1
    config = config.replace("/tmp/ray/prom_metrics_service_discovery.json", str(discovery)).replace("10s", "1s")
    (folder / "prometheus.yml").write_text(config)
    (port,) = free_ports(1)
    command = [
        *("prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"),
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def asked(server: str, query: str) -> dict[str, float]:
    """What the server answers now: values by name, with what became of clients and what was measured."""
    with urllib.request.urlopen(f"{server}/api/v1/query?{urllib.parse.urlencode({'query': query})}") as answer:
        found = json.load(answer)["data"]["result"]
    names = ("__name__", "outcome", "drop_reason", "metric")
    return {" ".join(filter(None, map(each["metric"].get, names))): float(each["value"][1]) for each in found}


def expected(directory: Path) -> dict[str, Any]:
    """The same of a run log."""
    rounds, clients = pd.read_parquet(directory / "rounds"), pd.read_parquet(directory / "clients")
    last = rounds.iloc[-1]
    fates = (clients["outcome"] + " " + clients["drop_reason"].fillna("")).str.strip().value_counts()
    return {
        "ray_fedpeat_round": last["round"],
        "ray_fedpeat_perplexity": last["perplexity"],
        "ray_fedpeat_train_loss": last["train_loss"],
        "ray_fedpeat_virtual_seconds": last["virtual_s"],
        "ray_fedpeat_clients_per_second": last["num_completed"] / last["wall_train_s"],
        "ray_fedpeat_download_bytes_total": rounds["download_bytes"].sum(),
        "ray_fedpeat_upload_bytes_total": rounds["upload_bytes"].sum(),
        "ray_fedpeat_energy_joules_total": pytest.approx(rounds["energy_j"].sum(), rel=1e-12),
        **{f"ray_fedpeat_metric {name}": value for name, value in last["metrics"]},
    } | {f"ray_fedpeat_clients_total {fate}": number for fate, number in fates.items()}


def finished_run(environment: dict[str, str], arguments: list[str]) -> subprocess.Popen[str]:
    """The process of a run that is finished, and whose numbers are still to be had."""
    pipe = subprocess.PIPE
    command = [sys.executable, stays.__file__, *arguments]
    process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line == "finished\n":
            return process
    process.communicate()
    pytest.fail(f"the run ended with status {process.returncode}")


def test_prometheus_shows_what_the_run_log_has(gpt2_dir, text_dir, tmp_path):
    paths = f"{tiny_runs.REPOSITORY}:{Path(tiny_runs.__file__).parent}:{tiny_runs.REPOSITORY / 'tests'}"
    environment = environment_with_token(tmp_path) | {"PYTHONPATH": paths, "RAY_metrics_report_interval_ms": "500"}
    out = tmp_path / "watched"
    with (
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,  # short: so are its sockets
        head(environment, Path(folder), "--num-cpus=2") as (address, _),
        prometheus(Path(folder) / "prom_metrics_service_discovery.json", tmp_path) as server,
    ):
        on_ray = ("--hosts.backend", "ray", "--hosts.num-hosts", 1, "--hosts.address", address, "--out", out)
        with finished_run(environment, tiny_runs.arguments(gpt2_dir, text_dir, *on_ray)) as process:
            shown, deadline = {}, time.monotonic() + PATIENCE_S
            while shown != expected(out) and time.monotonic() < deadline:
                time.sleep(0.2)
                with contextlib.suppress(urllib.error.URLError):  # the server starts
                    shown = asked(server, '{__name__=~"ray_fedpeat_.*", run="watched", algorithm="fed-peft"}')
            process.communicate()
    assert shown == expected(out)
