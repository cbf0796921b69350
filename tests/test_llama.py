"""The decoder against transformers' Llama: training rows, chats that are read on, and tokens that are replayed."""

import copy

import pytest
import torch
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

from minigpt4.common import device as devices
from minigpt4.conversation import recorded
from minigpt4.conversation.generation import GenerationOptions, generate, stream
from minigpt4.models.int8 import to_int8
from minigpt4.models.kv_cache import KVCache, read
from minigpt4.models.llama import Llama, LlamaConfig
from minigpt4.models.packed import Rows, keys_and_values

BOS, EOS = 1, 2
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
KINDS = {
    "plain": {},
    "shared keys": {"num_key_value_heads": 2},
    "biases, wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "tied": {"tie_word_embeddings": True},
    "stretched positions": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "long contexts": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "rope_theta": 500000.0, **LLAMA3}},
}


def pair(**changes):
    """Theirs, and ours with its weights."""
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(TheirConfig(**(SIZES | {"vocab_size": 50, "initializer_range": 0.3} | changes))).eval()
    for parameter in theirs.parameters():  # norms and biases would be ones and zeros
        parameter.data += 0.1 * torch.randn_like(parameter)
    ours = Llama(LlamaConfig.of(theirs.config.to_dict()))
    ours.load_state_dict(theirs.state_dict())
    return theirs.requires_grad_(False), ours.requires_grad_(False)


@pytest.fixture(params=KINDS)
def both(request):
    return pair(**KINDS[request.param])


def contexts(lengths=(5, 9, 7)):
    width = max(lengths)
    embeds = torch.randn(len(lengths), width, SIZES["hidden_size"], generator=torch.Generator().manual_seed(1))
    mask = torch.stack([(torch.arange(width) >= width - length).long() for length in lengths])
    return embeds, mask


def test_names_are_those_of_the_published_files(both):
    theirs, ours = both
    assert {n: p.shape for n, p in theirs.state_dict().items()} == {n: p.shape for n, p in ours.state_dict().items()}
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == theirs.config.tie_word_embeddings


def test_packed_rows_and_their_gradients(both):
    theirs, ours = both
    lengths, prefix = [4, 7, 2], [BOS, 5, 9]
    rows = [torch.randn(length, SIZES["hidden_size"]) for length in lengths]
    packed, wanted = torch.cat(rows).requires_grad_(), torch.tensor([2, 3, 8, 12])
    way = Rows(lengths, wanted, keys_and_values(ours, prefix))
    found = ours.model(packed, way.positions, way, wanted)
    expected, inputs = [], []
    for row in rows:
        inputs.append(row.clone().requires_grad_())
        begin = theirs.model.embed_tokens(torch.tensor(prefix))
        hidden = theirs.model(inputs_embeds=torch.cat([begin, inputs[-1]])[None], use_cache=False)[0]
        expected.append(hidden[0, len(prefix) :])
    expected = torch.cat(expected)[wanted]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    (found**2).sum().backward()
    (expected**2).sum().backward()
    torch.testing.assert_close(packed.grad, torch.cat([x.grad for x in inputs]), atol=1e-3, rtol=1e-3)


