"""LoRA: gradients, precisions, resume, checkpoints, merging, and mistakes in settings and files."""

import pytest
import torch
from golden_data import read_tensors
from recorded_training import run_of, watch

from minigpt4.common.errors import UserError
from minigpt4.common.weights import describe_weights
from minigpt4.doctor.language import check_language_model
from minigpt4.models.lora import lora_parameters, merge_lora

SAMPLES = {"image": read_tensors("vision")["image"], "text_input": ["a dog", "a cat on a mat", "x"]}
LORA = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0}
NAME = "llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"  # as peft writes it


def trained(build, **changes):
    """A tiny model whose LoRA weights are not zero."""
    model = build(**LORA | changes)
    generator = torch.Generator().manual_seed(0)
    for parameter in lora_parameters(model.llama_model).values():
        parameter.data.normal_(std=0.1, generator=generator)
    return model


def gradients(model):
    model(SAMPLES)["loss"].backward()
    parameters = {"proj": model.llama_proj.weight} | lora_parameters(model.llama_model)
    assert all(parameter.grad is not None for parameter in parameters.values())
    return torch.cat([parameter.grad.flatten() for parameter in parameters.values()])


def test_new_lora_weights_change_nothing(build, model):
    with_lora = build(**LORA)
    assert with_lora(SAMPLES)["loss"].item() == pytest.approx(model(SAMPLES)["loss"].item(), abs=1e-6)
    parameters = lora_parameters(with_lora.llama_model)
    assert NAME in parameters and parameters[NAME].shape == (4, with_lora.llama_model.config.hidden_size)
    assert len(parameters) == 2 * 2 * with_lora.llama_model.config.num_hidden_layers  # A and B of q_proj and v_proj
    assert not with_lora.llama_model.training


@pytest.mark.parametrize(
    "changes", [{}, {"prompt_template": "###Human: {} ###Assistant: "}], ids=["plain", "with a prefix that rows share"]
)
def test_gradients_are_those_of_padded_rows(build, changes):
    """Also those that reach LoRA weights through keys and values of what precedes the image."""
    packed, padded = trained(build, **changes), trained(build, **changes)
    if changes:
        packed.prompt_list = padded.prompt_list = ["###Human: look <Img><ImageHere></Img> what ###Assistant: "]
    padded.packs_rows = False
    torch.testing.assert_close(gradients(packed), gradients(padded), rtol=1e-4, atol=1e-6)


def test_computing_layers_again_changes_nothing(build):
    """LoRA's dropout included, whose random numbers are restored."""
    results = []
    for again in (False, True):
        model = trained(build, lora_dropout=0.5, llm_grad_checkpoint=again)
        torch.manual_seed(1)
        results.append(gradients(model))
    torch.testing.assert_close(*results)


def test_dropout_is_active_in_training_alone(build):
    model = trained(build, lora_dropout=0.5)
    assert model(SAMPLES)["loss"] != model(SAMPLES)["loss"]
    model.eval()
    assert model(SAMPLES)["loss"] == model(SAMPLES)["loss"]
    assert model.train()(SAMPLES)["loss"] != model(SAMPLES)["loss"]


def test_dropout_is_no_reason_to_pad_rows(build, caplog):
    """As where a training starts from a checkpoint with LoRA."""
    model = trained(build, lora_dropout=0.5)
    check_language_model(model)
    assert model.packs_rows and not caplog.records
    assert model(SAMPLES)["loss"] != model(SAMPLES)["loss"]


def test_8_bit_layers_get_the_same_gradients_within_their_precision(build):
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    expected, actual = (gradients(trained(build, lora_target_modules=every, llm_precision=p)) for p in ("half", "int8"))
    assert (actual - expected).norm() / expected.norm() < 0.1


def test_nf4_layers_get_the_gradients_of_their_dequantised_weights(build):
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    nf4, plain = (trained(build, lora_target_modules=every, llm_precision=p) for p in ("nf4", "half"))
    for name in nf4.lora.layers:
        layer, dense = (model.llama_model.get_submodule(name).base_layer for model in (nf4, plain))
        dense.weight.data = layer(torch.eye(layer.in_features)).T.contiguous()  # a mapped file is not written to
    torch.testing.assert_close(gradients(nf4), gradients(plain), rtol=1e-4, atol=1e-6)


