"""A metric as sums over rows and a function of the totals, from which value and bootstrap interval follow."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

NUM_RESAMPLES = 1000


def ratio(totals: np.ndarray) -> np.ndarray:
    """First total by the second one, of totals [..., 2]; nan where the second is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return totals[..., 0] / totals[..., 1]


@dataclass(frozen=True)
class Metric:
    """A metric of one benchmark.

    Args:
        name, variant: what is measured, and whose definition of it.
        sums: what each row contributes, float64 [n, k]; n is every row of the benchmark.
        finish: maps totals [..., k] to values [...]; nan where the metric is not defined.
        chance: the value of guessing, where it is known.
        num_unparsed: answers that this variant cannot parse, where it differs from the benchmark's own rule.
    """

    name: str
    variant: str
    sums: np.ndarray
    finish: Callable[[np.ndarray], np.ndarray] = ratio
    chance: float | None = None
    num_unparsed: int | None = None

    @property
    def value(self) -> float | None:
        """The metric over all rows; None where it is not defined, such as a precision without a single "yes"."""
        value = float(self.finish(self.sums.sum(0)))
        return None if math.isnan(value) else value

    def interval(self, groups: Sequence[Hashable], seed: int = 0) -> tuple[float, float] | None:
        """The percentile bootstrap interval (95 %); rows of one group, such as an image, are drawn together."""
        if self.value is None:
            return None
        names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        sums = np.zeros((len(names), self.sums.shape[1]))
        np.add.at(sums, [names[group] for group in groups], self.sums)
        rng = np.random.default_rng(seed)
        draws = [
            np.bincount(rng.integers(len(sums), size=len(sums)), minlength=len(sums)) for _ in range(NUM_RESAMPLES)
        ]
        low, high = np.nanpercentile(self.finish(np.stack(draws) @ sums), (2.5, 97.5))
        return float(low), float(high)


def mean_metric(name: str, variant: str, values: Sequence[float], chance: float | None = None) -> Metric:
    """The mean of one value for each row."""
    values = np.asarray(values, dtype=np.float64)
    return Metric(name, variant, np.stack([values, np.ones_like(values)], -1), ratio, chance)
