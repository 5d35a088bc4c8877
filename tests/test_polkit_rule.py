"""The polkit rule itself, run by a JavaScript engine: what the daemon's user may do, and by which of its processes.

tests/systemd asks the real polkit and systemd. What only newer versions of polkit tell a rule is given here.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

RULE = Path(__file__).parents[1] / "systemd/50-l40sd.rules"
NODE = shutil.which("node")
UNITS = "org.freedesktop.systemd1.manage-units"
WORKER = "l40s-worker@m-gpu0-1a.service"
HARNESS = """
let rule;
const polkit = { addRule: (given) => { rule = given; }, Result: { YES: "yes", NO: "no", NOT_HANDLED: "not handled" } };
%s
const answers = %s.map(([id, details, subject]) => rule({ id, lookup: (name) => details[name] }, subject));
console.log(JSON.stringify(answers));
"""

pytestmark = pytest.mark.skipif(NODE is None, reason="needs a JavaScript engine: node")


def asked(*questions: tuple[str, dict[str, str], dict[str, str]]) -> list[str]:
    """Return the rule's answers to (action, details, subject)."""
    assert NODE is not None
    script = HARNESS % (RULE.read_text(encoding="utf-8"), json.dumps(questions))
    answers: list[str] = json.loads(subprocess.check_output([NODE, "-e", script], text=True, timeout=30))
    return answers


def verb(name: str, unit: str = WORKER, **subject: str) -> tuple[str, dict[str, str], dict[str, str]]:
    return UNITS, {"unit": unit, "verb": name}, {"user": "l40sd", **subject}


def test_the_daemon_may_do_with_its_workers_what_it_does_and_nothing_else() -> None:
    """`stop` was allowed and never used."""
    used, others = ("start", "kill", "reset-failed"), ("stop", "restart", "reload", "set-property", "clean", "")
    assert asked(*map(verb, used)) == ["yes"] * len(used)
    assert set(asked(*map(verb, others))) == {"no"}
    units = (
        "l40sd.service",
        "dbus.service",
        "l40s-worker@.service",
        "l40s-worker@A.service",
        f"x{WORKER}",
        f"{WORKER}x",
    )
    assert set(asked(*(verb("start", unit) for unit in units))) == {"no"}
    assert asked(("org.freedesktop.systemd1.reload-daemon", {}, {"user": "l40sd"})) == ["no"]


def test_an_engine_may_not_although_it_runs_as_the_daemons_user() -> None:
    """Seen: `systemctl start --job-mode=flush` of a worker's unit cancelled the other jobs of the host."""
    assert asked(verb("start", system_unit=WORKER), verb("kill", system_unit="cron.service")) == ["no", "no"]
    assert asked(verb("start", system_unit="l40sd.service")) == ["yes"]
    assert asked(verb("start", system_unit="")) == ["yes"], "not known: before polkit 126"


def test_what_concerns_others_is_left_to_other_rules() -> None:
    assert asked((UNITS, {"unit": WORKER, "verb": "start"}, {"user": "root"})) == ["not handled"]
    assert asked(("org.freedesktop.login1.power-off", {}, {"user": "l40sd"})) == ["not handled"]
