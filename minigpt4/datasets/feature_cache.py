"""What the frozen vision side says of each picture, computed once: later epochs and runs need no vision in memory.

A cache is a folder of files, one for each part of a data set (a shard, or some listed pairs): ``features`` bfloat16
[n, K, Q, H] of n samples in K crops each, and their texts. Beside them, fingerprint.json says what they were made from.
"""

import bisect
import functools
import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from minigpt4.common import device as devices
from minigpt4.common import dist_utils
from minigpt4.common.errors import UserError
from minigpt4.common.logger import log_skipped
from minigpt4.common.schema import ModelConfig, read_section
from minigpt4.common.utils import parse_json
from minigpt4.datasets.datasets.sample import Sample, SkipSample, WorkerInfo, collate, derive_seed
from minigpt4.datasets.loader import eval_batches

KEY = "run.feature_cache"
_CODE = (
    "models/vision.py",
    "models/eva_vit.py",
    "models/Qformer.py",
    "processors/blip_processors.py",
)
_CODE_ROOT = Path(__file__).parents[1]


class FeatureDataset(Dataset):
    """Samples whose ``image`` is replaced by ``features``, bfloat16 [Q, H] of one of the K crops.

    Args:
        name: of the data set, for seeds and messages.
        files: of all parts, complete.
    """

    collater = staticmethod(collate)
    drop_last = False  # every sample is used in each pass

    def __init__(self, name: str, files: list[Path]) -> None:
        self.name = name
        self.files = files
        sizes = [_shape(file)[0] for file in files]
        self.ends = list(itertools.accumulate(sizes))
        if not self.ends or not self.ends[-1]:
            raise UserError(
                f"{KEY}: no sample of {name} could be used; see what was skipped, and remove {files[0].parent}."
            )

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def first_file(self) -> str:
        """The first part, for messages."""
        return str(self.files[0])

    def __getitem__(self, index: int) -> Sample:
        """Reads one sample in one of its crops, drawn by torch's random state."""
        part = bisect.bisect_right(self.ends, index)
        row = index - (self.ends[part - 1] if part else 0)
        opened = _opened(self.files[part])
        features, ends = opened.get_slice("features"), opened.get_slice("text_ends")
        crop = int(torch.randint(features.get_shape()[1], ()))
        begin, end = ([0] if row == 0 else []) + ends[max(row - 1, 0) : row + 1].tolist()
        try:
            text, instruction = json.loads(bytes(opened.get_slice("texts")[begin:end].numpy()))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"{KEY}: {self.files[part]} is damaged ({error}); remove it, and it is made again."
            ) from error
        return {
            "features": features[row : row + 1, crop][0],
            "text_input": text,
            "instruction": instruction,
        }


@functools.lru_cache(maxsize=64)
def _opened(file: Path) -> Any:
    return safe_open(file, "pt")


def _shape(file: Path) -> list[int]:
    try:
        with safe_open(file, "pt") as opened:
            shape, ends = opened.get_slice("features").get_shape(), opened.get_tensor("text_ends").tolist()
            num_bytes = opened.get_slice("texts").get_shape()[0]
        if (
            len(shape) != 4
            or min(shape[1:]) < 1
            or len(ends) != shape[0]
            or [0, *ends, num_bytes] != sorted([0, *ends, num_bytes])
        ):
            raise ValueError("its features and texts do not belong together")
        return shape
    except Exception as error:  # the reader has exceptions of its own
        raise UserError(f"{KEY}: {file} is damaged ({str(error)[:120]}); remove it, and it is made again.") from error


def with_features(cfg: Any, datasets: Mapping[str, Mapping[str, Any]], device: torch.device) -> dict[str, Any]:
    """Replaces the data sets of a run by ones of features; what the cache lacks is computed first.

    Ranks share the parts, so all of them have to see the same folder. A part that is there is kept: what was begun is
    gone on with.

    Args:
        cfg: the merged configuration; ``run.feature_cache`` is the folder, ``run.feature_crops`` is K for training.
        datasets: {name: {split: data set}}.
        device: where vision computes.

    Raises:
        UserError: the folder holds features of other weights, processors, data or code, or vision is to be trained.
    """
    if not (cfg.model_cfg.get("freeze_vit", True) and cfg.model_cfg.get("freeze_qformer", True)):
        raise UserError(f"{KEY} needs a frozen vision side; set model.freeze_vit and model.freeze_qformer to True.")
    root, vision, replaced = Path(cfg.run_cfg.feature_cache), None, {}
    for name, splits in datasets.items():
        replaced[name] = {}
        for split, dataset in splits.items():
            crops = int(cfg.run_cfg.get("feature_crops", 1)) if split == "train" else 1
            folder = root / f"{name}-{split}"
            dist_utils.run_on_main(functools.partial(_claim, folder, _fingerprint(cfg, dataset, crops)))
            files = [folder / f"part-{i:05}.safetensors" for i in range(dataset.num_parts)]
            lacking = [i for i, file in enumerate(files) if not file.is_file()]
            lacking = dist_utils.broadcast_object(lacking)
            if lacking:
                vision = vision or _vision(cfg, device)
                _fill(dataset, files, lacking, crops, vision, cfg.run_cfg, device)
            replaced[name][split] = FeatureDataset(name, files)
            logging.info("%s/%s: features of %d samples.", name, split, len(replaced[name][split]))
    return replaced


def _vision(cfg: Any, device: torch.device) -> Any:
    from minigpt4.models.vision import VisionEncoder

    return VisionEncoder.from_config(cfg.model_cfg, device)


