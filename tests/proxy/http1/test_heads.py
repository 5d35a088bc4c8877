import json
from contextlib import suppress

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from l40sd.proxy.http1.cached_heads import cached_reply_head, cached_request_head
from l40sd.proxy.http1.chunked import ChunkedBody
from l40sd.proxy.http1.heads import format_request, parse_request, parse_response
from l40sd.proxy.http1.request_body import CachedModelName, find_model, replace_model
from l40sd.proxy.refused import Refused

names = st.text("abcXYZ019-_", min_size=1, max_size=12).map(lambda name: f"x-a-{name}")
values = st.text(st.characters(codec="latin-1", exclude_categories=("Cc",)), max_size=30)


def head_of(fields: list[tuple[str, str]], line: str = "POST /v1/x?a=b HTTP/1.1") -> bytes:
    lines = [line, "Host: here", *(f"{name}: {value}" for name, value in fields)]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


@given(st.lists(st.tuples(names, values), max_size=12), st.integers(0, 10**9))
def test_unremarkable_fields_are_passed_on_byte_for_byte(fields: list[tuple[str, str]], length: int) -> None:
    request = parse_request(head_of([*fields, ("Content-Length", str(length))]))
    expected = b"".join(f"\r\n{name}: {value}".encode("latin-1") for name, value in fields)
    assert (request.fields, request.content_length, request.target) == (expected, length, b"/v1/x?a=b")


@given(st.binary(max_size=300))
def test_any_bytes_are_either_a_head_or_refused(data: bytes) -> None:
    with suppress(Refused):
        parse_request(data + b"\r\n\r\n")


@given(st.lists(st.tuples(names, values), max_size=6), st.data())
def test_a_head_with_any_one_byte_changed_never_smuggles_a_length(
    fields: list[tuple[str, str]], data: st.DataObject
) -> None:
    """What is passed on has exactly one length and no transfer coding, whatever came in."""
    head = bytearray(head_of([*fields, ("Content-Length", "5"), ("X-End", "1")]))
    head[data.draw(st.integers(0, len(head) - 5))] = data.draw(st.integers(0, 255))
    try:
        request = parse_request(bytes(head))
    except Refused:
        return
    sent = format_request(request, b"/v1/x", b"id", 5, b"\r\nhost: worker:1").lower()
    assert sent.count(b"\r\ncontent-length:") == sent.count(b"\r\nhost:") == 1
    assert b"\r\ntransfer-encoding:" not in sent
    assert sent.count(b"\r\n\r\n") == 1
    assert b"\n" not in sent.replace(b"\r\n", b"")


@given(st.lists(st.tuples(names, values), max_size=6), st.integers(0, 10**6), st.integers(0, 10**6), st.data())
def test_a_template_says_what_parsing_says(
    fields: list[tuple[str, str]], one: int, other: int, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(fields)))

    def head(length: object) -> bytes:
        return head_of([*fields[:at], ("Content-Length", str(length)), *fields[at:]])

    first = parse_request(head(one))
    template = cached_request_head(first, head(one))
    assert template is not None
    again = head(other)
    assert template.end_in(again + b"body") == len(again)
    parsed = parse_request(again)
    assert (template.request.content_length, template.request.fields) == (other, parsed.fields)
    for bad in ("", "+5", "5 ", "5x", "9" * 16, "5\r\nx-b: 1"):
        assert not template.end_in(head(bad))


def test_no_template_for_what_must_be_looked_at_each_time() -> None:
    for extra in ([], [("Transfer-Encoding", "chunked")], [("Content-Length", "1"), ("Connection", "close")]):
        head = head_of(extra)
        assert cached_request_head(parse_request(head), head) is None


def test_the_absolute_form_is_taken_for_its_path() -> None:
    for target, path in (("http://here", b"/"), ("HTTP://here:80/v1/x?y", b"/v1/x?y"), ("http://here?y", b"/?y")):
        assert parse_request(head_of([], f"POST {target} HTTP/1.1")).target == path


def test_a_responses_own_fields_stay_and_hop_by_hop_ones_go() -> None:
    head = parse_response(
        b"HTTP/1.1 200 OK\r\nConnection: close, X-Mine\r\nX-Mine: 1\r\n"
        b"Content-Length: 2\r\nX-L40S-Worker: x\r\nA:b\r\n\r\n"
    )
    assert head.lines == b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nA:b"
    assert (head.status, head.is_framed, head.is_chunked, head.is_event_stream) == (200, True, False, False)
    stream = parse_response(
        b"HTTP/1.1 200 OK\r\ncontent-type: Text/Event-Stream; x\r\ntransfer-encoding: Chunked\r\n\r\n"
    )
    assert (stream.is_chunked, stream.is_event_stream) == (True, True)
    assert not parse_response(b"HTTP/1.0 200 OK\r\n\r\n").is_framed


