"""Local files for YAML values: paths, URLs that are downloaded once, and Hugging Face ids."""

import fnmatch
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch

from minigpt4.common.errors import UserError, see

WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
_URL = re.compile(r"^https?://")
_PLACEHOLDER = re.compile(r"path/to(/|$)|path_to_|(^|/)your[-_/]|^<.*>$", re.IGNORECASE)
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def locate(spec: str | None, key: str, hub_files: Iterable[str] = ("*",)) -> Path:
    """Returns the local file or folder that a YAML value names, downloading a URL or Hugging Face id once.

    Args:
        spec: a path, an http(s) URL or a Hugging Face id such as ``lmsys/vicuna-7b-v1.5``.
        key: the YAML key, for messages.
        hub_files: name patterns of the files wanted from a Hugging Face repository.

    Raises:
        UserError: nothing is there, or it cannot be fetched.
    """
    path = resolve_local_path(spec, key)
    if path is not None:
        return path
    if _URL.match(str(spec)):
        return _download(str(spec), key)
    return _fetch_from_hub(str(spec), key, list(hub_files))


def resolve_local_path(spec: str | None, key: str) -> Path | None:
    """The local file or folder that a YAML value names, None where ``locate`` would fetch it; fetches nothing.

    Raises:
        UserError: nothing is there, and the value is neither a URL nor a Hugging Face id.
    """
    if not spec:
        raise UserError(f"{key} is not set; give it a file, a folder, a URL or a Hugging Face id.")
    spec = str(spec)
    path = Path(os.path.expanduser(spec))
    if os.path.exists(path):  # False, too, for names that no file can have
        return path
    if _PLACEHOLDER.search(spec):
        placeholder = f"{key} is still the placeholder '{spec}'; set it to where the file really is."
        raise UserError(placeholder + see("placeholder-paths"))
    if _URL.match(spec):
        return _downloaded(spec) if _downloaded(spec).exists() else None
    if _HUB_ID.match(spec) and not spec.endswith(WEIGHT_FILES):
        return None
    raise UserError(f"{key}: '{spec}' does not exist (seen from {Path.cwd()}); correct the path.")


def _downloaded(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def _download(url: str, key: str) -> Path:
    from filelock import FileLock  # comes with torch

    target = _downloaded(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # the ranks of a node share one download
        if not target.exists():
            logging.info("Downloading %s to %s", url, target)
            try:
                torch.hub.download_url_to_file(url, str(target))
            except OSError as error:
                raise UserError(
                    f"{key}: {url} could not be downloaded ({error}); fetch it elsewhere and set {key} to the file."
                    + see("no-network")
                ) from error
    return target


def _fetch_from_hub(repo: str, key: str, patterns: list[str]) -> Path:
    import huggingface_hub

    try:
        index_files = [name for name in patterns if name.endswith(".index.json")]
        folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=index_files or patterns))
        if index_files:  # a sharded repository: only the shards that hold something wanted
            patterns = [p for p in patterns if p not in index_files]
            shards = {file for index in folder.glob("*.index.json") for file in _shards_of(index, patterns)}
            folder = Path(huggingface_hub.snapshot_download(repo, allow_patterns=sorted(shards)))
        return folder
    except Exception as error:  # whatever the hub client throws, the remedy is the same; the cause is chained
        raise UserError(
            f"{key}: '{repo}' is neither a local path nor could it be fetched from the Hugging Face hub "
            f"({type(error).__name__}); download it where there is network and set {key} to the local path."
            + see("placeholder-paths")
        ) from error


def _shards_of(index: Path, patterns: list[str]) -> set[str]:
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return {file for name, file in weight_map.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}
