"""Start-up time, compared with a plain port; each start is a fresh process, and the two take turns.

python -m benchmarks.startup --gib 2

The plain port imports what it uses at the top, builds its parts with random weights on the host, loads the
language model with transformers' ``from_pretrained`` and the vision side with ``load_state_dict``.
"""

import argparse
import functools
import importlib
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
STAGE_1 = "train_configs/quickstart_stage1.yaml"
FIRST_STEP = "the first trained step of the small world"
DTYPE = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def our_imports() -> None:
    """All packages that train.py uses."""
    for package in ("common.config", "tasks", "datasets.builders", "processors", "models", "runners"):
        importlib.import_module(f"minigpt4.{package}")


def plain_imports() -> None:
    """What a port imports that takes its parts from libraries."""
    import minigpt4  # noqa: F401  (makes torchvision importable beside any torch)

    for module in ("omegaconf", "timm.models.eva", "torchvision.transforms", "webdataset"):
        importlib.import_module(module)
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401


def our_load(folder: str, precision: str) -> float:
    """Seconds to load a language model and to compute one token, without imports."""
    our_imports()
    import torch

    from minigpt4.models import language_model as lm
    from minigpt4.models.growing_cache import new_cache

    begin = time.perf_counter()
    llm = lm.load_language_model(Path(folder), getattr(torch, DTYPE[precision]))
    with torch.inference_mode():
        embeds = llm.get_input_embeddings()(torch.tensor([[1]]))
        lm.next_token_logits(llm, embeds, torch.ones(1, 1, dtype=torch.long), new_cache())
    return time.perf_counter() - begin


def plain_load(folder: str, precision: str) -> float:
    """The same by transformers alone."""
    plain_imports()
    import torch
    from transformers import AutoModelForCausalLM

    begin = time.perf_counter()
    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPE[precision])).eval()
    with torch.inference_mode():
        llm(inputs_embeds=llm.get_input_embeddings()(torch.tensor([[1]])), use_cache=False)
    return time.perf_counter() - begin


def our_vision(folder: str, depth: str) -> float:
    """Seconds from a file of the vision transformer to the module in the host's precision, without imports."""
    our_imports()
    import torch
    from accelerate import init_empty_weights

    from minigpt4.common import weights
    from minigpt4.models.eva_vit import build_eva_vit, round_vit_weights

    begin, file = time.perf_counter(), Path(folder) / "vit.pth"
    with init_empty_weights():
        vit = build_eva_vit(vit_config={"depth": int(depth)})
    state = weights.match_state_dict(vit, weights.read_state_dict(file, "file"), file, "file")
    weights.assign(vit, state, file, "file")
    round_vit_weights(vit, torch.float16)
    return time.perf_counter() - begin


def plain_vision(folder: str, depth: str) -> float:
    """The same as the reference does it."""
    plain_imports()
    import torch

    begin = time.perf_counter()
    vit = _timm_eva(img_size=224, patch_size=14, embed_dim=1408, depth=int(depth), num_heads=16, mlp_ratio=4.3637)
    vit.load_state_dict(torch.load(Path(folder) / "vit.pth", map_location="cpu"))
    for module in vit.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.half()
    return time.perf_counter() - begin


def _timm_eva(**sizes: Any) -> Any:
    import timm.models.eva
    from torch import nn

    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    fixed = {"num_classes": 0, "global_pool": "", "use_post_transformer_norm": False, "use_fc_norm": False}
    return timm.models.eva.Eva(**fixed, norm_layer=norm, **sizes)


def our_step(folder: str) -> None:
    """train.py itself; the process ends after the optimizer's first step."""
    sys.argv = ["train.py", "--cfg-path", STAGE_1, "--options", f"run.output_dir={folder}"]
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: os._exit(0))
    runpy.run_path("train.py", run_name="__main__")


