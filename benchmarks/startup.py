"""Time until something happens, ours beside a plain port, each in fresh processes that take turns.

python -m benchmarks.startup --gib 2

The plain port imports what it uses at the top, builds its parts with random weights on the host, gives the language
model to transformers' ``from_pretrained`` and copies the vision side's weights in by ``load_state_dict``.
"""

import argparse
import importlib
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STAGE_1 = "train_configs/quickstart_stage1.yaml"
DTYPE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def our_imports() -> None:
    """All rooms that train.py walks through, and the language model's class."""
    for room in ("common.config", "tasks", "datasets.builders", "processors", "models", "runners"):
        importlib.import_module(f"minigpt4.{room}")
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401


def plain_imports() -> None:
    """What a port imports that takes its parts from libraries."""
    import minigpt4  # noqa: F401  (makes torchvision importable beside any torch)

    for module in ("omegaconf", "timm.models.eva", "torchvision.transforms", "webdataset"):
        importlib.import_module(module)
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401


def our_load(folder: str, precision: str) -> float:
    """Seconds of loading a language model and of one token through it, imports apart."""
    our_imports()
    import torch

    from minigpt4.models.llama import load_llama

    return _seconds_to_first_token(lambda: load_llama(Path(folder), getattr(torch, DTYPE[precision])))


def plain_load(folder: str, precision: str) -> float:
    """The same by transformers alone."""
    plain_imports()
    import torch
    from transformers import AutoModelForCausalLM

    return _seconds_to_first_token(
        lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPE[precision]))
    )


def _seconds_to_first_token(load: Any) -> float:
    import torch

    begin = time.perf_counter()
    model = load().eval()
    with torch.inference_mode():
        model(inputs_embeds=model.get_input_embeddings()(torch.tensor([[1]])), use_cache=False)
    return time.perf_counter() - begin


def our_step(folder: str) -> None:
    """train.py itself; the process ends behind the optimizer's first step."""
    sys.argv = ["train.py", "--cfg-path", STAGE_1, "--options", f"run.output_dir={folder}"]
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: _end())
    runpy.run_path("train.py", run_name="__main__")


def plain_step(_: str) -> None:
    """The same model and data, put together from libraries."""
    plain_imports()
    import json
    from functools import partial

    import omegaconf
    import timm.models.eva
    import torch
    import torchvision.transforms as transforms
    import webdataset
    from safetensors.torch import load_file
    from torch import nn
    from transformers import AutoModelForCausalLM

    from minigpt4.models.llama_tokenizer import LlamaTokenizer
    from minigpt4.models.Qformer import QFormer, QFormerConfig
    from minigpt4.processors.blip_processors import MEAN, STD

    cfg = omegaconf.OmegaConf.load(STAGE_1)
    section, run = cfg.model, cfg.run
    torch.manual_seed(run.seed)
    tokenizer = LlamaTokenizer(section.llama_model)
    tokenizer.pad_token = tokenizer.eos_token
    llama = AutoModelForCausalLM.from_pretrained(section.llama_model, dtype=torch.float32)
    vit = timm.models.eva.Eva(
        img_size=section.image_size,
        num_classes=0,
        global_pool="",
        use_post_transformer_norm=False,
        use_fc_norm=False,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        **section.vit_config,
    )
    parts = nn.ModuleDict({
        "ln_vision": nn.LayerNorm(vit.embed_dim),
        "Qformer": QFormer(QFormerConfig(**section.qformer_config, encoder_width=vit.embed_dim)),
    })  # fmt: skip
    parts.register_parameter(
        "query_tokens", nn.Parameter(torch.zeros(1, section.num_query_token, parts["Qformer"].config.hidden_size))
    )
    vit.load_state_dict(load_file(section.vit_weights))
    parts.load_state_dict(load_file(section.q_former_model))
    projection = nn.Linear(parts["Qformer"].config.hidden_size, llama.config.hidden_size)
    for part in (llama, vit, parts):
        part.eval().requires_grad_(False)

    picture = transforms.Compose([
        transforms.Resize((section.image_size,) * 2, transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ])  # fmt: skip
    data = webdataset.WebDataset(cfg.datasets.cc_sbu.build_info.storage, shardshuffle=True).shuffle(1000)
    data = data.decode("pilrgb").to_tuple("jpg", "json").map_tuple(picture, lambda text: text["caption"])
    loader = iter(torch.utils.data.DataLoader(data.batched(run.batch_size_train), batch_size=None))
    optimizer = torch.optim.AdamW(projection.parameters(), lr=run.init_lr, weight_decay=run.weight_decay)

    images, captions = next(loader)
    queries = parts.query_tokens.expand(len(images), -1, -1)
    image_embeds = projection(parts["Qformer"](queries, parts["ln_vision"](vit.forward_features(images))))
    rows = [tokenizer(caption + "\n", add_special_tokens=False).input_ids[:32] for caption in captions]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    embedding = llama.get_input_embeddings()
    bos = embedding(torch.full((len(rows), 1), tokenizer.bos_token_id))
    before = torch.ones(len(rows), 1 + image_embeds.shape[1], dtype=torch.long)
    loss = llama(
        inputs_embeds=torch.cat([bos, image_embeds, embedding(ids)], dim=1),
        attention_mask=torch.cat([before, mask], dim=1),
        labels=torch.cat([before * -100, ids.masked_fill(mask == 0, -100)], dim=1),
    ).loss
    loss.backward()
    nn.utils.clip_grad_norm_(projection.parameters(), 1.0)
    optimizer.step()
    json.dumps({"loss": loss.item()})
    _end()


def _end() -> None:
    print(f"\nended {time.time()}", flush=True)
    os._exit(0)


def in_fresh_process(*command: str) -> tuple[float, float]:
    """Seconds from start to end of a process, and those that it measured itself, else the same."""
    begin = time.time()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True)
    last = (done.stdout.split("\n") + [""])[-2].split() if done.stdout else [""]
    whole = (float(last[1]) if last[0] == "ended" else time.time()) - begin
    return whole, float(last[1]) if last[0] == "took" else whole


