"""What a checkpoint on disk says of itself, and what a broken one does not."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l40sd.adapters.modelfiles import read_model_facts
from l40sd.core.model import ModelFacts


def folder(path: Path, config: Any, weights: dict[str, int]) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    for name, size in weights.items():
        (path / name).write_bytes(bytes(size))
    return path


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def gguf(values: dict[str, Any]) -> bytes:
    """A header with texts, unsigned numbers, and lists of texts."""
    out = b"GGUF" + struct.pack("<IQQ", 3, 0, len(values))
    for key, value in values.items():
        out += text(key)
        match value:
            case str():
                out += struct.pack("<I", 8) + text(value)
            case int():
                out += struct.pack("<II", 4, value)
            case [int(), *_]:
                out += struct.pack("<IIQ", 9, 4, len(value)) + struct.pack(f"<{len(value)}I", *value)
            case list():
                out += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    return out


SMOLLM2 = {
    "general.architecture": "llama",
    "tokenizer.ggml.tokens": ["<s>", "a", "b"],
    "tokenizer.ggml.token_type": [1, 1, 1],
    "llama.block_count": 30,
    "llama.attention.head_count": 9,
    "llama.attention.head_count_kv": 3,
}


def test_a_hugging_face_folder_is_read(tmp_path: Path) -> None:
    config = {"num_attention_heads": 64, "num_key_value_heads": 8, "num_hidden_layers": 80}
    path = folder(tmp_path / "m", config, {"a-1.safetensors": 10, "a-2.safetensors": 5, "old.bin": 100})
    expected = ModelFacts(attention_heads=64, kv_heads=8, layers=80, size_bytes=15)
    assert read_model_facts(str(path)) == expected


def test_a_model_that_also_sees_keeps_its_numbers_one_level_down(tmp_path: Path) -> None:
    config = {"num_attention_heads": 16, "text_config": {"num_attention_heads": 32, "num_hidden_layers": 40}}
    facts = read_model_facts(str(folder(tmp_path / "m", config, {})))
    assert (facts.attention_heads, facts.layers, facts.size_bytes) == (32, 40, None)


def test_a_gguf_header_is_read(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf(SMOLLM2) + bytes(1000))
    facts = read_model_facts(str(file))
    assert facts == ModelFacts(attention_heads=9, kv_heads=3, layers=30, size_bytes=file.stat().st_size)


def test_the_parts_of_a_split_gguf_are_counted_together(tmp_path: Path) -> None:
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(gguf(SMOLLM2))
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(bytes(500))
    facts = read_model_facts(str(tmp_path / "m-00001-of-00002.gguf"))
    assert facts.size_bytes == len(gguf(SMOLLM2)) + 500


def test_heads_that_differ_by_layer_are_unknown(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(gguf({**SMOLLM2, "llama.attention.head_count": [9, 12]}))
    facts = read_model_facts(str(file))
    assert (facts.attention_heads, facts.layers) == (None, 30)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./m", "~/no_such_model_here", "m.gguf", "a/b/c"])
def test_nothing_at_a_path_is_missing(source: str, tmp_path: Path) -> None:
    assert read_model_facts(source, cache=tmp_path) == ModelFacts(missing=True)


def test_a_hub_id_that_was_never_loaded_is_unknown_but_not_missing(tmp_path: Path) -> None:
    assert read_model_facts("meta-llama/Llama-3.1-8B", cache=tmp_path) == ModelFacts()


def test_a_hub_id_in_the_cache_is_read_in_the_version_of_main(tmp_path: Path) -> None:
    versions = tmp_path / "models--org--model/snapshots"
    folder(versions / "old", {"num_attention_heads": 8}, {})
    folder(versions / "new", {"num_attention_heads": 16}, {})
    refs = tmp_path / "models--org--model/refs"
    refs.mkdir()
    (refs / "main").write_text("old\n")
    assert read_model_facts("org/model", cache=tmp_path).attention_heads == 8
    (refs / "main").write_text("gone")
    assert read_model_facts("org/model", cache=tmp_path).attention_heads in {8, 16}


@pytest.mark.parametrize("config", ["[]", "{", "[" * 100_000, '{"num_attention_heads": "many", "text_config": 3}'])
def test_a_config_that_makes_no_sense_says_nothing(config: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    assert read_model_facts(str(tmp_path)) == ModelFacts()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_broken_gguf_is_unknown_and_read_in_bounds(data: st.DataObject, tmp_path: Path) -> None:
    """Cut anywhere, with any bytes changed: lengths in it are not to be trusted."""
    whole = bytearray(gguf(SMOLLM2))
    for _ in range(data.draw(st.integers(0, 4))):
        whole[data.draw(st.integers(4, len(whole) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path / "broken.gguf"
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    facts = read_model_facts(str(file))
    assert not facts.missing
