"""`pctalk convert`: published files of any layout to .safetensors, with the configuration in the metadata."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from .checkpoints import RECOGNISED_BY, configuration, described, load_network, recognise, write_network
from .weights import read_keys

ORIGINALS = {  # sha256 of LivePortrait's own files (Hugging Face, KwaiVGI/LivePortrait)
    "appearance_feature_extractor": "5279bb8654293dbdf327030b397f107237dd9212fb11dd75b83dfb635211ceb5",
    "motion_extractor": "251e6a94ad667a1d0c69526d292677165110ef7f0cf0f6d199f0e414e8aa0ca5",
    "spade_generator": "4780afc7909a9f84e24c01d73b31a555ef651521a1fe3b2429bd04534d992aee",
    "warping_module": "2f61a6f265fe344f14132364859a78bdbbc2068577170693da57fb96d636e282",
    "stitching_retargeting_module": "3652d5a3f95099141a56986aaddec92fadf0a73c87a20fac9a2c07c32b28b611",
}
HASHED_AT_ONCE = 1 << 20


class Converted(NamedTuple):
    """What a file was, where its weights went, and its sha256."""

    source: Path
    kind: str
    target: Path
    sha256: str

    @property
    def origin(self) -> str:
        """What the sha256 says about where the file is from."""
        if self.sha256 == ORIGINALS.get(self.kind):
            return "known: LivePortrait's original"
        if self.kind in ORIGINALS and self.source.suffix == ".pth":
            return "unknown: not LivePortrait's original"
        return "unknown"

    def __str__(self) -> str:
        return f"{self.source}: {described(self.kind)} -> {self.target} (sha256 {self.sha256}, {self.origin})"


def convert(file: str | Path, folder: str | Path | None = None) -> Converted:
    """Write the network in a file as .safetensors under its published name and keys, complete or not at all.

    Args: folder: where to (default: beside the file). Raises FileNotFoundError when the file is missing, ValueError when it
    is damaged, hostile or holds no network that we know, or would be overwritten, OSError when the folder can't be written.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}: give a .pth or .safetensors file of PC-Talk or LivePortrait.")
    kind, _ = recognise(read_keys(file))
    if kind is None:
        raise ValueError(f"{file} holds {described(kind)}: expected one of {', '.join(RECOGNISED_BY)}; use another file.")
    folder = file.parent if folder is None else Path(folder)
    target = folder / f"{kind}.safetensors"
    if target.exists() and target.samefile(file):
        raise ValueError(f"{file} would be overwritten: name another folder with --to.")
    network, config = load_network(file, kind)
    digest = sha256(file)
    folder.mkdir(parents=True, exist_ok=True)
    write_network(target, network, {**config, **configuration(network), "source": file.name, "source_sha256": digest})
    return Converted(file, kind, target, digest)


def sha256(file: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while block := opened.read(HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()
