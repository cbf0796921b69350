"""What commands that write folders share: complete or not at all, one shard in memory at a time."""

import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from minigpt4.common.errors import UserError

SETTINGS_FILES = ("*.json", "*.jinja", "*.txt", "tokenizer.model")  # of a language model, beside its weights
SHARD_BYTES = 2 * 10**9  # of one written file, which is assembled in memory


def command(run: Callable[[list[str] | None], None]) -> Callable[..., int]:
    """The function of a command that returns its exit status, and reports a user's mistake or an interruption."""

    @functools.wraps(run)
    def main(arguments: list[str] | None = None) -> int:
        try:
            run(arguments)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted; nothing was written", file=sys.stderr)
            return 130
        return 0

    return main


def check_new(target: Path, key: str) -> None:
    """Raises UserError if something exists at ``target`` that is not an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{key}: {target} exists and is not an empty folder; name another.")


@contextmanager
def new_folder(target: Path, key: str) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` at the end; after an error nothing remains of it.

    Raises UserError if it cannot be written.
    """
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{key}: {target} cannot be written ({error}).") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_shards(
    folder: Path, dtypes: Mapping[str, tuple[torch.Size, torch.dtype]], make: Callable[[str], Tensor], key: str
) -> None:
    """Writes the tensors that ``make`` returns for the names of ``dtypes``, their shapes and dtypes, with an index.

    Raises UserError if the disk has too little space.
    """
    model = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in dtypes.items()}
    total = sum(value.nbytes for value in model.values())
    if (free := shutil.disk_usage(folder).free) < total:
        raise UserError(f"{key}: {total:,} bytes are needed in {folder.parent}, but only {free:,} are free.")
    shards = split_torch_state_dict_into_shards(model, max_shard_size=SHARD_BYTES)
    for file, names in tqdm(shards.filename_to_tensors.items(), unit="file"):
        save_tensors({name: make(name) for name in names}, folder / file)
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Writes a .safetensors file that may be read by whoever may read its folder."""
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(file.parent.stat().st_mode & 0o666)  # safetensors writes files for their owner alone


def copy_settings(source: Path, target: Path) -> None:
    """Copies the files of a language model's folder other than its weights."""
    target.mkdir(exist_ok=True)
    for file in {file for pattern in SETTINGS_FILES for file in source.glob(pattern)}:
        if not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes readable JSON."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
