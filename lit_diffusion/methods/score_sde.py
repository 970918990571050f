r"""Score-based generative modeling through stochastic differential equations (score-SDE).

.. math::  L = E_t\, \lambda(t)\, \tfrac12 E \Big\| s_\theta(\alpha(t) x_0 + \sigma(t) \epsilon, t)
           + \frac{\epsilon}{\sigma(t)} \Big\|^2

(Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 7) in continuous time, for the variance-exploding,
variance-preserving and sub-VP SDEs; with ``weight: g2`` the likelihood weighting of Song, Durkan, Murray and Ermon
2021, https://arxiv.org/abs/2101.09258.
"""

from __future__ import annotations

from typing import Any

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.denoisers import CIn, CNoise, NetworkDenoiser, Parametrization
from lit_diffusion.methods.base import Method
from lit_diffusion.objectives import DenoisingScoreMatching
from lit_diffusion.objectives.denoising import Reduction, TimeLawName, Weight
from lit_diffusion.objectives.laws import TimeLaw
from lit_diffusion.processes import Process
from lit_diffusion.samplers import PredictorCorrector, Sampler


class ScoreSDE(Method):
    r"""Score-SDE: one network for all times, sampled by predictor-corrector or any sampler of the SDE or ODE.

    .. math::  L = E_t\, \lambda(t)\, \tfrac12 E \Big\| s_\theta(\alpha(t) x_0 + \sigma(t) \epsilon, t)
               + \frac{\epsilon}{\sigma(t)} \Big\|^2

    (Song et al. 2021, https://arxiv.org/abs/2011.13456, eq. 7.)

    Args:
        backbone: the network.
        process: ``VE``, ``VP`` or ``SubVP`` and its constants; its ``t_min`` is the smallest time of training.
        parametrization: meaning of the network's output: ``score`` (sigma times the score), ``eps`` (its negative), ...
        c_noise: encoding of the time that the network receives: ``log_sigma`` (the paper's for VE, with Fourier
            features), ``time_999`` (the paper's for VP and sub-VP, with positional features), ``time``, ...
        c_in: ``none`` (the paper) or ``unit_variance``: divide the noisy input by its standard deviation.
        sigma_data: standard deviation of the normalized data, for ``unit_variance`` and ``edm``.
        time_law: law of the training times: ``uniform`` from t_min to t_max; ``importance``, of density g^2/sigma^2
            with an importance weight: the same expected loss, with less variance where the weight is ``g2``;
            ``log_normal`` in the noise level; ``logit_normal`` in the time; or a law with parameters, by its class.
        weight: ``sigma2`` weighs all times alike, ``g2`` is the likelihood weighting, ``raw`` the loss in the network's
            own output space.
        reduction: reduction over the dimensions of a datum: ``half_sum`` (the paper's) or ``mean``.
        sampler: default sampler; null: reverse diffusion with a Langevin corrector, 1000 steps each.
        **training: optimizer, warm-up and gradient clipping, see :class:`~lit_diffusion.training.module.TrainedModule`.

    Raises:
        UserError: for a name that is not one of these, or a law of t that does not fit the process.
    """

    def __init__(
        self,
        backbone: Backbone,
        process: Process,
        parametrization: Parametrization = "score",
        c_noise: CNoise = "log_sigma",
        c_in: CIn = "none",
        sigma_data: float = 0.5,
        time_law: TimeLawName | TimeLaw = "uniform",
        weight: Weight = "sigma2",
        reduction: Reduction = "half_sum",
        sampler: Sampler | None = None,
        **training: Any,
    ) -> None:
        super().__init__(
            NetworkDenoiser(backbone, process, parametrization, c_noise, c_in, sigma_data),
            DenoisingScoreMatching(time_law, weight, reduction),
            sampler or PredictorCorrector(),
            **training,
        )
