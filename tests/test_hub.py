"""A base model from the hub: fetched, continued, told of, and taken from the cache where nobody answers.

The hub is a server on this machine; its client runs in a child process, because it reads its settings at import.
"""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tiny import Quiet, make_base, make_recipe
from tokenizers_tiny import byte_level

from wake2vec import base, hub, identity
from wake2vec.errors import WakeError

pytestmark = pytest.mark.slow
COMMIT = "d" * 40
WEIGHTS = "model.safetensors"
PROGRAM = """
import json, time, torch
from wake2vec import base, hub, identity
from wake2vec.errors import WakeError
from huggingface_hub import constants
hub._SAY_EVERY_S = 0.05
constants.DOWNLOAD_CHUNK_SIZE = 2**16
time.sleep = lambda seconds: None  # the client waits between its attempts
said = []
def load(quantization):
    options = dict(quantization=quantization, compute_dtype="float32", device=torch.device("cpu"), say=said.append)
    try:
        return base.fingerprint(base.load(identity, len(base.load_tokenizer(identity)), **options))
    except WakeError as error:
        return str(error)
try:
    identity = base.identify("org/tiny", "org/tiny", None)
    sizes = hub.download_sizes(identity.name, identity.commit)
    found = {"commit": identity.commit, "sizes": sizes, "nf4": load("nf4"), "none": load("none"), "said": said}
    identity = base.identify("org/gptq", "org/gptq", None)
    print(json.dumps({**found, "gptq": load("nf4")}))
except WakeError as error:
    print(json.dumps({"error": str(error)}))
"""


