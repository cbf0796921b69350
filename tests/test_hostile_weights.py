"""Weights and tokenizers that somebody prepared: refused in a line, nothing run, nothing half loaded."""

import collections
import functools
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile

import pytest
import torch
from confined import told
from golden_data import TINY
from safetensors.torch import load_file, save, save_file
from sentencepiece import SentencePieceTrainer

from minigpt4.common import weights
from minigpt4.common.fingerprints import identify
from minigpt4.datasets.feature_cache import FeatureDataset, _claim
from minigpt4.models.eva_vit import interpolate_pos_embed
from minigpt4.models.llama_folder import check_vocabulary, load_llama
from minigpt4.models.llama_tokenizer import load_tokenizer
from minigpt4.models.mini_gpt4 import read_prompts
from minigpt4.tools.apply_delta import WeightFolder

pytestmark = pytest.mark.usefixtures("confined")
KEY = "model.ckpt"
PROJECTION = torch.load(TINY / "minigpt4_ckpt.pth", weights_only=True)["model"]
Q_FORMER = load_file(TINY / "qformer.safetensors")
LLAMA = load_file(TINY / "llama" / "model.safetensors")


def saved(content, **options):
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


class Runs:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def zipped(data, name="data.pkl", method=zipfile.ZIP_STORED):
    """A file in torch's form whose pickle is what is given."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for member, content in ((name, data), ("version", b"3\n"), ("byteorder", b"little")):
            archive.writestr(f"archive/{member}", content)
    return buffer.getvalue()


def safe(header, data=b""):
    """A safetensors file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


GOOD = saved({"model": PROJECTION})
GOOD_SAFE = save({"a": torch.ones(2)})
FILES = {  # what cannot be read as weights: suffix, bytes, words
    "no bytes": (".pth", b""),
    "one byte": (".pth", b"\x80"),
    "a text": (".pth", b"not weights at all"),
    "a page": (".bin", b"<!doctype html>"),
    "a pointer of git": (".bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
    "an empty zip": (".pth", b"PK\x05\x06" + b"\0" * 18),
    "a zip of something else": (".pth", zipped(b"a", "readme.txt")),
    "a changed zip": (".pth", GOOD[:1000] + b"\xff" * 200 + GOOD[1200:-100]),
    "a pickle of nothing": (".pth", zipped(b"")),
    "a pickle cut short": (".pth", zipped(pickle.dumps({"a": 1}, 2)[:-3])),
    "a pickle without end": (".pth", zipped(b"\x80\x02" + b"]" * 1000)),
    "a pickle of an unknown protocol": (".pth", zipped(b"\x80\x63.")),
    "a zip that unpacks to 200 MB": (".pth", zipped(b"\x80\x02N." + b"\0" * 2 * 10**8, method=zipfile.ZIP_DEFLATED)),
    "a call of os.system": (".pth", saved({"a": Runs(os.system, "touch ran")})),
    "a call of eval": (".pth", saved({"a": Runs(eval, "open('ran', 'w')")})),
    "a call of open": (".pt", saved({"a": Runs(open, "ran", "w")})),
    "a call in a bare pickle": (".bin", pickle.dumps(Runs(os.system, "touch ran"), 2)),
    "a call in an old file": (".bin", saved({"a": Runs(os.mkdir, "ran")}, _use_new_zipfile_serialization=False)),
    "a call by name": (".pth", zipped(b"cos\nsystem\n(S'touch ran'\ntR.")),
    "a call of getattr": (".pth", zipped(b"cbuiltins\ngetattr\n(cos\nS'system'\ntR.")),
    "a call of torch.load": (".pth", saved({"a": Runs(torch.load, "other.pth")})),
    "a module": (".pth", saved({"model": torch.nn.Linear(2, 2)})),
    "a partial": (".pth", saved({"a": functools.partial(os.system, "touch ran")})),
    "safetensors of no bytes": (".safetensors", b""),
    "safetensors header of 2^60": (".safetensors", struct.pack("<Q", 2**60) + b"{}"),
    "safetensors header beyond the end": (".safetensors", struct.pack("<Q", 1000) + b"{}"),
    "safetensors header that is no JSON": (".safetensors", safe(b"nothing")),
    "safetensors header that is no UTF-8": (".safetensors", safe(b"\xff\xfe{}")),
    "safetensors header as a list": (".safetensors", safe([])),
    "safetensors header that is deep": (".safetensors", safe(b"[" * 100_000)),
    "safetensors of an unknown type": (".safetensors", safe(entry("F99"), b"\0" * 8)),
    "safetensors offsets below zero": (".safetensors", safe(entry(offsets=(-8, 0)), b"\0" * 8)),
    "safetensors offsets beyond the end": (".safetensors", safe(entry(offsets=(0, 800), shape=(200,)), b"\0" * 8)),
    "safetensors offsets in reverse": (".safetensors", safe(entry(offsets=(8, 0)), b"\0" * 8)),
    "safetensors of a shape that does not fit": (".safetensors", safe(entry(shape=(3,)), b"\0" * 8)),
    "safetensors of a shape of 2^62": (".safetensors", safe(entry(shape=(2**62, 2**62)), b"\0" * 8)),
    "safetensors with a gap": (".safetensors", safe(entry(offsets=(8, 16)), b"\0" * 16)),
    "safetensors with more behind": (".safetensors", GOOD_SAFE + b"more"),
    "safetensors cut short": (".safetensors", GOOD_SAFE[:-1]),
    "torch's form as safetensors": (".safetensors", GOOD),
    "safetensors as torch's form": (".pth", GOOD_SAFE),
    "another suffix": (".zip", GOOD, ".safetensors"),
}


@pytest.mark.parametrize("case", FILES)
def test_file(tmp_path, case):
    suffix, data, *words = FILES[case]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data)
    told(lambda: weights.read_state_dict(path, KEY), KEY, str(path), *(words or ["cannot be read as weights", "again"]))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", "old .bin"])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_file_cut_at(tmp_path, suffix, share):
    path = tmp_path / f"weights{suffix.split()[-1]}"
    if suffix == ".safetensors":
        save_file(PROJECTION, path)
    else:
        torch.save({"model": PROJECTION}, path, _use_new_zipfile_serialization="old" not in suffix)
    os.truncate(path, int(path.stat().st_size * share))
    told(lambda: weights.read_state_dict(path, KEY), KEY, str(path), "cannot be read as weights")


