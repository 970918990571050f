import itertools
import random

import numpy as np
import pytest
import torch
from scipy import stats

from lit_diffusion import randomness
from lit_diffusion.randomness import (
    SampleNoise,
    keyed_choice,
    keyed_normal,
    keyed_permutation,
    keyed_uniform,
    philox4x32,
    random_words,
    stream_key,
)


def philox_of_the_paper(counter, key):
    """Philox4x32-10 written from Salmon et al. 2011 in Python's own integers: (R0, L0, R1, L1), two 64-bit products."""
    c = list(counter)
    k = [key & 0xFFFFFFFF, key >> 32]
    for round_number in range(10):
        if round_number:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
    return c


# kat_vectors of Random123: counter, key (low word, high word), result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, answer):
    counter, key, answer = ([int(word, 16) for word in words.split()] for words in (counter, key, answer))
    assert philox4x32(torch.tensor(counter), key[0] | key[1] << 32).tolist() == answer
    assert philox_of_the_paper(counter, key[0] | key[1] << 32) == answer


def test_philox_equals_an_independent_one_on_any_counter():
    generator = random.Random(0)
    for _ in range(20):
        key = generator.getrandbits(64)
        counters = [[generator.getrandbits(32) for _ in range(4)] for _ in range(25)]
        got = philox4x32(torch.tensor(counters).view(5, 5, 4), key).view(25, 4)
        assert got.tolist() == [philox_of_the_paper(counter, key) for counter in counters]


def test_the_counter_is_block_draw_and_index():
    index = torch.tensor([0, 5, 2**32 + 5, 2**40 + 3])
    words = random_words(3, "noise", index, 10, draw=7)
    key = stream_key(3, "noise")
    expected = [
        [word for block in range(3) for word in philox_of_the_paper([block, 7, n % 2**32, n >> 32], key)][:10]
        for n in index.tolist()
    ]
    assert words.tolist() == expected
    # The key is part of the runs on disk: were it to change, resumed runs would change their noise.
    assert stream_key(0, "noise") == int.from_bytes(bytes.fromhex(BLAKE2B_OF_0_NOISE), "little")


BLAKE2B_OF_0_NOISE = "b90d5104ab7dfc65"  # printf 0/noise | b2sum -l 64


def test_uniform_numbers_are_uniform():
    u = keyed_uniform(0, "ks", torch.arange(1000), (20, 10))
    assert (u.shape, u.dtype) == ((1000, 20, 10), torch.float32)
    assert stats.kstest(u.double().flatten().numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(keyed_uniform(1, "ks", torch.arange(200_000)).double().numpy(), "uniform").pvalue > 0.01


def test_normal_numbers_are_normal():
    x = keyed_normal(0, "ks", torch.arange(1000), (3, 7, 11)).double().numpy()
    assert x.shape == (1000, 3, 7, 11)
    # The dimensions differ in how they are made: the first half by the cosine, the second by the sine.
    for part in (x.ravel(), x.reshape(1000, -1)[:, :116].ravel(), x.reshape(1000, -1)[:, 116:].ravel()):
        assert stats.kstest(part, "norm").pvalue > 0.01
    assert stats.kstest(keyed_normal(1, "ks", torch.arange(200_000)).double().numpy(), "norm").pvalue > 0.01
    tail = keyed_normal(2, "tail", torch.arange(1000), (1000,)).abs()
    for bound in (3.0, 4.0, 4.5):
        expected = 1e6 * 2 * stats.norm.sf(bound)
        assert abs(int((tail > bound).sum()) - expected) < 4 * expected**0.5


@pytest.mark.parametrize("word", [0, 1, 2**31, 2**32 - 2**8, 2**32 - 1])
def test_no_word_gives_zero_one_or_infinity(monkeypatch, word):
    monkeypatch.setattr(
        randomness, "random_words", lambda seed, stream, index, count, draw=0: torch.full((len(index), count), word)
    )
    for dtype in (torch.float32, torch.float64):
        u = keyed_uniform(0, "s", torch.arange(2), (3,), dtype=dtype)
        assert bool(((u > 0) & (u < 1)).all())
        x = keyed_normal(0, "s", torch.arange(2), (3,), dtype=dtype)
        assert bool(torch.isfinite(x).all())
        assert float(x.abs().max()) < 6.8


def correlation(a, b):
    return abs(np.corrcoef(a.double().flatten().numpy(), b.double().flatten().numpy())[0, 1])


@pytest.mark.parametrize("function", [keyed_uniform, keyed_normal])
def test_streams_seeds_indices_and_draws_are_independent(function):
    def numbers(seed=0, stream="noise", first=0, draw=0):
        return function(seed, stream, first + torch.arange(2000), (16,), draw)

    base = numbers()
    bound = 4.5 / base.numel() ** 0.5
    others = {
        "seed": numbers(seed=1),
        "stream": numbers(stream="time"),
        "draw": numbers(draw=1),
        "far draw": numbers(draw=1000),
        "next index": numbers(first=1),
        "index + 2^32": numbers(first=2**32),
        "neighbouring dimension": base.roll(1, dims=1),
        "other half": base.roll(8, dims=1),
    }
    for name, other in others.items():
        assert bool((base != other).any(1).all()), name
        assert correlation(base, other) < bound, name
        # The size too: the two numbers of a Box-Muller pair share their radius.
        assert correlation((base - base.mean()).square(), (other - base.mean()).square()) < bound, name


@pytest.mark.parametrize("function", [keyed_uniform, keyed_normal])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (3, 5, 7)])
def test_a_batch_equals_each_index_alone_in_any_order(function, shape):
    index = torch.tensor([12, 0, 7, 2**33 + 7, 3, 5, 6])
    together = function(4, "noise", index, shape, 2)
    assert together.shape == (7, *shape)
    for row, n in enumerate(index):
        assert torch.equal(function(4, "noise", n[None], shape, 2)[0], together[row])
    assert torch.equal(function(4, "noise", index.flip(0), shape, 2), together.flip(0))


