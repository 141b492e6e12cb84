"""The page that inspects an image."""

import orjson
from starlette.requests import Request
from starlette.responses import Response

from api.endpoints import HTML, Answer, Parameter, endpoint, routes_of
from api.images.inspections import Inspections
from api.pages.render import page
from wave_proxy.errors import WaveError


class InspectionPages:
    """The page of inspection; with ``scans`` it offers one of the image."""

    def __init__(self, inspections: Inspections, *, scans: bool) -> None:
        self._inspections = inspections
        self._scans = scans
        self.routes = routes_of(self)

    @endpoint(
        "GET",
        "/view/inspect",
        "Pages",
        {200: Answer("The image, or what is wrong with it.", media_types=(HTML,))},
        parameters=(
            Parameter("image", "The image; without one, the page asks for it."),
            Parameter("platform", "Of an index: the image for this platform, such as `linux/arm64`."),
        ),
    )
    async def show(self, request: Request) -> Response:
        """What an image is, as its registry has it, for everybody."""
        image, platform = request.query_params.get("image", ""), request.query_params.get("platform", "")
        found, error = "", ""
        if image:
            try:
                document = await self._inspections.look({"containerImage": image}, platform)
                found = orjson.dumps(document, option=orjson.OPT_INDENT_2).decode()
            except WaveError as err:
                error = str(err)
        return page(
            "inspect.html",
            "Inspect an image",
            image=image,
            platform=platform,
            found=found,
            error=error,
            scans=self._scans,
        )