CONTENTS = {
    "a list": ([torch.ones(1)], "holds a list"),
    "a tensor": (torch.ones(1), "holds a Tensor"),
    "a number": (5, "holds a int"),
    "null": (None, "holds a NoneType"),
    "a number as a name": ({5: torch.ones(1)}, "'5'"),
    "null as a name": ({None: torch.ones(1)}, "'None'"),
    "a tuple as a name": ({("a", 1): torch.ones(1)}, "('a', 1)"),
    "a text as a value": ({"a": "b"}, "'a'", "str"),
    "null as a value": ({"a": None}, "'a'", "NoneType"),
    "a list as a value": ({"a": [torch.ones(1)]}, "'a'", "list"),
    "a dict in a dict": ({"a": {"b": torch.ones(1)}}, "'a'", "dict"),
    "a model in a model": ({"model": {"model": {"a": torch.ones(1)}}}, "'model'", "dict"),
    "a line end in a name": ({"a\nb": None}, "'a b'"),
    "a name of a megabyte": ({"a" * 10**6: None}, "'aaa", "[…]"),
    "a sparse tensor": ({"a": torch.ones(2, 2).to_sparse()}, "'a'", "float32"),
    "a tensor of rows": ({"a": torch.ones(2, 2).to_sparse_csr()}, "'a'"),
    "a tensor on no device": ({"a": torch.ones(2, device="meta")}, "'a'"),
    "complex numbers": ({"a": torch.ones(2, dtype=torch.complex64)}, "'a'", "complex64"),
    "eighths": ({"a": torch.ones(2).to(torch.float8_e4m3fn)}, "'a'", "float8"),
    "quantised": ({"a": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)}, "'a'", "qint8"),
    "bytes": ({"a": torch.ones(2, dtype=torch.uint8)}, "'a'", "uint8"),
}


