"""The example workflows as the server takes them: from the form that the frontend saves to the form that it queues."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

PACK = Path(__file__).parents[2]
FOLDER = PACK / "example_workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
FRONTEND_ONLY = {"Note", "MarkdownNote"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


def saved(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def to_prompt(workflow: dict, object_info: dict) -> dict:
    """{node id: {class_type, inputs}}: widget values by name, as the node's definition orders them, and links."""
    origin = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in FRONTEND_ONLY:
            continue
        values = iter(node.get("widgets_values", []))
        inputs = {name: value for name, value in _widgets(object_info[node["type"]]["input"], values) if value is not None}
        inputs |= {slot["name"]: origin[slot["link"]] for slot in node.get("inputs", []) if slot["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _widgets(definition: dict, values: Iterator, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Names and values of a node's widgets in the order in which the frontend makes and saves them."""
    for name, spec in [*definition.get("required", {}).items(), *definition.get("optional", {}).items()]:
        kind, options = spec[0], spec[1] if len(spec) > 1 else {}
        full = prefix + name
        if kind == "COMFY_DYNAMICCOMBO_V3":
            chosen = next(values)
            yield full, chosen
            rows = next(option["inputs"] for option in options["options"] if option["key"] == chosen)
            yield from _widgets(rows, values, f"{full}.")
        elif (isinstance(kind, list) or kind in WIDGETS) and not options.get("forceInput"):
            yield full, next(values)


def node_id(prompt: dict, class_type: str) -> str:
    """The only node of a class in a graph."""
    (found,) = [number for number, node in prompt.items() if node["class_type"] == class_type]
    return found
