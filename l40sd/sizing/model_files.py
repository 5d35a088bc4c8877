"""A checkpoint on this machine's disk -> what it says of itself.

Reads a checkpoint's folder (config.json or params.json, *.safetensors), a GGUF file's header, or the local cache of a
hub id. Never asks a network. What cannot be read is unknown: the engine will say what it lacks. Blocking: call from a
thread.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from l40sd.model import ModelFacts
from l40sd.sizing.checkpoint import count, numbers_of, weights_of

JSON_LIMIT_BYTES = 64 << 20
"""An index names every tensor: 15 MB for a mixture of many experts, the largest known."""
GGUF_KEYS_LIMIT = 10_000
GGUF_HEADER_LIMIT_BYTES = 64 << 20
"""A header holds the tokenizer's vocabulary too: 5 to 15 MB for 150,000 tokens. Beyond this it is no model of ours."""


def read_model_facts(source: str, *, cache: Path | None = None) -> ModelFacts:
    """Return a model's facts; all unknown for a hub id that is not in the cache.

    Args:
        source: A path or a hub id, as the engine takes it.
        cache: The hub's local cache; by default where its own library has it ($HF_HUB_CACHE, $HF_HOME).
    """
    path = Path(source).expanduser()
    if not path.exists():
        snapshot = _snapshot(source, cache or _cache_folder())
        if snapshot is None:
            return ModelFacts(missing=_looks_local(source))
        path = snapshot
    try:
        return _folder_facts(path) if path.is_dir() else _file_facts(path)
    except (OSError, ValueError):
        return ModelFacts()


def _looks_local(source: str) -> bool:
    """Return whether a source can only be meant as a path: a hub id is NAME or OWNER/NAME, and no file name."""
    return source.startswith(("/", "./", "../", "~")) or source.count("/") > 1 or source.endswith(".gguf")


def _cache_folder() -> Path:
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or f"{home}/hub").expanduser()


def _snapshot(hub_id: str, cache: Path) -> Path | None:
    """Return the folder of the cached version that ``main`` names, else the newest one."""
    folder = cache / f"models--{hub_id.replace('/', '--')}"
    try:
        named = folder / "snapshots" / (folder / "refs/main").read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        named = folder / "snapshots" / "none"
    if named.is_dir():
        return named
    versions = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
    return max(versions, key=lambda path: path.stat().st_mtime, default=None)


# -- folders ----------------------------------------------------------------------------------------------------------


INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def _folder_facts(folder: Path) -> ModelFacts:
    heads, kv_heads, layers = numbers_of(_json(folder / "config.json"), _json(folder / "params.json"))
    return ModelFacts(attention_heads=heads, kv_heads=kv_heads, layers=layers, size_bytes=_size_of(folder) or None)


def _size_of(folder: Path) -> int:
    """Return the bytes of a folder's weights; a file that is there under two names counts once."""
    files = {path.name: path.stat() for path in folder.iterdir() if path.is_file()}
    maps = (_json(folder / index).get("weight_map") for index in INDEXES if index in files)
    indexed = next((set(map(str, each.values())) for each in maps if isinstance(each, Mapping)), set())
    weights = weights_of({name: status.st_size for name, status in files.items()}, indexed)
    return sum({(files[name].st_dev, files[name].st_ino): files[name].st_size for name in weights}.values())


def _json(file: Path) -> Mapping[str, Any]:
    """Return a file's table; empty where there is none, or none that makes sense."""
    try:
        if file.stat().st_size > JSON_LIMIT_BYTES:
            return {}
        table = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):  # the latter: JSON nested beyond reason
        return {}
    return table if isinstance(table, Mapping) else {}


# -- GGUF -------------------------------------------------------------------------------------------------------------

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def _file_facts(file: Path) -> ModelFacts:
    size = _size_with_shards(file)
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            return ModelFacts(size_bytes=size)
        table = _gguf_table(stream)
    kind = table.get("general.architecture", "")
    return ModelFacts(
        attention_heads=count(table, f"{kind}.attention.head_count"),
        kv_heads=count(table, f"{kind}.attention.head_count_kv"),
        layers=count(table, f"{kind}.block_count"),
        size_bytes=size,
    )


def _size_with_shards(file: Path) -> int:
    """Return the size of a file and, when it is the first of ``NAME-00001-of-00003.gguf``, of its siblings."""
    name, _, rest = file.name.rpartition("-00001-of-")
    siblings = list(file.parent.glob(f"{name}-?????-of-{rest}")) if name else []
    return sum(part.stat().st_size for part in siblings or [file])


def _gguf_table(stream: BinaryIO) -> dict[str, Any]:
    """Return the header's scalar and text values; arrays (the vocabulary) are stepped over.

    Raises:
        ValueError: Not version 2 or later, or larger than any header we know.

    Source: "File Structure" in ggml's docs/gguf.md.
    """
    version, _, count = struct.unpack("<IQQ", _bytes(stream, 20))
    if version < 2 or count > GGUF_KEYS_LIMIT:
        raise ValueError(f"GGUF version {version} with {count} keys")
    table: dict[str, Any] = {}
    for _ in range(count):
        key = _gguf_text(stream)
        value = _gguf_value(stream, *struct.unpack("<I", _bytes(stream, 4)))
        if value is not None:
            table[key] = value
    return table


def _gguf_value(stream: BinaryIO, kind: int) -> Any:
    if kind in _SCALARS:
        return struct.unpack(f"<{_SCALARS[kind]}", _bytes(stream, struct.calcsize(f"<{_SCALARS[kind]}")))[0]
    if kind == _STRING:
        return _gguf_text(stream)
    if kind != _ARRAY:
        raise ValueError(f"GGUF value of kind {kind}")
    inner, length = struct.unpack("<IQ", _bytes(stream, 12))
    if inner in _SCALARS:
        _bytes(stream, length * struct.calcsize(f"<{_SCALARS[inner]}"))
    elif inner == _ARRAY:
        raise ValueError("GGUF array of arrays")
    else:
        for _ in range(length):
            _gguf_value(stream, inner)
    return None


def _gguf_text(stream: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", _bytes(stream, 8))
    return _bytes(stream, length).decode(errors="replace")


def _bytes(stream: BinaryIO, count: int) -> bytes:
    """Return exactly so many bytes of the header.

    Raises:
        ValueError: The file ends, or the header is beyond its limit: a length in it is then not to be trusted.
    """
    if count > GGUF_HEADER_LIMIT_BYTES - stream.tell():
        raise ValueError("GGUF header beyond its limit")
    data = stream.read(count)
    if len(data) < count:
        raise ValueError("GGUF header ends early")
    return data
