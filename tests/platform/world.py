"""What a Platform knows and how it answers: users, their tokens and credentials, runs. Source: ``wave.md`` §10.4."""

import json
from base64 import b64encode
from dataclasses import dataclass, field
from os import urandom
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from cryptography.hazmat.primitives.padding import PKCS7
from cryptography.hazmat.primitives.serialization import load_der_public_key

Answer = tuple[int, dict[str, list[str]], str]
"""Status, headers and body."""


@dataclass
class World:
    """One Platform. ``prefix`` is the path of its API's address."""

    prefix: str
    users: dict[str, dict[str, Any]] = field(default_factory=dict)  # by access token
    refresh: dict[str, list[str]] = field(default_factory=dict)  # refresh token to the new pair of tokens
    credentials: dict[str, dict[str, Any]] = field(default_factory=dict)  # by id: owner, workspace, provider, secret …
    workflows: dict[str, dict[str, Any]] = field(default_factory=dict)
    public_keys: dict[str, bytes] = field(default_factory=dict)  # by pairing id, what the other side sent
    seen: list[str] = field(default_factory=list)  # "<token> <method> <path?query>"
    status: int = 0  # what every answer is instead
    delay_s: float = 0.0

    def answer(self, method: str, uri: str, authorization: str, body: str) -> Answer:
        """The answer to one request."""
        url = urlsplit(uri)
        token = authorization.removeprefix("Bearer ")
        self.seen.append(f"{token} {method} {url.path.removeprefix(self.prefix)}{'?' if url.query else ''}{url.query}")
        if self.status:
            return self.status, {}, ""
        parts = url.path.removeprefix(self.prefix).strip("/").split("/")
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        if method == "POST" and parts == ["oauth", "access_token"]:
            return self._refreshed(parse_qs(body))
        user = self.users.get(token)
        if user is None:
            return 401, {}, ""
        return self._read(parts, query, user)

    def _read(self, parts: list[str], query: dict[str, str], user: dict[str, Any]) -> Answer:
        match parts:
            case ["user-info"]:
                return _json({"user": user})
            case ["credentials"]:
                mine = [entry for entry in self.credentials.values() if _is_of(entry, user, query)]
                return _json({"credentials": [_described(entry) for entry in mine]})
            case ["credentials", name, "keys"] if name in self.credentials:
                entry = self.credentials[name]
                if not _is_of(entry, user, query):
                    return 403, {}, ""
                return _json({"keys": encrypted(entry["secret"], self.public_keys[query["pairingId"]])})
            case ["workflow", name] if name in self.workflows:
                return _json({"workflow": {"id": name, "status": self.workflows[name]["status"]}})
            case ["workflow", name, "launch"] if name in self.workflows:
                return _json({"launch": {"computeEnv": self.workflows[name]["computeEnv"]}})
        return 404, {}, ""

    def _refreshed(self, form: dict[str, list[str]]) -> Answer:
        pair = self.refresh.get(form.get("refresh_token", [""])[0])
        if form.get("grant_type") != ["refresh_token"] or pair is None:
            return 400, {}, ""
        cookies = [f"JWT={pair[0]}; Path=/; HttpOnly"]
        if pair[1:]:
            cookies.append(f"JWT_REFRESH_TOKEN={pair[1]}; Path=/oauth; HttpOnly")
        return 200, {"set-cookie": cookies}, ""


def _is_of(entry: dict[str, Any], user: dict[str, Any], query: dict[str, str]) -> bool:
    return bool(entry["user"] == user["id"] and str(entry.get("workspace") or "") == query.get("workspaceId", ""))


def _described(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry.get(name) for name in ("id", "name", "provider", "registry", "deleted")}


def _json(document: dict[str, Any]) -> Answer:
    return 200, {"content-type": ["application/json"]}, json.dumps(document)


def encrypted(secret: dict[str, Any], public_key: bytes) -> str:
    """A secret as the Platform sends it. Source: ``wave.md`` §10.5."""
    public, key = load_der_public_key(public_key), urandom(16)
    assert isinstance(public, RSAPublicKey)
    padder = PKCS7(128).padder()
    plain = padder.update(json.dumps(secret).encode()) + padder.finalize()
    encryptor = Cipher(AES(key), ECB()).encryptor()
    hidden = encryptor.update(plain) + encryptor.finalize()
    return "\\".join(("1", "P", b64encode(public.encrypt(key, PKCS1v15())).decode(), b64encode(hidden).decode()))
