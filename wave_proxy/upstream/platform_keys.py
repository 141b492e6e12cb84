"""What a Platform keeps for its users, as it sends it: encrypted for our pairing (``wave.md`` §10.5, vectors V33)."""

from base64 import b64decode
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import load_der_private_key

from wave_proxy.errors import UpstreamError, clip
from wave_proxy.image.oci import read_json_object


@dataclass(frozen=True, slots=True)
class RegistryKeys:
    """A user of a registry. With ``is_aws`` they are an access key and its secret, or a role and its external id."""

    username: str
    password: str = field(repr=False)
    is_aws: bool = False


def decrypt(text: str, private_key: bytes) -> bytes:
    """The content of ``1\\P\\<AES key>\\<content>``: the key encrypted with our public one, the content with the key.

    Raises UpstreamError.
    """
    parts = text.split("\\")
    if len(parts) != 4 or parts[:2] != ["1", "P"]:
        raise UpstreamError(f"the Platform's credentials have a form that is not known here: {clip(parts[:2], 20)}")
    private = load_der_private_key(private_key, None)
    if not isinstance(private, RSAPrivateKey):
        raise UpstreamError("the pairing has no RSA key")
    try:
        key = private.decrypt(b64decode(parts[2], validate=True), PKCS1v15())
        decryptor = Cipher(AES(key), ECB()).decryptor()  # noqa: S305 - what the Platform speaks
        padded = decryptor.update(b64decode(parts[3], validate=True)) + decryptor.finalize()
        unpadder = PKCS7(128).unpadder()
        return unpadder.update(padded) + unpadder.finalize()
    except ValueError:
        raise UpstreamError("the Platform's credentials are not encrypted for this pairing") from None


def read_keys(content: bytes) -> RegistryKeys:
    """The login in an entry's content. Raises UpstreamError."""
    match read_json_object(content, "the Platform's credentials"):
        case {"discriminator": "container-reg", "userName": str(user), "password": str(password)}:
            return RegistryKeys(user, password)
        case {"discriminator": "aws", "assumeRoleArn": str(role), **more} if role:
            return RegistryKeys(role, str(more.get("externalId") or ""), is_aws=True)
        case {"discriminator": "aws", "accessKey": str(key), "secretKey": str(secret)}:
            return RegistryKeys(key, secret, is_aws=True)
        case document:
            kind = clip(document.get("discriminator"), 40)
            raise UpstreamError(f"the Platform's credentials of the kind {kind} are no login for a registry")
