"""Pages in a real browser, over the whole program that really builds: live logs, hostile values, the reference."""

import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from shutil import which
from typing import Any
from urllib.parse import quote

import pytest
from playwright.sync_api import Browser, Dialog, Page, expect, sync_playwright

from bench.images import layer
from tests.building.works import Works, open_works, order, wait_done, why_no_builds
from tests.identified import issue
from tests.patience import PATIENCE_S, until
from tests.servers import WaveProxy

EVIL = """</pre><script>alert("1")</script><img src=x onerror=alert(2)><a href="javascript:alert(3)">x</a>"""
PATIENCE_MS = PATIENCE_S * 1000
CHROMIUM = which("chromium")
ARGUMENTS = [
    "--no-sandbox",  # tests may run as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
Open = Callable[..., Page]


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Works]:
    if reason := why_no_builds():
        pytest.skip(reason)
    with open_works(tmp_path_factory.mktemp("works")) as opened:
        yield opened


@pytest.fixture(scope="module")
def wave(works: Works) -> Iterator[WaveProxy]:
    with works.wave() as started:
        yield started


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (Debian package chromium)")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser: Browser, wave: WaveProxy) -> Iterator[Open]:
    """``visit(path)`` opens a page; in the end nothing may have gone wrong there, or elsewhere than here."""
    context = browser.new_context(viewport={"width": 400, "height": 800})
    context.set_default_timeout(PATIENCE_MS)
    troubles: list[str] = []

    def dismiss(dialog: Dialog) -> None:
        troubles.append(dialog.message)
        dialog.dismiss()

    def visit(path: str) -> Page:
        page = context.new_page()
        page.on("console", lambda said: troubles.append(said.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", dismiss)
        page.on("request", lambda sent: troubles.extend([] if sent.url.startswith(f"{wave.url}/") else [sent.url]))
        page.goto(f"{wave.url}{path}")
        width = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert page.evaluate(width) == 0, "the page is wider than a phone"
        return page

    yield visit
    context.close()
    assert troubles == []


def text_of(page: Page, part: str) -> Any:
    return expect(page.locator(part), "the page does not follow")


def test_a_log_is_followed_without_loading_the_page_again(works: Works, wave: WaveProxy, visit: Open) -> None:
    steps = "".join(
        f"RUN {works.wait_at(name)}; printf 'step {name} \\033[31mü\\033[0m\\n'\n" for name in ("one", "two")
    )
    build_id = order(wave, f"FROM {works.base}\n{steps}RUN echo '<b>{EVIL[:30]}'\n")["buildId"]
    until(lambda: works.page.is_reached("one"), "the build does not begin")
    page = visit(f"/view/builds/{build_id}")
    loads: list[str] = []
    page.on("load", lambda loaded: loads.append(loaded.url))
    text_of(page, "#facts .state").to_have_text("Running")
    works.page.open("one")
    text_of(page, "#log").to_contain_text("step one ü\n")
    late = visit(f"/view/builds/{build_id}")
    text_of(late, "#log").to_contain_text("step one ü\n")
    works.page.open("two")
    for each in (page, late):
        text_of(each, "#log").to_contain_text(f"<b>{EVIL[:30]}")
        text_of(each, "#facts .state").to_have_text("Succeeded")
        text_of(each, "#log").to_contain_text(">> pushed ")
    assert loads == []
    whole = wave.request("GET", f"/v1alpha1/builds/{build_id}/logs").body.decode()
    assert page.locator("#log").text_content() == re.sub(r"\x1b\[[0-9;]*m", "", whole)
    assert late.locator("#log").text_content() == page.locator("#log").text_content()


def test_a_build_that_waits_begins_in_the_page(works: Works, wave: WaveProxy, visit: Open) -> None:
    slow = [order(wave, f"FROM {works.base}\nRUN {works.wait_at(f'slow{number}')}\n") for number in range(4)]
    until(lambda: all(works.page.is_reached(f"slow{number}") for number in range(4)), "builds do not begin")
    build_id = order(wave, f"FROM {works.base}\nRUN echo begun; exit 3\n")["buildId"]
    page = visit(f"/view/builds/{build_id}")
    text_of(page, "#facts .state").to_have_text("Waiting")
    for number in range(4):
        works.page.open(f"slow{number}")
    text_of(page, "#facts .state").to_contain_text("Failed: ")
    text_of(page, "#log").to_contain_text("begun\n")
    for answer in slow:
        wait_done(wave, answer["buildId"])


def test_a_failure_is_told_in_parts(works: Works, wave: WaveProxy, visit: Open) -> None:
    name = f"{works.base}/not/there"
    build_id = order(wave, f"FROM {name}:1.5\nRUN echo never\n")["buildId"]
    wait_done(wave, build_id)
    page = visit(f"/view/builds/{build_id}")
    text_of(page, "#facts .state").to_contain_text("Failed: base image not found or not readable")
    text_of(page, "#facts .state code").to_contain_text(f"reading manifest 1.5 in {name}")
    text_of(page, "#facts .advice").to_have_text("check its name, and the login of its registry")
    assert "/wt/" not in (page.locator("main").text_content() or "")


def test_a_user_inspects_with_an_access_token(works: Works, wave: WaveProxy, visit: Open) -> None:
    with ThreadPoolExecutor(1) as aside:  # playwright has this thread's event loop
        token = aside.submit(issue, works.redis, "ada@example.org").result()
    page = visit("/view/inspect")
    page.get_by_label("Image").fill(works.base)
    page.get_by_role("button").click()
    text_of(page, "main pre").to_contain_text('"imageName": "library/busybox"')
    assert page.url.endswith(f"/view/inspect?image={quote(works.base, safe='')}")
    page.get_by_label("Access token").fill(token)
    page.get_by_role("button", name="Inspect").click()
    text_of(page, "main pre").to_contain_text('"imageName": "library/busybox"')
    assert page.url == f"{wave.url}/view/inspect"
    expect(page.get_by_label("Access token")).to_have_value("")


def test_without_scripts_the_page_asks_again(works: Works, wave: WaveProxy, browser: Browser) -> None:
    build_id = order(wave, f"FROM {works.base}\nRUN echo before; {works.wait_at('still')}\n")["buildId"]
    until(lambda: works.page.is_reached("still"), "the build does not begin")
    context = browser.new_context(java_script_enabled=False)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.goto(f"{wave.url}/view/builds/{build_id}")
    text_of(page, "#log").to_contain_text("before\n")
    works.page.open("still")
    text_of(page, "#facts .state").to_have_text("Succeeded")
    context.close()


def test_what_a_page_shows_runs_nothing(works: Works, wave: WaveProxy, visit: Open) -> None:
    file = f"FROM {works.base}\nLABEL a='{EVIL}'\nENV B=<script>alert(4)</script>\nRUN echo '{EVIL}' {'x' * 3000}\n"
    config = {"env": [f"A={EVIL}"], "cmd": ["sh", EVIL], "layers": [layer({"a": "b"}).inline()]}
    built = wave.submit(containerImage=works.base, containerConfig=config, fingerprint=EVIL)
    answer = order(wave, file)
    wait_done(wave, answer["buildId"])
    for path, parts in {
        f"/view/builds/{answer['buildId']}": [EVIL, "x" * 3000],
        f"/view/builds/{answer['buildId'][:-2]}": [EVIL],
        f"/view/containers/{answer['requestId']}": [EVIL],
        f"/view/containers/{built['requestId']}": [f"A={EVIL}", EVIL],
        f"/view/inspect?image={works.base}": ['"architecture"'],
        "/view/inspect?image=%3Cscript%3Ealert(5)%3C/script%3E&platform=%22%3E%3Cscript%3E": ["<script>"],
        "/view/builds/%3Cimg%20src=x%20onerror=alert(6)%3E": ["<img src=x onerror=alert(6)>"],
    }.items():
        page = visit(path)
        shown = page.locator("main").text_content() or ""
        for part in parts:
            assert part in shown


def test_the_reference_sends_requests(works: Works, wave: WaveProxy, visit: Open) -> None:
    page = visit("/openapi#containers_submit")
    form = page.locator("#containers_submit")
    form.locator("textarea").fill(f'{{"containerImage": "{works.base}"}}')
    form.get_by_role("button").click()
    text_of(page, "#containers_submit pre").to_contain_text('"targetImage": "')
    token = re.search(r'"containerToken": "(\w+)"', form.locator("pre").text_content() or "")
    assert token
    page.locator("#containers_describe summary").click()
    page.locator("#containers_describe input").fill(token[1])
    page.locator("#containers_describe button").click()
    text_of(page, "#containers_describe pre").to_contain_text('"sourceImage": "')
