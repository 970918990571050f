"""Evaluation of samples against real data, by all processes together.

The callback :class:`~lit_diffusion.callbacks.evaluator.Evaluator` and the commands ``test``, ``evaluate`` and
``doctor`` all use :class:`Evaluation`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lit_diffusion.denoisers import Guidance
from lit_diffusion.distributed import rank_and_world_size
from lit_diffusion.evaluation.model import GenerativeModel
from lit_diffusion.evaluation.sampling import Shard, generate_in_batches
from lit_diffusion.failures import agree
from lit_diffusion.images import to_uint8
from lit_diffusion.metrics.base import Context, Pair, ScoreOptions
from lit_diffusion.metrics.choice import Choice, choose_metrics
from lit_diffusion.metrics.extractors import CLIP, Extractor
from lit_diffusion.metrics.reference import RealData, Reference, reference_of
from lit_diffusion.metrics.scores import Result, Scores
from lit_diffusion.samplers.base import Sampler, Strays, describe

Batch = tuple[Tensor, np.ndarray, list[str] | None]
"""Numbers of samples, int64 ``[b]``; the samples, uint8 ``[b, H, W, C]`` or points ``[b, D]``; captions, if any."""


@dataclass(frozen=True)
class RealSets:
    """The real data of an evaluation.

    Attributes:
        reference: the data that samples are compared with, or their statistics.
        shape: shape of one datum, ``(C, H, W)`` or ``(D,)``.
        training: the training data, of which samples may be copies; None: the reference.
        mirrored: the training data mirrored left to right, where the model was trained on these, too.
        class_counts: number of data of each class in the reference, the proportions of the samples' classes; None:
            unknown.
    """

    reference: RealData | Reference
    shape: tuple[int, ...]
    training: RealData | None = None
    mirrored: RealData | None = None
    class_counts: tuple[int, ...] | None = None

    @classmethod
    def of(cls, reference: RealData, training: RealData | None = None) -> RealSets:
        """The sets of a model's reference data and its training data, where these are others."""
        return cls(reference, tuple(reference.shape), training)


@dataclass(frozen=True)
class Evaluated:
    """The evaluation of a model's samples.

    Attributes:
        result: the metric values with their protocol.
        kept: the first samples of this process by number, as given to the extractor.
        strays: samples that ended far outside the data's range.
    """

    result: Result
    kept: dict[int, np.ndarray] = field(default_factory=dict)
    strays: Strays = field(default_factory=Strays)


