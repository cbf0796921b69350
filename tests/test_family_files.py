"""The later family: names and shapes at full size, what its files are taken for, and its memory."""

import json
import shutil

import pytest
import torch
from accelerate import init_empty_weights
from family import FAMILY, MEMBERS, images, load, recorded, section, shared
from golden_data import read_json
from transformers import AutoModelForCausalLM, LlamaConfig

from minigpt4.common import weights
from minigpt4.common.errors import UserError
from minigpt4.common.schema import ModelConfig, RunConfig
from minigpt4.doctor import memory, resources
from minigpt4.doctor.files import ModelFiles
from minigpt4.doctor.findings import OK
from minigpt4.models import MiniGPT4
from minigpt4.models.lora import add_lora, checkpoint_name, lora_settings
from minigpt4.models.vision import build_vision, vision_settings

FULL = read_json("full_scale_keys.json", FAMILY)
SETTINGS = {
    "vicuna0": {"arch": "minigpt4"},
    "llama2": {"arch": "minigpt4", "has_qformer": False},
    "v2": {"arch": "minigpt_v2", "image_size": 448, "lora_r": 64},
}
CHAT = {name: f"eval_configs/{yaml}" for name, (_, yaml) in zip(MEMBERS, weights._MEMBERS.values(), strict=True)}
LLAMA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
BUFFERS = ("inv_freq", "position_ids")


@pytest.fixture(scope="module")
def llama_7b():
    """Builds a language model of the full size without weights."""

    def build():
        with init_empty_weights():
            return AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA, vocab_size=32000), dtype=torch.float32)

    return build


@pytest.mark.parametrize("member", MEMBERS)
def test_names_and_shapes_at_full_size(member, llama_7b):
    golden, cfg, llm = FULL[member], ModelConfig(**SETTINGS[member]), llama_7b()
    settings = vision_settings(cfg, torch.device("cpu"))
    with init_empty_weights():
        model = MiniGPT4(*build_vision(cfg), llm, None, lora=lora_settings(cfg, llm), **settings)
    if model.lora:
        add_lora(llm, model.lora)
    trained = {name: list(value.shape) for name, value in model.trainable_state_dict().items()}
    expected = {n: shape for n, (shape, _) in golden["checkpoint_model"].items() if not n.endswith(BUFFERS)}
    assert trained == expected
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == golden["trainable_parameters"]
    assert len(parameters) == golden["trainable_tensors"] == {"v2": 130}.get(member, 2)
    own = {checkpoint_name(name): list(value.shape) for name, value in model.state_dict().items()}
    own |= {name.replace(".base_layer.", "."): shape for name, shape in own.items()}
    for name, (shape, _) in golden["frozen_examples"].items():
        name = name if ".lora_" in name else name.replace(".base_model.model.", ".").replace("lm_head.0.", "lm_head.")
        assert name.endswith(BUFFERS) or own[name] == shape, name
    sizes = {}
    for name, value in model.named_parameters():
        count, total = sizes.get(name.split(".")[0], (0, 0))
        sizes[name.split(".")[0]] = count + 1, total + value.numel()
    assert sizes.keys() == golden["state_dict_tensors_and_elements"].keys()
    for part, (count, total) in golden["state_dict_tensors_and_elements"].items():
        buffers = {"llama_model": (32, 32 * 64), "Qformer": (1, 512)}.get(part, (0, 0))
        assert sizes[part] == (count - buffers[0], total - buffers[1]), part
    key = "visual_encoder_448" if member == "v2" else "visual_encoder_224"
    assert own["visual_encoder.pos_embed"] == FULL[key]["pos_embed"]
    number = {"vicuna0": 32, "llama2": 64, "v2": 256}[member]
    assert (
        model.num_query_token
        == number
        == FULL[key].get("image_tokens_llama2" if member == "llama2" else "image_tokens", number)
    )


@pytest.mark.parametrize("member", MEMBERS)
def test_checkpoints_are_recognised_by_content(member):
    state = {n: torch.empty(shape, device="meta") for n, (shape, _) in FULL[member]["checkpoint_model"].items()}
    text = weights.describe_weights({"model": state})
    assert "for a 7B LM" in text and ("MiniGPT-v2" in text) == (member == "v2")
    assert ("Llama-2 variant" in text) == (member == "llama2") and (CHAT[member] in text) == (member != "vicuna0")
    derived = weights.describe_weights({**state, "video_Qformer.bert.embeddings.LayerNorm.weight": torch.empty(768)})
    assert "derived from MiniGPT-4" in derived


def written(folder, content):
    path = folder / "checkpoint.pth"
    torch.save({"model": content}, path)
    return str(path)