def test_the_type_asked_for_changes_the_rounding_alone():
    index = torch.arange(100)
    for function in (keyed_uniform, keyed_normal):
        single, double = function(0, "s", index, (8,)), function(0, "s", index, (8,), dtype=torch.float64)
        assert double.dtype == torch.float64
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("length", [1, 2, 7, 1000])
def test_a_permutation_is_one(length):
    permutation = keyed_permutation(0, "order", length, epoch=3)
    assert permutation.dtype == torch.int64
    assert sorted(permutation.tolist()) == list(range(length))
    assert torch.equal(permutation, keyed_permutation(0, "order", length, epoch=3))


def test_permutations_differ_by_epoch_seed_and_stream():
    base = keyed_permutation(0, "order", 1000)
    for other in (
        keyed_permutation(0, "order", 1000, 1),
        keyed_permutation(1, "order", 1000),
        keyed_permutation(0, "x", 1000),
    ):
        assert int((base == other).sum()) < 10  # A fixed point on average.
        assert abs(stats.spearmanr(base, other).statistic) < 0.15


def test_every_permutation_is_as_likely():
    counts = np.zeros(24)
    order = {p: n for n, p in enumerate(itertools.permutations(range(4)))}
    for epoch in range(2400):
        counts[order[tuple(keyed_permutation(0, "order", 4, epoch).tolist())]] += 1
    assert stats.chisquare(counts).pvalue > 0.01


def test_sample_noise_is_a_function_of_seed_index_and_request():
    def requests(indices):
        noise = SampleNoise(9, torch.tensor(indices), (2, 3))
        return [noise.normal(), noise.uniform(), noise.uniform(()), noise.normal()]

    together = requests([4, 0, 11, 2])
    assert [tuple(x.shape) for x in together] == [(4, 2, 3), (4, 2, 3), (4,), (4, 2, 3)]
    for row, n in enumerate([4, 0, 11, 2]):
        assert all(torch.equal(a[0], b[row]) for a, b in zip(requests([n]), together, strict=True))
    # Request k is draw k of the stream "sample".
    index = torch.tensor([4, 0, 11, 2])
    assert torch.equal(together[0], keyed_normal(9, "sample", index, (2, 3), 0))
    assert torch.equal(together[1], keyed_uniform(9, "sample", index, (2, 3), 1))
    assert torch.equal(together[2], keyed_uniform(9, "sample", index, (), 2))
    assert torch.equal(together[3], keyed_normal(9, "sample", index, (2, 3), 3))


def test_sample_noise_in_double_precision():
    noise = SampleNoise(0, torch.arange(3), (2,), dtype=torch.float64)
    assert {noise.normal().dtype, noise.uniform().dtype} == {torch.float64}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_bits_are_the_same_on_a_gpu():
    index = torch.arange(1000) * 12_345_678_901
    assert torch.equal(random_words(1, "s", index.cuda(), 33, 5).cpu(), random_words(1, "s", index, 33, 5))
    assert torch.equal(keyed_uniform(1, "s", index.cuda(), (9,)).cpu(), keyed_uniform(1, "s", index, (9,)))
    torch.testing.assert_close(keyed_normal(1, "s", index.cuda(), (9,)).cpu(), keyed_normal(1, "s", index, (9,)))


# ---- choices -----------------------------------------------------------------------------------------------------


def test_a_choice_has_the_probabilities_of_its_weights():
    weights = torch.tensor([96, 0, 4, 0])
    index = torch.arange(20_000)
    chosen = keyed_choice(3, "x", index, weights)
    assert torch.bincount(chosen, minlength=4).tolist()[1::2] == [0, 0]
    assert abs(float((chosen == 2).double().mean()) - 0.04) < 4 * (0.04 * 0.96 / len(index)) ** 0.5
    assert torch.equal(keyed_choice(3, "x", index[7:9], weights), chosen[7:9])
    assert not torch.equal(keyed_choice(4, "x", index, weights), chosen)
    assert keyed_choice(0, "x", index, torch.tensor([0, 1])).unique().tolist() == [1]
