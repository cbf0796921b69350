"""Local files for YAML values: paths, URLs that are downloaded once, and Hugging Face ids."""

import fnmatch
import hashlib
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
from minigpt4.common.utils import parse_json

WEIGHT_FILES = (".pth", ".pt", ".bin", ".safetensors")
_URL = re.compile(r"^https?://")
_PLACEHOLDER = re.compile(r"path/to(/|$)|path_to_|^please set|(^|/)your[-_/]|^<.*>$", re.IGNORECASE)
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # of a Hugging Face folder, each perhaps in shards with an index
_PUBLISHED = (ModelConfig.vit_weights, ModelConfig.q_former_model)  # the reference stores them by their names alone
_TIMEOUT = 60  # seconds without a byte
_RETRIES = 3  # without new data: 7 s where there is no network


def locate(spec: str | None, key: str, hub_files: Sequence[str] = ("*",), tensors: Sequence[str] = ()) -> Path:
    """Returns the local file or folder that a YAML value names, downloading a URL or Hugging Face id once.

    ``key`` names the value in messages. Of a Hugging Face repository, files that match ``hub_files`` are downloaded,
    and with ``tensors``, patterns of names, the weights that hold them: in one format, without shards that hold none.
    Raises UserError if nothing is there, or it cannot be downloaded.
    """
    path = resolve_local_path(spec, key)
    if path is not None:
        return path
    try:
        return _download(str(spec)) if _URL.match(str(spec)) else _fetch_from_hub(str(spec), key, hub_files, tensors)
    except UserError:
        raise
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


def _fetch_from_hub(repo: str, key: str, hub_files: Sequence[str], tensors: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(repo, allow_patterns=list(patterns)))

    if not tensors:
        return fetch(*hub_files)
    folder = fetch(*hub_files, *(f"{name}.index.json" for name in WEIGHTS))
    for name in (*WEIGHTS, "*.safetensors", "*.bin"):  # the last two where they have names of their own
        index = folder / f"{name}.index.json"
        files = shard_names(index, key, tensors) if index.is_file() else [name]
        fetch(*files)
        if all(any(folder.glob(file)) for file in files):
            break
    return folder


def shard_names(index: Path, key: str, tensors: Sequence[str] = ("*",)) -> list[str]:
    """The files that a Hugging Face index names for tensors whose names match a pattern of ``tensors``.

    Raises UserError if the index is damaged, or names no such tensor.
    """
    content = parse_json(index.read_bytes(), f"{key}: {index}")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{key}: {index} has no weight_map; copy it again.")
    names = sorted({str(file) for name, file in weight_map.items() if any(fnmatch.fnmatch(name, p) for p in tensors)})
    if not names:
        raise UserError(f"{key}: {index} names no tensor {' or '.join(tensors)}; expected the index of a BLIP-2 model.")
    if elsewhere := [name for name in names if Path(name).name != name]:
        raise UserError(f"{key}: {index} names '{elsewhere[0]}'; expected files beside it. Copy it again.")
    return names
