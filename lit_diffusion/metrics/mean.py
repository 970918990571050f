"""Mean and standard error of values over several processes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_diffusion.distributed import sum_over_ranks
from lit_diffusion.metrics.gathering import SumsMetric, outside_inference_mode


class Mean(SumsMetric):
    """The mean of values, one a datum, from their number, sum and sum of squares."""

    def __init__(self) -> None:
        super().__init__(3)

    def update(self, values: Tensor) -> None:
        """Take values ``[B]``."""
        values = values.detach().to(self.sums.device, torch.float64)
        with outside_inference_mode():
            count = torch.tensor(float(len(values)), dtype=torch.float64, device=self.sums.device)
            self.sums += torch.stack((count, values.sum(), values.square().sum()))

    def compute(self) -> tuple[float, float, int]:
        """Mean, standard error and number over all processes; NaN for a mean of none and an error of fewer than two."""
        count, total, squares = sum_over_ranks(self.sums).tolist()
        mean = total / count if count else math.nan
        if count < 2:
            return mean, math.nan, int(count)
        variance = max(0.0, squares / count - mean**2) * count / (count - 1.0)
        return mean, math.sqrt(variance / count), int(count)
