"""The page for a person: what it is told, that it is kept from strangers, and, in a real browser, what it shows."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from numbaflash_service import Client, RetryPolicy
from numbaflash_service.errors import KVBudgetError
from numbaflash_service.history import History
from numbaflash_service.metrics import Metrics

from .test_metrics import get

ONCE = RetryPolicy(attempts=1)
MIB = 1 << 20
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def watched(start_server: Callable[..., Any]) -> Any:
    return start_server(metrics_port=0, kv_memory=8 * MIB)


def status(server: Any) -> dict[str, Any]:
    return json.loads(get(server, "/status.json")[2])


def test_the_status_is_what_the_server_holds(watched: Any, qkv: Callable[..., Any]) -> None:
    with Client(watched.target, retry=ONCE) as client:
        session = client.create_session(2, 2, 16, capacity=64, ttl=100)
        session.step(0, **qkv(3))
        with pytest.raises(KVBudgetError):
            client.create_session(32, 8, 128, capacity=4096)
        told = status(watched)
        (row,) = told["sessions"]
        assert session.id not in json.dumps(told)
        assert session.id.startswith(row["id"])
        assert (row["tokens"], row["capacity"], row["steps"], row["busy"]) == (3, 64, 1, False)
        assert row["ttl_seconds"] == 100
        assert told["holds"]["kv_reserved_bytes"] == session.max_nbytes
    assert (told["state"], told["server"]["backend"]) == ("serving", "cpu")
    assert told["totals"]["errors"] == {"KV_BUDGET": 1}
    assert told["totals"]["steps"] == {"decode": 1, "prefill": 0}
    assert told["resident_bytes"] > MIB


def test_health_follows_the_server_until_it_stops(watched: Any) -> None:
    assert get(watched, "/health")[::2] == (200, "serving\n")
    with watched.engine_held():
        stopping = watched.begin_stop()
        watched.wait_until(lambda: watched.server.status_page.state == "stopping")
        assert get(watched, "/health")[::2] == (503, "stopping\n")
        assert status(watched)["holds"]["draining"]
    stopping.result(timeout=20)


def test_a_stranger_gets_nothing(watched: Any) -> None:
    for path in ("/", "/status.json", "/metrics"):
        assert get(watched, path, Host="numbaflash.example.org")[0] == 421
    assert get(watched, "/", Host="localhost:9464")[0] == 200
    for path in ("/../config.py", "/status_page.html", "/metrics/"):
        assert get(watched, path)[0] == 404


def test_history_is_of_the_stretch_since_the_last_sample_alone() -> None:
    metrics = Metrics(small=16)
    history = History(metrics)
    metrics.launched(1, [400_000_000], 10)
    began = time.monotonic()
    history.sample(1, 1)
    time.sleep(0.01)
    metrics.launched(1, [30_000] * 4, 60_000)
    metrics.launched(1, [30_000] * 2, 60_000)
    metrics.launched(100, [0], 10**9)
    history.sample(kv_reserved_bytes=77, sessions=5)
    ended = time.monotonic()
    history.sample(kv_reserved_bytes=77, sessions=5)
    columns = history.columns()
    assert 6 / (ended - began) <= columns["decode_steps"][1] <= 6 / 0.01
    ratio = columns["prefill_steps"][1] / columns["decode_steps"][1]
    assert ratio == pytest.approx(1 / 6)
    assert columns["tokens"][1] / columns["decode_steps"][1] == pytest.approx(106 / 6)
    assert (columns["batch"][1], columns["kv_reserved_bytes"][1], columns["sessions"][1]) == (3, 77, 5)
    assert 0.02 < columns["queue_p50_ms"][1] < columns["queue_p99_ms"][1] <= 0.05
    assert 0.05 < columns["kernel_p50_ms"][1] <= 0.1
    assert columns["queue_p50_ms"][2] is None
    assert columns["batch"][2] is None


@pytest.fixture
def browser_page() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    # As root in a container Chromium has no sandbox; what it opens here is this server's page alone.
    quiet = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*quiet, "--no-first-run"])
        page = browser.new_page(viewport={"width": 1160, "height": 760})
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda message: page.problems.append(message.text))
        yield page
        browser.close()


def test_a_browser_shows_the_server_live_and_says_when_it_is_gone(
    watched: Any, browser_page: Any, qkv: Callable[..., Any]
) -> None:
    from playwright.sync_api import expect

    expect.set_options(timeout=20_000)
    page = browser_page
    page.goto(watched.server.status_page.url)
    expect(page.locator("#state")).to_have_text("serving")
    expect(page.locator("#tiles section")).to_have_count(8)
    tile = page.locator("#tiles section").filter(has=page.get_by_role("heading", name="Sessions"))
    expect(tile.locator(".value")).to_have_text("0 ")
    expect(page.locator("#errors td").first).to_have_text("none")
    with Client(watched.target, retry=ONCE) as client:
        session = client.create_session(2, 2, 16, capacity=64)
        session.step(0, **qkv(9))
        with pytest.raises(KVBudgetError):
            client.create_session(32, 8, 128, capacity=4096)
        # Without a reload, that is by the page's own asking:
        row = page.locator("#sessions tbody tr")
        expect(row).to_have_count(1)
        expect(row.locator("td").nth(0)).to_have_text(session.id[:8] + "…")
        expect(row.locator("td").nth(2)).to_have_text("9")
        expect(tile.locator(".value")).to_have_text("1 ")
        expect(page.locator("#errors td")).to_have_text(["KV_BUDGET", "1"])
        expect(tile.locator("path")).to_have_attribute("d", re.compile(r"^M.+L.+"))  # a line, of two points at least
    for width in (1160, 390):
        page.set_viewport_size({"width": width, "height": 760})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "scrolls sideways"
    backgrounds = set()
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2
    assert page.problems == []
    watched.stop()
    expect(page.locator("#state")).to_have_text("unreachable")
