"""A few drawn cases of each property in fuzz.py; many more: python -m tests.fuzz --cases 100000."""

import fuzz
import pytest

pytestmark = pytest.mark.usefixtures("confined")


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_property(name):
    count, _ = fuzz.run(name, cases=40, seed=2, keep_on=False)
    assert count >= 30


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("filter_cap", ("minigpt4.common.utils.json.loads", lambda text: [][0])),
        ("cleaning", ("fuzz_data.CLEANED", lambda text: text)),
        ("packing", ("fuzz_model.IGNORE_INDEX", 0)),
        ("trimming", ("fuzz_model.drop_oldest_turn", lambda conv: False)),
        ("pictures", ("minigpt4.datasets.datasets.sample.decode_image", lambda data: data.decode())),
    ],
)
def test_a_property_that_does_not_hold_is_found(monkeypatch, name, change):
    monkeypatch.setattr(*change)
    _, raised = fuzz.run(name, cases=60, seed=2, keep_on=True)
    assert raised
