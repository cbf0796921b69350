"""Weight files: every form that is accepted, and what each wrong one is told."""

import json
import os
import re
import shutil

import pytest
import torch
from golden_data import GOLDEN, TINY, close, read_json, read_tensors
from safetensors.torch import load_file, save_file
from torch import nn

from minigpt4.common.errors import UserError
from minigpt4.models.eva_vit import build_eva_vit
from minigpt4.models.mini_gpt4 import MiniGPT4
from minigpt4.models.Qformer import QFormer, QFormerConfig

VIT = load_file(TINY / "eva_vit.safetensors")
Q_FORMER = load_file(TINY / "qformer.safetensors")
PROJECTION = torch.load(TINY / "minigpt4_ckpt.pth", weights_only=True)["model"]
VISION = read_tensors("vision")
PARTS = {"vit_weights": VIT, "q_former_model": Q_FORMER, "ckpt": {"model": PROJECTION}}
FULL = read_json("full_scale_keys.json", GOLDEN)


def written(file, content):
    if file.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in content.items()}, file)
    else:
        torch.save(content, file)
    return str(file)


def refusal(build, **changes):
    """The message with which a build is refused; it starts with the key that is at fault."""
    with pytest.raises(UserError) as error:
        build(**changes)
    message = str(error.value)
    assert message.startswith(f"model.{next(iter(changes))}"), message
    return message


def assert_words(message, *words):
    assert not [word for word in words if word not in message], message


def encodes_alike(model):
    with torch.no_grad():
        return torch.equal(model.encode_img(VISION["image"])[0], MODEL_OUTPUT[0])


MODEL_OUTPUT = []


@pytest.fixture(autouse=True, scope="module")
def model_output(model):
    with torch.no_grad():
        MODEL_OUTPUT[:] = [model.encode_img(VISION["image"])[0]]


@pytest.fixture
def llama(tmp_path):
    """A copy of the tiny LM's folder, safetensors only, to be damaged."""
    return shutil.copytree(TINY / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("*.bin"))


def edit(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


# what is accepted


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


@pytest.mark.parametrize("form", ["file", "folder of shards"])
def test_hugging_face_twin(build, tmp_path, form):
    state = twin()
    assert not any(name.startswith(("blocks", "Qformer", "ln_vision", "cls_token")) for name in state)
    place = written(tmp_path / "model.safetensors", state)
    if form == "folder of shards":
        place = tmp_path / "twin"
        place.mkdir()
        names = sorted(state)
        for number in range(3):
            part = {name: state[name] for name in names[number::3]}
            written(place / f"model-0000{number + 1}-of-00003.safetensors", part)
    assert encodes_alike(build(vit_weights=str(place), q_former_model=str(place)))


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


# what is refused


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("vit_weights", "blocks.1.attn.q_bias"),
        ("vit_weights", "pos_embed"),
        ("q_former_model", "query_tokens"),
        ("q_former_model", "ln_vision.weight"),
        ("q_former_model", "Qformer.bert.encoder.layer.3.output_query.dense.bias"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "shape", "NaN"])
def test_damaged_tensor(build, tmp_path, key, name, damage):
    state = {n: v.clone() for n, v in PARTS[key].items()}
    if damage == "missing":
        del state[name]
    elif damage == "shape":
        state[name] = torch.zeros(*state[name].shape[:-1], 5)
    else:
        state[name].view(-1)[3] = torch.nan
    file = written(tmp_path / "weights.pth", state)
    message = refusal(build, **{key: file})
    assert_words(message, file, name)
    if damage == "shape":
        assert_words(message, str(list(state[name].shape)), str(list(PARTS[key][name].shape)))
    elif damage == "missing":
        assert_words(message, "1 of", "missing")
    else:
        assert_words(message, "NaN")


@pytest.mark.parametrize("key", ["vit_weights", "q_former_model", "ckpt"])
def test_unexpected_key(build, tmp_path, key):
    content = dict(PARTS[key].get("model", PARTS[key])) | {"stranger.weight": torch.ones(2)}
    file = written(tmp_path / "weights.pth", content)
    assert_words(refusal(build, **{key: file}), file, "stranger.weight")


def test_swapped_files(build):
    message = refusal(build, vit_weights=str(TINY / "qformer.safetensors"))
    assert_words(message, "missing", "Is it eva_vit_g.pth")
    message = refusal(build, q_former_model=str(TINY / "eva_vit.safetensors"))
    assert_words(message, "missing", "Is it blip2_pretrained_flant5xxl.pth")
    message = refusal(build, ckpt=str(TINY / "eva_vit.safetensors"))
    assert_words(message, "no llama_proj.weight", "eva_vit.safetensors")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((5120, 48), ("[5120, 48]", "[64, 48]", "13B")),
        ((80, 48), ("[80, 48]", "[64, 48]", "80 wide", "64 wide")),
        ((64, 5632), ("[64, 5632]", "[64, 48]", "Llama-2")),
        ((4096, 5632), ("[4096, 5632]", "Llama-2")),
        ((64, 96), ("[64, 96]", "[64, 48]", "qformer_config")),
    ],
)
def test_projection_of_another_model(build, tmp_path, shape, words):
    content = {"llama_proj.weight": torch.zeros(shape), "llama_proj.bias": torch.zeros(shape[0])}
    file = written(tmp_path / "projection.pth", {"model": content})
    assert_words(refusal(build, ckpt=file), file, *words)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_projection_that_diverged(build, tmp_path, value):
    content = {name: tensor.clone() for name, tensor in PROJECTION.items()}
    content["llama_proj.bias"][0] = value
    file = written(tmp_path / "projection.pth", content)
    assert_words(refusal(build, ckpt=file), file, "llama_proj.bias", "NaN or infinity")