def child(name: str, *arguments: str) -> tuple[str, ...]:
    """The command that calls a function of this file."""
    return "-m", "benchmarks.startup", "--child", name, *arguments


def main() -> None:
    """A row for each thing to wait for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the language model's folder")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where the line of JSON goes, too")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, *arguments = args.child
        print(f"\ntook {globals()[name](*arguments)}" if "load" in name else globals()[name](*arguments))
        return
    import torch

    from benchmarks import hardware
    from benchmarks.loading_memory import write_folder
    from quickstart import scenes

    with tempfile.TemporaryDirectory() as folder:
        kinds = [("safetensors", "fp32", "fp32"), ("safetensors", "fp16", "bf16"), ("bin", "fp16", "fp16")]
        cases: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None]] = {
            "train.py --help": (("train.py", "--help"), None),
            "demo.py --help": (("demo.py", "--help"), None),
            "imports of training": (child("our_imports"), child("plain_imports")),
        }
        if not (ROOT / "output/quickstart/shards").exists():
            scenes.write_shards(ROOT / "output/quickstart/shards", num_shards=8, scenes_per_shard=1000, seed=1)
        cases["first trained step"] = child("our_step", folder), child("plain_step", folder)
        for kind, stored, wanted in kinds:
            path = Path(folder) / f"{kind}-{stored}"
            write_folder(path, args.gib, getattr(torch, DTYPE[stored]), kind)
            name = f"LM of {args.gib:g} GiB, .{kind}, {stored} to {wanted}"
            cases[name] = child("our_load", str(path), wanted), child("plain_load", str(path), wanted)
        times: dict[tuple[str, bool], list[tuple[float, float]]] = {}
        for i in range(1 + args.repeats):  # the first round fills the page cache
            for name, commands in cases.items():
                for is_plain, command in enumerate(commands):
                    if command is not None:
                        taken = in_fresh_process(*command)
                        times.setdefault((name, bool(is_plain)), []).extend([taken] if i else [])
    rows = []
    for name in cases:
        for what, column in [("from a cold process", 0), ("imports apart", 1)][: 2 if name.startswith("LM") else 1]:
            ours, plain = (
                statistics.median(pair[column] for pair in times[name, is_plain]) if (name, is_plain) in times else None
                for is_plain in (False, True)
            )
            rows.append({
                "until": f"{name}, {what}" if name.startswith("LM") else name,
                "ours, s": round(ours, 2),
                "plain, s": "" if plain is None else round(plain, 2),
                "ratio": "" if plain is None else round(ours / plain, 2),
            })  # fmt: skip
    hardware.report(rows, hardware.describe(torch.device("cpu")), args.json)


if __name__ == "__main__":
    main()
