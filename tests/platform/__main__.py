"""``python -m tests.platform --endpoint URL --port N``: a Platform, which listens on loopback.

Its API is served under the path of ``--endpoint``, and over WebSockets that it opens where it is told to. ``/control``
tells it what to do: POST takes JSON with any of the members of ``World`` and ``pair`` (an address such as
``ws://127.0.0.1:9090/pairing/tower/token/x``, empty to end the session); GET shows what it has seen.
"""

import argparse
import asyncio
import json
from base64 import b64decode
from contextlib import suppress
from typing import Any
from urllib.parse import quote, urlsplit

from aiohttp import ClientError, ClientSession, ClientWebSocketResponse, WSMsgType, web

from tests.platform.world import World

_HEARTBEAT_S = 1.0
_PAUSE_S = 0.1


class Platform:
    """The program's state: a world, and the session with the server that it is paired with."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.world = World(urlsplit(endpoint).path)
        self.sessions: list[str] = []  # what became of them: "paired", or the close code
        self._task: asyncio.Task[None] | None = None

    async def serve(self, request: web.Request) -> web.Response:
        """The API over plain HTTP."""
        body = await request.text()
        await asyncio.sleep(self.world.delay_s)
        authorization = request.headers.get("authorization", "")
        status, headers, text = self.world.answer(request.method, request.path_qs, authorization, body)
        response = web.Response(status=status, text=text)
        for name, values in headers.items():
            for value in values:
                response.headers.add(name, value)
        return response

    async def control(self, request: web.Request) -> web.Response:
        """Do what the tests say."""
        if request.method == "POST":
            for name, value in (await request.json()).items():
                if name == "pair":
                    await self._pair(value)
                elif isinstance(value, dict):
                    getattr(self.world, name).update(value)
                else:
                    setattr(self.world, name, value)
        return web.json_response({"seen": self.world.seen, "sessions": self.sessions})

    async def _pair(self, address: str) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        self._task = asyncio.create_task(self._stay_paired(address)) if address else None

    async def _stay_paired(self, address: str) -> None:
        while True:
            with suppress(ClientError, OSError):
                async with (
                    ClientSession() as session,
                    session.ws_connect(f"{address}?endpoint={quote(self.endpoint, safe='')}") as socket,
                ):
                    await self._converse(socket)
                    self.sessions.append(str(socket.close_code))
            await asyncio.sleep(_PAUSE_S)

    async def _converse(self, socket: ClientWebSocketResponse) -> None:
        async with asyncio.TaskGroup() as tasks:
            heart = tasks.create_task(_beat(socket))
            async for message in socket:
                if message.type == WSMsgType.TEXT:
                    tasks.create_task(self._take(socket, json.loads(message.data)))
            heart.cancel()

    async def _take(self, socket: ClientWebSocketResponse, message: dict[str, Any]) -> None:
        match message["@type"]:
            case "pairing-response":
                self.world.public_keys[message["pairingId"]] = b64decode(message["publicKey"])
                self.sessions.append("paired")
            case "proxy-http-request":
                await asyncio.sleep(self.world.delay_s)
                status, headers, body = self.world.answer(
                    message["method"], message["uri"], message["auth"] or "", message["body"] or ""
                )
                reply = {"msgId": message["msgId"], "status": status, "body": body, "headers": headers}
                with suppress(ConnectionError):
                    await socket.send_json({"@type": "proxy-http-response", **reply})


async def _beat(socket: ClientWebSocketResponse) -> None:
    number = 0
    while True:
        await asyncio.sleep(_HEARTBEAT_S)
        number += 1
        await socket.send_json({"@type": "pairing-heartbeat", "msgId": f"beat-{number}"})


async def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(prog="python -m tests.platform")
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    platform, app = Platform(arguments.endpoint), web.Application()
    app.router.add_route("*", "/control", platform.control)
    app.router.add_route("*", "/{path:.*}", platform.serve)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", arguments.port).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
