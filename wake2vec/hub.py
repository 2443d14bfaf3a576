"""The Hugging Face hub: which commit a name means, what a download takes, and the download itself."""

import contextlib
import importlib.util
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from wake2vec.errors import WakeError

MODEL_FILES = ("*.json", "model*.safetensors", "*.model", "*.txt")
"""What a base model is loaded from. Some repositories hold the weights a second time under other names."""


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
        raise WakeError(f"base model {name}: the hub did not give it ({error}); try again") from None


def client_error() -> type[Exception]:
    """Return what the HTTP client of huggingface_hub 1 raises; that of 0.36 raises an OSError."""
    if importlib.util.find_spec("httpx") is None:
        return OSError
    error: type[Exception] = importlib.import_module("httpx").HTTPError
    return error


def resolve_commit(name: str, commit: str | None) -> str:
    """Return the commit that a hub id means now, or the given one if it is there; offline, what the cache holds."""
    from huggingface_hub import hf_hub_download

    with hub_errors(name, commit):
        try:
            path = hf_hub_download(name, "config.json", revision=commit)
        except RuntimeError as error:
            # huggingface_hub 1.4.1, where it cannot connect: it tries again with a client that it has just closed
            if "client has been closed" not in str(error):
                raise
            path = hf_hub_download(name, "config.json", revision=commit, local_files_only=True)
        return Path(path).parent.name


def download_sizes(name: str, commit: str) -> tuple[int, int]:
    """Return the bytes of a model's files and how many of them are not in the cache yet; (0, 0) when offline."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE:
        return 0, 0
    with hub_errors(name, commit):
        files = HfApi().model_info(name, revision=commit, files_metadata=True).siblings or []
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


def download(name: str, commit: str) -> Path:
    """Bring a model's files into the cache, continuing what was begun; return their folder."""
    from huggingface_hub import snapshot_download

    with hub_errors(name, commit):
        return Path(snapshot_download(name, revision=commit, allow_patterns=list(MODEL_FILES)))
