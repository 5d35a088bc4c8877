"""Workers that were given up start by themselves once what they failed for is gone."""

import sys
from pathlib import Path

import pytest
from daemonkit import SiteOf

CONFIG = """
[host]
inventory = "l40s-8"
[daemon]
pattern = "one"
[workers]
quarantine_alike = 1
given_up_retry_s = 1
refused_retry_s = 1
[models.toy]
engine = "late"
source = "any"
attention_heads = 8
[engines.late]
base = "simulated"
command = ["{program}", "--model", "{{names}}", "--host", "{{host}}", "--port", "{{port}}"]
[[patterns.one.replicas]]
model = "toy"
count = 1
"""


@pytest.mark.parametrize(("begins_with", "phase"), [("", "failed"), ("exit 1", "quarantined")])
async def test_what_was_given_up_starts_when_what_it_failed_for_is_gone(
    site_of: SiteOf, tmp_path: Path, begins_with: str, phase: str
) -> None:
    """A program on a disk that was mounted late, and a worker that had failed for a while, waited for somebody to say
    `l40sctl reset`."""
    program = tmp_path / "engine"

    def write(*lines: str) -> None:
        program.with_suffix(".new").write_text("\n".join(["#!/bin/sh", *lines, ""]))
        program.with_suffix(".new").chmod(0o755)
        program.with_suffix(".new").rename(program)

    if begins_with:
        write(begins_with)
    site = site_of(CONFIG.format(program=program))
    await site.start()
    status = await site.until(lambda s: bool(s.workers) and s.workers[0].phase == phase, phase, 30)
    assert status.workers[0].next_start_s is not None
    write(f'exec {sys.executable} -m l40sd.sim.engine "$@"')
    await site.until_ready("one", 30)


async def test_a_worker_that_was_given_up_before_a_restart_of_the_daemon_is_tried_again_as_well(
    site_of: SiteOf, tmp_path: Path
) -> None:
    program = tmp_path / "engine"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    site = site_of(CONFIG.format(program=program).replace("given_up_retry_s = 1", "given_up_retry_s = 0"))
    await site.start()
    await site.until(lambda s: bool(s.workers) and s.workers[0].phase == "quarantined", "given up", 30)
    assert await site.stop() == 0
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m l40sd.sim.engine "$@"\n')
    site.config = CONFIG.format(program=program)
    await site.start()
    event = await site.until_event("worker.waiting", 30)
    assert event.data["was"] == "quarantined"
    await site.until_ready("one", 30)
