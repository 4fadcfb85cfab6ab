"""A browser tab on the pages of a small installation.

Here: fixtures. Not here: the installation (`operated.py`), or its pages (`pages.py`).

The browser is the machine's Chromium: Playwright's own is a download that no package manager knows of.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from muse_assets_tests.ui.operated import Operated, operated_installation

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from muse_assets_tests.ui.pages import DagsterPages

_CHROMIUM_ARGUMENTS = (
    "--no-sandbox",  # CI is root in a container
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# For what a page shows by itself; on two busy cores a launchpad took 7 s to check its configuration.
_PATIENCE_MILLISECONDS = 60_000


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser."""
    if program := shutil.which("chromium") or shutil.which("chromium-browser"):
        return program
    reason = "SERVICE MISSING: no chromium; install it (and fonts-noto-cjk, for the songs' titles)"
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="module")
def operated(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operated]:
    """The installation; not before a browser was found for it."""
    with operated_installation(tmp_path_factory.mktemp("ui")) as found:
        yield found


@pytest.fixture(scope="module")
def browser(chromium: str, operated: Operated) -> Iterator[Browser]:
    """The browser without a window; after the installation, as no run of Dagster's may be in its loop."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=_CHROMIUM_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def pages(operated: Operated, browser: Browser, tmp_path: Path) -> Iterator[DagsterPages]:
    """A new tab, without a history. Pictures go to MUSE_UI_SCREENSHOTS if that is set."""
    from playwright.sync_api import expect

    from muse_assets_tests.ui.pages import WINDOW, DagsterPages

    page = browser.new_page(viewport=WINDOW, locale="en-US", timezone_id="Asia/Seoul")
    page.set_default_timeout(_PATIENCE_MILLISECONDS)
    expect.set_options(timeout=_PATIENCE_MILLISECONDS)
    folder = Path(os.environ.get("MUSE_UI_SCREENSHOTS") or tmp_path)
    yield DagsterPages(page, operated.host.address, folder)
    page.close()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Keep a picture of what the tab showed when its test failed."""
    report = yield
    pages = getattr(item, "funcargs", {}).get("pages")
    if report.failed and report.when == "call" and pages is not None:
        report.sections.append(("browser", f"{pages.page.url}: {pages.photograph(f'failed_{item.name}')}"))
    return report
