"""Weight files: every form that is accepted; test_loading_refusals.py has what is refused."""
# ruff: noqa: F811  (fixtures are imported by name)

import json
import re
import shutil

import pytest
import torch
from golden_data import TINY
from loading_files import (  # noqa: F401
    FULL,
    PARTS,
    PROJECTION,
    Q_FORMER,
    VISION,
    VIT,
    edit,
    encodes_alike,
    llama,
    sharded,
    written,
)
from safetensors.torch import load_file, save_file
from torch import nn

from minigpt4.common.errors import UserError
from minigpt4.models.eva_vit import build_eva_vit
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.models.Qformer import QFormer, QFormerConfig

PARTS_OF_VISION = ("vit_weights", "q_former_model")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("key", ["vit_weights", "q_former_model"])
def test_file_types(build, tmp_path, key, suffix):
    assert encodes_alike(build(**{key: written(tmp_path / f"weights{suffix}", PARTS[key])}))


@pytest.mark.parametrize("key", ["vit_weights", "q_former_model", "ckpt"])
def test_with_and_without_the_model_wrapper(build, tmp_path, key):
    content = PARTS[key].get("model", PARTS[key])
    for wrapped in (content, {"model": content}):
        assert encodes_alike(build(**{key: written(tmp_path / "weights.pth", wrapped)}))


