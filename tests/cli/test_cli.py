"""l40sctl against a control server on a real Unix socket: what it prints, what it asks for, how it ends."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import canned
import pytest
from fakecontrol import FakeControl, refusal, serving

from l40sd.cli import main as cli
from l40sd.cli import status as cli_status
from l40sd.cli import wait as cli_wait
from l40sd.codec import encode
from l40sd.control.messages import Check, LogPart, OperationStatus
from l40sd.hardware import nvml
from l40sd.workers.last_end import LastEnd

HOST_FILES = Path(cli.__file__).parents[1] / "sim" / "hosts"


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeControl]:
    answers = {
        "GET /v1/version": (200, {"version": "9.9.9"}),
        "GET /v1/status": (200, canned.STATUS),
        "GET /v1/workers": (200, canned.WORKERS),
        "GET /v1/patterns": (200, canned.PATTERNS),
        "GET /v1/topology": (200, canned.TOPOLOGY),
        "GET /v1/doctor": (200, canned.CHECKS),
        "GET /v1/config": (200, {"toml": "[daemon]\n", "files": ["/etc/l40sd/l40sd.toml"]}),
        "GET /v1/config/diff": (200, {"diff": "proxy.retries: 2 -> 5"}),
        "GET /v1/events": (200, b"".join(encode(event) + b"\n" for event in canned.EVENTS)),
        "GET /v1/workers/smollm2-gpu0-1/logs": (200, b"first\nsecond \xff\n"),
        "POST /v1/pattern": (202, {"operation": "op1"}),
        "POST /v1/reload": (200, {"changed": ["proxy.retries: 2 -> 5"]}),
    }
    with serving(tmp_path / "control.sock", answers) as control:
        yield control


class Run:
    """One command: its exit status, stdout and stderr."""

    def __init__(self, fake: FakeControl, capfd: pytest.CaptureFixture[str], *arguments: str) -> None:
        self.code = cli.run(["--socket", fake.path, *arguments])
        self.out, self.err = capfd.readouterr()

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "L40SD_SOCKET", "L40SD_CONFIG", "L40SCTL_SVG"):
        monkeypatch.delenv(name, raising=False)


# --- what is shown ------------------------------------------------------------------------------------------------


def test_status_shows_every_worker_and_why(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    run = Run(fake, capfd, "status")
    assert run.code == 0
    assert "pattern B · 2 of 6 ready · 6 in flight · up 2 h 10 min" in run.out
    lines = run.out.splitlines()
    row = next(place for place, line in enumerate(lines) if line.startswith("smollm2-gpu6-7"))
    assert lines[row].split()[1:6] == ["backoff", "TP2", "6,7", "PIX", "1"]
    assert lines[row + 1].strip() == "exited with status 1 after 2.1 s: out of memory, next start in 12 s"
    assert "free: 10 · stuck: 11" in run.out


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("status", "smollm2-gpu0-1"),
        ("patterns",),
        ("topology",),
        ("switch-pattern", "B", "--dry-run"),
        ("doctor",),
        ("events",),
        ("version",),
        ("config", "show"),
    ],
)
def test_piped_output_has_neither_escapes_nor_cut_lines(
    fake: FakeControl, capfd: pytest.CaptureFixture[str], arguments: Sequence[str]
) -> None:
    fake.answers["POST /v1/pattern"] = (200, canned.PREVIEW)
    run = Run(fake, capfd, *arguments)
    assert run.out
    assert "\x1b" not in run.out + run.err
    assert "…" not in run.out


@pytest.mark.parametrize(
    ("arguments", "record"),
    [
        (("status",), canned.STATUS),
        (("patterns",), canned.PATTERNS),
        (("topology",), canned.TOPOLOGY),
        (("status", "smollm2-gpu0-1"), canned.WORKERS[0]),
    ],
)
def test_json_is_the_record_itself(
    fake: FakeControl, capfd: pytest.CaptureFixture[str], arguments: Sequence[str], record: Any
) -> None:
    for run in (Run(fake, capfd, *arguments, "-o", "json"), Run(fake, capfd, "-o", "json", *arguments)):
        assert run.json == json.loads(encode(record))
        assert run.err == ""


def test_events_are_one_object_a_line_for_programs(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    run = Run(fake, capfd, "events", "--since", "0", "-o", "json")
    assert [json.loads(line)["seq"] for line in run.out.splitlines()] == [1, 2]
    assert fake.asked[-1][0] == "GET /v1/events?since=0"


def test_logs_reach_stdout_byte_for_byte(fake: FakeControl, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    assert cli.run(["--socket", fake.path, "logs", "smollm2-gpu0-1", "-n", "2"]) == 0
    assert capfdbinary.readouterr().out == b"first\nsecond \xff\n"
    assert fake.asked[-1][0] == "GET /v1/workers/smollm2-gpu0-1/logs?tail=2"


def test_events_are_asked_for_by_number_time_and_worker(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    Run(fake, capfd, "events", "-n", "5", "--worker", "smollm2-gpu0-1")
    assert fake.asked[-1][0] == "GET /v1/events?worker=smollm2-gpu0-1&last=5"
    Run(fake, capfd, "events", "--since", "10 min")
    assert re.fullmatch(r"GET /v1/events\?after=20\d\d-\d\d-\d\dT.*", fake.asked[-1][0])
    run = Run(fake, capfd, "events", "--since", "yesterday")
    assert (run.code, '"yesterday" is no time' in run.err) == (2, True)


def test_a_workers_last_end_is_told(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    """Why it had been restarted was known to the journal only."""
    end = LastEnd(how="ended by signal 9", why="no token for 120 s", at="2026-11-23T21:04:43+00:00", ran_s=185.2)
    fake.answers["GET /v1/workers"] = (200, (replace(canned.WORKERS[0], last_end=end),))
    run = Run(fake, capfd, "status", "smollm2-gpu0-1")
    assert re.search(r"last end +11-2\d \d\d:04:43 after 3 min 5 s: ended by signal 9; no token for 120 s\n", run.out)


def test_a_workers_last_lines_cannot_drive_the_terminal(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    run = Run(fake, capfd, "status", "smollm2-gpu6-7")
    assert "CUDA error: out of memory" in run.out
    assert "\x1b" not in run.out


def test_a_dry_run_shows_gpus_order_and_lowest_capacity(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    fake.answers["POST /v1/pattern"] = (200, canned.PREVIEW)
    run = Run(fake, capfd, "switch-pattern", "B", "--dry-run", "--force")
    assert json.loads(fake.asked[-1][1]) == {"name": "B", "dry_run": True, "force": True}
    assert "11 of 12 GPUs change hands" in run.out
    assert "smollm2: never below 50 % of its ready capacity" in run.out
    assert "not touched: far" in run.out


def test_the_topology_in_short_is_what_gpus_share(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["topology", "--from", "l40s-12-4+2", "--short"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[0].endswith(" · recorded")
    assert lines[2].split() == ["PCIe", "switch", "0000:16:00.0", "0,1,2,3"]


def test_status_leaves_to_doctor_what_nobody_can_mend_at_once(
    fake: FakeControl, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every `status` on a laptop had two lines on controllers that its kernel lacks, and that nothing is pinned."""
    note = "no pids and memory controller here"
    fake.answers["GET /v1/status"] = (200, replace(canned.STATUS, provider_note=note, is_live=False))
    out = Run(fake, capfd, "status").out
    assert f"recorded host {canned.STATUS.inventory}\n" in out
    assert note not in out


