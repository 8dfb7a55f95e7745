"""A hash of a text, which splits and other choices follow from."""
import hashlib


def text_hash(text: str) -> int:
    """A 64-bit number that depends on the text alone; splits and other choices follow from it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
