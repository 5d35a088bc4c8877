"""Every engine's whole command line and environment, and what may change without restarting a worker.

The golden files are read by people: one argument a line, an option with its value beside it. After a change that is
meant, ``L40SD_UPDATE_GOLDEN=1 pytest tests/engines/test_launch.py`` writes them again; the diff is the review.
"""

import os
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from launches import MODEL, config, gpu_id, host, placement

from l40sd.config.options import BUILT_IN_ENGINES, EngineConfig, HostConfig, WorkersConfig
from l40sd.engines.launch import Launch, build, program_of
from l40sd.engines.table import ENGINES, ends_streams, resolve
from l40sd.errors import L40sError
from l40sd.model import Link

GOLDEN = Path(__file__).parent / "golden"
LAYOUTS = {"TP1": (1, 1), "TP2": (2, 1), "TP4": (4, 1), "PP4": (1, 4), "TP2xPP2": (2, 2)}


def launch_of(
    engine: str, tp: int = 1, pp: int = 1, *, port: int = 30001, api_key: str = "sk-worker", **model
) -> Launch:
    endpoint = "http://10.0.0.7:8000" if engine == "external" else ""
    return build(placement(tp, pp, endpoint=endpoint), config(engine, **model), host(), port=port, api_key=api_key)


def shown(engine: str, tp: int, pp: int) -> str:
    try:
        launch = launch_of(engine, tp, pp)
    except L40sError as error:
        return f"refused: {error}\n"
    lines = [f"{name}={value}" for name, value in sorted(launch.env.items())]
    for part in launch.argv:
        is_value = bool(re.fullmatch(r"  --?[^= ]+", lines[-1])) and not part.startswith("-")
        lines[-1:] = [f"{lines[-1]} {part}"] if is_value else [lines[-1], f"  {part}"]
    probes = ", ".join(f"{name}: {value}" for name, value in asdict(launch.probes).items() if value)
    return "\n".join(
        [
            *lines,
            f"at {launch.host}:{launch.port} as {launch.served_name}",
            f"killed {launch.term_timeout_s:g} s after SIGTERM",
            probes,
            "",
        ]
    )


def test_the_table_has_every_engine_that_the_config_offers() -> None:
    assert tuple(ENGINES) == BUILT_IN_ENGINES


