"""Why a build failed, in one line that says what to do: read out of what its tools wrote last."""

from collections.abc import Callable
from re import IGNORECASE, MULTILINE, Match
from re import compile as compile_pattern

OUT_OF_MEMORY = 137  # 128 + SIGKILL: what a shell, and the kernel's killer, make of it
TIMED_OUT = 124  # as timeout(1) has it
NOT_BUILT = 255  # it never came to run anything
CANCELLED = 130

_MAX_QUOTE = 200
_MAX_CAUSE = 600  # of what a registry says, which comes with what to do
_TAIL_CHARS = 16 << 10
_TAIL_LINES = 60
_MAX_LINE = 1000


class BuildFailed(Exception):
    """A build that ended without an image; ``reason`` is one line for people, the exit status is never 0."""

    def __init__(self, reason: str, exit_status: int = 1) -> None:
        super().__init__(reason)
        self.reason = reason
        self.exit_status = exit_status or 1


def timed_out(timeout_s: float, kind: str = "build") -> BuildFailed:
    """The failure of a job that took longer than it may; its limit is in the settings under the name of its kind."""
    remedy = "make it smaller, or " if kind == "build" else ""
    return BuildFailed(
        f"timed out: the {kind} took longer than its limit of {timeout_s:g} s; {remedy}have the operator raise "
        f"[{kind}] timeout",
        TIMED_OUT,
    )


Say = Callable[[Match[str]], str]


def _rule(pattern: str, say: str, most: int = _MAX_QUOTE) -> tuple[Callable[[str], Match[str] | None], Say]:
    """In ``say``, ``{0}`` is the first group that matched, up to ``most`` characters of it."""
    found = compile_pattern(pattern, IGNORECASE | MULTILINE)

    def last(text: str) -> Match[str] | None:
        match = None
        for match in found.finditer(text):  # noqa: B007 - the last one is meant
            pass
        return match

    def worded(match: Match[str]) -> str:
        quote = next((group for group in match.groups() if group), match[0])
        return say.format(_quoted(quote, most))

    return last, worded


