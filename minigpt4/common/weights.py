"""Files of weights: where they are, what is in them, and whether they are what the model needs.

Nothing is loaded half: every key and shape of a file is accounted for, or a UserError says what differs.
"""

import fnmatch
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common.errors import UserError, see
from minigpt4.common.fingerprints import content_of, kind_of, kind_of_bytes
from minigpt4.common.utils import parse_json

_URL = re.compile(r"^https?://")
_PLACEHOLDER = re.compile(r"path/to(/|$)|path_to_|(^|/)your[-_/]|^<.*>$", re.IGNORECASE)
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_FILE_TYPES = (".pth", ".pt", ".bin", ".safetensors")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_OTHERS = (torch.int64, torch.int32, torch.bool)  # buffers that were saved along


def locate(spec: str | None, key: str, hub_files: Iterable[str] = ("*",)) -> Path:
    """Returns the local file or folder that a YAML value names, downloading a URL or Hugging Face id once.

    Args:
        spec: a path, an http(s) URL or a Hugging Face id such as ``lmsys/vicuna-7b-v1.5``.
        key: the YAML key, for messages.
        hub_files: name patterns of the files wanted from a Hugging Face repository.

    Raises:
        UserError: nothing is there, or it cannot be fetched.
    """
    path = whereabouts(spec, key)
    if path is not None:
        return path
    if _URL.match(str(spec)):
        return _download(str(spec), key)
    return _fetch_from_hub(str(spec), key, list(hub_files))


def whereabouts(spec: str | None, key: str) -> Path | None:
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
    if _HUB_ID.match(spec) and not spec.endswith(_FILE_TYPES):
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


def shards(index: Path, key: str) -> list[Path]:
    """The files that a Hugging Face index names, all of them beside it.

    Raises:
        UserError: the index is damaged, names a file elsewhere, or one that is not there.
    """
    content = parse_json(index.read_bytes(), f"{key}: {index}")
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{key}: {index} has no weight_map; copy it again.")
    names = sorted(set(map(str, weight_map.values())))
    if elsewhere := [name for name in names if Path(name).name != name]:
        raise UserError(f"{key}: {index} names '{elsewhere[0]}'; expected files beside it. Copy it again.")
    if lacking := [name for name in names if not os.path.isfile(index.parent / name)]:
        raise UserError(
            f"{key}: {index.parent} lacks {len(lacking)} of {len(names)} files that {index.name} names "
            f"(first: {lacking[0]}); finish the download."
        )
    return [index.parent / name for name in names]


def read_file(path: Path, key: str) -> dict:
    """Reads one .pth, .pt, .bin or .safetensors file, memory-mapped, to the CPU; pickles may hold tensors only.

    Raises:
        UserError: the file is damaged, of another type, or a pickle that would run code.
    """
    if not path.is_file():
        raise UserError(f"{key}: {path} is no file; expected one of {', '.join(_FILE_TYPES)}.")
    try:
        if path.suffix not in _FILE_TYPES:
            raise UserError(f"{key}: {path} is no weight file; expected one of {', '.join(_FILE_TYPES)}.")
        content = content_of(path)
    except UserError:
        raise
    except Exception as error:  # the readers' own, of many kinds
        cause = kind_of_bytes(path) or str(error).strip().split("\n")[0][:160]
        raise UserError(
            f"{key}: {path} ({path.stat().st_size:,} bytes) cannot be read as weights ({cause}); "
            "it is damaged, cut short, or not a plain file of tensors. Copy or download it again."
            + see("damaged-files")
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{key}: {path} holds a {type(content).__name__}; expected a dict of tensors.")
    return content


def read_state_dict(path: Path, key: str) -> dict[str, Tensor]:
    """Reads the tensors of a file, or of all files of a Hugging Face folder.

    A {"model": …} wrapper, as BLIP-2 and MiniGPT-4 files have it, is opened.
    """
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("*.bin"))
        if not files:
            raise UserError(f"{key}: the folder {path} holds no .safetensors or .bin file.")
        parts = [read_file(file, key) for file in files]
    else:
        parts = [read_file(path, key)]
    parts = [part["model"] if isinstance(part.get("model"), Mapping) else part for part in parts]
    state = {name: value for part in parts for name, value in part.items()}
    check_tensors(state, path, key)
    return state


