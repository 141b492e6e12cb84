"""The settings: one frozen object, and the rules for each of its keys.

``docs/configuration.md`` is generated from here, so each field's description is what users read.
"""

from ipaddress import ip_network
from pathlib import Path
from ssl import PROTOCOL_TLS_CLIENT, SSLContext, SSLError
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    field_validator,
    model_validator,
)

from wave_proxy.config.handed import headers_of, own_url, public_url, read_password
from wave_proxy.config.units import format_duration, format_size, parse_duration, parse_size
from wave_proxy.errors import clip
from wave_proxy.image.limit import parse_limit
from wave_proxy.image.platform import is_endpoint
from wave_proxy.image.reference import DOCKER_HUB, HUB_ALIASES, is_registry, is_repository
from wave_proxy.image.scan import Severity


def _duration(value: object) -> object:
    if isinstance(value, str):
        return parse_duration(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    raise ValueError('expected a duration such as "500ms", "10s", "15m", "36h" or "2d"')


def _size(value: object) -> object:
    if isinstance(value, str):
        return parse_size(value)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value  # none is the default of some, which comes along with the other keys of its table
    raise ValueError('expected a size such as "512MB", "50GB" or "4GiB"')


def _positive(value: int | None) -> int | None:
    if value is not None and value <= 0:
        raise ValueError("expected a size greater than 0")
    return value


def _large(value: int) -> int:
    if value < 10**6:
        raise ValueError('expected at least "1MB": a number without a unit is bytes, and 50 GB are "50GB"')
    return value


def _data(value: object) -> object:
    if value == "":
        raise ValueError('expected a folder; "." is the current one')
    return value


def _quota(value: object) -> object:
    if not isinstance(value, str):
        raise ValueError('expected a text: "<max>/<duration>", such as "100/1h", or "off"')
    parse_limit(value)
    return value


def _trusted_proxy(value: str) -> str:
    if value == "unix":
        return value
    try:
        return str(ip_network(value, strict=True))
    except ValueError as err:
        raise ValueError(f'expected an address, a network such as "10.0.0.0/8", or "unix": {err}') from None


def _request_path(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError('expected a path that begins with a slash, such as "/v1alpha1/inspect"')
    return value


def _proxy_url(value: str) -> str:
    parts = urlsplit(value)
    if value and (parts.scheme not in ("http", "https") or not is_registry(parts.netloc.rpartition("@")[2])):
        raise ValueError("expected http://host:port or https://host:port")
    return value.rstrip("/")


def _without_login(url: str) -> str:
    scheme, slashes, rest = url.partition("//")
    return f"{scheme}{slashes}{'**********@' if '@' in rest else ''}{rest.rpartition('@')[2]}"


def _host_and_port(value: str) -> str:
    if not is_registry(value) or ":" not in value.rpartition("]")[2]:
        raise ValueError("expected host:port")
    return value


def _repository(value: str) -> str:
    host, _, path = value.partition("/")
    names_registry = "." in host or ":" in host
    if value and not (is_registry(host) and is_repository(path) if names_registry else is_repository(value)):
        raise ValueError('expected a repository without a tag, such as "registry.cluster:5000/wave"')
    return value


def _long_secret(value: SecretStr) -> SecretStr:
    if 0 < len(value) < _LEAST_SECRET_CHARS:
        raise ValueError(
            f"expected at least {_LEAST_SECRET_CHARS} characters, such as `openssl rand -hex 32` prints: "
            "who guesses it writes to every local repository"
        )
    return value


def _user(value: str) -> str:
    name, at, domain = value.rpartition("@")
    if value != "*" and not (name and at and domain and ("*" not in value or (name == "*" and "*" not in domain))):
        raise ValueError('expected an e-mail address, "*@" and a domain for all of it, or "*" for every known user')
    return value


def _path(value: object) -> object:
    return None if value == "" else value


def _certificates(path: Path | None) -> Path | None:
    if path is not None:
        try:
            SSLContext(PROTOCOL_TLS_CLIENT).load_verify_locations(path)
        except SSLError:
            raise ValueError("expected a file of certificates in PEM") from None
    return path


def _readable(path: Path | None) -> Path | None:
    if path is not None:
        try:
            path.open("rb").close()
        except OSError as err:
            raise ValueError(f"{path} can't be read: {err.strerror}") from None
    return path


_LEAST_SECRET_CHARS = 32
_SHOW_DURATION = PlainSerializer(format_duration, when_used="json")
_SHOW_SIZE = PlainSerializer(format_size, when_used="json-unless-none")
Duration = Annotated[float, BeforeValidator(_duration), Field(gt=0), _SHOW_DURATION]
DurationOrNone = Annotated[float, BeforeValidator(_duration), Field(ge=0), _SHOW_DURATION]  # "0s": not at all
Size = Annotated[int, BeforeValidator(_size), Field(gt=0), _SHOW_SIZE]
LargeSize = Annotated[int, BeforeValidator(_size), AfterValidator(_large), _SHOW_SIZE]  # of files: never a few bytes
OptionalSize = Annotated[int | None, BeforeValidator(_size), AfterValidator(_positive), _SHOW_SIZE]
Quota = Annotated[str, BeforeValidator(_quota)]
User = Annotated[str, AfterValidator(_user)]
TrustedProxy = Annotated[str, AfterValidator(_trusted_proxy)]
RequestPath = Annotated[str, AfterValidator(_request_path)]
ProxyUrl = Annotated[str, AfterValidator(_proxy_url), PlainSerializer(_without_login, when_used="json")]
HostAndPort = Annotated[str, AfterValidator(_host_and_port)]
Repository = Annotated[str, AfterValidator(_repository)]
LongSecret = Annotated[SecretStr, AfterValidator(_long_secret)]
OptionalFile = Annotated[Path | None, BeforeValidator(_path), AfterValidator(_readable)]  # empty text: none
Certificates = Annotated[OptionalFile, AfterValidator(_certificates)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class RegistrySettings(_Section):
    """One table a registry host, as in image names: `[registries."docker.io"]`, `[registries."127.0.0.1:5055"]`.

    A table `[registries."quay.io/acme"]` is a login for the repository `acme` and those that begin with `acme/`. It has
    `username`, `password` or `password_file`, and `users`, and nothing else. The longest that fits is taken, see
    [Who may pull what](access.md).
    """

    endpoint: str = Field(
        "",
        description="Where it is reached, with scheme: a mirror, a test. Empty: `https://<host>`. A path goes before "
        "`/v2/`: `https://mirror/hub` is asked for `/hub/v2/library/busybox/…`.",
    )
    prefix: str = Field(
        "",
        description="What repositories begin with there: with `hub`, `library/busybox` is asked for as "
        "`/v2/hub/library/busybox/…`, as a mirror in a project of Harbor wants it. Builds that keep caches there do "
        "not heed it.",
    )
    username: str = Field("", description="User for this registry.")
    password: SecretStr = Field(SecretStr(""), description="Password or access token of that user.")
    password_file: OptionalFile = Field(None, description="File that holds the password, read at start.")
    users: tuple[User, ...] = Field(
        (),
        description='Whom the login is for: e-mail addresses (`["alice@acme.org"]`) of users with access tokens, all '
        'of a domain (`"*@acme.org"`), all such users (`"*"`). Left out: everybody, also without an access token.',
    )
    insecure: bool = Field(False, description="Speak plain http. Loopback hosts always do, without a `ca_file`.")
    allow_private: bool | None = Field(
        None,
        description="Whether this host may resolve to loopback or private addresses. "
        "Unset: only where `endpoint` names such an address.",
    )
    ca_file: Certificates = Field(None, description="Certificates (PEM) to trust for this host, besides the system's.")
    proxy: ProxyUrl = Field(
        "",
        description="Forward proxy (`http://host:port`) through which this registry is reached. "
        "`HTTPS_PROXY` and such in the environment are not used.",
    )
    max_connections: int | None = Field(
        None, ge=1, description="As in `[upstream]`, for this registry. Unset: what is set there."
    )
    max_bytes_per_second: OptionalSize = Field(
        None,
        description='Limit on the blobs that are fetched from it, such as `"10MB"`, for all fills together. '
        "Each of the `workers` has an equal part. Unset: none.",
    )

    def read_password(self) -> str:
        """The password, from its file if there is one. Raises OSError."""
        return read_password(self)

    @model_validator(mode="after")
    def _has_a_whole_login(self) -> Self:
        has_password = bool(self.password.get_secret_value()) or self.password_file is not None
        if bool(self.username) != has_password:
            missing = "password or password_file" if self.username else "username"
            raise ValueError(f"a login needs both: {missing} is missing")
        if self.password.get_secret_value() and self.password_file is not None:
            raise ValueError("password and password_file are both set: give one of them")
        if "users" in self.model_fields_set and not self.users:
            raise ValueError("users is empty, which would open the login to everybody: name one, or leave users out")
        if self.users and not self.username:
            raise ValueError("users says whom a login is for: username and password are missing")
        return self

    @field_validator("prefix")
    @classmethod
    def _is_prefix(cls, value: str) -> str:
        if value and not is_repository(value):
            raise ValueError('expected the beginning of repositories, such as "project" or "project/hub"')
        return value

    @model_validator(mode="after")
    def _speaks_one_protocol(self) -> Self:
        if self.insecure and self.ca_file is not None:
            raise ValueError("insecure means plain http, which has no certificates: leave out insecure or ca_file")
        return self

    @field_validator("endpoint")
    @classmethod
    def _has_scheme(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("expected an address that begins with http:// or https://")
        return value.rstrip("/")


class HttpSettings(_Section):
    """Limits of the port."""

    header_timeout: Duration = Field(15.0, description="A client has this long to send a request's head.")
    idle_timeout: Duration = Field(75.0, description="A kept-alive connection without a request is closed after this.")
    write_timeout: Duration = Field(120.0, description="A client that takes no byte for this long is cut off.")
    max_header_bytes: Size = Field(65536, description="Limit on a request's head.")
    max_body_bytes: Size = Field(64_000_000, description="Limit on an API request's body.")
    deny_paths: tuple[RequestPath, ...] = Field(
        (), description='Paths, such as `["/v1alpha1/inspect"]`, that are closed: exactly these get status 405.'
    )
    trusted_proxies: tuple[TrustedProxy, ...] = Field(
        (),
        description='Addresses and networks (`["10.0.0.0/8", "::1"]`) of the load balancers in front, `"unix"` for one '
        "on a Unix socket: of a request from these, `X-Forwarded-For` tells the client's address, and of others never.",
    )


class SecurityHeaderSettings(_Section):
    """Headers that go with every answer of the port, for browsers. An empty text leaves one out.

    Pages have a stricter `Content-Security-Policy` of their own.
    """

    enabled: bool = Field(True, description="`false`: none of them.")
    strict_transport_security: str = Field(
        "max-age=31536000; includeSubDomains",
        description="`Strict-Transport-Security`; browsers heed it with TLS only.",
    )
    x_frame_options: str = Field("DENY", description="`X-Frame-Options`.")
    x_content_type_options: str = Field("nosniff", description="`X-Content-Type-Options`.")
    referrer_policy: str = Field("strict-origin-when-cross-origin", description="`Referrer-Policy`.")
    permissions_policy: str = Field("camera=(), microphone=(), geolocation=()", description="`Permissions-Policy`.")
    content_security_policy: str = Field(
        "default-src 'self'; style-src 'self' https://fonts.googleapis.com; font-src https://fonts.gstatic.com; "
        "img-src 'self' data:; frame-ancestors 'none'",
        description="`Content-Security-Policy`.",
    )

    @property
    def headers(self) -> dict[str, str]:
        """Those that are sent, by their names."""
        return headers_of(self)

    @field_validator("*")
    @classmethod
    def _is_one_line(cls, value: object) -> object:
        if isinstance(value, str) and not (value.isascii() and value.isprintable()):
            raise ValueError("expected one line of ASCII characters")
        return value


class CacheSettings(_Section):
    """The blob store in the data folder."""

    max_bytes: LargeSize = Field(50 * 10**9, description="Cap of the store; the blobs not used for longest go first.")
    tag_ttl: Duration = Field(
        60.0, description="How long a tag's digest is taken for known before upstream is asked again."
    )
    permission_ttl: Duration = Field(
        300.0,
        description="How long it is taken for known that a login may read a repository before upstream is asked again. "
        "What upstream gives without a login is not asked for again.",
    )


class UpstreamSettings(_Section):
    """How we talk to registries."""

    connect_timeout: Duration = Field(10.0, description="Limit on connecting, TLS included.")
    response_timeout: Duration = Field(30.0, description="Limit on the wait for an answer's head.")
    idle_timeout: Duration = Field(30.0, description="A transfer that brings no byte for this long is cut and resumed.")
    attempts: int = Field(4, ge=1, le=10, description="How often a failed request is made in all.")
    max_connections: int | None = Field(
        None,
        ge=1,
        description="Requests to one registry at the same time; more wait for their turn. Each of the `workers` has an "
        "equal part, rounded down, and at least one. Unset: no limit.",
    )
    parallel: int = Field(
        1,
        ge=1,
        le=16,
        description="Connections over which one blob is fetched, in parts of 4 MiB that take as much memory each: for "
        "when distance or the registry limits what one connection brings. A registry that gives no parts is asked for "
        "the whole.",
    )
    offline: bool = Field(
        False,
        description="Connect to nothing but this server itself: what is stored is served, tags as they were last "
        "known, and nothing else. Builds reach what is stored here alone, unless `[build] network` is `host`.",
    )


class TokenSettings(_Section):
    """Tokens in image names."""

    lifetime: Duration = Field(
        36 * 3600.0, description="How long a token can be pulled; and again from a pull in the second half of it."
    )
    max_lifetime: Duration = Field(
        7 * 86400.0,
        description="How long it can be pulled at most, however much it is in use; never less than `lifetime`.",
    )
    retention: Duration = Field(7 * 86400.0, description="How long its record can be looked up after that.")
    bytes_anonymous: Size = Field(
        64 * 10**6,
        description="What the container requests of one address may take of Redis' memory in an hour, at each api; "
        "layers and build contexts that they carry count once, and what is refused does not. More get 429.",
    )
    bytes_identified: Size = Field(512 * 10**6, description="The same for a known user.")


class AccessSettings(_Section):
    """Who may use the service."""

    anonymous: bool = Field(
        True,
        description="Whether it takes no access token to ask for containers, and to pull upstream's images by their "
        "names. With `false`, images are pulled by the names that container requests with an access token bring.",
    )


class LogSettings(_Section):
    """What is logged, on standard error."""

    format: Literal["auto", "console", "json"] = Field(
        "auto", description="`auto`: console on a terminal, JSON elsewhere."
    )
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level that is logged.")
    requests: Literal["all", "failed", "none"] = Field(
        "failed",
        description="Which requests get a line; `failed`: status 500 and up, 403, and hosts that do not exist.",
    )


class QuotaSettings(_Section):
    """Limits per user, or per address without one: so many in any span of that length, over all processes and machines.

    `"<max>/<duration>"` or `"off"`. A pull is one GET of an image's manifest: what a HEAD, an index, a config or a
    blob asks for is not counted. IPv6 addresses count by /64. Who is over a limit gets status 429 with the time until
    there is room again in its message and in `RateLimit-Reset`. `Retry-After` says that too, but 60 seconds at most, as
    clients sleep for as long as it says. A limit's time is reckoned in 600 steps: a use counts for up to two of them
    longer, with `"1/1h"` for 12 seconds.
    """

    pull_anonymous: Quota = Field("100/1h", description="Pulls without a user.")
    pull_identified: Quota = Field("2000/1m", description="Pulls of a known user.")
    build_anonymous: Quota = Field("25/1d", description="Builds without a user.")
    build_identified: Quota = Field("250/1h", description="Builds of a known user.")
    wait: DurationOrNone = Field(
        10.0, description='A pull over its limit is held when it can be let in within this time; `"0s"`: never.'
    )
    max_waiting: int = Field(
        10_000, ge=1, le=1_000_000, description="Pulls that one process holds at the same time; more are refused."
    )
    when_redis_is_down: Literal["open", "closed"] = Field(
        "open",
        description="`open`: pulls go on, and are counted when Redis is back; `closed`: they are refused (503) "
        "when the permits at hand are used up.",
    )


class BuildSettings(_Section):
    """Builds from container files and packages, by the builder."""

    engine: Literal["buildah", "buildkit", "none"] = Field(
        "buildah",
        description="What runs a build: `buildah` on the builder's machine, or a remote `buildkit`; `none`: requests "
        "for builds are refused with 501, and the builder is there for mirrors and scans.",
    )
    repository: Repository = Field(
        "", description="Where images are pushed that a request names no repository for; empty: `<server>/local/build`."
    )
    cache_repository: Repository = Field(
        "",
        description="Where layers of such builds are kept to be used again, if the request does not say; empty: none.",
    )
    conda_template: Literal["conda/micromamba:v1", "conda/micromamba:v2", "conda/pixi:v1"] = Field(
        "conda/micromamba:v1", description="Template of Conda builds whose request names none."
    )
    compression: Literal["gzip", "estargz", "zstd"] = Field(
        "gzip", description="Compression of layers for requests that name none."
    )
    max_running: int = Field(4, ge=1, description="Builds at the same time, all builders together.")
    max_running_per_user: int | None = Field(
        None, ge=1, description="Of these, builds of one user, or of one address without a user. Unset: all."
    )
    slots: int | None = Field(
        None, ge=1, description="Builds at the same time in one builder process. Unset: as many as `max_running`."
    )
    timeout: Duration = Field(900.0, description="Limit on one build, from its start to the pushed image.")
    pull_wait: Duration = Field(
        270.0,
        description="How long a pull of an image that is still building is held; then it is answered with 503. "
        "containerd from 2.3 on gives up earlier, and is held for 25 s at most.",
    )
    memory: LargeSize = Field(4 * 10**9, description="Limit on the memory of one build.")
    processes: int = Field(2048, ge=16, description="Limit on the processes and threads of one build.")
    disk: LargeSize = Field(20 * 10**9, description="Limit on the disk space of one build.")
    log_bytes: Size = Field(16 * 10**6, description="Limit on one build's log; a build that writes more fails.")
    log_retention: Duration = Field(7 * 86400.0, description="How long builds and their logs can be looked up.")
    failure_memory: Duration = Field(
        50.0, description="For so long an equal request gets the failed build's answer; after that it is built again."
    )
    network: Literal["isolated", "host"] = Field(
        "isolated",
        description="`isolated`: a build reaches other machines through the builder's own HTTP proxy alone, which "
        "refuses private and loopback addresses; `host`: it has the network of the machine, services on loopback "
        "included.",
    )
    allow_private: tuple[HostAndPort, ...] = Field(
        (),
        description="Private or loopback `host:port` that isolated builds may reach: a mirror of Conda channels, say.",
    )
    proxy: ProxyUrl = Field(
        "",
        description="Forward proxy (`http://host:port`) that builds reach all through but what `allow_private` names: "
        "for networks without another way out. What it lets through, they reach. With `network` `host`, they are told "
        "of it (`http_proxy`). Not for `buildkit`.",
    )
    buildkit_address: str = Field(
        "", description="Where `buildkitd` listens, such as `tcp://buildkit:1234`, for the engine `buildkit`."
    )
    secret: LongSecret = Field(
        SecretStr(""),
        description="What builders authorise themselves with to push to local repositories, 32 characters or more. "
        "Needed by `proxy` and `builder` when they run apart; `serve` makes its own.",
    )

    @model_validator(mode="after")
    def _has_what_the_engine_needs(self) -> Self:
        if self.engine == "buildkit" and not self.buildkit_address:
            raise ValueError('engine = "buildkit" needs buildkit_address, such as "tcp://buildkit:1234"')
        return self


class MirrorSettings(_Section):
    """Copies of images in other registries (`mirror` in a container request), made by the builder."""

    enabled: bool = Field(True, description="`false`: requests for mirrors are refused with 501.")
    timeout: Duration = Field(1200.0, description="Limit on one mirror, from its start to the pushed image.")


class ScanSettings(_Section):
    """Security scans, by the program `trivy` on the builder's machine: see [scans](scans.md).

    Limits on memory, disk and log are those of `[build]`.
    """

    program: str = Field(
        "", description='`"trivy"`, or the path of that program: scans are on. Empty: requests for one get 501.'
    )
    timeout: Duration = Field(900.0, description="Limit on one scan, with the download of the image.")
    severities: tuple[Severity, ...] = Field(
        ("LOW", "MEDIUM", "HIGH", "CRITICAL"),
        description="What is looked for. With `UNKNOWN`, images are refused that no `scanLevels` can allow.",
    )
    max_vulnerabilities: int = Field(
        100, ge=1, le=10_000, description="So many are listed, the worst ones; all of them are counted."
    )
    repeat_after: Duration = Field(
        7 * 86400.0, description="For so long an image that has not changed is not scanned again."
    )
    cache: Path | None = Field(
        None, description="Folder of the vulnerability database. Unset: `scan-cache` in the data folder."
    )
    offline: bool = Field(
        False, description="Never download the database: the operator puts it into `cache`, and keeps it up to date."
    )
    arguments: tuple[str, ...] = Field(
        (), description='More arguments of the program, such as `["--db-repository", "registry.example/trivy-db:2"]`.'
    )


class PagesSettings(_Section):
    """Pages for people at `/view/…`, which clients print the addresses of."""

    enabled: bool = Field(True, description="Whether there are any.")
    landing_url: str = Field("", description="Where the address without a path leads; empty: it is answered with 400.")

    @field_validator("landing_url")
    @classmethod
    def _has_scheme(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("expected an address that begins with http:// or https://")
        return value


class LocalSettings(_Section):
    """Local repositories: images that are pushed here, and named `<server>/local/<name>`.

    Everybody may pull from them. To push or to delete takes a login of `[accounts]`.
    """

    anonymous_push: bool = Field(
        False,
        description="Everybody may push and delete, without a login: for networks that trust everybody. Docker, which "
        "sends a login only to servers that nobody may pull from without one, can push only with this.",
    )
    max_blob_bytes: OptionalSize = Field(None, description="Limit on one pushed blob. Unset: none.")


class AwsSettings(_Section):
    """Amazon's registries (ECR): a login for one is an access key and its secret, or a role and its external id."""

    access_key: str = Field("", description="Access key of this server, with which it takes on roles that logins name.")
    secret_key: SecretStr = Field(SecretStr(""), description="The secret of that access key.")
    url: str = Field("", description="Where Amazon's ECR and STS are reached; empty: by their own addresses.")


class PlatformSettings(_Section):
    """Seqera Platforms: where users come from, and their logins for registries. See [platform.md](platform.md).

    A Platform opens a WebSocket to this server (pairing) and is asked over it from then on.
    """

    enabled: bool = Field(False, description="Whether Platforms can pair with this server.")
    endpoints: tuple[str, ...] = Field(
        (),
        description='Addresses of the Platforms\' APIs, as clients name them: `["https://platform.example.org/api"]`. '
        "`*` stands for any text without a slash.",
    )
    pairing_token: SecretStr = Field(
        SecretStr(""),
        description="What a Platform has to name to pair: its licence, or the text that was agreed on.",
    )
    open_pairing: bool = Field(
        False,
        description="Pair without a token. Who reaches the port can then pair as one of these Platforms, and is "
        "sent the access tokens of its users: for networks that trust everybody.",
    )
    direct: bool = Field(
        False, description="Ask Platforms with requests of our own instead, once they have paired for the keys."
    )
    allow_private: bool = Field(
        False, description="With `direct`: whether Platforms may be at loopback or private addresses."
    )
    run_lifetime: Duration = Field(
        1200.0, description="How long a token lives that a workflow's run has asked for, once the run is over."
    )
    run_max_lifetime: Duration = Field(
        2 * 86400.0, description="How long it lives at most, however long its run goes on."
    )
    run_check: Duration = Field(180.0, description="How often a Platform is asked whether the run goes on.")
    timeout: Duration = Field(5.0, description="How long one answer of a Platform is waited for.")
    patience: Duration = Field(
        15.0, description="So long a Platform that does not answer is asked again, before the request fails."
    )

    @field_validator("endpoints")
    @classmethod
    def _are_endpoints(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for endpoint in value:
            if not is_endpoint(endpoint) or endpoint.rstrip("*/").endswith(":"):
                raise ValueError(f"{clip(endpoint)} is not an address that begins with http:// or https:// and a host")
        return tuple(endpoint.rstrip("/") for endpoint in value)

    @model_validator(mode="after")
    def _says_who_may_pair(self) -> Self:
        if self.enabled and not self.endpoints:
            raise ValueError(
                "enabled needs endpoints: the Platforms that may pair, such as https://api.cloud.seqera.io"
            )
        if self.enabled and not self.open_pairing and not self.pairing_token.get_secret_value():
            raise ValueError(
                "enabled needs pairing_token: without one anybody who reaches the port can pair as such a Platform, "
                "and is sent its users' tokens; open_pairing = true accepts that"
            )
        return self


class Settings(BaseModel):
    """All settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    host: str = Field("", description="Address to listen on; empty: all, IPv4 and IPv6.")
    port: int = Field(9090, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    metrics_host: str = Field("", description="Address of the port for metrics; empty: the same as `host`.")
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="Port for Prometheus, which asks it for [metrics](metrics.md); 0 picks a free one. Unset: none.",
    )
    data: Annotated[Path, BeforeValidator(_data)] = Field(
        Path("wave-data"), description="The data folder: blobs, and the embedded Redis."
    )
    workers: int = Field(0, ge=0, le=256, description="Proxy processes; 0: one per core.")
    server_url: str = Field(
        "",
        description="What image names begin with; empty: `http://localhost:<port>`, with `tls_cert` "
        "`https://localhost:<port>`.",
    )
    redis_url: SecretStr = Field(
        SecretStr(""), description="`redis://`, `rediss://` or `unix://`; empty: an embedded Redis."
    )
    tls_cert: OptionalFile = Field(None, description="Certificate chain (PEM): the port then speaks TLS.")
    tls_key: OptionalFile = Field(None, description="Private key (PEM) of `tls_cert`.")
    shutdown_grace: Duration = Field(10.0, description="On SIGTERM, running requests have this long to end.")
    registries: dict[str, RegistrySettings] = Field(
        default_factory=dict, description="Upstream registries by host, and logins by host and repositories."
    )
    accounts: dict[str, SecretStr] = Field(
        default_factory=dict,
        description="Basic authentication for administration: user to what `wave-proxy account hash` prints, or to "
        "`sha256:<hex of the password's SHA-256>`.",
    )
    # Constructed, not validated: a process that gets its settings handed down never builds what validates them (4 MB).
    http: HttpSettings = HttpSettings.model_construct()
    security_headers: SecurityHeaderSettings = SecurityHeaderSettings.model_construct()
    cache: CacheSettings = CacheSettings.model_construct()
    upstream: UpstreamSettings = UpstreamSettings.model_construct()
    tokens: TokenSettings = TokenSettings.model_construct()
    access: AccessSettings = AccessSettings.model_construct()
    log: LogSettings = LogSettings.model_construct()
    quota: QuotaSettings = QuotaSettings.model_construct()
    build: BuildSettings = BuildSettings.model_construct()
    mirror: MirrorSettings = MirrorSettings.model_construct()
    scan: ScanSettings = ScanSettings.model_construct()
    local: LocalSettings = LocalSettings.model_construct()
    platform: PlatformSettings = PlatformSettings.model_construct()
    aws: AwsSettings = AwsSettings.model_construct()
    pages: PagesSettings = PagesSettings.model_construct()

    @field_validator("server_url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError("expected an address that begins with http:// or https://")
        if value and urlsplit(value).path.strip("/"):
            raise ValueError("expected scheme, host and port only: no path can stand before an image's name")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _has_certificate_and_key(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            missing = "tls_key" if self.tls_key is None else "tls_cert"
            raise ValueError(f"TLS needs both tls_cert and tls_key: {missing} is not set")
        return self

    @model_validator(mode="after")
    def _has_a_port_for_metrics(self) -> Self:
        if self.metrics_port and self.metrics_port == self.port:
            raise ValueError(f"metrics_port: metrics need a port of their own, and {self.port} is `port`")
        return self

    @field_validator("redis_url")
    @classmethod
    def _is_redis_url(cls, value: SecretStr) -> SecretStr:
        if value and not value.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("expected an address that begins with redis://, rediss:// or unix://")
        return value

    @field_validator("registries")
    @classmethod
    def _are_hosts(cls, value: dict[str, RegistrySettings]) -> dict[str, RegistrySettings]:
        for place, table in value.items():
            host, slash, prefix = place.partition("/")
            if not is_registry(host) or (slash and not is_repository(prefix)):
                raise ValueError(
                    f"{place!r} is neither a registry host such as quay.io or 127.0.0.1:5000, nor one with the "
                    "beginning of repositories such as quay.io/acme"
                )
            if host != DOCKER_HUB and host.lower() in {DOCKER_HUB, *HUB_ALIASES}:
                meant = f'[registries."{DOCKER_HUB}{slash}{prefix}"]'
                raise ValueError(f"{place!r} is Docker Hub, which image names call {DOCKER_HUB}: did you mean {meant}?")
            if slash:
                _check_prefix_table(place, table)
        return value

    @property
    def public_url(self) -> str:
        """What image names begin with, scheme included."""
        return public_url(self)

    @property
    def authority(self) -> str:
        """Host and port that the names of our own images begin with."""
        return urlsplit(self.public_url).netloc

    @property
    def own_url(self) -> str:
        """Where our own parts reach the port: what the supervisor says, when it runs them side by side."""
        return own_url(self)


OF_LOGINS = frozenset({"username", "password", "password_file", "users"})


def _check_prefix_table(place: str, table: RegistrySettings) -> None:
    others = sorted(table.model_fields_set - OF_LOGINS)
    if others:
        raise ValueError(
            f"{place!r} stands for repositories and may only hold a login ({', '.join(sorted(OF_LOGINS))}), not "
            f'{", ".join(others)}: that is a matter of the whole registry, [registries."{place.partition("/")[0]}"]'
        )
    if not table.username:
        raise ValueError(f"{place!r} stands for repositories and holds no login: username and password are missing")
