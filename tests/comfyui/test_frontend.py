"""The pack in the real frontend, in a real browser: the classic canvas and Nodes 2.0."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
import workflow

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
QUIET = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync")
SCREENSHOTS = os.environ.get("PCTALK_SCREENSHOTS")  # a folder to keep them in
TYPES = {
    "PCTALK_MOTION_MODEL",
    "PCTALK_RENDERER",
    "PCTALK_PORTRAIT",
    "PCTALK_KEYPOINTS",
    "PCTALK_SPEECH",
    "PCTALK_DEFORMATION",
}

OPEN_FILE = """
async ([name, text]) => {
  await app.handleFile(new File([text], name, { type: "application/json" }));
}
"""
COLORS = """
() => ({
  sockets: app.canvas.default_connection_color_byType,
  links: app.canvas.constructor.link_type_colors,
})
"""


@pytest.fixture(scope="module")
def browser() -> Iterator:
    reason = None
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        reason = "The browser tests need the package playwright."
    if executable is None:
        reason = f"The browser tests need one of {', '.join(BROWSERS)} on the PATH."
    if reason:
        if os.environ.get("PCTALK_REQUIRE_BROWSER") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=executable, args=list(QUIET))
        yield launched
        launched.close()


@pytest.fixture(scope="module", params=["classic", "nodes-2"])
def page(request, server, browser) -> Iterator:
    """The frontend, ready, without its welcome dialog."""
    settings = {
        "Comfy.TutorialCompleted": True,
        "Comfy.Minimap.Visible": False,
        "Comfy.VueNodes.Enabled": request.param == "nodes-2",
    }
    server.post("/settings", settings)
    opened = browser.new_page(viewport={"width": 2200, "height": 1200})
    opened.mode = request.param
    opened.errors = []
    opened.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.on("console", lambda said: opened.errors.append(said.text) if "PC-Talk" in said.text else None)
    opened.goto(server.url)
    opened.wait_for_function("() => window.app?.extensionManager && window.app.canvas?.graph", timeout=60_000)
    opened.wait_for_function("() => window.app.extensions.some((extension) => extension.name === 'PCTalk.SocketColors')")
    yield opened
    opened.close()


def open_example(page, name: str) -> None:
    """As if the file was dropped on the canvas."""
    page.evaluate(OPEN_FILE, [f"{name}.json", (workflow.FOLDER / f"{name}.json").read_text(encoding="utf-8")])
    nodes = len(workflow.saved(name)["nodes"])
    page.wait_for_function("(count) => app.graph.nodes.length === count", arg=nodes)


def screenshot(page, name: str) -> None:
    if SCREENSHOTS:
        page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        page.wait_for_timeout(1500)
        page.screenshot(path=f"{SCREENSHOTS}/{name}_{page.mode}.png")


@pytest.mark.parametrize("name", workflow.NAMES)
def test_example_opens_whole_and_brings_its_media(input_without_media, page, name):
    open_example(page, name)
    assert page.evaluate("() => app.graph.nodes.filter((node) => node.has_errors).length") == 0
    missing = "() => app.graph.nodes.map((node) => node.type).filter((type) => !(type in LiteGraph.registered_node_types))"
    assert page.evaluate(missing) == []
    for own, copied in (("portrait.jpg", "pctalk_portrait.jpg"), ("speech.flac", "pctalk_speech.flac")):
        original = workflow.PACK / "web" / "examples" / own
        assert (input_without_media / copied).read_bytes() == original.read_bytes()
    page.wait_for_timeout(500)
    assert page.get_by_text("errors found").count() == 0
    screenshot(page, name)
    assert page.errors == []


def test_files_of_the_user_are_never_overwritten(input_without_media, page):
    mine = input_without_media / "pctalk_portrait.jpg"
    mine.write_bytes(b"mine")
    open_example(page, "talking_portrait")
    page.wait_for_timeout(500)
    assert mine.read_bytes() == b"mine"
    assert {file.name for file in input_without_media.glob("pctalk_*")} == {"pctalk_portrait.jpg", "pctalk_speech.flac"}


def test_sockets_have_their_colours_under_every_palette(page):
    open_example(page, "mixed_emotions")
    seen = []
    for palette in ("dark", "light", "dark"):
        page.evaluate("(id) => app.extensionManager.setting.set('Comfy.ColorPalette', id)", palette)
        page.wait_for_timeout(500)
        colors = page.evaluate(COLORS)
        assert colors["sockets"].keys() >= TYPES and colors["links"].keys() >= TYPES
        ours = {kind: colors["sockets"][kind] for kind in TYPES}
        assert ours == {kind: colors["links"][kind] for kind in TYPES}
        assert len(set(ours.values())) == len(TYPES) and all(ours.values())
        style = "(kind) => getComputedStyle(document.documentElement).getPropertyValue(`--color-datatype-${kind}`)"
        assert {kind: page.evaluate(style, kind).strip() for kind in TYPES} == ours
        seen.append(ours)
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("name", workflow.NAMES)
def test_frontend_queues_what_the_tests_queue(page, object_info, name):
    open_example(page, name)
    queued = page.evaluate("async () => (await app.graphToPrompt()).output")
    ours = workflow.to_prompt(workflow.saved(name), object_info)
    assert queued.keys() == ours.keys()
    for number, node in queued.items():
        assert node["class_type"] == ours[number]["class_type"]
        assert ours[number]["inputs"].items() <= node["inputs"].items()
        assert node["inputs"].keys() - ours[number]["inputs"].keys() <= {"audioUI", "upload"}


def test_more_rows_keep_what_is_connected(page):
    open_example(page, "mixed_emotions")
    links = """
    (rows) => {
      const node = app.graph.nodes.find((node) => node.type === "PCTalk_RegionEmotionMix");
      node.widgets.find((widget) => widget.name === "rows").value = rows;
      return node.inputs.filter((slot) => slot.type === "PCTALK_DEFORMATION").map((slot) => slot.link !== null);
    }
    """
    assert page.evaluate(links, "4") == [True, True, False, False]
    queued = page.evaluate("async () => (await app.graphToPrompt()).output")
    (mix,) = [node["inputs"] for node in queued.values() if node["class_type"] == "PCTalk_RegionEmotionMix"]
    assert mix["rows"] == "4" and mix["rows.weight_4"] == 1.0 and mix["rows.region_4"] == "all"
    assert "rows.deformation_2" in mix and "rows.deformation_3" not in mix


def test_run_shows_the_video(media, page):
    open_example(page, "talking_portrait")
    page.get_by_role("button", name="Run", exact=True).first.click()
    video = page.locator("video").first
    video.wait_for(timeout=240_000)
    page.wait_for_function("() => document.querySelector('video').videoWidth === 320", timeout=30_000)
    page.wait_for_function("() => document.querySelector('video').duration > 9", timeout=30_000)
    screenshot(page, "after_run")
    assert page.errors == []