def test_files_of_before_torch_1_6(build, tmp_path):
    torch.save(VIT, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert encodes_alike(build(vit_weights=str(tmp_path / "old.pth")))


def test_half_precision_file_of_the_tower(build, tmp_path):
    halves = {name: value.half() for name, value in VIT.items()}
    model = build(vit_weights=written(tmp_path / "half.pth", halves))
    assert {p.dtype for p in model.visual_encoder.parameters()} == {torch.float32}
    assert torch.equal(model.visual_encoder.cls_token, halves["cls_token"].float())


def test_language_model_from_bin(build, tmp_path):
    folder = shutil.copytree(TINY / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("*.safetensors"))
    assert torch.equal(build(llama_model=str(folder)).llama_model.lm_head.weight, build().llama_model.lm_head.weight)


def test_language_model_from_shards(build, llama):
    state = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    names, weight_map = list(state), {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: state[name] for name in part}, llama / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (llama / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert torch.equal(build(llama_model=str(llama)).llama_model.lm_head.weight, state["lm_head.weight"])


def test_checkpoint_of_the_original(build):
    """A stage-1 file with the buffers that the original saved along."""
    content = torch.load(TINY / "checkpoint_1.pth", weights_only=True)
    leftovers = {name for name in content["model"] if not name.startswith("llama_proj")}
    assert any("position_ids" in n for n in leftovers) and any("rotary_emb.inv_freq" in n for n in leftovers)
    model = build(ckpt=str(TINY / "checkpoint_1.pth"))
    assert torch.equal(model.llama_proj.weight, content["model"]["llama_proj.weight"])
    assert torch.equal(model.llama_proj.bias, content["model"]["llama_proj.bias"])
    assert not encodes_alike(model)


def test_old_language_model_files_with_rotary_frequencies(build, llama):
    edit(llama, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert encodes_alike(build(llama_model=str(llama)))


def test_without_checkpoint(build):
    model = build(ckpt=None)
    assert not torch.equal(model.llama_proj.weight, PROJECTION["llama_proj.weight"])


def to_twin(name):
    """A published name as the Hugging Face twin has it."""
    for pattern, replacement in (
        (r"^cls_token$", "vision_model.embeddings.class_embedding"),
        (r"^pos_embed$", "vision_model.embeddings.position_embedding"),
        (r"^patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
        (r"^blocks\.(\d+)\.norm(\d)\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
        (r"^blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
        (r"^blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
        (r"^blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
        (r"^ln_vision\.", "vision_model.post_layernorm."),
        (r"^Qformer\.bert\.embeddings\.LayerNorm\.", "qformer.layernorm."),
        (r"^Qformer\.bert\.(.*attention)\.self\.", r"qformer.\1.attention."),
        (r"^Qformer\.bert\.", "qformer."),
    ):
        name, count = re.subn(pattern, replacement, name)
        if count:
            break
    return name


def twin():
    dropped = ("blocks.3.", "norm.", "head.", "Qformer.cls.", "t5_proj.")
    text_branch = re.compile(r"(word_embeddings|position_|\.intermediate\.dense|layer\.\d+\.output\.)")
    state = {}
    for name, value in (VIT | Q_FORMER).items():
        if name.startswith(dropped) or text_branch.search(name) or name.endswith(("q_bias", "v_bias")):
            continue
        state[to_twin(name)] = value
    for i in range(3):
        q_bias, v_bias = (VIT[f"blocks.{i}.attn.{letter}_bias"] for letter in "qv")
        bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        state[f"vision_model.encoder.layers.{i}.self_attn.qkv.bias"] = bias
    return state | {"language_projection.weight": torch.zeros(4, 48), "language_model.shared.weight": torch.zeros(4, 4)}


def instruct_twin():
    """The same as InstructBLIP's folders have it: with the text branch, and embeddings under another name."""
    state = {name.replace("qformer.layernorm.", "qformer.embeddings.layernorm."): v for name, v in twin().items()}
    text = ("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight")
    text += ("encoder.layer.0.intermediate.dense.weight", "encoder.layer.0.output.LayerNorm.bias")
    return state | {f"qformer.{name}": torch.zeros(2, 2) for name in text}


@pytest.mark.parametrize("kind,suffix", [(twin, ".safetensors"), (twin, ".bin"), (instruct_twin, ".safetensors")])
@pytest.mark.parametrize("form", ["file", "single", "sharded", "shards without an index"])
def test_hugging_face_twin(build, tmp_path, kind, form, suffix):
    state = kind()
    assert not any(name.startswith(("blocks", "Qformer", "ln_vision", "cls_token")) for name in state)
    name = "model" if suffix == ".safetensors" else "pytorch_model"
    if form in ("file", "single"):
        file = written(tmp_path / f"{name}{suffix}", state)
        assert encodes_alike(build(**dict.fromkeys(PARTS_OF_VISION, str(file if form == "file" else tmp_path))))
        return
    shards = sharded(tmp_path, state, f"{name}{{}}{suffix}")
    if form == "sharded":
        (tmp_path / shards[-1]).unlink()  # that of the language model is not needed
    else:
        (tmp_path / f"{name}{suffix}.index.json").unlink()
    assert encodes_alike(build(**dict.fromkeys(PARTS_OF_VISION, str(tmp_path))))
    (tmp_path / shards[1]).unlink()
    for key in PARTS_OF_VISION:
        with pytest.raises(UserError, match=rf"model\.{key}: .*{shards[1]}.*finish the download"):
            build(**{key: str(tmp_path)})


def test_an_index_of_another_model(build, tmp_path):
    sharded(tmp_path, {"model.norm.weight": torch.ones(4), "lm_head.weight": torch.ones(4)}, "model{}.safetensors")
    with pytest.raises(UserError, match=r"names no tensor vision_model\.embeddings.*expected the index of a BLIP-2"):
        build(vit_weights=str(tmp_path))


# full size


def test_names_and_shapes_at_full_size():
    with torch.device("meta"):
        llm = nn.Linear(1, 1)
        llm.config = type("Config", (), {"hidden_size": 4096})
        vit = build_eva_vit()
        model = MiniGPT4(vit, QFormer(QFormerConfig(encoder_width=vit.embed_dim)), llm, None)
    state = model.state_dict()
    found = {name: list(value.shape) for name, value in state.items() if not name.startswith("llama_model.")}
    section = FULL["eva_vit_g"]
    expected = {section["prefix_in_minigpt4"] + name: shape for name, shape in section["shapes"].items()}
    expected |= FULL["qformer_kept_by_minigpt4"]["shapes"] | FULL["llama_proj"]["vicuna_7b"]
    expected.pop("Qformer.bert.embeddings.position_ids")
    assert found == expected
    assert sum(p.numel() for p in vit.parameters()) == section["n_params"]


def test_files_with_all_names_of_the_full_size(build, tmp_path):
    """The published files' names, all 40 blocks and 12 layers of them, at reduced width."""
    widths = {1408: 32, 4224: 96, 6144: 139, 768: 24, 3072: 48, 257: 5, 30522: 10, 512: 8}
    generator = torch.Generator().manual_seed(0)

    def tensors(shapes):
        small = {name: [widths.get(size, size) for size in shape] for name, shape in shapes.items()}
        return {name: torch.randn(shape, generator=generator) for name, shape in small.items()}

    tower = tensors(FULL["eva_vit_g"]["shapes"])
    extra = {name.replace("blocks.38.", "blocks.39."): value for name, value in tower.items() if "blocks.38." in name}
    extra |= {"norm.weight": torch.ones(32), "norm.bias": torch.ones(32), "head.weight": torch.ones(9, 32)}
    bridge = tensors(FULL["qformer_kept_by_minigpt4"]["shapes"])
    text = tensors(FULL["qformer_dropped_text_branch"]["shapes"])
    model = build(
        vit_weights=written(tmp_path / "eva_vit_g.pth", {name: v.half() for name, v in (tower | extra).items()}),
        q_former_model=written(tmp_path / "blip2.pth", {"model": bridge | text | {"t5_proj.bias": torch.ones(3)}}),
        vit_config={"patch_size": 14, "embed_dim": 32, "num_heads": 16},
        qformer_config={"hidden_size": 24, "intermediate_size": 48},
        num_query_token=32,
        ckpt=None,
    )
    loaded = model.state_dict()
    for name, value in tower.items():
        assert torch.equal(loaded[f"visual_encoder.{name}"], value.half().float()), name
    for name, value in bridge.items():
        if not name.endswith("position_ids"):
            assert torch.equal(loaded[name], value), name
    with torch.no_grad():
        assert model.encode_img(VISION["image"])[0].shape == (3, 32, 64)