@pytest.mark.parametrize(
    ("member", "given", "words"),
    [
        ("vicuna0", "llama2", "56 wide LM, model.llama_model is 64 wide"),
        ("llama2", "vicuna0", "64 wide LM, model.llama_model is 56 wide"),
        ("llama2", "v2", "belongs to MiniGPT-v2, whose settings are in eval_configs/minigptv2_eval.yaml"),
        ("v2", "vicuna0", "64 wide LM, model.llama_model is 56 wide"),
    ],
)
def test_a_checkpoint_of_another_member(member, given, words):
    path = str(FAMILY / given / "minigpt_ckpt.pth")
    with pytest.raises(UserError, match=words) as error:
        MiniGPT4.from_config(section(member, ckpt=path), device="meta")
    assert path in str(error.value)


@pytest.mark.parametrize(("member", "width"), [("vicuna0", 5632), ("llama2", 768), ("v2", 768)])
def test_the_yaml_of_a_published_checkpoint_is_named(member, width, tmp_path):
    rows = shared(member).llama_proj.out_features
    path = written(tmp_path, {"llama_proj.weight": torch.zeros(rows, width), "llama_proj.bias": torch.zeros(rows)})
    words = "minigpt4_llama2_eval.yaml" if width == 5632 else "It is a checkpoint of MiniGPT-4 .* take the YAML"
    with pytest.raises(UserError, match=words):
        MiniGPT4.from_config(section(member, ckpt=path), device="meta")


@pytest.mark.parametrize(("is_int8", "card"), [(False, 24e9), (True, 12e9)])
def test_a_chat_of_7b_fits_on_one_card(tmp_path, is_int8, card):
    """As the doctor predicts it, which keeps a tenth of a card for the card itself; it grows alike with each layer."""
    totals = []
    for num_layers in (1, 2):
        folder = tmp_path / str(num_layers)
        shutil.copytree(FAMILY / "llama_chat", folder, ignore=shutil.ignore_patterns("*.bin"))
        config = json.loads((folder / "config.json").read_text()) | LLAMA
        (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 32000, "num_hidden_layers": num_layers}))
        cfg = SETTINGS["v2"] | {"llama_model": str(folder), "low_resource": is_int8}
        files = ModelFiles(cfg, torch.device("meta"))
        files.config_folder = folder
        parts = memory.chat(files.build(has_lora=is_int8), files.device, 448, 2000)
        totals.append(sum(parts.values()))
    needed = totals[0] + 31 * (totals[1] - totals[0])
    assert (10e9 if is_int8 else 16e9) < needed < 0.9 * card


@pytest.mark.parametrize("member", MEMBERS)
def test_memory_of_a_training_is_predicted(member):
    """For the longest texts, and for each recorded batch, as measured steps compare it."""
    files, run_cfg = ModelFiles(section(member), torch.device("cpu")), RunConfig()
    files.check()
    finding = resources.training_memory(run_cfg, files, [], 2, resources.memory_capacity(files.device, 1e9))
    assert finding.verdict == OK and finding.numbers["activations"] > 0
    for case in recorded(member, "training")["runs"][0]["batches"]:
        pixels = {"image": images(member, case["image"]["idx"])} if "image" in case else {}
        texts = resources.texts_of({**case, **pixels, "epoch": 0})
        assert sum(texts["num_images"]) == len(pixels.get("image", ()))
        assert resources.predict(run_cfg, files, files.build(), texts)["activations"] > 0


@pytest.mark.parametrize("member", MEMBERS)
def test_features_of_a_cache_take_the_place_of_images(member):
    case = recorded(member, "forward")["instruction"]
    model = MiniGPT4.from_config(section(member), device=torch.device("cpu"), has_vision=False)
    pixels = images(member, case["samples"]["image"]["images"])
    with torch.no_grad():
        features = shared(member).encode_images(pixels)
        loss = model({**case["samples"], "features": features})["loss"]
    assert not hasattr(model, "visual_encoder") and loss.item() == pytest.approx(case["loss"][0], abs=1e-5)


@pytest.mark.parametrize("member", MEMBERS)
def test_eight_bit_weights(member):
    case = recorded(member, "forward")["instruction"]
    model = load(member, low_resource=True).eval()
    pixels = images(member, case["samples"]["image"]["images"])
    output = model(case["samples"] | {"image": pixels})
    output["loss"].backward()
    assert output["loss"].item() == pytest.approx(case["loss"][0], abs=0.2)
    assert all(p.grad.norm() > 0 for p in model.parameters() if p.requires_grad)
    assert len(model.generate(pixels, case["samples"]["instruction_input"], max_new_tokens=3)) == 3
