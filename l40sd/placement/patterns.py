"""Patterns: the four built in, those of the configuration, and whether one can be meant for this host at all.

Where the GPUs are is the business of placement.py; here only numbers count: GPUs, attention heads, layers.
"""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches

from l40sd.config.options import Config, ModelConfig, is_external
from l40sd.errors import ConfigError, DoesNotFit, L40sError
from l40sd.model import Inventory, ModelFacts, ModelName, Pattern, ReplicaSpec

PP_USUAL = 4
"""Stages of pattern D where the host has as many GPUs: 3 x PP4 on twelve."""
TP_ADVISED = 4
"""Over PCIe wider TP hardly pays: on L40S a 70B FP8 went from 1159 to 1173 tok/s from TP4 to TP8."""


def patterns_of(config: Config, inventory: Inventory) -> dict[str, Pattern]:
    """Return every pattern that can be asked for: A to D, then the configured ones, which may take their names.

    A to D lay out the first model that this host runs itself; without one (external models only) they are one
    pattern, A, with nothing to place. Whether a pattern fits is for ``place`` to say.
    """
    models = own_models(config)
    if not models:
        built_in = [Pattern(name="A", replicas=(), description="external workers only")] if config.models else []
    else:
        built_in = _built_in(models[0].name, len(inventory.gpus))
    return {pattern.name: pattern for pattern in built_in} | dict(config.patterns)


def find_pattern(name: str, patterns: Mapping[str, Pattern]) -> Pattern:
    """Return the pattern of this name.

    Raises:
        L40sError: There is none; the hint has the nearest name and all of them.
    """
    if name in patterns:
        return patterns[name]
    near = get_close_matches(name, patterns, n=1) or [known for known in patterns if known.lower() == name.lower()]
    known = ", ".join(patterns) or "none: configure a model first"
    raise L40sError(
        f"there is no pattern {name!r}",
        hint=f"did you mean {near[0]}? known: {known}" if near else f"known: {known}",
        code="unknown_pattern",
    )


def own_models(config: Config) -> list[ModelConfig]:
    """Return the models that need GPUs of this host, in the config's order."""
    return [model for model in config.models.values() if not is_external(model, config.engines)]


def external_models(config: Config) -> list[ModelConfig]:
    """Return the models whose workers somebody else runs, in the config's order."""
    return [model for model in config.models.values() if is_external(model, config.engines)]


def attention_heads(model: ModelConfig, facts: ModelFacts) -> int | None:
    """Return the heads that TP must divide: the config's word before the checkpoint's; None when nobody knows."""
    return model.attention_heads or facts.attention_heads


def check_pattern(pattern: Pattern, config: Config, gpu_count: int, facts: Mapping[ModelName, ModelFacts]) -> None:
    """Refuse what no arrangement of GPUs could mend.

    Raises:
        L40sError: One problem, or a ConfigError with all of them; DoesNotFit when it is only about too few GPUs.
    """
    problems = [
        problem
        for spec in pattern.replicas
        for problem in _problems(pattern.name, spec, config, facts.get(spec.model, ModelFacts()), gpu_count)
    ]
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise ConfigError(problems)


def warnings_of(pattern: Pattern, config: Config, facts: Mapping[ModelName, ModelFacts]) -> Iterator[str]:
    """Yield what an operator should know about a pattern although it may fit."""
    for spec in pattern.replicas:
        if spec.tp > TP_ADVISED:
            yield (
                f"{spec.model}: TP={spec.tp} over PCIe hardly pays (L40S, 70B FP8: TP4 1159 tok/s, TP8 1173); "
                f"tp = {TP_ADVISED} with pp = {max(2, spec.tp // TP_ADVISED)} or more replicas use the GPUs better"
            )
        kv_heads = facts.get(spec.model, ModelFacts()).kv_heads
        if kv_heads and spec.tp > kv_heads:
            yield f"{spec.model}: TP={spec.tp} exceeds its {kv_heads} key-value heads, so their cache is held in copies"
    placed = {spec.model for spec in pattern.replicas}
    absent = [model.name for model in own_models(config) if model.name not in placed]
    if absent:
        is_built_in = pattern.name not in config.patterns
        why = "; A to D lay out the first model only, write a [patterns] entry for several" if is_built_in else ""
        yield f"no replica of {', '.join(absent)} in pattern {pattern.name}{why}"


def _built_in(model: ModelName, gpu_count: int) -> list[Pattern]:
    stages = min(PP_USUAL, max(2, gpu_count))
    return [
        _of_one("A", model, 1, 1, "single-GPU replicas, for models that fit one GPU"),
        _of_one("B", model, 2, 1, "TP=2, each pair below one PCIe switch where possible"),
        _of_one("C", model, 4, 1, "TP=4, each quad within one PCIe switch or at least one socket"),
        _of_one("D", model, 1, stages, f"pipelines of {stages} stages, for models that talk too much for TP over PCIe"),
    ]


def _of_one(name: str, model: ModelName, tp: int, pp: int, description: str) -> Pattern:
    return Pattern(name=name, replicas=(ReplicaSpec(model=model, tp=tp, pp=pp),), description=description)


def _problems(
    pattern: str, spec: ReplicaSpec, config: Config, facts: ModelFacts, gpu_count: int
) -> Iterator[L40sError]:
    where = f"pattern {pattern}: {spec.model}"
    model = config.models.get(spec.model)
    if model is None or is_external(model, config.engines):
        own = ", ".join(m.name for m in own_models(config)) or "none is configured"
        why = "is external: its workers join every pattern by themselves" if model else "is not configured"
        yield L40sError(f"model {spec.model!r} {why}", where=where, hint=f"models to place: {own}", code="bad_pattern")
        return
    for word, number in (("count", 1 if spec.count is None else spec.count), ("tp", spec.tp), ("pp", spec.pp)):
        if number < 1:
            yield L40sError(f"{word} = {number}", where=where, hint="at least 1", code="bad_pattern")
            return
    heads = attention_heads(model, facts)
    if heads and heads % spec.tp:
        fitting = [str(tp) for tp in range(1, min(heads, gpu_count) + 1) if heads % tp == 0]
        yield DoesNotFit(
            f"tp = {spec.tp} does not divide the model's {heads} attention heads",
            where=where,
            hint=f"use tp = {_one_of(fitting)}, and pp for the rest",
            code="bad_tp",
        )
    if facts.layers and spec.pp > facts.layers:
        yield DoesNotFit(
            f"pp = {spec.pp} is more than the model's {facts.layers} layers",
            where=where,
            hint=f"at most pp = {facts.layers}",
            code="bad_pp",
        )


def _one_of(words: list[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else "".join(words)
