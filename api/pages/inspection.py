"""The page that inspects an image."""

from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlencode

import orjson
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from api.body import read_text
from api.callers import is_from_other_site
from api.endpoints import HTML, Answer, Parameter, endpoint, routes_of
from api.images.inspections import Inspections
from api.pages.render import message, page
from wave_proxy.errors import WaveError

_PATH = "/view/inspect"
_TITLE = "Inspect an image"
_MAX_BODY_BYTES = 20_000
_SHOWN = Answer("The image, or what is wrong with it.", media_types=(HTML,))


@dataclass(frozen=True, slots=True)
class _Asked:
    image: str
    platform: str
    token: str = field(default="", repr=False)


class InspectionPages:
    """The page of inspection; with ``scans`` it offers one of the image.

    ``authority`` is the host and port that people reach us by.
    """

    def __init__(self, inspections: Inspections, authority: str, *, scans: bool) -> None:
        self._inspections = inspections
        self._authority = authority
        self._scans = scans
        self.routes = routes_of(self)

    @endpoint(
        "GET",
        _PATH,
        "Pages",
        {200: _SHOWN},
        parameters=(
            Parameter("image", "The image; without one, the page asks for it."),
            Parameter("platform", "Of an index: the image for this platform, such as `linux/arm64`."),
        ),
    )
    async def show(self, request: Request) -> Response:
        """What an image is, as its registry has it, for everybody."""
        query = request.query_params
        return await self._answer(_Asked(query.get("image", ""), query.get("platform", "")))

    @endpoint(
        "POST",
        _PATH,
        "Pages",
        {
            200: _SHOWN,
            303: Answer("Without an access token: to the address of the same.", headers={"Location": "The page."}),
            400: Answer("The body is no form.", media_types=(HTML,)),
            403: Answer("The form is one of another site.", media_types=(HTML,)),
            413: Answer("The body is too large.", media_types=(HTML,)),
        },
    )
    async def submit(self, request: Request) -> Response:
        """What an image is, for the user of an access token.

        The body is a form with `image`, `platform` and `token`. The token serves for this answer only, and is kept
        nowhere.
        """
        if is_from_other_site(request, self._authority):
            return message(_TITLE, "This form can only be sent from this site's own pages.", 403)
        try:
            asked = _read_form(await read_text(request, _MAX_BODY_BYTES))
        except WaveError as err:
            return message(_TITLE, str(err), err.status)
        if asked.token:
            return await self._answer(asked)
        query = urlencode({name: text for name in ("image", "platform") if (text := getattr(asked, name))})
        return RedirectResponse(f"{_PATH}?{query}" if query else _PATH, 303)

    async def _answer(self, asked: _Asked) -> Response:
        found, error = "", ""
        if asked.image:
            try:
                document = {"containerImage": asked.image, "towerAccessToken": asked.token}
                told = await self._inspections.look(document, asked.platform)
                found = orjson.dumps(told, option=orjson.OPT_INDENT_2).decode()
            except WaveError as err:
                error = str(err)
        return page(
            "inspect.html",
            _TITLE,
            image=asked.image,
            platform=asked.platform,
            found=found,
            error=error,
            scans=self._scans and not asked.token,  # the form of scans knows nobody
        )


def _read_form(text: str) -> _Asked:
    """What the form asks for; its members are without a value where they are left out."""
    members = parse_qs(text)
    image, platform, token = (members.get(name, [""])[0].strip() for name in ("image", "platform", "token"))
    return _Asked(image, platform, token)
