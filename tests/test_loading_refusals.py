"""Weight files that are refused, and with which message."""
# ruff: noqa: F811  (fixtures are imported by name)

import json
import os

import pytest
import torch
from golden_data import TINY, close
from loading_files import PARTS, PROJECTION, VISION, edit, encodes_alike, golden_output, llama, written  # noqa: F401
from safetensors.torch import load_file

from minigpt4.common.errors import UserError
from minigpt4.models import MiniGPT4


def refusal(build, **changes):
    """The message with which a build is refused; it starts with the key that is at fault."""
    with pytest.raises(UserError) as error:
        build(**changes)
    message = str(error.value)
    assert message.startswith(f"model.{next(iter(changes))}"), message
    return message


def assert_words(message, *words):
    assert not [word for word in words if word not in message], message


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


INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}


def test_missing_shard(build, llama):
    (llama / "model.safetensors").rename(llama / "model-00001-of-00002.safetensors")
    (llama / "model.safetensors.index.json").write_text(json.dumps(INDEX))
    message = refusal(build, llama_model=str(llama))
    assert_words(message, str(llama), "1 of 2", "model-00002-of-00002.safetensors", "index.json")


@pytest.mark.parametrize("complete", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("stale", ["model.safetensors", "pytorch_model.bin"])
def test_a_stale_index_beside_a_complete_file(build, llama, complete, stale):
    state = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    written(llama / complete, state)
    (llama / f"{stale}.index.json").write_text(json.dumps(INDEX))
    assert encodes_alike(build(llama_model=str(llama)))


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


@pytest.mark.parametrize("change", [{"low_resource": True}, {"llm_precision": "nf4"}], ids=str)
def test_sharded_8_bit_weights(tiny_config, change):
    """Also without the check of a whole configuration."""
    with pytest.raises(UserError, match=r"run\.parallel: fsdp and model\.\w+: \w+ exclude each other"):
        MiniGPT4.from_config(tiny_config | change, device="cpu", is_sharded=True)


def test_nothing_is_half_loaded(model, tmp_path):
    """A refused checkpoint leaves the model as it was."""
    content = {"llama_proj.weight": torch.zeros(64, 48), "llama_proj.bias": torch.full((64,), torch.nan)}
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(UserError):
        model.load_checkpoint(tmp_path / "bad.pth")
    assert encodes_alike(model)
    assert close(golden_output(), VISION["encode_img"], 2e-5)
