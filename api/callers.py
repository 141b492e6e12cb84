"""Where a request comes from."""

from urllib.parse import urlsplit

from starlette.requests import Request

_CLIENT_HEADER = "x-wave-client"  # the client's address, from the proxy, which overwrites what clients send


def client_address(request: Request) -> str:
    """The address of the client, as the proxy in front saw it."""
    return request.headers.get(_CLIENT_HEADER) or (request.client.host if request.client else "")


def is_from_other_site(request: Request, *own: str) -> bool:
    """Whether a browser sends this for a page that is not ours; ``own`` are hosts of ours besides the request's."""
    origin = request.headers.get("origin")
    if origin is None or request.headers.get("sec-fetch-site") == "same-origin":
        return False
    return urlsplit(origin).netloc not in (request.headers.get("host"), *own)
