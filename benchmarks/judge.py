"""An independent judge of generated 8 x 8 digits; it knows nothing of this project.

Frechet distances to scikit-learn's digits in pixels and in the hidden units of a classifier trained on them, the share
of samples that it is confident about, the spread of its classes, and the share of near copies of training images.
"""

from __future__ import annotations

import warnings

import numpy as np
from scipy.linalg import LinAlgWarning, sqrtm
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Frechet distance between the Gaussians of two sets ``[N, D]``."""
    mean = a.mean(0) - b.mean(0)
    first, second = np.cov(a.T), np.cov(b.T)
    # A little on the diagonal: pixels that never change make the product singular.
    ridge = 1e-9 * np.eye(len(first))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LinAlgWarning)
        root = sqrtm((first + ridge) @ (second + ridge)).real
    return float(mean @ mean + np.trace(first + second - 2.0 * root))


def judge(samples: np.ndarray) -> dict[str, float]:
    """What the judge says of ``[N, 64]`` in [0, 1]."""
    real, labels = load_digits(return_X_y=True)
    real = real / 16.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier = MLPClassifier((64,), random_state=0).fit(real, labels)

    def hidden(x: np.ndarray) -> np.ndarray:
        return np.maximum(x @ classifier.coefs_[0] + classifier.intercepts_[0], 0.0)

    probability = classifier.predict_proba(samples)
    share = np.bincount(probability.argmax(1), minlength=10) / len(samples)
    between = cdist(real, real)
    np.fill_diagonal(between, np.inf)
    copies = cdist(samples, real).min(1) < np.percentile(between.min(1), 1)
    return {
        "frechet_pixels": frechet(samples, real),
        "frechet_hidden": frechet(hidden(samples), hidden(real)),
        "confident": float((probability.max(1) > 0.9).mean()),
        "classes": float(np.exp(-(share * np.log(share + 1e-12)).sum())),
        "copies": float(copies.mean()),
    }
