"""The doctor's test of attention: it accepts this device, and every wrong kernel is an error."""

import pytest
import torch
from torch.nn import functional

from minigpt4.common import device as devices
from minigpt4.doctor.attention import TOLERANCES, self_test
from minigpt4.doctor.findings import ERROR, OK
from minigpt4.models import packed_attention

CASES = ("causal", "left padding", "next token", "packed rows behind a prefix", "vision, head width 88")
CPU = torch.device("cpu")
sdpa = functional.scaled_dot_product_attention


def means(query, key, value, *args, **settings):
    """What a fused kernel was reported to return."""
    groups = query.shape[1] // value.shape[1]
    return value.mean(2, keepdim=True).repeat_interleave(groups, 1).expand_as(query)


def means_for_odd_widths(query, key, value, *args, **settings):
    wrong = means if query.shape[-1] % 16 else sdpa
    return wrong(query, key, value, *args, **settings)


def means_in_half_precision(query, key, value, *args, **settings):
    wrong = sdpa if query.dtype == torch.float32 else means
    return wrong(query, key, value, *args, **settings)


def inverted_mask(query, key, value, attn_mask=None, *args, **settings):
    """True means masked, as for a kernel of NPUs."""
    return sdpa(query, key, value, None if attn_mask is None else ~attn_mask, *args, **settings)


def no_mask(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **settings):
    return sdpa(query, key, value, None, dropout_p, False, **settings)


def scale_of_a_padded_width(query, key, value, *args, **settings):
    settings["scale"] = (-(-query.shape[-1] // 16) * 16) ** -0.5
    return sdpa(query, key, value, *args, **settings)


def nan(query, *args, **settings):
    return torch.full_like(query, torch.nan)


def test_this_device_computes_attention():
    finding = self_test(CPU)
    assert finding.verdict == OK and not finding.remedy, finding
    dtypes = {torch.float32, torch.float16, devices.default_dtype(CPU)}
    expected = {f"{case}, {str(dtype).removeprefix('torch.')}": dtype for case in CASES for dtype in dtypes}
    assert finding.numbers.keys() == expected.keys()
    assert all(finding.numbers[name] < TOLERANCES[dtype] / 5 for name, dtype in expected.items())
    assert all(case in finding.evidence for case in CASES)


@pytest.mark.parametrize(
    ("kernel", "wrong", "right"),
    [
        (means, [f"{case} in {dtype}" for case in CASES for dtype in ("float32", "float16")], []),
        (means_for_odd_widths, ["head width 88 in float32"], CASES[:-1]),
        (means_in_half_precision, [f"{case} in float16" for case in CASES], ["in float32"]),
        (inverted_mask, ["left padding in float32", "next token in float16"], ["causal", "prefix", "88"]),
        (no_mask, ["causal in float32", "left padding in float32", "prefix in float32"], ["88"]),
        (scale_of_a_padded_width, ["head width 88 in float32"], CASES[:-1]),
        (nan, ["causal in float32", "head width 88 in float16"], []),
    ],
)
def test_a_wrong_kernel_is_an_error(monkeypatch, kernel, wrong, right):
    monkeypatch.setattr(functional, "scaled_dot_product_attention", kernel)
    monkeypatch.setattr(packed_attention, "scaled_dot_product_attention", kernel)
    finding = self_test(CPU)
    failures = finding.evidence.partition("wrong: ")[2]
    assert finding.verdict == ERROR and finding.remedy
    assert not [words for words in wrong if words not in failures], failures
    assert not [words for words in right if words in failures], failures