ALIKE = [  # each a field, or none, in forms that differ in digits only
    (b"date: Thu, 01 Jan 1970 00:00:00 GMT", b"date: Thu, 09 Jan 2026 11:22:33 GMT"),
    (b"x-a: 7", b"x-a: 8"),
    (b"x-l40s-worker: w", b"x-l41s-worker: w"),
    (b"connection: close",),
    (b"X-Request-Id: 1", b"X-Request-Id: 2"),
    (b"transfer-encoding: chunked",),
    (b"content-length: 3", b"content-length: 4"),
    (b"Access-Control-Allow-Origin: ",),
    (b"access-control-max-age: 600", b"access-control-max-age: 601"),
    (b"Keep-Alive: timeout=5, max=100", b"Keep-Alive: timeout=5, max=101"),
    (b"connection: x-a, x-b",),
]
STATUS_LINES = [b"HTTP/1.1 200 OK", b"HTTP/1.1 204 OK", b"HTTP/1.1 404 OK", b"HTTP/1.1 503 OK", b"HTTP/1.0 200 OK"]
kinds = st.lists(st.sampled_from(ALIKE), max_size=2)


@st.composite
def replies(draw: st.DrawFn, lines: list[bytes], fields: list[tuple[bytes, ...]]) -> tuple[bytes, list[bytes], int]:
    return draw(st.sampled_from(lines)), [draw(st.sampled_from(f)) for f in fields], draw(st.integers(10, 99))


def reply_head(line: bytes, fields: list[bytes], length: int) -> bytes:
    return b"\r\n".join([line, *fields, b"Content-Length: %d" % length, b"", b""])


@settings(max_examples=examples(600))
@given(kinds, st.sampled_from([0, 0, 0, 1, -1]), st.data())
def test_a_known_kind_of_reply_says_what_parsing_says(
    fields: list[tuple[bytes, ...]], more: int, data_of: st.DataObject
) -> None:
    seen = data_of.draw(replies(STATUS_LINES, fields))
    now = data_of.draw(replies([seen[0]] * len(STATUS_LINES) + STATUS_LINES, fields))
    known = cached_reply_head(reply_head(*seen), parse_response(reply_head(*seen)))
    head = reply_head(*now)
    data = head + b"y" * (now[2] + more)
    if known is None or not known.is_whole(data):
        return
    parsed = parse_response(head)
    assert len(data) == len(head) + now[2], "it is whole"
    assert (known.status, known.end, known.line_end) == (parsed.status, len(head), len(now[0]))
    passed_on = data[known.line_end :] if known.passed_on is None else known.rest_of(data)
    assert parsed.lines + b"\r\n\r\n" + data[len(head) :] == data[: known.line_end] + passed_on
    assert len(fields) == sum(b"content-length" not in field[0] for field in fields), "there is one length"
    assert not parsed.is_chunked
    assert 200 <= parsed.status < 500


def test_the_usual_reply_is_known_by_its_second_time() -> None:
    first = reply_head(b"HTTP/1.1 200 OK", [b"date: Thu, 01 Jan 1970 00:00:00 GMT", b"server: uvicorn"], 17)
    later = reply_head(b"HTTP/1.1 200 OK", [b"date: Thu, 22 Jan 1970 13:14:15 GMT", b"server: uvicorn"], 99)
    known = cached_reply_head(first, parse_response(first))
    assert known is not None
    assert known.is_whole(later + b"y" * 99)
    assert not known.is_whole(later + b"y" * 98)
    assert not known.is_whole(later.replace(b"200", b"500") + b"y" * 99)


def test_llama_cpps_usual_reply_is_known_too() -> None:
    """Each of them would be parsed for the sake of two fields that are taken out every time."""
    left_out = [b"Access-Control-Allow-Origin: ", b"Keep-Alive: timeout=5, max=100"]
    head = reply_head(b"HTTP/1.1 200 OK", [b"Server: llama.cpp", left_out[0], b"x: y", left_out[1]], 17)
    known = cached_reply_head(head, parse_response(head))
    assert known is not None
    assert known.is_whole(head + b"y" * 17)
    assert known.rest_of(head + b"y" * 17) == b"\r\nServer: llama.cpp\r\nx: y\r\nContent-Length: 17\r\n\r\n" + b"y" * 17