def _fill(
    dataset: Any, files: list[Path], lacking: list[int], crops: int, vision: Any, run_cfg: Any, device: torch.device
) -> None:
    rank, world = dist_utils.get_rank(), dist_utils.get_world_size()
    logging.info("Computing features of %d of %d parts of %s.", len(lacking), len(files), dataset.name)
    seed, skipped = int(run_cfg.get("seed", 42)), Counter()
    for part in tqdm(lacking[rank::world], desc=f"{dataset.name} features", unit="part", disable=rank > 0):
        view = _Part(dataset, part, crops)
        batches = eval_batches(
            dataset.name,
            view,
            int(run_cfg.get("batch_size_eval") or run_cfg.get("batch_size_train", 1)),
            int(run_cfg.get("num_workers", 0)),
            seed,
            pin_memory=devices.pins_memory(device),
            is_whole=True,
        )
        rows: dict[int, tuple[Tensor, str]] = {}
        for batch in batches:
            with torch.no_grad():
                features = vision.encode_images(batch["image"].to(device)).bfloat16().cpu()
            texts = zip(batch["text_input"], batch["instruction"], strict=True)
            rows |= dict(zip(batch["number"], zip(features, map(json.dumps, texts), strict=True), strict=True))
        skipped.update(batches.skipped)
        _write(files[part], rows, crops, (vision.query_tokens.shape[1], vision.query_tokens.shape[2]))
    log_skipped(skipped, dataset.name)
    dist_utils.gather_objects(None)  # whoever goes on needs the others' parts


def _write(file: Path, rows: dict[int, tuple[Tensor, str]], crops: int, shape: tuple[int, int]) -> None:
    numbers = sorted(rows)
    features = torch.stack([rows[number][0] for number in numbers]) if rows else torch.zeros(0, *shape)
    texts = [rows[number][1].encode() for number in numbers[::crops]]
    content = {
        "features": features.bfloat16().unflatten(0, (-1, crops)) if rows else features.new_zeros(0, crops, *shape),
        "texts": torch.frombuffer(bytearray(b"".join(texts) or b" "), dtype=torch.uint8),
        "text_ends": torch.tensor(list(itertools.accumulate(map(len, texts))), dtype=torch.int64),
    }
    unfinished = file.with_suffix(f".{dist_utils.get_rank()}.tmp")
    try:
        save_file(content, unfinished)
        unfinished.replace(file)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise UserError(f"{KEY}: {file} cannot be written ({error}); what is there is kept, make room.") from error


class _Part:
    """One part of a data set as the loader reads it: each sample in K crops, each with its number."""

    collater = staticmethod(collate)

    def __init__(self, dataset: Any, part: int, crops: int) -> None:
        self.dataset, self.part, self.crops = dataset, part, crops

    def iter_eval(self, worker: WorkerInfo, skipped: Counter) -> Iterator[Sample]:
        """This worker's share; an unusable sample is counted and has no number."""
        for i, process in enumerate(self.dataset.iter_part(self.part, skipped)):
            if i % worker.count == worker.index:
                try:
                    for crop in range(self.crops):
                        seed = derive_seed(worker.seed, self.dataset.name, "crop", self.part, i, crop)
                        with devices.local_seed(seed):
                            yield {**process(), "number": i * self.crops + crop}
                except SkipSample as skip:
                    skipped[str(skip)] += 1


def _claim(folder: Path, made_of: dict[str, str]) -> None:
    """Leaves the fingerprint in a new folder; refuses one whose features were made from something else."""
    file = folder / "fingerprint.json"
    try:
        if file.is_file():
            found = parse_json(file.read_bytes(), f"{KEY}: {file}")
            if other := [name for name in made_of if not isinstance(found, dict) or found.get(name) != made_of[name]]:
                raise UserError(
                    f"{KEY}: {folder} holds features of other {', '.join(other)} than this run has; give another "
                    "folder, or remove this one."
                )
            for unfinished in folder.glob("*.tmp"):
                unfinished.unlink()
            return
        if folder.is_dir() and any(folder.iterdir()):
            raise UserError(f"{KEY}: {folder} holds files but no fingerprint.json; give another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(made_of, indent=1), encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{KEY}: {folder} cannot be used ({error}); give another folder.") from error


def _fingerprint(cfg: Any, dataset: Any, crops: int) -> dict[str, str]:
    """Short digests of all that features follow from, each under the name that a message gives it."""
    from minigpt4.models.vision import locate_vision

    keys = ("image_size", "vit_precision", "vit_config", "qformer_config", "num_query_token")
    model, processor = cfg.to_dict()["model"], dataset.vis_processor
    files = locate_vision(read_section(ModelConfig, model, "model"))
    processors = [
        [type(part).__name__, {k: v for k, v in vars(part).items() if isinstance(v, int | float | str | tuple | bool)}]
        for part in (processor, dataset.text_processor)
    ]
    parts = {
        "weights": [_of_file(file) for path in files for file in _files_of(path)],
        "model settings": {key: model.get(key) for key in keys},
        "processors": processors,
        "number of crops": crops,
        "seed": cfg.run_cfg.get("seed", 42) if crops > 1 or type(processor).__name__.endswith("TrainProcessor") else 0,
        "data": dataset.identity(),
        "code": [hashlib.sha256((_CODE_ROOT / name).read_bytes()).hexdigest() for name in _CODE],
    }  # fmt: skip
    return {
        name: hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:16] for name, value in parts.items()
    }


def _files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]


def _of_file(file: Path) -> str:
    """A digest of a file's size and of 64 of its blocks: two sets of weights differ in nearly every one."""
    size, digest = file.stat().st_size, hashlib.sha256()
    digest.update(str(size).encode())
    with file.open("rb") as stream:
        for i in range(64):
            stream.seek(size * i // 64)
            digest.update(stream.read(1 << 16))
    return digest.hexdigest()
