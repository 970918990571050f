r"""Flow matching on straight lines (Lipman et al. 2023, "Flow matching for generative modeling",
https://arxiv.org/abs/2210.02747; Liu et al. 2023, "Flow straight and fast", https://arxiv.org/abs/2209.03003).

.. math::  x_t = (1 - t)\, x_0 + t\, \epsilon, \qquad
           L = E_t\, E_{(x_0, \epsilon) \sim \pi} \big\| v_\theta(x_t, t) - (\epsilon - x_0) \big\|^2

The minimizer is :math:`v(x, t) = E[\epsilon - x_0 \mid x_t = x]`, and the ODE :math:`\dot x = v(x, t)` takes noise at
t = 1 to data at t = 0 (Lipman's time runs the other way). The noise is drawn on its own, or paired with the data of its
batch by optimal transport (Tong et al. 2024, https://arxiv.org/abs/2302.00482; Pooladian et al. 2023,
https://arxiv.org/abs/2304.14772).
"""

from __future__ import annotations

from typing import Any

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.denoisers import CNoise, NetworkDenoiser
from lit_diffusion.errors import require_choice
from lit_diffusion.methods.base import Method
from lit_diffusion.objectives.coupling import COUPLINGS, CouplingName
from lit_diffusion.objectives.denoising import TimeLawName
from lit_diffusion.objectives.laws import TimeLaw
from lit_diffusion.processes import Flow
from lit_diffusion.samplers import Heun, Sampler


class FlowMatching(Method):
    """Flow matching: a network that predicts the velocity of straight lines, sampled by its ODE.

    Args:
        backbone: the network.
        c_noise: the time as the network receives it: ``time_999``, which positional features suit, or ``time``.
        time_law: the law of the training times: ``uniform``; ``logit_normal``, more of them in the middle, where the
            velocity is hardest to tell (Esser et al. 2024, https://arxiv.org/abs/2403.03206); or a law with parameters,
            by its class.
        coupling: ``none``, or ``optimal_transport`` to pair noise with the data of each global batch by least squared
            distance, inside a class where the backbone is class-conditional; held-out data have their own noise. Such a
            model is sampled by its ODE: ``heun``, ``euler``, ``ode``, ``ddim``.
        sampler: default sampler, null for Heun's method in 25 steps, 50 evaluations.
        **training: optimizer, warm-up and gradient clipping, see :class:`~lit_diffusion.training.module.TrainedModule`.
    """

    def __init__(
        self,
        backbone: Backbone,
        c_noise: CNoise = "time_999",
        time_law: TimeLawName | TimeLaw = "uniform",
        coupling: CouplingName = "none",
        sampler: Sampler | None = None,
        **training: Any,
    ) -> None:
        require_choice("", "coupling", coupling, COUPLINGS)
        super().__init__(
            NetworkDenoiser(backbone, Flow(), "velocity", c_noise),
            COUPLINGS[coupling](time_law, weight="raw", reduction="mean"),
            sampler or Heun(steps=25),
            **training,
        )
