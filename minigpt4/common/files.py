"""Local files for YAML values: paths, URLs that are downloaded once, and Hugging Face ids."""

import fnmatch
import hashlib
import json
import logging
import os
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from minigpt4.common.errors import UserError, see
from minigpt4.common.http_stream import HttpStream
from minigpt4.common.schema import ModelConfig

WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
_URL = re.compile(r"^https?://")
_PLACEHOLDER = re.compile(r"path/to(/|$)|path_to_|^please set|(^|/)your[-_/]|^<.*>$", re.IGNORECASE)
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_PUBLISHED = (ModelConfig.vit_weights, ModelConfig.q_former_model)  # the reference stores them by their names alone
_TIMEOUT = 60  # seconds without a byte
_RETRIES = 3  # without new data: 7 s where there is no network


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


def refuse_placeholder(spec: str, key: str, place: str) -> None:
    """Raises UserError for a value that shipped YAML files have in place of a path; ``place`` is what to set."""
    if _PLACEHOLDER.search(spec):
        raise UserError(f"{key} is still the placeholder '{spec}'; set it to {place}." + see("placeholder-paths"))


def resolve_local_path(spec: str | None, key: str) -> Path | None:
    """The same without download: None for a URL or Hugging Face id that is not on this machine."""
    if not spec:
        raise UserError(f"{key} is not set; give it a file, a folder, a URL or a Hugging Face id.")
    spec = str(spec)
    path = Path(os.path.expanduser(spec))
    if os.path.exists(path):  # False, too, for names that no file can have
        return _snapshot(path, key) if path.name.startswith("models--") and path.is_dir() else path
    refuse_placeholder(spec, key, "where the file really is")
    if _URL.match(spec):
        return _download_target(spec) if _download_target(spec).exists() else None
    if _HUB_ID.match(spec) and not spec.endswith(WEIGHT_FILES):
        return None
    raise UserError(f"{key}: '{spec}' does not exist (seen from {Path.cwd()}); correct the path.")


def _snapshot(folder: Path, key: str) -> Path:
    """The only snapshot in a repository's folder of the Hugging Face cache, ``models--ORGANISATION--NAME``."""
    snapshots = sorted(path for path in folder.glob("snapshots/*") if path.is_dir())
    if len(snapshots) != 1:
        names = ", ".join(path.name for path in snapshots) or "none"
        problem = f"{folder} is a folder of the Hugging Face cache with {len(snapshots)} snapshots ({names})"
        raise UserError(f"{key}: {problem}; set {key} to the folder of one, {folder}/snapshots/….")
    return snapshots[0]


def _download_target(url: str) -> Path:
    """The file of a URL: other URLs, such as those of other revisions, have other files."""
    name = urllib.parse.urlsplit(url).path.rsplit("/", 1)[-1].encode()[-100:].decode(errors="ignore")
    if url not in _PUBLISHED:
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _download(url: str) -> Path:
    from filelock import FileLock  # comes with torch

    target = _download_target(url)
    partial = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # the ranks of a node share one download
        if target.exists():
            return target
        logging.info("Downloading %s to %s", url, target)
        try:
            with HttpStream(url, _TIMEOUT, _RETRIES) as stream, partial.open("wb") as file:
                with tqdm(desc=target.name, unit="B", unit_scale=True) as progress:
                    while data := stream.read(1 << 20):
                        file.write(data)
                        progress.total = stream.size
                        progress.update(len(data))
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
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