def plain_step() -> None:
    """The same model and data, put together from libraries."""
    plain_imports()
    import omegaconf
    import torch
    from torch import nn

    cfg = omegaconf.OmegaConf.load(STAGE_1)
    torch.manual_seed(cfg.run.seed)
    tokenizer, llm, vit, parts = _plain_model(cfg.model)
    projection = nn.Linear(parts["Qformer"].config.hidden_size, llm.config.hidden_size)
    optimizer = torch.optim.AdamW(projection.parameters(), lr=cfg.run.init_lr, weight_decay=cfg.run.weight_decay)
    images, captions = next(iter(_plain_loader(cfg)))
    queries = parts.query_tokens.expand(len(images), -1, -1)
    image_embeds = projection(parts["Qformer"](queries, parts["ln_vision"](vit.forward_features(images))))
    rows = [tokenizer(caption + "\n", add_special_tokens=False).input_ids[:32] for caption in captions]
    width = max(map(len, rows))
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    embedding = llm.get_input_embeddings()
    bos = embedding(torch.full((len(rows), 1), tokenizer.bos_token_id))
    before = torch.ones(len(rows), 1 + image_embeds.shape[1], dtype=torch.long)
    loss = llm(
        inputs_embeds=torch.cat([bos, image_embeds, embedding(ids)], dim=1),
        attention_mask=torch.cat([before, mask], dim=1),
        labels=torch.cat([before * -100, ids.masked_fill(mask == 0, -100)], dim=1),
    ).loss
    loss.backward()
    nn.utils.clip_grad_norm_(projection.parameters(), 1.0)
    optimizer.step()
    os._exit(0)


