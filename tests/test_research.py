"""The script of docs/RESEARCH.md, on the quickstart's model with an untrained projection."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("precision", ["half", "int8", "nf4"])
def test_the_examples_compute_what_the_page_says(precision, scene_folder, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    script = "\n".join(
        re.findall(r"```python\n(.*?)```", Path("docs/RESEARCH.md").read_text(encoding="utf-8"), re.DOTALL)
    )
    options = f'"model.ckpt=null", "run.device=cpu", "model.llm_precision={precision}"'
    for ours, here in (
        ('"model.ckpt=output/quickstart/stage2/checkpoint.pth"', options),
        ("output/quickstart/held_out/image/0.jpg", str(scene_folder / "0.png")),
    ):
        assert ours in script
        script = script.replace(ours, here)
    found = {}
    exec(script, found)
    llm, num_images = found["llm"], 12
    layers, heads = llm.config.num_hidden_layers, llm.config.num_attention_heads
    assert found["saliency"].shape == (64, 64) and found["saliency"].count_nonzero() > 4000
    assert found["to_image"].shape == (layers, heads, num_images) and 0 < found["to_image"].sum(-1).max() <= 1.01
    assert found["hidden"].shape == (layers + 1, len(found["ids"]), llm.config.hidden_size)
    assert [weights.shape for weights in found["of_tokens"]] == [found["to_image"].shape] * len(found["of_tokens"])
    torch.testing.assert_close(found["of_tokens"][0], found["to_image"], atol=0.02, rtol=0)
    assert 0 < found["change"] < 20
    contrast = found["Contrast"](found["processors"][0].context, weight=50)
    plain, start = llm(inputs_embeds=found["context"]).logits[:, -1].float(), torch.zeros(1, 0, dtype=torch.long)
    assert found["contrasted"][0, 0] == found["processors"][0](start, plain).argmax()
    assert found["answer"].sequences[0, 0] == plain.argmax() != contrast(start, plain).argmax()
    assert capsys.readouterr().out.strip()
