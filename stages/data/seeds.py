"""Seeds derived from names, so that no two draws share one and none depends on an order."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A 48-bit seed from numbers and names; the same parts give the same seed on every machine."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:6], "big")
