"""The Hugging Face hub: which commit a name means, what a download takes, and the download itself."""

import contextlib
import errno
import functools
import importlib.util
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from wake2vec.errors import WakeError

_SMALL_FILES = ("*.json", "*.model", "*.txt")
MODEL_FILES = (*_SMALL_FILES, "model*.safetensors")
"""What a base model is loaded from. Some repositories hold the weights a second time under other names."""
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_SAY_EVERY_S = 30.0


@contextlib.contextmanager
def hub_errors(name: str, commit: str | None = None) -> Iterator[None]:
    """Turn what the hub's client raises into messages."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError:
        raise WakeError(f"base model {name}: neither a hub id nor a folder; check model.base") from None
    except GatedRepoError:
        raise WakeError(f"base model {name}: gated; accept its licence on the hub and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise WakeError(f"base model {name}: commit {commit} is not on the hub any more; start another run") from None
    except RepositoryNotFoundError:
        raise WakeError(f"base model {name}: not on the hub, or private; check model.base and HF_TOKEN") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise WakeError(
            f"base model {name}: not in the cache and the hub cannot be reached; connect, or fetch it beforehand"
        ) from None
    except (HfHubHTTPError, OSError, client_error()) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise WakeError(
                f"base model {name}: {cache_folder()} is full; free space, or set HF_HOME to another disk, and start "
                "again: what is there already stays"
            ) from None
        raise WakeError(f"base model {name}: the hub did not give it ({error}); try again") from None


def client_error() -> type[Exception]:
    """Return what the HTTP client of huggingface_hub 1 raises; that of 0.36 raises an OSError."""
    if importlib.util.find_spec("httpx") is None:
        return OSError
    error: type[Exception] = importlib.import_module("httpx").HTTPError
    return error


def _or_from_cache(ask: Callable[[bool], str]) -> Path:
    """Ask the client for a path, with `local_files_only`; where the hub is not reached it takes what the cache holds.

    huggingface_hub 1.4.1 does so only when it is told to: where it cannot connect, it tries again with a client that it
    has just closed.
    """
    try:
        return Path(ask(False))
    except RuntimeError as error:
        if not _is_closed_client(error):
            raise
        return Path(ask(True))


def _is_closed_client(error: RuntimeError) -> bool:
    return "client has been closed" in str(error)


def resolve_commit(name: str, commit: str | None) -> str:
    """Return the commit that a hub id means now, or the given one if it is there; offline, what the cache holds."""
    from huggingface_hub import hf_hub_download

    with hub_errors(name, commit):
        path = _or_from_cache(
            lambda local: hf_hub_download(name, "config.json", revision=commit, local_files_only=local)
        )
        return path.parent.name


@functools.cache
def fetch_small_files(name: str, commit: str) -> Path:
    """Return the folder of a model's configuration and tokenizer, fetched if they are not in the cache."""
    from huggingface_hub import snapshot_download

    with hub_errors(name, commit):
        return _or_from_cache(
            lambda local: snapshot_download(
                name, revision=commit, allow_patterns=list(_SMALL_FILES), local_files_only=local
            )
        )


def download_sizes(name: str, commit: str) -> tuple[int, int]:
    """Return the bytes of a model's files and how many are not in the cache yet; (0, 0) where nobody can be asked."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        return 0, 0
    with hub_errors(name, commit):
        try:
            files = HfApi().model_info(name, revision=commit, files_metadata=True).siblings or []
        except HfHubHTTPError:
            raise
        except (OSError, client_error()):  # not reached: the cache may hold it all
            return 0, 0
        except RuntimeError as error:
            if not _is_closed_client(error):
                raise
            return 0, 0
    sizes = {
        file.rfilename: file.size or 0
        for file in files
        if any(fnmatch(file.rfilename, pattern) for pattern in MODEL_FILES) and "/" not in file.rfilename
    }
    missing = [size for file, size in sizes.items() if try_to_load_from_cache(name, file, revision=commit) is None]
    return sum(sizes.values()), sum(missing)


def cache_folder() -> Path:
    """Return where downloads go."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def download(name: str, commit: str, say: Callable[[str], None]) -> Path:
    """Bring a model's files into the cache, continuing what was begun; return their folder.

    On a terminal the client's own bars show how far it is, without one `say` is told now and then.
    """
    from huggingface_hub import snapshot_download

    _, missing_bytes = download_sizes(name, commit)
    with hub_errors(name, commit), _bars() if sys.stderr.isatty() else _lines(name, missing_bytes, say):

        def fetch(local: bool) -> str:
            return snapshot_download(name, revision=commit, allow_patterns=list(MODEL_FILES), local_files_only=local)

        folder = _again_while_it_grows(lambda: _or_from_cache(fetch), _blobs(name), say)
    # offline the client takes what there is for whole
    if missing := [file for file in weight_files(folder) if not (folder / file).is_file()]:
        raise WakeError(
            f"base model {name}: {missing[0]} is neither in the cache nor to be had; connect, or use a model with "
            "safetensors weights"
        )
    return folder


def _again_while_it_grows(fetch: Callable[[], Path], blobs: Path, say: Callable[[str], None]) -> Path:
    """Fetch again after an error, as long as each attempt brings more: the client goes on where it stopped."""
    while True:
        before = _bytes_in(blobs)
        try:
            return fetch()
        except (OSError, client_error()) as error:
            if _bytes_in(blobs) <= before:
                raise
            say(f"the download broke off ({error}); going on with it")


def _blobs(name: str) -> Path:
    return cache_folder() / f"models--{name.replace('/', '--')}" / "blobs"


def weight_files(folder: Path) -> list[str]:
    """Return the names of a model's files of weights, whether they are in its folder or not."""
    index = folder / WEIGHTS_INDEX
    return sorted(set(json.loads(index.read_bytes())["weight_map"].values())) if index.is_file() else [WEIGHTS]


@contextlib.contextmanager
def _bars() -> Iterator[None]:
    """Show the client's bars, which are off otherwise."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    disabled = are_progress_bars_disabled()
    enable_progress_bars()
    try:
        yield
    finally:
        if disabled:
            disable_progress_bars()


@contextlib.contextmanager
def _lines(name: str, missing_bytes: int, say: Callable[[str], None]) -> Iterator[None]:
    """Tell how much of a download has come, by what grows in the cache's folder of the model."""
    blobs = _blobs(name)
    done, before, started = threading.Event(), _bytes_in(blobs), time.monotonic()

    def watch() -> None:
        while not done.wait(_SAY_EVERY_S):
            come = _bytes_in(blobs) - before
            rate = come / (time.monotonic() - started)
            say(f"downloading {name}: {come / 1e9:.2f} of {missing_bytes / 1e9:.2f} GB, {rate / 1e6:.0f} MB/s")

    if missing_bytes:
        say(f"downloading {name}: {missing_bytes / 1e9:.2f} GB into {cache_folder()}")
    watcher = threading.Thread(target=watch, daemon=True)
    if missing_bytes:
        watcher.start()
    try:
        yield
    finally:
        done.set()
        if missing_bytes:
            watcher.join()


def _bytes_in(folder: Path) -> int:
    """Return what a folder's files take on the disk; a file that is being fetched may have its full length already."""
    size = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # it has just got its final name
            size += path.stat().st_blocks * 512
    return size
