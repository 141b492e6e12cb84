"""Every error that we raise, with its HTTP status and the distribution spec's code.

    WaveError
    ├── RequestInvalid           400  the caller's mistake: names the field, the value and the rule
    │   ├── NameInvalid          400  NAME_INVALID
    │   ├── DigestInvalid        400  DIGEST_INVALID
    │   ├── RangeInvalid         416  RANGE_INVALID
    │   ├── ManifestInvalid      400  MANIFEST_INVALID: a pushed manifest that breaks a rule
    │   ├── UploadInvalid        400  BLOB_UPLOAD_INVALID: a part of an upload that breaks a rule
    │   │   └── UploadOutOfOrder 416  BLOB_UPLOAD_INVALID: not the part that comes next
    │   ├── PairingMissing       400  an access token of a Platform that this server is not paired with
    │   └── BodyTooLarge         413  SIZE_INVALID
    ├── Unauthorized             401  on the API, and for a push: who pulls is never asked for a password
    │   └── AccessTokenRefused   401  an access token of ours that is wrong, expired or revoked
    ├── Denied                   403  DENIED: upstream refused our credentials, or we whoever asks
    │   ├── TokenRefused         403  DENIED: upstream's token service gives none
    │   └── AddressRefused       403  DENIED: a private or loopback address that no setting allows
    ├── NameUnknown              404  NAME_UNKNOWN: token or registry that does not exist
    │   └── HostUnknown          404  NAME_UNKNOWN: a registry's host that the name service does not know
    ├── ManifestUnknown          404  MANIFEST_UNKNOWN
    ├── BlobUnknown              404  BLOB_UNKNOWN
    ├── ManifestBlobUnknown      404  MANIFEST_BLOB_UNKNOWN: a pushed manifest names what its repository lacks
    ├── UploadUnknown            404  BLOB_UPLOAD_UNKNOWN
    ├── NotFound                 404  a path outside of the registry's that leads nowhere
    ├── MethodNotAllowed         405  UNSUPPORTED
    ├── Unsupported              400  UNSUPPORTED: understood, but not for this image
    ├── NotImplementedHere       501  UNSUPPORTED: a documented feature that this server does not have (yet)
    ├── TooManyRequests          429  TOOMANYREQUESTS
    ├── UpstreamError            502  UNKNOWN: the registry answered nonsense
    │   ├── ContentMismatch      502  bytes that are not what their digest says
    │   │   ├── DigestMismatch
    │   │   └── SizeMismatch
    │   ├── UpstreamUnavailable  503  no connection, or 5xx, after retries
    │   │   ├── UpstreamFailing  503  it answered, with 5xx
    │   │   └── Offline          503  this proxy is not to connect to anything
    │   └── UpstreamTimeout      504
    ├── PlatformError             the status that a Platform gave, or 503 and 408 when it gave none
    ├── StorageFull              507  the data folder has no room, and the answer needs some
    ├── StateUnavailable         503  Redis does not answer
    ├── StillBuilding            503  a pull was held for as long as its client bears, and the build goes on
    └── Overloaded               503  out of file descriptors

Messages are shown to people: they say what was wrong, with which value, and what to do.
"""

from typing import ClassVar

_MAX_BODY = 200


class WaveError(Exception):
    """Base of all errors that become an answer; ``str(error)`` is the message for the client."""

    status: int = 500
    code: ClassVar[str] = "UNKNOWN"
    retry_after_s: int | None = None


class RequestInvalid(WaveError):
    """The caller's input breaks a rule; the message names field, value and rule."""

    status = 400
    code = "UNSUPPORTED"


class NameInvalid(RequestInvalid):
    """A repository or path that the distribution spec's grammar does not allow."""

    code = "NAME_INVALID"


class DigestInvalid(RequestInvalid):
    """Text in a digest's place that is not ``sha256:<64 hex>`` or ``sha512:<128 hex>``."""

    code = "DIGEST_INVALID"


class RangeInvalid(RequestInvalid):
    """A Range that lies outside of the blob."""

    status = 416
    code = "RANGE_INVALID"

    def __init__(self, message: str, size: int) -> None:
        super().__init__(message)
        self.size = size


class ManifestInvalid(RequestInvalid):
    """A pushed manifest that is not what its media type says."""

    code = "MANIFEST_INVALID"


class UploadInvalid(RequestInvalid):
    """A part of an upload that can't be taken."""

    code = "BLOB_UPLOAD_INVALID"


class UploadOutOfOrder(UploadInvalid):
    """A part that does not begin where the upload stands: after ``received`` bytes."""

    status = 416

    def __init__(self, message: str, received: int) -> None:
        super().__init__(message)
        self.received = received


class PairingMissing(RequestInvalid):
    """The access token of a Platform, at ``endpoint``, that this server is not paired with; ``why``, if it is known."""

    def __init__(self, endpoint: str, why: str = "") -> None:
        super().__init__(f"Missing pairing record for Tower endpoint '{endpoint[:200]}'{why and f' - {why}'}")
        self.endpoint = endpoint


