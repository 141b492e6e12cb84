"""What Platforms keep for their users, decrypted with the pairing's key: all forms, and what is none."""

from base64 import b64encode
from typing import Any

import orjson
import pytest

from tests.platform.world import encrypted
from wave_proxy.errors import UpstreamError
from wave_proxy.state.pairing import _new_keys
from wave_proxy.upstream.platform_keys import RegistryKeys, decrypt, read_keys

PUBLIC, PRIVATE = _new_keys()
ROLE = "arn:aws:iam::1:role/x"


@pytest.mark.parametrize(
    ("secret", "keys"),
    [
        (
            {"discriminator": "container-reg", "userName": "me", "password": "p\\w", "registry": "quay.io"},
            RegistryKeys("me", "p\\w"),
        ),
        ({"discriminator": "aws", "accessKey": "AKIA", "secretKey": "s"}, RegistryKeys("AKIA", "s", True)),
        (
            {"discriminator": "aws", "accessKey": "AKIA", "secretKey": "s", "assumeRoleArn": ROLE, "externalId": "e"},
            RegistryKeys(ROLE, "e", True),
        ),
        ({"discriminator": "aws", "assumeRoleArn": ROLE, "externalId": None}, RegistryKeys(ROLE, "", True)),
    ],
    ids=["registry", "access-key", "role-before-key", "role-alone"],
)
def test_logins_come_out_as_they_went_in(secret: dict[str, Any], keys: RegistryKeys) -> None:
    assert read_keys(decrypt(encrypted(secret, PUBLIC), PRIVATE)) == keys
    assert "s" not in repr(keys).partition("password")[2] or keys.password not in repr(keys)


@pytest.mark.parametrize("secret", [{"discriminator": "google", "data": "x"}, {}, {"discriminator": "aws"}])
def test_other_credentials_are_no_login(secret: dict[str, Any]) -> None:
    with pytest.raises(UpstreamError, match="no login for a registry"):
        read_keys(orjson.dumps(secret))


GOOD = encrypted({"a": 1}, PUBLIC).split("\\")


@pytest.mark.parametrize(
    "parts",
    [
        ["2", *GOOD[1:]],
        ["1", "p", *GOOD[2:]],
        GOOD[:3],
        [*GOOD, "x"],
        [*GOOD[:2], "!", GOOD[3]],
        [*GOOD[:3], "!"],
        [*GOOD[:3], b64encode(b"short").decode()],
        [*GOOD[:2], b64encode(bytes(256)).decode(), GOOD[3]],
        [],
    ],
    ids=["version", "mode", "three", "five", "key-not-base64", "not-base64", "not-blocks", "key-of-another", "empty"],
)
def test_what_is_not_encrypted_for_us_is_refused(parts: list[str]) -> None:
    with pytest.raises(UpstreamError, match="the Platform's credentials"):
        decrypt("\\".join(parts), PRIVATE)


def test_the_key_of_another_pairing_does_not_open_it() -> None:
    with pytest.raises(UpstreamError, match=r"not encrypted for this pairing|JSON"):
        read_keys(decrypt("\\".join(GOOD), _new_keys()[1]))
