"""Reading, refusing, showing and comparing configurations."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l40sd.config import overrides, placeholders
from l40sd.config import show as config_show
from l40sd.config.check import listen_problem
from l40sd.config.load import SECTIONS, load, parse
from l40sd.config.options import (
    BUILT_IN_ENGINES,
    Config,
    EngineConfig,
    ModelConfig,
    in_force,
    options_of,
)
from l40sd.engines.table import ENGINES
from l40sd.errors import ConfigError
from l40sd.model import ModelName

MAIN = "/etc/l40sd/l40sd.toml"
MODEL = '[models.m]\nsource = "/models/m"\n'
SHIPPED = Path(__file__).parents[2] / "etc" / "l40sd.toml"


def problems(*texts: str) -> list[str]:
    """Return each problem on one line, hint after `` | ``; empty when the configuration is good."""
    try:
        parse([(MAIN if place == 0 else f"{place}.toml", text) for place, text in enumerate(texts)])
    except ConfigError as error:
        return [str(each).replace("\n  hint: ", " | ") for each in error.problems]
    return []


def test_a_small_configuration_has_defaults_for_the_rest() -> None:
    config = parse([(MAIN, MODEL)])
    assert config.models[ModelName("m")] == ModelConfig(name=ModelName("m"), source="/models/m")
    assert config.proxy.queue_limit == 1000
    assert config.daemon.pattern == "A"


def test_overlays_are_merged_key_by_key_and_arrays_are_replaced() -> None:
    loaded = load(
        [
            (MAIN, MODEL + 'args = ["a", "b"]\nenv = { A = "1" }\n[proxy]\nqueue_limit = 7\nretries = 1\n'),
            ("10.toml", '[models.m]\nargs = ["c"]\nenv.B = "2"\n[proxy]\nqueue_limit = 8\n'),
            ("20.toml", "[proxy]\nqueue_limit = 9\n"),
        ]
    )
    model = loaded.config.models[ModelName("m")]
    assert model.source == "/models/m"
    assert model.args == ("c",)
    assert model.env == {"A": "1", "B": "2"}
    assert (loaded.config.proxy.queue_limit, loaded.config.proxy.retries) == (9, 1)
    assert loaded.origins[("proxy", "queue_limit")] == "20.toml"
    assert loaded.origins[("proxy", "retries")] == MAIN
    assert loaded.files == (MAIN, "10.toml", "20.toml")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[proxi]\n", "proxi: unknown key | did you mean proxy?"),
        ("[daemon]\npatern = 'A'\n", "daemon.patern: unknown key | did you mean pattern?"),
        ("[daemon]\nlisten = []\n", "daemon.listen: unknown key | listen belongs to [proxy]"),
        ("[models.m]\ntp = 2\n", "models.m.tp: unknown key | known here: engine, source, "),
        ("[models.'a.b']\nsource = '/a'\nx = 2\n", 'models."a.b".x: unknown key | known here: '),
        ("daemon = 3\n", "daemon: must be a table, not 3 | write [daemon]"),
        ("[proxy]\nretries = '2'\n", 'proxy.retries: must be a whole number, not "2" | write 2 without quotes'),
        ("[proxy]\nretries = 2.0\n", "proxy.retries: must be a whole number, not 2.0"),
        ("[proxy]\nretries = true\n", "proxy.retries: must be a whole number, not true"),
        ("[proxy]\nretries = 11\n", "proxy.retries: must be from 0 to 10, not 11"),
        ("[proxy]\nqueue_timeout_s = nan\n", "proxy.queue_timeout_s: must be from 0 to 86400, not nan"),
        ("[proxy]\nqueue_timeout_s = 2024-01-01\n", "proxy.queue_timeout_s: must be a number, not 2024-01-01"),
        (f"[proxy]\nretries = {'9' * 400}\n", "proxy.retries: must be from 0 to 10, not an enormous number"),
        ("[proxy]\naccess_log = 1\n", "proxy.access_log: must be true or false, not 1"),
        ("[proxy]\nlisten = '127.0.0.1:1'\n", 'proxy.listen: must be an array of strings, e.g. ["a", "b"], not '),
        ("[proxy]\nlisten = [8080]\n", "proxy.listen: must be an array of strings only, not 8080 | put it in "),
        ("[proxy]\nlisten = []\n", "proxy.listen: names no address | "),
        ("[proxy]\nlisten = [':80']\n", 'proxy.listen: ":80" is neither host:port nor unix:/path | e.g. "0.0.0.0:80"'),
        ("[proxy]\nlisten = ['a:70000']\n", "proxy.listen: port 70000 is above 65535"),
        ("[proxy]\nlisten = ['a:1', 'a:1']\n", 'proxy.listen: "a:1" is there twice'),
        ("[daemon]\nlog_level = 'warn'\n", "daemon.log_level: must be one of debug, info, warning, error, not "),
        ("[daemon]\npattern = 'Z'\n", 'daemon.pattern: no pattern "Z" | known: A, B, C, D'),
        ("[daemon]\nstate_dir = 'x'\n", "daemon.state_dir: must be an absolute path"),
        (f"[daemon]\nruntime_dir = '/{'x' * 120}'\n", "daemon.runtime_dir: "),
        ("[workers]\nport_first = 31000\n", "workers.port_first: 31000 is above port_last = 30999"),
        ("[workers]\nhost = ''\n", 'workers.host: "" is no address | '),
        ("[models.m]\nengine = 'vlm'\n", 'models.m.engine: no engine "vlm" | did you mean "vllm"?'),
        ("[models.m]\nenv = { X = 1 }\n", "models.m.env: must be a table of strings only (X), not 1 | put it in "),
        ("[models.m]\nenv = { 'a=b' = '1' }\n", 'models.m.env."a=b": cannot be a variable\'s name'),
        ('[models.m]\nargs = ["a\\u0000b"]\n', "models.m.args: must not contain a NUL character"),
        ("[models.m]\nendpoints = ['http://a:1']\n", "models.m.endpoints: is only for engine = "),
        ("[models.n]\n", "models.n.source: is missing | a path or a hub id"),
        ("[models.x]\nengine = 'external'\n", "models.x.endpoints: is missing | e.g. "),
        ("[models.x]\nengine = 'external'\nendpoints = ['http://a']\n", '"http://a" is not http://host:port'),
        ("[models.x]\nengine = 'external'\nendpoints = ['http://a:b']\n", '"http://a:b" is not http://host:port'),
        ("[models.x]\nengine = 'external'\nendpoints = ['https://a:1']\n", '"https://a:1" is not http://host:port'),
        ("[models.x]\nengine = 'external'\nendpoints = ['http://a:1/v1']\n", '"http://a:1/v1" is not http://host:'),
        ("[models.M]\nsource = '/m'\n", 'models.M: its workers would be named "m-..." like those of m'),
        ("[models.'!']\nsource = '/m'\n", 'models."!": cannot be a model\'s name | '),
        ("[models.--help]\nsource = '/m'\n", "models.--help: cannot be a model's name | "),
        ("[models.m]\naliases = ['--help']\n", "models.m.aliases: '--help' cannot be an alias | engines are told it"),
        ('[models.m]\naliases = ["a\\u001b[2J"]\n', "models.m.aliases: 'a\\x1b[2J' cannot be an alias | "),
        ('[models.m]\naliases = ["a\\nb"]\n', "models.m.aliases: 'a\\nb' cannot be an alias | "),
        ("[models.n]\nsource = '/n'\naliases = ['m']\n", 'models.n.aliases: "m" is another model\'s name'),
        (
            "[models.n]\nsource = '/n'\naliases = ['x']\n[models.o]\nsource = '/o'\naliases = ['x']\n",
            'models.o.aliases: "x" is already an alias of n',
        ),
        ("[engines.mine]\n", "engines.mine: has neither a base nor a command | "),
        ("[engines.mine]\nbase = 'vlm'\n", 'engines.mine.base: no built-in engine "vlm" | did you mean "vllm"?'),
        (
            "[engines.vllm]\ncommand = ['{modle}', '{port}']\n",
            "engines.vllm.command: {modle} stands for nothing | did you ",
        ),
        ("[engines.vllm]\nhealth_path = 'x'\n", "engines.vllm.health_path: must begin with /"),
        # What fought what l40sd sets was taken: the worker sat on other GPUs, or listened where nobody asked.
        (
            "[models.m]\nargs = ['--port', '9']\n",
            "models.m.args: --port is not to be set here: l40sd sets it | each wo",
        ),
        (
            "[models.m]\nargs = ['--tensor_parallel_size=4']\n",
            "models.m.args: --tensor_parallel_size is not to be set ",
        ),
        (
            "[models.m]\nargs = ['-tp', '4']\n",
            "models.m.args: -tp is not to be set here: l40sd sets it | say tp and pp in",
        ),
        (
            "[models.m]\nargs = ['--api-key=x']\n",
            "models.m.args: --api-key is not to be set here: l40sd sets it | l40sd",
        ),
        (
            "[models.m]\nargs = ['--numa-bind']\n",
            "models.m.args: --numa-bind is not to be set here: l40sd sets it | l40s",
        ),
        (
            "[models.m]\nenv = { CUDA_VISIBLE_DEVICES = '0' }\n",
            "models.m.env.CUDA_VISIBLE_DEVICES: is not to be set he",
        ),
        ("[models.m]\nenv = { VLLM_API_KEY = 'x' }\n", "models.m.env.VLLM_API_KEY: is not to be set here: l40sd sets"),
        ("[workers]\nenv = { CUDA_DEVICE_ORDER = 'x' }\n", "workers.env.CUDA_DEVICE_ORDER: is not to be set here: l40"),
        ("[workers]\nenv = { 'a=b' = '1' }\n", 'workers.env."a=b": cannot be a variable\'s name'),
        (
            "[engines.vllm]\nenv = { CUDA_VISIBLE_DEVICES = '' }\n",
            "engines.vllm.env.CUDA_VISIBLE_DEVICES: is not to be s",
        ),
        (
            "[engines.vllm]\ncommand = ['serve', '--port', '9']\n",
            "engines.vllm.command: does not say {port}: the worker",
        ),
        (
            "[engines.vllm]\ncommand = ['/usr/bin/numactl', '-N0', 'serve', '{port}']\n",
            "engines.vllm.command: numactl wo",
        ),
        (
            "[engines.x]\nbase = 'llama-cpp'\n[models.l]\nengine = 'x'\nsource = '/l'\nargs = ['-dev', 'CUDA3']\n",
            "models.l.args: -dev is not to be set here: l40sd sets it | which GPUs a worker has follows from",
        ),
        ("[patterns.day]\n", "patterns.day: has no replicas | add a [[patterns.day.replicas]]"),
        ("[patterns.day]\nreplicas = 2\n", "patterns.day.replicas: must be tables, not 2 | write [[patterns.day."),
        ("[[patterns.day.replicas]]\n", "patterns.day.replicas[0].model: is missing | known: m"),
        ("[[patterns.day.replicas]]\nmodel = 'n'\n", 'patterns.day.replicas[0].model: no model "n" | '),
        ("[[patterns.day.replicas]]\nmodel = 'm'\ntp = 0\n", "patterns.day.replicas[0].tp: must be from 1 to "),
        ("[[patterns.day.replicas]]\nmodel = 'm'\ncount = 'all'\n", "[0].count: must be a number or "),
        ("[[patterns.day.replicas]]\nmodel = 'm'\ncount = 0\n", "[0].count: must be from 1 to 1024, not 0"),
        ("[[patterns.'d y'.replicas]]\nmodel = 'm'\n", 'patterns."d y": cannot be a pattern\'s name'),
    ],
)
def test_each_mistake_is_told_with_its_file_key_and_remedy(text: str, problem: str) -> None:
    first, second = problems(MODEL), problems(MODEL, text)
    assert first == []
    assert len(second) == 1, second
    assert problem in second[0]
    assert second[0].startswith("1.toml: ")


def test_all_problems_of_all_files_are_told_at_once() -> None:
    found = problems(MODEL + "[proxy]\nretries = 99\n", "[workers]\nx = 1\n[daemon]\npattern = 'Z'\n")
    assert [each.split(": ")[:2] for each in found] == [
        [MAIN, "proxy.retries"],
        ["1.toml", "workers.x"],
        ["1.toml", "daemon.pattern"],
    ]


@pytest.mark.parametrize(
    "text",
    [
        "[models.m]\nargs = ['--max-model-len', '4096', '--gpu-memory-utilization=0.8', '-cc', '{}', '--ports', '9']\n",
        "[models.m]\nargs = ['port', '9', '--host-cache', 'x']\n",
        "[models.m]\nenv = { NCCL_P2P_LEVEL = 'SYS', VLLM_API_KEY = '' }\n[workers]\nenv = { NCCL_DEBUG = 'INFO' }\n",
        "[engines.w]\ncommand = ['/opt/serve.sh']\nenv = { PORT = '{port}', CUDA_VISIBLE_DEVICES = '{gpus}' }\n",
        "[engines.w]\ncommand = ['/bin/sh', '-c', 'exec serve --port {port} --api-key {api_key} --tp 2']\n",
        "[engines.w]\ncommand = ['numactl', '-N0', 'serve', '{port}']\n[host]\nnuma_pinning = false\n",
        "[engines.w]\nbase = 'vllm'\nenv = { VLLM_API_KEY = '{api_key}', LLAMA_API_KEY = '{api_key}' }\n",
        "[models.x]\nengine = 'mine'\nsource = 'x'\nargs = ['--port-range', '9']\n"
        "[engines.mine]\ncommand = ['serve', '{port}']\n",
    ],
)
def test_what_the_operator_may_say_is_taken(text: str) -> None:
    assert problems(MODEL, text) == []


def test_text_that_is_no_toml_is_told_for_every_such_file() -> None:
    found = problems("a = ", "b = 1\nb = 2\n", "c = " + "[" * 5000, "d = " + "1" * 6000)
    assert [each.split(":")[0] for each in found] == [MAIN, "1.toml", "2.toml", "3.toml"]
    assert all("not TOML" in each for each in found)


def test_a_configuration_without_a_model_says_so() -> None:
    assert problems("") == [f"{MAIN}: models: no model | add a [models.NAME] with engine and source"]


def test_a_pattern_may_not_place_an_external_model() -> None:
    text = "[models.x]\nengine='external'\nendpoints=['http://a:1']\n[[patterns.day.replicas]]\nmodel='x'\n"
    assert "external workers are part of every pattern" in problems(MODEL, text)[0]


def test_an_engine_of_ones_own_counts_as_its_base() -> None:
    assert problems("[engines.far]\nbase='external'\n[models.x]\nengine='far'\nendpoints=['http://[::1]:1']\n") == []
    assert problems("[engines.toy]\nbase='simulated'\n[models.x]\nengine='toy'\n") == []


@pytest.mark.parametrize(
    "address", ["127.0.0.1:0", "[::1]:8080", "0.0.0.0:65535", "host.example:1", "unix:/run/l40sd/proxy.sock"]
)
def test_listen_addresses_that_are_good(address: str) -> None:
    assert listen_problem(address) == ""


# --- the shipped file ---------------------------------------------------------------------------------------------


def test_the_shipped_file_is_good_as_it_is() -> None:
    config = parse([("etc/l40sd.toml", SHIPPED.read_text())])
    assert list(config.models) == ["llama"]


def test_the_shipped_file_shows_every_option_with_the_codes_default() -> None:
    uncommented = re.sub(r"(?m)^#(?=[a-z_\[])", "", SHIPPED.read_text())
    loaded = load([("etc/l40sd.toml", uncommented)])
    records: dict[tuple[str, ...], Any] = {(name,): getattr(loaded.config, name) for name in SECTIONS}
    records[("models", "llama")] = loaded.config.models[ModelName("llama")]
    records[("engines", "vllm")] = loaded.config.engines["vllm"]
    for path, record in records.items():
        for option in options_of(type(record)):
            assert (*path, option.name) in loaded.origins, f"{path} lacks {option.name}"
            if (*path, option.name) != ("models", "llama", "source"):
                assert getattr(record, option.name) == option.default, (*path, option.name)


def test_every_default_is_within_its_own_bounds() -> None:
    for record in (*SECTIONS.values(), ModelConfig, EngineConfig):
        for option in options_of(record):
            assert not option.choices or option.default in option.choices
            assert option.least is None or option.least <= option.default <= option.most  # type: ignore[operator]


def test_the_names_of_engines_and_placeholders_are_those_of_the_engine_table() -> None:
    assert set(BUILT_IN_ENGINES) == set(ENGINES)
    used = set()
    for engine in ENGINES.values():
        texts = [*engine.command, *engine.env.values(), *(part for _, parts in engine.options for part in parts)]
        used |= {name for text in texts for name in re.findall(r"(?<!\{)\{([a-z_]+)\}(?!\})", text)}
    assert used <= set(placeholders.NAMES)


# --- showing and comparing ----------------------------------------------------------------------------------------

SECRETS = MODEL + (
    "env = { HF_TOKEN = 'hf_abc', OTHER = 'seen' }\n"
    "args = ['--my-token', 'abc', '--hf-token=abc', '--seed', '7']\n"
    "[models.x]\nengine = 'external'\nendpoints = ['http://a:1']\nendpoint_key = 'sk-abc'\n"
)


def test_show_names_each_values_file_and_hides_secrets() -> None:
    loaded = load([(MAIN, SECRETS), ("conf.d/x.toml", "[proxy]\nretries = 5\n")])
    text = config_show.to_toml(loaded.config, loaded.origins)
    assert re.search(r"(?m)^retries = 5 +# conf\.d/x\.toml$", text)
    assert re.search(r"(?m)^queue_limit = 1000 +# default$", text)
    assert "abc" not in text
    assert 'OTHER = "seen"' in text
    assert 'args = ["--my-token", "***", "--hf-token=***", "--seed", "7"]' in text
    parse([("shown", text)])  # hidden secrets are still TOML


def test_a_diff_says_what_changed_in_words_and_hides_secrets() -> None:
    day = "[[patterns.day.replicas]]\nmodel = 'm'\ntp = 2\n"
    old = parse([(MAIN, SECRETS + day + "[models.gone]\nsource='/g'\n")])
    new = parse(
        [
            (MAIN, SECRETS.replace("sk-abc", "sk-def") + day.replace("tp = 2", "count = 3")),
            ("1", "[proxy]\nretries = 5\nlisten = ['0.0.0.0:1']\n[models.new]\nsource='/n'\n"),
        ]
    )
    assert config_show.diff(old, new) == (
        'proxy.listen: ["127.0.0.1:8080"] -> ["0.0.0.0:1"] (needs a restart: `systemctl restart l40sd`; an address that'
        " l40sd.socket holds is changed there as well, then stop and start)",
        "proxy.retries: 2 -> 5",
        "models.x.endpoint_key: changed",
        "models.gone: removed",
        "patterns.day: fill x m TP2 -> 3 x m TP1",
        "models.new: added (engine vllm)",
    )
    assert config_show.diff(old, old) == ()


def test_what_is_in_force_after_a_reload_keeps_what_needs_a_restart_and_nothing_else() -> None:
    started = parse([(MAIN, MODEL)])
    fresh = parse(
        [(MAIN, MODEL + "[proxy]\nlisten = ['0.0.0.0:1']\nretries = 5\n[workers]\nport_first = 2000\nlog_files = 9\n")]
    )
    now = in_force(started, fresh)
    assert (now.proxy.listen, now.workers.port_first) == (started.proxy.listen, started.workers.port_first)
    assert (now.proxy.retries, now.workers.log_files) == (5, 9)
    assert now.models == fresh.models
    assert in_force(started, started) == started
    assert in_force(fresh, fresh) == fresh
    pending = config_show.diff(now, fresh)
    assert len(pending) == 2
    assert all("systemctl restart l40sd" in sentence for sentence in pending)
    health = parse([(MAIN, MODEL + "[health]\nfall = 9\n")])
    assert config_show.diff(started, health) == ("health.fall: 3 -> 9 (seen by each worker when it is started next)",)


# --- anything at all ----------------------------------------------------------------------------------------------

KEYS = st.one_of(
    st.sampled_from(
        ["daemon", "proxy", "models", "patterns", "engines", "m", "replicas", "model", "tp", "count", "listen"]
    ),
    st.sampled_from([option.name for record in (ModelConfig, EngineConfig) for option in options_of(record)]),
    st.text(max_size=5),
)
VALUES = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.sampled_from(["m", "fill", "vllm", "external", "http://[", "http://a:1", "unix:", "{x}"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, VALUES, max_size=4), st.dictionaries(KEYS, VALUES, max_size=2))
def test_any_toml_is_a_configuration_or_a_list_of_problems(one: dict[str, Any], two: dict[str, Any]) -> None:
    texts = [
        (name, "\n".join(f"{config_show.toml_value(key)} = {config_show.toml_value(tree[key])}" for key in tree))
        for name, tree in (("one", one), ("two", two))
    ]
    try:
        config = parse(texts)
    except ConfigError as error:
        told = [each.where for each in error.problems if not each.what.startswith("not TOML")]
    else:
        told = ["one"] if isinstance(config, Config) else []
    assert told, "the texts are TOML, and each problem is told with its file"
    assert all(where.startswith(("one", "two")) for where in told)


@given(st.text())
def test_any_text_is_a_configuration_or_a_list_of_problems(text: str) -> None:
    with pytest.raises(ConfigError):  # no text of these sizes has a whole model in it
        parse([("one", text)])


WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)


def test_a_delete_character_is_escaped_as_toml_wants_it() -> None:
    assert config_show.toml_value("\x7f") == '"\\u007f"'  # JSON leaves it as it is, TOML does not allow it


@given(
    source=WORDS,
    args=st.lists(WORDS.filter(lambda word: not list(overrides.arguments("vllm", [word]))), max_size=3),
    env=st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,8}", fullmatch=True), WORDS, max_size=3),
    queue_timeout_s=st.floats(min_value=0, max_value=86400),
    count=st.one_of(st.none(), st.integers(1, 1024)),
    tp=st.integers(1, 1024),
)
def test_what_is_shown_parses_back_to_the_same_configuration(
    source: str, args: list[str], env: dict[str, str], queue_timeout_s: float, count: int | None, tp: int
) -> None:
    value = config_show.toml_value
    text = (
        f"[proxy]\nqueue_timeout_s = {value(queue_timeout_s)}\n"
        f"[models.'a.b/c']\nsource = {value(source)}\nargs = {value(args)}\nenv = {value(env)}\n"
        f"[[patterns.day.replicas]]\nmodel = 'a.b/c'\ncount = {value(count or 'fill')}\ntp = {tp}\n"
    )
    config = parse([("one", text)])
    assert config.models[ModelName("a.b/c")].env == env
    assert parse([("two", config_show.to_toml(config, secrets=True))]) == config
    assert config_show.diff(config, config) == ()
