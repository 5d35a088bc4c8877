"""What a checkpoint's files say of a model: its heads and layers, and which files are its weights.

Sources: configurations on the Hub; vLLM's ``filter_duplicate_safetensors_files`` and
``filter_files_not_needed_for_inference``, which leave what is counted here.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

NESTED = ("thinker_config", "text_config", "language_config", "llm_config")
"""Where models that also see or hear keep what they say of their language model; one may lie in another (Qwen-Omni)."""
DEPTH_LIMIT = 4
HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")
KV_HEADS = ("num_key_value_heads", "n_kv_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
LAYERS = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
"""In the order in which engines look for them: the first kind that is there is what is loaded."""

_no_weights = re.compile(
    r"(?:training_args|optimizer|scheduler|scaler|rng_state|adapter_model)[^A-Za-z].*|.*optim_states\.pt|.*mmproj.*\.gguf"
)
_part = re.compile(r"(.*)-[0-9]{5}-of-[0-9]{5}\.gguf")


def numbers_of(config: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[int | None, int | None, int | None]:
    """Return attention heads, key-value heads and layers; None for what is not said, or not as one number.

    Args:
        config: ``config.json``, as Transformers writes it.
        params: ``params.json``, as Mistral and Meta write it; counts where the other says nothing.
    """
    levels = [*_language_models(config), params]
    heads, kv_heads, layers = (_first(levels, names) for names in (HEADS, KV_HEADS, LAYERS))
    return heads, kv_heads, layers


def weights_of(sizes: Mapping[str, int], indexed: Collection[str] = ()) -> list[str]:
    """Return the files that are loaded: each tensor once, and nothing that a training left.

    1. Those that the checkpoint's index names, as far as they are there.
    2. Else of the first kind that is there all; but not the same again in consolidated files.
    3. Of several GGUF models side by side the largest: which one is meant, a folder does not say.

    Args:
        sizes: Of all files in its folder, in bytes.
        indexed: What ``model.safetensors.index.json`` or its like names.
    """
    if named := sorted(set(indexed) & set(sizes)):  # 1
        return named
    weights = [name for name in sorted(sizes) if not _no_weights.fullmatch(name)]
    kind = next((k for k in ([n for n in weights if n.endswith(suffix)] for suffix in SUFFIXES) if k), [])
    if kind and kind[0].endswith(".gguf"):  # 3
        return max(_gguf_models(kind), key=lambda model: sum(sizes[name] for name in model))
    return [name for name in kind if not name.startswith("consolidated")] or kind  # 2


def count(table: Mapping[str, Any], *names: str) -> int | None:
    """Return the first of these values that is a number above 0."""
    values = (table.get(name) for name in names)
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool) and v > 0), None)


def _first(levels: Iterable[Mapping[str, Any]], names: tuple[str, ...]) -> int | None:
    found = (count(level, *names) for level in levels)
    return next((value for value in found if value), None)


def _language_models(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a configuration and those of its language model within it, the innermost first."""
    levels = [config]
    for _ in range(DEPTH_LIMIT):
        nested = next((levels[0][name] for name in NESTED if isinstance(levels[0].get(name), Mapping)), None)
        if nested is None:
            break
        levels.insert(0, nested)
    return levels


def _gguf_models(names: Collection[str]) -> list[list[str]]:
    models: dict[str, list[str]] = {}
    for name in names:
        part = _part.fullmatch(name)
        models.setdefault(part[1] if part else name, []).append(name)
    return list(models.values())
