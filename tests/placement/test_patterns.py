"""Which patterns there are, and what is said about them before any GPU is looked at."""

import pytest
from hosts import tree_host

from l40sd.config.options import Config, EngineConfig, ModelConfig, is_external
from l40sd.engines.table import resolve
from l40sd.errors import ConfigError, DoesNotFit, L40sError
from l40sd.model import ModelFacts, ModelName, Pattern, ReplicaSpec
from l40sd.placement.patterns import (
    attention_heads,
    check_pattern,
    external_models,
    find_pattern,
    own_models,
    patterns_of,
    warnings_of,
)
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


UNKNOWN = ModelFacts()


def said_of(spec: ReplicaSpec, facts: ModelFacts = UNKNOWN, *, gpu_count: int = 12) -> list[str]:
    """Return what is wrong with a pattern of this replica alone, and how it is mended."""
    try:
        check_pattern(Pattern(name="x", replicas=(spec,)), TWO, gpu_count, {spec.model: facts})
    except L40sError as problem:
        return [problem.what, problem.hint]
    return []


def test_a_count_a_width_and_a_depth_are_at_least_one() -> None:
    assert said_of(ReplicaSpec(model=M, count=1, tp=1, pp=1)) == []
    assert said_of(ReplicaSpec(model=M, count=None)) == []
    for spec, what in (
        (ReplicaSpec(model=M, count=0), "count = 0"),
        (ReplicaSpec(model=M, tp=0), "tp = 0"),
        (ReplicaSpec(model=M, pp=0), "pp = 0"),
    ):
        assert said_of(spec) == [what, "at least 1"]


def test_tp_divides_the_heads_and_what_would_is_named_as_far_as_there_are_gpus() -> None:
    heads = ModelFacts(attention_heads=12)
    assert said_of(ReplicaSpec(model=M, tp=6), heads) == []
    hints = {12: "1, 2, 3, 4, 6 or 12", 6: "1, 2, 3, 4 or 6", 5: "1, 2, 3 or 4", 2: "1 or 2", 1: "1"}
    for gpu_count, widths in hints.items():
        assert said_of(ReplicaSpec(model=M, tp=5), heads, gpu_count=gpu_count) == [
            "tp = 5 does not divide the model's 12 attention heads",
            f"use tp = {widths}, and pp for the rest",
        ]
    assert said_of(ReplicaSpec(model=M, tp=5), ModelFacts(attention_heads=3))[1].startswith("use tp = 1 or 3, ")
    assert said_of(ReplicaSpec(model=M, tp=5)) == [], "nobody knows its heads"


def test_there_is_a_layer_for_every_stage() -> None:
    assert said_of(ReplicaSpec(model=M, pp=3), ModelFacts(layers=3)) == []
    assert said_of(ReplicaSpec(model=M, pp=4), ModelFacts(layers=3))[1] == "at most pp = 3"
    with pytest.raises(DoesNotFit):
        check_pattern(Pattern(name="x", replicas=(ReplicaSpec(model=M, pp=2),)), TWO, 12, {M: ModelFacts(layers=1)})


def test_the_configurations_word_on_heads_goes_before_the_checkpoints() -> None:
    model = ModelConfig(name=M, attention_heads=8)
    assert attention_heads(model, ModelFacts(attention_heads=32)) == 8
    assert attention_heads(ModelConfig(name=M), ModelFacts(attention_heads=32)) == 32
    assert attention_heads(ModelConfig(name=M), ModelFacts()) is None


def warned_of(tp: int, facts: ModelFacts = UNKNOWN) -> list[str]:
    specs = (ReplicaSpec(model=M, tp=tp), ReplicaSpec(model=N))
    return list(warnings_of(Pattern(name="x", replicas=specs), TWO, {M: facts}))


def test_tp_wider_than_four_is_advised_against_and_the_same_gpus_in_stages_are_named() -> None:
    assert warned_of(4) == []
    for tp, stages in ((5, 2), (8, 2), (12, 3), (16, 4)):
        (warning,) = warned_of(tp)
        assert f"TP={tp} over PCIe hardly pays" in warning
        assert f"tp = 4 with pp = {stages} or more replicas" in warning


def test_as_many_key_value_heads_as_tp_are_enough() -> None:
    assert warned_of(4, ModelFacts(kv_heads=4)) == []
    assert len(warned_of(4, ModelFacts(kv_heads=3))) == 1


def test_nothing_is_said_of_models_when_all_have_a_replica_and_a_configured_pattern_needs_no_advice() -> None:
    one = Config(models={M: ModelConfig(name=M), E: EXTERNAL})
    assert list(warnings_of(patterns_of(one, tree_host([[[["g"]]]]))["A"], one, {})) == []
    mine = Pattern(name="mine", replicas=(ReplicaSpec(model=M),))
    config = Config(models=TWO.models, patterns={"mine": mine})
    assert list(warnings_of(mine, config, {})) == ["no replica of qwen in pattern mine"]


def test_without_any_pattern_the_way_to_one_is_named() -> None:
    with pytest.raises(L40sError) as caught:
        find_pattern("A", {})
    assert caught.value.hint == "known: none: configure a model first"
