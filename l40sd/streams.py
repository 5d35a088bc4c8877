"""stdout and stderr as they come: closed, full, without a reader, or in an encoding that lacks what we print."""

import codecs
import errno
import os
import sys
from typing import TextIO

STAND_INS = {"·": "-", "→": "->", "…": "...", "\N{REPLACEMENT CHARACTER}": "?"}
"""What is written where the terminal's encoding has no such character; others become ``\\xNN``, ``\\uNNNN``."""
ERRORS = "l40sd-stand-in"
NO_READER = (errno.EPIPE, errno.ESHUTDOWN)


def settle() -> None:
    """Make both streams ones that can be written to, whatever this process was started with. Call once, first.

    A closed one becomes one that refuses what is written (stdout: that is then an error like a full disk), and takes
    up its descriptor, which the next file or socket would get otherwise.
    """
    codecs.register_error(ERRORS, _stand_in)
    if sys.stdout is None:
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")  # noqa: SIM115  until the end
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=ERRORS)


def abandon(stream: TextIO) -> None:
    """Send what is still in the stream's buffer nowhere: the interpreter would fail with it again when it ends."""
    try:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
    except (OSError, ValueError):  # no file behind it, or closed: nothing that could fail
        pass


def _stand_in(error: UnicodeError) -> tuple[str | bytes, int]:
    """Return characters of the encoding in place of those that it lacks; an ``errors=`` handler of codecs(3)."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    plain = "".join(STAND_INS.get(char) or char.encode("ascii", "backslashreplace").decode() for char in lacking)
    return plain, error.end
