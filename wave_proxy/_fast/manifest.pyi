"""Edits of JSON text that leave every other byte as it was.

Manifests and configs are known by the digest of their bytes, so an edit must not reorder, reformat or drop anything:
a number that a JSON library would round, an unknown member, an escape. The document must be valid JSON in UTF-8
(callers have parsed it); of members with equal keys the last one counts, as for every client. Both functions raise
ValueError when the path leads nowhere, and never read outside of the document, whatever it contains.
"""

def set_member(document: bytes, path: tuple[str | int, ...], value: bytes) -> bytes:
    """Put the JSON text ``value`` at ``path`` (keys and positions); a missing last key is added at the object's end."""

def append_items(document: bytes, path: tuple[str | int, ...], items: bytes) -> bytes:
    """Add ``items`` (JSON texts joined by commas, at least one) to the array at ``path``; missing or null is empty."""
