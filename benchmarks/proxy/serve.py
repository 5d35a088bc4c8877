"""The proxy on its own, in front of workers that somebody else runs.

python -m benchmarks.proxy.serve --listen 127.0.0.1:8080 --model m --workers 127.0.0.1:18000 127.0.0.1:18001
"""

import argparse
import asyncio
import gc
import signal

import structlog
import uvloop

from l40sd.config.options import ProxyConfig
from l40sd.model import ModelName, WorkerId
from l40sd.proxy.server import Proxy
from l40sd.routing.routes import Backend, Routes


async def serve(listen: str, model: str, workers: list[str], *, access_log: bool) -> None:
    """Run until SIGTERM or SIGINT."""
    routes = Routes()
    for number, address in enumerate(workers):
        host, _, port = address.rpartition(":")
        worker = WorkerId(f"{model}-gpu{number}")
        routes.add(Backend(worker=worker, model=ModelName(model), host=host, port=int(port)))
    proxy = Proxy(ProxyConfig(listen=(listen,), access_log=access_log), routes)
    await proxy.start()
    gc.collect()
    gc.freeze()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await proxy.stop(1.0)


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", default="127.0.0.1:8080")
    parser.add_argument("--model", default="m")
    parser.add_argument("--workers", nargs="+", required=True)
    parser.add_argument("--access-log", action="store_true")
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(20))
    uvloop.run(serve(options.listen, options.model, options.workers, access_log=options.access_log))


if __name__ == "__main__":
    main()
