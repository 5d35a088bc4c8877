"""What a checkpoint on disk says of itself, and what a broken one does not."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from l40sd.model import ModelFacts
from l40sd.sizing.model_files import read_model_facts


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


@pytest.mark.parametrize(
    ("config", "heads", "kv_heads", "layers"),
    [
        ({"n_head": 16, "n_layer": 24}, 16, None, 24),  # GPT-2, Bloom
        ({"n_heads": 32, "n_layers": 40}, 32, None, 40),  # MPT, DBRX, OLMo
        ({"num_attention_heads": 71, "n_head_kv": 8, "num_hidden_layers": 60}, 71, 8, 60),  # Falcon
        ({"num_attention_heads": 32, "multi_query_group_num": 2, "num_layers": 28}, 32, 2, 28),  # ChatGLM
        ({"language_config": {"num_attention_heads": 56, "num_hidden_layers": 62}}, 56, None, 62),  # DeepSeek-VL2
        ({"llm_config": {"num_attention_heads": 28, "num_hidden_layers": 24}}, 28, None, 24),  # InternVL
        (
            {
                "thinker_config": {
                    "text_config": {"num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 48},
                    "vision_config": {"num_heads": 16, "depth": 32},
                },
                "talker_config": {"num_attention_heads": 12, "num_hidden_layers": 24},
            },
            28,
            4,
            48,
        ),  # Qwen-Omni
        ({"num_attention_heads": 8, "text_config": {"n_heads": 32, "num_hidden_layers": 2}}, 32, None, 2),
        ({"text_config": {"text_config": {"n_head": 3}}}, 3, None, None),
        ({"num_attention_heads": [8, 12], "num_hidden_layers": True, "text_config": None}, None, None, None),
    ],
)
def test_heads_and_layers_are_found_wherever_models_say_them(
    config: dict[str, Any], heads: int | None, kv_heads: int | None, layers: int | None, tmp_path: Path
) -> None:
    """A TP that does not divide the heads passed the check, and the engine failed after a minute of loading."""
    facts = read_model_facts(str(folder(tmp_path / "m", config, {})))
    assert (facts.attention_heads, facts.kv_heads, facts.layers) == (heads, kv_heads, layers)


def test_a_params_file_says_what_no_config_says(tmp_path: Path) -> None:
    """Mistral's and Meta's own format: nothing was known of it."""
    path = folder(tmp_path / "m", {"num_hidden_layers": 41}, {"consolidated.safetensors": 70})
    (path / "params.json").write_text(json.dumps({"n_layers": 40, "n_heads": 32, "n_kv_heads": 8}))
    expected = ModelFacts(attention_heads=32, kv_heads=8, layers=41, size_bytes=70)
    assert read_model_facts(str(path)) == expected
    (path / "config.json").unlink()
    assert read_model_facts(str(path)).layers == 40


SHARDS = {"model-00001-of-00002.safetensors": 10, "model-00002-of-00002.safetensors": 5}


@pytest.mark.parametrize(
    ("weights", "size"),
    [
        ({**SHARDS, "consolidated.safetensors": 15}, 15),
        ({**SHARDS, "consolidated-00001-of-00002.safetensors": 15, "pytorch_model.bin": 15}, 15),
        ({"consolidated.00.pth": 7, "consolidated.01.pth": 7}, 14),
        ({"pytorch_model.bin": 9, "training_args.bin": 1, "optimizer.bin": 18, "rng_state_0.pth": 1}, 9),
        ({"model.safetensors": 9, "optimizer.safetensors": 18, "optimizer.pt": 18, "scheduler.pt": 1}, 9),
        ({"model.safetensors": 9, "adapter_model.safetensors": 1}, 9),
        ({"bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": 18, "mp_rank_00_model_states.pt": 9}, 9),
        ({"optimizer.pt": 18, "training_args.bin": 1}, None),
        ({"m-Q4_K_M.gguf": 4, "m-Q8_0.gguf": 8, "mmproj-m-f16.gguf": 9}, 8),
        ({"m-Q8-00001-of-00002.gguf": 8, "m-Q8-00002-of-00002.gguf": 8, "m-Q8.gguf": 15}, 16),
    ],
)
def test_weights_are_counted_once_and_what_a_training_left_is_none(
    weights: dict[str, int], size: int | None, tmp_path: Path
) -> None:
    """Mistral's consolidated file beside its shards doubled the size, and with it the time that a start was given."""
    assert read_model_facts(str(folder(tmp_path / "m", {}, weights))).size_bytes == size


def test_an_index_says_which_files_are_loaded(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {}, {**SHARDS, "model.safetensors": 15, "extra.safetensors": 100})
    index = path / "model.safetensors.index.json"
    first, second = SHARDS
    index.write_text(json.dumps({"weight_map": {"a": first, "b": second, "c": "../../x", "d": "gone"}}))
    assert read_model_facts(str(path)).size_bytes == 15
    index.write_text('{"weight_map": 7}')
    assert read_model_facts(str(path)).size_bytes == 130


def test_a_file_under_two_names_is_one(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {}, {"a.safetensors": 10})
    (path / "b.safetensors").symlink_to(path / "a.safetensors")
    (path / "c.safetensors").hardlink_to(path / "a.safetensors")
    assert read_model_facts(str(path)).size_bytes == 10


def test_a_config_that_cannot_be_read_hides_no_size(tmp_path: Path) -> None:
    path = folder(tmp_path / "m", {}, {"model.safetensors": 10})
    (path / "config.json").write_text("{")
    assert read_model_facts(str(path)) == ModelFacts(size_bytes=10)


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
