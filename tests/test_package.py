"""What installs the pack must not disagree with itself, nor touch what ComfyUI ships."""

import re
from pathlib import Path

import pytest

import pctalk

ROOT = Path(__file__).parents[1]
SHIPPED_BY_COMFYUI = {
    "torch", "torchvision", "torchaudio", "numpy", "pillow", "scipy", "av", "safetensors", "einops", "transformers", "tqdm",
}  # fmt: skip


@pytest.fixture(scope="module")
def project() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_version_is_one(project):
    assert project["version"] == pctalk.__version__
    assert f"## {pctalk.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_requirements_are_the_dependencies_and_leave_comfyui_alone(project):
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert requirements == project["dependencies"]
    names = {re.match(r"[\w.-]+", line)[0].lower() for line in requirements}
    assert names and not names & SHIPPED_BY_COMFYUI
    extras = [line for extra in project["optional-dependencies"].values() for line in extra]
    assert not [line for line in requirements + extras if re.search(r"<|==|~=", line)], "an upper pin breaks others"