def test_an_archive_that_swells_is_not_unpacked_to_tell_what_it_is(tmp_path, confined, monkeypatch):
    suffix, content, *_ = FILES["a zip that unpacks to 200 MB"]
    (tmp_path / f"x{suffix}").write_bytes(content)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
    assert identify(tmp_path / f"x{suffix}") == "no file of weights"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CONTENTS)
def test_content(tmp_path, case):
    content, *words = CONTENTS[case]
    torch.save(content, tmp_path / "weights.pth")
    told(lambda: weights.read_state_dict(tmp_path / "weights.pth", KEY), KEY, "weights.pth", *words)


def test_a_tensor_that_claims_more_than_there_is(tmp_path):
    """Of one stored number, a trillion: whoever copies it runs out of memory."""
    torch.save({"pos_embed": torch.ones(1).expand(1, 10**12 + 1, 48)}, tmp_path / "weights.pth")
    told(lambda: weights.read_state_dict(tmp_path / "weights.pth", KEY), "'pos_embed'")


@pytest.mark.parametrize("kind", ["pipe", "folder in a folder", "device"])
def test_what_is_no_weight_file(tmp_path, kind):
    path = tmp_path / "folder" / "model.safetensors"
    path.parent.mkdir()
    make = {"pipe": os.mkfifo, "folder in a folder": os.mkdir, "device": lambda at: os.symlink("/dev/zero", at)}
    make[kind](path)
    told(lambda: weights.read_state_dict(path.parent, KEY), KEY, str(path))


@pytest.mark.parametrize(
    "spec", ["absent.pth", "a\0b.pth", "a" * 5000, "~nobody-of-this-name/a.pth", "", " ", "\ud800.pth"]
)
def test_odd_path(spec):
    told(lambda: weights.locate(spec, KEY), KEY)


# into the model


def written(path, content):
    torch.save(content, path)
    return path


def changed(**changes):
    return {"model": PROJECTION | {f"llama_proj.{name}": value for name, value in changes.items()}}


MISFITS = {
    "nothing": ({"model": {}}, "no llama_proj.weight", "without tensors"),
    "another file": ({"model": {n: v for n, v in Q_FORMER.items() if v.ndim}}, "no llama_proj.weight"),
    "no bias": ({"model": {"llama_proj.weight": PROJECTION["llama_proj.weight"]}}, "no llama_proj.bias"),
    "13B": (changed(weight=torch.zeros(5120, 48), bias=torch.zeros(5120)), "13B"),
    "Llama 2": (changed(weight=torch.zeros(4096, 5632)), "Llama-2"),
    "a number as weight": (changed(weight=torch.tensor(1.0)), "[]", "[64, 48]"),
    "no rows": (changed(weight=torch.zeros(0, 48)), "[0, 48]"),
    "three dimensions": (changed(weight=torch.zeros(1, 64, 48)), "[1, 64, 48]"),
    "bias of another width": (changed(bias=torch.zeros(63)), "llama_proj.bias", "[63]"),
    "NaN": (changed(bias=torch.full((64,), torch.nan)), "llama_proj.bias", "NaN"),
    "infinity": (changed(weight=torch.full((64, 48), -torch.inf)), "llama_proj.weight", "infinity"),
    "whole numbers": (changed(weight=torch.ones(64, 48, dtype=torch.int64)), "llama_proj.weight", "int64"),
    "truths": (changed(bias=torch.ones(64, dtype=torch.bool)), "llama_proj.bias", "bool"),
    "a stranger": (changed(extra=torch.ones(1)), "llama_proj.extra"),
    "part of the language model": (
        {"model": PROJECTION | {"llama_model.lm_head.weight": torch.ones(600, 64)}},
        "lm_head",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_checkpoint_that_does_not_fit(model, tmp_path, case):
    content, *words = MISFITS[case]
    before = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("llama_proj")}
    told(lambda: model.load_checkpoint(written(tmp_path / "c.pth", content)), "model.ckpt", "c.pth", *words)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(1, 8, 48),
        torch.ones(2, 5, 48),
        torch.ones(5, 48),
        torch.ones(1, 1, 48),
        torch.ones(1, 0, 48),
        torch.ones(()),
    ],
    ids=lambda value: str(list(value.shape)),
)
def test_positions_that_are_no_grid(build, tmp_path, value):
    assert interpolate_pos_embed(value, 5) is value
    state = load_file(TINY / "eva_vit.safetensors") | {"pos_embed": value}
    told(lambda: build(vit_weights=str(written(tmp_path / "v.pth", state))), "model.vit_weights", "v.pth", "pos_embed")


