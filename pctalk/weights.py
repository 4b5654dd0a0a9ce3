"""Files of weights, read without trusting them: .safetensors, and .pth as far as torch reads it without running code.

A .pth file is a pickle, which can ask for any function to be called. It is read by torch's restricted unpickler alone, which
builds tensors and containers, and here argparse.Namespace besides, because published checkpoints hold their training options.
"""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

SUFFIXES = (".safetensors", ".pth")  # the first is preferred where both are there
SOUND_TORCH = (2, 6)  # before it, weights_only could be made to run code (CVE-2025-32434)
LARGEST = 8 << 30  # bytes; the largest published file has 0.2 GB
WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
DEEPEST, MOST_KEYS = 6, 100_000  # of nested dictionaries; published files have 3 and some hundred


def read_weights(file: Path) -> tuple[dict[str, Tensor], dict]:
    """Every tensor by its key, and the configuration: the metadata entry `pctalk_config`, or `window` from a .pth's `args`.

    Nested dictionaries are one key with dots between. Tensors may lie in the mapped file: copy what is to be kept.
    Raises ValueError when the file is damaged, hostile or of another format, OSError when it can't be opened.
    """
    file = Path(file)
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_pth(file)


def read_keys(file: Path) -> list[str]:
    """The keys of `read_weights`, without reading the numbers. Raises as it does."""
    from safetensors import SafetensorError, safe_open

    file = Path(file)
    if file.suffix != ".safetensors":
        return list(_read_pth(file)[0])
    try:
        with safe_open(str(file), framework="pt") as opened:
            return list(opened.keys())
    except SafetensorError as error:
        raise _damaged(file, error) from None


def _read_safetensors(file: Path) -> tuple[dict[str, Tensor], dict]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            config = dict(json.loads((opened.metadata() or {}).get("pctalk_config", "{}")))
            return {key: opened.get_tensor(key) for key in opened.keys()}, config
    except (SafetensorError, TypeError, ValueError) as error:
        raise _damaged(file, error) from None


def _read_pth(file: Path) -> tuple[dict[str, Tensor], dict]:
    if torch.__version__ < SOUND_TORCH:
        raise ValueError(
            f"{file} is a .pth file, which torch {torch.__version__} can't read safely: convert it with `pctalk convert` where "
            f"torch {'.'.join(map(str, SOUND_TORCH))} or newer is installed, and use the .safetensors file it writes."
        )
    zipped = _check_zip(file)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise ValueError(
                f"{file} asks to load {asked[1]}, expected tensors only: it may be hostile, don't open it with anything else "
                "and download it again from its publisher."
            ) from None
        raise _damaged(file, error) from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a dictionary of tensors: use another file.")
    return _flat(content, file), _configuration(content.get("args"))


def _configuration(options: object) -> dict:
    """What `args` of a published checkpoint says that its tensors may not: T, the frames of a window."""
    options = vars(options) if isinstance(options, argparse.Namespace) else options
    window = options.get("T", options.get("window")) if isinstance(options, Mapping) else None
    return {} if window is None else {"window": window}


def _check_zip(file: Path) -> bool:
    """Whether a .pth is a zip archive, as torch writes since 1.6. Raises ValueError for one that unpacks to more than it is.

    torch.save never compresses, so what does is no checkpoint and may be made to fill the memory.
    """
    size = file.stat().st_size
    zipped = zipfile.is_zipfile(file)
    unpacked, compressed = size, False
    if zipped:
        try:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise _damaged(file, error) from None
        unpacked = sum(entry.file_size for entry in entries)
        compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    if compressed or unpacked > min(size, LARGEST):
        raise ValueError(
            f"{file} is a {size / 1e6:.1f} MB archive that unpacks to {unpacked / 1e6:.1f} MB, expected an uncompressed .pth "
            f"of at most {LARGEST / 1e9:.1f} GB: it may be a zip bomb, download it again from its publisher."
        )
    return zipped


def _flat(content: Mapping, file: Path) -> dict[str, Tensor]:
    """The tensors of nested dictionaries; what else lies in them (optimizer steps, epochs) is left out."""
    tensors: dict[str, Tensor] = {}
    pending = [("", content, 1)]
    visited = 0
    while pending:
        prefix, branch, depth = pending.pop()
        visited += len(branch)
        if depth > DEEPEST or visited > MOST_KEYS:
            raise ValueError(f"{file} nests dictionaries as no checkpoint does: use another file.")
        for key, value in branch.items():
            if not isinstance(key, str):
                continue
            if isinstance(value, Mapping):
                pending.append((f"{prefix}{key}.", value, depth + 1))
            elif isinstance(value, Tensor):
                if not _is_plain(value):
                    raise ValueError(f"{file} holds {prefix}{key} in a form no checkpoint has: use another file.")
                tensors[prefix + key] = value.detach()
    return tensors


def _is_plain(value: Tensor) -> bool:
    """Whether a tensor holds every number that it shows, and not one stretched over terabytes, or none."""
    if value.layout != torch.strided or value.device.type != "cpu":
        return False
    if not value.dtype.is_floating_point and value.dtype not in WHOLE:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _damaged(file: Path, error: Exception) -> ValueError:
    reason = re.split(r"\.?\n|\. |\.$", str(error) or type(error).__name__)[0]
    return ValueError(f"{file} is not a complete {file.suffix} file ({reason}): copy or download it again.")