def _plain_model(section: Any) -> tuple[Any, ...]:
    """Tokenizer, LM, vision transformer and the parts around the Q-Former, frozen."""
    import torch
    from safetensors.torch import load_file
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    from minigpt4.models.Qformer import QFormer, QFormerConfig

    vocabulary, special = f"{section.llama_model}/tokenizer.model", {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = SentencePieceBackend(vocab_file=vocabulary, legacy=True, pad_token="</s>", **special)
    llm = AutoModelForCausalLM.from_pretrained(section.llama_model, dtype=torch.float32)
    vit = _timm_eva(img_size=section.image_size, **section.vit_config)
    parts = nn.ModuleDict({
        "ln_vision": nn.LayerNorm(vit.embed_dim),
        "Qformer": QFormer(QFormerConfig(**section.qformer_config, encoder_width=vit.embed_dim)),
    })  # fmt: skip
    parts.register_parameter(
        "query_tokens", nn.Parameter(torch.zeros(1, section.num_query_token, parts["Qformer"].config.hidden_size))
    )
    vit.load_state_dict(load_file(section.vit_weights))
    parts.load_state_dict(load_file(section.q_former_model))
    for part in (llm, vit, parts):
        part.eval().requires_grad_(False)
    return tokenizer, llm, vit, parts


def _plain_loader(cfg: Any) -> Any:
    """Batches of images [B, 3, S, S] and captions."""
    import torch
    import torchvision.transforms as transforms
    import webdataset

    image = transforms.Compose([
        transforms.Resize((cfg.model.image_size,) * 2, transforms.InterpolationMode.BICUBIC),
        transforms.ToTensor(),
        transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ])  # fmt: skip
    data = webdataset.WebDataset(cfg.datasets.cc_sbu.build_info.storage, shardshuffle=True).shuffle(1000)
    data = data.decode("pilrgb").to_tuple("jpg", "json").map_tuple(image, lambda text: text["caption"])
    return torch.utils.data.DataLoader(data.batched(cfg.run.batch_size_train), batch_size=None)


def in_fresh_process(*command: str) -> tuple[float, float, float]:
    """Seconds from start to end of a process, of its CPU time, and those that it measured itself, else 0."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    whole, after = time.time() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    words = done.stdout.split()[-2:]
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return whole, cpu, float(words[1]) if words and words[0] == "took" else 0.0


def child(name: str, *arguments: str) -> tuple[str, ...]:
    """The command that calls a function of this file."""
    return "-m", "benchmarks.startup", "--child", name, *arguments


def write_vit(file: Path, gib: float) -> int:
    """Writes a vision transformer of ViT-g's width and about that size in fp16; returns its depth."""
    import torch

    from minigpt4.models.eva_vit import build_eva_vit

    depth = max(1, round(gib * 2**30 / 2 / 25.2e6))
    with torch.device("meta"):
        shapes = build_eva_vit(vit_config={"depth": depth}).state_dict()
    torch.save({name: torch.full(value.shape, 0.01, dtype=torch.float16) for name, value in shapes.items()}, file)
    return depth


def prepared(folder: Path, gib: float, only: str) -> Iterator[tuple[str, list[tuple[str, ...]]]]:
    """(name, [our command, and the plain one where there is one]) of each row; writes what the commands read."""
    import torch

    from benchmarks.loading_memory import write_folder
    from quickstart import scenes

    yield "train.py --help", [("train.py", "--help")]
    yield "demo.py --help", [("demo.py", "--help")]
    yield "what training imports", [child("our_imports"), child("plain_imports")]
    shards = ROOT / "output/quickstart/shards"
    if only in FIRST_STEP and not shards.exists():
        scenes.write_shards(shards, num_shards=8, scenes_per_shard=1000, seed=1)
    yield FIRST_STEP, [child("our_step", str(folder)), child("plain_step")]
    for kind, stored, wanted in (
        ("safetensors", "fp32", "fp32"),
        ("safetensors", "fp16", "bf16"),
        ("bin", "bf16", "bf16"),
    ):
        name, path = f"LM of {gib:g} GiB, .{kind}, {stored} to {wanted}", folder / f"{kind}-{stored}"
        if only in name:
            write_folder(path, gib, getattr(torch, DTYPE[stored]), kind)
            yield name, [child("our_load", str(path), wanted), child("plain_load", str(path), wanted)]
    name = f"vision transformer of {gib:g} GiB"
    if only in name:
        depth = str(write_vit(folder / "vit.pth", gib))
        yield name, [child("our_vision", str(folder), depth), child("plain_vision", str(folder), depth)]


def time_case(commands: list[tuple[str, ...]], folder: Path, repeats: int) -> list[tuple[float, ...]]:
    """Median seconds of each command's process, of its CPU time and of what it measured itself."""
    times: list[list[tuple[float, float, float]]] = [[] for _ in commands]
    for i in range(1 + repeats):  # the first round does not count
        for side in range(len(commands))[:: 1 if i % 2 else -1]:  # whichever comes second finds more in caches
            for file in folder.rglob("*.*"):
                with file.open("rb") as content:
                    while content.read(2**24):
                        pass
            taken = in_fresh_process(*commands[side])
            times[side].extend([taken] if i else [])
    return [tuple(map(statistics.median, zip(*each, strict=True))) for each in times]


def main() -> None:
    """A row for each start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the models that are loaded")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument("--json", type=Path, help="file for the line of JSON")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, *arguments = args.child
        taken = globals()[name](*arguments)
        print(f"took {taken}" if taken else "")
        return
    import torch

    from benchmarks import hardware

    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for name, commands in prepared(Path(temporary), args.gib, args.only):
            if args.only not in name:
                continue
            medians = time_case(commands, Path(temporary), args.repeats)
            columns = ("cold process", "CPU of it", "without imports")[: 3 if "GiB" in name else 2]
            for number, column in enumerate(columns):
                ours, plain = medians[0][number], medians[1][number] if len(medians) > 1 else None
                rows.append({
                    "until": name,
                    "seconds of": column,
                    "ours": round(ours, 3),
                    "plain": "" if plain is None else round(plain, 3),
                    "ratio": "" if plain is None else round(ours / plain, 2),
                })  # fmt: skip
                print(rows[-1], file=sys.stderr, flush=True)
    hardware.report(rows, hardware.describe(torch.device("cpu")), args.json)


if __name__ == "__main__":
    main()