@pytest.mark.parametrize(
    "value", [torch.ones(2), torch.ones(0), torch.ones(()), torch.ones(2, 3)], ids=lambda v: str(list(v.shape))
)
def test_bias_of_a_twin_that_is_no_three(value):
    name = "vision_model.encoder.layers.0.self_attn.qkv.bias"
    assert list(weights.published_names({name: value})) == ["blocks.0.attn.qkv.bias"]  # to be refused as unknown


def test_whole_numbers_in_the_tower(build, tmp_path):
    state = load_file(TINY / "eva_vit.safetensors")
    state["cls_token"] = state["cls_token"].long()
    message = told(
        lambda: build(vit_weights=str(written(tmp_path / "v.pth", state))), "'cls_token'", "int64", "float32"
    )
    assert message.startswith("model.vit_weights")


# the language model


@pytest.fixture
def llama(tmp_path):
    return shutil.copytree(TINY / "llama", tmp_path / "llama", ignore=shutil.ignore_patterns("*.bin"))


def configured(**changes):
    return lambda folder: (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | changes)
    )


def replaced(name, content):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def indexed(content):
    def change(folder):
        (folder / "model.safetensors").unlink()
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def spoiled(name, change):
    def spoil(folder):
        state = load_file(folder / "model.safetensors")
        state[name] = change(state[name])
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def as_gpt2(folder):
    import transformers

    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=600)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


