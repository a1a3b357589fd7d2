"""What an arm leaves on this machine while it runs (a folder, a worktree, processes), and how all of it goes again.

A place is a locked folder, and what an arm starts has its path in the environment. A run that is ended by a signal takes
its places away; what a killed one left, whose lock is free, the next run takes away.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import psutil

from eagle_lab import ROOT
from eagle_lab.engines.revision import git

PREFIX, MARK, LOCK = "eagle_lab-arm-", "EAGLE_LAB_PLACE", "lock"
SIGNALS = (signal.SIGTERM, signal.SIGHUP)  # Python raises for SIGINT by itself


@contextmanager
def place() -> Iterator[Path]:
    """A folder of an arm's own, with a worktree in "code" or none; it goes at the end with every process that bears its mark."""
    sweep()
    made = Path(tempfile.mkdtemp(prefix=".eagle_lab-"))
    with (made / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # seen by `sweep` only with its lock held
        folder = made.rename(made.with_name(PREFIX + made.name.rpartition("-")[2]))
        try:
            yield folder
        finally:
            _clear(folder)


def sweep() -> None:
    """Take away the places that killed runs have left."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        # a lock that is held, or another user's, is an OSError
        with suppress(OSError), (folder / LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _clear(folder)


def _clear(folder: Path) -> None:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == str(folder) and process.pid != os.getpid():
                process.kill()
    tree = folder / "code"
    owner = git(tree, "rev-parse", "--path-format=absolute", "--git-common-dir") if tree.exists() else None
    shutil.rmtree(folder, ignore_errors=True)
    # of a worktree whose folder is gone, git takes away the rest; twice: one half made is locked
    git(Path(owner or ROOT), "worktree", "remove", "--force", "--force", str(tree))


@contextmanager
def in_order() -> Iterator[None]:
    """A signal that ends this process ends the block first: it raises SystemExit; outside the main thread nothing changes."""
    got: list[int] = []

    def leave(number: int, _frame: FrameType | None) -> None:
        got.append(number)
        raise SystemExit(128 + number)

    main = threading.current_thread() is threading.main_thread()
    kept = [one for one in SIGNALS if main and signal.getsignal(one) is signal.SIG_DFL]
    for one in kept:
        signal.signal(one, leave)
    try:
        yield
    finally:
        for one in kept:
            signal.signal(one, signal.SIG_DFL)
        if got:
            os.kill(os.getpid(), got[0])
