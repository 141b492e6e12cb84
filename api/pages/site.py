"""All pages."""

from starlette.routing import Route

from api.containers import Containers
from api.images.inspections import Inspections
from api.pages.builds import BuildPages
from api.pages.containers import ContainerPages
from api.pages.inspection import InspectionPages
from api.pages.mirrors import MirrorPages
from api.pages.scans import ScanPages
from api.scan_orders import ScanOrders
from wave_proxy.state.builds import BuildStore
from wave_proxy.state.scans import ScanReports
from wave_proxy.state.tokens import TokenStore


class Site:
    """The endpoints of all pages; ``authority`` is what image names begin with."""

    def __init__(
        self,
        tokens: TokenStore,
        builds: BuildStore,
        reports: ScanReports,
        scans: ScanOrders,
        containers: Containers,
        inspections: Inspections,
        authority: str,
    ) -> None:
        pages = (
            BuildPages(builds, scans),
            ContainerPages(tokens, builds, authority),
            MirrorPages(builds, scans),
            ScanPages(builds, reports, containers, authority, enabled=scans.enabled),
            InspectionPages(inspections, authority, scans=scans.enabled),
        )
        self.routes: list[Route] = [route for one in pages for route in one.routes]
