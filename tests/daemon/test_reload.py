"""A reload does what it says: applied, or said when it will be."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from daemonkit import Site, SiteOf

from l40sd.errors import L40sError

TOY = """
[host]
inventory = "l40s-8"
[daemon]
pattern = "D"
[health]
probe_interval_s = 0.2
[models.toy]
engine = "simulated"
attention_heads = 8
"""


async def reloaded(site: Site) -> list[str]:
    changed: list[str] = (await site.post("/v1/reload"))["changed"]
    return changed


async def difference(site: Site) -> list[str]:
    return (await site.get("/v1/config/diff", dict[str, str]))["diff"].splitlines()


async def ask(site: Site, model: str, key: str) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
        session.post(
            f"{await site.url()}/v1/chat/completions", json=body, headers={"authorization": f"Bearer {key}"}
        ) as reply,
    ):
        return reply.status


async def test_what_needs_a_restart_is_said_every_time_until_then(site_of: SiteOf) -> None:
    """Seen: a reload said that the listener had changed, the next one and `config diff` that nothing differed."""
    site = site_of(TOY)
    await site.start()
    listening = (await site.status()).proxy.listen
    site.listen = "127.0.0.1:1"
    site.config = TOY + "[workers]\nlog_files = 7\n[proxy]\nretries = 1\n"
    site.write_config()
    told = await difference(site)
    assert await reloaded(site) == told
    assert "workers.log_files: 4 -> 7 (seen by each worker when it is started next)" in told
    assert "proxy.retries: 2 -> 1" in told
    left = await difference(site)
    assert len(left) == 1
    assert left[0].startswith('proxy.listen: ["127.0.0.1:0"] -> ["127.0.0.1:1"] (needs a restart: `systemctl restart')
    assert await reloaded(site) == left
    assert (await site.status()).proxy.listen == listening
    toml = (await site.get("/v1/config", dict[str, Any]))["toml"]
    assert 'listen = ["127.0.0.1:0"]' in toml, "show is what is in force"
    assert "retries = 1" in toml


async def test_changed_keys_are_told_and_in_force(site_of: SiteOf, tmp_path: Path) -> None:
    """Seen: `nothing changed` while the keys had."""
    keys = tmp_path / "keys"
    keys.write_text("sk-old#1\n")
    keys.chmod(0o600)
    site = site_of(TOY + f'[proxy]\napi_keys_file = "{keys}"\n')
    await site.start()
    await site.until_ready("D", 40)
    assert (await ask(site, "toy", "sk-old#1"), await ask(site, "toy", "sk-old")) == (200, 401)
    assert await reloaded(site) == []
    keys.write_text("# new\nsk-new\nsk-newer\n")
    sentence = "proxy.api_keys_file: 2 keys added, 1 key removed"
    assert await difference(site) == [sentence]
    assert await reloaded(site) == [sentence]
    assert (await ask(site, "toy", "sk-new"), await ask(site, "toy", "sk-old#1")) == (200, 401)
    keys.write_text("sk new\n")
    with pytest.raises(L40sError) as caught:
        await reloaded(site)
    assert f"{keys}:1" in str(caught.value)
    assert await ask(site, "toy", "sk-new") == 200, "the former ones stay in force"


class FarWorker:
    """A worker that somebody else runs: answers everything, and remembers with which key it was asked."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.address = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.keys.append(request.headers.get("authorization", ""))
        if request.path.endswith("/models"):
            return web.json_response({"object": "list", "data": [{"id": "far", "object": "model"}]})
        choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "text": "hi", "finish_reason": "stop"}
        return web.json_response({"id": "1", "object": "chat.completion", "model": "far", "choices": [choice]})


@pytest.fixture
async def far() -> AsyncIterator[FarWorker]:
    worker = FarWorker()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", worker.answer)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    worker.address = "http://{}:{}".format(*runner.addresses[0][:2])
    yield worker
    await runner.cleanup()


async def test_another_endpoint_key_is_used_from_the_reload_on(site_of: SiteOf, far: FarWorker) -> None:
    """Seen: the reload said that it had changed, and the former one was used until a restart."""
    text = f'{TOY}[models.far]\nengine = "external"\nendpoints = ["{far.address}"]\nendpoint_key = "KEY"\n'
    site = site_of(text.replace("KEY", "old"))
    await site.start()
    await site.until_ready("D", 40)
    assert await ask(site, "far", "any") == 200
    assert far.keys[-1] == "Bearer old"
    before = {w.id: w.pid for w in (await site.status()).workers}
    site.config_file.write_text(text.replace("KEY", "new"))
    assert await reloaded(site) == ["models.far.endpoint_key: changed"]
    await site.until_event("pattern.apply.complete", 40)
    assert await ask(site, "far", "any") == 200
    assert far.keys[-1] == "Bearer new"
    assert {w.id: w.pid for w in (await site.status()).workers} == before, "nobody else was touched"