class BodyTooLarge(RequestInvalid):
    """A request body over the configured limit."""

    status = 413
    code = "SIZE_INVALID"


class Unauthorized(WaveError):
    """It takes other credentials."""

    status = 401
    code = "UNAUTHORIZED"


class AccessTokenRefused(Unauthorized):
    """An access token that nobody here has issued, or that has ended; the message is in ASCII, for a header."""


class Denied(WaveError):
    """Upstream does not let us (with the credentials that apply) read that repository, or we don't let whoever asks."""

    status = 403
    code = "DENIED"


class TokenRefused(Denied):
    """The token service of a registry refuses us."""


class AddressRefused(Denied):
    """A host that resolves to an address which only configuration may open."""


class NameUnknown(WaveError):
    """A token, repository or registry that we do not know; the same text whatever the reason for a token."""

    status = 404
    code = "NAME_UNKNOWN"


class HostUnknown(NameUnknown):
    """A registry's host that the name service does not know: a slip of the pen, or no network."""


class ManifestUnknown(WaveError):
    """No such tag or manifest upstream."""

    status = 404
    code = "MANIFEST_UNKNOWN"


class BlobUnknown(WaveError):
    """No such blob in that repository."""

    status = 404
    code = "BLOB_UNKNOWN"


class ManifestBlobUnknown(WaveError):
    """A manifest names blobs or manifests that are not in its repository."""

    status = 404
    code = "MANIFEST_BLOB_UNKNOWN"


class UploadUnknown(WaveError):
    """An upload that was never begun in that repository, is done, was cancelled, or was left alone for too long."""

    status = 404
    code = "BLOB_UPLOAD_UNKNOWN"


class NotFound(WaveError):
    """A path outside of the registry's that leads nowhere."""

    status = 404


class MethodNotAllowed(WaveError):
    """A method that the path does not have; ``allow`` lists those that it has."""

    status = 405
    code = "UNSUPPORTED"

    def __init__(self, message: str, allow: str = "GET, HEAD") -> None:
        super().__init__(message)
        self.allow = allow


class Unsupported(WaveError):
    """A request that is understood and can't be met for this image."""

    status = 400
    code = "UNSUPPORTED"


class NotImplementedHere(WaveError):
    """A documented feature that this server does not provide."""

    status = 501
    code = "UNSUPPORTED"


class TooManyRequests(WaveError):
    """A limit is reached, ours or upstream's; of ours the numbers are known: what ``RateLimit-*`` headers say."""

    status = 429
    code = "TOOMANYREQUESTS"

    def __init__(
        self,
        message: str,
        retry_after_s: int | None = None,
        *,
        limit: int | None = None,
        remaining: int | None = None,
        reset_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.limit = limit
        self.remaining = remaining
        self.reset_s = reset_s


class UpstreamError(WaveError):
    """The registry's answer can't be used."""

    status = 502


class ContentMismatch(UpstreamError):
    """Content that does not have the digest or the size that it was announced with."""


class DigestMismatch(ContentMismatch):
    """The bytes' digest is another one."""


class SizeMismatch(ContentMismatch):
    """More or fewer bytes than announced."""


class UpstreamUnavailable(UpstreamError):
    """The registry can't be reached, or keeps failing."""

    status = 503

    def __init__(self, message: str, retry_after_s: int | None = 5) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UpstreamFailing(UpstreamUnavailable):
    """The registry answered, with 5xx."""


class Offline(UpstreamUnavailable):
    """This proxy is told to connect to nothing; to come back later does not help."""

    def __init__(self, message: str) -> None:
        super().__init__(message, None)


class UpstreamTimeout(UpstreamError):
    """The registry did not answer in time."""

    status = 504


class PlatformError(WaveError):
    """A Seqera Platform refuses, fails or does not answer; ``body`` is what it said.

    Source of status and text: ``wave.md`` §0.4 and 10.4.
    """

    def __init__(self, status: int, message: str, body: str = "") -> None:
        status = status if 400 <= status < 600 else 502  # an error can't be answered with any other
        said = body if len(body) <= _MAX_BODY else f"{body[:_MAX_BODY]}…"
        super().__init__(f"{message} - HTTP status={status} - response={said or '-'}")
        self.status = status
        self.retry_after_s = 5 if self.is_temporary else None

    @property
    def is_temporary(self) -> bool:
        """Whether it says nothing about what was asked."""
        return self.status in (408, 429) or self.status >= 500


class StorageFull(WaveError):
    """The data folder is full."""

    status = 507
    retry_after_s = 30


class StateUnavailable(WaveError):
    """Redis does not answer."""

    status = 503
    retry_after_s = 2


class StillBuilding(WaveError):
    """The image is not there yet."""

    status = 503
    retry_after_s = 10


class Overloaded(WaveError):
    """This process is at a limit that passes."""

    status = 503
    retry_after_s = 1


def clip(value: object, limit: int = 100) -> str:
    """``repr`` of a value for an error message, cut to ``limit`` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
