"""The vision encoder stage by stage (patches, blocks, ln_vision, Q-Former, projection) and its gradients."""

import fnmatch
import re
from functools import partial

import pytest
import torch
from golden_data import DEVICE, close, on_cpu, read_json, read_tensors

from minigpt4.common import device as devices
from minigpt4.models.eva_vit import build_eva_vit, interpolate_pos_embed, round_vit_weights

VISION = read_tensors("vision")
IMAGES = VISION["image"].to(DEVICE)
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
        found["encode_img"], found["encode_img_atts"] = model.encode_img(IMAGES)
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
    assert torch.equal(stages["encode_img_atts"].cpu(), VISION["encode_img_atts"])


def test_images_of_a_batch_are_independent(model, stages):
    with torch.no_grad():
        assert close(model.encode_img(IMAGES[1:2])[0], stages["encode_img"][1:2], 2e-6)


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
        tokens = model.visual_encoder(IMAGES)
        assert close(tokens, golden["visual_encoder"], 1e-6)
        assert close(model.ln_vision(tokens), golden["ln_vision"], 1e-4)
        assert close(model.encode_img(IMAGES)[0], golden["encode_img"], 5e-7)
        samples = {"image": IMAGES, "text_input": read_json("forward.json")["stage1"]["text_input"]}
        assert model(samples)["loss"].item() == pytest.approx(golden["stage1_loss"].item(), abs=1e-4)


@on_cpu
def test_fp16_rounding(build, monkeypatch):
    monkeypatch.setattr(devices, "default_dtype", lambda _: torch.float32)  # a CPU without native bf16
    rounded = build(vit_precision="fp16")
    golden = read_tensors("vision_fp16_rounded")["encode_img"]
    with torch.no_grad():
        found = rounded.encode_img(IMAGES)[0]
    assert close(found, golden, 2e-5)
    assert not close(golden, VISION["encode_img"], 2e-4)  # else this test could not tell


def test_the_vision_transformer_returns_all_tokens(model):
    vit = model.visual_encoder
    with torch.no_grad():
        tokens = vit(IMAGES)
        assert torch.equal(vit.forward_features(IMAGES), tokens)
    assert tokens.shape[1:] == (5, 48) and vit.num_features == 48 and len(vit.blocks) == DEPTH


@pytest.mark.parametrize("shape", [(1, 3, 28, 21), (0, 3, 28, 28), (1, 1, 28, 28), (3, 28, 28), (28, 28)], ids=str)
def test_images_of_another_shape_are_rejected(model, shape):
    expected = rf"{re.escape(str(list(shape)))}.*\[B, 3, 28, 28\] with at least one image"
    for encode in (model.encode_images, model.encode_img):
        with pytest.raises(ValueError, match=expected):
            encode(torch.zeros(shape))


@pytest.mark.parametrize("keep_float32", [False, True])
def test_names_of_what_fp16_rounds(model, keep_float32):
    before = {name: value.cpu() for name, value in model.visual_encoder.state_dict().items()}
    vit = build_eva_vit(28, vit_config={"patch_size": 14, "embed_dim": 48, "depth": 3, "num_heads": 4})
    vit.load_state_dict(before)
    round_vit_weights(vit, torch.float16, keep_float32)
    if keep_float32:
        changed = {name for name, value in vit.state_dict().items() if not torch.equal(value, before[name])}
        assert {value.dtype for value in vit.state_dict().values()} == {torch.float32}
    else:
        changed = {name for name, value in vit.state_dict().items() if value.dtype == torch.float16}
    assert {f"visual_encoder.{name}" for name in changed} == set(read_json("vit_fp16_names.json")["names"])


def test_what_a_half_precision_file_holds_beside_linear_layers_becomes_float32():
    vit = build_eva_vit(28, vit_config={"patch_size": 14, "embed_dim": 48, "depth": 2, "num_heads": 4}).half()
    round_vit_weights(vit, torch.float16)
    block = vit.blocks[0]
    assert (
        block.mlp.fc1.weight.dtype == block.attn.proj.bias.dtype == vit.patch_embed.proj.weight.dtype == torch.float16
    )
    for parameter in (block.norm1.weight, block.attn.q_bias, block.attn.v_bias, vit.cls_token, vit.pos_embed):
        assert parameter.dtype == torch.float32


def test_ln_vision_computes_in_float32(model):
    tokens = VISION["visual_encoder"].to(DEVICE).half() * 1000  # squares of these overflow in half precision
    norm = model.ln_vision
    with torch.no_grad():
        expected = torch.nn.functional.layer_norm(tokens.float(), (48,), norm.weight, norm.bias, 1e-5)
        assert torch.equal(norm(tokens), expected.half()) and norm.weight.dtype == torch.float32


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
        embeds, _ = model.encode_img(torch.randn(1, 3, 42, 42, device=DEVICE))
    assert embeds.shape == (1, 8, 64) and embeds.isfinite().all()


