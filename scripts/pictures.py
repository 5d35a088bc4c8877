"""Makes the pictures of the README from a real run: docs/status.svg, topology.svg and change.svg.

    .venv/bin/python scripts/pictures.py         (after scripts/setup)

What a picture shows is what `l40sctl` wrote to a terminal of that width, colours and all; nothing is drawn by hand.
"""

import asyncio
import fcntl
import io
import os
import pty
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from daemonkit import Site
from loadkit import Mix, load
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
COLUMNS = 104

CONFIG = """
[daemon]
pattern = "day"

[host]
inventory = "l40s-12-4+2"

[models.llama-8b]
engine = "simulated"
attention_heads = 32
args = ["--tokens-per-s", "40", "--drain-s", "30"]

[models.llama-70b]
engine = "simulated"
attention_heads = 64
args = ["--tokens-per-s", "20", "--drain-s", "30"]

[[patterns.day.replicas]]
model = "llama-8b"
count = 4

[[patterns.day.replicas]]
model = "llama-70b"
count = "fill"
tp = 2

[[patterns.night.replicas]]
model = "llama-70b"
count = 2
tp = 4

[[patterns.night.replicas]]
model = "llama-8b"
count = "fill"
tp = 2
"""


async def main() -> None:
    """Run the site, take the pictures, stop it."""
    folder = Path(tempfile.mkdtemp(prefix="l40s-"))
    try:
        async with Site(folder=folder, config=CONFIG) as site:
            await site.until_ready("day", 60)
            mix = Mix(url=await site.url(), models=("llama-8b", "llama-70b"), streams=12, shorts=4, stream_tokens=60)
            async with load(mix) as tally:
                await site.until(lambda _: tally.answered > 40, "some requests are answered", 60)
                await take(site, "status", "status")
                await take(site, "topology", "topology")
                await take(site, "change", "switch-pattern", "night", "--dry-run")
    finally:
        shutil.rmtree(folder)


async def take(site: Site, picture: str, *arguments: str) -> None:
    """Write docs/PICTURE.svg: the command line, and what it wrote to its terminal."""
    text = await asyncio.to_thread(on_a_terminal, [str(BIN / "l40sctl"), *arguments], str(site.socket))
    paper = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    paper.print(Text.assemble(("$ ", "dim"), (f"l40sctl {' '.join(arguments)}", "bold")))
    paper.print(Text.from_ansi(text))
    # The id of the styles is the picture's name, so that a new picture differs only where the output does.
    svg = paper.export_svg(title=f"l40sctl {arguments[0]}", unique_id=picture)
    (ROOT / "docs" / f"{picture}.svg").write_text(svg, encoding="utf-8")


def on_a_terminal(command: list[str], control_socket: str) -> str:
    """Run a command on a terminal of our own and return all that it wrote. Blocks; 30 s at most.

    Raises:
        subprocess.CalledProcessError: It did not end with status 0.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 60, COLUMNS, 0, 0))
    env = os.environ | {"TERM": "xterm-256color", "COLORTERM": "truecolor", "L40SD_SOCKET": control_socket}
    env.pop("NO_COLOR", None)
    written = bytearray()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env) as process:
        os.close(theirs)
        try:
            while data := os.read(ours, 65536):
                written += data
        except OSError:  # EIO: the last one on the other side has closed it
            pass
        finally:
            os.close(ours)
        if process.wait(30) != 0:
            raise subprocess.CalledProcessError(process.returncode, command, bytes(written))
    return written.decode(errors="replace").replace("\r\n", "\n")


if __name__ == "__main__":
    asyncio.run(main())
