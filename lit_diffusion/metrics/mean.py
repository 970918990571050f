"""Mean and standard error of values that several processes hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_diffusion.distributed import sum_over_ranks
from lit_diffusion.metrics.gathering import SumsMetric, outside_inference_mode


class Mean(SumsMetric):
    """Number, sum and sum of squares of values, each one datum's."""

    def __init__(self) -> None:
        super().__init__(3)

    def update(self, values: Tensor) -> None:
        """Take in values ``[B]``."""
        values = values.detach().to(self.sums.device, torch.float64)
        with outside_inference_mode():
            count = torch.tensor(float(len(values)), dtype=torch.float64, device=self.sums.device)
            self.sums += torch.stack((count, values.sum(), values.square().sum()))

    def compute(self) -> tuple[float, float, int]:
        """Over all processes: mean, standard error and number; NaN where there is none, the error of a single value."""
        count, total, squares = sum_over_ranks(self.sums).tolist()
        mean = total / count if count else math.nan
        if count < 2:
            return mean, math.nan, int(count)
        variance = max(0.0, squares / count - mean**2) * count / (count - 1.0)
        return mean, math.sqrt(variance / count), int(count)
