"""Files of API keys as editors and people write them: every key is the whole key, or its line is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from l40sd.errors import ConfigError
from l40sd.proxy.key_file import key_changes, parse_keys

keys = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=20).filter(
    lambda key: not key.startswith("#")
)


@given(
    st.lists(keys, min_size=1, max_size=8),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["", "\ufeff"]),
    st.sampled_from(["", " ", "\t", "  # alice's", "\t#", " # a # b"]),
)
def test_whatever_stands_around_a_key_it_is_the_whole_key(wanted: list[str], end: str, mark: str, behind: str) -> None:
    """Seen: of `sk-hash#tail` the shorter `sk-hash` was valid and the key was not; one behind a BOM never was."""
    lines = ["# keys", "", *(f" {key}{behind}" for key in wanted), "   ", "#last"]
    assert parse_keys(mark + end.join(lines) + end, path="keys") == frozenset(wanted)


@pytest.mark.parametrize(
    "line", ["two words", "k\u00e9y", "a\tb", "a\x00", "a\x0cb", "a\u2028b", "\u200bkey", "k" * 4097, "a\rb"]
)
def test_a_line_that_no_client_could_send_is_refused_by_its_number_and_not_by_its_content(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_keys(f"# keys\nsk-good\n{line}\nsk-more\nanother bad\n", path="/etc/keys")
    said = str(caught.value)
    assert [problem.where for problem in caught.value.problems] == ["/etc/keys:3", "/etc/keys:5"]
    assert line not in said
    assert "sk-good" not in said


@pytest.mark.parametrize("text", ["", "\n\n", "# only comments\n", "\ufeff", "   #x\r\n"])
def test_a_file_without_a_key_would_let_nobody_in(text: str) -> None:
    with pytest.raises(ConfigError, match="has no key in it"):
        parse_keys(text, path="keys")


def test_changes_are_counted_and_keys_are_not_shown() -> None:
    assert key_changes({"a", "b"}, {"b", "c", "d"}) == ("proxy.api_keys_file: 2 keys added, 1 key removed",)
    assert key_changes({"a"}, {"a"}) == ()
    assert key_changes((), {"a"}) == ("proxy.api_keys_file: 1 key added",)
