"""Outputs of the frozen vision side, computed once per image: later epochs and runs need no vision model in memory.

A cache is a folder of files, one for each part of a data set (a shard, or some listed pairs): ``features`` bfloat16
[N, K, Q, H] of N samples in K crops each, and their texts. fingerprint.json has a digest of everything that they depend
on. A run whose fingerprint differs is refused.
"""

import bisect
import functools
import hashlib
import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from minigpt4.common import device as devices
from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError
from minigpt4.common.logger import log_skipped
from minigpt4.common.schema import ImageProcessorConfig, ModelConfig, RunConfig, TextProcessorConfig, read_section
from minigpt4.common.utils import parse_json
from minigpt4.datasets.datasets.sample import Sample, SkipSample, WorkerInfo, collate, derive_seed
from minigpt4.datasets.loader import eval_batches
from minigpt4.processors import Blip2ImageEvalProcessor

# Of the numbers in a cache and of its file format: to be increased with every change of code that changes them, so that
# old caches are refused. test_feature_version.py fails if the numbers differ from those recorded for this version.
VERSION = 2
KEY = "run.feature_cache"
_PROTOCOL = ("num_parts", "iter_part", "identity", "vis_processor", "text_processor")  # as PairDataset has it
_MODEL_KEYS = ("image_size", "vit_precision", "vit_config", "qformer_config", "num_query_token")


class FeatureDataset(Dataset):
    """Samples with ``features``, bfloat16 [Q, H] of one of the K crops, in place of ``image``.

    Args:
        name: of the data set, for messages.
        files: of all parts, complete.
    """

    collater = staticmethod(collate)
    drop_last = False  # every sample is used in each pass

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name = name
        self.files = files
        self.ends = list(itertools.accumulate(num_samples(file) for file in files))
        if not self.ends or not self.ends[-1]:
            raise UserError(f"{KEY}: {name} has no usable sample, see the warnings; then remove {files[0].parent}.")

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Sample:
        """Reads one sample in one of its crops, drawn by torch's random state."""
        part = bisect.bisect_right(self.ends, index)
        row = index - (self.ends[part - 1] if part else 0)
        opened = _open(self.files[part])
        features, ends = opened.get_slice("features"), opened.get_slice("text_ends")
        crop = int(torch.randint(features.get_shape()[1], ()))
        begin, end = ([0] if row == 0 else []) + ends[max(row - 1, 0) : row + 1].tolist()
        try:
            text, instruction = json.loads(bytes(opened.get_slice("texts")[begin:end].numpy()))
        except (ValueError, TypeError, RecursionError) as error:
            raise _damaged(self.files[part], error) from error
        return {"features": features[row : row + 1, crop][0], "text_input": text, "instruction": instruction}


@functools.lru_cache(maxsize=64)
def _open(file: Path) -> Any:
    return safe_open(file, "pt")


def num_samples(file: Path) -> int:
    """The number of samples in a file of a cache; a UserError if it is damaged."""
    try:
        with safe_open(file, "pt") as opened:
            shape, ends = opened.get_slice("features").get_shape(), opened.get_tensor("text_ends").tolist()
            bounds = [0, *ends, opened.get_slice("texts").get_shape()[0]]
        if len(shape) != 4 or min(shape[1:]) < 1 or len(ends) != shape[0] or bounds != sorted(bounds):
            raise ValueError("its features and texts do not belong together")
        return shape[0]
    except Exception as error:  # safetensors has its own exceptions
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(f"{KEY}: {file} is damaged ({str(error)[:120]}); remove it, and it is computed again.")


def with_features(cfg: Any, datasets: Mapping[str, Mapping[str, Any]], device: torch.device) -> dict[str, Any]:
    """Replaces the data sets of a run by ``FeatureDataset``; computes the parts that are missing from the cache.

    The ranks divide the missing parts among them, so all of them must see the same folder.

    Args:
        cfg: the merged configuration; ``run.feature_cache`` is the folder, ``run.feature_crops`` is K in training.
        datasets: {name: {split: data set}}.
        device: where the vision side computes.

    Raises:
        UserError: the vision side is trained, a data set cannot be cached, or the folder holds features of other
            weights, settings or data.
    """
    from minigpt4.models.vision import VisionEncoder  # slow to import, and without a cache not needed here

    run_cfg, model_cfg = read_section(RunConfig, cfg.run_cfg, "run"), read_section(ModelConfig, cfg.model_cfg, "model")
    if not (model_cfg.freeze_vit and model_cfg.freeze_qformer):
        raise UserError(f"{KEY} requires a frozen vision side; set model.freeze_vit and model.freeze_qformer to True.")
    vision, replaced = None, {}
    for name, split, dataset in [(n, split, d) for n, splits in datasets.items() for split, d in splits.items()]:
        files = dist_utils.run_on_main(functools.partial(_prepare, cfg, name, split, dataset))
        parts = dist_utils.broadcast_object([i for i, file in enumerate(files) if not file.is_file()])
        if parts:
            vision = vision or VisionEncoder.from_config(cfg.model_cfg, device)
            logging.info("Computing features of %d of %d parts of %s.", len(parts), len(files), name)
            own = {part: files[part] for part in parts[dist_utils.get_rank() :: dist_utils.get_world_size()]}
            _compute(name, dataset, own, num_crops(run_cfg, split), vision, run_cfg, device)
            dist_utils.gather_objects(None)  # the other ranks' parts are needed as well
        replaced.setdefault(name, {})[split] = FeatureDataset(name, files)
        logging.info("%s/%s: features of %d samples.", name, split, len(replaced[name][split]))
    return replaced


