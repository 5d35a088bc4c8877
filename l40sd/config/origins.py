"""The web pages that ``[proxy] cors_origins`` may name. Source: RFC 6454 for an origin's text."""

import re

EVERYBODY = "*"

_origin = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?:\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")
_own_port = {"http": "80", "https": "443"}


def origin_problem(origin: str) -> tuple[str, str]:
    """Return what is wrong with a configured origin and what to write instead; empty texts when nothing is."""
    if origin in (EVERYBODY, "null"):
        return "", ""
    match = _origin.fullmatch(origin)
    if match is None:
        bare = re.sub(r"(?<=[^/:])/.*", "", origin.lower())
        hint = f'"{bare}"' if _origin.fullmatch(bare) else 'e.g. "https://chat.example.org" or "http://localhost:5173"'
        return f'"{origin}" is no origin: scheme://host or scheme://host:port in lower case, or "*"', hint
    if match["port"] is not None and match["port"] == _own_port.get(match["scheme"]):
        return f'"{origin}" is never sent: browsers leave the usual port out', f'"{origin.rpartition(":")[0]}"'
    return "", ""
