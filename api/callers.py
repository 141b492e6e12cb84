"""Where a request comes from."""

from starlette.requests import Request

_CLIENT_HEADER = "x-wave-client"  # the client's address, from the proxy, which overwrites what clients send


def client_address(request: Request) -> str:
    """The address of the client, as the proxy in front saw it."""
    return request.headers.get(_CLIENT_HEADER) or (request.client.host if request.client else "")
