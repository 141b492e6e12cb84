"""Who may read what the store holds: content is shared between all repositories, permission is not.

That a blob lies in the store does not mean that whoever knows its digest may have it. Two things are recorded, each
under a name of its own, in an empty file ``<root>/grants/<hash of the name>/<digest>`` that all workers share:

- a repository (``key@registry/repository``, with the key of the login that it was asked with, and none before the ``@``
  without one) has said that it has the blob, by serving it or to a HEAD. That a manifest names a digest says nothing:
  anybody can name what he does not have. Its manifests are noted when it delivers them, or says that it has one which
  its registry has delivered. What was said to one login counts for no other, and only while ``permissions`` has it that
  the login opens the repository;
- an origin (a registry, or the URL of a layer) has once delivered the content, and it was right. A HEAD proves nothing
  about a registry that never has: it may belong to somebody who only knows the digest.
"""

from collections.abc import Iterable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

_MEMORY = 200_000


class Grants:
    """What upstream has shown us, per repository."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "grants"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._known: set[tuple[str, str]] = set()

    def has(self, repository: str, digest: str) -> bool:
        """Whether ``digest`` was seen in ``repository`` (``key@registry/repository``), or an origin delivered it."""
        if (repository, digest) in self._known:
            return True
        if not self._path(repository, digest).exists():
            return False
        self._remember(repository, digest)
        return True

    def add(self, repository: str, digests: Iterable[str]) -> None:
        """Record that upstream serves these digests from ``repository``; on a full disk, for this worker only."""
        for digest in digests:
            if (repository, digest) not in self._known:
                self._remember(repository, digest)
                path = self._path(repository, digest)
                with suppress(OSError):
                    path.parent.mkdir(exist_ok=True)
                    path.touch()

    def _remember(self, repository: str, digest: str) -> None:
        if len(self._known) >= _MEMORY:
            self._known.clear()
        self._known.add((repository, digest))

    def _path(self, repository: str, digest: str) -> Path:
        return self._folder / sha256(repository.encode()).hexdigest()[:32] / digest.replace(":", "-")