def test_projection_without_bias(build, tmp_path):
    file = written(tmp_path / "projection.pth", {"llama_proj.weight": PROJECTION["llama_proj.weight"]})
    assert_words(refusal(build, ckpt=file), file, "no llama_proj.bias")


@pytest.mark.parametrize("key", ["llama_model", "vit_weights", "q_former_model", "ckpt"])
def test_paths_that_lead_nowhere(build, tmp_path, key):
    assert_words(refusal(build, **{key: "/path/to/weights/"}), "placeholder", "/path/to/weights/")
    absent = str(tmp_path / "absent.pth")
    assert_words(refusal(build, **{key: absent}), absent, "does not exist")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("key", ["vit_weights", "q_former_model"])
def test_truncated_file(build, tmp_path, key, suffix):
    file = tmp_path / f"weights{suffix}"
    written(file, PARTS[key])
    size = file.stat().st_size // 2
    os.truncate(file, size)
    assert_words(refusal(build, **{key: str(file)}), str(file), f"{size:,} bytes", "damaged")


class RunsCode:
    """Pickled as a call that makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("key", ["vit_weights", "q_former_model", "ckpt"])
def test_pickle_that_would_run_code(build, tmp_path, key):
    mark = tmp_path / "ran"
    file = written(tmp_path / "evil.pth", {"model": {"llama_proj.weight": RunsCode(str(mark))}})
    assert_words(refusal(build, **{key: file}), file, "cannot be read")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [([1, 2], ("holds a list", "expected a dict")), ({"model": {"a": "b"}}, ("'a'", "no tensor"))],
)
def test_other_contents(build, tmp_path, content, words):
    file = written(tmp_path / "weights.pth", content)
    assert_words(refusal(build, ckpt=file), file, *words)


def test_other_file_type(build, tmp_path):
    file = tmp_path / "weights.zip"
    file.write_bytes(b"x")
    assert_words(refusal(build, vit_weights=str(file)), str(file), ".pth", ".safetensors")


def test_empty_folder(build, tmp_path):
    assert_words(refusal(build, vit_weights=str(tmp_path)), str(tmp_path), ".safetensors")
    assert_words(refusal(build, llama_model=str(tmp_path)), str(tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("model.layers.1.mlp.up_proj.weight"), ("missing", "layers.1.mlp.up_proj.weight")),
        (lambda state: state.pop("lm_head.weight"), ("missing", "lm_head.weight")),
        (lambda state: state.update({"stranger.weight": torch.ones(2)}), ("unknown", "stranger.weight")),
        (lambda state: state.update({"lm_head.weight": torch.ones(601, 64)}), ("lm_head.weight", "601", "600")),
        (lambda state: state["model.norm.weight"].mul_(1e-3), ("raw delta", "apply_delta")),
        (lambda state: state["model.layers.0.mlp.up_proj.weight"][0].fill_(torch.nan), ("NaN", "up_proj")),
        (lambda state: state["model.norm.weight"].fill_(torch.nan), ("NaN", "norm")),
    ],
    ids=["missing", "no head", "unknown", "shape", "delta", "NaN in a layer", "NaN in the norm"],
)
def test_damaged_language_model(build, llama, change, words):
    edit(llama, change)
    assert_words(refusal(build, llama_model=str(llama)), str(llama), *words)


def test_truncated_language_model(build, llama):
    os.truncate(llama / "model.safetensors", 1000)
    assert_words(refusal(build, llama_model=str(llama)), str(llama), "model.safetensors", "cannot be read as weights")


def test_missing_shard(build, llama):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(build, llama_model=str(llama))
    assert_words(message, str(llama), "1 of 2", "model-00002-of-00002.safetensors", "index.json")


def test_tokenizer_larger_than_the_embeddings(build, llama):
    (llama / "added_tokens.json").write_text(json.dumps({"[PAD]": 600}))
    assert_words(refusal(build, llama_model=str(llama)), str(llama), "601 tokens", "600 embeddings")


def test_language_model_given_as_a_file(build):
    file = str(TINY / "llama" / "model.safetensors")
    assert_words(refusal(build, llama_model=file), file, "expected the folder")


def test_other_sizes_than_the_file(build):
    with pytest.raises(UserError, match="num_query_token") as error:
        build(num_query_token=4)
    assert_words(str(error.value), "[1, 8, 48]", "[1, 4, 48]")
    with pytest.raises(UserError, match="vit_config") as error:
        build(vit_config={"patch_size": 14, "embed_dim": 48, "depth": 5, "num_heads": 4})
    assert_words(str(error.value), "missing", "blocks.4.")


def test_nothing_is_half_loaded(model, tmp_path):
    """A refused checkpoint leaves the model as it was."""
    content = {"llama_proj.weight": torch.zeros(64, 48), "llama_proj.bias": torch.full((64,), torch.nan)}
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(UserError):
        model.load_checkpoint(tmp_path / "bad.pth")
    assert encodes_alike(model)
    assert close(MODEL_OUTPUT[0], VISION["encode_img"], 2e-5)
