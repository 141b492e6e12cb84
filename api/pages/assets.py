"""What pages load: style sheets and scripts, named by their content, so that browsers may keep them for good."""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response

from api.endpoints import UNKNOWN, Answer, Parameter, endpoint, routes_of

_MEDIA_TYPES = {"css": "text/css", "js": "text/javascript"}
_FOR_GOOD = {"Cache-Control": "public, max-age=31536000, immutable"}


@dataclass(frozen=True, slots=True)
class _Asset:
    content: bytes
    media_type: str


def _read() -> tuple[Mapping[str, str], Mapping[str, _Asset]]:
    """Addresses by the names of the files, and what is at each address."""
    addresses, found = {}, {}
    for file in files("api.pages").joinpath("static").iterdir():
        stem, _, kind = file.name.rpartition(".")
        if kind not in _MEDIA_TYPES:
            continue
        content = file.read_bytes()
        name = f"{stem}.{sha256(content).hexdigest()[:12]}.{kind}"
        addresses[file.name] = f"/assets/{name}"
        found[name] = _Asset(content, _MEDIA_TYPES[kind])
    return addresses, found


_ADDRESSES, _ASSETS = _read()


def asset(file: str) -> str:
    """The address of a file of ``static``. Raises KeyError."""
    return _ADDRESSES[file]


class Assets:
    """The endpoint of what pages load."""

    def __init__(self) -> None:
        self.routes = routes_of(self)

    @endpoint(
        "GET",
        "/assets/{name}",
        "Pages",
        {200: Answer("It.", media_types=tuple(_MEDIA_TYPES.values())), 404: UNKNOWN},
        parameters=(Parameter("name", "As pages name it.", place="path"),),
    )
    async def show(self, request: Request) -> Response:
        """A style sheet or a script of the pages."""
        found = _ASSETS.get(request.path_params["name"])
        if found is None:
            return Response(status_code=404)
        return Response(found.content, headers=_FOR_GOOD, media_type=found.media_type)
