"""l40sd's proxy next to nginx: CPU microseconds a request and a streamed event.

python -m benchmarks.proxy [--rounds 3] [--seconds 2]

Both run on CPU 0, workers and load on CPU 1, everything over loopback, one after the other in each round. Other
programs on the machine only ever add to the CPU time of an item, so the best round counts and the median stands
beside it. Without nginx (Debian: nginx-light) only l40sd is measured.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

WORKERS = 12
PROXIES = ("nginx", "l40sd")
WORK = {"requests": (64, 0), "events": (200, 50)}  # connections, events a second on each
START_TIMEOUT_S = 20.0
NGINX = """
worker_processes 1; daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log crit;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 1000000000; client_body_buffer_size 1m; client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream workers {{ least_conn; {servers} keepalive 512; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://workers; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on at the moment."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in socks]


def command(proxy: str, port: int, workers: list[int], folder: Path) -> list[str]:
    """Return the command line that starts a proxy in front of workers on these ports."""
    addresses = [f"127.0.0.1:{worker}" for worker in workers]
    if proxy == "l40sd":
        serve = [sys.executable, "-m", "benchmarks.proxy.serve", "--listen", f"127.0.0.1:{port}"]
        return [*serve, "--model", "m", "--workers", *addresses]
    config = folder / "nginx.conf"
    servers = " ".join(f"server {address};" for address in addresses)
    config.write_text(NGINX.format(folder=folder, port=port, servers=servers))
    return ["nginx", "-c", str(config), "-e", f"{folder}/error.log"]


@contextlib.contextmanager
def running(argv: list[str], port: int, cpu: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program on one CPU while the block lasts, from the moment it accepts connections.

    Raises:
        TimeoutError: It accepts none.
    """
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        os.sched_setaffinity(process.pid, {cpu})
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise TimeoutError(f"{argv[0]} does not listen on port {port}")
            time.sleep(0.05)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def measure(proxy: str, work: str, seconds: float, cpus: tuple[int, int]) -> dict[str, float]:
    """Return CPU microseconds an item, items a second and events per read of one run."""
    connections, rate = WORK[work]
    port, *workers = free_ports(1 + WORKERS)
    stub = [sys.executable, "-m", "benchmarks.proxy.stub", *map(str, workers)]
    with tempfile.TemporaryDirectory() as name, running(stub, workers[-1], cpus[1]):
        Path(name).chmod(0o755)
        with running(command(proxy, port, workers, Path(name)), port, cpus[0]) as process:
            arguments = [work, port, connections, rate, 1.0, seconds, process.pid]
            load = ["taskset", "-c", str(cpus[1]), sys.executable, "-m", "benchmarks.proxy.load", *map(str, arguments)]
            out = subprocess.check_output(load, timeout=seconds + 60)
    result = json.loads(out)
    if not result["items"] or not result["cpu_s"]:
        raise RuntimeError(f"nothing came through {proxy}: {result}")
    return {
        "cpu_us": result["cpu_s"] / result["items"] * 1e6,
        "rate": result["items"] / seconds,
        "events_per_read": result["events_per_read"],
    }


def best_of(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the cheapest run among those that kept up: where events merge, each looks cheaper than it is."""
    least = min(run["events_per_read"] for run in runs)
    return min((run for run in runs if run["events_per_read"] <= max(1.1, least)), key=lambda run: run["cpu_us"])


def main() -> None:
    """Measure in rounds and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    cpus = sorted(os.sched_getaffinity(0))
    pair = (cpus[0], cpus[-1])
    proxies = [name for name in PROXIES if name == "l40sd" or shutil.which("nginx")]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(options.rounds):
        for work in WORK:
            for proxy in proxies:
                runs.setdefault((work, proxy), []).append(measure(proxy, work, options.seconds, pair))
    write = sys.stdout.write
    write(f"{'':10} {'proxy':8} {'CPU us each':>12} {'median':>8} {'a second':>9} {'events/read':>12} {'x nginx':>8}\n")
    for work in WORK:
        best = {proxy: best_of(runs[work, proxy]) for proxy in proxies}
        for proxy in proxies:
            run = best[proxy]
            median = statistics.median(each["cpu_us"] for each in runs[work, proxy])
            ratio = f"{run['cpu_us'] / best['nginx']['cpu_us']:8.2f}" if "nginx" in best else f"{'-':>8}"
            write(
                f"{work:10} {proxy:8} {run['cpu_us']:12.2f} {median:8.2f} {run['rate']:9.0f}"
                f" {run['events_per_read']:12.2f} {ratio}\n"
            )
    if "nginx" not in proxies:
        write("nginx is not installed (Debian: apt-get install nginx-light): nothing to compare with\n")


if __name__ == "__main__":
    main()
