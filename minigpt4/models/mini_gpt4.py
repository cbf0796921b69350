"""MiniGPT-4 (Zhu et al., 2023): EVA-ViT and Q-Former, one linear projection, a frozen Llama.

Shapes: B batch, S image side, N image tokens, Q queries, H width of the Q-Former, L width of the LM, T tokens.
"""

import logging
import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from minigpt4.common import device as devices
from minigpt4.common import weights
from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
from minigpt4.common.schema import ModelConfig, read_section
from minigpt4.common.utils import IMAGE_PLACEHOLDER
from minigpt4.models import packed
from minigpt4.models.int8 import to_int8
from minigpt4.models.llama import Llama
from minigpt4.models.llama_folder import check_folder, check_vocabulary, load_llama
from minigpt4.models.llama_tokenizer import load_tokenizer
from minigpt4.models.loading import load_trained_part, log_summary
from minigpt4.models.parallel import shard_language_model
from minigpt4.models.Qformer import QFormer, QFormerConfig
from minigpt4.models.vision import VisionEncoder, build_vision, load, locate_vision, q_former_config, vision_settings

IMAGE_SLOT = -1  # stands in a list of token ids where one image embedding goes
IGNORED = -100  # label of a position that is no target


@registry.register_model("minigpt4")  # the reference's later name
@registry.register_model("mini_gpt4")
class MiniGPT4(VisionEncoder):
    """The whole model. The constructor joins built parts and reads no file; ``from_config`` builds and loads.

    Args:
        visual_encoder: images [B, 3, S, S] to tokens [B, N, W]; None where features come from a cache.
        Qformer: queries [B, Q, H] and tokens [B, N, W] to [B, Q, H]; without vision its configuration alone.
        llama_model: the LM, with which vision has to agree on nothing but L.
        llama_tokenizer: its tokenizer, with a pad token.
        num_query_token: Q.
        prompts: texts with ``<ImageHere>`` of which one is drawn for each batch; none in stage 1.
        prompt_template: what a sample's own instruction is formatted into.
        max_txt_len: tokens of caption and end symbol together, the rest is cut.
        end_sym: what ends a caption.
        freeze_vit, freeze_qformer: frozen parts stay in eval mode and out of the graph.
        vit_dtype: precision that the vision side computes in, where the device computes in half precisions.
    """

    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {
        "pretrain_vicuna": "configs/models/minigpt4.yaml",
        "pretrain_vicuna0": "configs/models/minigpt4.yaml",  # the reference's later name
    }

    def __init__(
        self,
        visual_encoder: nn.Module | None,
        Qformer: QFormer | QFormerConfig,
        llama_model: Llama,
        llama_tokenizer: Any,
        num_query_token: int = 32,
        prompts: Sequence[str] = (),
        prompt_template: str = "",
        max_txt_len: int = 32,
        end_sym: str = "\n",
        freeze_vit: bool = True,
        freeze_qformer: bool = True,
        vit_dtype: torch.dtype = torch.float32,
    ) -> None:
        if visual_encoder is None:
            nn.Module.__init__(self)
            config, self.frozen_parts, self.is_vision_trained = Qformer, [], False
        else:
            super().__init__(visual_encoder, Qformer, num_query_token, freeze_vit, freeze_qformer, vit_dtype)
            config = Qformer.config
        self.num_query_token = num_query_token
        self.llama_model = llama_model
        self.llama_tokenizer = llama_tokenizer
        self.llama_proj = nn.Linear(config.hidden_size, llama_model.config.hidden_size)
        self.prompt_list = list(prompts)
        self.prompt_template = prompt_template
        self.max_txt_len = max_txt_len
        self.end_sym = end_sym
        self._prefixes: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] | None = None
        self.frozen_parts.append(llama_model.requires_grad_(False))
        self.train()

    @classmethod
    def default_config_path(cls, model_type: str) -> Path:
        """The YAML file of a model type's defaults."""
        if model_type not in cls.PRETRAINED_MODEL_CONFIG_DICT:
            known = ", ".join(cls.PRETRAINED_MODEL_CONFIG_DICT)
            raise UserError(f"model.model_type is '{model_type}'; mini_gpt4 has: {known}.")
        return Path(__file__).parents[1] / cls.PRETRAINED_MODEL_CONFIG_DICT[model_type]

    @classmethod
    def from_config(
        cls,
        cfg: Mapping[str, Any],
        device: torch.device | None = None,
        is_sharded: bool = False,
        has_vision: bool = True,
    ) -> "MiniGPT4":
        """Builds the model that the ``model`` section of a configuration describes and loads all its weights.

        Every path is looked up before the first weight is read, so that a typing error costs a second.

        Args:
            cfg: the section; ``docs`` of each key stand in the README.
            device: where the model goes, which decides the default precision; the best there is by default.
            is_sharded: every rank holds a slice of the LM (``run.parallel: fsdp``).
            has_vision: without it, batches bring features from a cache in place of images.

        Raises:
            UserError: a file is missing or does not fit.
        """
        device = device or devices.pick()
        llama_folder = weights.locate(
            cfg.get("llama_model"), "model.llama_model", ("*.json", "tokenizer.model", "*.safetensors", "*.bin")
        )
        check_folder(llama_folder)
        vision_cfg = read_section(ModelConfig, cfg, "model")
        vision_files = locate_vision(vision_cfg) if has_vision else None
        ckpt = weights.locate(cfg["ckpt"], "model.ckpt") if cfg.get("ckpt") else None
        prompts = read_prompts(cfg.get("prompt_path"), cfg.get("prompt_template", ""))

        llm_dtype = devices.DTYPES[cfg["llm_dtype"]] if cfg.get("llm_dtype") else devices.default_dtype(device)
        tokenizer = load_tokenizer(llama_folder)
        llama = load_llama(llama_folder, llm_dtype, device, _preparation(cfg, device, is_sharded))
        check_vocabulary(llama, tokenizer, llama_folder)
        if cfg.get("llm_grad_checkpoint"):
            packed.recompute_layers(llama)
        model = cls(
            *(build_vision(vision_cfg) if has_vision else (None, q_former_config(vision_cfg))),
            llama,
            tokenizer,
            prompts=prompts,
            prompt_template=cfg.get("prompt_template", ""),
            max_txt_len=cfg.get("max_txt_len", 32),
            end_sym=cfg.get("end_sym", "\n"),
            **vision_settings(vision_cfg, device),
        )
        if vision_files is not None:
            load(model, vision_files, vision_cfg, device)
        if ckpt is not None:
            model.load_checkpoint(ckpt)
        log_summary(model)
        return model.to(device)

    def load_checkpoint(self, path: Path) -> None:
        """Loads the trained part from a checkpoint, ours or the reference's; UserError where it does not fit."""
        load_trained_part(self, path)

    def compile_parts(self) -> None:
        """Compiles the decoder's layers, for any number of tokens, and the vision side, which always sees one shape.

        Beginnings are read before: they grow a cache layer by layer, so that each layer would be a function of its own
        to compile. PyTorch compiles eight of one kind and then none, the steps that follow included.
        """
        self._read_prefixes()
        for layer in self.llama_model.model.layers:
            layer.compile(dynamic=True)
        for block in self.visual_encoder.blocks if hasattr(self, "visual_encoder") else ():
            block.compile()

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """The parameters that training changes, by name: what a checkpoint holds."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        """Where the projection is."""
        return self.llama_proj.weight.device

    def encode_img(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S], normalised, to LM inputs [B, Q, L] and their attention mask [B, Q] (int64 ones)."""
        embeds = self.project(self.encode_images(image))
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=image.device)

    def project(self, features: Tensor) -> Tensor:
        """What the Q-Former says [B, Q, H], in any precision, to LM inputs [B, Q, L]."""
        return self.llama_proj(features.to(self.llama_proj.weight.dtype))

    def tokens(self, text: str) -> list[int]:
        """Ids of a text without begin token; halves of surrogate pairs, which JSON may hold alone, are read as "?"."""
        text = text.encode(errors="replace").decode()
        return self.llama_tokenizer(text, add_special_tokens=False).input_ids

    def slots(self, text: str) -> list[int]:
        """Ids of a prompt in which ``<ImageHere>`` stands for an image: Q slots each, the text between apart."""
        first, *rest = text.split(IMAGE_PLACEHOLDER)
        ids = self.tokens(first) if first else []
        for segment in rest:
            ids += [IMAGE_SLOT] * self.num_query_token
            ids += self.tokens(segment) if segment else []
        return ids

    def embed(self, ids: Tensor, image_embeds: Tensor | None = None) -> Tensor:
        """Ids [B, T] to LM inputs [B, T, L]; slots are filled, in order, from image embeddings [images, Q, L]."""
        embeds = self.llama_model.model.embed_tokens(ids.clamp(min=0))
        if image_embeds is None:
            return embeds
        return embeds.masked_scatter((ids == IMAGE_SLOT).unsqueeze(-1), image_embeds.to(embeds.dtype))

    def pack(self, captions: Sequence[str], prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Training rows: begin token, prompt with image slots, caption with end symbol, padded on the right.

        Returns:
            ids, attention mask and labels, each int64 [B, T] on the CPU. Labels are the ids where they are
            caption or end symbol and not the pad id (which may be written out in a caption), else -100.
        """
        tokenizer = self.llama_tokenizer
        rows, starts = [], []
        for caption, prompt in zip(captions, prompts, strict=True):
            prefix = [tokenizer.bos_token_id, *self.slots(prompt)]
            rows.append(prefix + self.tokens(caption + self.end_sym)[: self.max_txt_len])
            starts.append(len(prefix))
        ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
            labels[i, start : len(row)] = ids[i, start : len(row)]
        return ids, mask, labels.masked_fill(labels == tokenizer.pad_token_id, IGNORED)

    def choose_prompts(self, samples: Mapping[str, Any]) -> list[str]:
        """A prompt a row: the sample's own instruction, else one that is drawn for the whole batch, else none."""
        drawn = random.choice(self.prompt_list) if self.prompt_list else IMAGE_PLACEHOLDER
        instructions = samples.get("instruction") or [None] * len(samples["text_input"])
        if any(instructions) and "{}" not in self.prompt_template:
            raise UserError("Samples have instructions, but model.prompt_template is not set; see the stage-2 YAML.")
        return [
            self.prompt_template.format(f"<Img>{IMAGE_PLACEHOLDER}</Img> {text}") if text else drawn
            for text in instructions
        ]

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Any]:
        """The loss of a batch.

        Args:
            samples: ``image`` [B, 3, S, S] or in its place ``features`` [B, Q, H] from a cache, ``text_input``
                (B captions), optionally ``instruction`` (B texts or None).

        Returns:
            ``loss``, the mean over all target tokens (float32, scalar), and the counts ``num_tokens`` (without
            padding), ``num_padded_tokens`` (with) and ``num_targets`` as plain numbers.
        """
        features = samples["features"] if "features" in samples else self.encode_images(samples["image"])
        image_embeds = self.project(features)
        ids, mask, labels = self.pack(samples["text_input"], self.choose_prompts(samples))
        counts = {"num_tokens": int(mask.sum()), "num_padded_tokens": mask.numel()}
        prefix = self._common_prefix(ids)
        ids, mask, labels = ids[:, prefix.length :], mask[:, prefix.length :].bool(), labels[:, prefix.length :]
        number = (mask.flatten().cumsum(0) - 1).view_as(mask)  # of a token among those of all rows
        is_target = labels[:, 1:] != IGNORED  # position t predicts token t + 1
        tokens = ids[mask]  # [N]
        parts = tokens, (tokens == IMAGE_SLOT).nonzero().squeeze(1), number[:, :-1][is_target], labels[:, 1:][is_target]
        # One copy to the device for all four; nothing in this step waits for the device.
        on_device = torch.cat(parts).to(image_embeds.device, non_blocking=True).split([len(part) for part in parts])
        tokens, slots, where, targets = on_device
        embeds = self.llama_model.model.embed_tokens(tokens.clamp(min=0))
        embeds = embeds.index_copy(0, slots, image_embeds.flatten(0, 1).to(embeds.dtype))  # [N, L]
        rows = packed.Rows(mask.sum(1).tolist(), where, prefix.keys_and_values, embeds.device)
        hidden = self.llama_model.model(embeds, rows.positions, rows, where)  # [targets, L]
        loss = packed.next_token_loss(hidden, self.llama_model.lm_head.weight, targets)
        return {"loss": loss, **counts, "num_targets": len(targets)}

    def _common_prefix(self, ids: Tensor) -> "_Prefix":
        """What stands before the image in all rows alike, if the frozen LM has read it beforehand."""
        if self._prefixes is None:
            self._read_prefixes()
        key = tuple(ids[0, : int((ids[0] == IMAGE_SLOT).nonzero()[0])].tolist())
        if key in self._prefixes and (ids[:, : len(key)] == ids[:1, : len(key)]).all():
            return _Prefix(len(key), self._prefixes[key])
        return _Prefix(0, [])

    def _read_prefixes(self) -> None:
        """Lets the LM read whatever may stand before the images of a batch.

        All at once: of a sharded LM every forward is the work of all ranks, which draw different prompts.
        """
        prompts = self.prompt_list or [IMAGE_PLACEHOLDER]
        prompts = prompts + [self.prompt_template.format(f"<Img>{IMAGE_PLACEHOLDER}")] * ("{}" in self.prompt_template)
        slots = [[self.llama_tokenizer.bos_token_id, *self.slots(prompt)] for prompt in prompts]
        keys = sorted({tuple(row[: row.index(IMAGE_SLOT)]) for row in slots})
        self._prefixes = {key: packed.keys_and_values(self.llama_model, list(key)) for key in keys}


