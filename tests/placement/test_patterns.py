"""Which patterns there are, and what is said about them before any GPU is looked at."""

import pytest
from hosts import tree_host

from l40sd.config.options import Config, EngineConfig, ModelConfig, is_external
from l40sd.engines.table import resolve
from l40sd.errors import ConfigError, L40sError
from l40sd.model import ModelFacts, ModelName, Pattern, ReplicaSpec
from l40sd.placement.patterns import check_pattern, external_models, find_pattern, own_models, patterns_of, warnings_of
from l40sd.placement.place import place

M, N, E = ModelName("llama"), ModelName("qwen"), ModelName("remote")
EXTERNAL = ModelConfig(name=E, engine="external", endpoints=("http://127.0.0.1:1",))
TWO = Config(models={E: EXTERNAL, M: ModelConfig(name=M), N: ModelConfig(name=N)})


def shapes(config: Config, gpu_count: int = 12) -> dict[str, list[tuple[str, int, int]]]:
    host = tree_host([[[["g"] * gpu_count]]])
    found = patterns_of(config, host)
    return {name: [(r.model, r.tp, r.pp) for r in pattern.replicas] for name, pattern in found.items()}


def test_a_to_d_lay_out_the_first_model_of_this_host() -> None:
    assert shapes(TWO) == {"A": [(M, 1, 1)], "B": [(M, 2, 1)], "C": [(M, 4, 1)], "D": [(M, 1, 4)]}


@pytest.mark.parametrize(("gpu_count", "stages"), [(1, 2), (2, 2), (3, 3), (4, 4), (12, 4)])
def test_d_has_as_many_stages_as_the_host_allows_up_to_four(gpu_count: int, stages: int) -> None:
    assert shapes(TWO, gpu_count)["D"] == [(M, 1, stages)]


def test_external_models_alone_are_one_pattern_with_nothing_to_place() -> None:
    assert shapes(Config(models={E: EXTERNAL})) == {"A": []}
    assert shapes(Config()) == {}


@pytest.mark.parametrize(
    ("engine", "entry", "is_elsewhere"),
    [
        ("external", None, True),
        ("external", EngineConfig(health_path="/up"), True),
        ("mine", EngineConfig(base="external"), True),
        ("mine", EngineConfig(base="external", command=("serve", "{port}")), False),
        ("mine", EngineConfig(base="simulated"), False),
        ("simulated", None, False),
    ],
)
def test_who_runs_a_models_workers_has_one_answer_everywhere(
    engine: str, entry: EngineConfig | None, *, is_elsewhere: bool
) -> None:
    """An engine with base = "external" passed the check, was placed on GPUs and failed there."""
    model = ModelConfig(name=M, engine=engine, endpoints=("http://127.0.0.1:1",), attention_heads=8)
    config = Config(models={M: model}, engines={} if entry is None else {engine: entry})
    assert is_external(model, config.engines) is is_elsewhere
    assert resolve(engine, config.engines).is_external is is_elsewhere
    assert (external_models(config), own_models(config)) == (([model], []) if is_elsewhere else ([], [model]))
    host = tree_host([[[["g"] * 4]]])
    placed = place(patterns_of(config, host)["A"], config, host, facts={}).placements
    assert [bool(p.endpoint) for p in placed] == ([True] if is_elsewhere else [False] * 4)


def test_a_configured_pattern_may_take_a_built_in_name() -> None:
    mine = Pattern(name="B", replicas=(ReplicaSpec(model=N, tp=4),))
    day = Pattern(name="day", replicas=(ReplicaSpec(model=M),))
    config = Config(models=TWO.models, patterns={"B": mine, "day": day})
    assert shapes(config)["B"] == [(N, 4, 1)]
    assert list(shapes(config)) == ["A", "B", "C", "D", "day"]


def test_an_unknown_pattern_is_refused_with_the_nearest_name() -> None:
    patterns = patterns_of(TWO, tree_host([[[["g"]]]])) | {"night": Pattern(name="night", replicas=())}
    assert find_pattern("night", patterns).name == "night"
    for asked, hint in (
        ("nihgt", "did you mean night?"),
        ("b", "did you mean B?"),
        ("xyz", "known: A, B, C, D, night"),
    ):
        with pytest.raises(L40sError) as caught:
            find_pattern(asked, patterns)
        assert caught.value.code == "unknown_pattern"
        assert hint in caught.value.hint


def test_all_problems_of_a_pattern_are_told_at_once() -> None:
    specs = (ReplicaSpec(model=M, tp=3), ReplicaSpec(model=E), ReplicaSpec(model=N, pp=0))
    with pytest.raises(ConfigError) as caught:
        check_pattern(Pattern(name="x", replicas=specs), TWO, 12, {M: ModelFacts(attention_heads=32)})
    assert [problem.what for problem in caught.value.problems] == [
        "tp = 3 does not divide the model's 32 attention heads",
        "model 'remote' is external: its workers join every pattern by themselves",
        "pp = 0",
    ]


def test_models_without_a_replica_are_named() -> None:
    a = patterns_of(TWO, tree_host([[[["g"]]]]))["A"]
    (warning,) = warnings_of(a, TWO, {})
    assert warning.startswith("no replica of qwen in pattern A; A to D lay out the first model only")


def test_tp_beyond_the_key_value_heads_is_warned_of() -> None:
    spec = Pattern(name="x", replicas=(ReplicaSpec(model=M, tp=4), ReplicaSpec(model=N)))
    (warning,) = warnings_of(spec, TWO, {M: ModelFacts(kv_heads=2)})
    assert "exceeds its 2 key-value heads" in warning
