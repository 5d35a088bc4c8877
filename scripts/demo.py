"""The demo's story, told by the real programs: see scripts/demo.

What is printed below a step is the output of `l40sctl` itself, or a reply that came through the proxy. Nothing
is staged: when a step fails, the demo says which and why, cleans up, and ends with status 1. It stays below 60 lines
in a pipe, too, where each line is written once and stays.
"""

import argparse
import asyncio
import json
import re
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import psutil
from daemonkit import Site
from loadkit import Mix, Tally, load
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from l40sd.control.messages import Status
from l40sd.errors import L40sError

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".demo"
ENGINE = ROOT / ".cache" / "engine"
BIN = Path(sys.executable).parent
STEPS = 7

CONFIG = f"""\
# Written by scripts/demo.
[daemon]
pattern = "A"

[host]
inventory = "l40s-12-4+2"     # a recorded host: two sockets, 12 L40S below PCIe switches of four and two

[models.smollm2]
engine = "llama-cpp"
source = "{ENGINE / "models" / "smollm2-135m.gguf"}"
aliases = ["gpt-4o-mini"]
# 135 million parameters stand in for 70 billion. Its 9 attention heads could not be split in two, so this says 64.
attention_heads = 64
args = ["-t", "1", "-c", "4096", "-np", "4", "--no-warmup"]
"""

console = Console(highlight=False, soft_wrap=True)  # long lines are the terminal's to wrap: copied, they are whole


class Story:
    """Numbered steps: each says what it does, then how it went."""

    def __init__(self) -> None:
        self.number = 0
        self.what = ""

    @asynccontextmanager
    async def step(self, what: str) -> AsyncIterator[None]:
        """Name the step and do what is in the block."""
        self.number += 1
        self.what = what
        console.print(f"\n[bold cyan]{self.number}/{STEPS}[/]  [bold]{what}[/]")
        yield


async def main(*, stay: bool, port: int) -> int:
    """Tell the story; return the exit status."""
    story = Story()
    began_s = time.monotonic()
    stop_earlier()
    site = Site(folder=FOLDER, config=CONFIG, programs=(ENGINE / "programs", BIN), listen=f"127.0.0.1:{port}")
    try:
        tally = await tell(story, site, stay=stay)
    except (L40sError, aiohttp.ClientError, OSError, TimeoutError) as error:
        console.print(f"\n[bold red]step {story.number} failed:[/] {story.what}\n", end="")
        console.print(str(error) or repr(error), markup=False)
        console.print(f"\nthe end of the daemon's log:\n{site.tail(8)}\n", markup=False, soft_wrap=True)
        return 1
    except asyncio.CancelledError:
        console.print("\ninterrupted: stopping")
        raise
    finally:
        if not (stay and story.number == STEPS):
            await end(site)
    console.print(
        f"\n[bold]{tally.answered} requests answered, {tally.failed} failed, {tally.truncated} cut short[/]"
        f" during the pattern change; the whole demo took {time.monotonic() - began_s:.0f} s."
    )
    return 1 if tally.lost else 0


async def tell(story: Story, site: Site, *, stay: bool) -> Tally:
    """Do the steps; return the account of the load."""
    async with story.step("start l40sd on a recorded host with 12 L40S (no GPU needed)"):
        first = await site.start()
        console.print(f"     l40sd {first.version}, files in .demo/")
    async with story.step("pattern A: one llama.cpp server on each GPU"):
        await come_up(site, "A", 12)
    async with story.step("ask the endpoint, as any OpenAI client would"):
        await chat(await site.url(), "In one sentence: what is a GPU good at?")
    async with story.step("the host it runs on: which GPUs are close to each other"):
        await l40sctl(site, "topology", "--short")
    async with story.step("l40sctl switch-pattern B, with a load on: 12 single GPUs become 6 pairs"):
        mix = Mix(url=await site.url(), models=("smollm2", "gpt-4o-mini"), streams=4, shorts=2)
        async with load(mix) as tally:
            await l40sctl(site, "switch-pattern", "B")
        console.print(
            f"     while it changed: [bold]{tally.answered} answered[/], {tally.failed} failed, "
            f"{tally.truncated} cut short; {tally.tokens} tokens, slowest answer {tally.longest_s():.1f} s"
        )
        for example in tally.examples:
            console.print(f"     [red]lost:[/] {example}", markup=True)
    async with story.step("the same host, reshaped"):
        await l40sctl(site, "status")
    if stay:
        story.number += 1
        suggest(site, await site.status())
        return tally
    async with story.step("stop it, and look for what is left"):
        code = await site.stop()
        left = site.leftovers()
        if code != 0 or left:
            raise L40sError(f"exit status {code}, left behind: {left or 'nothing'}")
        console.print("     exit status 0, no process left, .demo/ removed")
    return tally


