"""The vision encoder, from pixels to image features: EVA-ViT, ln_vision, and a Q-Former or groups of four patches.

Shapes: B batch, S image side, N image tokens, W their width; Q image features of width H: the queries of the Q-Former,
or (N - 1) / 4 groups of width 4 W.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from timm.models.eva import Eva
from torch import Tensor, nn

from minigpt4.common import device as devices
from minigpt4.common import weights
from minigpt4.common.errors import UserError
from minigpt4.common.files import locate
from minigpt4.common.schema import ModelConfig, read_section
from minigpt4.models.eva_vit import build_eva_vit, interpolate_pos_embed, round_vit_weights
from minigpt4.models.Qformer import QFormer, QFormerConfig

VIT, Q_FORMER = "model.vit_weights", "model.q_former_model"
# In BLIP-2's and InstructBLIP's folders.
_VIT_TENSORS = ("vision_model.embeddings.*", "vision_model.encoder.*")
_Q_FORMER_TENSORS = ("vision_model.post_layernorm.*", "query_tokens", "qformer.*")
States = Mapping[str, Mapping[str, Tensor]]  # tensors by the YAML key of their file


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32; returns the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """[…, W] -> […, W]."""
        weight, bias = self.weight.float(), self.bias.float()
        return nn.functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class VisionEncoder(nn.Module):
    """Encodes images into features. The constructor combines built parts; ``from_config`` builds and loads.

    Without a Q-Former the class token is dropped, four consecutive patches are one feature, and ``ln_vision`` has no
    trained weights: its scale is one, as in the reference.

    Args:
        visual_encoder: images [B, 3, S, S] to tokens [B, N, W]; None for a model whose features come from a cache.
        Qformer: queries [B, Q, H] and tokens [B, N, W] to [B, Q, H]; None for groups of four patches.
        num_query_token: Q.
        feature_width: H.
        has_qformer: whether features are those of a Q-Former, which is absent where they come from a cache.
        freeze_vit, freeze_qformer: frozen parts stay in eval mode and their parameters get no gradients.
        vit_dtype: autocast dtype of the vision encoder; with float32 it uses the autocast of the caller, if any.
    """

    def __init__(
        self,
        visual_encoder: Eva | None,
        Qformer: QFormer | None,
        num_query_token: int = 32,
        feature_width: int = 768,
        has_qformer: bool = True,
        freeze_vit: bool = True,
        freeze_qformer: bool = True,
        vit_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_query_token, self.feature_width, self.vit_dtype = num_query_token, feature_width, vit_dtype
        self.has_qformer = has_qformer
        self.frozen_parts: list[nn.Module] = []
        if visual_encoder is None:
            return
        self.visual_encoder = visual_encoder
        self.ln_vision = LayerNorm(visual_encoder.num_features, eps=1e-5)
        self.frozen_parts += [visual_encoder, self.ln_vision] if freeze_vit else []
        if has_qformer:
            self.Qformer = Qformer
            self.query_tokens = nn.Parameter(torch.zeros(1, num_query_token, Qformer.config.hidden_size))
            nn.init.normal_(self.query_tokens, std=0.02)
            self.frozen_parts += [Qformer] if freeze_qformer else []
        self._freeze()

    def _freeze(self) -> None:
        for module in self.frozen_parts:
            module.requires_grad_(False)
        if self.has_qformer:
            self.query_tokens.requires_grad = self.Qformer not in self.frozen_parts

    @classmethod
    def from_config(cls, cfg: ModelConfig | Mapping[str, Any], device: torch.device) -> "VisionEncoder":
        """Builds the encoder of a ``model`` section alone, without a language model, and loads its weights."""
        cfg = read_section(ModelConfig, cfg, "model")
        files = locate_vision(cfg)
        vision = cls(*build_vision(cfg), **vision_settings(cfg, device))
        readers = ((VIT, vit_state, files[0]), (Q_FORMER, q_former_state, files[1]))
        states = {key: read(vision, file) for key, read, file in readers if file is not None}
        load_vision(vision, states, files, cfg, device)
        return vision.to(device).train()

    def train(self, mode: bool = True) -> "VisionEncoder":
        """Switches the trained parts only; frozen parts stay in eval mode."""
        super().train(mode)
        for module in self.frozen_parts:
            module.eval()
        return self

    def encode_images(self, image: Tensor) -> Tensor:
        """Encodes normalised images [B, 3, S, S] into features [B, Q, H]; ValueError for other shapes.

        Gradients reach the pixels if ``image`` requires them. Otherwise a frozen encoder builds no graph, as none of
        its parameters requires gradients.
        """
        size = self.visual_encoder.patch_embed.img_size
        if tuple(image.shape[1:]) != (3, *size) or not len(image):
            expected = f"[B, 3, {size[0]}, {size[1]}] with at least one image"
            raise ValueError(f"Images are {list(image.shape)}; the vision encoder expects {expected}.")
        with devices.autocast(image.device, self.vit_dtype):
            image_tokens = self.ln_vision(self.visual_encoder(image))  # [B, N, W]
            if not self.has_qformer:
                return image_tokens[:, 1:].unflatten(1, (-1, 4)).flatten(2)
            return self.Qformer(self.query_tokens.expand(len(image), -1, -1), image_tokens)


def locate_vision(cfg: ModelConfig) -> tuple[Path, Path | None]:
    """Finds or downloads the files of the vision transformer and of the Q-Former, if any; reads no weights."""
    vit = locate(cfg.vit_weights, VIT, (), _VIT_TENSORS)
    return vit, locate(cfg.q_former_model, Q_FORMER, (), _Q_FORMER_TENSORS) if cfg.has_qformer else None


def vision_dtype(cfg: ModelConfig, device: torch.device) -> torch.dtype:
    """Autocast dtype of the vision encoder: ``vit_precision``, on a CPU its fastest; float32 means the caller's."""
    if not cfg.freeze_vit or cfg.vit_precision == "fp32":
        return torch.float32
    return devices.default_dtype(device) if device.type == "cpu" else devices.DTYPES[cfg.vit_precision]


