"""What a client may send costs no more than in proportion to its size: patterns proven, steps counted.

Once, a form's head of 160 KB took 6 s and one of 420 KB over 30, a ``Connection`` field with 5000 names 0.6 s, and the
loop that serves everybody stood still meanwhile. Time is no measure on a busy machine, so none is taken here.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import ModuleType
from typing import Any

import pytest

from l40sd.proxy import admission, request_reader
from l40sd.proxy.http1 import cached_heads, chunked, request_body
from l40sd.proxy.http1 import heads as http_heads
from l40sd.proxy.http1.chunked import ChunkedBody
from l40sd.proxy.http1.heads import parse_request, parse_response
from l40sd.proxy.http1.request_body import CachedModelName, find_model, replace_model
from l40sd.proxy.refused import Refused

parser: Any = re._parser  # type: ignore[attr-defined]  # the only one there is that reads patterns as re does
SCANNING = ("search", "split", "finditer")
NOT_FOR_CLIENTS = ("_chunk_line",)  # looks at the last bytes of a worker's reply, once, in an upgrade

# -- patterns


def patterns() -> Iterator[tuple[str, re.Pattern[bytes], str]]:
    for module in (cached_heads, chunked, http_heads, request_body, admission, request_reader):
        yield from patterns_of(module)


def patterns_of(module: ModuleType) -> Iterator[tuple[str, re.Pattern[bytes], str]]:
    for name, value in vars(module).items():
        pattern = value if isinstance(value, re.Pattern) else getattr(value, "__self__", None)
        if isinstance(pattern, re.Pattern) and name not in NOT_FOR_CLIENTS:
            yield f"{module.__name__}.{name}", pattern, getattr(value, "__name__", "")


PATTERNS = list(patterns())


def repeats(tree: Any) -> Iterator[tuple[bool, Any]]:
    """Yield every repeat without a bound: whether it gives nothing back, and what it repeats."""
    for op, value in tree:
        if op in (parser.MAX_REPEAT, parser.MIN_REPEAT, parser.POSSESSIVE_REPEAT):
            _, most, inner = value
            if most == parser.MAXREPEAT:
                yield op is parser.POSSESSIVE_REPEAT, inner
        for part in value if isinstance(value, (tuple, list)) else ():
            for inner in part if isinstance(part, list) else [part]:
                if isinstance(inner, parser.SubPattern):
                    yield from repeats(inner)


def first_byte(tree: Any) -> int | None:
    op, value = next((op, value) for op, value in tree if op is not parser.ASSERT_NOT)
    return value if op is parser.LITERAL else None


@pytest.mark.parametrize(("name", "pattern", "way"), PATTERNS, ids=[name for name, *_ in PATTERNS])
def test_every_pattern_is_linear(name: str, pattern: re.Pattern[bytes], way: str) -> None:
    """No repeat gives back what it took; where a match may begin anywhere, none takes the byte that begins one."""
    tree = parser.parse(pattern.pattern, pattern.flags)
    for gives_nothing_back, inner in repeats(tree):
        assert gives_nothing_back, f"{name} can try one stretch in many ways"
        if way in SCANNING:
            begin = first_byte(tree)
            assert begin is not None, f"{name} begins anywhere"
            assert not can_match(inner, begin), f"{name} reads one stretch from many beginnings"


def can_match(tree: Any, byte: int) -> bool:
    """Whether a repeated part may hold this byte; the parts here are single bytes, sets of them, or sequences."""
    for op, value in tree:
        if op is parser.LITERAL and value == byte:
            return True
        if op is parser.ANY or (op is parser.NOT_LITERAL and value != byte):
            return True
        if op is parser.IN and holds(value, byte):
            return True
        for part in value if isinstance(value, (tuple, list)) else ():
            for inner in part if isinstance(part, list) else [part]:
                if isinstance(inner, parser.SubPattern) and can_match(inner, byte):
                    return True
    return False


def holds(members: Any, byte: int) -> bool:
    found = any(
        (op is parser.LITERAL and value == byte)
        or (op is parser.RANGE and value[0] <= byte <= value[1])
        or op is parser.CATEGORY
        for op, value in members
    )
    return found != (members[0][0] is parser.NEGATE)


@pytest.mark.parametrize(
    ("pattern", "way"),
    [
        (rb"(?i:content-disposition:[^\r\n]*;[ \t]*name)", "search"),  # the one that stood still
        (rb"content-disposition:[^\r\n]*+;", "search"),  # begins anew at each of many
        (rb"(?:a|b)*c", "match"),
    ],
)
def test_a_pattern_that_is_not_linear_is_told(pattern: bytes, way: str) -> None:
    with pytest.raises(AssertionError):
        test_every_pattern_is_linear("planted", re.compile(pattern), way)


# -- steps


class Looked(bytes):
    """Bytes that count how many of them were looked at to find something, or copied."""

    looked = 0

    def find(self, sub: Any, start: Any = 0, end: Any = None) -> int:
        found = super().find(sub, start, end)
        type(self).looked += (found if found >= 0 else len(self) if end is None else end) - start
        return found

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if not isinstance(found, bytes):
            return found
        type(self).looked += len(found)
        return type(self)(found)

    def __radd__(self, before: bytes) -> "Looked":
        return type(self)(before + bytes(self))


def steps(act: Callable[[], object]) -> int:
    """Return the calls that it makes, of Python's own functions too, and the kilobytes that it looks through."""
    count = 0

    def on_event(_frame: object, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    Looked.looked = 0
    before = sys.getprofile()
    sys.setprofile(on_event)
    try:
        with suppress(Refused):
            act()
    finally:
        sys.setprofile(before)
    return count + Looked.looked // 1024


FORM = b"multipart/form-data; boundary=b"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\n"


def fed(data: bytes) -> Callable[[], object]:
    return lambda: ChunkedBody(1 << 30).feed(Looked(data))


def form(data: bytes) -> Callable[[], object]:
    return lambda: find_model(Looked(data), FORM)


def named(data: bytes) -> Callable[[], object]:
    return lambda: replace_model(Looked(data), b"application/json", "m")


ACTS: dict[str, Callable[[int], Callable[[], object]]] = {
    "a part's head that repeats its field": lambda n: form(
        b"--b\r\n" + b"content-disposition:" * (20 * n) + b"\r\n\r\nx\r\n--b--\r\n"
    ),
    "a part's head of many lines": lambda n: form(
        b"--b\r\n" + b"content-disposition: form-data; name=a\r\n" * (20 * n) + b"\r\nx\r\n--b--\r\n"
    ),
    "many parts": lambda n: form(b"--b\r\na: b\r\n\r\nx\r\n" * (20 * n) + b"--b--\r\n"),
    "lines that only begin like a delimiter": lambda n: form(b"--b\r\na: b\r\n\r\n" + b"\r\n--bb" * (20 * n)),
    "a form that does not end": lambda n: form(b"--b\r\na: b\r\n\r\n" + b"\r\n--" * (400 * n)),
    "names in Connection": lambda n: (
        lambda: parse_request(
            HEAD + b"Connection: " + b",".join(b"a%d" % i for i in range(20 * n)) + b"\r\n" + b"x:\r\n" * 200 + b"\r\n"
        )
    ),
    "Connection fields": lambda n: lambda: parse_request(HEAD + b"Connection: a\r\n" * (20 * n) + b"\r\n"),
    "names in a reply's Connection": lambda n: (
        lambda: parse_response(
            b"HTTP/1.1 200 OK\r\nConnection: " + b",".join(b"a%d" % i for i in range(20 * n)) + b"\r\n\r\n"
        )
    ),
    "names in a reply's Connection, and other fields": lambda n: (
        lambda: parse_response(
            b"HTTP/1.1 200 OK\r\nConnection: "
            + b",".join(b"a%d" % i for i in range(20 * n))
            + b"\r\nx: 1" * (20 * n)
            + b"\r\n\r\n"
        )
    ),
    "small chunks": lambda n: fed(b"1\r\na\r\n" * (500 * n)),
    "objects within objects": lambda n: named(b'{"a":' * (20 * n) + b"1" + b"}" * (20 * n) + b',"model":"m"}'),
    "keys called model": lambda n: named(b"{" + b'"model":"m",' * (20 * n) + b'"a":1}'),
    "nested keys called model": lambda n: named(b'{"a":[' + b'{"model":1},' * (20 * n) + b'1],"model":"x"}'),
    "strings": lambda n: named(b'{"a":[' + b'"",' * (400 * n) + b'{"model":1}],"model":"x","b":[[]]}'),
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_steps_grow_no_faster_than_the_size(act: Callable[[int], Callable[[], object]]) -> None:
    for n in (4, 16, 64):
        small, large = steps(act(n)), steps(act(4 * n))
        assert large <= 4 * small + 64, f"{n} times: {small}, {4 * n} times: {large}"


@pytest.mark.parametrize(
    ("body", "content_type"),
    [
        (b"--b\r\n" + b"content-disposition:" * 21000 + b"\r\n\r\nx\r\n--b--\r\n", FORM),
        (b"--b\r\na: b\r\n\r\nx\r\n" * 300 + b"--b--\r\n", FORM),
        (b'{"a":' + b"[" * 2000 + b"]" * 2000 + b',"model":"m","b":{"c":{"d":1}}}', b"application/json"),
    ],
    ids=["a part's head", "parts", "depth"],
)
def test_beyond_a_bound_the_request_is_refused(body: bytes, content_type: bytes) -> None:
    with pytest.raises(Refused) as caught:
        find_model(body, content_type)
    assert caught.value.status == 400


def test_a_body_in_many_small_chunks_is_refused_and_one_in_some_is_not() -> None:
    """11 MB in chunks of two bytes took 260 MB and kept everybody waiting for 9 s."""
    body = ChunkedBody(1 << 30)
    assert body.feed(b"2\r\naa\r\n" * chunked.CHUNKS_FREE) is None
    assert body.feed(b"400\r\n%b\r\n" % (b"a" * 1024) * chunked.CHUNKS_FREE) is None
    with pytest.raises(Refused) as caught:
        ChunkedBody(1 << 30).feed(b"2\r\naa\r\n" * (chunked.CHUNKS_FREE + chunked.CHUNKS_FREE // 16))
    assert caught.value.status == 400


def test_a_client_may_name_a_few_fields_in_connection_and_send_many() -> None:
    few = b"Connection: x, y, keep-alive\r\nx: 1\r\nz: 1\r\ny: 1\r\n"
    assert parse_request(HEAD + few + b"\r\n").fields == b"\r\nz: 1"
    for extra, status in ((b"Connection: " + b"a," * 17 + b"\r\n", 400), (b"x:\r\n" * 300, 431)):
        with pytest.raises(Refused) as caught:
            parse_request(HEAD + extra + b"\r\n")
        assert caught.value.status == status


@pytest.mark.parametrize(
    "body",
    [b"{" + b" " * (1 << 20) + b'"model":"m"}', b'{"a":1,"model":"m"' + b" " * (1 << 20) + b"}"],
    ids=["before it", "behind it"],
)
def test_little_is_kept_of_a_body_to_know_the_next_one_by(body: bytes) -> None:
    """It stays for as long as its connection does."""
    memory = CachedModelName()
    assert memory.name(body, b"application/json") == memory.name(body, b"application/json") == "m"
    assert all(len(getattr(memory, name)) <= request_body.KEPT_BYTES for name in memory.__slots__)


def form_with(parts: int, head_bytes: int) -> bytes:
    """Return a form that names its model in the last of so many parts, under a head of about so many bytes."""
    head = b'content-disposition: form-data; name="model"\r\nx: ' + b"y" * head_bytes
    return b"--b\r\na: b\r\n\r\nx\r\n" * (parts - 1) + b"--b\r\n" + head + b"\r\n\r\nm\r\n--b--\r\n"


@pytest.mark.parametrize(
    ("within", "beyond", "says"),
    [
        (form_with(request_body.PARTS_LIMIT - 1, 1), form_with(request_body.PARTS_LIMIT, 1), "parts"),
        (form_with(1, 4000), form_with(1, request_body.PART_HEAD_LIMIT_BYTES), "head"),
    ],
    ids=["parts", "a part's head"],
)
def test_a_form_is_understood_up_to_a_bound_and_refused_for_it_beyond(within: bytes, beyond: bytes, says: str) -> None:
    assert find_model(within, FORM).name == "m"
    with pytest.raises(Refused, match=says):
        find_model(beyond, FORM)


def test_a_model_in_the_middle_is_looked_for_up_to_a_bound() -> None:
    def body(strings: int, keys: int) -> bytes:
        return b'{"a":[' + b'"",' * strings + b'{"model":1},' * keys + b'1],"model":"x","b":[[]]}'

    assert b'"model":"m"' in replace_model(body(1000, 100), b"application/json", "m")
    for beyond in (body(request_body.STRINGS_LIMIT, 0), body(0, request_body.KEYS_LIMIT)):
        with pytest.raises(Refused, match=r"put .* first"):
            replace_model(beyond, b"application/json", "m")