# -- chunked bodies


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=8), st.binary(max_size=20), st.data())
def test_a_chunked_body_is_found_however_its_bytes_are_split(
    parts: list[bytes], after: bytes, data: st.DataObject
) -> None:
    framed = b"".join(b"%x;e=1\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\nx-t: 1\r\n\r\n"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(framed)), max_size=10)))
    body = ChunkedBody(1000)
    rest = None
    pieces = [framed[a:b] for a, b in zip([0, *cuts], [*cuts, len(framed)], strict=True)]
    for piece in pieces[:-1]:
        if piece:
            assert rest is None
            rest = body.feed(piece)
    if rest is None:
        rest = body.feed(pieces[-1] + after)
        assert rest == after
    assert bytes(body.content) == b"".join(parts)


@given(st.lists(st.binary(max_size=60), max_size=8))
def test_any_bytes_are_a_chunked_body_or_refused_and_bounded(pieces: list[bytes]) -> None:
    body = ChunkedBody(100)
    with suppress(Refused):
        for piece in pieces:
            if body.feed(piece) is not None:
                break
    assert len(body.content) <= 100


# -- the model in the body

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text('ab"\\{}[],:model \u00e9', max_size=12),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["model", "a", "b"]), inner, max_size=3)
    ),
    max_leaves=12,
)
keys = st.sampled_from(["a", "messages", "tools", "n", 'x"model"', "models"])


@given(
    st.dictionaries(keys, json_values, max_size=4),
    st.text(min_size=1, max_size=10),
    st.text(min_size=1, max_size=10),
    st.data(),
    st.booleans(),
    st.sampled_from([None, 1]),
    st.sampled_from([0, 5000]),
)
def test_the_top_level_model_is_found_and_replaced_and_nothing_else(
    fields: dict[str, object], name: str, new: str, data: st.DataObject, ascii_only: bool, indent: int | None, pad: int
) -> None:
    items = list(fields.items())
    items.insert(data.draw(st.integers(0, len(items))), ("model", name))
    whole = dict([("pad", "y" * pad), *items])
    body = json.dumps(whole, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    before = b'x-a: {"model":"wrong"}\r\n\r\n'
    for start in (0, len(before)):  # the body alone, or as it was read, behind its head
        read = before[:start] + body
        field = find_model(read, b"application/json", start)
        assert field.name == name
        replaced = json.loads(replace_model(read, b"application/json", new, start))
        assert list(replaced.items()) == list({**whole, "model": new}.items())


@given(
    st.lists(
        st.tuples(st.sampled_from("ab"), st.sampled_from(["first", "last", "both"]), st.integers(0, 3), st.booleans()),
        min_size=1,
        max_size=6,
    )
)
def test_a_connections_memory_says_what_looking_says(bodies: list[tuple[str, str, int, bool]]) -> None:
    memory = CachedModelName()
    for name, where, tokens, is_behind_a_head in bodies:
        pairs = [("messages", ["x"]), ("max_tokens", tokens)]
        pairs = [("model", name), *pairs] if where == "first" else [pairs[0], ("model", name), pairs[1]]
        text = json.dumps(dict(pairs))
        if where == "both":  # twice: either may be taken, but the same one each time
            text = text.replace("{", '{"model": "c", ', 1)
        start = 5 if is_behind_a_head else 0
        body = b"h" * start + text.encode()
        assert memory.name(body, b"application/json", start) == find_model(body, b"application/json", start).name


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'"model"',
        b"{",
        b'{"model":1}',
        b'{"model":null}',
        b'{"a":{"model":"x"}}',
        b'{"a":1,"model":',
        b"\xff",
    ],
)
def test_a_body_without_a_model_is_refused(body: bytes) -> None:
    with pytest.raises(Refused) as caught:
        find_model(body, b"application/json")
    assert caught.value.status == 400


@given(st.binary(max_size=80), st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12))
def test_a_forms_model_is_found_beside_any_file(file: bytes, name: str) -> None:
    if b"--zz" in file:
        return
    form = (
        b'--zz\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n%b\r\n'
        b"--zz\r\ncontent-disposition: form-data; name=model\r\n\r\n%b\r\n--zz--\r\n" % (file, name.encode())
    )
    field = find_model(form, b'Multipart/form-data; charset=x; boundary="zz"')
    assert field.name == name
    assert replace_model(form, b'Multipart/form-data; charset=x; boundary="zz"', "new") == form.replace(
        b"\r\n\r\n%b\r\n--zz--" % name.encode(), b"\r\n\r\nnew\r\n--zz--"
    )


@pytest.mark.parametrize(
    "content_type", [b"multipart/form-data", b"multipart/form-data; boundary=", b"multipart/form-data; boundary=other"]
)
def test_a_form_that_cannot_be_read_is_refused(content_type: bytes) -> None:
    with pytest.raises(Refused):
        find_model(b'--zz\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n--zz--\r\n', content_type)
