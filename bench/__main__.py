"""``python -m bench``: wave-proxy beside what a user would run instead, on this machine."""

import signal
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from types import FrameType

from bench.herd import PullFailed
from bench.peers import Missing
from bench.report import Result, describe_machine, has_matplotlib, plot, table, to_json
from bench.scenarios import SCENARIOS, run_scenario


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and show; returns the exit code: 0 also when a goal is missed, 1 when something could not be measured."""
    options = _parse(arguments)
    if options.list:
        for name, scenario in SCENARIOS.items():
            print(f"{name:<14} {scenario.__doc__}")
        return 0
    machine = describe_machine()
    began = monotonic()
    try:
        results, failed = _measure(options)
    except KeyboardInterrupt:
        print("bench: interrupted; everything is stopped and removed", file=sys.stderr)
        return 130
    print("\n".join(f"{name}: {value}" for name, value in machine.items()), end="\n\n")
    print(table(results))
    print(f"\n{monotonic() - began:.0f} s in all", file=sys.stderr)
    if options.json:
        settings = {"repeats": options.repeats, "quick": options.quick}
        options.json.write_text(to_json(results, machine, settings) + "\n")
    if options.plot and results:
        plot(results, machine, options.plot)
    for text in failed:
        print(text, file=sys.stderr)
    return 1 if failed else 0


def _parse(arguments: Sequence[str] | None) -> Namespace:
    parser = ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller and fewer: under three minutes in all")
    parser.add_argument("--only", metavar="NAME", action="append", choices=SCENARIOS, help="may be given again")
    parser.add_argument("--repeats", metavar="N", type=int, help="rounds (default 5, with --quick 3)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every figure")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw the comparison: .svg, .png, .pdf")
    parser.add_argument("--list", action="store_true", help="name the scenarios and end")
    options = parser.parse_args(arguments)
    options.repeats = options.repeats or (3 if options.quick else 5)
    if options.repeats < 1:
        parser.error("--repeats must be 1 or more")
    if options.plot and not has_matplotlib():
        parser.error("--plot needs matplotlib, which is not installed: pip install -e '.[bench]'")
    return options


def _measure(options: Namespace) -> tuple[list[Result], list[str]]:
    """The results, and a line for each scenario that could not be measured."""
    results: list[Result] = []
    failed: list[str] = []
    with TemporaryDirectory(prefix="wave-bench-") as folder:
        for name in options.only or SCENARIOS:
            began = monotonic()
            print(f"{name:<14}", end="", file=sys.stderr, flush=True)
            try:
                results += run_scenario(name, Path(folder), options.repeats, quick=options.quick)
                told = ""
            except Missing as err:
                told = f"not measured: {err}"
            except (AssertionError, OSError, RuntimeError, PullFailed) as err:
                told = "\n".join([f"failed: {type(err).__name__}: {err}", *getattr(err, "__notes__", ())])
            print(f"{monotonic() - began:6.1f} s  {told.partition(chr(10))[0]}".rstrip(), file=sys.stderr)
            failed += [f"{name} {told}"] if told else []
    return results, failed


def _end(number: int, _: FrameType | None) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGHUP, _end)
    sys.exit(main())
