"""MiniGPT-4 (Zhu et al., 2023): EVA-ViT and Q-Former, one linear projection, a frozen Llama.

Shapes: B batch, S image side, N image tokens, Q queries, H width of the Q-Former, L width of the LM, T tokens.
"""

import logging
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from minigpt4.common import device as devices
from minigpt4.common import weights
from minigpt4.common.errors import UserError
from minigpt4.common.registry import registry
from minigpt4.common.utils import IMAGE_MARK
from minigpt4.models.eva_vit import build_eva_vit, round_vit_weights
from minigpt4.models.int8 import to_int8
from minigpt4.models.llama import check_folder, check_vocabulary, load_llama
from minigpt4.models.llama_tokenizer import load_tokenizer
from minigpt4.models.loading import load_trained_part, load_vision, log_summary
from minigpt4.models.parallel import shard_language_model
from minigpt4.models.Qformer import QFormer, QFormerConfig

_PUBLISHED = "https://storage.googleapis.com/sfr-vision-language-research/LAVIS/models/BLIP2/"
VIT_URL = _PUBLISHED + "eva_vit_g.pth"
Q_FORMER_URL = _PUBLISHED + "blip2_pretrained_flant5xxl.pth"
IMAGE_SLOT = -1  # stands in a list of token ids where one image embedding goes
IGNORED = -100  # label of a position that is no target


class LayerNorm(nn.LayerNorm):
    """LayerNorm in float32 whatever the precision around it; the dtype of the input comes back out."""

    def forward(self, x: Tensor) -> Tensor:
        """[…, W] -> […, W]."""
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


