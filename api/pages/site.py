"""All pages."""

from starlette.routing import Route

from api.inspections import Inspections
from api.pages.builds import BuildPages
from api.pages.containers import ContainerPages
from api.pages.inspection import InspectionPages
from wave_proxy.state.builds import BuildStore
from wave_proxy.state.tokens import TokenStore


class Site:
    """The endpoints of all pages; ``authority`` is what image names begin with."""

    def __init__(self, tokens: TokenStore, builds: BuildStore, inspections: Inspections, authority: str) -> None:
        pages = (BuildPages(builds), ContainerPages(tokens, builds, authority), InspectionPages(inspections))
        self.routes: list[Route] = [route for one in pages for route in one.routes]
