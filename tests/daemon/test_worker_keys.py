"""What workers share over their restarts, their key and what they compiled: a real daemon, real processes."""

import os
import signal
import stat
from pathlib import Path

import psutil
from daemonkit import QUICK, SiteOf, worker_of

TOY = QUICK + '[daemon]\npattern = "C"\n[models.toy]\nengine = "simulated"\nattention_heads = 8\n'


def key_of(pid: int | None) -> str:
    assert pid is not None
    return psutil.Process(pid).environ()["L40SD_SIM_API_KEY"]


async def test_all_workers_of_a_model_have_one_key_over_their_restarts_and_the_daemons(site_of: SiteOf) -> None:
    """vLLM took the key into the name of what it compiled: a new key at each start, and it compiled at each start."""
    site = site_of(TOY)
    await site.start()
    status = await site.until_ready("C", 30)
    keys = {key_of(w.pid) for w in status.workers}
    assert len(keys) == 1
    first = status.workers[0]
    await site.kill()
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    await site.start()
    status = await site.until(
        lambda s: (
            bool(s.workers) and all(w.phase == "ready" for w in s.workers) and worker_of(s, first.id).pid != first.pid
        ),
        "again",
        30,
    )
    await site.post(f"/v1/workers/{status.workers[1].id}/restart")
    await site.until(lambda s: s.workers[1].pid not in (None, status.workers[1].pid), "restarted", 30)
    status = await site.until_ready("C", 30)
    assert {key_of(w.pid) for w in status.workers} == keys


CACHED = (
    QUICK.replace("[workers]", "[workers]\ncache_limit_bytes = 1048576")
    + """
[daemon]
pattern = "both"
[engines.mine]
base = "simulated"
env = { COMPILED = "{cache}/compiled" }
[models.one]
engine = "mine"
[models.two]
engine = "mine"
[[patterns.both.replicas]]
model = "one"
count = 1
[[patterns.both.replicas]]
model = "two"
count = 1
"""
)


async def test_what_engines_compile_is_private_and_the_oldest_goes_unless_an_engine_uses_it(site_of: SiteOf) -> None:
    """Each start left 46 MB, for good, in a folder that everybody could read."""
    site = site_of(CACHED)
    await site.start()
    status = await site.until_ready("both", 30)
    environ = {w.model: psutil.Process(w.pid).environ() for w in status.workers}
    used = Path(environ["one"]["COMPILED"]).parent
    assert stat.S_IMODE(used.stat().st_mode) == 0o700
    former = used.with_name("former-tp1-pp1")
    former.mkdir()
    for folder in (used, former):
        (folder / "file").write_bytes(b"x" * (2 << 20))
        os.utime(folder, (1e9, 1e9))
    two = next(w for w in status.workers if w.model == "two")
    await site.post(f"/v1/workers/{two.id}/restart")
    await site.until(lambda s: worker_of(s, two.id).pid not in (None, two.pid), "restarted", 30)
    assert not former.exists()
    assert used.exists()
    await site.until_ready("both", 30)
