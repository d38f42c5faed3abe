"""Which version of the code runs."""

import subprocess


def git_commit() -> str:
    """The commit that is checked out; "unknown" outside a git repository."""
    return _git("rev-parse", "HEAD") or "unknown"


def is_git_dirty() -> bool:
    """Whether a tracked file differs from the commit."""
    return bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