class _Prefix(NamedTuple):
    length: int
    keys_and_values: list[tuple[Tensor, Tensor]]  # of each layer


def _preparation(cfg: Mapping[str, Any], device: torch.device, is_sharded: bool) -> Callable[[nn.Module], None] | None:
    """What happens to the LM before its weights arrive: slices over ranks, 8 bits, or nothing."""
    key = "model.low_resource" if cfg.get("low_resource") else "model.llm_precision: int8"
    is_int8 = cfg.get("low_resource") or cfg.get("llm_precision") == "int8"
    if is_int8 and is_sharded:
        raise UserError(f"{key} and run.parallel: fsdp exclude each other; choose one of the two.")
    if is_sharded:
        return partial(shard_language_model, device=device)
    if is_int8 and not devices.has_int8(device):
        logging.warning("%s: no 8-bit weights on %s; going on in half precision.", key, device.type)
        return None
    if is_int8:
        logging.info("%s: the LM's layers hold 8-bit weights.", key)
        return to_int8
    return None


def read_prompts(path: str | None, template: str) -> list[str]:
    """Reads the prompt file: its lines with ``<ImageHere>``, each put into the template (stage 2); none without a path.

    Raises:
        UserError: the file is missing, no line has the mark, or the template has no ``{}``.
    """
    try:
        is_template = not template or template.format("\0").count("\0") == 1
    except (ValueError, LookupError, AttributeError):
        is_template = False
    if not is_template or (path and not template):
        raise UserError(f"model.prompt_template is '{template}'; expected one {{}} where the prompt goes.")
    if not path:
        return []
    file = weights.locate(path, "model.prompt_path")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"model.prompt_path: {file} cannot be read as UTF-8 text ({error}).") from error
    lines = [line for line in text.splitlines() if IMAGE_PLACEHOLDER in line]
    if not lines:
        raise UserError(
            f"model.prompt_path: no line of {file} contains {IMAGE_PLACEHOLDER}; each prompt needs it once."
        )
    if twice := [line for line in lines if line.count(IMAGE_PLACEHOLDER) > 1]:
        raise UserError(
            f"model.prompt_path: a line of {file} has {IMAGE_PLACEHOLDER} more than once: '{twice[0][:80]}'."
        )
    return [template.format(line) for line in lines]