@registry.register_model("mini_gpt4")
class MiniGPT4(nn.Module):
    """The whole model. The constructor joins built parts and reads no file; ``from_config`` builds and loads.

    Args:
        visual_encoder: images [B, 3, S, S] to tokens [B, N, W].
        Qformer: queries [B, Q, H] and tokens [B, N, W] to [B, Q, H].
        llama_model: a causal LM of transformers.
        llama_tokenizer: its tokenizer, with a pad token.
        num_query_token: Q.
        prompts: texts with ``<ImageHere>`` of which one is drawn for each batch; none in stage 1.
        prompt_template: what a sample's own instruction is formatted into.
        max_txt_len: tokens of caption and end symbol together, the rest is cut.
        end_sym: what ends a caption.
        freeze_vit, freeze_qformer: frozen parts stay in eval mode and out of the graph.
        vit_dtype: precision that the vision side computes in, where the device computes in half precisions.
    """

    PRETRAINED_MODEL_CONFIG_DICT: ClassVar[dict[str, str]] = {"pretrain_vicuna": "configs/models/minigpt4.yaml"}

    def __init__(
        self,
        visual_encoder: nn.Module,
        Qformer: QFormer,
        llama_model: nn.Module,
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
        super().__init__()
        self.visual_encoder = visual_encoder
        self.ln_vision = LayerNorm(Qformer.config.encoder_width, eps=1e-5)
        self.Qformer = Qformer
        self.query_tokens = nn.Parameter(torch.zeros(1, num_query_token, Qformer.config.hidden_size))
        nn.init.normal_(self.query_tokens, std=0.02)
        self.llama_model = llama_model
        self.llama_tokenizer = llama_tokenizer
        self.llama_proj = nn.Linear(Qformer.config.hidden_size, llama_model.config.hidden_size)
        self.prompt_list = list(prompts)
        self.prompt_template = prompt_template
        self.max_txt_len = max_txt_len
        self.end_sym = end_sym
        self.vit_dtype = vit_dtype
        self.frozen_parts: list[nn.Module] = [llama_model]
        self.frozen_parts += [visual_encoder, self.ln_vision] if freeze_vit else []
        self.frozen_parts += [Qformer] if freeze_qformer else []
        self.query_tokens.requires_grad = not freeze_qformer
        self.vision_trains = not (freeze_vit and freeze_qformer)
        for module in self.frozen_parts:
            module.requires_grad_(False)
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
        cls, cfg: Mapping[str, Any], device: torch.device | None = None, is_sharded: bool = False
    ) -> "MiniGPT4":
        """Builds the model that the ``model`` section of a configuration describes and loads all its weights.

        Every path is looked up before the first weight is read, so that a typing error costs a second.

        Args:
            cfg: the section; ``docs`` of each key stand in the README.
            device: where the model goes, which decides the default precision; the best there is by default.
            is_sharded: every rank holds a slice of the LM (``run.parallel: fsdp``).

        Raises:
            UserError: a file is missing or does not fit.
        """
        device = device or devices.pick()
        hub_json, hub_lm = ("*.index.json", "*.json"), ("*.json", "tokenizer.model", "*.safetensors", "*.bin")
        llama_folder = weights.locate(cfg.get("llama_model"), "model.llama_model", hub_lm)
        check_folder(llama_folder)
        vit_file = weights.locate(
            cfg.get("vit_weights", VIT_URL), "model.vit_weights", (*hub_json[:1], "vision_model.*")
        )
        q_former_file = weights.locate(
            cfg.get("q_former_model", Q_FORMER_URL),
            "model.q_former_model",
            (*hub_json[:1], "qformer.*", "query_tokens", "vision_model.post_layernorm.*"),
        )
        ckpt = weights.locate(cfg["ckpt"], "model.ckpt") if cfg.get("ckpt") else None
        prompts = read_prompts(cfg.get("prompt_path"), cfg.get("prompt_template", ""))

        half = devices.half_dtype(device)
        computes_float32 = half == torch.float32
        llm_dtype = devices.DTYPES[cfg["llm_dtype"]] if cfg.get("llm_dtype") else half
        vit_dtype = devices.DTYPES[cfg.get("vit_precision", "fp16")]
        freeze_vit, freeze_qformer = cfg.get("freeze_vit", True), cfg.get("freeze_qformer", True)
        tokenizer = load_tokenizer(llama_folder)
        prepare = None
        if cfg.get("low_resource") and is_sharded:
            raise UserError("model.low_resource and run.parallel: fsdp exclude each other; choose one of the two.")
        if is_sharded:
            prepare = partial(shard_language_model, device=device)
        elif cfg.get("low_resource") and devices.has_int8(device):
            prepare = to_int8
            logging.info("model.low_resource: the LM's layers hold 8-bit weights.")
        elif cfg.get("low_resource"):
            logging.warning(
                "model.low_resource: no 8-bit weights on %s; going on in %s.", device.type, str(llm_dtype)[6:]
            )
        llama = load_llama(llama_folder, llm_dtype, device, prepare)
        check_vocabulary(llama, tokenizer, llama_folder)
        with torch.device("meta"):
            vit = build_eva_vit(
                cfg.get("image_size", 224),
                cfg.get("drop_path_rate", 0.0),
                cfg.get("use_grad_checkpoint", False) and not freeze_vit,
                cfg.get("vit_config"),
            )
            q_config = QFormerConfig(**{**dict(cfg.get("qformer_config") or {}), "encoder_width": vit.embed_dim})
            q_former = QFormer(q_config)
        model = cls(
            vit,
            q_former,
            llama,
            tokenizer,
            num_query_token=cfg.get("num_query_token", 32),
            prompts=prompts,
            prompt_template=cfg.get("prompt_template", ""),
            max_txt_len=cfg.get("max_txt_len", 32),
            end_sym=cfg.get("end_sym", "\n"),
            freeze_vit=freeze_vit,
            freeze_qformer=freeze_qformer,
            vit_dtype=torch.float32 if computes_float32 or not freeze_vit else vit_dtype,
        )
        load_vision(model, vit_file, q_former_file)
        if freeze_vit and vit_dtype != torch.float32:
            round_vit_weights(vit, vit_dtype, keep_float32=computes_float32)
        if ckpt is not None:
            model.load_checkpoint(ckpt)
        log_summary(model)
        return model.to(device)

    def load_checkpoint(self, path: Path) -> None:
        """Loads the trained part from a checkpoint, ours or the reference's; UserError where it does not fit."""
        load_trained_part(self, path)

    def train(self, mode: bool = True) -> "MiniGPT4":
        """Switches the trained parts only; frozen ones stay in eval mode for good."""
        super().train(mode)
        for module in self.frozen_parts:
            module.eval()
        return self

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """The parameters that training changes, by name: what a checkpoint holds."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    @property
    def device(self) -> torch.device:
        """Where the projection is."""
        return self.llama_proj.weight.device

    def encode_img(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, S, S], normalised, to LM inputs [B, Q, L] and their attention mask [B, Q] (int64 ones)."""
        in_half = self.vit_dtype != torch.float32
        with torch.set_grad_enabled(self.vision_trains and torch.is_grad_enabled()):
            # Without a half precision of its own, the vision side follows the autocast around it.
            with devices.autocast(image.device, self.vit_dtype) if in_half else nullcontext():
                image_tokens = self.ln_vision(self.visual_encoder.forward_features(image))  # [B, N, W]
                queries = self.query_tokens.expand(image.shape[0], -1, -1)
                query_output = self.Qformer(queries, image_tokens)  # [B, Q, H]
        embeds = self.llama_proj(query_output.to(self.llama_proj.weight.dtype))
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=image.device)

    def tokens(self, text: str) -> list[int]:
        """Ids of a text without begin token; halves of surrogate pairs, which JSON may hold alone, are read as "?"."""
        text = text.encode(errors="replace").decode()
        return self.llama_tokenizer(text, add_special_tokens=False).input_ids

    def slots(self, text: str) -> list[int]:
        """Ids of a prompt in which ``<ImageHere>`` stands for an image: Q slots each, the text between apart."""
        first, *rest = text.split(IMAGE_MARK)
        ids = self.tokens(first) if first else []
        for segment in rest:
            ids += [IMAGE_SLOT] * self.query_tokens.shape[1]
            ids += self.tokens(segment) if segment else []
        return ids

    def embed(self, ids: Tensor, image_embeds: Tensor | None = None) -> Tensor:
        """Ids [B, T] to LM inputs [B, T, L]; slots are filled, in order, from image embeddings [images, Q, L]."""
        embeds = self.llama_model.get_input_embeddings()(ids.clamp(min=0))
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
        drawn = random.choice(self.prompt_list) if self.prompt_list else IMAGE_MARK
        instructions = samples.get("instruction") or [None] * len(samples["text_input"])
        if any(instructions) and "{}" not in self.prompt_template:
            raise UserError("Samples have instructions, but model.prompt_template is not set; see the stage-2 YAML.")
        return [
            self.prompt_template.format(f"<Img>{IMAGE_MARK}</Img> {text}") if text else drawn for text in instructions
        ]

    def forward(self, samples: Mapping[str, Any]) -> dict[str, Any]:
        """The loss of a batch.

        Args:
            samples: ``image`` [B, 3, S, S], ``text_input`` (B captions), optionally ``instruction`` (B texts or None).

        Returns:
            ``loss``, the mean over all target tokens (float32, scalar), and the counts ``num_tokens`` (without
            padding), ``num_padded_tokens`` (with) and ``num_targets`` as plain numbers.
        """
        image_embeds, _ = self.encode_img(samples["image"])
        ids, mask, labels = self.pack(samples["text_input"], self.choose_prompts(samples))
        device = image_embeds.device
        hidden = self.llama_model.model(
            inputs_embeds=self.embed(ids.to(device), image_embeds), attention_mask=mask.to(device), use_cache=False
        ).last_hidden_state  # [B, T, L]
        targets = labels[:, 1:].flatten()  # position t predicts token t + 1
        where = (targets != IGNORED).nonzero().squeeze(1)
        logits = self.llama_model.lm_head(hidden[:, :-1].flatten(0, 1)[where.to(device)]).float()  # targets only
        return {
            "loss": nn.functional.cross_entropy(logits, targets[where].to(device)),
            "num_tokens": int(mask.sum()),
            "num_padded_tokens": mask.numel(),
            "num_targets": where.numel(),
        }


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
    lines = [line for line in text.splitlines() if IMAGE_MARK in line]
    if not lines:
        raise UserError(f"model.prompt_path: no line of {file} contains {IMAGE_MARK}; each prompt needs it once.")
    if twice := [line for line in lines if line.count(IMAGE_MARK) > 1]:
        raise UserError(f"model.prompt_path: a line of {file} has {IMAGE_MARK} more than once: '{twice[0][:80]}'.")
    return [template.format(line) for line in lines]
