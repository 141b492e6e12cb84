"""Two identities, one of which may read a private image: the other gets nothing of it, cached or not, on any path."""

import asyncio
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import sleep, time

import pytest

from bench.images import image, index, layer, random_blob
from bench.upstream import Upstream
from tests.patience import until
from tests.servers import Response, WaveProxy, distribution, has_distribution, http_request, pull, push
from wave_proxy.image.oci import ACCEPT_MANIFESTS
from wave_proxy.image.request import ContainerConfig, ContainerRequest, Identity, Layer
from wave_proxy.state.redis import connect
from wave_proxy.state.tokens import TokenStore

USER, PASSWORD = "user", "secret"
HTPASSWD = f"{USER}:$2y$04$cSIOXkV5cVUjymeJJ4gY0O4Okw1h57wlg4Vz6NQXjVMUvutr8t.vu\n"  # of that password
ALICE = Identity(1, "alice@acme.org")
MALLORY = Identity(2, "mallory@else.org")
NOBODY = Identity()
CONFIG = ContainerConfig(env=("A=1",))

REPOSITORY = "acme/secret"
SECRET = layer({"secret.bin": random_blob(300_000, seed=901)})
SMALL = layer({"small.txt": "the eagle flies at midnight"})
ONE = image([SECRET, SMALL], env=("API_KEY=hunter2",))
OTHER = image([SMALL], env=("API_KEY=hunter3",), platform="linux/arm64")
PRIVATE = index([ONE, OTHER])
PUBLIC = image([layer({"public.txt": "for everybody"})])
TTL_S = 1.0
WORKERS = 2
TRIES = 3  # so that every worker is likely to be asked
ASKING = [("GET", {}), ("HEAD", {}), ("GET", {"Range": "bytes=0-9"})]


@dataclass
class Scene:
    """The program, with a registry that takes a login for everything, and one that takes none."""

    wave: WaveProxy
    redis_url: str
    vault: str  # host
    public: Upstream
    made: set[str] = field(default_factory=set)  # digests of what was made for those who may
    known: list[bytes] = field(default_factory=lambda: [PRIVATE.manifest, ONE.manifest, OTHER.manifest])

    def token(self, identity: Identity, name: str, config: ContainerConfig | None = None) -> str:
        """What a token's repository begins with, for a container that was recorded as the api does."""

        async def put() -> str:
            redis, now = connect(self.redis_url), time()
            try:
                request = ContainerRequest(
                    name, config or ContainerConfig(), identity=identity, created=now, expires=now + 600
                )
                return await TokenStore(redis).put(request)
            finally:
                await redis.aclose()

        return f"wt/{asyncio.run(put())}"

    def names(self, identity: Identity) -> list[str]:
        """The repositories through which that identity could try to get at the private image."""
        name = f"{self.vault}/{REPOSITORY}"
        found = [f"{self.token(identity, f'{name}:1')}/{REPOSITORY}"]
        found += [f"{self.token(identity, f'{name}:1', CONFIG)}/{REPOSITORY}"]
        found += [f"{self.token(identity, f'{name}@{PRIVATE.digest}', CONFIG)}/{REPOSITORY}"]
        return found if identity.email else [*found, f"{self.vault}/{REPOSITORY}"]

    def borrowed(self, identity: Identity) -> str:
        """A public image with layers that are said to be those of the private one."""
        layers = tuple(
            Layer(f"docker://{self.vault}/v2/{REPOSITORY}/blobs/{one.digest}", one.digest, one.size, one.diff_id)
            for one in (SECRET, SMALL)
        )
        config = ContainerConfig(layers=layers)
        return f"{self.token(identity, f'{self.public.address}/lib/tool:1', config)}/lib/tool"

    def paths(self) -> list[str]:
        digests = {PRIVATE.digest, ONE.digest, OTHER.digest, *self.made}
        blobs = {blob.digest for blob in (*ONE.blobs, *OTHER.blobs)} | self.made
        tags = ["manifests/1", f"manifests/sha256-{PRIVATE.digest[7:19]}", "tags/list"]
        contents = [f"manifests/{digest}" for digest in digests] + [f"blobs/{digest}" for digest in blobs]
        return [*tags, *sorted(contents)]

    def warm_up(self, *identities: Identity) -> None:
        """Pull everything, on every worker, also with changes, as those who may."""
        for identity in identities:
            for name in self.names(identity):
                for _ in range(TRIES):
                    pulled = pull(self.wave.address, name, "1" if "wt/" in name else PRIVATE.digest)
                    children = [json.loads(child.manifest) for child in pulled.children]
                    self.made |= {pulled.digest, *(child.digest for child in pulled.children)}
                    self.made |= {child["config"]["digest"] for child in children}
                    self.known += [pulled.manifest, *(child.manifest for child in pulled.children)]
            borrowed = pull(self.wave.address, self.borrowed(identity), "1")
            assert borrowed.layers[-2:] == (SECRET.content, SMALL.content)

    def attack(self, *identities: Identity, tries: int = 1) -> None:
        """Ask for everything in every way, several times; whatever comes, nothing private is in it.

        With one try, for a third of it, another one by each name.
        """
        names = [name for identity in identities for name in self.names(identity)]
        paths = [self.paths()[number % 3 :: 3] if tries == 1 else self.paths() for number in range(len(names))]
        asked = [(name, path, tries) for name, some in zip(names, paths, strict=True) for path in some]
        with ThreadPoolExecutor(8) as pool:
            for refused in pool.map(lambda one: self.is_refused(*one), asked):
                assert refused is None, refused
        for identity in identities:
            name = self.borrowed(identity)
            for blob in (SECRET, SMALL):
                for headers in ({}, {"Range": "bytes=0-9"}):
                    answer = self.ask("GET", f"{name}/blobs/{blob.digest}", headers)
                    assert answer.status in (401, 403, 404), answer
                    assert not self.holds_secrets(answer)

    def is_refused(self, name: str, path: str, tries: int) -> str | None:
        """None when that path brings nothing of the private image; else what came."""
        for method, headers in ASKING[: 3 if path.startswith("blobs/") else 2] * tries:
            answer = self.ask(method, f"{name}/{path}", headers)
            if answer.status not in (401, 403, 404) or self.holds_secrets(answer):
                return f"{method} {name}/{path} {headers}: {answer.status} {answer.body[:200]!r}"
        return None

    def ask(self, method: str, path: str, headers: dict[str, str]) -> Response:
        return self.wave.request(method, f"/v2/{path}", headers={"Accept": ACCEPT_MANIFESTS, **headers})

    def holds_secrets(self, answer: Response) -> bool:
        contents = [*self.known, *(blob.content for blob in (*ONE.blobs, *OTHER.blobs))]
        return bool(answer.body) and any(content[:64] in answer.body or answer.body in content for content in contents)