def test_the_topology_can_be_recorded(fake: FakeControl, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert Run(fake, capfd, "topology", "--record", str(tmp_path / "host.toml")).code == 0
    assert (tmp_path / "host.toml").read_text() == canned.TOPOLOGY.record
    assert Run(fake, capfd, "topology", "--record", "-").out == canned.TOPOLOGY.record


def test_a_bundled_host_can_be_tried_with_a_pattern_of_ones_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only paths were taken, and only the patterns A to D."""
    file = tmp_path / "l40sd.toml"
    file.write_text(
        "[models.small]\nengine = 'simulated'\n[models.big]\nengine = 'simulated'\nattention_heads = 8\n"
        "[[patterns.day.replicas]]\nmodel = 'small'\ncount = 2\n[[patterns.day.replicas]]\nmodel = 'big'\ntp = 2\n"
    )
    command = ["topology", "--from", "l40s-8", "--pattern", "day"]
    assert cli.run([*command, "--config", str(file)]) == 0
    out = capfd.readouterr().out
    assert "pattern day" in out
    assert [line.split()[:2] for line in out.splitlines() if line.startswith("big-")] == [
        ["big-gpu0-1", "TP2"],
        ["big-gpu2-3", "TP2"],
        ["big-gpu4-5", "TP2"],
    ]
    assert cli.run(command) == 1
    assert 'no pattern "day"' in capfd.readouterr().err
    assert cli.run(["topology", "--from", "l40s-9"]) == 1
    assert "l40sctl: --from: cannot read host file 'l40s-9'" in capfd.readouterr().err


@pytest.mark.parametrize("pattern", ["A", "B", "C", "D"])
def test_a_host_file_can_be_tried_without_a_daemon(capfd: pytest.CaptureFixture[str], pattern: str) -> None:
    for host_file in HOST_FILES.glob("l40s-12*.toml"):
        assert cli.run(["topology", "--from", str(host_file), "--pattern", pattern]) == 0
        out = capfd.readouterr().out
        assert "GPU11" in out
        assert f"pattern {pattern}" in out


# --- exit statuses ------------------------------------------------------------------------------------------------


def test_a_worker_that_does_not_serve_ends_with_3(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    assert Run(fake, capfd, "status", "smollm2-gpu0-1").code == 0
    assert Run(fake, capfd, "status", "smollm2-gpu6-7").code == 3
    assert Run(fake, capfd, "status", "smollm2-gpu6-7", "-o", "json").code == 3


@pytest.mark.parametrize("command", ["status", "restart", "drain", "undrain", "reset"])
def test_an_unknown_worker_ends_with_4_and_the_nearest_name(
    fake: FakeControl, capfd: pytest.CaptureFixture[str], command: str
) -> None:
    run = Run(fake, capfd, command, "smollm2-gpu0-2")
    assert run.code == 4
    assert "no worker smollm2-gpu0-2" in run.err
    assert "did you mean smollm2-gpu0-1?" in run.err
    assert run.out == ""


def test_no_worker_is_touched_when_one_of_several_is_unknown(
    fake: FakeControl, capfd: pytest.CaptureFixture[str]
) -> None:
    run = Run(fake, capfd, "restart", "smollm2-gpu0-1", "nobody")
    assert run.code == 4
    assert not [asked for asked, _ in fake.asked if asked.startswith("POST")]


def test_several_workers_are_asked_in_turn(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    names = ["smollm2-gpu0-1", "smollm2-gpu2-3"]
    for name in names:
        fake.answers[f"POST /v1/workers/{name}/drain"] = (202, {})
    run = Run(fake, capfd, "drain", *names)
    assert (run.code, run.out) == (0, "")
    assert [asked for asked, _ in fake.asked[1:]] == [f"POST /v1/workers/{name}/drain" for name in names]
    assert Run(fake, capfd, "drain", *names, "-o", "json").json == {"workers": names}


@pytest.mark.parametrize(
    "arguments", [("nonsense",), ("status", "--nonsense"), ("restart",), ("topology", "--pattern", "A"), ("-o", "xml")]
)
def test_misuse_ends_with_2(fake: FakeControl, capfd: pytest.CaptureFixture[str], arguments: Sequence[str]) -> None:
    run = Run(fake, capfd, *arguments)
    assert (run.code, run.out) == (2, "")
    assert "Error: " in run.err


@pytest.mark.parametrize(
    "arguments", [("status",), ("patterns",), ("switch-pattern", "B"), ("doctor",), ("version",), ("logs", "x")]
)
def test_a_daemon_that_is_not_there_ends_with_5(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: Sequence[str]
) -> None:
    assert cli.run(["--socket", str(tmp_path / "none"), *arguments]) == 5
    out, err = capfd.readouterr()
    assert "not running" in out + err
    assert "systemctl status l40sd" in out + err


def test_version_shows_the_clients_even_without_a_daemon(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    cli.run(["--socket", str(tmp_path / "none"), "version", "-o", "json"])
    assert json.loads(capfd.readouterr().out) == {"client": "0.1.0", "daemon": None}


def test_a_refusal_is_shown_with_its_hint_and_ends_with_1(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    fake.answers["POST /v1/pattern"] = refusal(
        409, "does_not_fit", "12 x TP3 needs 36 GPUs", where="pattern wide", hint="3 x TP4 would fit"
    )
    run = Run(fake, capfd, "switch-pattern", "wide")
    assert run.code == 1
    assert run.err == "l40sctl: pattern wide: 12 x TP3 needs 36 GPUs\n  hint: 3 x TP4 would fit\n"
    run = Run(fake, capfd, "switch-pattern", "wide", "-o", "json")
    assert json.loads(run.err)["error"]["code"] == "does_not_fit"


def test_a_reply_of_another_version_is_no_traceback(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    fake.answers["GET /v1/status"] = (200, {"version": "9"})
    run = Run(fake, capfd, "status")
    assert run.code == 1
    assert "has another shape" in run.err


def test_doctor_ends_with_1_when_something_failed(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    assert Run(fake, capfd, "doctor").code == 0
    fake.answers["GET /v1/doctor"] = (200, [Check(name="model m", state="failed", found="missing", hint="fetch it")])
    run = Run(fake, capfd, "doctor")
    assert run.code == 1
    assert "hint: fetch it" in run.out


def test_doctor_finds_what_it_can_where_no_daemon_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It said "no such socket" and nothing else, when there was most to ask."""
    file = tmp_path / "l40sd.toml"
    folders = "".join(f"{name}_dir = '{tmp_path / name}'\n" for name in ("state", "runtime", "log"))
    head = f"[daemon]\n{folders}[host]\ninventory = 'l40s-8'\n[proxy]\nlisten = ['0.0.0.0:0']\n"
    file.write_text(head + "[models.m]\nengine = 'llama-cpp'\nsource = '/none/m.gguf'\ncommand = []\n")
    doctor = ["--socket", str(tmp_path / "none"), "doctor", "--config", str(file)]
    assert cli.run(doctor) == 5
    assert "failed  config  " in capfd.readouterr().out
    file.write_text(head + "[models.m]\nengine = 'mine'\nsource = '/none/m.gguf'\n[engines.mine]\nbase = 'llama-cpp'\n")
    assert cli.run([*doctor, "-o", "json"]) == 5
    checks = {check["name"]: check for check in json.loads(capfd.readouterr().out)}
    assert next(iter(checks)) == "daemon"
    assert checks["config"]["state"] == "ok"
    assert checks["access"]["found"] == "whoever reaches 0.0.0.0:0 may ask: there are no API keys"
    assert checks["host"]["found"].startswith("8 GPUs, 2 NUMA nodes, from l40s-8")
    assert checks["model m"]["state"] == "failed"
    assert {"endpoint", "placement", "state_dir", "runtime_dir", "log_dir"} <= checks.keys()
    file.write_text(head.replace("l40s-8", "l40s-9"))
    assert cli.run(doctor) == 5
    out = capfd.readouterr().out
    assert "models: no model" in out


def test_doctor_without_a_daemon_misses_a_gpu_that_was_there(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that had lost a GPU overnight was ok."""
    gpus = [{"uuid": f"GPU-{n}", "busId": f"00000000:{n}8:00.0", "total": 48 << 30, "used": 3} for n in (1, 2)]
    (tmp_path / "nvml.json").write_text(json.dumps({"gpus": gpus[:1]}))
    monkeypatch.setenv("FAKE_NVML", str(tmp_path / "nvml.json"))
    monkeypatch.setenv(nvml.LIBRARY_VARIABLE, str(Path(__file__).parents[1] / "kit/fake_nvml.py"))
    known = [{"id": g["uuid"], "index": n, "pci": f"0000:{n + 1}8:00.0", "name": "L40S", "memory_bytes": 48 << 30}
             for n, g in enumerate(gpus)]  # fmt: skip
    (tmp_path / "state.json").write_text(json.dumps({"gpus": known}))
    file = tmp_path / "l40sd.toml"
    file.write_text(f"[daemon]\nstate_dir = '{tmp_path}'\n[models.m]\nengine = 'simulated'\n")
    assert cli.run(["--socket", str(tmp_path / "none"), "doctor", "--config", str(file), "-o", "json"]) == 5
    checks = {check["name"]: check for check in json.loads(capfd.readouterr().out)}
    assert (checks["host"]["state"], "lost: " in checks["host"]["found"]) == ("failed", True)


# --- the change of a pattern --------------------------------------------------------------------------------------


def ending(state: str, why: str = "") -> OperationStatus:
    return replace(canned.OPERATION, state=state, done=6 if state == "done" else 2, why=why, step="", duration_s=12.3)


def test_a_change_is_followed_to_its_end(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    fake.answers["GET /v1/operations/op1"] = [(200, canned.OPERATION), (200, canned.OPERATION), (200, ending("done"))]
    run = Run(fake, capfd, "switch-pattern", "B")
    assert run.code == 0
    assert run.out == "pattern B: 6 of 6 workers ready after 12 s, never below 50 % of the ready capacity\n"
    assert run.err.splitlines() == ["pattern B: 2 of 6 ready: draining smollm2-gpu8", "pattern B: 6 of 6 ready"]


@pytest.mark.parametrize("state", ["rolled_back", "failed", "replaced", "incomplete"])
def test_a_change_that_did_not_happen_ends_with_1_and_says_why(
    fake: FakeControl, capfd: pytest.CaptureFixture[str], state: str
) -> None:
    fake.answers["GET /v1/operations/op1"] = (200, ending(state, "smollm2-gpu0-1 did not load"))
    run = Run(fake, capfd, "switch-pattern", "B")
    assert run.code == 1
    assert "smollm2-gpu0-1 did not load" in run.err
    run = Run(fake, capfd, "switch-pattern", "B", "-o", "json")
    assert (run.code, run.json["state"]) == (1, state)


def test_the_direction_shown_is_the_one_it_takes(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    """Seen: "back to A" after each change from A that went well, and "going back to B" on the way back to A."""
    assert cli_status.heading(ending("done")) == "pattern B"
    assert cli_status.heading(ending("rolled_back")) == "back to A"
    assert cli_status.operation_line(canned.OPERATION).plain.startswith("changing to pattern B: 2 of 6 ready")
    back = replace(canned.OPERATION, state="rolling_back", why="smollm2-gpu0-1: exited")
    assert cli_status.operation_line(back).plain.startswith("going back to A: 2 of 6 ready")
    fake.answers["GET /v1/operations/op1"] = [(200, back), (200, ending("rolled_back", "smollm2-gpu0-1: exited"))]
    assert "back to A: 2 of 6 ready" in Run(fake, capfd, "switch-pattern", "B").err


def test_a_model_that_left_service_is_named_and_no_capacity_is_claimed(
    fake: FakeControl, capfd: pytest.CaptureFixture[str]
) -> None:
    """Seen: "never below 100 % of the ready capacity" of a change after which a model was refused."""
    fake.answers["GET /v1/operations/op1"] = (200, replace(ending("done"), leaving=("old",), lowest_ready=1.0))
    run = Run(fake, capfd, "switch-pattern", "B")
    assert run.out == "pattern B: 6 of 6 workers ready after 12 s; old left service\n"


LEAVING = replace(
    canned.PREVIEW,
    leaving=("old",),
    lowest_ready={},
    replaces="the change to C that alice asked for (2 of 3 ready)",
    expected_s=75.0,
    waits_s={"smollm2": 40.0},
    ends_within_s=3000.0,
)


def test_a_dry_run_says_who_leaves_how_long_it_takes_and_who_is_interrupted(
    fake: FakeControl, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.answers["POST /v1/pattern"] = (200, LEAVING)
    out = Run(fake, capfd, "switch-pattern", "B", "--dry-run").out
    assert "! old leaves service: its requests are refused from then on\n" in out
    assert "! it replaces the change to C that alice asked for (2 of 3 ready)\n" in out
    assert "takes about 1 min 15 s by past loads" in out
    assert "smollm2: no worker for about 40 s" in out
    assert "over within 50 min" in out
    fake.answers["POST /v1/pattern"] = (200, replace(LEAVING, expected_s=None, waits_s={}))
    assert "not known yet" in Run(fake, capfd, "switch-pattern", "B", "--dry-run").out


def test_without_a_terminal_nobody_is_asked_and_the_notes_are_told(
    fake: FakeControl, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.answers["POST /v1/pattern"] = (202, {"operation": "op1", "notes": ["old leaves service with pattern B"]})
    run = Run(fake, capfd, "switch-pattern", "B", "--no-wait")
    assert (run.out, run.err) == ("op1\n", "! old leaves service with pattern B\n")
    assert [json.loads(body)["dry_run"] for asked, body in fake.asked if asked.startswith("POST")] == [False]


def test_an_operation_can_be_followed_by_its_id(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    """--no-wait printed an id that no command took."""
    fake.answers["GET /v1/operations/op1"] = [(200, canned.OPERATION), (200, ending("done"))]
    run = Run(fake, capfd, "wait", "op1")
    assert (run.code, "6 of 6 workers ready" in run.out) == (0, True)
    fake.answers["GET /v1/operations/op1"] = (200, ending("rolled_back", "it exited"))
    assert Run(fake, capfd, "wait", "op1").code == 1
    fake.answers["GET /v1/operations/op9"] = refusal(404, "unknown_operation", "there is no such operation")
    assert Run(fake, capfd, "wait", "op9").code == 1


def test_wait_without_an_id_follows_what_is_under_way(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    fake.answers["GET /v1/status"] = (200, replace(canned.STATUS, operation=None))
    run = Run(fake, capfd, "wait")
    assert (run.code, run.err) == (0, "nothing is under way\n")
    fake.answers["GET /v1/status"] = (200, replace(canned.STATUS, operation=canned.OPERATION))
    fake.answers["GET /v1/operations/op1"] = (200, ending("done"))
    assert "6 of 6 workers ready" in Run(fake, capfd, "wait").out


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("--all",), [0, 2, 4, 6, 8, 10]),
        (("--model", "smollm2"), [0, 2, 4, 6, 8, 10]),
        (("smollm2-gpu[02]-*", "smollm2-gpu2-3"), [0, 2]),
    ],
)
def test_several_workers_are_restarted_one_after_the_other_by_the_daemon(
    fake: FakeControl, capfd: pytest.CaptureFixture[str], arguments: Sequence[str], meant: list[int]
) -> None:
    """Seen: restart of all workers told all of them at once, and nothing was left to serve."""
    fake.answers["POST /v1/restart"] = (202, {"operation": "op1"})
    fake.answers["GET /v1/operations/op1"] = (200, replace(ending("done"), kind="restart"))
    run = Run(fake, capfd, "restart", *arguments)
    assert run.out == "restart: 6 of 6 workers are back after 12 s, never below 50 % of the ready capacity\n"
    [body] = [json.loads(body) for asked, body in fake.asked if asked == "POST /v1/restart"]
    assert body["workers"] == [f"smollm2-gpu{n}-{n + 1}" for n in meant]


def test_one_worker_or_now_is_told_at_once(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    for first in range(0, 12, 2):
        fake.answers[f"POST /v1/workers/smollm2-gpu{first}-{first + 1}/restart"] = (202, {})
    assert Run(fake, capfd, "restart", "smollm2-gpu0-1").code == 0
    assert Run(fake, capfd, "restart", "--all", "--now").code == 0
    assert len([asked for asked, _ in fake.asked if asked.endswith("/restart")]) == 7
    assert Run(fake, capfd, "restart", "--model", "none").code == 4


def test_no_wait_prints_the_operation(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    assert Run(fake, capfd, "switch-pattern", "B", "--no-wait").out == "op1\n"


def test_a_timeout_leaves_the_change_running(fake: FakeControl, capfd: pytest.CaptureFixture[str]) -> None:
    fake.answers["GET /v1/operations/op1"] = (200, canned.OPERATION)
    run = Run(fake, capfd, "switch-pattern", "B", "--timeout", "0")
    assert run.code == 1
    assert "it goes on" in run.err


def test_a_change_that_outlives_its_daemon_is_followed_at_the_next_one(
    fake: FakeControl, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_wait, "POLL_S", 0.0)
    unknown = refusal(404, "unknown_operation", "no operation op1")
    fake.answers["GET /v1/operations/op1"] = [(200, canned.OPERATION), unknown]
    carried_on = replace(canned.OPERATION, id="op2")
    fake.answers["GET /v1/status"] = (200, replace(canned.STATUS, operation=carried_on))
    fake.answers["GET /v1/operations/op2"] = (200, ending("done"))
    assert Run(fake, capfd, "switch-pattern", "B").code == 0
    fake.answers["GET /v1/operations/op1"] = unknown
    fake.answers["GET /v1/status"] = (200, replace(canned.STATUS, pattern="A"))
    run = Run(fake, capfd, "switch-pattern", "B")
    assert (run.code, "is at pattern A" in run.err) == (1, True)


# --- at a real terminal -------------------------------------------------------------------------------------------


class Terminal:
    """l40sctl on a pseudo-terminal of 80 columns."""

    def __init__(self, fake: FakeControl, *arguments: str, **environ: str) -> None:
        self._ours, theirs = pty.openpty()
        settled = {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "40", **environ}
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from l40sd.cli.__main__ import main; main()", "--socket", fake.path, *arguments],
            env={**os.environ, **settled},
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            # A shell that runs the tests in the background hands on an ignored Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        os.close(theirs)
        self.text = ""

    def read_until(self, wanted: str) -> None:
        while wanted not in self.text:
            self.text += os.read(self._ours, 65536).decode(errors="replace")

    def write(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def end(self) -> int:
        """Read to the end; return the exit status."""
        try:
            while data := os.read(self._ours, 65536):
                self.text += data.decode(errors="replace")
        except OSError:  # EIO: nobody holds the other end any more
            pass
        os.close(self._ours)
        return self.process.wait(30)


@pytest.mark.parametrize(("no_color", "has_colour"), [("", True), ("1", False)])
def test_a_terminal_gets_colour_unless_no_color_is_set(fake: FakeControl, no_color: str, has_colour: bool) -> None:
    terminal = Terminal(fake, "status", NO_COLOR=no_color)
    assert terminal.end() == 0
    assert ("\x1b[" in terminal.text) == has_colour


def test_json_has_no_colour_on_a_terminal_either(fake: FakeControl) -> None:
    terminal = Terminal(fake, "-o", "json", "status")
    assert terminal.end() == 0
    assert json.loads(terminal.text)["pattern"] == "B"


def test_on_80_columns_the_columns_that_matter_are_whole(fake: FakeControl) -> None:
    terminal = Terminal(fake, "status", NO_COLOR="1")
    terminal.end()
    titles = next(line for line in terminal.text.splitlines() if line.startswith("WORKER"))
    assert titles.split() == ["WORKER", "PHASE", "GPU", "LINK", "NUMA", "PORT", "BUSY", "RESTARTS", "FOR"]


def test_every_view_fits_80_columns(fake: FakeControl) -> None:
    fake.answers["POST /v1/pattern"] = (200, canned.PREVIEW)
    for arguments in (("status",), ("patterns",), ("switch-pattern", "B", "--dry-run"), ("doctor",), ("topology",)):
        terminal = Terminal(fake, *arguments, NO_COLOR="1")
        terminal.end()
        assert max(len(line) for line in terminal.text.splitlines()) <= 80, arguments


def test_a_watch_on_a_low_terminal_says_how_much_it_hides(fake: FakeControl) -> None:
    """On 12 lines `status --watch` showed eleven of them and not a word of the others."""
    terminal = Terminal(fake, "status", "--watch", NO_COLOR="1", LINES="12")
    terminal.read_until("more lines below")
    terminal.text = ""
    terminal.read_until("more lines below")  # the second picture: the screen is set up and in the loop
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 0
    hidden = re.search(r"(\d+) more lines below", terminal.text)
    whole = terminal.text[terminal.text.rindex("\x1b[?1049l") :]  # printed once more when it ends
    assert hidden is not None
    assert int(hidden[1]) == len(whole.strip().splitlines()) - 11


def test_following_goes_on_at_the_next_daemon(fake: FakeControl) -> None:
    """A restart of the daemon ended `events -f` and `logs -f`."""
    first, second = canned.EVENTS
    fake.answers["GET /v1/events"] = [
        (200, encode(first) + b"\n"),
        refusal(500, "unreachable", "gone"),  # as the client calls it when the socket is silent
        (200, encode(second) + b"\n"),
        (200, b""),
    ]
    terminal = Terminal(fake, "events", "-f", "-n", "1", NO_COLOR="1", COLUMNS="200")
    terminal.read_until("l40sd is back")
    terminal.read_until(second.event)
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 0
    targets = [target for target, _ in fake.asked if target.startswith("GET /v1/events")]
    assert targets[:3] == ["GET /v1/events?follow=1&last=1", *["GET /v1/events?follow=1&since=1"] * 2]
    fake.answers["GET /v1/workers/m/logs"] = [
        (200, encode(LogPart(text="one\n", position="7:4")) + b"\n"),
        (200, encode(LogPart(text="two\n", position="7:8")) + b"\n"),
    ]
    terminal = Terminal(fake, "logs", "m", "-f")
    terminal.read_until("two")
    terminal.process.send_signal(signal.SIGINT)
    terminal.end()
    assert "GET /v1/workers/m/logs?from=7%3A4&follow=1&parts=1" in [target for target, _ in fake.asked]


def test_ctrl_c_leaves_a_change_running_and_says_so(fake: FakeControl) -> None:
    fake.answers["POST /v1/pattern"] = [(200, canned.PREVIEW), (202, {"operation": "op1"})]
    fake.answers["GET /v1/operations/op1"] = (200, canned.OPERATION)
    terminal = Terminal(fake, "switch-pattern", "B")
    terminal.read_until("2/6")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "goes on without this command" in terminal.text


def test_a_person_is_asked_before_a_model_leaves_service(fake: FakeControl) -> None:
    fake.answers["POST /v1/pattern"] = [(200, LEAVING), (202, {"operation": "op1"})]
    fake.answers["GET /v1/operations/op1"] = (200, ending("done"))
    terminal = Terminal(fake, "switch-pattern", "B", NO_COLOR="1")
    terminal.read_until("[y/N]")
    assert "old leaves service" in terminal.text
    terminal.write("n\n")
    assert terminal.end() == 1
    assert [json.loads(body)["dry_run"] for asked, body in fake.asked if asked.startswith("POST")] == [True]
    fake.answers["POST /v1/pattern"] = (202, {"operation": "op1"})
    agreed = Terminal(fake, "switch-pattern", "B", "--yes", NO_COLOR="1")
    assert agreed.end() == 0


def test_watching_goes_on_over_a_daemon_that_is_away_until_ctrl_c(fake: FakeControl) -> None:
    away = refusal(500, "unreachable", "gone")  # as the client calls it when the socket is silent
    fake.answers["GET /v1/status"] = [(200, canned.STATUS), away, (200, replace(canned.STATUS, pattern="later"))]
    terminal = Terminal(fake, "status", "--watch", NO_COLOR="1")
    terminal.read_until("trying again")
    terminal.read_until("pattern later")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 0


# --- wherever the output goes ---------------------------------------------------------------------------------------


def ended(fake: FakeControl, redirection: str, *arguments: str, **environ: str) -> tuple[int, str, str]:
    """Run l40sctl below a shell that redirects its output; return its exit status, stdout and stderr."""
    done = subprocess.run(  # noqa: TID251 - no loop here
        [
            "sh",
            "-c",
            f'"$@" {redirection}',
            "sh",
            sys.executable,
            "-m",
            "l40sd.cli",
            "--socket",
            fake.path,
            *arguments,
        ],
        env={**os.environ, **environ},
        capture_output=True,
        timeout=30,
    )
    return done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")


@pytest.mark.parametrize("arguments", [("status",), ("config", "show"), ("events",), ("doctor", "-o", "json")])
@pytest.mark.parametrize(
    ("redirection", "why"), [(">/dev/full", "No space left on device"), (">&-", "stdout is closed")]
)
def test_output_that_cannot_be_written_is_an_error_and_no_traceback(
    fake: FakeControl, redirection: str, why: str, arguments: Sequence[str]
) -> None:
    """Thirty lines of Python were what a full disk looked like."""
    code, _, err = ended(fake, redirection, *arguments)
    assert (code, err) == (1, f"l40sctl: the output cannot be written: {why}\n")


def test_a_closed_stderr_is_no_reason_to_fail(fake: FakeControl) -> None:
    assert ended(fake, "2>&-", "version")[0] == 0


@pytest.mark.parametrize("arguments", [("events",), ("events", "-o", "json")])
def test_whoever_has_read_enough_is_told_nothing(fake: FakeControl, arguments: Sequence[str]) -> None:
    """`events | head -1` ended with 1, as if something had failed."""
    fake.answers["GET /v1/events"] = lambda: (200, (encode(event) + b"\n" for event in canned.EVENTS * 5000))
    program = [sys.executable, "-m", "l40sd.cli", "--socket", fake.path, *arguments]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert (process.wait(30), process.stderr.read()) == (141, b"")


@pytest.mark.parametrize("encoding", ["ascii", "iso-8859-1", "cp437"])
@pytest.mark.parametrize("arguments", [("status",), ("events",), ("topology",), ("switch-pattern", "B", "--dry-run")])
def test_a_terminal_without_unicode_gets_what_it_can_show(
    fake: FakeControl, encoding: str, arguments: Sequence[str]
) -> None:
    """'latin-1' codec can't encode character '\\ufffd'."""
    fake.answers["POST /v1/pattern"] = (200, canned.PREVIEW)
    code, out, err = ended(fake, "", *arguments, PYTHONIOENCODING=encoding, LC_ALL="C")
    assert (code, err) == (0, "")
    assert out
    if encoding == "ascii" and arguments == ("status",):
        assert "l40s-12 - pattern B - 2 of 6 ready" in out


def test_ctrl_c_before_the_first_line_is_no_traceback_either(fake: FakeControl, tmp_path: Path) -> None:
    """The command line takes 0.3 s to import."""
    (tmp_path / "click.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    code, out, err = ended(fake, "", "status", PYTHONPATH=str(tmp_path))
    assert (code, out, err) == (130, "", "")


def test_the_version_can_be_asked_for_as_everywhere(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert re.fullmatch(r"l40sctl \d+\.\d+\.\d+\n", capfd.readouterr().out)


# --- configuration, completion ------------------------------------------------------------------------------------


def test_config_check_tells_all_problems_without_a_daemon(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "l40sd.toml"
    file.write_text("[proxy]\nretries = 99\nqueue_limitt = 1\n")
    assert cli.run(["config", "check", str(file)]) == 1
    err = capfd.readouterr().err
    assert "proxy.retries: must be from 0 to 10, not 99" in err
    assert "did you mean queue_limit?" in err
    assert "models: no model" in err


def test_config_check_reads_conf_d_and_approves(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "l40sd.toml").write_text("[proxy]\n")
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "10.toml").write_text("[models.m]\nsource = 'hub/m'\n")
    assert cli.run(["config", "check", str(tmp_path / "l40sd.toml")]) == 0
    assert "with 1 more from conf.d: good: 1 model, 0 patterns" in capfd.readouterr().out


def test_config_check_finds_what_a_start_would(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A configuration that was "good" ended the daemon, or left every worker failed."""
    file = tmp_path / "l40sd.toml"
    text = (
        "[daemon]\npattern = 'wide'\n[host]\ninventory = 'l40s-9'\n[proxy]\napi_keys_file = '/none/keys'\n"
        "[models.m]\nengine = 'vllm'\nsource = '/none/m'\n[[patterns.wide.replicas]]\nmodel = 'm'\ntp = 16\n"
    )
    file.write_text(text)
    assert cli.run(["config", "check", str(file)]) == 1
    err = capfd.readouterr().err
    assert "/none/keys: cannot be read: No such file or directory" in err
    assert "cannot read host file 'l40s-9'" in err
    assert "did you mean l40s-8?" in err
    file.write_text(text.replace("l40s-9", "l40s-8").replace("api_keys_file = '/none/keys'\n", ""))
    assert cli.run(["config", "check", str(file)]) == 1
    err = capfd.readouterr().err
    assert f"{file}: models.m.source: there is nothing at /none/m" in err
    assert f"{file}: patterns.wide: pattern wide does not fit l40s-8 (bundled)" in err
    (tmp_path / "m").mkdir()
    mended = (("l40s-9", "l40s-8"), ("/none/m", str(tmp_path / "m")), ("tp = 16", "tp = 2"), ("api_keys_file", "#"))
    for wrong, right in mended:
        text = text.replace(wrong, right)
    file.write_text(text)
    assert cli.run(["config", "check", str(file)]) == 0


def test_config_check_of_a_missing_file_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", "check", str(tmp_path / "none.toml")]) == 1
    assert "no such file" in capfd.readouterr().err


def test_config_show_diff_and_reload_print_the_daemons_words(
    fake: FakeControl, capfd: pytest.CaptureFixture[str]
) -> None:
    assert Run(fake, capfd, "config", "show").out == "[daemon]\n"
    assert Run(fake, capfd, "config", "diff").out == "proxy.retries: 2 -> 5\n"
    assert Run(fake, capfd, "reload").out == "proxy.retries: 2 -> 5\n"


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_completion_scripts_are_printed(capfd: pytest.CaptureFixture[str], shell: str) -> None:
    assert cli.run(["completion", shell]) == 0
    assert "_L40SCTL_COMPLETE" in capfd.readouterr().out


def test_the_shell_completes_workers_and_patterns(
    fake: FakeControl, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def completed(words: str) -> list[str]:
        monkeypatch.setenv("_L40SCTL_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
        monkeypatch.setenv("L40SD_SOCKET", fake.path)
        with pytest.raises(SystemExit):
            cli.run([])
        return [line.split(",")[1] for line in capfd.readouterr().out.splitlines()]

    assert completed("l40sctl restart smollm2-gpu1") == ["smollm2-gpu10-11"]
    assert "smollm2-gpu0-1" not in completed("l40sctl restart smollm2-gpu0-1 smoll")
    assert completed("l40sctl switch-pattern w") == ["wide"]
    monkeypatch.setenv("L40SD_SOCKET", "/none")
    assert "switch-pattern" in completed("l40sctl sw")


# --- small words --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (9.94, "9.9 s"),
        (59.6, "1 min"),
        (185, "3 min 5 s"),
        (7800, "2 h 10 min"),
        (3600, "1 h"),
        (273_600, "3 d 4 h"),
    ],
)
def test_durations_are_told_in_their_two_largest_units(seconds: float, text: str) -> None:
    assert cli_status.span(seconds) == text
