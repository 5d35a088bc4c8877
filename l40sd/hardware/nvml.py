"""NVML's facts, asked of a helper process with a deadline.

NVML is a driver call: with a GPU fallen off the bus it has been seen to hang for ever, in a way that even a thread
cannot be freed from. So it lives in a process of its own (nvml_helper.py). A helper that misses its deadline is killed,
without waiting for a death that may never come, and a new one is tried after a while: 1 s, doubling to 60 s.
"""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from l40sd.errors import L40sError
from l40sd.hardware.presence import Failing, Heard
from l40sd.hardware.topology import NvmlFacts, NvmlGpu, normal_pci
from l40sd.model import GpuId, Link

LIBRARY_VARIABLE = "L40SD_NVML_LIBRARY"
"""For tests: a module or .py file to use in place of pynvml."""
RETRY_FIRST_S, RETRY_LIMIT_S = 1.0, 60.0
GONE_TIMEOUT_S = 1.0
"""For a killed helper to be reaped. One that hangs in the driver is left behind: it goes when the driver lets it."""
REPLY_LIMIT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """One GPU's memory, and who holds it: pid, command and bytes of each compute process."""

    used_bytes: int
    total_bytes: int
    holders: tuple[tuple[int, str, int], ...] = ()


class NvmlSilentError(L40sError):
    """NVML is missing, refused or did not answer in time; it is asked again later."""

    def __init__(self, what: str) -> None:
        super().__init__(what, where="NVML", hint="see whether nvidia-smi answers", code="nvml_silent")


class Nvml:
    """One helper at a time, started when needed. Questions are asked one after another."""

    def __init__(self, *, timeout_s: float, library: str = "") -> None:
        self._timeout_s = timeout_s
        self._library = library or os.environ.get(LIBRARY_VARIABLE, "pynvml")
        self._helper: asyncio.subprocess.Process | None = None
        self._turn = asyncio.Lock()
        self._number = 0
        self._failures = 0
        self._retry_at_s = 0.0
        self._why = ""
        self.heard: Heard | None = None
        """Which GPUs answered the last question, and which did not, with NVML's reason; None: it never did."""

    async def inventory(self) -> NvmlFacts:
        """Return the GPUs and the links that NVML knows.

        Raises:
            NvmlSilentError: No answer.
        """
        answer = await self._ask("inventory")
        gpus = _heard(answer).answering
        ids = {gpu.index: gpu.id for gpu in gpus}
        links = {(ids[a], ids[b]): Link[letters] for a, b, letters in answer["links"] if a in ids and b in ids}
        return NvmlFacts(gpus=gpus, links=links)

    async def memory(self) -> dict[GpuId, GpuMemory]:
        """Return the memory of every GPU that answers and has memory to tell of.

        Raises:
            NvmlSilentError: No answer.
        """
        answer = await self._ask("memory")
        return {
            GpuId(gpu["id"]): GpuMemory(
                used_bytes=gpu["used_bytes"],
                total_bytes=gpu["memory_bytes"],
                holders=tuple((pid, command, size) for pid, command, size in gpu["holders"]),
            )
            for gpu in answer["gpus"]
            if gpu["used_bytes"] is not None
        }

    async def renew(self) -> None:
        """Have the next question answered by a new helper: the library finds GPUs only when it starts."""
        async with self._turn:
            await self._drop_helper()

    async def close(self) -> None:
        """End the helper; returns within ``GONE_TIMEOUT_S`` even when it hangs."""
        await self._drop_helper()

    async def _ask(self, question: str) -> Mapping[str, Any]:
        try:
            async with asyncio.timeout(self._timeout_s):
                async with self._turn:
                    if self._is_resting():
                        raise NvmlSilentError(self._why)
                    return await self._answer(question)
        except TimeoutError as error:
            raise await self._failed(f"no answer within {self._timeout_s:g} s") from error
        except (OSError, ValueError) as error:
            raise await self._failed(f"its helper process failed: {str(error) or type(error).__name__}") from error

    def _is_resting(self) -> bool:
        return self._helper is None and asyncio.get_running_loop().time() < self._retry_at_s

    async def _answer(self, question: str) -> Mapping[str, Any]:
        if self._helper is None:
            self._helper = await self._started()
        helper = self._helper
        assert helper.stdin is not None
        assert helper.stdout is not None
        self._number += 1
        helper.stdin.write(json.dumps({"id": self._number, "ask": question}).encode() + b"\n")
        await helper.stdin.drain()
        while True:
            line = await helper.stdout.readline()
            if not line:
                raise ConnectionError("it ended")
            reply = json.loads(line)
            if reply["id"] == self._number:  # a lower one answers a question whose asker has gone
                break
        if "error" in reply:
            raise await self._failed(reply["error"])
        self._failures = 0
        answer: Mapping[str, Any] = reply["answer"]
        self.heard = _heard(answer)
        return answer

    async def _started(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "l40sd.hardware.nvml_helper",
            self._library,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            limit=REPLY_LIMIT_BYTES,
            start_new_session=True,  # a Ctrl-C in the daemon's terminal is not for it
        )

    async def _failed(self, why: str) -> NvmlSilentError:
        """Drop the helper, put off the next one, and return the error to raise."""
        self._retry_at_s = asyncio.get_running_loop().time() + min(RETRY_LIMIT_S, RETRY_FIRST_S * 2**self._failures)
        self._failures = min(self._failures + 1, 16)
        self._why = why
        await self._drop_helper()
        return NvmlSilentError(why)

    async def _drop_helper(self) -> None:
        helper, self._helper = self._helper, None
        if helper is None:
            return
        with contextlib.suppress(ProcessLookupError):
            helper.kill()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GONE_TIMEOUT_S):
                await helper.wait()


def _heard(answer: Mapping[str, Any]) -> Heard:
    failing = [Failing(number=each["number"], id=GpuId(each["id"]), reason=each["reason"]) for each in answer["lost"]]
    answering = []
    for gpu in answer["gpus"]:
        identity = GpuId(gpu["id"])
        try:
            pci = normal_pci(gpu["pci"])
        except L40sError as error:
            failing.append(Failing(number=gpu["index"], id=identity, reason=error.what))
            continue
        memory_bytes = gpu["memory_bytes"]
        answering.append(NvmlGpu(id=identity, index=gpu["index"], pci=pci, name=gpu["name"], memory_bytes=memory_bytes))
    return Heard(answering=tuple(answering), failing=tuple(failing))
