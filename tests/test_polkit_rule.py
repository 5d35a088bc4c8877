"""The polkit rule itself, run by a JavaScript engine: what the daemon's user may do, and by which of its processes.

tests/systemd asks the real polkit and systemd. What only newer versions of polkit tell a rule is given here.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

RULE = Path(__file__).parents[1] / "systemd/50-l40sd.rules"
EARLIER = RULE.with_name("49-l40sd-start.rules")
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


def asked(*questions: tuple[str, dict[str, str], dict[str, str]], rule: Path = RULE) -> list[str]:
    """Return the rule's answers to (action, details, subject)."""
    assert NODE is not None
    script = HARNESS % (rule.read_text(encoding="utf-8"), json.dumps(questions))
    answers: list[str] = json.loads(subprocess.check_output([NODE, "-e", script], text=True, timeout=30))
    return answers


def verb(name: str, unit: str = WORKER, **subject: str) -> tuple[str, dict[str, str], dict[str, str]]:
    return UNITS, {"unit": unit, "verb": name}, {"user": "l40sd", **subject}


def test_the_daemon_may_do_with_its_workers_what_it_does_and_nothing_else() -> None:
    """Seen: `start` was allowed, and with `--job-mode=flush`, which polkit is not told of, cancelled others' jobs."""
    used, others = ("kill", "reset-failed"), ("start", "stop", "restart", "reload", "set-property", "clean", "")
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
    assert set(asked(*(verb("kill", unit) for unit in units))) == {"no"}
    assert asked(("org.freedesktop.systemd1.reload-daemon", {}, {"user": "l40sd"})) == ["no"]


def test_an_engine_may_not_although_it_runs_as_the_daemons_user() -> None:
    """Where polkit can tell: from version 126 on."""
    assert asked(verb("kill", system_unit=WORKER), verb("kill", system_unit="cron.service")) == ["no", "no"]
    assert asked(verb("kill", system_unit="l40sd.service")) == ["yes"]
    assert asked(verb("kill", system_unit="")) == ["yes"], "not known: before polkit 126"


def test_what_concerns_others_is_left_to_other_rules() -> None:
    assert asked((UNITS, {"unit": WORKER, "verb": "start"}, {"user": "root"})) == ["not handled"]
    assert asked(("org.freedesktop.login1.power-off", {}, {"user": "l40sd"})) == ["not handled"]


def test_the_rule_for_a_daemon_of_an_earlier_release_lets_it_start_workers_and_leaves_the_rest() -> None:
    starts = verb("start"), verb("start", system_unit="l40sd.service")
    assert asked(*starts, rule=EARLIER) == ["yes", "yes"]
    others = (
        verb("kill"),
        verb("start", "dbus.service"),
        verb("start", system_unit=WORKER),
        (UNITS, {"unit": WORKER, "verb": "start"}, {"user": "root"}),
        ("org.freedesktop.systemd1.reload-daemon", {}, {"user": "l40sd"}),
    )
    assert set(asked(*others, rule=EARLIER)) == {"not handled"}
