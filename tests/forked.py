"""Python in a child of this process, for tests that need several processes and not several starts of Python.

A new process imports PyTorch and transformers for five seconds; a child of a process that has imported them begins at once.
What a child does with files, signals and other processes is the same. A test of the start itself, of a variable that is read
when a module is imported, or of what is imported, needs a new process.
"""

import gc
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


class Forked:
    """`function(*given)` in a child of this process, with what is used of a `subprocess.Popen`.

    Its exit code is what the function returns, or 1 with the traceback in its output if it raises.
    `output`: a file that takes both streams, or `errors` the second; without one they are those of this process.
    """

    def __init__(self, function: Callable[..., Any], *given: Any, env: Mapping[str, str] | None = None, output: Path | None = None, errors: Path | None = None):
        self.child = multiprocessing.get_context("fork").Process(target=self._run, args=(function, given, env or {}, output, errors or output))
        self.child.start()
        self.pid, self.output = self.child.pid, output

    @staticmethod
    def _run(function: Callable[..., Any], given: tuple, env: Mapping[str, str], output: Path | None, errors: Path | None) -> None:
        gc.freeze()  # what the parent made is not looked through again
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have started the parent with the signal ignored
        torch.set_num_threads(1)  # threads of the parent do not live here
        os.environ.update(env)
        if output:
            for number, path in ((1, output), (2, errors)):
                with open(path, "ab") as file:
                    os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, encoding="utf-8", closefd=False) for number in (1, 2))
        try:
            code = function(*given)
        except Exception:
            traceback.print_exc()
            code = 1
        sys.exit(code)

    @property
    def returncode(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.child.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.child.exitcode

    def send_signal(self, number: int) -> None:
        """As the command `kill` does."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, once it has ended."""
        self.child.join(timeout)
        if self.child.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.child), timeout)
        return self.child.exitcode


def forked_ranks(function: Callable[..., Any], world: int, *given: Any, folder: Path, env: Mapping[str, str] | None = None, timeout: float = 600) -> None:
    """`function(rank, *given)` in `world` children; all must end well. What they say is kept in `folder`.

    `env` is given to each, and RANK and WORLD_SIZE, as torchrun would.
    """
    own = [dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)) for rank in range(world)]
    ranks = [Forked(function, rank, *given, env={**(env or {}), **own[rank]}, output=folder / f"rank{rank}.log") for rank in range(world)]
    deadline = time.monotonic() + timeout
    try:  # one that fails ends the others, which would wait for it
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            multiprocessing.connection.wait([rank.child.sentinel for rank in ranks if rank.poll() is None], 1)
            assert time.monotonic() < deadline, "the ranks do not end"
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
    assert [rank.wait() for rank in ranks] == [0] * world, "\n".join(rank.output.read_text(errors="replace")[-4000:] for rank in ranks)


def meeting_point() -> dict[str, str]:
    """The variables by which ranks find each other."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
