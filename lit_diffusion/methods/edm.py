r"""EDM (Karras et al. 2022, "Elucidating the design space of diffusion-based generative models", https://arxiv.org/abs/2206.00364).

.. math::
    D_\theta(x; \sigma) &= c_{skip}\, x + c_{out}\, F_\theta(c_{in}\, x;\, c_{noise}), \qquad
    L = E_\sigma\, \lambda(\sigma)\, \| D_\theta(x_0 + \sigma \epsilon; \sigma) - x_0 \|^2 \\
    c_{skip} &= \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2}, \quad
    c_{out} = \frac{\sigma \sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}}, \quad
    c_{in} = \frac{1}{\sqrt{\sigma^2 + \sigma_d^2}}, \quad
    c_{noise} = \frac{\ln\sigma}{4}, \quad \lambda = \frac{1}{c_{out}^2}

(eqs. 7 and 8) with :math:`\ln\sigma \sim N(P_{mean}, P_{std}^2)`, sampled by Heun's method in the noise level. With the
weight :math:`1 / c_{out}^2`, which every column of the paper's table 1 has, the loss is in the network's own output
space. The table's columns are spelled

========= ================================= ================================== ====================================
key       VP                                VE                                 EDM
========= ================================= ================================== ====================================
process   ``VP`` (0.1, 20, t_min 1e-5)      ``PowerVE`` (0.02, 100, power 0.5) ``PowerVE`` (0.002, 80)
F means   ``eps``                           ``score``                          ``edm``
c_noise   ``time_999``                      ``log_half_sigma``                 ``quarter_log_sigma``
law of t  ``uniform``                       ``log_uniform``                    ``log_normal``
sampler   ``Euler``, ``uniform``            ``Euler``, ``log_snr``             ``Heun``, ``karras:7``
========= ================================= ================================== ====================================

and iDDPM's is :class:`~lit_diffusion.methods.DDPM` with ``schedule: cosine``. A sampler of one column takes a network
of another by :class:`~lit_diffusion.samplers.OnProcess`: the sampler of iDDPM's column is ``Euler`` with the spacing
``iddpm`` on ``PowerVE``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lit_diffusion.backbones.base import Backbone
from lit_diffusion.data.moments import standard_deviation
from lit_diffusion.denoisers import CNoise, NetworkDenoiser, Parametrization
from lit_diffusion.errors import UserError
from lit_diffusion.methods.base import Method
from lit_diffusion.objectives import DenoisingScoreMatching
from lit_diffusion.objectives.denoising import TimeLawName
from lit_diffusion.objectives.laws import TimeLaw
from lit_diffusion.processes import PowerVE, Process
from lit_diffusion.samplers import Heun, Sampler
from lit_diffusion.training.datamodule import DataModule


class EDM(Method):
    r"""EDM: a preconditioned network, noise levels of a log-normal law, Heun's method in the noise level.

    .. math::  D_\theta(x; \sigma) = c_{skip}\, x + c_{out}\, F_\theta(c_{in}\, x;\, c_{noise}), \qquad
               L = E_\sigma\, c_{out}^{-2}\, \| D_\theta(x_0 + \sigma \epsilon; \sigma) - x_0 \|^2

    (Karras et al. 2022, https://arxiv.org/abs/2206.00364, table 1, whose other columns are configurations, too.)

    Args:
        backbone: the network.
        process: null for EDM's, ``PowerVE`` from 0.002 to 80, or another.
        sigma_data: standard deviation of the normalized data; ``auto``: measured.
        parametrization: what the network's output is: ``edm`` (the paper), ``eps``, ``score``, ...
        c_noise: the noise level as the network receives it: ``quarter_log_sigma`` (the paper), or another.
        time_law: the law of the noise levels in training: ``log_normal`` with the paper's P_mean -1.2 and P_std 1.2,
            another by name, or a law with other parameters by its class.
        sampler: default sampler, null for the paper's: Heun's method in 17 steps of ``karras:7`` and the posterior
            mean at the last noise level, its step to 0, 35 evaluations in all.
        **training: optimizer, warm-up and gradient clipping, see :class:`~lit_diffusion.training.module.TrainedModule`.

    Raises:
        UserError: for ``sigma_data: auto`` in Python code, where there are no data to measure.
    """

    def __init__(
        self,
        backbone: Backbone,
        process: Process | None = None,
        sigma_data: float | Literal["auto"] = "auto",
        parametrization: Parametrization = "edm",
        c_noise: CNoise = "quarter_log_sigma",
        time_law: TimeLawName | TimeLaw = "log_normal",
        sampler: Sampler | None = None,
        **training: Any,
    ) -> None:
        if isinstance(sigma_data, str):
            raise UserError(
                "EDM: sigma_data is 'auto'; the command line measures it, in Python code give the number, e.g. 0.5"
            )
        super().__init__(
            NetworkDenoiser(backbone, process or PowerVE(), parametrization, c_noise, sigma_data=sigma_data),
            DenoisingScoreMatching(time_law, weight="raw", reduction="mean"),
            sampler or Heun(steps=17, denoise=True, spacing="karras:7"),
            **training,
        )

    @classmethod
    def resolve_auto(cls, init_args: dict[str, Any], data: DataModule, say: Callable[[str], None]) -> dict[str, Any]:
        """The standard deviation of the training data, too."""
        found = super().resolve_auto(init_args, data, say)
        if init_args["sigma_data"] == "auto":
            deviation, measured = standard_deviation(data.training_values, len(data.train_indices))
            found["sigma_data"] = float(f"{deviation:.4g}")
            say(f"sigma_data {found['sigma_data']:g}: the standard deviation of {measured} training data")
        return found
