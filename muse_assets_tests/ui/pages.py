"""The pages of Dagster's web interface, as a person uses them: what to click, what is then to be seen.

Here: every selector; a new Dagster release is answered here. Not here: what should be true of our assets
(the tests).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Locator, Page, expect

from muse_assets_tests.ui.dagster_host import LOCATION

WINDOW = {"width": 1600, "height": 1000}
# Seven open lanes fit legibly.
_LINEAGE_WINDOW = {"width": 1600, "height": 2400}
# A run waits for its turn and loads the code: 10 s, on a busy machine several times that.
RUN_SECONDS = 150

# Lines and points are coloured; grid, axes and letters are grey.
_SATURATED_COLUMNS = """
canvas => {
  const { width, height } = canvas;
  const pixels = canvas.getContext('2d').getImageData(0, 0, width, height).data;
  const coloured = i => Math.max(...pixels.slice(i, i + 3)) - Math.min(...pixels.slice(i, i + 3)) > 60;
  const columns = Array.from({ length: width }, (_, x) => x);
  return columns.filter(x => {
    for (let y = 0; y < height; y++) if (coloured(4 * (y * width + x))) return true;
    return false;
  }).length;
}
"""


@dataclass(frozen=True)
class Box:
    """A node or a group of the lineage graph, in pixels of the window.

    text: begins with its name; a node in a large enough graph says more.
    """

    text: str
    x: float
    y: float
    width: float
    height: float

    def holds(self, other: Box) -> bool:
        """Whether the other lies within this one."""
        return (
            self.x <= other.x
            and other.x + other.width <= self.x + self.width
            and self.y <= other.y
            and other.y + other.height <= self.y + self.height
        )


@dataclass(frozen=True)
class DagsterPages:
    """One tab of a browser. screenshots: folder for what it showed."""

    page: Page
    address: str
    screenshots: Path

    def photograph(self, name: str) -> Path:
        """The window as it is, kept for people to look at."""
        self.screenshots.mkdir(parents=True, exist_ok=True)
        path = self.screenshots / f"{name}.png"
        self.page.screenshot(path=path)
        return path

    # --- Lineage ---------------------------------------------------------------------------------------

    def open_lineage(self) -> None:
        """All groups open, all of the graph in the window."""
        self.page.set_viewport_size(_LINEAGE_WINDOW)
        self._open("/asset-groups")
        self._boxes().first.wait_for()
        self.page.get_by_role("button").filter(has=self.page.get_by_label("settings")).last.click()
        self.page.get_by_role("menuitem", name="Expand all groups").click()
        self.page.keyboard.press("Escape")
        self.page.get_by_role("menu").wait_for(state="detached")
        self.page.wait_for_load_state("networkidle")  # the nodes' states come in several answers

    def graph(self) -> list[Box]:
        """Names and places of nodes and open groups, as drawn at this moment."""
        drawn: list[list[float | str]] = self._boxes().evaluate_all(
            "boxes => boxes.map(box => [box.textContent, box.getBoundingClientRect()])"
            ".map(([text, r]) => [text, r.x, r.y, r.width, r.height])"
        )
        return [Box(str(text), *map(float, place)) for text, *place in drawn]

    def _boxes(self) -> Locator:
        return self.page.locator("foreignObject").filter(has_text=re.compile(r"\w"))

    # --- Assets ----------------------------------------------------------------------------------------

    def open_asset(self, asset: str) -> None:
        """Its overview, metadata included."""
        self._open(f"/assets/{asset}")
        self.page.get_by_placeholder("Filter metadata keys").wait_for()

    def metadata(self, name: str) -> Locator:
        """The value of a metadata entry, on the asset's page."""
        row = self.page.get_by_role("row").filter(has=self.page.get_by_text(name, exact=True))
        value: Locator = row.get_by_role("cell").last
        return value

    def materialize_latest(self, asset: str) -> str:
        """Launch the newest partition from the asset's page; the run's id, whose page is open then."""
        self.open_asset(asset)
        self.page.get_by_role("button", name="Materialize").first.click()
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_role("button", name="Latest").click()
        dialog.get_by_role("button", name="Launch 1 run").click()
        self.page.get_by_role("link", name="View", exact=True).click()
        return self._run_shown()

    def launch_with(self, asset: str, config: Mapping[str, str], photograph: str) -> str:
        """Launch it from its launchpad with some fields changed; the run's id, whose page is open then.

        config: field -> YAML. photograph: name of the picture of the filled launchpad.
        """
        self.open_asset(asset)
        self.page.get_by_role("button").filter(has=self.page.get_by_label("arrow_drop_down")).first.click()
        self.page.get_by_role("menuitem", name="Open launchpad").click()
        dialog = self.page.get_by_role("dialog")
        launch = dialog.get_by_role("button", name="Materialize")
        # Until the config was checked the editor's content is replaced under the keyboard.
        expect(launch).to_be_enabled()
        for field, value in config.items():
            line = dialog.locator(".CodeMirror-line", has_text=re.compile(rf"^\s*{field}: "))
            line.click()
            self.page.keyboard.press("End")
            self.page.keyboard.press("Shift+Home")
            self.page.keyboard.type(f"{field}: {value}")
            expect(line).to_have_text(re.compile(rf"^\s*{field}: {re.escape(value)}$"))
        expect(dialog.get_by_text("No errors")).to_be_visible()
        self.photograph(photograph)
        launch.click()
        return self._run_shown()

    # --- Plots -----------------------------------------------------------------------------------------

    def open_plots(self) -> None:
        """Of the asset whose page is open."""
        self.page.get_by_role("button", name="Plots").click()

    def plotted_columns(self, name: str) -> int:
        """How many pixel columns of the plot of a metadata entry its line or points cover; 0 without one."""
        heading = self.page.get_by_text(name, exact=True)
        plot = self.page.locator("div").filter(has=heading).filter(has=self.page.locator("canvas")).last
        canvas = plot.locator("canvas")
        if canvas.count() != 1:
            return 0
        columns: int = canvas.evaluate(_SATURATED_COLUMNS)
        return columns

    # --- Runs and sensors ------------------------------------------------------------------------------

    def open_run(self, run_id: str) -> None:
        """The page of a run."""
        self._open(f"/runs/{run_id}")

    def expect_success(self) -> None:
        """Watch the run whose page is open until it has succeeded."""
        ended = self.page.get_by_text(re.compile("^(Success|Failure|Canceled)$")).first
        ended.wait_for(timeout=RUN_SECONDS * 1000)
        expect(ended).to_have_text("Success")
        expect(self.page.get_by_text("Loading run logs")).to_have_count(0)

    def switch_on(self, sensor: str) -> None:
        """Have the daemon evaluate it; its page is open then."""
        self._open(f"/locations/{LOCATION}/sensors/{sensor}")
        switch = self.page.get_by_role("checkbox").first
        if not switch.is_checked():
            switch.press("Space")  # what is drawn is no checkbox, and the checkbox is not in the window
        expect(switch).to_be_checked()

    def newest_skip_reason(self) -> str:
        """Why the sensor whose page is open launched nothing at its newest such tick; empty without one."""
        skipped = self.page.get_by_role("button", name="0 runs requested")
        if skipped.count() == 0:
            return ""
        skipped.first.click()
        dialog = self.page.get_by_role("dialog")
        expect(dialog).to_contain_text("Skip reason")
        reason: str = dialog.inner_text().partition("Skip reason: ")[2]
        return reason

    def close_dialog(self) -> None:
        """The one that is open, if any."""
        dialog = self.page.get_by_role("dialog")
        if dialog.count():
            dialog.get_by_role("button", name="Close", exact=True).click()
            expect(dialog).to_have_count(0)

    # --- Below -----------------------------------------------------------------------------------------

    def _open(self, path: str) -> None:
        self.page.goto(f"{self.address}{path}")

    def _run_shown(self) -> str:
        self.page.wait_for_url(re.compile(r"/runs/[0-9a-f-]{36}"))
        found = re.search(r"/runs/([0-9a-f-]{36})", self.page.url)
        assert found is not None
        return found.group(1)