def tables(*hosts: str) -> str:
    return "".join(f'[registries."{host}"]\ninsecure = true\nallow_private = true\n' for host in hosts)


def configuration(vault: str, public: str, users: str = '["alice@acme.org"]') -> str:
    login = f'username = "{USER}"\npassword = "{PASSWORD}"\n' + (f"users = {users}\n" if users else "")
    times = (
        f'[cache]\npermission_ttl = "{TTL_S}s"\ntag_ttl = "{TTL_S}s"\n[upstream]\nattempts = 1\nidle_timeout = "10m"\n'
    )
    return f"{times}{tables(public, vault)}{login}"


@pytest.fixture
def public(upstream: Callable[..., Upstream]) -> Upstream:
    registry = upstream()
    registry.add("lib/tool", PUBLIC, "1")
    return registry


@pytest.fixture(params=["bearer", "distribution"])
def vault(request: pytest.FixtureRequest, upstream: Callable[..., Upstream], tmp_path: Path) -> Iterator[str]:
    """A registry that wants a login for everything: of one kind or the other (Basic)."""
    if request.param != "distribution":
        yield a_vault(upstream).address
        return
    if not has_distribution():
        pytest.skip("needs docker-registry")
    with distribution(tmp_path) as address:
        push(address, REPOSITORY, PRIVATE, "1")
    with distribution(tmp_path, htpasswd=HTPASSWD) as address:
        yield address


def a_vault(upstream: Callable[..., Upstream]) -> Upstream:
    registry = upstream(auth="bearer", username=USER, password=PASSWORD)
    registry.add(REPOSITORY, PRIVATE, "1")
    return registry


def scene_of(
    wave: Callable[..., WaveProxy], redis_url: str, vault: str, public: Upstream, users: str = '["alice@acme.org"]'
) -> Scene:
    config = configuration(vault, public.address, users)
    return Scene(wave(config=config, redis=redis_url, workers=WORKERS), redis_url, vault, public)


def test_nothing_private_on_any_path(
    vault: str, public: Upstream, wave: Callable[..., WaveProxy], redis_url: str
) -> None:
    scene = scene_of(wave, redis_url, vault, public)
    scene.attack(MALLORY, NOBODY)  # cold
    scene.warm_up(ALICE)
    scene.attack(MALLORY, NOBODY, tries=TRIES)
    scene.warm_up(ALICE)  # nor has the attack taken anything from who may
    sleep(TTL_S)
    scene.attack(MALLORY)


