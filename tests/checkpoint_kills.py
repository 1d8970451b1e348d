"""A save that is killed at each of its file operations, one after the other: started by test_checkpoint.py in a process of its own, with a folder as its argument.

Signal 9 comes from an audit hook: Python reports each opening, renaming, making and removing of a file before it happens."""

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from nemotron_nb.core import UserError
from nemotron_nb.train.checkpoint import Checkpoints, _read

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def training(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of 40 numbers that has done a step."""
    torch.manual_seed(seed)
    model = nn.Linear(4, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def in_child(act: Callable[[], None]) -> int:
    """Do it in a forked process; the signal that ended it, 0 if none did."""
    child = os.fork()
    if child == 0:
        try:
            act()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the save failed"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def killed_at(number: int, folder: Path, step: int) -> Callable[[], None]:
    """A save that ends at its file operation of this number."""

    def act() -> None:
        """Count the operations in the folder, and die."""
        count = 0

        def hook(event: str, arguments: tuple) -> None:
            """Called by Python before each operation."""
            nonlocal count
            if event in EVENTS and any(str(folder) in str(a) for a in arguments[:2]):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        Checkpoints(folder, keep_top_k=1).save(step, *training(2), {"made": 2}, score=0.5)

    return act


def every_kill(folder: Path, step: int) -> int:
    """Kill a save of this step at operation 1, 2, ... until one comes through; after each, the newest must load, and be one of the two."""
    number, ended = 0, signal.SIGKILL
    checkpoints, before = Checkpoints(folder), folder.with_name("before")
    for former in (3, 4):
        Checkpoints(before).save(former, *training(1), {"made": 1}, score=float(former))
    while ended == signal.SIGKILL:
        number += 1
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        ended = in_child(killed_at(number, folder, step))
        assert step == 4 or _read(folder / (folder / "latest").read_text().strip())[0], "the pointer always names a whole one, but while that one is replaced"
        model, optimizer = training(5)
        newest = checkpoints.newest()
        made = checkpoints.load(newest, model, optimizer)["made"]
        assert (newest.step, made) in {(4, 1), (step, 2)}, (number, newest, made)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), training(made)[0].parameters(), strict=True))
        Checkpoints(folder, keep_top_k=1).save(9, model, optimizer, score=9.0)
        left = sorted(p.name for p in folder.iterdir())
        assert "step_00000009" in left and len(left) == 3 and not any(name.startswith(".") for name in left), left
    shutil.rmtree(before)
    return number


def disk_full(folder: Path) -> str:
    """A real limit of the system on the size of a file, met in the middle of a save."""
    torch.manual_seed(0)
    checkpoints, model = Checkpoints(folder), nn.Linear(300, 300)
    checkpoints.save(1, model, None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        checkpoints.save(2, model, None)
    except UserError as error:
        told = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert checkpoints.newest().step == 1 and sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000001"]
    return told


if __name__ == "__main__":
    root = Path(sys.argv[1])
    found = {"new": every_kill(root / "new", 7), "same": every_kill(root / "same", 4), "full": disk_full(root / "full")}
    (root / "found.json").write_text(json.dumps(found))