async def come_up(site: Site, pattern: str, workers: int) -> Status:
    """Show the workers becoming ready; return the status when all are."""
    columns = (TextColumn("     ready"), BarColumn(bar_width=36), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("ready", total=workers)

        def show(status: Status) -> bool:
            ready = sum(worker.phase == "ready" for worker in status.workers)
            progress.update(bar, completed=ready)
            return status.pattern == pattern and ready == workers

        return await site.until(show, f"{workers} workers are ready", 120.0)


async def chat(url: str, question: str) -> None:
    """Stream one answer to the terminal as its pieces come.

    Raises:
        L40sError: The reply is no 200, or the stream does not end in [DONE].
    """
    body = {
        "model": "gpt-4o-mini",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": 60,
        "stream": True,
    }
    console.print(f"     curl {url}/v1/chat/completions -d '{json.dumps(body)[:60]}...'", markup=False)
    console.print(f"     [dim]{question}[/]\n     ", end="")
    began_s, first_s, pieces, ended = time.monotonic(), 0.0, 0, False
    async with (
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session,
        session.post(f"{url}/v1/chat/completions", json=body) as reply,
    ):
        if reply.status != 200:
            raise L40sError(f"{reply.status} {await reply.text()}", where=url)
        async for line in reply.content:
            if not line.startswith(b"data: "):
                continue
            if line.strip() == b"data: [DONE]":
                ended = True
                break
            for choice in json.loads(line.removeprefix(b"data: "))["choices"]:
                if piece := choice["delta"].get("content"):
                    first_s = first_s or time.monotonic() - began_s
                    pieces += 1
                    console.print(piece.replace("\n", "\n     "), end="", markup=False, style="green")
    console.print()
    if not ended:
        raise L40sError("the stream ended without [DONE]", where=url)
    console.print(
        f"     [dim]answered by {reply.headers.get('x-l40s-worker', '?')}: first token after {first_s:.2f} s,"
        f" {pieces} pieces in {time.monotonic() - began_s:.2f} s[/]"
    )


async def l40sctl(site: Site, *arguments: str) -> None:
    """Run the command line that an operator runs; its output is the terminal's.

    Raises:
        L40sError: It did not end with status 0.
    """
    console.print(f"     $ [bold]l40sctl {' '.join(arguments)}[/]")
    program = (str(BIN / "l40sctl"), "--socket", str(site.socket), *arguments)
    if console.is_terminal:
        process = await asyncio.create_subprocess_exec(*program)
    else:  # both through one pipe, so that they stay in order
        pipe, same = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
        process = await asyncio.create_subprocess_exec(*program, stdout=pipe, stderr=same)
        assert process.stdout is not None
        told: set[str] = set()
        async for line in process.stdout:
            tell_once(line.decode("utf-8", "replace").rstrip("\n"), told)
    code = await process.wait()
    if code != 0:
        raise L40sError(f"l40sctl {' '.join(arguments)} ended with status {code}")


def tell_once(line: str, told: set[str]) -> None:
    """Pass on a line of `l40sctl`; of a change's progress only the first for each number of ready workers.

    On a terminal that is a bar. Elsewhere it is a line a step, how many depends on the machine, and a page of draining
    and starting hides what the demo is about.
    """
    count = re.match(r".*: \d+ of \d+ ready", line)
    key = count[0] if count else ""
    if not key or key not in told:
        console.print(line, markup=False)
    told.add(key)


def suggest(site: Site, status: Status) -> None:
    """Say what to try with a demo that stays."""
    url = f"http://{status.proxy.listen[0]}"
    worker = status.workers[0]
    question = """{"model": "smollm2", "stream": true, "messages": [{"role": "user", "content": "Hi"}]}"""
    console.print("\n[bold]It is running.[/] Some things to try:\n")
    for line in (
        f"export L40SD_SOCKET={site.socket.relative_to(ROOT)} PATH=$PWD/.venv/bin:$PATH",
        "l40sctl status --watch",
        "l40sctl patterns",
        "l40sctl topology",
        "l40sctl switch-pattern C --dry-run",
        "l40sctl switch-pattern D",
        f"kill -9 {worker.pid}          # {worker.id}: watch it come back",
        f"curl -s {url}/v1/models",
        f"curl -sN {url}/v1/chat/completions -d '{question}'",
        "scripts/demo --stop",
    ):
        console.print(f"  {line}", markup=False, soft_wrap=True)


def stop_earlier() -> bool:
    """Stop a demo that was left running, workers and all, and remove its folder; return whether there was one."""
    site = Site(folder=FOLDER, config=CONFIG)
    config = str(site.config_file)
    for process in psutil.process_iter():
        try:
            if process.cmdline()[1:] == ["-m", "l40sd", "--config", config]:
                console.print(f"stopping the demo that is still running (pid {process.pid})")
                process.terminate()
                process.wait(60)
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    was_there = FOLDER.exists()
    clear(site)
    return was_there


async def end(site: Site) -> None:
    """Stop the daemon if it still runs, and remove everything; for a demo that did not come to its end."""
    if site.daemon is not None and site.daemon.poll() is None:
        console.print("stopping it")
        try:
            await site.stop()
        except L40sError as error:
            console.print(str(error), markup=False)
    clear(site)


def clear(site: Site) -> None:
    """End what is left of the demo and remove its folder."""
    for left in site.clear():
        console.print(f"[red]had to be killed:[/] {left}")
    shutil.rmtree(FOLDER, ignore_errors=True)


async def interruptible(*, stay: bool, port: int) -> int:
    """Run the story; SIGINT and SIGTERM end it as an exception does, with everything cleaned up."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        return await main(stay=stay, port=port)
    except asyncio.CancelledError:
        return 130


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="scripts/demo")
    parser.add_argument("--stay", action="store_true", help="leave it running, and say what to try")
    parser.add_argument("--stop", action="store_true", help="stop one that was left running")
    parser.add_argument("--port", type=int, default=0, help="of the endpoint (a free one)")
    given = parser.parse_args()
    if given.stop:
        console.print("stopped" if stop_earlier() else "nothing was running")
        sys.exit(0)
    sys.exit(asyncio.run(interruptible(stay=given.stay, port=given.port)))
