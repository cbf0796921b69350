"""Local files for YAML values: paths, URLs that are downloaded once, and Hugging Face ids."""

import fnmatch
import json
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from minigpt4.common.errors import UserError, see

WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
_URL = re.compile(r"^https?://")
_PLACEHOLDER = re.compile(r"path/to(/|$)|path_to_|(^|/)your[-_/]|^<.*>$", re.IGNORECASE)
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def locate(spec: str | None, key: str, hub_files: Sequence[str] = ("*",)) -> Path:
    """Returns the local file or folder that a YAML value names, downloading a URL or Hugging Face id once.

    ``key`` names the value in messages. ``hub_files`` are patterns of the wanted files of a Hugging Face repository;
    after a pattern of an index of shards, they are those of the wanted tensors. Raises UserError if nothing is there,
    or it cannot be downloaded.
    """
    path = resolve_local_path(spec, key)
    if path is not None:
        return path
    try:
        return _download(str(spec)) if _URL.match(str(spec)) else _fetch_from_hub(str(spec), hub_files)
    except Exception as error:  # the hub client's errors are of many kinds; the remedy is the same
        raise UserError(
            f"{key}: '{spec}' is not a local path and could not be downloaded ({type(error).__name__}: {error}); "
            f"download it where there is network and set {key} to the local path." + see("no-network")
        ) from error


def resolve_local_path(spec: str | None, key: str) -> Path | None:
    """The same without download: None for a URL or Hugging Face id that is not on this machine."""
    if not spec:
        raise UserError(f"{key} is not set; give it a file, a folder, a URL or a Hugging Face id.")
    spec = str(spec)
    path = Path(os.path.expanduser(spec))
    if os.path.exists(path):  # False, too, for names that no file can have
        return path
    if _PLACEHOLDER.search(spec):
        advice = "set it to where the file really is." + see("placeholder-paths")
        raise UserError(f"{key} is still the placeholder '{spec}'; {advice}")
    if _URL.match(spec):
        return _download_target(spec) if _download_target(spec).exists() else None
    if _HUB_ID.match(spec) and not spec.endswith(WEIGHT_FILES):
        return None
    raise UserError(f"{key}: '{spec}' does not exist (seen from {Path.cwd()}); correct the path.")


def _download_target(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]


def _download(url: str) -> Path:
    from filelock import FileLock  # comes with torch

    target = _download_target(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # the ranks of a node share one download
        if not target.exists():
            logging.info("Downloading %s to %s", url, target)
            torch.hub.download_url_to_file(url, str(target))
    return target


def _fetch_from_hub(repo: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    index_files = [name for name in patterns if name.endswith(".index.json")]
    folder = Path(snapshot_download(repo, allow_patterns=index_files or list(patterns)))
    for index in folder.glob("*.index.json") if index_files else ():  # only the shards with a wanted tensor
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {file for name, file in weight_map.items() if any(fnmatch.fnmatch(name, p) for p in patterns)}
        folder = Path(snapshot_download(repo, allow_patterns=sorted(shards)))
    return folder