def vision_settings(cfg: ModelConfig, device: torch.device) -> dict[str, Any]:
    """The constructor's arguments other than the parts, from a ``model`` section."""
    settings = {name: getattr(cfg, name) for name in ("freeze_vit", "freeze_qformer", "has_qformer")}
    num_patches, width = (cfg.image_size // cfg.vit_config.patch_size) ** 2, cfg.vit_config.embed_dim
    shape = (cfg.num_query_token, cfg.qformer_config.hidden_size) if cfg.has_qformer else (num_patches // 4, 4 * width)
    settings |= zip(("num_query_token", "feature_width"), shape, strict=True)
    return settings | {"vit_dtype": vision_dtype(cfg, device)}


def build_vision(cfg: ModelConfig, has_vision: bool = True) -> tuple[Eva | None, QFormer | None]:
    """Builds vision transformer and Q-Former on the meta device, or what of them the model has.

    Raises UserError for images whose patches do not fill groups of four, where there is no Q-Former.
    """
    if not has_vision:
        return None, None
    side = cfg.image_size // cfg.vit_config.patch_size
    if not cfg.has_qformer and side**2 % 4:
        problem = f"model.image_size {cfg.image_size} has {side} x {side} patches, which do not fill groups of four"
        raise UserError(f"{problem}; without a Q-Former, it has to be a multiple of {2 * cfg.vit_config.patch_size}.")
    with init_empty_weights():
        is_checkpointed = cfg.use_grad_checkpoint and not cfg.freeze_vit
        vit = build_eva_vit(cfg.image_size, cfg.drop_path_rate, is_checkpointed, cfg.vit_config)
        if not cfg.has_qformer:
            return vit, None
        return vit, QFormer(QFormerConfig(**asdict(cfg.qformer_config), encoder_width=cfg.vit_config.embed_dim))


def vit_state(vision: VisionEncoder, file: Path) -> dict[str, Tensor]:
    """The vision transformer's tensors in a published file or its Hugging Face twin, matched with the built module."""
    state = _published(weights.read_state_dict(file, VIT, _VIT_TENSORS), _VIT_TENSORS)
    state = {name.removeprefix("visual_encoder."): value for name, value in state.items()}
    if "pos_embed" in state:
        state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], vision.visual_encoder.pos_embed.shape[1])
    last = f"blocks.{len(vision.visual_encoder.blocks)}.*"  # the published file has one block more
    droppable = [last, "norm.*", "fc_norm.*", "head.*", "ln_vision.*", "Qformer.*", "query_tokens"]
    hint = "Is it eva_vit_g.pth, and does model.vit_config describe it?"
    return weights.match_state_dict(vision.visual_encoder, state, file, VIT, droppable, hint)