@pytest.mark.parametrize("engine", ENGINES)
def test_the_whole_command_line_of_every_engine_is_as_recorded(engine: str) -> None:
    text = "\n".join(f"[{name}]\n{shown(engine, tp, pp)}" for name, (tp, pp) in LAYOUTS.items())
    file = GOLDEN / f"{engine}.txt"
    if os.environ.get("L40SD_UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


@pytest.mark.parametrize("engine", [name for name in ENGINES if name not in {"sglang", "external"}])
def test_the_workers_key_never_shows_in_ps(engine: str) -> None:
    assert "sk-worker" not in " ".join(launch_of(engine).argv)


@pytest.mark.parametrize("engine", ["tensorrt-llm", "torchrun"])
def test_an_engine_without_a_place_for_a_key_has_none(engine: str) -> None:
    launch = launch_of(engine)
    assert launch.api_key == ""
    assert "sk-worker" not in str(launch)


@pytest.mark.parametrize("engine", ENGINES)
@given(port=st.integers(1024, 65535), api_key=st.text(min_size=1, max_size=40))
def test_the_fingerprint_knows_neither_port_nor_key(engine: str, port: int, api_key: str) -> None:
    wanted = launch_of(engine, port=0, api_key="")
    assert launch_of(engine, port=port, api_key=api_key).fingerprint == wanted.fingerprint


@pytest.mark.parametrize(
    "changed",
    [
        launch_of("vllm", args=("--seed", "8")),
        launch_of("vllm", env={"HF_HUB_OFFLINE": "1"}),
        launch_of("vllm", source="/models/other"),
        launch_of("vllm", aliases=()),
        launch_of("vllm", engines={"vllm": EngineConfig(health_path="/ready")}),
        launch_of("vllm", tp=2),
        build(placement(first=1), config("vllm"), host(), port=30001, api_key=""),
        build(placement(), config("vllm", host_config=HostConfig(numa_pinning=False)), host(), port=1, api_key=""),
    ],
)
def test_whatever_the_process_would_notice_changes_the_fingerprint(changed: Launch) -> None:
    assert changed.fingerprint != launch_of("vllm").fingerprint


def test_the_fingerprint_is_the_same_after_a_restart_of_the_daemon() -> None:
    """A golden value: were it made with hash(), every restart of the daemon would restart every worker."""
    simple = config("own", engines={"own": EngineConfig(command=("serve", "{port}"))}, args=(), aliases=())
    assert build(placement(), simple, host(is_live=False), port=7, api_key="k").fingerprint == "44601a4554f20ad5"


def test_a_recorded_host_shows_the_pinning_and_does_not_apply_it() -> None:
    live = build(placement(2), config("vllm"), host(), port=1, api_key="")
    recorded = build(placement(2), config("vllm"), host(is_live=False), port=1, api_key="")
    assert live.argv[:3] == ("numactl", "--cpunodebind=0", "--membind=0")
    assert recorded.argv == live.argv[3:]
    assert recorded.pinning == live.pinning == "numactl --cpunodebind=0 --membind=0"
    assert program_of(live) == program_of(recorded) == "vllm"


def test_part_of_a_numa_node_is_bound_cpu_by_cpu() -> None:
    assert launch_of("vllm").pinning == "numactl --physcpubind=0-3 --membind=0"


def test_pinning_can_be_switched_off_and_needs_to_know_the_cpus() -> None:
    off = config("vllm", host_config=HostConfig(numa_pinning=False))
    assert build(placement(2), off, host(), port=1, api_key="").pinning == ""
    unknown = replace(placement(2), cpus=frozenset(), memory_nodes=())
    launch = build(unknown, config("vllm"), host(), port=1, api_key="")
    assert (launch.pinning, launch.argv[0]) == ("", "vllm")


def test_gpus_are_named_by_uuid_in_rank_order() -> None:
    turned = replace(placement(2), gpus=(gpu_id(1), gpu_id(0)))
    launch = build(turned, config("vllm"), host(), port=1, api_key="")
    assert launch.env["CUDA_VISIBLE_DEVICES"] == f"{gpu_id(1)},{gpu_id(0)}"
    assert launch.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


@pytest.mark.parametrize(
    ("level", "env"),
    [
        ("auto", {}),
        ("off", {"NCCL_P2P_DISABLE": "1"}),
        ("PXB", {"NCCL_P2P_LEVEL": "PXB"}),
        ("NODE", {"NCCL_P2P_LEVEL": "PHB"}),
        ("SYS", {"NCCL_P2P_LEVEL": "SYS"}),
    ],
)
def test_nccl_is_told_how_far_gpus_may_write_to_each_other(level: str, env: dict[str, str]) -> None:
    told = config("vllm", host_config=HostConfig(nccl_p2p=level))
    for tp in (1, 2):
        launch = build(placement(tp), told, host(), port=1, api_key="")
        assert {k: v for k, v in launch.env.items() if k.startswith("NCCL")} == (env if tp > 1 else {})


@pytest.mark.parametrize(
    ("link", "level", "tp", "allowed"),
    [
        (Link.PIX, "auto", 2, True),
        (Link.PXB, "auto", 2, True),
        (Link.PHB, "auto", 2, False),
        (Link.SYS, "auto", 2, False),
        (Link.SYS, "SYS", 2, True),
        (Link.PXB, "PIX", 2, False),
        (Link.PIX, "off", 2, False),
        (Link.NV, "off", 2, False),
        (Link.PIX, "SYS", 4, False),
        (Link.NV, "auto", 4, True),
        (Link.NV, "off", 4, False),
    ],
)
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_custom_all_reduce_is_kept_off_links_it_hangs_on(
    engine: str, link: Link, level: str, tp: int, allowed: bool
) -> None:
    """Seen on L40S: TP = 2 without working peer access hangs at the start, in the custom all-reduce."""
    every_link = {(a, b): link for a in range(4) for b in range(4) if a != b}
    told = config(engine, host_config=HostConfig(nccl_p2p=level))
    launch = build(placement(tp), told, host(links=every_link), port=1, api_key="")
    assert ("--disable-custom-all-reduce" not in launch.argv) is allowed


def test_only_links_inside_a_tensor_parallel_stage_count_for_all_reduce() -> None:
    """Two stages of two, a socket apart: what crosses the sockets is the pipeline, not the all-reduce."""
    assert "--disable-custom-all-reduce" not in launch_of("vllm", 2, 2).argv


def test_a_command_of_ones_own_is_the_whole_line_and_every_placeholder_is_filled() -> None:
    line = ("run", "{model}", "{name}", "{host}:{port}", "{tp}", "{pp}", "{api_key}", "{gpus}", '{"mode": 2}', "{{x}}")
    launch = launch_of(
        "vllm", 2, engines={"vllm": EngineConfig(command=line, env={"VLLM_NO_USAGE_STATS": "", "K": "{port}"})}
    )
    assert launch.argv[3:] == (
        *("run", "/models/llama", "llama", "127.0.0.1:30001", "2", "1", "sk-worker", f"{gpu_id(0)},{gpu_id(1)}"),
        *('{"mode": 2}', "{{x}}", "--seed", "7"),
    )
    assert launch.env["K"] == "30001"
    assert launch.env["VLLM_API_KEY"] == "sk-worker"
    assert "VLLM_NO_USAGE_STATS" not in launch.env


def test_what_all_workers_get_goes_before_the_built_in_and_behind_the_more_particular() -> None:
    """NCCL_* and the like had to be repeated for every model; workers inherit nothing from the daemon."""
    everywhere = {"VLLM_NO_USAGE_STATS": "0", "A": "all", "B": "all", "C": "all", "NCCL_DEBUG": "INFO"}
    launch = launch_of(
        "vllm",
        workers=WorkersConfig(env=everywhere),
        engines={"vllm": EngineConfig(env={"B": "engine", "C": ""})},
        env={"A": "model"},
    )
    expected = {"VLLM_NO_USAGE_STATS": "0", "A": "model", "B": "engine", "NCCL_DEBUG": "INFO"}
    assert {name: launch.env.get(name) for name in (*expected, "C")} == {**expected, "C": None}


def test_an_engine_of_ones_own_takes_a_built_in_ones_probes() -> None:
    own = {"nightly": EngineConfig(base="vllm", command=("nightly", "{port}"), metrics_path="/m", term_timeout_s=3)}
    launch = launch_of("nightly", engines=own)
    assert (launch.engine, launch.probes.metrics_path, launch.term_timeout_s) == ("nightly", "/m", 3)
    assert launch.probes.running_metric == "vllm:num_requests_running"


def test_the_models_own_arguments_are_passed_on_letter_for_letter() -> None:
    assert launch_of("vllm", args=("--x", "{nothing}")).argv[-1] == "{nothing}"


@pytest.mark.parametrize(
    ("engine", "engines", "what", "hint"),
    [
        ("own", {"own": EngineConfig(command=("x", "{prot}"))}, "{prot} stands for nothing", "{port}"),
        ("own", {"own": EngineConfig(env={"A": "b"})}, "neither a base nor a command", "vllm"),
        ("own", {"own": EngineConfig(base="vlm")}, "no engine 'vlm'", "did you mean vllm?"),
        ("lama-cpp", {}, "no engine 'lama-cpp'", "did you mean llama-cpp?"),
    ],
)
def test_a_slip_in_an_engine_is_one_clear_error(engine: str, engines: dict, what: str, hint: str) -> None:
    with pytest.raises(L40sError) as caught:
        launch_of(engine, engines=engines)
    assert what in caught.value.what
    assert hint in caught.value.hint


@pytest.mark.parametrize("endpoint", ["https://a:1", "http://a:1/v1", "a:1", "http://a:99999", "http://"])
def test_an_address_that_is_none_is_refused(endpoint: str) -> None:
    with pytest.raises(L40sError):
        build(placement(endpoint=endpoint), config("external"), host(), port=0, api_key="")


def test_somebody_elses_worker_is_only_asked_with_its_own_key() -> None:
    launch = build(
        placement(endpoint="http://[::1]:18000"),
        config("external", endpoint_key="sk-theirs", source="their-name"),
        host(),
        port=0,
        api_key="sk-ours",
    )
    assert (launch.argv, launch.host, launch.port) == ((), "::1", 18000)
    assert (launch.api_key, launch.served_name, program_of(launch)) == ("sk-theirs", "their-name", "")


def test_an_engine_that_is_slow_to_leave_gets_the_time_it_needs() -> None:
    hasty = replace(config("sglang"), workers=WorkersConfig(term_timeout_s=1))
    assert build(placement(), hasty, host(), port=1, api_key="").term_timeout_s == 25
    assert (
        build(placement(), replace(hasty, models=config("vllm").models), host(), port=1, api_key="").term_timeout_s == 1
    )


def test_draining_is_left_to_the_engine_for_as_long_as_the_config_says() -> None:
    patient = replace(config("vllm"), workers=WorkersConfig(drain_timeout_s=0))
    argv = build(placement(), patient, host(), port=1, api_key="").argv
    assert argv[argv.index("--shutdown-timeout") + 1] == "1"
    assert patient.models[MODEL].engine == "vllm"


def test_whose_streams_end_with_their_last_event_is_told_by_name_and_by_owner() -> None:
    """Of an external worker only what it calls itself in its list of models is known."""
    assert [name for name, engine in ENGINES.items() if engine.ends_streams] == [
        "vllm", "sglang", "tensorrt-llm", "llama-cpp", "simulated"
    ]  # fmt: skip
    owners = ("vllm", "sglang", "tensorrt_llm", "llamacpp", "organization-owner", "")
    assert [ends_streams(owner) for owner in owners] == [True, True, True, True, False, False]
    own_command = {"vllm": EngineConfig(command=("mine", "{port}"))}
    assert not resolve("vllm", own_command).ends_streams, "another program than the table's"