REMOTE = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
FOLDERS = {
    "config.json of no bytes": (replaced("config.json", b""), "config.json", "JSON"),
    "config.json as a list": (replaced("config.json", b"[]"), "config.json"),
    "config.json as a text": (replaced("config.json", b'"llama"'), "config.json"),
    "config.json that is deep": (replaced("config.json", b"[" * 10**6), "config.json", "JSON"),
    "config.json that is no UTF-8": (replaced("config.json", b'{"a": "\xff"}'), "config.json", "JSON"),
    "config.json of nothing": (replaced("config.json", b"{}"), "cannot be loaded"),
    "an unknown architecture": (configured(model_type="evil"), "cannot be loaded"),
    "an architecture of pictures": (configured(model_type="vit", architectures=["ViTModel"]), "cannot be loaded"),
    "GPT-2": (as_gpt2, "'gpt2'", "Llama's family"),
    "code of its own": (configured(model_type="evil", auto_map=REMOTE), "cannot be loaded"),
    "a kernel of its own": (configured(attn_implementation="evil/kernel", model_type="evil"), "cannot be loaded"),
    "a billion layers": (configured(num_hidden_layers=10**9), "1,000,000,000 layers"),
    "layers below zero": (configured(num_hidden_layers=-1), "num_hidden_layers -1"),
    "no layers": (configured(num_hidden_layers=0), "num_hidden_layers 0"),
    "layers as a text": (configured(num_hidden_layers="two"), "cannot be loaded"),
    "no heads": (configured(num_attention_heads=0), "cannot be loaded"),
    "a width of a billion": (configured(hidden_size=10**9), "llama"),
    "a vocabulary of 2^70": (configured(vocab_size=2**70), "cannot be loaded"),
    "one layer more": (configured(num_hidden_layers=9), "missing", "model.layers."),
    "one layer less": (configured(num_hidden_layers=1), "unknown", "model.layers.1"),
    "another width": (configured(hidden_size=32), "other shapes"),
    "an index of no bytes": (indexed(""), "index.json", "JSON"),
    "an index as a list": (indexed([]), "index.json", "weight_map"),
    "an index without a map": (indexed({}), "weight_map"),
    "an index with an empty map": (indexed({"weight_map": {}}), "weight_map"),
    "an index with a list": (indexed({"weight_map": ["a"]}), "weight_map"),
    "an index of numbers": (indexed({"weight_map": {"a": 5}}), "lacks 1 of 1", "5"),
    "an index of lists": (indexed({"weight_map": {"a": ["b"]}}), "lacks 1 of 1"),
    "an index that is deep": (indexed("[" * 10**6), "JSON"),
    "an index that leads up": (
        indexed({"weight_map": {"a": "../evil.safetensors"}}),
        "'../evil.safetensors'",
        "beside it",
    ),
    "an index of an absolute name": (indexed({"weight_map": {"a": "/etc/passwd"}}), "'/etc/passwd'", "beside it"),
    "an index of the folder": (indexed({"weight_map": {"a": "."}}), "'.'"),
    "an index with an empty name": (indexed({"weight_map": {"a": ""}}), "index.json"),
    "an index with a name of 5000 letters": (indexed({"weight_map": {"a": "a" * 5000}}), "lacks 1 of 1"),
    "an index with a zero byte": (indexed({"weight_map": {"a": "a\0b"}}), "lacks 1 of 1"),
    "NaN": (spoiled("lm_head.weight", lambda value: value * torch.nan), "lm_head.weight", "NaN"),
    "whole numbers": (spoiled("lm_head.weight", lambda value: value.to(torch.int64)), "lm_head.weight", "other shapes"),
    "eighths": (spoiled("lm_head.weight", lambda value: value.to(torch.float8_e4m3fn)), "lm_head.weight"),
    "a flat matrix": (spoiled("lm_head.weight", lambda value: value.flatten()), "lm_head.weight", "other shapes"),
    "weights cut short": (
        lambda folder: os.truncate(folder / "model.safetensors", 900_000),
        "cannot be read as weights",
    ),
    "weights that are a pipe": (
        lambda folder: ((folder / "model.safetensors").unlink(), os.mkfifo(folder / "model.safetensors")),
        "model.safetensors",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_language_model(llama, case, monkeypatch):
    change, *words = FOLDERS[case]
    change(llama)
    (llama / "evil.py").write_text("open('ran', 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked agrees
    told(lambda: load_llama(llama, torch.float32), "model.llama_model", str(llama), *words)


def test_a_number_as_a_name_in_the_language_model(llama):
    (llama / "model.safetensors").unlink()
    torch.save(LLAMA | {5: torch.ones(1)}, llama / "pytorch_model.bin")
    told(lambda: load_llama(llama, torch.float32), "unknown ['5']")


def test_a_kernel_that_a_config_names_is_not_asked_for(llama):
    configured(attn_implementation="evil/kernel")(llama)
    assert type(load_llama(llama, torch.float32)).__module__ == "minigpt4.models.llama"


@pytest.mark.parametrize(
    "content", [{"a": "b"}, {5: torch.ones(1)}, {"a": torch.ones(2).to_sparse()}], ids=["text", "number", "sparse"]
)
def test_delta_of_other_things(llama, content):
    (llama / "model.safetensors").unlink()
    torch.save(content, llama / "pytorch_model.bin")
    told(lambda: WeightFolder(llama, "--delta"), "--delta", "pytorch_model.bin", "no tensor")


# tokenizers


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Sentencepiece models without a begin or an end token."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text(
        "\n".join(f"a dog {i} sits in the grass and looks at cat {i * 7}" for i in range(200))
    )
    models = {}
    for name, options in {"bos": {"bos_id": -1}, "eos": {"eos_id": -1}, "both": {"bos_id": -1, "eos_id": -1}}.items():
        SentencePieceTrainer.train(
            input=str(folder / "text.txt"), model_prefix=str(folder / name), vocab_size=60, minloglevel=2, **options
        )
        models[name] = (folder / f"{name}.model").read_bytes()
    return models


@pytest.fixture
def tokenizer_folder(tmp_path):
    ignored = shutil.ignore_patterns("*.bin", "*.safetensors")
    return shutil.copytree(TINY / "llama", tmp_path / "llama", ignore=ignored)


@pytest.mark.parametrize(
    ("lacking", "said"), [("bos", "no bos_token_id"), ("eos", "no eos_token_id"), ("both", "no bos_token_id")]
)
def test_tokenizer_without(tokenizer_folder, trained, lacking, said):
    (tokenizer_folder / "tokenizer.model").write_bytes(trained[lacking])
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (tokenizer_folder / name).unlink()
    told(lambda: load_tokenizer(tokenizer_folder), "model.llama_model", str(tokenizer_folder), said)


def fast(**changes):
    """tokenizer.json in place of tokenizer.model."""

    def change(folder):
        (folder / "tokenizer.model").unlink()
        model = {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, "unk_token": "<unk>"}
        content = {"version": "1.0", "added_tokens": [], "model": model} | changes.pop("content", {})
        text = changes.pop("text", json.dumps(content))
        (folder / "tokenizer.json").write_text(text)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | changes
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "special_tokens_map.json").unlink()

    return change


MODEL = (TINY / "llama" / "tokenizer.model").read_bytes()
TOKENIZERS = {
    "no file": (lambda folder: (folder / "tokenizer.model").unlink(), "tokenizer.model", "tokenizer.json"),
    "a folder": (
        lambda folder: ((folder / "tokenizer.model").unlink(), (folder / "tokenizer.model").mkdir()),
        "tokenizer",
    ),
    "no bytes": (replaced("tokenizer.model", b""), "cannot be read"),
    "a text": (replaced("tokenizer.model", b"not a model"), "cannot be read"),
    "a page": (replaced("tokenizer.model", b"<!doctype html><html></html>"), "cannot be read"),
    "half": (replaced("tokenizer.model", MODEL[: len(MODEL) // 2]), "cannot be read"),
    "begin of another name": (replaced("special_tokens_map.json", '{"bos_token": "<begin>"}'), None),
    "map as a list": (replaced("special_tokens_map.json", "[]"), "cannot be read"),
    "map of no bytes": (replaced("special_tokens_map.json", ""), "special_tokens_map.json", "JSON"),
    "map that is deep": (replaced("special_tokens_map.json", "[" * 10**6), "special_tokens_map.json", "JSON"),
    "map that is no UTF-8": (replaced("special_tokens_map.json", b'{"\xff": 1}'), "special_tokens_map.json", "JSON"),
    "a record without content": (replaced("special_tokens_map.json", '{"bos_token": {"a": 1}}'), "cannot be read"),
    "a number as a token": (replaced("special_tokens_map.json", '{"bos_token": 5}'), "cannot be read"),
    "a list as a token": (replaced("special_tokens_map.json", '{"eos_token": ["a"]}'), "cannot be read"),
    "config as a list": (replaced("tokenizer_config.json", "[]"), "cannot be read"),
    "added tokens as a list": (replaced("added_tokens.json", '["[PAD]"]'), "cannot be read"),
    "a text as an id": (replaced("added_tokens.json", '{"[PAD]": "600"}'), "cannot be read", "'600'"),
    "a fraction as an id": (replaced("added_tokens.json", '{"[PAD]": 600.5}'), "cannot be read", "600.5"),
    "null as an id": (replaced("added_tokens.json", '{"[PAD]": null}'), "cannot be read"),
    "the id of an image slot": (replaced("added_tokens.json", '{"[PAD]": -1}'), "cannot be read", "-1"),
    "an added token of no letters": (replaced("added_tokens.json", '{"": 600}'), "cannot be read"),
    "half a surrogate pair as a token": (replaced("added_tokens.json", '{"\\ud800": 600}'), "cannot be read"),
    "a begin token of no letters": (
        replaced("special_tokens_map.json", '{"bos_token": {"content": ""}}'),
        "cannot be read",
    ),
    "decoder of other ids": (
        replaced("tokenizer_config.json", '{"added_tokens_decoder": {"a": {}}}'),
        "cannot be read",
    ),
    "decoder without content": (
        replaced("tokenizer_config.json", '{"added_tokens_decoder": {"700": {}}}'),
        "cannot be read",
    ),
    "decoder as a list": (replaced("tokenizer_config.json", '{"added_tokens_decoder": [1]}'), "cannot be read"),
    "fast of no bytes": (fast(text=""), "cannot be read"),
    "fast that is deep": (fast(text="[" * 10**5), "cannot be read"),
    "fast as a list": (fast(text="[]"), "cannot be read"),
    "fast of an unknown model": (fast(content={"model": {"type": "Evil"}}), "cannot be read"),
    "fast with code of its own": (
        fast(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}),
        "cannot be read",
        "code",
    ),
    "fast without begin": (fast(bos_token=None), "no bos_token_id"),
    "fast without end": (fast(eos_token=None), "no eos_token_id"),
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_tokenizer(tokenizer_folder, case, monkeypatch):
    change, *words = TOKENIZERS[case]
    change(tokenizer_folder)
    (tokenizer_folder / "evil.py").write_text("open('ran', 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    if words == [None]:  # readable without what was named
        tokenizer = load_tokenizer(tokenizer_folder)
        assert tokenizer.bos_token_id != tokenizer.unk_token_id
    else:
        told(lambda: load_tokenizer(tokenizer_folder), "model.llama_model", str(tokenizer_folder), *words)


def test_added_token_beyond_the_embeddings(tokenizer_folder, model):
    (tokenizer_folder / "added_tokens.json").write_text('{"[PAD]": 1000000}')
    tokenizer = load_tokenizer(tokenizer_folder)
    told(lambda: check_vocabulary(model.llama_model, tokenizer, tokenizer_folder), "1000001 tokens", "600 embeddings")


# prompts

PROMPTS = {
    "no bytes": (b"", "{}", "no line"),
    "no mark": (b"Describe it.\n", "{}", "<ImageHere>"),
    "another mark": (b"<imagehere> Describe it.\n", "{}", "<ImageHere>"),
    "two marks": (b"<ImageHere> one\n<ImageHere><ImageHere> two\n", "{}", "more than once", "two"),
    "not UTF-8": (b"<ImageHere> caf\xe9\n", "{}", "UTF-8"),
    "UTF-16": ("<ImageHere>".encode("utf-16"), "{}", "UTF-8"),
    "no template": (b"<ImageHere>", "", "prompt_template", "{}"),
    "template without a place": (b"<ImageHere>", "###Human: ", "prompt_template"),
    "template with two places": (b"<ImageHere>", "{} {}", "prompt_template"),
    "template with a named place": (b"<ImageHere>", "{x}", "prompt_template"),
    "template with an open brace": (b"<ImageHere>", "{} {", "prompt_template"),
    "template with an attribute": (b"<ImageHere>", "{.x}", "prompt_template"),
    "template with a doubled brace": (b"<ImageHere>", "{{}}", "prompt_template"),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts(tmp_path, case):
    content, template, *words = PROMPTS[case]
    (tmp_path / "prompts.txt").write_bytes(content)
    told(lambda: read_prompts(str(tmp_path / "prompts.txt"), template), "model.prompt", *words)
    if "template" in case and template:
        told(lambda: read_prompts(None, template), "model.prompt_template")


# keys and values of a resumed run

RESUMED = {
    "no epoch": ({"optimizer": {}}, "weights alone"),
    "no optimizer": ({"epoch": 1}, "weights alone"),
    "an empty optimizer": ({"optimizer": {}, "epoch": 1}, "optimizer"),
    "an optimizer as a list": ({"optimizer": [], "epoch": 1}, "cannot be gone on from"),
    "an epoch as a text": ({"epoch": "1"}, "cannot be gone on from"),
    "a state as a list": ({"state": [1]}, "cannot be gone on from"),
    "a state of other fields": ({"state": {"evil": 1}}, "cannot be gone on from", "evil"),
    "ranks as a number": ({"ranks": 5}, "cannot be gone on from"),
    "ranks of nothing": ({"ranks": [{}]}, "cannot be gone on from"),
    "losses as a text": ({"bad_losses": "many"}, "cannot be gone on from"),
    "gradients of texts": ({"gradients": ["a"]}, "cannot be gone on from"),
}


@pytest.mark.parametrize("case", RESUMED)
def test_resumed_from(model, tmp_path, case):
    from minigpt4.runners.runner_base import RunnerBase

    content, *words = RESUMED[case]
    runner = object.__new__(RunnerBase)
    runner.model, runner.scaler, runner.output_dir, runner.iters_per_epoch = model, None, tmp_path / "run", 1
    runner.trained = [torch.nn.Parameter(torch.ones(2))]
    runner.device = torch.device("cpu")
    runner.optimizer = torch.optim.AdamW(runner.trained)
    runner.progress = collections.UserDict()
    whole = {"model": PROJECTION, "optimizer": runner.optimizer.state_dict(), "epoch": 1} | content
    if "weights alone" in words:
        whole = {"model": PROJECTION} | content
    told(lambda: runner.load_checkpoint(written(tmp_path / "c.pth", whole)), "run.resume_ckpt_path", "c.pth", *words)


def test_random_bytes_are_no_weights(tmp_path):
    rng = random.Random(0)
    for suffix in (".pth", ".safetensors"):
        for size in (1, 7, 64, 4096):
            (tmp_path / f"w{suffix}").write_bytes(rng.randbytes(size))
            told(lambda suffix=suffix: weights.read_file(tmp_path / f"w{suffix}", KEY), "cannot be read")


# caches of features


def cached(folder, **changes):
    """A part of a cache with one sample."""
    text = b'["a", null]'
    content = {
        "features": torch.ones(1, 1, 3, 2, dtype=torch.bfloat16),
        "texts": torch.frombuffer(bytearray(text), dtype=torch.uint8),
        "text_ends": torch.tensor([len(text)]),
    }
    save_file(content | changes, folder / "part.safetensors")
    return folder / "part.safetensors"


def text_of(data):
    return {"texts": torch.frombuffer(bytearray(data), dtype=torch.uint8), "text_ends": torch.tensor([len(data)])}


PARTS = {
    "no sample": ({"features": torch.ones(0, 1, 3, 2), "text_ends": torch.zeros(0, dtype=torch.int64)}, "no sample"),
    "no crop": ({"features": torch.ones(1, 0, 3, 2)}, "damaged"),
    "flat features": ({"features": torch.ones(6)}, "damaged"),
    "fewer texts": ({"text_ends": torch.zeros(0, dtype=torch.int64)}, "damaged"),
    "more texts": ({"text_ends": torch.tensor([1, 2])}, "damaged"),
    "a text beyond the end": ({"text_ends": torch.tensor([10**12])}, "damaged"),
    "a text below zero": ({"text_ends": torch.tensor([-1])}, "damaged"),
    "a text that is no JSON": (text_of(b"a dog"), "damaged"),
    "a text that is deep": (text_of(b"[" * 10**6), "damaged"),
    "a text that is a number": (text_of(b"5"), "damaged"),
    "three texts": (text_of(b'["a", "b", "c"]'), "damaged"),
}


@pytest.mark.parametrize("case", PARTS)
def test_part_of_a_cache(tmp_path, case):
    changes, *words = PARTS[case]
    file = cached(tmp_path, **changes)
    told(lambda: FeatureDataset("x", [file])[0], "run.feature_cache", str(tmp_path), *words)


def test_a_good_part_of_a_cache(tmp_path):
    sample = FeatureDataset("x", [cached(tmp_path)])[0]
    assert sample["features"].shape == (3, 2) and (sample["text_input"], sample["instruction"]) == ("a", None)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"[" * 10**6, b'{"weights": 5}', b"\xff"],
    ids=["no bytes", "list", "null", "deep", "number", "not UTF-8"],
)
def test_fingerprint(tmp_path, content):
    (tmp_path / "fingerprint.json").write_bytes(content)
    told(lambda: _claim(tmp_path, {"weights": "a"}), "run.feature_cache", str(tmp_path))
