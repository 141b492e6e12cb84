"""A builder in a process of its own, with a short lease, to be killed: ``python -m tests.builder_process JSON``.

Members of the JSON: ``redis``, ``data`` (folder of workspaces), ``proxy`` (wave-proxy's URL), ``open`` (registries on
loopback), ``lease_s``.
"""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from builder.engines.buildah import Buildah
from builder.gate import Gate
from builder.lending import Lending
from builder.limits import Limits
from builder.pipeline import Pipeline
from builder.work import Works
from builder.worker import Worker
from builder.workspace import Workspaces
from wave_proxy.state.builds import BuildLimits, BuildStore
from wave_proxy.state.redis import connect
from wave_proxy.state.tokens import TokenStore
from wave_proxy.upstream.credentials import Credentials
from wave_proxy.upstream.egress import Egress, endpoint_for
from wave_proxy.upstream.registry import Registry


async def run(told: dict[str, Any]) -> None:
    """Work until killed."""
    egress = Egress({host: endpoint_for(host, insecure=True, allow_private=True) for host in told["open"]})
    async with connect(told["redis"]) as redis:
        registry, tokens = Registry(egress, Credentials({})), TokenStore(redis)
        workspaces = Workspaces(Path(told["data"]), registry, tokens, 1 << 30)
        await workspaces.remove_leftovers()
        limits = Limits(1 << 30, 500, 1 << 30, 1 << 20)
        engine = Buildah(limits, Gate(egress, told["proxy"]), told["proxy"], "wave.test")
        pipeline = Pipeline(engine, workspaces, registry, Lending(tokens, "wave.test"), Credentials({}))
        builds = BuildStore(redis, BuildLimits(4), lease_s=told["lease_s"])
        worker = Worker(builds, Works({"build": pipeline}), f"builder-{os.getpid()}", slots=4, lease_s=told["lease_s"])
        await worker.run(asyncio.Event(), 0)


if __name__ == "__main__":
    asyncio.run(run(json.loads(sys.argv[1])))
