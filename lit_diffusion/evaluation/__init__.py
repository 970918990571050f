"""Evaluation of any model, with or without a Trainer: metrics of its samples, and bits per dimension.

.. code-block:: python

    data = RealSets.of(RealData.of(source, torch.arange(len(source)), "all"))
    evaluation = Evaluation(data, load_extractor("inception", data.shape))
    print(evaluation.of_model(method, method.sampler, count=50_000, seed=0).result.values)

Free of Lightning: a model is a :class:`~lit_diffusion.methods.base.Method`, or any other :class:`GenerativeModel`.
"""

from lit_diffusion.evaluation.measure import Evaluated, Evaluation, RealSets
from lit_diffusion.evaluation.model import GenerativeModel

__all__ = ["Evaluated", "Evaluation", "GenerativeModel", "RealSets"]
