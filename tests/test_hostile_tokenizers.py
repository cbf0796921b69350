"""Tokenizers and prompts that somebody prepared: refused in a line, and nothing is run."""

import base64
import json
import shutil
import struct

import pytest
from confined import told
from golden_data import TINY
from hostile_weights import replaced
from sentencepiece import SentencePieceTrainer

from minigpt4.models import fast_tokenizer
from minigpt4.models import language_model as lm
from minigpt4.models.llama_tokenizer import load_tokenizer
from minigpt4.models.loading import read_prompts

pytestmark = pytest.mark.usefixtures("confined")


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


@pytest.mark.parametrize(("missing", "said"), [("bos", None), ("eos", "no eos_token_id"), ("both", "no eos_token_id")])
def test_tokenizer_without(tokenizer_folder, trained, missing, said):
    (tokenizer_folder / "tokenizer.model").write_bytes(trained[missing])
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        (tokenizer_folder / name).unlink()
    if said is None:  # language models without a begin token get none
        tokenizer = load_tokenizer(tokenizer_folder)
        assert tokenizer.bos_token is None
        assert tokenizer.encode("a dog") == tokenizer.encode("a dog", add_special_tokens=False)
    else:
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
    "fast of no bytes": (fast(text=""), "tokenizer.json", "no valid JSON"),
    "fast that is deep": (fast(text="[" * 10**5), "tokenizer.json", "no valid JSON"),
    "fast as a list": (fast(text="[]"), "cannot be read"),
    "fast of an unknown model": (fast(content={"model": {"type": "Evil"}}), "cannot be read"),
    "fast with code of its own": (
        fast(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Tokenizer", None]}),
        "cannot be read",
        "code",
    ),
    "fast without end": (fast(eos_token=None), "no eos_token_id"),
}
DOUBLES = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
SEQUENCE = {"type": "Sequence", "normalizers": [DOUBLES] * 40}
BETWEEN = {"type": "Replace", "pattern": {"Regex": ""}, "content": "a"}
CHARSMAP = base64.b64encode(struct.pack("<I", 0) + b"a" * 10**5).decode()
GROWING = {  # memory that grows like 2^40 aborts the process, where nothing can be caught
    "a normalizer": {"normalizer": SEQUENCE},
    "a nested one": {"normalizer": {"type": "Sequence", "normalizers": [SEQUENCE]}},
    "an expression": {"normalizer": {"type": "Sequence", "normalizers": [BETWEEN] * 40}},
    "a long replacement": {"normalizer": DOUBLES | {"content": "a" * 10**6}},
    "a long beginning": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**6}},
    "forms of Unicode": {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 9}},
    "a table": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": CHARSMAP}},
    "bytes": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel"}] * 40}},
    "a decoder": {"decoder": {"type": "Sequence", "decoders": [DOUBLES] * 40}},
    "a decoder of spaces": {"decoder": {"type": "Sequence", "decoders": [{"type": "BPEDecoder", "suffix": ""}] * 40}},
}


@pytest.mark.parametrize("case", GROWING)
def test_tokenizer_that_makes_texts_longer(tokenizer_folder, case):
    fast(content=GROWING[case])(tokenizer_folder)
    told(lambda: load_tokenizer(tokenizer_folder), "model.llama_model", "tokenizer.json", "times longer", "at most 100")


def test_tokenizer_that_makes_texts_longer_in_another_file(tokenizer_folder):
    fast(fast_tokenizer_files=["x/tokenizer.1.json"])(tokenizer_folder)
    (tokenizer_folder / "x").mkdir()
    content = json.loads((tokenizer_folder / "tokenizer.json").read_text()) | GROWING["a normalizer"]
    (tokenizer_folder / "x" / "tokenizer.1.json").write_text(json.dumps(content))
    told(lambda: load_tokenizer(tokenizer_folder), "x/tokenizer.1.json", "times longer")


PANICS = {
    "loading": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}},
    "encoding": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
}


@pytest.mark.parametrize("case", PANICS)
def test_tokenizer_that_panics(tokenizer_folder, case):
    """A panic of Rust is no Exception, so that nothing else would catch it."""
    fast(content=PANICS[case])(tokenizer_folder)
    told(lambda: load_tokenizer(tokenizer_folder), "model.llama_model", str(tokenizer_folder), "panicked", "again")


def test_tokenizer_that_panics_later(tokenizer_folder):
    """At a token that the trial does not have."""
    fast(content={"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 2}})(tokenizer_folder)
    tokenizer = load_tokenizer(tokenizer_folder)
    ids = tokenizer("a", add_special_tokens=False).input_ids
    for decode in (tokenizer.decode, lambda ids: tokenizer.batch_decode([ids])):
        told(lambda decode=decode: decode(ids), "model.llama_model", str(tokenizer_folder), "panicked")


def test_usual_pipelines_are_accepted(tokenizer_folder):
    """Llama's, Gemma's, Qwen's and T5's steps."""
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    llama = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    steps = [{"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    decoder = {"type": "Sequence", "decoders": [back, *steps]}
    split = {"type": "Split", "pattern": {"Regex": "\\d"}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    qwen = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    table = base64.b64encode(struct.pack("<I", 0) + b"ffi\0" + b"a" * 33).decode()
    t5 = {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": table}, space]}
    for content in ({"normalizer": llama, "decoder": decoder}, {"normalizer": {"type": "NFC"}, "pre_tokenizer": qwen}):
        assert fast_tokenizer.max_growth(list(content.values())) <= fast_tokenizer.MAX_GROWTH / 4
    assert fast_tokenizer.max_growth(t5) <= fast_tokenizer.MAX_GROWTH / 2
    fast(content={"normalizer": llama, "decoder": decoder})(tokenizer_folder)
    assert load_tokenizer(tokenizer_folder)("a", add_special_tokens=False).input_ids == [0]
    file = tokenizer_folder / "tokenizer.json"
    steps = {"normalizer": {"type": "NFKC"}, "pre_tokenizer": byte_level, "decoder": byte_level}
    file.write_text(json.dumps(json.loads(file.read_text()) | steps))
    assert load_tokenizer(tokenizer_folder).eos_token


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
    told(lambda: lm.load_tokenizer(model.llama_model, tokenizer_folder), "1000001 tokens", "600 embeddings")


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
