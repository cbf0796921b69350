"""The tokenizer against the slow Llama tokenizer of transformers 4.28."""

import json
import shutil

import pytest
import torch
from golden_data import TINY, read_json

from minigpt4.common.errors import UserError
from minigpt4.models.llama_tokenizer import LlamaTokenizer, load_tokenizer

GOLDEN = read_json("tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY / "llama")


@pytest.mark.parametrize("row", GOLDEN["rows"], ids=lambda row: ascii(row["text"])[:40])
def test_row(tokenizer, row):
    assert tokenizer.encode(row["text"], add_special_tokens=False) == row["ids"]
    assert tokenizer.encode(row["text"]) == row["ids_special"]
    assert tokenizer.tokenize(row["text"]) == row["pieces"]
    assert tokenizer.decode(row["ids"]) == row["decode"]
    assert tokenizer.decode(torch.tensor(row["ids"], dtype=torch.long)) == row["decode"]


def test_special_ids(tokenizer):
    assert tokenizer.vocab_size == GOLDEN["vocab_size"] and len(tokenizer) == GOLDEN["len"]
    for role in ("bos", "eos", "unk", "pad"):
        assert getattr(tokenizer, f"{role}_token_id") == GOLDEN[role]
    assert tokenizer.pad_token == GOLDEN["pad_token"]


def test_padding_and_truncation(tokenizer):
    golden = GOLDEN["padding"]
    encoded = tokenizer(
        golden["texts"],
        return_tensors="pt",
        padding="longest",
        truncation=True,
        max_length=golden["max_length"],
        add_special_tokens=False,
    )
    assert encoded.input_ids.tolist() == golden["input_ids"]
    assert encoded.attention_mask.tolist() == golden["attention_mask"]
    with pytest.raises(AttributeError):
        _ = encoded.token_type_ids


def test_empty_text_as_tensor(tokenizer):
    ids = tokenizer("", return_tensors="pt", add_special_tokens=False).input_ids
    assert list(ids.shape) == GOLDEN["empty_return_pt"]["shape"]  # the recorded dtype was float32, today it is int64


def test_decode_can_skip_special_tokens(tokenizer):
    ids = tokenizer.encode("a dog") + [tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == "<s> a dog</s>"
    assert tokenizer.batch_decode([ids], skip_special_tokens=True) == ["a dog"]


def test_padding_without_pad_token_is_refused():
    with pytest.raises(ValueError, match="pad_token"):
        LlamaTokenizer(TINY / "llama")(["a", "a dog"], padding=True)


def copied(tmp_path):
    ignore = shutil.ignore_patterns("*.bin", "*.safetensors")
    return shutil.copytree(TINY / "llama", tmp_path / "llama", ignore=ignore)


def test_added_token_has_an_id_of_its_own(tmp_path):
    folder = copied(tmp_path)
    (folder / "added_tokens.json").write_text(json.dumps({"[PAD]": 600}))
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == 601 and tokenizer.vocab_size == 600
    ids = tokenizer.encode("a[PAD]dog", add_special_tokens=False)
    assert ids.count(600) == 1 and tokenizer.decode(ids) == "a [PAD] dog"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "tokenizer.model").unlink(), ("tokenizer.model", "tokenizer.json")),
        (lambda folder: (folder / "special_tokens_map.json").write_text("{"), ("special_tokens_map.json", "JSON")),
    ],
)
def test_damaged_folder(tmp_path, damage, words):
    folder = copied(tmp_path)
    damage(folder)
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    assert all(word in str(error.value) for word in (str(folder), *words))
