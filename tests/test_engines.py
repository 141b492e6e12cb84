"""Real builds by the engines, hostile ones too; and what the engines tell their tools."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from signal import SIGTERM
from typing import Any

import pytest

from bench.images import busybox_image, has_busybox, image, layer
from bench.upstream import Upstream
from builder.engines import EngineMissing, Job
from builder.engines.buildah import Buildah, check_version, compression_options
from builder.engines.buildkit import BuildKit, build_options, cache_options, named_images, output_options
from builder.engines.registries import registries_conf, translate_auth
from builder.failures import OUT_OF_MEMORY, TIMED_OUT, BuildFailed
from builder.forward import variables
from builder.limits import Limits
from builder.pipeline import check_platforms
from tests.boxes import LIMITS, NO_PROXY, gate, until_there, why_no_box
from tests.patience import PATIENCE_S, patience
from tests.servers import distribution, free_port, has_distribution, http_request, push
from wave_proxy.image.build import BuildSpec, Compression, Compressor
from wave_proxy.upstream.layout import platform_of, read_layout

needs_buildah = [
    pytest.mark.skipif(shutil.which("buildah") is None, reason="the package buildah is not installed"),
    pytest.mark.skipif(bool(why_no_box()), reason=f"no boxes here: {why_no_box()}"),
    pytest.mark.skipif(not has_busybox(), reason="the package busybox-static is not installed"),
    pytest.mark.skipif(not has_distribution(), reason="the package docker-registry is not installed"),
]
BUSYBOX = "docker.io/library/busybox"
AUTHORITY = "wave.example.com"


@dataclass
class Workshop:
    """Runs container files whose base image ``busybox`` is in a registry on loopback."""

    tmp: Path
    registry: str
    engine: Any = None
    count: int = 0
    said: dict[str, bytearray] = field(default_factory=dict)

    def job(self, text: str, files: Mapping[str, str] | None = None, **settings: Any) -> Job:
        """A job in a folder of its own."""
        self.count += 1
        folder = self.tmp / f"job-{self.count}"
        (folder / "context").mkdir(parents=True)
        (folder / "Containerfile").write_text(text)
        for name, content in (files or {}).items():
            (folder / "context" / name).write_text(content)
        spec = BuildSpec("0123456789abcdef", "x/y:z", text, **{"timeout_s": 600.0, **settings})
        said = self.said[str(folder)] = bytearray()
        return Job(spec, folder, {BUSYBOX: f"{self.registry}/library/busybox"}, None, said.extend)

    def log_of(self, job: Job) -> str:
        """What the build has written."""
        return self.said[str(job.folder)].decode(errors="replace")

    async def build(self, text: str, files: Mapping[str, str] | None = None, **settings: Any) -> "Built":
        """The built image. Raises BuildFailed."""
        job = self.job(text, files, **settings)
        return Built(await self.engine.build(job), self.log_of(job))

    async def failure(self, text: str, **settings: Any) -> BuildFailed:
        """Why the build failed. Raises AssertionError when it did not."""
        with pytest.raises(BuildFailed) as caught:
            await self.build(text, **settings)
        return caught.value


@dataclass
class Built:
    """An image layout, and the log of its build."""

    layout: Path
    log: str

    @property
    def digest(self) -> str:
        (entry,) = json.loads((self.layout / "index.json").read_text())["manifests"]
        return str(entry["digest"])

    @property
    def manifest(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.blob(self.digest))
        return document

    @property
    def config(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.blob(self.manifest["config"]["digest"]))
        return document

    def blob(self, digest: str) -> bytes:
        return (self.layout / "blobs" / digest.replace(":", "/")).read_bytes()

    @property
    def files(self) -> dict[str, tarfile.TarInfo]:
        """What is in the gzipped layers, by path."""
        found = {}
        for entry in self.manifest["layers"]:
            with tarfile.open(fileobj=BytesIO(self.blob(entry["digest"])), mode="r:gz") as tar:
                found.update({item.name.strip("/"): item for item in tar})
        return found


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """A registry with busybox, and one image of an index for other platforms."""
    folder = tmp_path / "registry"
    folder.mkdir()
    with distribution(folder) as address:
        push(address, "library/busybox", busybox_image(), "latest", "1")
        yield address


@asynccontextmanager
async def workshop(tmp: Path, registry: str, *allowed: str, limits: Limits = LIMITS) -> AsyncIterator[Workshop]:
    async with gate(registry, *allowed) as way_out:
        yield Workshop(tmp, registry, Buildah(limits, way_out, NO_PROXY, AUTHORITY))


@pytest.fixture
async def shop(tmp_path: Path, registry: str) -> AsyncIterator[Workshop]:
    async with workshop(tmp_path, registry) as made:
        yield made


# --- buildah: what it makes --------------------------------------------------------------------------------------


class TestBuildah:
    pytestmark = needs_buildah

    async def test_this_machine_can_run_it(self, shop: Workshop) -> None:
        await shop.engine.check()

    async def test_a_container_file_becomes_an_image(self, shop: Workshop) -> None:
        text = "FROM busybox AS one\nRUN echo made > /a\nFROM busybox:1\nCOPY --from=one /a /a\nCOPY f /b\nENV X=y\n"
        built = await shop.build(text + 'CMD ["a"]\nRUN cat /a /b && id -u\n', {"f": "given\n"})
        assert "made\ngiven\n0\n" in built.log
        assert built.config["config"]["Env"] == ["PATH=/bin", "X=y"]
        assert built.config["config"]["Cmd"] == ["a"]
        assert {"a", "b", "bin/busybox"} <= set(built.files)
        assert built.files["a"].uid == built.files["b"].gid == 0
        assert built.manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
        assert not [name for name in built.files if "proxy" in name]
        assert "3128" not in json.dumps(built.config)

    async def test_the_same_build_gives_the_same_image(self, shop: Workshop) -> None:
        text = "FROM busybox\nCOPY f /f\nRUN mkdir /d && echo x > /d/x\n"
        first = await shop.build(text, {"f": "1"}, epoch=1_700_000_000)
        os.utime(shop.tmp / "job-1" / "context" / "f", (1, 1))
        await asyncio.sleep(0.1)
        second = await shop.build(text, {"f": "1"}, epoch=1_700_000_000)
        assert first.digest == second.digest
        assert first.files["d/x"].mtime == 1_700_000_000
        assert first.config["created"] == "2023-11-14T22:13:20Z"

    async def test_users_and_links_of_the_base_image_are_kept(self, tmp_path: Path, registry: str) -> None:
        files = {"home/": "", "home/note": "x"}
        push(
            registry,
            "library/linked",
            image([*_layers(), layer(files, links={"home/link": "note"})], env=["PATH=/bin"]),
            "1",
        )
        async with workshop(tmp_path, registry) as shop:
            job = shop.job(
                "FROM linked:1\nRUN echo y > /z && chown 1234:5678 /z 2>/dev/null || /bin/busybox chown 1234:5678 /z\n"
            )
            job = replace(job, base_images={"docker.io/library/linked": f"{registry}/library/linked"})
            built = Built(await shop.engine.build(job), shop.log_of(job))
        assert (built.files["z"].uid, built.files["z"].gid) == (1234, 5678)
        assert built.files["home/link"].issym()

    @pytest.mark.parametrize(
        ("compression", "media_type", "log"),
        [
            (Compression(), "application/vnd.oci.image.layer.v1.tar+gzip", ""),
            (Compression("gzip", 9), "application/vnd.oci.image.layer.v1.tar+gzip", ""),
            (Compression("zstd", 3), "application/vnd.oci.image.layer.v1.tar+zstd", ""),
            (Compression("estargz"), "application/vnd.oci.image.layer.v1.tar+gzip", "estargz is not one of buildah's"),
        ],
    )
    async def test_layers_are_compressed_as_asked(
        self, shop: Workshop, compression: Compression, media_type: str, log: str
    ) -> None:
        built = await shop.build("FROM busybox\nRUN echo x > /x\n", compression=compression)
        assert {entry["mediaType"] for entry in built.manifest["layers"]} == {media_type}
        assert log in built.log

    async def test_layers_of_a_cache_repository_are_used_again(self, shop: Workshop) -> None:
        cache = f"{shop.registry}/cache/layers"
        text = "FROM busybox\nRUN echo run-$((40 + 2)) > /x && cat /x\n"
        first = await shop.build(text, cache_repository=cache)
        second = await shop.build(text + "RUN echo another\n", cache_repository=cache)
        assert "run-42" in first.log
        assert "\nrun-42" not in second.log
        assert "x" in second.files
        tags = http_request(shop.registry, "GET", "/v2/cache/layers/tags/list").json()["tags"]
        assert len(tags) == 2

    async def test_a_private_cache_repository_gets_its_login_and_no_other(self, tmp_path: Path, registry: str) -> None:
        with Upstream(auth="basic") as private:
            async with workshop(tmp_path, registry, private.address) as shop:
                job = shop.job("FROM busybox\nRUN true\n", cache_repository=f"{private.address}/cache/x")
                login = {"auths": {private.address: {"auth": "dXNlcjpzZWNyZXQ="}}}
                auth = job.folder / "auth.json"
                auth.write_text(json.dumps(login))
                with pytest.raises(BuildFailed):  # that registry takes no pushes
                    await shop.engine.build(replace(job, auth_file=auth))
            authorizations = [request.headers.get("Authorization", "") for request in private.log]
        assert "Basic dXNlcjpzZWNyZXQ=" in authorizations

    async def test_a_step_that_sees_all_of_the_box_finds_no_login(self, tmp_path: Path, registry: str) -> None:
        """buildah 1.28 lets a cache's id lead there."""
        find = "grep -r d[X]NlcjpzZWNyZXQ /c/build /c/tmp; cat /c/proc/1/fd/100 /proc/[12]/fd/*; echo looked"
        text = f"FROM busybox\nRUN --mount=type=cache,id=../../..,target=/c ls /c; {find}\n"
        with Upstream(auth="basic") as private:
            async with workshop(tmp_path, registry, private.address) as shop:
                job = shop.job(text, cache_repository=f"{private.address}/cache/x")
                auth = job.folder / "auth.json"
                auth.write_text(json.dumps({"auths": {private.address: {"auth": "dXNlcjpzZWNyZXQ="}}}))
                with pytest.raises(BuildFailed):  # that registry takes no pushes
                    await shop.engine.build(replace(job, auth_file=auth))
                log = shop.log_of(job).partition("STEP 2/2")[2].partition("\n")[2]
        assert "looked" in log
        assert "dXNlcjpzZWNyZXQ" not in log

    async def test_where_a_login_is_in_the_box_no_step_can_change_its_root(self, tmp_path: Path, registry: str) -> None:
        """Else it gets out of it, and sees all of the box."""

        def may_change_root(log: str) -> bool:
            (bounding,) = re.findall(r"^CapBnd:\s*([0-9a-f]+)$", log, re.MULTILINE)
            return bool(int(bounding, 16) >> 18 & 1)  # CAP_SYS_CHROOT

        text = "FROM busybox\nRUN grep CapBnd /proc/self/status\n"
        with Upstream(auth="basic") as private:
            async with workshop(tmp_path, registry, private.address) as shop:
                assert may_change_root((await shop.build(text)).log)
                job = shop.job(text, cache_repository=f"{private.address}/cache/x")
                auth = job.folder / "auth.json"
                auth.write_text(json.dumps({"auths": {private.address: {"auth": "dXNlcjpzZWNyZXQ="}}}))
                with pytest.raises(BuildFailed):
                    await shop.engine.build(replace(job, auth_file=auth))
                assert not may_change_root(shop.log_of(job))

    async def test_our_own_login_is_in_no_box(self, shop: Workshop) -> None:
        job = shop.job("FROM busybox\nRUN true\n", cache_repository=f"{AUTHORITY}/local/cache/x")
        auth = job.folder / "auth.json"
        auth.write_text(json.dumps({"auths": {AUTHORITY: {"auth": "X2J1aWxkZXI6eA=="}}}))
        with pytest.raises(BuildFailed):  # there is no wave-proxy here
            await shop.engine.build(replace(job, auth_file=auth))
        for file in job.folder.rglob("*"):
            assert not (file.is_file() and b"X2J1aWxkZXI6eA" in file.read_bytes()), file

    async def test_a_mount_from_the_context_sees_the_context_only(self, shop: Workshop, tmp_path: Path) -> None:
        (tmp_path / "secret").write_text("nobody's business")
        built = await shop.build("FROM busybox\nRUN --mount=type=bind,source=f,target=/m cat /m\n", {"f": "given"})
        assert "given" in built.log
        for source in ("/etc", "../../secret", "../buildah", str(tmp_path)):
            why = await shop.failure(
                f"FROM busybox\nRUN --mount=type=bind,source={source},target=/m ls -R /m; cat /m/secret /m\n"
            )
            assert why.exit_status != 0
        logs = b"".join(bytes(said) for said in shop.said.values())
        assert b"nobody's business" not in logs
        assert b"passwd" not in logs

    async def test_secrets_ssh_and_frontends_lead_nowhere(self, shop: Workshop) -> None:
        built = await shop.build("# syntax=evil.example.com/frontend:1\nFROM busybox\nRUN echo fine\n")
        assert "fine" in built.log
        assert "evil.example.com" not in built.log
        for mount in ("type=secret,id=x,required=true", "type=ssh,required=true"):
            await shop.failure(f"FROM busybox\nRUN --mount={mount} true\n")

    async def test_the_workspace_is_all_that_is_written_to(self, shop: Workshop, tmp_path: Path) -> None:
        store = Path("/var/lib/containers")
        before = sorted(store.rglob("*")) if store.is_dir() else []
        await shop.build("FROM busybox\nRUN true\n")
        assert (sorted(store.rglob("*")) if store.is_dir() else []) == before
        assert [line for line in Path("/proc/mounts").read_text().splitlines() if str(tmp_path) in line] == []

    # --- what goes wrong -----------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("text", "status", "reason"),
        [
            ("FROM busybox\nRUN exit 3\n", 3, "RUN exit 3 ended with exit status 3"),
            ("FROM busybox\nRUN nosuchprogram\n", 127, "RUN nosuchprogram ended with exit status 127"),
            ("FROM busybox\nCOPY missing /x\n", 125, "missing file: "),
            ("FROM busybox\nNOSUCH x\n", 125, "NOSUCH"),
            ("FROM nosuch.invalid/x:1\n", 125, "nosuch.invalid"),
            ("FROM busybox:2\n", 125, "base image not found"),
        ],
    )
    async def test_a_build_that_fails_says_why(self, shop: Workshop, text: str, status: int, reason: str) -> None:
        why = await shop.failure(text)
        assert reason in why.reason
        assert why.exit_status == status

    @pytest.mark.parametrize(
        ("instruction", "place"),
        [
            ("ADD http://169.254.169.254/latest/meta-data/ /x", "169.254.169.254:80"),
            ("ADD https://169.254.169.254/latest/meta-data/ /x", "169.254.169.254:443"),
            ("RUN /bin/busybox wget -O- http://169.254.169.254/", "169.254.169.254:80"),
            ("RUN /bin/busybox wget -O- http://metadata:secret@10.0.0.1:8080/", "10.0.0.1:8080"),
        ],
    )
    async def test_private_addresses_are_out_of_reach_and_named(
        self, shop: Workshop, instruction: str, place: str
    ) -> None:
        why = await shop.failure(f"FROM busybox\n{instruction}\n")
        if "@" in instruction and "refused" not in why.reason:
            assert why.exit_status != 0
            return
        assert why.reason.startswith("network refused: ")
        assert f'add "{place}" to [build] allow_private' in why.reason

    async def test_a_proxy_leads_to_the_world(self, tmp_path: Path, registry: str) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append((await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")[0])
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
            writer.close()

        asked: list[bytes] = []
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        proxy = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, gate(registry, proxy=proxy) as way_out:
            made = Workshop(tmp_path, registry, Buildah(LIMITS, way_out, NO_PROXY, AUTHORITY))
            built = await made.build("FROM busybox\nRUN /bin/busybox wget -qO- http://nosuch.invalid/x\n")
        assert "hello" in built.log
        assert asked == [b"GET http://nosuch.invalid/x HTTP/1.1"]

    async def test_what_is_allowed_is_in_reach(self, tmp_path: Path, registry: str) -> None:
        with Upstream() as server:
            async with workshop(tmp_path, registry, server.address) as shop:
                url = f"http://{server.address}/v2/"
                text = f"FROM busybox\nADD {url} /x\nRUN /bin/busybox wget -qO- {url} && echo got\n"
                built = await shop.build(text)
        assert "got" in built.log
        assert "x" in built.files

    async def test_services_on_the_machines_loopback_are_out_of_reach(self, shop: Workshop) -> None:
        with Upstream() as server:
            why = await shop.failure(f"FROM busybox\nRUN /bin/busybox wget -O- http://{server.address}/v2/\n")
            assert why.exit_status == 1
            assert server.log == []

    async def test_a_build_for_several_platforms_makes_an_image_for_each(self, shop: Workshop) -> None:
        text = "FROM scratch\nARG TARGETARCH\nCOPY f-$TARGETARCH /f\n"
        files = {"f-amd64": "one", "f-arm64": "other"}
        built = await shop.build(text, files, platform="linux/amd64,linux/arm64")
        images = read_layout(built.layout).children
        assert [platform_of(built.layout, made).architecture for made in images] == ["amd64", "arm64"]
        assert len({made.blobs[-1].digest for made in images}) == 2
        check_platforms(built.layout, "linux/amd64,linux/arm64")
        with pytest.raises(BuildFailed, match="made an index, and one image is expected"):
            check_platforms(built.layout, "linux/amd64")
        with pytest.raises(BuildFailed, match="made 2 images, and 3 are expected"):
            check_platforms(built.layout, "linux/amd64,linux/arm64,linux/arm/v7")
        with pytest.raises(BuildFailed, match="missing platform: the built image is for linux/arm64, and linux/arm/v7"):
            check_platforms(built.layout, "linux/amd64,linux/arm/v7")

    async def test_a_build_for_another_architecture_names_it(self, tmp_path: Path, registry: str) -> None:
        push(
            registry,
            "library/foreign",
            image([layer({"bin/": "", "bin/sh": FOREIGN})], platform="linux/s390x", env=["PATH=/bin"]),
            "1",
        )
        async with workshop(tmp_path, registry) as shop:
            job = shop.job("FROM foreign:1\nRUN true\n", platform="linux/s390x")
            job = replace(job, base_images={"docker.io/library/foreign": f"{registry}/library/foreign"})
            with pytest.raises(BuildFailed, match=r"^missing platform: the build runs programs"):
                await shop.engine.build(job)

    # --- hostile -------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("instruction", "reason", "status"),
        [
            pytest.param(
                "RUN f() { f | f & }; f; sleep 1000", "too many processes: the build reached", 1, id="fork-bomb"
            ),
            pytest.param("RUN /bin/busybox yes", "log too large: the build wrote more than", 1, id="endless-log"),
            pytest.param(
                "RUN sleep 10000", "timed out: the build took longer than its limit of 3 s", TIMED_OUT, id="sleep"
            ),
            pytest.param(
                "RUN trap '' TERM INT HUP; while :; do sleep 10000; done", "timed out: ", TIMED_OUT, id="stubborn-sleep"
            ),
            # By the size that a file may have, or by what the watchdog finds: whichever is first.
            pytest.param(
                "RUN /bin/busybox dd if=/dev/zero of=/x bs=1M",
                r"no space: the build (filled the disk space|used more than its limit of 300\.0 MB of disk)",
                1,
                id="one-file",
            ),
            pytest.param(
                "RUN n=0; while :; do n=$((n+1)); /bin/busybox dd if=/dev/zero of=/x$n bs=1M count=50 2>&-; done",
                r"no space: the build used more than its limit of 300\.0 MB of disk",
                1,
                id="many-files",
            ),
            pytest.param(
                "RUN /bin/busybox dd if=/dev/zero of=/dev/null bs=1500M count=1000",
                r"out of memory: the build used its limit of 1\.0 GB",
                OUT_OF_MEMORY,
                id="memory",
            ),
            pytest.param("RUN /bin/busybox mknod /d b 8 0", "ended with exit status 1", 1, id="device"),
            pytest.param("RUN /bin/busybox mount -t proc proc /tmp", "ended with exit status", 1, id="mount"),
        ],
    )
    async def test_a_hostile_build_ends_with_its_reason(
        self, tmp_path: Path, registry: str, instruction: str, reason: str, status: int
    ) -> None:
        limits = replace(LIMITS, memory=10**9, disk=300 * 10**6, processes=200)
        async with workshop(tmp_path, registry, limits=limits) as shop:
            timeout_s = 3.0 if "sleep 10000" in instruction else 600.0
            why = await shop.failure(f"FROM busybox\n{instruction}\n", timeout_s=timeout_s)
        assert re.search(reason, why.reason), why.reason
        assert why.exit_status == status

    async def test_other_builds_go_on_beside_a_hostile_one(self, shop: Workshop) -> None:
        bomb, killer = "FROM busybox\nRUN f() { f | f & }; f; sleep 1000\n", "FROM busybox\nRUN kill -9 -1\n"
        good = "FROM busybox\nRUN for i in 1 2 3 4 5 6 7 8; do sleep 0.1; echo step; done; echo fine\n"
        bombed, killed, *built = await asyncio.gather(
            shop.failure(bomb), shop.failure(killer), shop.build(good), shop.build(good)
        )
        assert "too many processes" in bombed.reason
        assert killed.exit_status == 137
        assert [item.log.count("step\n") for item in built] == [8, 8]

    async def test_an_escape_from_the_chroot_finds_nothing(self, shop: Workshop, tmp_path: Path) -> None:
        program = _compile_escape(tmp_path)
        secret = tmp_path / "secret"
        secret.write_text("nobody's business")
        secret.chmod(0o644)
        run = f"RUN /escape {secret} /etc/shadow /root/.profile; ls /proc/1/root/ || true"
        job = shop.job(f"FROM busybox\nCOPY escape /escape\n{run}\n")
        shutil.copy(program, job.folder / "context" / "escape")
        await shop.engine.build(job)
        log = shop.log_of(job)
        assert "out: /" in log, "the escape did not run"
        assert "nobody's business" not in log
        assert "root:" not in log
        assert log.count("No such file") + log.count("Permission denied") >= 3
        assert "home" not in re.findall(r"out: (.*)", log)[0].split()

    async def test_a_build_that_is_cancelled_ends_at_once(self, shop: Workshop) -> None:
        job = shop.job("FROM busybox\nRUN sleep 4242.4242\n")
        task = asyncio.create_task(shop.engine.build(job))
        begun = asyncio.create_task(until_there("sleep 4242.4242"))
        await asyncio.wait({task, begun}, return_when=asyncio.FIRST_COMPLETED)
        assert not task.done(), (task, shop.log_of(job))
        await begun
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert subprocess.run(["pgrep", "-f", "sleep 4242.4242"], check=False, capture_output=True).returncode == 1

    # --- the machine ---------------------------------------------------------------------------------------------

    async def test_where_folders_can_not_be_stacked_they_are_copied(
        self, shop: Workshop, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def no_overlay(_: object, __: Path) -> bool:
            return False

        monkeypatch.setattr(Buildah, "_has_overlay", no_overlay)
        built = await shop.build("FROM busybox\nRUN echo x > /x\n")
        assert "x" in built.files
        assert (built.layout.parent / "storage" / "vfs").is_dir()

    async def test_with_the_network_of_the_machine(self, tmp_path: Path, registry: str) -> None:
        made = Workshop(tmp_path, registry, Buildah(LIMITS, None, f"http://{registry}", AUTHORITY))
        assert made.engine.registry == registry
        built = await made.build(f"FROM busybox\nRUN /bin/busybox wget -qO- http://{registry}/v2/ && env\n")
        assert "http_proxy" not in built.log

    async def test_with_that_network_builds_are_told_of_a_proxy(self, tmp_path: Path, registry: str) -> None:
        told = variables("http://proxy.cluster:3128", ["127.0.0.1", "conda.cluster"])
        made = Workshop(tmp_path, registry, Buildah(LIMITS, None, f"http://{registry}", AUTHORITY, told))
        built = await made.build("FROM busybox\nRUN echo to $http_proxy $HTTPS_PROXY but $no_proxy\n")
        proxy = "http://proxy.cluster:3128"
        assert f"to {proxy} {proxy} but localhost,127.0.0.1,::1,conda.cluster\n" in built.log

    async def test_a_machine_without_buildah_is_told_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(EngineMissing, match="needs the program buildah: install the package buildah"):
            await Buildah(LIMITS, None, NO_PROXY, AUTHORITY).check()

    async def test_a_trial_that_fails_is_quoted(self) -> None:
        engine = Buildah(LIMITS, None, NO_PROXY, AUTHORITY)
        with pytest.raises(EngineMissing, match=r"^sh -c .* ends with exit status 1 in a box: no way$"):
            await engine._trial("sh", "-c", "echo no way; exit 1")


@pytest.mark.parametrize("said", ["buildah version 1.19.6 (image-spec 1.0)", "buildah version 0.99", "", "nonsense"])
def test_an_old_buildah_is_named(said: str) -> None:
    with pytest.raises(EngineMissing, match=re.escape(f"needs buildah 1.28 or later: this machine has {said!r}")):
        check_version(said)


@pytest.mark.parametrize(
    "said", ["buildah version 1.28.2 (image-spec 1.1)", "buildah version 1.100.0", "buildah version 2.0"]
)
def test_a_recent_buildah_is_fine(said: str) -> None:
    check_version(said)


# An executable of s390x that this machine can't run, unless it has been told how.
FOREIGN = bytes.fromhex("7f454c460202010000000000000000000002001600000001") + bytes(200)


def _layers() -> list[Any]:
    return [layer({"bin/": "", "bin/busybox": Path("/bin/busybox").read_bytes()}, links={"bin/sh": "busybox"})]


_ESCAPE = r"""
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
int main(int count, char **paths) {
    int here = open("/", O_RDONLY);
    mkdir("/inner", 0700);
    if (chroot("/inner") || fchdir(here)) { perror("chroot"); return 0; }
    for (int i = 0; i < 100; i++) if (chdir("..")) break;
    if (chroot(".")) { perror("chroot ."); return 0; }
    DIR *root = opendir("/");
    printf("out: /");
    for (struct dirent *entry; root && (entry = readdir(root));) printf(" %s", entry->d_name);
    printf("\n");
    for (int i = 1; i < count; i++) {
        char text[4096] = "";
        int file = open(paths[i], O_RDONLY);
        if (file < 0 || read(file, text, sizeof text - 1) < 0) printf("%s: %s\n", paths[i], strerror(errno));
        else printf("%s: %s\n", paths[i], text);
    }
    return 0;
}
"""


def _compile_escape(folder: Path) -> Path:
    """The classic way out of a chroot, as a static program."""
    source, program = folder / "escape.c", folder / "escape"
    source.write_text(_ESCAPE)
    if shutil.which("gcc") is None:
        pytest.skip("there is no compiler")
    made = subprocess.run(["gcc", "-static", "-o", program, source], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        pytest.skip(f"no static programs can be compiled: {made.stderr}")
    return program


# --- what tools are told -----------------------------------------------------------------------------------------


def test_registries_conf_maps_each_repository() -> None:
    text = registries_conf({BUSYBOX: "127.0.0.1:9/wt/a/library/busybox", "quay.io/a/b": "wave.example.com/wt/b/a/b"})
    assert text == (
        'unqualified-search-registries = ["docker.io"]\nshort-name-mode = "disabled"\n\n'
        '[[registry]]\nprefix = "docker.io/library/busybox"\nlocation = "127.0.0.1:9/wt/a/library/busybox"\n'
        "insecure = true\n\n"
        '[[registry]]\nprefix = "quay.io/a/b"\nlocation = "wave.example.com/wt/b/a/b"\n'
    )


def test_a_login_is_known_by_both_names() -> None:
    text = translate_auth('{"auths": {"a": {"auth": "1"}, "b": {"auth": "2"}}}', {"a": "127.0.0.1:1"})
    assert json.loads(text) == {"auths": {"a": {"auth": "1"}, "b": {"auth": "2"}, "127.0.0.1:1": {"auth": "1"}}}


def job(tmp: Path, text: str = "FROM busybox\n", **settings: Any) -> Job:
    locations = {BUSYBOX: "w.example/wt/t/library/busybox", "quay.io/a/b": "w.example/wt/u/a/b"}
    return Job(BuildSpec("0123456789abcdef", "x/y:z", text, **settings), tmp, locations, None, lambda _: None)


@pytest.mark.parametrize(
    ("compression", "options"),
    [
        (Compression(), ["--compression-format", "gzip"]),
        (Compression("gzip", 10), ["--compression-format", "gzip", "--compression-level", "9"]),
        (Compression("gzip", 0), ["--compression-format", "gzip", "--compression-level", "1"]),
        (Compression("zstd", 19), ["--compression-format", "zstd", "--compression-level", "19"]),
        (Compression("estargz", 5), ["--compression-format", "gzip", "--compression-level", "5"]),
    ],
)
def test_buildah_is_told_of_compression(compression: Compression, options: list[str], tmp_path: Path) -> None:
    assert compression_options(job(tmp_path, compression=compression)) == options


BASE = "type=image,name=quay.io/wave:c168dba125e28777,push=true"


@pytest.mark.parametrize(
    ("compression", "suffix"),
    [
        (Compression(), ""),
        (Compression("gzip"), ",compression=gzip"),
        (Compression("gzip", None, False), ",compression=gzip,force-compression=false"),
        (Compression("gzip", 10, True), ",compression=gzip,compression-level=10,force-compression=true"),
        (Compression("estargz"), ",compression=estargz,force-compression=true"),
        (Compression("estargz", None, False), ",compression=estargz,force-compression=false"),
        (Compression("estargz", 2, True), ",compression=estargz,compression-level=2,force-compression=true"),
    ],
)
def test_buildkit_is_told_of_compression(compression: Compression, suffix: str) -> None:
    """Vectors V25; the api puts the configured mode where a request has none."""
    assert output_options(BASE, compression) == f"{BASE},oci-mediatypes=true{suffix}"


def test_buildkit_is_told_what_to_build(tmp_path: Path) -> None:
    options = build_options(job(tmp_path, platform="linux/arm64", epoch=7), tmp_path / "layout")
    assert options == [
        *("build", "--progress", "plain", "--frontend", "dockerfile.v0"),
        *("--local", f"dockerfile={tmp_path}", "--opt", "filename=Containerfile"),
        *("--local", f"context={tmp_path}/context", "--opt", "platform=linux/arm64"),
        *("--opt", "build-arg:SOURCE_DATE_EPOCH=7"),
        *("--opt", "context:busybox=docker-image://w.example/wt/t/library/busybox:latest"),
        *("--output", f"type=oci,dest={tmp_path}/layout,tar=false,rewrite-timestamp=true,oci-mediatypes=true"),
    ]


def test_buildkit_is_told_of_the_cache() -> None:
    spec = BuildSpec("0123456789abcdef", "x", "", cache_repository="q.io/c", compression=Compression("gzip"))
    export = "type=registry,image-manifest=true,ref=q.io/c:0123456789abcdef,mode=max,ignore-error=true"
    assert cache_options(spec) == [
        *("--export-cache", f"{export},oci-mediatypes=true,compression=gzip"),
        *("--import-cache", "type=registry,ref=q.io/c:0123456789abcdef"),
    ]
    assert cache_options(replace(spec, cache_repository="")) == []


@pytest.mark.parametrize(
    ("name", "spelled", "location"),
    [
        ("busybox", "busybox", "L/b:latest"),
        ("busybox:1.36", "busybox:1.36", "L/b:1.36"),
        ("docker.io/library/busybox:latest", "busybox", "L/b:latest"),
        (f"busybox@sha256:{'a' * 64}", f"busybox@sha256:{'a' * 64}", f"L/b@sha256:{'a' * 64}"),
        ("a/b:1", "a/b:1", "L/ab:1"),
        ("quay.io/a/b", "quay.io/a/b", "L/q:latest"),
        ("127.0.0.1:5/a/b:x", "127.0.0.1:5/a/b:x", "L/p:x"),
    ],
)
def test_images_are_named_as_buildkit_does(name: str, spelled: str, location: str) -> None:
    locations = {BUSYBOX: "L/b", "docker.io/a/b": "L/ab", "quay.io/a/b": "L/q", "127.0.0.1:5/a/b": "L/p"}
    assert list(named_images(f"FROM {name}\nCOPY --from=unknown.io/x /a /b\n", "linux/amd64", locations)) == [
        (spelled, location)
    ]


# --- BuildKit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "programs", "message"),
    [
        ("tcp://127.0.0.1:1", (), "the engine buildkit needs the program buildctl"),
        ("", ("buildctl",), "needs [build] buildkit_address, such as tcp://buildkit:1234"),
        (
            "tcp://127.0.0.1:1",
            ("buildctl",),
            "buildkitd does not answer at tcp://127.0.0.1:1 ([build] buildkit_address): no",
        ),
    ],
)
async def test_what_buildkit_lacks_is_named(
    address: str, programs: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in programs:
        (tmp_path / name).write_text("#!/bin/sh\necho no; exit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(EngineMissing, match=re.escape(message)):
        await BuildKit(address, AUTHORITY, 10**6).check()


async def _answers(engine: BuildKit) -> bool:
    try:
        await engine.check()
    except EngineMissing:
        return False
    return True


_BUILDKIT = all(shutil.which(name) for name in ("buildkitd", "buildctl", "runc", "setpriv"))


@pytest.mark.skipif(not _BUILDKIT or os.geteuid() != 0, reason="needs buildkitd, buildctl and runc, and root")
@pytest.mark.skipif(not has_distribution(), reason="the package docker-registry is not installed")
class TestBuildKit:
    @pytest.fixture
    async def shop(self, tmp_path: Path, registry: str) -> AsyncIterator[Workshop]:
        """Builds by a buildkitd of this test; container files without RUN, so that no container is started."""
        address = f"tcp://127.0.0.1:{free_port()}"
        command = ["buildkitd", "--addr", address, "--root", str(tmp_path / "kit"), "--oci-worker-snapshotter=native"]
        with (tmp_path / "buildkitd.log").open("wb") as log:
            daemon = subprocess.Popen([*command, "--containerd-worker=false"], stdout=log, stderr=log)
        engine = BuildKit(address, AUTHORITY, 10**6)
        try:
            try:
                async with patience():
                    while not await _answers(engine):
                        await asyncio.sleep(0.1)
            except TimeoutError:
                pytest.fail((tmp_path / "buildkitd.log").read_text())
            yield Workshop(tmp_path, registry, engine)
        finally:
            daemon.send_signal(SIGTERM)
            daemon.wait(PATIENCE_S)

    async def test_a_container_file_becomes_an_image(self, shop: Workshop) -> None:
        text = "FROM busybox AS one\nFROM busybox:1\nCOPY --from=one /bin/busybox /a\nCOPY f /b\nENV X=y\n"
        built = await shop.build(text, {"f": "given\n"}, epoch=1_700_000_000)
        assert built.config["config"]["Env"] == ["PATH=/bin", "X=y"]
        assert built.files["b"].mtime == 1_700_000_000
        # Of its base image some versions keep the layers as they are, and some (0.18) pack them anew with other times.
        assert len(built.manifest["layers"]) == 3
        assert built.files["bin/busybox"].size == built.files["a"].size
        assert built.digest == (await shop.build(text, {"f": "given\n"}, epoch=1_700_000_000)).digest

    async def test_compression_and_cache(self, shop: Workshop) -> None:
        cache = f"{shop.registry}/cache/kit"
        modes: tuple[tuple[Compressor, str], ...] = (("zstd", "+zstd"), ("estargz", "+gzip"))
        for mode, ending in modes:
            built = await shop.build(
                "FROM busybox\nCOPY f /b\n", {"f": mode}, compression=Compression(mode), cache_repository=cache
            )
            assert built.manifest["layers"][-1]["mediaType"].endswith(ending)
        tags = http_request(shop.registry, "GET", "/v2/cache/kit/tags/list").json()["tags"]
        assert tags == ["0123456789abcdef"]

    async def test_a_build_that_fails_says_why(self, shop: Workshop) -> None:
        why = await shop.failure("FROM busybox\nCOPY missing /x\n")
        assert why.reason.startswith("missing file: ")
        why = await shop.failure("FROM busybox\nNOSUCH x\n")
        assert "NOSUCH" in why.reason
