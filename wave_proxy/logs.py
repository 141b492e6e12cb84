"""Structured logs on standard error: JSON for machines, aligned text for a terminal."""

import logging
import sys

# structlog draws in rich wherever that is installed: 8 MB and 80 ms in each process, for tracebacks that would print
# local variables, and those hold passwords.
_rich_is_wanted = "rich" in sys.modules
sys.modules.setdefault("rich", None)  # type: ignore[arg-type]  # None: there is no such module
import structlog  # noqa: E402

if not _rich_is_wanted:
    del sys.modules["rich"]

get_logger = structlog.get_logger


def configure(format: str, level: str, part: str) -> None:  # noqa: A002
    """Set up logging for this process. ``format`` is auto, console or json; ``part`` names the process in each line."""
    console = format == "console" or (format == "auto" and sys.stderr.isatty())
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
    if console:
        # The default formatter prints local variables where `rich` is installed, and those hold passwords.
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *([] if console else [structlog.processors.format_exc_info]),
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(part=part)
