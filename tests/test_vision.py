"""The vision side, stage by stage: patches, blocks, ln_vision, Q-Former, projection."""

import fnmatch
from functools import partial

import pytest
import torch
from golden_data import close, read_json, read_tensors

from minigpt4.models.eva_vit import build_eva_vit, interpolate_pos_embed, round_vit_weights

VISION = read_tensors("vision")
DEPTH, LAYERS = 3, 4


@pytest.fixture(scope="module")
def stages(model):
    """Every stage's output in one pass over the golden images."""
    found, hooks = {}, []
    watched = {
        "patch_embed": model.visual_encoder.patch_embed,
        **{f"vit_block_{i}": block for i, block in enumerate(model.visual_encoder.blocks)},
        "visual_encoder": model.visual_encoder,
        "ln_vision": model.ln_vision,
        "qformer_embeddings": model.Qformer.bert.embeddings,
        **{f"qformer_layer_{i}": layer for i, layer in enumerate(model.Qformer.bert.encoder.layer)},
        "qformer_last_hidden_state": model.Qformer,
    }
    for name, module in watched.items():
        hooks.append(module.register_forward_hook(lambda _, __, output, name=name: found.update({name: output})))
    with torch.no_grad():
        found["encode_img"], found["encode_img_atts"] = model.encode_img(VISION["image"])
        found["visual_encoder"] = model.visual_encoder.forward_features(VISION["image"])
    for hook in hooks:
        hook.remove()
    found["qformer_embeddings"] = found["qformer_embeddings"].expand_as(VISION["qformer_embeddings"])
    return found


def test_sizes(stages):
    expected = {f"vit_block_{i}" for i in range(DEPTH)} | {f"qformer_layer_{i}" for i in range(LAYERS)}
    assert set(stages) == set(VISION) - {"image"} and expected < set(stages)


@pytest.mark.parametrize("name", [name for name in VISION if name not in ("image", "encode_img_atts")])
def test_stage(stages, name):
    assert close(stages[name], VISION[name], 2e-5)


def test_attention_mask_is_int64_ones(stages):
    assert stages["encode_img_atts"].dtype == torch.int64
    assert torch.equal(stages["encode_img_atts"], VISION["encode_img_atts"])


def test_images_do_not_see_each_other(model, stages):
    with torch.no_grad():
        assert close(model.encode_img(VISION["image"][1:2])[0], stages["encode_img"][1:2], 2e-6)


def test_eps_probe(build):
    """Weights scaled down until each layer norm's epsilon shows."""
    model = build()
    scales = {
        "visual_encoder.patch_embed.*": 1e-3,
        "visual_encoder.pos_embed": 1e-3,
        "visual_encoder.cls_token": 1e-3,
        "visual_encoder.*.attn.proj.*": 1e-3,
        "visual_encoder.*.mlp.fc2.*": 1e-3,
        "query_tokens": 1e-6,
        "llama_proj.*": 1e-3,
        "llama_model.model.embed_tokens.weight": 1e-3,
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for pattern, scale in scales.items():
                if fnmatch.fnmatch(name, pattern):
                    parameter.mul_(scale)
        golden = read_tensors("eps_probe")
        tokens = model.visual_encoder.forward_features(VISION["image"])
        assert close(tokens, golden["visual_encoder"], 1e-6)
        assert close(model.ln_vision(tokens), golden["ln_vision"], 1e-4)
        assert close(model.encode_img(VISION["image"])[0], golden["encode_img"], 5e-7)
        samples = {"image": VISION["image"], "text_input": read_json("forward.json")["stage1"]["text_input"]}
        assert model(samples)["loss"].item() == pytest.approx(golden["stage1_loss"].item(), abs=1e-4)


def test_fp16_rounding(build):
    rounded = build(vit_precision="fp16")
    golden = read_tensors("vision_fp16_rounded")["encode_img"]
    with torch.no_grad():
        found = rounded.encode_img(VISION["image"])[0]
    assert close(found, golden, 2e-5)
    assert not close(golden, VISION["encode_img"], 2e-4)  # else this test could not tell


@pytest.mark.parametrize("training", [False, True])
def test_the_tower_is_the_eva_class_of_timm_to_the_bit(training):
    timm_eva = pytest.importorskip("timm.models.eva")
    torch.manual_seed(0)
    sizes = {"patch_size": 7, "embed_dim": 48, "depth": 3, "num_heads": 4, "mlp_ratio": 4.3637}
    theirs = timm_eva.Eva(
        img_size=28,
        num_classes=0,
        global_pool="",
        use_post_transformer_norm=False,
        use_fc_norm=False,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        drop_path_rate=0.5,
        **sizes,
    ).train(training)
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, std=0.05) if name.endswith("bias") else None
    ours = build_eva_vit(28, 0.5, training, sizes).train(training)
    ours.load_state_dict(theirs.state_dict())
    images, results = torch.randn(8, 3, 28, 28), []
    for vit in (theirs, ours):
        torch.manual_seed(1)
        tokens = vit.forward_features(images)
        tokens.square().sum().backward()
        results.append([tokens, *(p.grad for _, p in sorted(vit.named_parameters()))])
    assert all(torch.equal(mine, yours) for mine, yours in zip(*results, strict=True))
    with pytest.raises(ValueError, match="28 squared"):
        ours.forward_features(images[..., :21])


@pytest.mark.parametrize("keep_float32", [False, True])
def test_names_of_what_fp16_rounds(model, keep_float32):
    before = model.visual_encoder.state_dict()
    vit = build_eva_vit(28, vit_config={"patch_size": 14, "embed_dim": 48, "depth": 3, "num_heads": 4})
    vit.load_state_dict(before)
    round_vit_weights(vit, torch.float16, keep_float32)
    if keep_float32:
        changed = {name for name, value in vit.state_dict().items() if not torch.equal(value, before[name])}
        assert {value.dtype for value in vit.state_dict().values()} == {torch.float32}
    else:
        changed = {name for name, value in vit.state_dict().items() if value.dtype == torch.float16}
    assert {f"visual_encoder.{name}" for name in changed} == set(read_json("vit_fp16_names.json")["names"])


@pytest.mark.parametrize("case", ["from4_to2", "from4_to6"])
def test_pos_embed_interpolation(case):
    golden = read_tensors("pos_embed_interpolation")
    given, expected = golden[f"{case}.in"], golden[f"{case}.out"]
    assert close(interpolate_pos_embed(given, expected.shape[1]), expected, 1e-6)
    assert interpolate_pos_embed(given, given.shape[1]) is given


def test_larger_images_get_resized_positions(build):
    model = build(image_size=42)  # the file's positions are for 28
    assert model.visual_encoder.pos_embed.shape == (1, 10, 48)
    with torch.no_grad():
        embeds, _ = model.encode_img(torch.randn(1, 3, 42, 42))
    assert embeds.shape == (1, 8, 64) and embeds.isfinite().all()