def test_reading_on_is_reading_at_once(both):
    theirs, ours = both
    embeds, mask = contexts()
    hidden = theirs.model(inputs_embeds=embeds, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    cache = KVCache()
    for start, end in ((0, 3), (3, 4), (4, 8), (8, 9)):
        last = read(ours, embeds[:, start:end], mask[:, :end], cache)
        seen = mask[:, end - 1] == 1
        torch.testing.assert_close(last[seen], hidden[0][:, end - 1][seen], atol=2e-5, rtol=1e-4)
    assert cache.length == 9 and last.isfinite().all()


def test_a_head_and_its_source_read_on_apart():
    _, ours = pair()
    embeds, mask = contexts((9,))
    whole, ones = KVCache(), torch.ones(1, 9)
    read(ours, embeds, mask, whole)
    expected = read(ours, embeds, torch.ones(1, 13), copied := whole.head(4))
    head = whole.head(4)
    for _ in range(3):  # the source goes on, within its room and beyond it
        read(ours, torch.randn(1, 100, 32), torch.ones(1, whole.length + 100), whole)
    torch.testing.assert_close(read(ours, embeds, torch.ones(1, 13), head), expected)
    assert copied.length == head.length == 13 and whole.length == 309 and ones.shape[1] == 9


@pytest.fixture(params=["one piece at a time", "recorded"])
def replays(request, monkeypatch):
    """How often recorded work was replayed; on a CPU a recording is the work itself."""
    count = [0]

    def record(work, device):
        for _ in range(3):
            work()

        def replay():
            count[0] += 1
            work()

        return replay

    if request.param == "recorded":
        monkeypatch.setattr(devices, "record", record)
        monkeypatch.setattr(devices, "records", lambda device: True)
        monkeypatch.setattr(recorded, "_MIN_TOKENS", 1)
    return count if request.param == "recorded" else None


def by_transformers(llm, embeds, mask, count):
    options = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": EOS}
    rows = [row.tolist() for row in llm.generate(inputs_embeds=embeds, attention_mask=mask, **options)]
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


@pytest.mark.parametrize("lengths", [(6,), (5, 9, 7)])
def test_tokens_are_those_of_transformers(both, replays, lengths):
    theirs, ours = both
    embeds, mask = contexts(lengths)
    expected = by_transformers(theirs, embeds, mask, 20)
    options = GenerationOptions(do_sample=False, max_new_tokens=20)
    for _ in range(2):  # again with what was kept
        assert [row.ids for row in generate(ours, embeds, mask, options, BOS, EOS)] == expected
    assert replays is None or replays[0] >= max(map(len, expected))


def test_rows_end_at_different_times(replays):
    theirs, ours = pair()
    embeds, mask = contexts()
    full = by_transformers(theirs, embeds, mask, 12)
    each = [GenerationOptions(do_sample=False, max_new_tokens=count) for count in (3, 12, 6)]
    found = [row.ids for row in generate(ours, embeds, mask, each, BOS, EOS)]
    assert found == [row[: o.max_new_tokens] for row, o in zip(full, each, strict=True)]


def test_a_cache_has_what_was_read_even_if_the_reader_leaves(replays):
    _, ours = pair()
    embeds, mask = contexts((6,))
    options, cache = GenerationOptions(do_sample=False, max_new_tokens=20), KVCache()
    answer = stream(ours, embeds, mask, options, BOS, EOS, cache)
    ids = [next(answer)[1] for _ in range(4)]
    answer.close()
    everything = torch.cat([embeds, ours.model.embed_tokens(torch.tensor([ids[:3]]))], 1)
    read(ours, everything, torch.ones(1, 9), anew := KVCache())
    assert cache.length == 9
    for mine, theirs in zip(cache.layers, anew.layers, strict=True):
        for part, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(part[:, :, :9], other, atol=1e-5, rtol=1e-4)


def test_two_answers_at_once_do_not_share_what_is_recorded(replays):
    _, ours = pair()
    embeds, mask = contexts((6, 6))
    options = GenerationOptions(do_sample=False, max_new_tokens=15)
    alone = [generate(ours, embeds[i : i + 1], mask[i : i + 1], options, BOS, EOS)[0].ids for i in range(2)]
    streams = [stream(ours, embeds[i : i + 1], mask[i : i + 1], options, BOS, EOS) for i in range(2)]
    found = [[], []]
    for steps in zip(*streams, strict=False):
        for i, (_, token, _) in enumerate(steps):
            found[i].append(token)
    shortest = min(map(len, alone))
    assert [row[:shortest] for row in found] == [row[:shortest] for row in alone]
    assert len(recorded._kept.get(ours, [])) <= 2


def test_eight_bits(replays):
    _, ours = pair()
    to_int8(ours)
    embeds, mask = contexts()
    options = GenerationOptions(do_sample=False, max_new_tokens=8)
    together = [row.ids for row in generate(ours, embeds, mask, options, BOS, EOS)]
    alone = [
        generate(ours, embeds[i : i + 1, 9 - n :], mask[i : i + 1, 9 - n :], options, BOS, EOS)[0].ids
        for i, n in enumerate((5, 9, 7))
    ]
    assert together == alone


def test_weights_that_moved_are_recorded_anew(monkeypatch):
    monkeypatch.setattr(devices, "record", lambda work, device: work)
    monkeypatch.setattr(devices, "records", lambda device: True)
    _, ours = pair()
    embeds, mask = contexts((6,))
    generate(ours, embeds, mask, GenerationOptions(do_sample=False, max_new_tokens=20), BOS, EOS)
    (kept,) = recorded._kept[ours]
    assert kept.holds(ours, 1, 256) and not kept.holds(ours, 2, 256)
    ours.model.embed_tokens.weight = copy.deepcopy(ours.model.embed_tokens.weight)
    assert not kept.holds(ours, 1, 256)
    to_int8(ours)
    assert not kept.holds(ours, 1, 256)
    copy.deepcopy(ours)  # takes no recording along


def test_a_chat_of_nan_leaves_nothing_to_the_next(replays):
    _, ours = pair()
    embeds, mask = contexts((6,))
    options = GenerationOptions(do_sample=False, max_new_tokens=20)
    expected = generate(ours, embeds, mask, options, BOS, EOS)[0].ids
    generate(ours, torch.full((1, 40, 32), torch.nan), torch.ones(1, 40), options, BOS, EOS)
    assert generate(ours, embeds, mask, options, BOS, EOS)[0].ids == expected


def test_where_there_is_no_room_to_record_it_goes_on_piece_by_piece(monkeypatch):
    def record(work, device):
        raise torch.OutOfMemoryError

    _, ours = pair()
    embeds, mask = contexts((6,))
    options = GenerationOptions(do_sample=False, max_new_tokens=20)
    expected = generate(ours, embeds, mask, options, BOS, EOS)[0].ids
    monkeypatch.setattr(devices, "record", record)
    monkeypatch.setattr(devices, "records", lambda device: True)
    assert generate(ours, embeds, mask, options, BOS, EOS)[0].ids == expected


def test_where_nothing_can_be_recorded_it_is_told(caplog, monkeypatch):
    monkeypatch.setattr(devices, "_CANNOT_RECORD", set())
    monkeypatch.setitem(devices._GRAPHS, "cpu", "Absent")
    here = torch.device("cpu")
    assert not devices.records(here)
    assert devices.record(lambda: None, here) is None and "cpu" in devices._CANNOT_RECORD
    assert "cannot be recorded" in caplog.text


def test_layers_are_compiled_once_whatever_their_number():
    """Behind a prefix, with rows of several lengths; PyTorch gives up a function that it compiled eight times."""
    from torch._dynamo.utils import counters

    _, ours = pair(num_hidden_layers=12)
    for layer in ours.model.layers:
        layer.compile(dynamic=True, backend="eager")
    prefix, before = keys_and_values(ours, [BOS, 5]), counters["stats"]["unique_graphs"]
    for lengths in ([4, 7, 2], [5, 3], [9, 9, 1, 6]):
        packed, wanted = torch.randn(sum(lengths), SIZES["hidden_size"], requires_grad=True), torch.tensor([1, 2])
        way = Rows(lengths, wanted, prefix)
        ours.model(packed, way.positions, way, wanted).sum().backward()
    assert 0 < counters["stats"]["unique_graphs"] - before <= 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, ("'mistral'", "Llama's family")),
        ({"hidden_act": "gelu"}, ("hidden_act", "'gelu'", "'silu'")),
        ({"num_hidden_layers": "two"}, ("num_hidden_layers", "'two'")),
        ({"num_attention_heads": True}, ("num_attention_heads",)),
        ({"num_key_value_heads": 3}, ("3", "multiple")),
        ({"rms_norm_eps": "small"}, ("rms_norm_eps",)),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("rope_scaling", "'dynamic'", "linear")),
        ({"rope_scaling": {"type": "linear"}}, ("rope_scaling", "factor")),
        ({"rope_scaling": 5}, ("rope_scaling",)),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, ("rope_scaling",)),
        ({"rope_scaling": {"type": "linear", "factor": 10**400}}, ("rope_scaling",)),
        ({"rope_theta": 10**400}, ("rope_theta",)),
    ],
)
def test_a_configuration_of_something_else_is_told(changes, words):
    with pytest.raises(ValueError) as error:
        LlamaConfig.of({"model_type": "llama"} | SIZES | changes)
    assert all(word in str(error.value) for word in words)


def test_older_forms_of_a_configuration():
    old = LlamaConfig.of({"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}})
    new = LlamaConfig.of(
        {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}
    )
    assert LlamaConfig.of({"model_type": "llama", "rope_theta": 5e5, "rope_parameters": {}}).rope_theta == 5e5
    assert torch.equal(old.frequencies(), new.frequencies()) and old.num_key_value_heads == 32 and old.head_dim == 128
