"""Progress while a graph runs, and what happens when its user cancels it."""

from __future__ import annotations

import time

import pytest
from comfyui_server import Events, NodeError


def long_prompt(chain) -> dict:
    sound = {"kind": "tone", "seconds": 60.0, "sample_rate": 16000, "channels": 1}
    return chain(audio=sound, frames={"paste_back": False})


@pytest.mark.parametrize("node", ["frames", "lips"])
def test_interrupt_stops_within_two_seconds(server, chain, node):
    prompt = long_prompt(chain)
    prompt["lips"]["inputs"]["amplitude"] = 0.9 if node == "lips" else 1.0  # not from the cache
    with Events(server, f"cancel-{node}") as events:
        prompt_id = server.queue(prompt, f"cancel-{node}")
        for event in events:
            if event["type"] == "progress" and event["data"]["node"] == node and event["data"]["value"] > 0:
                break
            assert event["type"] not in ("execution_error", "execution_success"), event
        asked = time.monotonic()
        server.interrupt()
        with pytest.raises(NodeError) as stopped:
            server.wait(prompt_id)
        assert time.monotonic() - asked < 2.0
    assert stopped.value.kind == "interrupted"
    assert stopped.value.node_type == prompt[node]["class_type"]


def test_progress_counts_frames(server, chain):
    with Events(server, "progress") as events:
        sound = {"kind": "tone", "seconds": 2.0, "sample_rate": 16000, "channels": 1}
        prompt_id = server.queue(chain(audio=sound, emotion={"emotion": "angry"}), "progress")
        seen: dict[str, list[tuple[int, int]]] = {}
        for event in events:
            data = event["data"]
            if event["type"] == "progress":
                seen.setdefault(data["node"], []).append((data["value"], data["max"]))
            if event["type"] in ("execution_success", "execution_error") and data["prompt_id"] == prompt_id:
                break
    for node in ("speech", "lips", "emotion", "frames"):
        values = [value for value, _ in seen[node]]
        assert values == sorted(values) and seen[node][-1] == (50, 50), node