def q_former_state(vision: VisionEncoder, file: Path) -> dict[str, Tensor]:
    """The same for ln_vision, queries and Q-Former."""
    state = _published(weights.read_state_dict(file, Q_FORMER, _Q_FORMER_TENSORS), _Q_FORMER_TENSORS)
    droppable = [  # the text branch, heads of BLIP-2, and the vision transformer
        *("Qformer.bert.embeddings.word_embeddings.*", "Qformer.bert.embeddings.position_*", "Qformer.cls.*"),
        *("Qformer.bert.encoder.layer.*.intermediate.dense.*", "Qformer.bert.encoder.layer.*.output.*"),
        *("t5_proj.*", "opt_proj.*", "llm_proj.*", "temp", "itm_head.*", "vision_proj.*", "text_proj.*"),
        *("cls_token", "pos_embed", "patch_embed.*", "blocks.*", "visual_encoder.*"),
    ]
    hint = "Is it blip2_pretrained_flant5xxl.pth, and do model.qformer_config and num_query_token describe it?"
    return weights.match_state_dict(_query_side(vision), state, file, Q_FORMER, droppable, hint)


def _published(state: dict[str, Tensor], tensors: Sequence[str]) -> dict[str, Tensor]:
    """The tensors under published names; of a Hugging Face twin, those whose names match a pattern of ``tensors``."""
    if not any(name.startswith(("vision_model.", "qformer.")) for name in state):
        return state
    wanted = {n: value for n, value in state.items() if any(fnmatch.fnmatch(n, pattern) for pattern in tensors)}
    return weights.published_names(wanted)


def _query_side(vision: VisionEncoder) -> nn.ModuleDict:
    """What the published Q-Former file holds, as one module."""
    module = nn.ModuleDict({"ln_vision": vision.ln_vision, "Qformer": vision.Qformer})
    module.register_parameter("query_tokens", vision.query_tokens)
    return module


def load_vision(
    vision: VisionEncoder, states: States, files: tuple[Path, Path | None], cfg: ModelConfig, device: torch.device
) -> None:
    """Loads what ``vit_state`` and ``q_former_state`` read from ``files``, in the precisions of a run on ``device``."""
    weights.assign(vision.visual_encoder, states[VIT], files[0], VIT)
    if cfg.has_qformer:
        query_side = _query_side(vision)
        weights.assign(query_side, states[Q_FORMER], files[1], Q_FORMER)
        query_side.float()
        vision.query_tokens = query_side.query_tokens
    round_vision(vision, cfg, device)
    vision._freeze()  # assigned tensors come with their own requires_grad


def round_vision(vision: VisionEncoder, cfg: ModelConfig, device: torch.device) -> None:
    """Rounds weights as ``vit_precision`` asks, and stores those that autocast would cast in its dtype."""
    precision = devices.DTYPES[cfg.vit_precision] if cfg.freeze_vit else torch.float32
    computed = vision_dtype(cfg, device)
    round_vit_weights(vision.visual_encoder, precision, keep_float32=computed == torch.float32)
    if computed not in (torch.float32, precision):
        round_vit_weights(vision.visual_encoder, computed)
    if cfg.has_qformer and cfg.freeze_qformer and computed != torch.float32:
        round_vit_weights(vision.Qformer, computed)
