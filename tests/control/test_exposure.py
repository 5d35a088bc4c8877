"""Who reaches an address that the proxy listens on."""

import pytest

from l40sd.control.exposure import connects_to, is_loopback


@pytest.mark.parametrize(
    ("address", "loopback", "target"),
    [
        ("127.0.0.1:8080", True, ("127.0.0.1", 8080)),
        ("127.8.0.1:8080", True, ("127.8.0.1", 8080)),
        ("localhost:8080", True, ("localhost", 8080)),
        ("[::1]:8080", True, ("::1", 8080)),
        ("unix:/run/x.sock", True, "/run/x.sock"),
        ("0.0.0.0:8080", False, ("127.0.0.1", 8080)),
        ("[::]:8080", False, ("::1", 8080)),
        ("10.0.0.7:8080", False, ("10.0.0.7", 8080)),
        ("gpu7.lan:8080", False, ("gpu7.lan", 8080)),
        ("127.0.0.1:0", True, None),
    ],
)
def test_what_an_address_is_open_to(address: str, loopback: bool, target: object) -> None:
    assert (is_loopback(address), connects_to(address)) == (loopback, target)