def gradients(model, image):
    model.zero_grad()
    model.encode_images(image).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_the_pixels_and_no_frozen_parameter(build, training):
    model = build().train(training)
    image = IMAGES[:1].clone().requires_grad_()
    assert not gradients(model, image)
    step = torch.zeros_like(image)
    step.view(-1)[image.grad.abs().argmax()] = 1e-2
    with torch.no_grad():
        up, down = (model.encode_images(image + sign * step).square().sum() for sign in (1, -1))
    assert ((up - down) / 2).item() == pytest.approx((image.grad * step).sum().item(), rel=0.05)


def test_a_frozen_encoder_builds_no_graph(build):
    model = build()
    assert not model.encode_images(IMAGES).requires_grad
    with torch.no_grad():
        assert not model.encode_images(IMAGES.clone().requires_grad_()).requires_grad
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"llama_proj.weight", "llama_proj.bias"}


@pytest.mark.parametrize(("frozen", "trained"), [("qformer", "visual_encoder"), ("vit", "Qformer")])
def test_only_trained_parts_get_gradients(build, frozen, trained):
    model = build(**{"freeze_vit": frozen == "vit", "freeze_qformer": frozen == "qformer"})
    extra = {"visual_encoder": {"ln_vision"}, "Qformer": {"query_tokens"}}[trained]
    names = gradients(model.train(), IMAGES)
    assert {name.partition(".")[0] for name in names} == {trained} | extra


def test_parts_that_train_use_dropout_and_frozen_ones_never(build):
    def is_random(without=(), **changes):
        model = build(**changes).train()
        for module in model.modules():
            if isinstance(module, without):
                module.p = 0.0
        torch.manual_seed(0)
        with torch.no_grad():
            outputs = [model.encode_images(IMAGES) for _ in range(2)]
            assert close(model.eval().encode_images(IMAGES), VISION["qformer_last_hidden_state"], 2e-5)
        return not torch.equal(*outputs)

    assert is_random(freeze_qformer=False)
    assert is_random(without=torch.nn.Dropout, freeze_qformer=False)  # that of the attention weights remains
    assert is_random(freeze_vit=False, drop_path_rate=0.9)
    assert not is_random() and not is_random(drop_path_rate=0.9) and not is_random(freeze_vit=False)


def test_gradient_checkpointing_recomputes_and_changes_no_gradient(build):
    found, calls = [], []
    for is_on in (False, True):
        model = build(freeze_vit=False, use_grad_checkpoint=is_on)
        count = []
        model.visual_encoder.blocks[0].register_forward_pre_hook(lambda *_, count=count: count.append(1))
        found.append(gradients(model, IMAGES))
        calls.append(len(count))
    assert calls == [1, 2] and found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("freeze_vit", [False, True])
def test_a_vision_transformer_that_trains_keeps_float32_weights(build, monkeypatch, freeze_vit):
    monkeypatch.setattr(devices, "default_dtype", lambda _: torch.bfloat16)
    model = build(freeze_vit=freeze_vit, vit_precision="bf16", llm_dtype="fp32")
    dtype = torch.bfloat16 if freeze_vit else torch.float32
    assert model.visual_encoder.blocks[0].mlp.fc1.weight.dtype == dtype
    with torch.no_grad():
        assert close(model.encode_images(IMAGES).float(), VISION["qformer_last_hidden_state"], 0.1)


def test_hooks_fire_on_all_parts(model):
    parts = [model.visual_encoder, model.visual_encoder.blocks[-1], model.ln_vision, model.Qformer, model.Qformer.bert]
    seen = []
    hooks = [part.register_forward_hook(lambda part, *_: seen.append(part)) for part in parts]
    with torch.no_grad():
        model.encode_img(IMAGES)
    for hook in hooks:
        hook.remove()
    assert {id(part) for part in seen} == {id(part) for part in parts}


def test_the_attention_mask_hides_image_tokens(model):
    with torch.no_grad():
        queries = model.query_tokens.expand(len(IMAGES), -1, -1)
        tokens = VISION["ln_vision"].to(DEVICE)
        bert = partial(model.Qformer.bert, query_embeds=queries)
        mask = torch.ones(tokens.shape[:2], dtype=torch.long, device=DEVICE)
        plain = bert(encoder_hidden_states=tokens, return_dict=True)
        assert close(plain.last_hidden_state, VISION["qformer_last_hidden_state"], 2e-5) and plain[0] is plain[-1]
        assert close(bert(encoder_hidden_states=tokens, encoder_attention_mask=mask)[0], plain[0], 1e-6)
        mask[1:, 3:] = 0
        masked = bert(encoder_hidden_states=tokens, encoder_attention_mask=mask)[0]
        assert close(masked[:1], plain[0][:1], 1e-6)
        assert close(masked[1:], bert(encoder_hidden_states=tokens[:, :3])[0][1:], 1e-5)
        assert not close(masked[1:], plain[0][1:], 1e-3)
