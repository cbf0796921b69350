"""The comparison of a training step is fair: BLIP-2 computes the same loss from the same weights and tokens."""

import pytest
import torch

from benchmarks.models import PRESETS, Preset, blip2_inputs, build_blip2, build_minigpt4, captions
from benchmarks.train_step import formula_flops, make_step, mean_counts, peak_memory

CPU, TINY = torch.device("cpu"), PRESETS["tiny"]
PARTS = {  # of BLIP-2's names, in order
    "visual_encoder.": "vision_model.",
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "model.blocks.": "model.encoder.layers.",
    ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.",
    ".attn.": ".self_attn.",
    ".proj.": ".projection.",
    "ln_vision.": "vision_model.post_layernorm.",
    "Qformer.bert.": "qformer.",
    "embeddings.LayerNorm.": "layernorm.",
    ".attention.self.": ".attention.attention.",
    ".crossattention.self.": ".crossattention.attention.",
    "llama_proj.": "language_projection.",
    "llama_model.": "language_model.",
}


def blip2_state(model):
    """MiniGPT-4's weights under BLIP-2's names."""
    state = dict(model.state_dict())
    for name in [name for name in state if name.endswith("q_bias")]:
        q_bias, v_bias = state.pop(name), state.pop(name.replace("q_bias", "v_bias"))
        state[name.replace("q_bias", "qkv.bias")] = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
    renamed = {}
    for name, value in state.items():
        for ours, theirs in PARTS.items():
            name = name.replace(ours, theirs, 1)
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_blip2_gives_the_same_loss_and_gradient(stage, attention):
    torch.manual_seed(0)
    model = build_minigpt4(TINY, CPU, torch.float32, stage)
    other = build_blip2(TINY, CPU, torch.float32, attention)
    missing, unexpected = other.load_state_dict(blip2_state(model), strict=False)
    assert not unexpected and all("rotary" in name or "position_ids" in name for name in missing)
    samples = {"image": torch.randn(3, 3, TINY.image, TINY.image), "text_input": captions(12, 3, seed=0)}
    loss = model(samples)["loss"]
    inputs = blip2_inputs(model, samples, other.config.image_token_id)
    other_loss = other(**inputs, use_cache=False).loss
    assert not inputs["attention_mask"].all() and loss.item() == pytest.approx(other_loss.item(), abs=1e-4)
    loss.backward()
    other_loss.backward()
    assert [name for name, p in other.named_parameters() if p.grad is not None] == [
        "language_projection.weight",
        "language_projection.bias",
    ]
    torch.testing.assert_close(
        other.language_projection.weight.grad, model.llama_proj.weight.grad, rtol=0.01, atol=1e-5
    )


def test_a_step_needs_at_most_half_the_memory_of_a_plain_port():
    torch.manual_seed(0)
    preset = Preset(TINY.vit, TINY.q_former, PRESETS["small"].lm, image=TINY.image)
    batch = {"image": torch.randn(8, 3, preset.image, preset.image), "text_input": captions(20, 8, seed=0)}
    ours = build_minigpt4(preset, CPU, torch.float32)
    peaks = []
    for model in (ours, build_blip2(preset, CPU, torch.float32, "eager")):
        peaks.append(peak_memory(make_step(model, [batch], torch.float32, ours), CPU, 1))
    assert 10 < peaks[0] < 0.5 * peaks[1]


def test_both_have_weights_of_the_same_precision_and_size():
    for dtype in (torch.float32, torch.bfloat16):
        model, other = build_minigpt4(TINY, CPU, dtype), build_blip2(TINY, CPU, dtype, "sdpa")
        for ours, theirs in (
            (model.llama_model, other.language_model),
            (model.llama_proj, other.language_projection),
            (model.Qformer, other.qformer),
        ):
            assert sum(p.nbytes for p in ours.parameters()) == sum(p.nbytes for p in theirs.parameters())
        assert model.visual_encoder.blocks[0].mlp.fc1.weight.dtype == dtype


def test_counts_of_a_batch_follow_from_its_texts():
    model = build_minigpt4(TINY, CPU, torch.float32, has_vision=False)
    tokens, padded, targets = mean_counts(model, [{"text_input": ["red", "red circle left"]}])
    lengths = [len(model.tokenize(text)) for text in ("red\n", "red circle left\n")]
    assert (tokens, targets) == (2 * 33 + sum(lengths), sum(lengths)) and padded == 2 * (33 + max(lengths))
    assert formula_flops(TINY, tokens, 2, targets, True) > formula_flops(TINY, tokens, 2, targets, False) > 0