def _quoted(text: str, most: int = _MAX_QUOTE) -> str:
    """One line without what would break a log or an answer, and not too long."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


_BEFORE_IMAGE = r"(?:.*initializing source docker://)?"  # what buildah says first

# The first that matches names the failure: what a machine ran out of comes before what failed because of that.
_RULES = (
    _rule(  # and whatever that one ran out of is told with it
        rf"^{_BEFORE_IMAGE}(.*: the build of this image has failed \(.*)$",
        "base image not found or not readable: {0}",
        _MAX_CAUSE,
    ),
    _rule(
        r"^(.*(?:no space left on device|disk quota exceeded|file size limit exceeded|file too large).*)$",
        "no space: the build filled the disk space that it has ({0}); install less, or raise [build] disk",
    ),
    _rule(
        r"^(.*(?:cannot allocate (?:memory|vector)|std::bad_alloc|\bMemoryError\b|out of memory|oom-kill"
        r"|JavaScript heap).*)$",
        "out of memory: {0}; build with fewer jobs at once, or raise [build] memory",
    ),
    _rule(
        r"^(.*(?:fork: (?:retry: )?resource temporarily unavailable|can't fork|can't start new thread"
        r"|pthread_create failed).*)$",
        "too many processes: {0}; build with fewer jobs at once, or raise [build] processes",
    ),
    _rule(
        r"^(.*(?:toomanyrequests|\b429\b[ :,)]*too many requests|status(?: code)?[ :=]*429\b|\berror[ :]+429\b"
        r"|returned error: 429|limits requests).*)$",
        "upstream limits requests (429): {0}; wait before trying again, or give the registry or mirror a login",
    ),
    _rule(
        r"^(.*(?:no image found in (?:manifest list|image index) for architecture|no match for platform in manifest"
        r"|does not match the (?:specified|expected) platform|choosing an image from manifest list).*)$",
        "missing platform: a base image does not exist for the platform that was asked for ({0}); "
        "choose another containerPlatform or base image",
    ),
    _rule(
        r"^(.*exec format error.*)$",
        "missing platform: the build runs programs of another architecture than the builder's ({0}); build for the "
        "builder's platform, or register qemu-user-static (binfmt) on its machine",
    ),
    _rule(r"refused by wave-proxy: (.*)$", "network refused: {0}"),
    _rule(
        r"^(.*(?:could not solve for environment specs|cannot solve the request|failed to solve(?!:)"
        r"|nothing provides|packagesnotfounderror|resolvepackagenotfound|unsatisfiableerror|no candidates were found"
        r"|following packages? (?:are|is) (?:incompatible|missing)|unable to solve"
        r"|is not available for this version of R|(?:package|dependency) .{1,80} is not available"
        r"|no matching distribution found|resolutionimpossible|unable to locate package|unable to select packages"
        r"|no match for argument).*)$",
        "unsatisfiable packages: {0}; check the packages' names, versions and channels",
    ),
    _rule(r"^network: (.*)$", "no network: {0}"),
    # What wave-proxy says of its own accord has the remedy in it: a name that is not resolved needs no other login.
    _rule(
        rf"^{_BEFORE_IMAGE}(.*(?:this machine can't resolve|no answer from|no connection to|did not answer within"
        r"|has failed and is left alone|unexpected HTTP status: 5\d\d).*)$",
        "base image can't be read: {0}",
        _MAX_CAUSE,
    ),
    _rule(
        r"^.*(?:writing blob|storing blob|copying blob).*(unexpected EOF|connection reset by peer).*$",
        "base image can't be read: a layer broke off while it was fetched ({0}); the log of wave-proxy says why",
    ),
    _rule(
        rf"^{_BEFORE_IMAGE}(.*(?:denies access to repository|\bdenied: ).*)$",
        "base image not found or not readable: {0}",
        _MAX_CAUSE,
    ),
    _rule(
        rf"^{_BEFORE_IMAGE}(.*(?:manifest[ _]unknown|name[ _]unknown|name unknown to registry|denies access"
        r"|access to the resource is denied|unauthorized: authentication required"
        r"|unable to copy from source docker://).*)$",
        "base image not found or not readable: {0}; check its name, and the login of its registry",
        _MAX_CAUSE,
    ),
    _rule(
        r"^(.*(?:checking on sources|failed to (?:calculate|compute) (?:checksum|cache key)|copier: stat).*"
        r"(?:no such file|not found).*)$",
        "missing file: {0}; what COPY and ADD name must be in the build context",
    ),
    _rule(
        r"^(.*(?:temporary failure in name resolution|could not resolve host|name or service not known"
        r"|network is unreachable|bad address '|unable to resolve host).*)$",
        "no network: {0}; the host does not exist, or the program does not use http_proxy and https_proxy, which are "
        "the only way out of isolated builds",
    ),
)

_STEP = compile_pattern(r"building at STEP \"(.*?)\": .*exit status (\d+)")
_ERROR = compile_pattern(r"^(?:error|fatal|err)\b[ :]+(.+)$", IGNORECASE | MULTILINE)


def classify(tail: str, exit_status: int) -> str:
    """The reason why a build ended with that exit status, from the end of its log."""
    tail = "\n".join(line[:_MAX_LINE] for line in tail[-_TAIL_CHARS:].splitlines()[-_TAIL_LINES:])
    for find, say in _RULES:
        match = find(tail)
        if match is not None:
            return say(match)
    steps, errors = _STEP.findall(tail), _ERROR.findall(tail)
    step_status = int(steps[-1][1]) if steps else exit_status
    if step_status in (OUT_OF_MEMORY, -9):
        return "killed: probably out of memory; build with fewer jobs at once, or raise [build] memory"
    if steps:
        return f"{_quoted(steps[-1][0])} ended with exit status {step_status}: see the lines before it in the log"
    if errors:
        return f"{_quoted(errors[-1])} (exit status {exit_status})"
    return f"the build ended with exit status {exit_status}: see its log"
