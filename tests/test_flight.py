"""One call for many callers."""

import asyncio

import pytest

from tests.patience import eventually
from wave_proxy.cache.flight import Flights
from wave_proxy.errors import ManifestUnknown


class Call:
    """Counts its runs, and ends when it is told to."""

    def __init__(self) -> None:
        self.runs = 0
        self.go_on = asyncio.Event()
        self.error: Exception | None = None
        self.cancelled = False

    async def __call__(self) -> int:
        self.runs += 1
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        if self.error:
            raise self.error
        return self.runs


async def test_callers_share_a_call() -> None:
    flights, call = Flights[str, int](), Call()
    callers = [asyncio.create_task(flights.run("a", call)) for _ in range(100)]
    other = asyncio.create_task(flights.run("b", call))
    await eventually(lambda: call.runs == 2)
    call.go_on.set()
    assert {await caller for caller in callers} == {await other} == {2}
    assert await flights.run("a", call) == 3


async def test_callers_may_be_cancelled_the_first_one_too() -> None:
    flights, call = Flights[str, int](), Call()
    first, second, third = [asyncio.create_task(flights.run("a", call)) for _ in range(3)]
    await eventually(lambda: call.runs == 1)
    first.cancel()
    third.cancel()
    await asyncio.gather(first, third, return_exceptions=True)
    call.go_on.set()
    assert await second == 1
    assert (call.runs, call.cancelled) == (1, False)


async def test_call_outlives_all_its_callers() -> None:
    flights, call = Flights[str, int](), Call()
    caller = asyncio.create_task(flights.run("a", call))
    await eventually(lambda: call.runs == 1)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    late = asyncio.create_task(flights.run("a", call))
    await asyncio.sleep(0)
    call.go_on.set()
    assert await late == 1


async def test_error_goes_to_those_who_wait_and_no_further() -> None:
    flights, call = Flights[str, int](), Call()
    call.error = ManifestUnknown("not there")
    callers = [asyncio.create_task(flights.run("a", call)) for _ in range(3)]
    await eventually(lambda: call.runs == 1)
    call.go_on.set()
    ends = await asyncio.gather(*callers, return_exceptions=True)
    assert ends == [call.error] * 3
    call.error = None
    assert await flights.run("a", call) == 2


async def test_error_that_nobody_waits_for_is_no_complaint() -> None:
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    flights, call = Flights[str, int](), Call()
    call.error = ManifestUnknown("not there")
    caller = asyncio.create_task(flights.run("a", call))
    await eventually(lambda: call.runs == 1)
    caller.cancel()
    await asyncio.gather(caller, return_exceptions=True)
    call.go_on.set()
    await eventually(lambda: len(asyncio.all_tasks()) == 1)
    assert complaints == []


async def test_close_ends_calls() -> None:
    flights, call = Flights[str, int](), Call()
    caller = asyncio.create_task(flights.run("a", call))
    await eventually(lambda: call.runs == 1)
    await flights.close()
    assert call.cancelled
    with pytest.raises(asyncio.CancelledError):
        await caller


async def test_call_that_is_ended_before_its_first_step_leaves_nothing() -> None:
    flights, call = Flights[str, int](), Call()
    flights.start("a", call)
    await flights.close()
    assert ("a" in flights, call.runs) == (False, 0)
    call.go_on.set()
    assert await flights.run("a", call) == 1


async def test_caller_joins_what_was_begun_for_nobody() -> None:
    flights, call = Flights[str, int](), Call()
    flights.start("a", call)
    call.go_on.set()
    assert await flights.join("a") == 1
    assert "a" not in flights
