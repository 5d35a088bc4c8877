"""Which web pages may use the endpoint, and how the configuration names them."""

import pytest

from l40sd.config.load import load
from l40sd.config.origins import origin_problem
from l40sd.errors import L40sError
from l40sd.proxy.cors import Cors, preflight_fields


@pytest.mark.parametrize(
    "origin",
    [
        *("*", "null", "https://chat.example.org", "http://localhost:5173", "http://[::1]:3000", "app://obsidian.md"),
        *("tauri://localhost", "chrome-extension://abcdef", "http://my_host", "https://x.example:80"),
    ],
)
def test_an_origin_as_browsers_send_it_is_taken(origin: str) -> None:
    assert origin_problem(origin) == ("", "")


@pytest.mark.parametrize(
    ("origin", "hint"),
    [
        ("https://chat.example.org/", '"https://chat.example.org"'),
        ("https://chat.example.org/app?x=1", '"https://chat.example.org"'),
        ("HTTPS://Chat.Example.org", '"https://chat.example.org"'),
        ("https://chat.example.org:443", '"https://chat.example.org"'),
        ("http://localhost:80", '"http://localhost"'),
        ("chat.example.org", "e.g."),
        ("http://localhost:*", "e.g."),
        ("https://*.example.org", "e.g."),
        ("https://a, https://b", "e.g."),
        ("", "e.g."),
        ("http://a\r\nx: y", "e.g."),
    ],
)
def test_an_origin_that_no_browser_would_send_is_an_error_that_says_what_to_write(origin: str, hint: str) -> None:
    """It would never match, and the page would go on being refused without a word."""
    what, says = origin_problem(origin)
    assert what
    assert says.startswith(hint)
    with pytest.raises(L40sError, match="cors_origins"):
        load([("l40sd.toml", f"[models.m]\nengine = 'simulated'\n[proxy]\ncors_origins = [{origin!r}]\n")])


def test_only_configured_origins_are_named_in_replies() -> None:
    some, every = Cors(("https://a", "https://b")), Cors(("*",))
    assert b"allow-origin: https://a\r\n" in some.reply_fields(b"https://a")
    for other in (b"https://c", b"https://a.evil", b"https://A", b"", b"*", b"null"):
        assert some.reply_fields(other) == b"\r\nvary: Origin"
    assert b"allow-origin: *" in every.reply_fields(b"https://anything")


def test_no_name_of_a_field_is_made_up() -> None:
    assert b"allow-headers" not in preflight_fields((b"GET",), b"")
    assert b"allow-headers: a, b\r\n" in preflight_fields((b"GET",), b"a, b")