def _compute(
    name: str, dataset: Any, parts: dict[int, Path], crops: int, vision: Any, run_cfg: RunConfig, device: torch.device
) -> None:
    skipped, shape = Counter(), (crops, vision.num_query_token, vision.feature_width)
    batch_size = max(1, max(run_cfg.batch_size_eval, run_cfg.batch_size_train or 1) // crops)
    loading = run_cfg.num_workers, run_cfg.seed, devices.has_own_memory(device)
    progress = tqdm(parts.items(), f"{name} features", unit="part", disable=not dist_utils.is_main_process())
    for part, file in progress:
        batches = eval_batches(name, _Part(name, dataset, part, crops), batch_size, *loading, is_whole=True)
        rows: dict[int, tuple[Tensor, bytes]] = {}
        for batch in batches:
            with torch.no_grad():
                features = vision.encode_images(batch["image"].flatten(0, 1).to(device)).bfloat16().cpu()
            values = zip(features.unflatten(0, (-1, crops)), map(str.encode, batch["text"]), strict=True)
            rows |= dict(zip(batch["number"].tolist(), values, strict=True))
        skipped.update(batches.skipped)
        if batches.skipped["unreachable shard"]:
            raise UserError(f"{KEY}: part {part} of {name} cannot be fetched, see the log; start again to continue.")
        _write(file, [rows[number] for number in sorted(rows)], shape)
    log_skipped(skipped, name)


class _Part:
    """One part of a data set, as a stream for the loader: ``image`` [K, 3, S, S], ``text`` and ``number``."""

    def __init__(self, name: str, dataset: Any, part: int, crops: int) -> None:
        self.name, self.dataset, self.part, self.crops = name, dataset, part, crops

    def iter_eval(self, worker: WorkerInfo, skipped: Counter) -> Iterator[Sample]:
        """This worker's share of the usable samples."""
        for number, process in enumerate(self.dataset.iter_part(self.part, skipped)):
            if number % worker.count != worker.index:
                continue
            crops = []
            try:
                for crop in range(self.crops):
                    with devices.local_seed(derive_seed(worker.seed, self.name, "crop", self.part, number, crop)):
                        crops.append(process())
            except SkipSample as skip:
                skipped[str(skip)] += 1
                continue
            text = json.dumps([crops[0]["text_input"], crops[0]["instruction"]])
            yield {"image": torch.stack([sample["image"] for sample in crops]), "text": text, "number": number}


def _write(file: Path, rows: list[tuple[Tensor, bytes]], shape: tuple[int, ...]) -> None:
    texts = [text for _, text in rows]
    content = {
        "features": torch.stack([f for f, _ in rows]) if rows else torch.zeros(0, *shape, dtype=torch.bfloat16),
        "texts": torch.frombuffer(bytearray(b"".join(texts) or b" "), dtype=torch.uint8),
        "text_ends": torch.tensor(list(itertools.accumulate(map(len, texts))), dtype=torch.int64),
    }
    partial = file.with_suffix(f".{dist_utils.get_rank()}.tmp")
    try:
        save_file(content, partial)
        partial.replace(file)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        size, free = sum(tensor.nbytes for tensor in content.values()), shutil.disk_usage(file.parent).free
        raise UserError(
            f"{KEY}: cannot write {file} ({error}): it needs {size:,} bytes, {free:,} are free; make room, then start "
            "again to continue."
        ) from error


def num_crops(run_cfg: RunConfig, split: str) -> int:
    """K: how many crops of each image are cached; only training draws them at random."""
    return run_cfg.feature_crops if split == "train" else 1


def check_cache(cfg: Any, name: str, split: str, dataset: Any) -> tuple[list[Path], dict[str, Any]]:
    """Returns the files of a split's features, which need not exist yet, and the fingerprint that belongs to them.

    Changes nothing. Raises UserError if the data set cannot be cached, or the folder holds other features.
    """
    run_cfg = read_section(RunConfig, cfg.run_cfg, "run")
    if missing := [attribute for attribute in _PROTOCOL if not hasattr(dataset, attribute)]:
        raise UserError(
            f"{KEY}: features of datasets.{name} cannot be cached, as its {type(dataset).__name__} has no "
            f"{', '.join(missing)}; set run.feature_cache to null, or write them as PairDataset has them."
        )
    folder = Path(run_cfg.feature_cache) / f"{name}-{split}"
    digests = fingerprint(cfg, name, split, dataset, num_crops(run_cfg, split))
    check_fingerprint(folder, digests)
    return [folder / f"part-{i:05}.safetensors" for i in range(dataset.num_parts)], digests


def check_fingerprint(folder: Path, digests: Mapping[str, Any]) -> None:
    """Raises UserError if a folder of features has another fingerprint, or other files."""
    file = folder / "fingerprint.json"
    try:
        if file.is_file():
            saved = parse_json(file.read_bytes(), f"{KEY}: {file}")
            if other := [part for part in digests if not isinstance(saved, dict) or saved.get(part) != digests[part]]:
                raise UserError(
                    f"{KEY}: {folder} holds features with other {', '.join(other)} than this run's; set another "
                    "folder, or remove this one."
                )
        elif folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{KEY}: {folder} holds files but no fingerprint.json; set another folder.")
    except OSError as error:
        raise _unusable(folder, error) from error


def _prepare(cfg: Any, name: str, split: str, dataset: Any) -> list[Path]:
    """``check_cache``, then a folder with its fingerprint and without the partial files of an interrupted run."""
    files, digests = check_cache(cfg, name, split, dataset)
    folder = Path(cfg.run_cfg.feature_cache) / f"{name}-{split}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for partial in folder.glob("*.tmp"):
            partial.unlink()
        if not (folder / "fingerprint.json").is_file():
            (folder / "fingerprint.json").write_text(json.dumps(digests, indent=1), encoding="utf-8")
    except OSError as error:
        raise _unusable(folder, error) from error
    return files


def _unusable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{KEY}: {folder} cannot be used ({error}); set another folder.")


def fingerprint(cfg: Any, name: str, split: str, dataset: Any, crops: int) -> dict[str, Any]:
    """Digests of everything that features and texts depend on, under the names that messages give them.

    They follow from files and settings alone, so that every process computes the same ones.
    """
    from minigpt4.models.vision import locate_vision

    model_cfg, section = read_section(ModelConfig, cfg.model_cfg, "model"), cfg.to_dict()["datasets"][name]
    settings, paths = asdict(model_cfg), locate_vision(model_cfg)
    files = [file for path in paths if path for file in ([path] if path.is_file() else sorted(path.iterdir()))]
    is_random = crops > 1 or not isinstance(dataset.vis_processor, Blip2ImageEvalProcessor)
    parts = {
        "weights": [_digest(file) for file in files if file.suffix in (".safetensors", ".bin", ".pth", ".pt")],
        "model settings": {key: settings[key] for key in _MODEL_KEYS},
        "processors": [
            _describe(dataset.vis_processor, section.get("vis_processor"), split, ImageProcessorConfig()),
            _describe(dataset.text_processor, section.get("text_processor"), split, TextProcessorConfig()),
        ],
        "number of crops": crops,
        "seed": read_section(RunConfig, cfg.run_cfg, "run").seed if is_random else None,
        "data": dataset.identity(),
    }
    digests = {part: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16] for part, value in parts.items()}
    return {"version": VERSION, **digests}


def _describe(processor: Any, sections: Mapping[str, Any] | None, split: str, defaults: Any) -> list[Any]:
    """A processor's class and settings, where those of evaluation may follow from those of training."""
    if hasattr(processor, "__qualname__"):  # a function or a class, such as str, without settings
        return [processor.__module__, processor.__qualname__]
    used = ["train"] if split == "train" else ["train", "eval"]
    settings = [asdict(defaults) | ((sections or {}).get(key) or {}) for key in used]
    return [type(processor).__module__, type(processor).__qualname__, settings]


def _digest(file: Path) -> str:
    """A digest of a file's size and of 64 of its blocks: two sets of weights differ in nearly every one."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for i in range(64):
            stream.seek(size * i // 64)
            digest.update(stream.read(1 << 16))
    return digest.hexdigest()