def check_tensors(state: Mapping[str, Any], path: Path, key: str) -> None:
    """Raises UserError where something in ``state`` is no plain tensor with a name."""
    for name, value in state.items():
        if not isinstance(name, str) or not is_plain(value):
            kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(
                f"{key}: {path} holds '{name}', which is no tensor of plain numbers ({kind}); "
                "expected a dict of parameter names to tensors."
            )


def is_plain(value: Any) -> bool:
    """Whether it is a dense tensor of usual numbers that are all there; a file may also describe others."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in _FLOATS + _OTHERS
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], path: Path, key: str, droppable: Iterable[str] = (), hint: str = ""
) -> None:
    """Puts a state dict into a module, all of it or not at all; arguments and errors as for ``fitting``.

    The module takes the tensors themselves (``assign``), so one built on the meta device costs no copy.
    """
    module.load_state_dict(fitting(module, state, path, key, droppable, hint), assign=True)
    for name, parameter in module.named_parameters():
        if not is_finite(parameter):
            raise UserError(
                f"{key}: '{name}' in {path} holds NaN or infinity; the file is damaged or comes from a diverged run."
                + see("nan")
            )


def fitting(
    module: nn.Module, state: Mapping[str, Tensor], path: Path, key: str, droppable: Iterable[str] = (), hint: str = ""
) -> dict[str, Tensor]:
    """The tensors of a state dict that a module needs, every key and shape of both accounted for; reads no values.

    Args:
        module: may be on the meta device.
        state: names to tensors.
        path: the file, for messages.
        key: the YAML key that named the file, for messages.
        droppable: name patterns that the file may hold and the module does not need.
        hint: the likely cause of a difference, added to the message.

    Raises:
        UserError: a key is missing or unknown, or a shape differs.
    """
    droppable = list(droppable)
    expected = module.state_dict()
    found = {
        name: value
        for name, value in state.items()
        if name in expected or not any(fnmatch.fnmatch(name, pattern) for pattern in droppable)
    }
    problems = [
        f"'{name}' is {list(found[name].shape)} in the file and {list(value.shape)} in the model"
        for name, value in expected.items()
        if name in found and found[name].shape != value.shape
    ]
    problems += [
        f"'{name}' is {found[name].dtype} in the file and {value.dtype} in the model"
        for name, value in expected.items()
        if name in found and found[name].is_floating_point() != value.is_floating_point()
    ]
    if missing := [name for name in expected if name not in found]:
        problems.append(f"{len(missing)} of {len(expected)} expected keys are missing ({_some(missing)})")
    if unknown := [name for name in found if name not in expected]:
        problems.append(f"{len(unknown)} keys are unknown to the model ({_some(unknown)})")
    if problems:
        more = f" and {len(problems) - 3} more differences" if len(problems) > 3 else ""
        raise UserError(
            f"{key}: {path} does not fit the model: {'; '.join(problems[:3])}{more}. It looks like {kind_of(state)}."
            + (f" {hint}" if hint else "")
            + see("weights-that-do-not-fit")
        )
    return found


def is_finite(value: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass that writes nothing: both extremes would show it."""
    return not value.numel() or bool(torch.stack(value.detach().aminmax()).isfinite().all())


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


_TWIN_RULES = (  # Hugging Face name -> published name, for Salesforce/blip2-*
    (r"^vision_model\.embeddings\.class_embedding$", "cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"blocks.\1.attn.qkv."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"blocks.\1.mlp."),
    (r"^vision_model\.post_layernorm\.", "ln_vision."),
    (r"^qformer\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
    (r"^qformer\.(.*\.(?:cross)?attention)\.attention\.", r"Qformer.bert.\1.self."),
    (r"^qformer\.", "Qformer.bert."),
)


def published_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames tensors of the Hugging Face BLIP-2 twins to the names of the published files; others pass through."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        for pattern, replacement in _TWIN_RULES:
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        if name.endswith("attn.qkv.bias") and value.ndim == 1 and len(value) % 3 == 0 and len(value):
            # (q, 0, v): the key bias is zero by design
            q_bias, _, v_bias = value.chunk(3)
            block = name.removesuffix("qkv.bias")
            renamed |= {f"{block}q_bias": q_bias, f"{block}v_bias": v_bias}
        else:
            renamed[name] = value
    return renamed
