"""Content hashes of files and directories; a big checkpoint is read once and remembered."""

import hashlib
import json
import os
import time
from pathlib import Path

from stages.common.errors import RunError
from stages.common.publish import write_json

HASH_CACHE = Path(".slipstream/hashes.json")
_BLOCK = 1 << 20
_IGNORED = frozenset({"__pycache__"})  # as in .dvcignore: running the code must not change its hash
_SETTLED_S = 2.0

Cache = dict[str, list[object]]


def hash_paths(paths: tuple[str, ...]) -> dict[str, str]:
    """blake2b of each file or directory; a directory's covers the names and contents of its files.

    Raises:
        RunError: a path does not exist.
    """
    cache = _read_cache()
    before = dict(cache)
    hashes = {path: _hash_path(Path(path), cache) for path in paths}
    if cache != before:
        write_json(HASH_CACHE, cache)
    return hashes


def hash_text(text: str) -> str:
    """sha256 of a text, as hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_path(path: Path, cache: Cache) -> str:
    if path.is_file():
        return _hash_file(path, cache)
    if not path.is_dir():
        raise RunError(f"{path}: not found; an earlier stage makes it: run `make run`")
    digest = hashlib.blake2b(digest_size=32)
    for file in sorted(path.rglob("*")):
        if file.is_file() and _IGNORED.isdisjoint(file.parts):
            digest.update(f"{file.relative_to(path).as_posix()}\0{_hash_file(file, cache)}\n".encode())
    return digest.hexdigest()


def _hash_file(path: Path, cache: Cache) -> str:
    stat = path.stat()
    identity = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
    known = cache.get(str(path))
    if known and known[:3] == identity:
        return str(known[3])
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    # A file this young may be written again within one tick of the file system's clock.
    if time.time() - stat.st_mtime > _SETTLED_S:
        cache[str(path)] = [*identity, digest.hexdigest()]
    return digest.hexdigest()


def _read_cache() -> Cache:
    try:
        cache = json.loads(HASH_CACHE.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return {path: known for path, known in cache.items() if os.path.exists(path)}
