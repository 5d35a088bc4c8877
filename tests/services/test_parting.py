"""A daemon that hands over: what becomes of connections that were told they may be used again."""

import asyncio
import json
import signal
from collections.abc import Callable

from l40sd.sim.site import Site

SiteOf = Callable[[str], Site]

SLOW = """
[host]
inventory = "l40s-8"
[daemon]
pattern = "wide"
[models.toy]
engine = "simulated"
attention_heads = 8
args = ["--tokens-per-s", "40"]
[[patterns.wide.replicas]]
model = "toy"
tp = 4
count = 1
"""
PATIENCE_S = 30.0


def request(*, tokens: int, stream: bool) -> bytes:
    body = json.dumps({"model": "toy", "max_tokens": tokens, "stream": stream, "messages": []}).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nhost: here\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


async def test_the_request_after_a_stream_that_an_upgrade_waited_for_is_answered(site_of: SiteOf) -> None:
    """The stream's head said that the connection stays; it was closed with the last byte, and clients that went
    straight on lost their next request: 23 of 65 streams in a long run over upgrades."""
    site = site_of(SLOW)
    await site.start()
    address = (await site.until_ready("wide", PATIENCE_S)).proxy.listen[0]
    host, _, port = address.rpartition(":")
    async with asyncio.timeout(PATIENCE_S):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(request(tokens=40, stream=True))
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"connection: close" not in head
        site.signal(signal.SIGUSR2)
        await reader.readuntil(b"data: [DONE]\n\n")
        await reader.readuntil(b"\r\n0\r\n\r\n")
        writer.write(request(tokens=2, stream=False))
        reply = await reader.read()  # to the end: it is the connection's last
        writer.close()
    assert reply.startswith(b"HTTP/1.1 200")
    assert b"\r\nconnection: close\r\n" in reply