class Evaluation:
    """The measurement of samples against real data, whose features are computed once.

    Args:
        data: the real data.
        extractor: the feature extractor.
        metrics: names of the catalogue; None: the default metrics, where possible.
        options: the metrics' options.
        pairs: number of the samples closest to training data to keep for inspection.
        clip: embeds images and captions; None: the extractor, where it is CLIP.
        say: prints one line.
    """

    def __init__(
        self,
        data: RealSets,
        extractor: Extractor,
        metrics: Sequence[str] | None = None,
        options: ScoreOptions | None = None,
        pairs: int = 0,
        clip: CLIP | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.data = data
        self.extractor = extractor
        self.metrics = metrics
        self.options = options or ScoreOptions()
        self.pairs = pairs
        self.clip = clip
        self.say = say
        self._choice: Choice | None = None
        self._scores: Scores | None = None
        self._references: dict[int, Reference] = {}

    def choose(self, count: int, has_captions: bool = False) -> Choice:
        """The metrics that can be measured with ``count`` samples, without any work.

        Raises:
            UserError: for a requested metric that cannot be measured.
        """
        reference, training = self.data.reference, self.data.training
        real_count = reference.count if isinstance(reference, RealData) else len(reference.features)
        context = Context(
            self.extractor,
            count,
            real_count,
            self.options,
            has_features=real_count > 0,
            has_captions=has_captions,
            training_count=None if training is None else training.count,
        )
        return choose_metrics(self.metrics, context)

    def scores(self, choice: Choice, show_progress: bool = False) -> Scores:
        """The scores, ready to take samples; all processes call it to compute the real features together."""
        if self._scores is None or choice != self._choice:
            data = self.data
            reference = self._known(data.reference, show_progress)
            training = mirrored = None
            if "memorisation" in choice.metrics:
                training = None if data.training is None else self._known(data.training, show_progress)
                mirrored = None if data.mirrored is None else self._known(data.mirrored, show_progress)
            self._scores = Scores(
                choice.metrics,
                self.extractor,
                reference,
                data.shape,
                self.options,
                self.pairs,
                self.clip,
                training,
                mirrored,
                choice.left_out,
            )
            self._choice = choice
        return self._scores

    def _known(self, real: RealData | Reference, show_progress: bool) -> Reference:
        if isinstance(real, Reference):
            return real
        if id(real) not in self._references:
            rank, world_size = rank_and_world_size()
            found = reference_of(real, self.extractor, None, rank, world_size, show_progress, self.say)
            self._references[id(real)] = found
        return self._references[id(real)]

    def of_batches(
        self,
        batches: Iterable[Batch],
        count: int,
        device: torch.device,
        survives: bool = False,
        has_captions: bool = False,
        show_progress: bool = False,
    ) -> Result:
        """Measure batches of samples.

        Args:
            batches: this process's share of the samples.
            count: number of samples over all processes.
            device: device of features and metrics.
            survives: if true, a failure of one metric does not end the others.
            has_captions: true where the batches have captions.
            show_progress: if true, draw a bar while features of real data are computed.
        """
        choice = self.choose(count, has_captions)
        self.extractor.to(device)
        scores = self.scores(choice, show_progress)
        scores.to(device)
        scores.survives = survives
        try:
            for index, data, captions in batches:
                scores.update(data, index, captions)
            return scores.compute(count)
        finally:
            scores.release()

    def of_model(
        self,
        model: GenerativeModel,
        sampler: Sampler,
        count: int,
        seed: int,
        batch_size: int = 250,
        keep: int = 0,
        survives: bool = False,
        show_progress: bool = False,
        guidance: Guidance | None = None,
    ) -> Evaluated:
        """Draw samples ``0 .. count - 1`` of a seed and measure them; all processes call it, each draws its share.

        Args:
            model: the model.
            sampler: the sampler.
            count: number of samples over all processes.
            seed: the samples' seed.
            batch_size: samples at a time on each process.
            keep: number of the first samples to keep.
            survives: if true, a failure of one metric does not end the others.
            show_progress: if true, draw progress bars.
            guidance: makes the denoiser that is sampled, and is in the protocol; None: the model's own denoiser.

        Raises:
            DivergedError: if the sampler ended in NaN.
        """
        mine = Shard.of(count, batch_size, *rank_and_world_size())
        kept: dict[int, np.ndarray] = {}
        evaluations, strays = 0, Strays()

        def drawn() -> Iterator[Batch]:
            nonlocal evaluations, strays
            counts = self.data.class_counts
            for made in generate_in_batches(
                model,
                mine,
                seed,
                batch_size,
                sampler,
                show_progress=show_progress,
                class_counts=counts,
                say=self.say,
                guidance=guidance,
            ):
                evaluations, strays = max(evaluations, made.evaluations), strays + made.strays
                if len(made.indices) == 0:  # A batch that only the other processes need.
                    continue
                data = as_seen(model, made.x)
                kept.update({int(i): data[k] for k, i in enumerate(made.indices) if i < keep})
                yield made.indices, data, None

        result = self.of_batches(drawn(), count, model.device, survives, show_progress=show_progress)
        result.protocol.update(seed=seed, sampler=describe(sampler, model.denoiser), network_evaluations=evaluations)
        if guidance is not None:
            result.protocol["guidance"] = describe(guidance, model.denoiser)
        return Evaluated(result, kept, strays)

    def nearest_training_data(self, pairs: Sequence[Pair]) -> np.ndarray:
        """The training images nearest to samples, mirrored where the mirror image is nearest: ``[n, H, W, C]``."""
        assert self._scores is not None
        training = self.data.training or self.data.reference
        assert isinstance(training, RealData)
        positions = self._scores.subject.training.positions[torch.tensor([pair.neighbour for pair in pairs])]
        images = training.values(positions)
        for row, pair in enumerate(pairs):
            if pair.mirrored:
                images[row] = images[row][:, ::-1].copy()
        return images

    def seconds_a_sample(self, model: GenerativeModel, sampler: Sampler, count: int, seed: int) -> float:
        """Seconds a sample on one process, for sampling and features of ``count`` samples, after a first batch."""
        indices, seconds = torch.arange(count), 0.0
        self.extractor.to(model.device)
        for _ in range(2):
            agree()
            began = time.perf_counter()
            cond = model.condition_by_counts(indices, seed, self.data.class_counts)
            made = model.generate(indices, seed, cond, sampler)
            self.extractor(as_seen(model, made.x.nan_to_num().cpu()))
            seconds = time.perf_counter() - began
        return seconds / count


def as_seen(model: GenerativeModel, x: Tensor) -> np.ndarray:
    """Samples in the form that extractors take: bytes of images, points unchanged."""
    spec = model.require_data_spec()
    return to_uint8(x, spec) if spec.is_image else x.float().numpy()
