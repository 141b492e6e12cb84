"""Which architecture manifests are for, as far as indexes that a worker gave out and configs say: for counting."""

from collections import OrderedDict

from wave_proxy.cache.manifests import StoredManifest
from wave_proxy.image.oci import ARCHITECTURES, read_manifest

_REMEMBERED = 20_000


class Architectures:
    """Architectures by the digest of a manifest. A manifest itself does not say what it is for."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, str] = OrderedDict()

    def learn(self, index: StoredManifest) -> None:
        """Remember what an index says of its manifests. Raises UpstreamError when it is none."""
        if index.digest in self._known:
            return
        for entry in read_manifest(index.content, index.media_type).entries:
            if entry.platform is not None:
                self.put(entry.descriptor.digest, entry.platform.architecture)
        self._remember(index.digest, "")

    def put(self, digest: str, architecture: str) -> None:
        """Remember what a manifest is for, if that is an architecture that we know."""
        if architecture in ARCHITECTURES:
            self._remember(digest, ARCHITECTURES[architecture])

    def _remember(self, digest: str, architecture: str) -> None:
        self._known[digest] = architecture
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def find(self, digest: str) -> str:
        """What the manifest is for; empty when nobody has said so."""
        return self._known.get(digest, "")