def test_half_precision_keeps_lora_weights_in_float32(build):
    model = trained(build, llm_dtype="bf16")
    assert {parameter.dtype for parameter in lora_parameters(model.llama_model).values()} == {torch.float32}
    expected = gradients(trained(build))
    assert (gradients(model) - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("precision", ["half", "int8", "nf4"])
def test_resumed_run_equals_the_uninterrupted_one(make_runner, precision):
    settings = run_of("stage1", iters_per_epoch=3, accum_grad_iters=2)
    section = {"lora_r": 4, "lora_dropout": 0.2, "llm_precision": precision}
    whole = make_runner(settings, section, job_id="whole")
    expected, *_ = watch(whole)
    whole.train()
    before = whole.model.llama_model.state_dict()
    file = whole.output_dir / "checkpoint_0.pth"
    resumed = make_runner({**settings, "resume_ckpt_path": str(file)}, section, job_id="resumed")
    losses, *_ = watch(resumed)
    resumed.train()
    assert losses == expected[3:]
    after = resumed.model.llama_model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    new = torch.load(whole.output_dir / "checkpoint_1.pth", weights_only=True)["model"]
    assert set(new) == {"llama_proj.weight", "llama_proj.bias", *lora_parameters(whole.model.llama_model)}
    assert any(new[name].any() for name in new if "lora_B" in name)
    assert describe_weights(new).endswith("wide LM with LoRA (model.ckpt)")


def test_only_lora_and_projection_learn(make_runner):
    runner = make_runner(run_of("stage1"), {"lora_r": 4})
    before = {name: value.clone() for name, value in runner.model.state_dict().items()}
    runner.train()
    changed = {n for n, value in runner.model.state_dict().items() if not torch.equal(value, before[n])}
    assert {name for name in changed if "lora_" not in name} == {"llama_proj.weight", "llama_proj.bias"}
    assert len(changed) == 2 + len(lora_parameters(runner.model.llama_model))


def test_merged_weights_answer_as_the_layers_did(build):
    model = trained(build).eval()
    expected = model(SAMPLES)["loss"].item()
    merge_lora(model.llama_model, model.lora)
    assert not lora_parameters(model.llama_model)
    assert model(SAMPLES)["loss"].item() == pytest.approx(expected, abs=1e-5)
    for precision in ("int8", "nf4"):
        quantized = trained(build, llm_precision=precision).eval()
        expected = quantized(SAMPLES)["loss"].item()
        merge_lora(quantized.llama_model, quantized.lora)  # so few bits would not hold the sum
        assert lora_parameters(quantized.llama_model) and quantized(SAMPLES)["loss"].item() == expected


# checkpoints


@pytest.fixture
def write(build, tmp_path):
    """Writes a checkpoint of a tiny model with LoRA after a change of its tensors."""

    def to_file(change=lambda state: None, alpha=8, **changes):
        state = trained(build, **changes).trainable_state_dict()
        change(state)
        content = {"model": state, "config": {"model": {"lora_alpha": alpha}}}
        torch.save(content, tmp_path / "checkpoint_0.pth")
        return str(tmp_path / "checkpoint_0.pth")

    return to_file


def rename(old, new):
    def change(state):
        for name in list(state):
            state[name.replace(old, new)] = state.pop(name)

    return change


def drop(pattern):
    def change(state):
        for name in [name for name in state if pattern in name]:
            del state[name]

    return change


@pytest.mark.parametrize("suffix", ["weight", "default.weight"])
def test_names_of_peft_s_files_and_modules_are_read(build, write, suffix):
    """The later reference saved the names that parameters have in peft's modules."""

    def change(state):
        for part in ("lora_A", "lora_B"):
            rename(f"{part}.weight", f"{part}.{suffix}")(state)

    expected = trained(build)(SAMPLES)["loss"].item()
    assert build(**LORA, ckpt=write(change))(SAMPLES)["loss"].item() == pytest.approx(expected, abs=1e-6)


MISMATCHES = {
    "no LoRA here": ({}, {"lora_r": 0}, ["holds LoRA weights", "lora_r: 4", "lora_alpha: 8", "[q_proj, v_proj]"]),
    "rank": ({}, {"lora_r": 8}, ["rank 4", "lora_r is 8"]),
    "alpha": ({"alpha": 32}, {}, ["lora_alpha 32, not 8"]),
    "more modules": ({}, {"lora_target_modules": ["q_proj", "k_proj", "v_proj"]}, ["tensors are missing", "k_proj"]),
    "fewer modules": ({}, {"lora_target_modules": ["v_proj"]}, ["layers without LoRA here", "q_proj"]),
    "partial": ({"change": drop("layers.0.self_attn.v")}, {}, ["2 of", "are missing", "v_proj.lora_A"]),
    "one half": ({"change": drop("lora_B")}, {}, ["are missing", "lora_B"]),
    "more layers": ({"change": rename("layers.0.", "layers.70.")}, {}, ["layers without LoRA", "layers.70"]),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_checkpoint_that_does_not_match_is_refused(build, write, name):
    written, changes, words = MISMATCHES[name]
    with pytest.raises(UserError) as error:
        build(**LORA | changes, ckpt=write(**written))
    text = str(error.value)
    assert text.startswith("model.ckpt: ") and "checkpoint_0.pth" in text
    assert not [word for word in words if word not in text], text


def test_lora_of_another_width_is_refused(build, write):
    def widen(state):
        for name in [name for name in state if "lora_A" in name]:
            state[name] = torch.zeros(4, 4096)

    with pytest.raises(UserError, match="another language model"):
        build(**LORA, ckpt=write(widen))


def test_a_checkpoint_without_lora_starts_a_run_but_is_no_resume_and_no_chat(build, make_runner, caplog):
    caplog.set_level("INFO")
    model = build(**LORA)  # its checkpoint is the golden one
    assert "It holds no LoRA weights; those of this run are new." in caplog.text
    with pytest.raises(UserError, match=r"lora_r is 4, but model\.ckpt holds no LoRA weights"):
        merge_lora(model.llama_model, model.lora)
    first = make_runner(run_of("stage1"), job_id="first")
    first.train()
    file = first.output_dir / "checkpoint_0.pth"
    runner = make_runner(run_of("stage1", resume_ckpt_path=str(file)), {"lora_r": 4}, job_id="second")
    with pytest.raises(UserError, match=r"holds no LoRA weights, but model\.lora_r is 4"):
        runner.train()


# settings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_target_modules": ["q_proj", "v_porj"]}, ["'v_porj' matches no", "Did you mean 'v_proj'?", "down_proj"]),
        ({"lora_target_modules": ["lm_head"]}, ["'lm_head' matches no"]),
        ({"lora_r": 4096}, ["model.lora_r is 4096", "self_attn", "wide"]),
    ],
    ids=["misspelt", "the output layer", "rank"],
)
def test_settings_that_match_no_layer_are_refused_before_anything_is_loaded(build, changes, words, monkeypatch):
    monkeypatch.setattr("minigpt4.models.loading.state_readers", None)
    with pytest.raises(UserError) as error:
        build(**{"lora_r": 4} | changes)
    assert not [word for word in words if word not in str(error.value)], error.value
