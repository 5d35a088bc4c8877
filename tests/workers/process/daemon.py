"""A daemon to be killed: takes the lock, adopts, starts workers as told, and waits.

``python daemon.py RUNTIME_DIR LOG_DIR PROVIDER COUNT SCRIPT [stop]``: prints "ready" and a pid of an engine a line.
"""

import asyncio
import os
import sys
from pathlib import Path

from l40sd.daemon.lock import DaemonLock
from l40sd.workers.process import InstanceSpec, Processes


async def main() -> None:
    runtime_dir, log_dir, provider, count, script, *then = sys.argv[1:]
    processes = await Processes.open(runtime_dir=Path(runtime_dir), log_dir=Path(log_dir), provider=provider)
    lock = DaemonLock.acquire(Path(runtime_dir) / "l40sd.lock")
    print("spawning", flush=True)  # noqa: T201
    for number in range(int(count)):
        spec = InstanceSpec(
            instance=f"w{number}-{os.getpid()}",
            worker=f"w{number}",
            argv=("/bin/sh", "-c", script),
            env={"PATH": os.environ["PATH"]},
            cwd=str(Path(runtime_dir).parent),
            meta={"port": number},
        )
        instance = await processes.spawn(spec, 20)
        print("spawned", instance.engine_pid, flush=True)  # noqa: T201
        if then == ["stop"]:
            instance.terminate()
    print("ready", lock.path, flush=True)  # noqa: T201
    await asyncio.Event().wait()


asyncio.run(main())
