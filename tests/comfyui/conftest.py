"""One ComfyUI server for all tests of the session, and the media that they feed it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import comfyui_server
import pytest
import workflow

PACK = Path(__file__).parents[2]
PROBES = Path(__file__).with_name("probe_nodes")


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[comfyui_server.Server]:
    """A running ComfyUI with PC-Talk and the probe nodes."""
    base = tmp_path_factory.mktemp("comfyui")
    try:
        running = comfyui_server.Server(comfyui_server.install(), base, {"comfyui-pctalk": PACK, "probe_nodes": PROBES})
    except comfyui_server.Unavailable as reason:
        if os.environ.get("PCTALK_REQUIRE_COMFYUI") == "1":
            raise
        pytest.skip(str(reason))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def object_info(server) -> dict:
    return server.get("/object_info")


@pytest.fixture(scope="session")
def media(server) -> Path:
    """The server's input folder, with the example portrait and speech under the names that the examples use."""
    folder = server.base / "input"
    for name in ("portrait.jpg", "speech.flac"):
        shutil.copy(PACK / "web" / "examples" / name, folder / f"pctalk_{name}")
    return folder


@pytest.fixture(scope="session")
def example(object_info, media) -> Callable[[str], dict]:
    """An example workflow as the server takes it."""
    return lambda name: workflow.to_prompt(workflow.saved(name), object_info)