class Hub(ThreadingHTTPServer):
    """Serves folders by the repository's name; weights break off half way at first, and come slowly."""

    daemon_threads = True

    def __init__(self, folders: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.folders = folders
        self.asked: list[tuple[str, str, str | None]] = []  # repository, file, range
        self.breaks_left = 1


class _Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._file(body=False)

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/org/"):
            folder = self.server.folders[self.path.split("/")[4]]
            files = [{"rfilename": path.name, "size": path.stat().st_size} for path in sorted(folder.iterdir())]
            self._send(json.dumps({"id": "org/any", "sha": COMMIT, "siblings": files}).encode(), {})
        else:
            self._file(body=True)

    def _file(self, *, body: bool) -> None:
        _, _, repository, *_, name = self.path.split("/")
        path = self.server.folders[repository] / name
        if not path.is_file():
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, wanted = path.read_bytes(), self.headers.get("Range")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name}-etag"'}
        if body:
            self.server.asked.append((repository, name, wanted))
        start = int(wanted.split("=")[1].split("-")[0]) if wanted else 0
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(content[start:], headers, body=body, slow=name == WEIGHTS and body)

    def _send(self, content: bytes, headers: dict[str, str], *, body: bool = True, slow: bool = False) -> None:
        self.send_response(206 if "Content-Range" in headers else 200)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if not body:
            return
        if slow:
            half = len(content) // 2
            self.wfile.write(content[:half])
            self.wfile.flush()
            time.sleep(0.4)
            if self.server.breaks_left:
                self.server.breaks_left -= 1
                self.close_connection = True
                return
            content = content[half:]
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextlib.contextmanager
def serve(folders: dict[str, Path]) -> Iterator[Hub]:
    with Hub(folders) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def in_child(cache: Path, **settings: str) -> dict[str, Any]:
    """Run the program with its own settings of the hub."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    settings = {"HF_HOME": str(cache / "hf"), "WAKE2VEC_CACHE": str(cache / "wake2vec"), **settings}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        check=False,
        env={**kept, "OMP_NUM_THREADS": "1", **settings},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def blobs(cache: Path) -> Path:
    return cache / "hf" / "hub" / "models--org--tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def fetched(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Hub]:
    """Return a cache after a first start that fetched everything, what it printed, and the hub it asked."""
    cache = tmp_path_factory.mktemp("fetched")
    gptq = Path(shutil.copytree(folder, cache / "gptq"))
    config = json.loads((gptq / "config.json").read_text())
    (gptq / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with serve({"tiny": folder, "gptq": gptq}) as server:
        found = in_child(cache, HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    return cache, found, server


def test_download_is_continued_where_it_broke_off(fetched: tuple[Path, dict[str, Any], Hub], folder: Path) -> None:
    cache, found, server = fetched
    size = (folder / WEIGHTS).stat().st_size
    assert found["commit"] == COMMIT
    ranges = [wanted for _, name, wanted in server.asked if name == WEIGHTS]
    assert len(ranges) == 2
    assert ranges[0] is None
    assert ranges[1] is not None
    start = int(ranges[1].removeprefix("bytes=").removesuffix("-"))
    assert size // 2 - 2**16 <= start <= size // 2
    assert any(line.startswith("the download broke off (") for line in found["said"])
    [snapshot] = (blobs(cache) / "snapshots").iterdir()
    assert (snapshot / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert found["none"] == base.fingerprint(
        base.load(
            base.BaseId("b", str(folder), "sha256:x"),
            len(byte_level()),
            quantization="none",
            compute_dtype="float32",
            device=base.torch.device("cpu"),
        )
    )


def test_download_is_told_of(fetched: tuple[Path, dict[str, Any], Hub], folder: Path) -> None:
    _, found, _ = fetched
    rest = sum(path.stat().st_size for path in folder.iterdir() if path.name != "config.json")
    assert found["sizes"] == [rest + (folder / "config.json").stat().st_size, rest]
    weights = sum((folder / name).stat().st_size for name in [WEIGHTS]) / 1e9
    assert found["said"][0].startswith(f"downloading org/tiny: {weights:.2f} GB into ")
    assert any(f" of {weights:.2f} GB, " in line and "MB/s" in line for line in found["said"][1:])


@pytest.mark.parametrize("way", ["HF_HUB_OFFLINE", "nobody answers"])
def test_cache_is_enough_without_a_connection(way: str, fetched: tuple[Path, dict[str, Any], Hub]) -> None:
    """And a body that was kept is enough without the weights it was made from."""
    cache, before, server = fetched
    for path in (blobs(cache) / "snapshots").glob(f"*/{WEIGHTS}"):
        path.unlink()
    gone = f"http://127.0.0.1:{server.server_port}"
    found = in_child(cache, HF_ENDPOINT=gone, **({"HF_HUB_OFFLINE": "1"} if way == "HF_HUB_OFFLINE" else {}))
    assert found["commit"] == COMMIT
    assert found["sizes"] == [0, 0]
    assert found["nf4"] == before["nf4"]
    assert found["none"].startswith(f"base model org/tiny: {WEIGHTS} is neither in the cache nor to be had; connect")
    assert found["said"] == []


def test_checkpoint_of_no_use_is_refused_before_its_weights_are_asked_for(
    fetched: tuple[Path, dict[str, Any], Hub],
) -> None:
    _, found, server = fetched
    assert "quantised as gptq" in found["gptq"]
    names = {name for repository, name, _ in server.asked if repository == "gptq"}
    assert "config.json" in names
    assert WEIGHTS not in names


@pytest.mark.parametrize("name", ["text.txt", "lexicon.txt"])
def test_text_and_lexicon_are_read_before_the_hub_is_asked(
    name: str, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def identify(*_: Any) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr(identity, "identify", identify)
    for path in (inputs / "text.txt", inputs / "lexicon.txt"):
        if path.name != name:
            shutil.copy(path, tmp_path)
    with pytest.raises(WakeError, match=f"{name}: no such file"):
        identity.read_inputs(make_recipe(tmp_path), None, Quiet().say)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_one_message(number: int) -> None:
    with pytest.raises(WakeError, match=r"base model b: .* is full; free space, or set HF_HOME"), hub.hub_errors("b"):
        raise OSError(number, os.strerror(number))


def test_bars_are_shown_on_a_terminal_only(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled

    shown: list[bool] = []
    base._quieten()  # as any load does before

    def snapshot(*_: Any, **__: Any) -> str:
        shown.append(not are_progress_bars_disabled())
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr(hub, "download_sizes", lambda *_: (10**9, 10**9))
    monkeypatch.setattr(hub, "cache_folder", lambda: tmp_path)
    said: list[str] = []
    for terminal in (True, False):
        isatty: Callable[[], bool] = lambda terminal=terminal: terminal  # noqa: E731
        monkeypatch.setattr(hub.sys, "stderr", type("Stream", (), {"isatty": staticmethod(isatty)}))
        hub.download("org/tiny", COMMIT, said.append)
    assert shown == [True, False]
    assert said == [f"downloading org/tiny: 1.00 GB into {tmp_path}"]
    assert are_progress_bars_disabled()