def test_who_may_not_is_told_that_the_login_is_for_others(
    vault: str, public: Upstream, wave: Callable[..., WaveProxy], redis_url: str
) -> None:
    scene = scene_of(wave, redis_url, vault, public)
    image = {"containerImage": f"{vault}/{REPOSITORY}:1"}
    asked = scene.wave.request("POST", "/v1alpha2/container", body=image)
    refused = [asked, *(scene.ask("GET", f"{name}/manifests/1", {}) for name in scene.names(MALLORY)[:1])]
    for answer in refused:
        said = answer.body.decode().replace('\\"', '"')
        assert f'; the login in [registries."{vault}"] is for other users' in said
        assert "set username" not in said
        assert "acme.org" not in said


def test_a_login_for_everybody_opens_the_image_to_all(
    upstream: Callable[..., Upstream], public: Upstream, wave: Callable[..., WaveProxy], redis_url: str
) -> None:
    """Were this not so, the tests above would prove nothing."""
    scene = scene_of(wave, redis_url, a_vault(upstream).address, public, users="")
    scene.warm_up(ALICE, MALLORY, NOBODY)


def test_nothing_of_a_fill_that_is_running(
    upstream: Callable[..., Upstream], public: Upstream, wave: Callable[..., WaveProxy], redis_url: str
) -> None:
    vault = a_vault(upstream)
    scene = scene_of(wave, redis_url, vault.address, public)
    vault.faults.only, vault.faults.stall_at = SECRET.digest, 100_000
    name = scene.names(ALICE)[0]
    with ThreadPoolExecutor() as pool:
        pulling = pool.submit(pull, scene.wave.address, name, ONE.digest)
        until(lambda: vault.fetches(SECRET.digest) or pulling.done())
        scene.attack(MALLORY, NOBODY)
        assert not pulling.done()
        vault.faults.release.set()
        assert pulling.result().layers == (SECRET.content, SMALL.content)
    assert vault.fetches(SECRET.digest) == 1  # nobody else began one


def test_a_login_that_upstream_withdraws(
    upstream: Callable[..., Upstream], public: Upstream, wave: Callable[..., WaveProxy], redis_url: str
) -> None:
    vault = a_vault(upstream)
    scene = scene_of(wave, redis_url, vault.address, public)
    scene.warm_up(ALICE)
    vault.let_in(USER, "another-one")  # but the bearer tokens of before are still taken
    sleep(TTL_S)
    scene.attack(ALICE, MALLORY)
    vault.let_in(USER, PASSWORD)
    scene.warm_up(ALICE)


def test_an_upstream_that_is_down_takes_nothing_from_who_may(
    upstream: Callable[..., Upstream], public: Upstream, wave: Callable[..., WaveProxy], redis_url: str
) -> None:
    vault = a_vault(upstream)
    scene = scene_of(wave, redis_url, vault.address, public)
    scene.warm_up(ALICE)
    fetched = [blob.digest for blob in ONE.blobs]
    names = scene.names(ALICE)
    vault.stop()
    sleep(TTL_S)
    for name in names:
        for _ in range(TRIES):
            pulled = pull(scene.wave.address, name, "1" if name is not names[2] else f"sha256-{PRIVATE.digest[7:19]}")
            assert [child.layers for child in pulled.children] == [(SECRET.content, SMALL.content), (SMALL.content,)]
    for identity in (MALLORY, NOBODY):
        for path in (f"manifests/{PRIVATE.digest}", *(f"blobs/{digest}" for digest in fetched), "manifests/1"):
            for name in scene.names(identity):
                answer = scene.ask("GET", f"{name}/{path}", {})
                assert answer.status >= 400, answer
                assert not scene.holds_secrets(answer)
    vault.start()
    vault.let_in(USER, "another-one")
    vault.revoke_tokens()
    path = f"{names[0]}/blobs/{SMALL.digest}"
    # The registry is left alone for a while after its failures.
    until(lambda: all(scene.ask("GET", path, {}).status != 200 for _ in range(6 * WORKERS)), "it is still given")
    vault.stop()
    assert scene.ask("GET", path, {}).status >= 400  # what was refused is not given again


