import pickle

import numpy as np
from sklearn.datasets import load_digits

from lit_diffusion.data import Digits


def test_digits_are_scikit_learns():
    source, theirs = Digits(), load_digits()
    assert (len(source), source.shape, source.num_grey_levels, source.num_classes) == (1797, (1, 8, 8), 17, 10)
    ours = np.stack([source.value(i) for i in range(len(source))])
    assert ours.dtype == np.uint8
    assert (ours.min(), ours.max()) == (0, 16)
    np.testing.assert_array_equal(ours[:, 0], theirs.images)
    assert [source.label(i) for i in range(len(source))] == theirs.target.tolist()
    assert pickle.loads(pickle.dumps(source)).fingerprint() == source.fingerprint()
