"""Does attention on this device compute attention? Every form that the models use, compared with the formula.

Fused kernels of some devices have returned plain means of the values, without any error, for head widths or masks that
they do not support. A run on such a device learns nothing from images or text.

Shapes: B rows, H query heads, G key and value heads, T queries, S keys, P tokens of the prefix, D width of a head.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from minigpt4.common import device as devices
from minigpt4.common.schema import VitConfig
from minigpt4.doctor.findings import ERROR, OK, Finding
from minigpt4.models.packed_attention import Heads, PackedBatch, attention_forward

TOLERANCES = {torch.float32: 0.01, torch.float16: 0.05, torch.bfloat16: 0.05}  # float32 may be TF32 on accelerators
_ROWS, _TOKENS, _PADDING, _PREFIX, _LENGTHS = 2, 100, 30, 20, [60, 37]
_LLAMA = {"heads": 4, "groups": 2, "width": 128}
_EVA = {"heads": 2, "groups": 2, "width": VitConfig.embed_dim // VitConfig.num_heads}  # 88, no multiple of 16
_REMEDY = (
    "Answers and losses would be wrong: use versions of driver, PyTorch and its extension that belong together "
    "(docs/DISTRIBUTED.md), or another run.device."
)


def self_test(device: torch.device) -> Finding:
    """The largest relative error of an output vector in each case, in float32 and in the device's half precisions."""
    numbers, worst, failed = {}, {}, []
    for dtype in dict.fromkeys((torch.float32, torch.float16, devices.default_dtype(device))):
        name = str(dtype).removeprefix("torch.")
        for case, actual, expected in _cases(device, dtype):
            error = ((actual.float().cpu() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()
            numbers[f"{case}, {name}"] = error
            worst[case] = f"{max(numbers[key] for key in numbers if key.startswith(case)):.1g}"
            failed += [] if error <= TOLERANCES[dtype] else [f"{case} in {name}"]  # NaN fails
    evidence = "largest relative errors: " + ", ".join(f"{case} {error}" for case, error in worst.items())
    if failed:
        return Finding("attention", ERROR, f"{evidence}; wrong: {', '.join(failed)}", _REMEDY, numbers)
    return Finding("attention", OK, evidence, numbers=numbers)


@torch.no_grad()
def _cases(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Tensor]]:
    """The name of a case, the device's result and the formula's, vectors in the last dimension."""
    random = torch.Generator().manual_seed(0)
    layer: Any = SimpleNamespace(layer_idx=0, num_key_value_groups=2, is_causal=True)
    query, key, value = whole = _heads(random, dtype, _ROWS, _TOKENS, **_LLAMA)
    causal = torch.ones(_TOKENS, _TOKENS, dtype=torch.bool).tril()
    on_device = [part.to(device) for part in whole]
    yield "causal", attention_forward(layer, *on_device, None)[0].transpose(1, 2), formula(*whole, causal)

    visible = causal.repeat(_ROWS, 1, 1, 1)
    visible[0, ..., :_PADDING] = False  # as for the shorter question of a batch
    found = attention_forward(layer, *on_device, visible.to(device))[0].transpose(1, 2)
    yield "left padding", found[:, :, _PADDING:], formula(*whole, visible)[:, :, _PADDING:]
    last = on_device[0][:, :, -1:], *on_device[1:]
    found = attention_forward(layer, *last, visible[:, :, -1:].to(device))[0].transpose(1, 2)
    yield "next token", found, formula(query[:, :, -1:], key, value, visible[:, :, -1:])

    packed = _heads(random, dtype, 1, _PREFIX + sum(_LENGTHS), **_LLAMA)
    batch = PackedBatch(_LENGTHS, _PREFIX, device)
    found = batch.attend(tuple(part.to(device) for part in packed), None, scaling=None, softcap=None)
    prefix, *rows = zip(*(part.split([_PREFIX, *_LENGTHS], 2) for part in packed), strict=True)
    wholes = [[torch.cat(parts, 2) for parts in zip(prefix, row, strict=True)] for row in rows]
    expected = [formula(*whole, causal[: whole[0].shape[2], : whole[0].shape[2]]) for whole in wholes]
    expected = [expected[0][:, :, :_PREFIX], *(row[:, :, _PREFIX:] for row in expected)]
    yield "packed rows behind a prefix", found.transpose(1, 2), torch.cat(expected, 2)

    tower = _heads(random, dtype, _ROWS, 257, **_EVA)
    found = nn.functional.scaled_dot_product_attention(*(part.to(device) for part in tower))
    yield f"vision, head width {_EVA['width']}", found, formula(*tower, torch.ones(257, 257, dtype=torch.bool))


def _heads(
    random: torch.Generator, dtype: torch.dtype, rows: int, tokens: int, heads: int, groups: int, width: int
) -> Heads:
    """Queries [rows, heads, tokens, width], keys and values [rows, groups, tokens, width], strided as the models'."""
    drawn = torch.randn(rows, tokens, heads + 2 * groups, width, generator=random).to(dtype)
    query, key, value = drawn.transpose(1, 2).split([heads, groups, groups], 1)
    return query * 2, key, value  # sharper than means, which a wrong kernel may return


def formula(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in float32: [B, H, T, D], twice [B, G, S, D] and bool [..., T, S] to [B, H, T, D]."""
    key, value = (part.float().repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    scores = query.float() @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value