def test_a_login_that_the_operator_takes_away(
    upstream: Callable[..., Upstream], public: Upstream, tmp_path: Path, redis_url: str
) -> None:
    vault = a_vault(upstream)
    with ExitStack() as stack:

        def start(users: str) -> Scene:
            config = configuration(vault.address, public.address, users)
            proxy = WaveProxy(tmp_path / "data", config=config, redis=redis_url, workers=WORKERS)
            stack.enter_context(proxy)
            return Scene(proxy, redis_url, vault.address, public)

        before = start("")
        before.warm_up(NOBODY, MALLORY)
        before.wave.stop()
        after = start('["alice@acme.org"]')
        after.made, after.known = before.made, before.known
        after.attack(NOBODY, MALLORY)
        after.warm_up(ALICE)
        after.wave.stop()
        gone = Scene(
            stack.enter_context(
                WaveProxy(
                    tmp_path / "data", config=tables(vault.address, public.address), redis=redis_url, workers=WORKERS
                )
            ),
            redis_url,
            vault.address,
            public,
            after.made,
            after.known,
        )
        gone.attack(NOBODY, MALLORY, ALICE)


def test_content_is_fetched_once_for_all_who_may(
    upstream: Callable[..., Upstream], public: Upstream, wave: Callable[..., WaveProxy], redis_url: str
) -> None:
    """Two repositories of one registry, each with a login of its own, and the same image in both."""
    vault = a_vault(upstream)
    vault.add("else/copy", PRIVATE, "1")
    config = configuration(vault.address, public.address)
    config += f'[registries."{vault.address}/else"]\nusername = "{USER}"\npassword = "{PASSWORD}"\n'
    config += 'users = ["*@else.org"]\n'
    proxy = wave(config=config, redis=redis_url, workers=WORKERS)
    scene = Scene(proxy, redis_url, vault.address, public)
    scene.warm_up(ALICE)
    name = f"{scene.token(MALLORY, f'{vault.address}/else/copy:1')}/else/copy"
    for _ in range(TRIES):
        assert pull(proxy.address, name, "1").manifest == PRIVATE.manifest
    for blob in (*ONE.blobs, *OTHER.blobs):
        assert vault.fetches(blob.digest) == 1, blob
    for digest in (PRIVATE.digest, ONE.digest, OTHER.digest):
        asked = [one for one in vault.log if one.path.endswith(f"/manifests/{digest}") and one.status == 200]
        assert [one.method for one in asked].count("GET") == 1, asked
    scene.attack(MALLORY, NOBODY)


def test_without_anonymous_access(
    upstream: Callable[..., Upstream], public: Upstream, wave: Callable[..., WaveProxy], redis_url: str
) -> None:
    vault = a_vault(upstream)
    config = (
        configuration(vault.address, public.address) + "[access]\nanonymous = false\n[local]\nanonymous_push = true\n"
    )
    scene = Scene(wave(config=config, redis=redis_url, workers=WORKERS), redis_url, vault.address, public)
    scene.warm_up(ALICE)
    push(scene.wave.address, "local/tool", PUBLIC, "1")
    for _ in range(TRIES):
        for path in ("manifests/1", f"manifests/{PUBLIC.digest}", f"blobs/{PUBLIC.blobs[0].digest}", "tags/list"):
            for method in ("GET", "HEAD"):
                answer = scene.ask(method, f"{public.address}/lib/tool/{path}", {})
                assert answer.status == 403
            error = scene.ask("GET", f"{public.address}/lib/tool/{path}", {}).json()["errors"][0]
            assert (error["code"], "request the container with an access token" in error["message"]) == ("DENIED", True)
        assert pull(scene.wave.address, "local/tool", "1").manifest == PUBLIC.manifest
        assert pull(scene.wave.address, f"localhost:{scene.wave.port}/local/tool", "1").manifest == PUBLIC.manifest
    scene.attack(NOBODY)


def test_the_api_paths_of_our_own_parts_are_closed(wave: Callable[..., WaveProxy]) -> None:
    proxy = wave()
    query = "?token=x&registry=y&repository=z"
    for path in (
        "/internal/login",
        "//internal/login",
        "///internal//login",
        "/./internal/login",
        "/x/../internal/login",
        "/x/%2e%2e/internal/login",
        "/%69nternal/login",
        "/%2569nternal/login",
        "/internal%2Flogin",
        "/%2Finternal/login",
        "/internal/./login",
        "/Internal/login",
        "/internal;x/../login",
        "/\\internal/login",
        "/internal/login#",
        "/internal/login#/../../x",
        "/internal",
        "/internal/",
        "http://wave.example/internal/login",
        "http://wave.example//%69nternal/login",
    ):
        for method in ("GET", "POST", "HEAD"):
            answer = http_request(proxy.address, method, path + query)
            assert answer.status in ((400,) if "#" in path else (404, 405)), (path, answer.status)
