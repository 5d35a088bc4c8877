"""The simulated engine: OpenAI's API without a model or a GPU, which fails in every way that is asked for.

    python -m l40sd.sim.engine --model llama --port 30001 --fault hang-after=3

It counts: the tokens of a reply are ``" 1"``, ``" 2"``, ``" 3"``, so a lost, doubled or reordered one shows. Standard
library only, because a dozen of them must start within a second on a laptop. See sim/faults.py for the faults.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys

from l40sd.sim.api import Api
from l40sd.sim.faults import FAULTS, Faults, say, spawn_idle, take

ABORT_GRACE_S = 2.0
"""For requests to notice that they are aborted, before the exit."""


def main(argv: list[str] | None = None) -> int:
    """Run until told to stop; return the exit code."""
    options = _options(argv)
    specs = [*options.fault, *filter(None, os.environ.get("L40SD_SIM_FAULTS", "").split(","))]
    try:
        faults = Faults(specs)
    except ValueError as error:
        say(str(error))
        return 2
    code = faults.get("exit-at-once")
    if code is not None:
        say(f"exits at once with {int(code)}, as told")
        return int(code)
    return asyncio.run(Engine(options, faults).run())


def _options(argv: list[str] | None) -> argparse.Namespace:
    known = "\n".join(f"  {name}: {what}" for name, (_, what) in FAULTS.items())
    parser = argparse.ArgumentParser(
        prog="l40sd.sim.engine",
        description="An OpenAI-compatible engine without a model.",
        epilog=f"faults (NAME[=NUMBER]):\n{known}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", nargs="+", required=True, help="names that it serves")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True, help="0: any, see the output")
    parser.add_argument("--api-key", default=os.environ.get("L40SD_SIM_API_KEY", ""))
    parser.add_argument("--ranks", type=int, default=1, help="GPUs; above 1 each has a process of its own")
    parser.add_argument("--max-model-len", type=int, default=0, help="as /v1/models says it; 0: not")
    parser.add_argument("--slots", type=int, default=64, help="requests at once, the others wait")
    parser.add_argument("--tokens-per-s", type=float, default=0.0, help="for each request; 0: as fast as can be")
    parser.add_argument("--start-delay-s", type=float, default=0.0, help="before the port opens, as vLLM")
    parser.add_argument("--loading-s", type=float, default=0.0, help="503 after the port opened, as llama.cpp")
    parser.add_argument("--drain-s", type=float, default=0.0, help="at SIGTERM; 0: abort open requests, as vLLM")
    parser.add_argument("--keep-alive-s", type=float, default=5.0, help="for idle connections, as vLLM")
    parser.add_argument("--fault", action="append", default=[], metavar="NAME[=NUMBER]")
    return parser.parse_args(argv)


class Engine:
    """The life of one engine: it starts its ranks, opens its port, and comes to the end it was told.

    SIGTERM with a drain lets open requests run to their end first, and /health stays 200 meanwhile; without one they
    end at their next token with finish_reason "abort", as if they were complete.
    """

    def __init__(self, options: argparse.Namespace, faults: Faults) -> None:
        self._options = options
        self._faults = faults
        self._ranks: dict[int, int] = {}
        self._kept: list[object] = []
        self._stopping = asyncio.Event()
        self._api = Api(
            options.model,
            faults,
            api_key=options.api_key,
            max_model_len=options.max_model_len,
            slots=options.slots,
            tokens_per_s=options.tokens_per_s,
            keep_alive_s=options.keep_alive_s,
            ranks=self._ranks,
            take=self._take,
            die=self._die,
        )

    async def run(self) -> int:
        """Start, serve until told to stop, and stop; return the exit code."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._term)
        loop.add_signal_handler(signal.SIGINT, self._term)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        say(f"GPUs {os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}, model {self._options.model[0]}")
        self._start_ranks()
        for name in FAULTS:
            self._take(name)
        if self._faults.get("never-bind") is not None or await self._is_stopped_within(self._options.start_delay_s):
            await self._stopping.wait()
            return self._exit()
        server = await asyncio.start_server(self._api.serve, self._options.host, self._options.port, backlog=1024)
        host, port = server.sockets[0].getsockname()[:2]
        say(f"listening on {host}:{port}")
        self._api.is_ready = not await self._is_stopped_within(self._options.loading_s)
        dies_after_s = self._faults.get("die-after")
        if dies_after_s is not None:
            loop.call_later(dies_after_s, self._die, f"dies after {dies_after_s:g} s, as told")
        await self._stopping.wait()
        await self._drain()
        server.close()
        await self._clean_up()
        return self._exit()

    async def _clean_up(self) -> None:
        needs_s = self._faults.get("clean-up")
        if needs_s is not None:
            await asyncio.sleep(needs_s)
            say("all is in order")

    def _start_ranks(self) -> None:
        if self._options.ranks > 1:
            pids = [spawn_idle() for _ in range(self._options.ranks)]
            self._ranks.update({pid: rank for rank, pid in enumerate(pids) if pid})
            say(f"ranks {' '.join(map(str, self._ranks))}")

    def _take(self, name: str) -> None:
        number = self._faults.get(name)
        if number is not None:
            self._kept.append(take(name, number))

    def _term(self) -> None:
        if self._faults.get("ignore-term") is not None:
            say("told to stop, does not")
        else:
            say("stopping")
            self._stopping.set()

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
                rank = self._ranks.pop(ended[0], None)
                if rank is None or self._stopping.is_set():
                    continue
                if self._faults.get("rank-death-unnoticed") is not None:
                    self._api.is_hung = True
                else:
                    self._die(f"rank {rank} died")

    def _die(self, why: str, code: int = 1) -> None:
        """Exit and take nobody along, as an engine that crashes."""
        say(why)
        os._exit(code)

    async def _is_stopped_within(self, wait_s: float) -> bool:
        if wait_s <= 0:
            return self._stopping.is_set()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._stopping.wait()
        return self._stopping.is_set()

    async def _drain(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._options.drain_s):
                await self._api.idle.wait()
        self._api.is_aborting = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ABORT_GRACE_S):
                await self._api.idle.wait()

    def _exit(self) -> int:
        if self._faults.get("leak-children") is None:
            for pid in self._ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return 0


if __name__ == "__main__":
    sys.exit(main())
