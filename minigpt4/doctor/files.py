"""The files of a ``model`` section, read by the functions that load a run's model."""

import copy
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from minigpt4.common.errors import UserError
from minigpt4.common.files import resolve_local_path
from minigpt4.common.schema import ModelConfig, read_section
from minigpt4.common.weights import describe_weights, identify_file
from minigpt4.doctor.findings import OK, WARNING, Finding, collect, refused, size
from minigpt4.doctor.language import tokenizer_check, version_check
from minigpt4.models import language_model as lm
from minigpt4.models import loading
from minigpt4.models.lora import add_lora, is_lora
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.models.quantization import quantize_layers
from minigpt4.models.vision import VisionEncoder, build_vision, round_vision, vision_settings

FILES = loading.ModelFiles._fields


class ModelFiles:
    """The files of a ``model`` section, each read once, and the model that they should match, without weights.

    Args:
        cfg: the section.
        device: of the run, which decides the precisions.
    """

    def __init__(self, cfg: Mapping[str, Any] | ModelConfig, device: torch.device) -> None:
        self.cfg, self.device = read_section(ModelConfig, cfg, "model"), device
        self.dtype = loading.language_model_dtype(self.cfg, device)
        self.paths: dict[str, Path | None] = dict.fromkeys(FILES)
        self.config_folder: Path | None = None  # of the language model, perhaps without its weights
        self.tensors: dict[str, torch.Tensor] = {}  # of the language model
        self.model: Any = None
        self.has_lora = False  # the checkpoint

    def check(self) -> list[Finding]:
        """Every file of the section, in the order in which a run reads them."""
        findings = []
        for name in FILES if self.cfg.has_qformer else [name for name in FILES if name != "q_former_model"]:
            findings += collect(f"model.{name}", self._locate, name) if getattr(self.cfg, name) is not None else []
        if self.config_folder is not None:
            try:
                loading.quantization(self.cfg, self.device)
                self.model = self._build_as_stored()
            except UserError as error:
                key = re.match(r"model\.\w+", str(error))
                findings.append(refused(key.group() if key else lm.KEY, error))
        model, files = self.model, loading.ModelFiles(**self.paths)
        if model is None:  # the vision side can be compared; of the checkpoint only its kind
            model = self.build_vision()
            if files.ckpt is not None:
                message = f"{identify_file(files.ckpt)}; whether it matches is checked once {lm.KEY} is right"
                findings.append(Finding(loading.CKPT, WARNING, message, f"First correct {lm.KEY}."))
            files = files._replace(llama_model=None, ckpt=None)
        for key, read in loading.state_readers(model, files).items():
            findings += collect(key, self._read, key, read)
        if self.model is not None:
            self._adapt_language_model(self.model)
            config = self.model.llama_model.config
            arguments = self.config_folder, self.model.llama_tokenizer, config.vocab_size
            findings += collect("tokenizer", tokenizer_check, *arguments)
            findings += collect("Vicuna version", version_check, self.cfg, config.model_type, config.vocab_size)
        return findings

    @property
    def num_bytes(self) -> int:
        """Bytes of the LM's weights in their files."""
        return sum(value.nbytes for value in self.tensors.values())

    def build(self, has_vision: bool = True, has_lora: bool = True) -> MiniGPT4:
        """A new model without weights, in the precisions of the run; without vision as a feature cache allows.

        ``has_lora=False`` leaves out LoRA weights, as after they are merged.
        """
        model = self._build_as_stored(has_vision)
        self._adapt_language_model(model, has_lora)
        return model

    def _build_as_stored(self, has_vision: bool = True) -> MiniGPT4:
        """The model as its files describe it: without quantised layers and LoRA."""
        files = loading.ModelFiles(**self.paths | {"llama_model": self.config_folder})
        model = MiniGPT4.build(self.cfg, files, self.device, has_vision)
        if has_vision:
            round_vision(model, self.cfg, self.device)
        return model

    def _adapt_language_model(self, model: MiniGPT4, has_lora: bool = True) -> None:
        if kind := loading.quantization(self.cfg, self.device):
            quantize_layers(model.llama_model, kind)
        if model.lora and has_lora:
            add_lora(model.llama_model, model.lora)

    def build_vision(self) -> VisionEncoder:
        """The vision side alone, without weights, in the precisions of the run."""
        vision = VisionEncoder(*build_vision(self.cfg), **vision_settings(self.cfg, self.device))
        round_vision(vision, self.cfg, self.device)
        return vision

    def on_accelerator(self) -> "ModelFiles":
        """The same files for an accelerator: this machine's, else one that is not present."""
        files = copy.copy(self)
        files.device = torch.device("meta") if self.device.type == "cpu" else self.device
        files.dtype = loading.language_model_dtype(self.cfg, files.device)
        return files

    def _locate(self, name: str) -> list[Finding]:
        key, spec = f"model.{name}", getattr(self.cfg, name)
        self.paths[name] = resolve_local_path(spec, key)
        if name == "llama_model":
            self.config_folder = self.paths[name] or lm.cached_config_folder(spec)
        if self.paths[name] is not None:
            return []
        message = f"'{spec}' is not on this machine: it is downloaded when the run starts and cannot be checked before"
        return [Finding(key, WARNING, message, f"Without network, download it beforehand and set {key} to its path.")]

    def _read(self, key: str, read: Callable[[], dict[str, torch.Tensor]]) -> Finding:
        state = read()
        if key == lm.KEY:
            self.tensors = state
        self.has_lora |= key == loading.CKPT and any(map(is_lora, state))
        num_bytes = sum(value.nbytes for value in state.values())
        message = f"{describe_weights(state)}; {len(state)} tensors, {size(num_bytes)}, all names and shapes match"
        return Finding(key, OK, message, numbers={"bytes": num_bytes, "tensors": len(state)})
