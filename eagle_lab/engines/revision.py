"""Code of another revision or folder: a worktree of this checkout, made for an arm."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from eagle_lab import ROOT


@dataclass(frozen=True)
class Code:
    """Where an arm's code lies. commit: its revision, None outside git; dirty: the folder has changes beside the commit;
    left_out: this checkout has changes that the worktree doesn't have."""

    folder: Path
    commit: str | None
    dirty: bool
    left_out: bool = False


def commit_of(code: str) -> str | None:
    """The commit of the git revision `code` of this checkout, None for a folder. Raises ValueError for what is neither."""
    if Path(code).expanduser().is_dir():
        return None
    commit = git(ROOT, "rev-parse", "--verify", "--quiet", f"{code}^{{commit}}")
    if not commit:
        where = "" if (ROOT / ".git").exists() else f", and {ROOT} is no git checkout"
        raise ValueError(
            f"code is {code!r}, which is neither a folder nor a revision of this checkout{where}."
        )
    return commit


def code_of(code: str, place: Path) -> Code:
    """The folder `code` as it is, or a worktree of the git revision `code` at `place`/code, for `engines.place` to remove.

    Nothing is stashed and nothing of this checkout changes. Raises ValueError for what is neither.
    """
    found = commit_of(code)
    if found is None:
        folder = Path(code).expanduser()
        # a folder that lies inside another checkout has no commit of its own
        own = git(folder, "rev-parse", "--show-toplevel") == str(folder.resolve())
        commit = git(folder, "rev-parse", "HEAD") if own else None
        return Code(folder.resolve(), commit, bool(commit and changed(folder)))
    tree = place / "code"
    command = ["git", "-C", str(ROOT), "worktree", "add", "--detach", "--quiet", str(tree), found]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        said = made.stderr.strip().splitlines() or ["it does not say why"]
        raise ValueError(f"git can't make a worktree of {code!r}: {said[-1]}.")
    return Code(tree, found, False, bool(changed(ROOT)))


def changed(folder: Path, seconds: float | None = None) -> bool | None:
    """Whether the package in a checkout has changed or new files beside the commit; None where git doesn't say within so many
    seconds. A record, or a strategy of one's own beside the package, changes nothing of what is run."""
    found = git(
        folder, "status", "--porcelain", "--untracked-files=normal", "--", "eagle_lab", seconds=seconds
    )
    return None if found is None else bool(found)


def git(folder: Path, *words: str, seconds: float | None = None) -> str | None:
    """What git says in a folder; None where it fails, takes more than so many seconds, or isn't there."""
    command = ["git", "-C", str(folder), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
