"""Random draws: reproducible, and with the distributions that the options name."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dali_saliencymix import MODES, draw_mix_params, draw_params

COUNT = 40_000


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 256])
def test_partners_are_a_permutation_and_lam_one_weight_each(batch_size):
    source_index, lam = draw_params(rng(), batch_size)
    assert sorted(source_index.tolist()) == list(range(batch_size))
    assert source_index.dtype == np.int64
    assert lam.shape == (batch_size,)
    assert lam.dtype == np.float32
    assert lam.min() >= 0
    assert lam.max() <= 1


def test_partners_are_uniform():
    permutations = np.array([draw_params(rng(seed), 4)[0] for seed in range(2000)])
    for place in range(4):
        shares = np.bincount(permutations[:, place], minlength=4) / 2000
        # Four standard errors of a share of 1/4 in 2000 draws.
        assert shares.tolist() == pytest.approx([0.25] * 4, abs=4 * math.sqrt(0.25 * 0.75 / 2000))


def test_equal_seeds_repeat_and_others_differ():
    first, again, other = (draw_params(rng(seed), 64, alpha=0.4, prob=0.7) for seed in (1, 1, 2))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def test_a_generator_goes_on_from_call_to_call():
    generator = rng()
    assert not np.array_equal(draw_params(generator, 64)[1], draw_params(generator, 64)[1])


def test_by_default_every_image_is_mixed_with_a_uniform_weight():
    _, lam = draw_params(rng(), COUNT)
    assert (lam < 1).all()
    shares = np.histogram(lam, bins=10, range=(0, 1))[0] / COUNT
    assert shares.tolist() == pytest.approx([0.1] * 10, abs=4 * math.sqrt(0.1 * 0.9 / COUNT))


@pytest.mark.parametrize("prob", [0.0, 0.1, 0.5, 1.0])
def test_prob_is_the_share_of_mixed_images(prob):
    _, lam = draw_params(rng(), COUNT, prob=prob)
    assert (lam < 1).mean() == pytest.approx(prob, abs=4 * math.sqrt(prob * (1 - prob) / COUNT))


def test_prob_is_decided_for_each_image_whatever_its_weight():
    _, lam = draw_params(rng(), COUNT, prob=0.5)
    mixed = lam[lam < 1]
    assert mixed.mean() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / mixed.size))
    # Images are decided independently: both images of a pair are mixed in a quarter of the pairs.
    both = (lam < 1).reshape(-1, 2).all(axis=1)
    assert both.mean() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / both.size))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2, np.float32(5)])
def test_weights_have_the_mean_and_variance_of_their_beta_law(alpha):
    _, lam = draw_params(rng(), COUNT, alpha=alpha)
    variance = 1 / (4 * (2 * alpha + 1))
    # Four standard errors. That of the variance is at most the one of a normal distribution, since the kurtosis of
    # Beta(alpha, alpha) is below 3.
    assert lam.mean() == pytest.approx(0.5, abs=4 * math.sqrt(variance / COUNT))
    assert lam.var() == pytest.approx(variance, rel=4 * math.sqrt(2 / COUNT))


@pytest.mark.parametrize("alpha", [0, -1.0, math.nan, math.inf, "1", None, True, [1.0]])
def test_alpha_must_be_a_positive_finite_number(alpha):
    with pytest.raises(ValueError, match="alpha must be a positive number, got"):
        draw_params(rng(), 4, alpha=alpha)


@pytest.mark.parametrize("prob", [-0.01, 1.01, math.nan, math.inf, "0.5", None, True])
def test_prob_must_be_a_number_in_0_to_1(prob):
    with pytest.raises(ValueError, match=r"prob must be in \[0, 1\], got"):
        draw_params(rng(), 4, prob=prob)


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        draw_params(rng(), 4, 1.0)


POLICY = {"saliencymix": 2.0, "mixup": 1.0, "cutmix": 1.0}


@pytest.mark.parametrize("batch_size", [1, 2, 5, 256])
@pytest.mark.parametrize("choose", ["sample", "batch"])
def test_mix_params_are_the_arguments_of_mix(batch_size, choose):
    source_index, lam, mode, point = draw_mix_params(rng(), batch_size, modes=POLICY, choose=choose)
    assert sorted(source_index.tolist()) == list(range(batch_size))
    assert (lam.shape, lam.dtype) == ((batch_size,), np.float32)
    assert mode.shape == (batch_size,)
    assert set(mode) <= {0, 1, 2}
    assert choose == "sample" or len(set(mode)) == 1
    assert point.shape == (batch_size, 2)
    assert ((point >= 0) & (point < 1)).all()


@pytest.mark.parametrize("choose", ["sample", "batch"])
def test_modes_come_as_often_as_their_weights_say(choose):
    generator, size = rng(3), 4000 if choose == "sample" else 1
    draws = [draw_mix_params(generator, size, modes=POLICY, choose=choose) for _ in range(4000 // size)]
    mode = np.concatenate([params.mode for params in draws])
    for name, share in (("saliencymix", 0.5), ("mixup", 0.25), ("cutmix", 0.25)):
        # Four standard errors of a share in 4000 draws.
        expected = pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 4000))
        assert (mode == MODES.index(name)).mean() == expected


def test_each_mode_has_its_own_alpha_and_prob_leaves_some_unmixed():
    alpha = {"saliencymix": 100.0, "mixup": 0.01, "cutmix": 1.0}
    _, lam, mode, _ = draw_mix_params(rng(4), COUNT, modes=POLICY, alpha=alpha, prob=0.75)
    # Four standard errors; Beta(0.01, 0.01) itself rounds to 1 in half of the cases.
    assert (lam == 1)[mode == 0].mean() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / (COUNT / 2)))
    spread = [lam[(mode == MODES.index(name)) & (lam < 1)].std() for name in ("saliencymix", "cutmix")]
    assert spread == pytest.approx([math.sqrt(0.25 / 201), math.sqrt(1 / 12)], rel=0.05)
    assert ((lam < 0.01) | (lam > 0.99))[mode == MODES.index("mixup")].mean() > 0.9


def test_points_are_uniform_and_their_axes_independent():
    point = draw_mix_params(rng(5), COUNT, modes=POLICY).point
    counts, _, _ = np.histogram2d(*point.T, bins=4, range=[[0, 1], [0, 1]])
    # Five standard errors of a count in one of 16 cells.
    assert np.abs(counts - COUNT / 16).max() < 5 * math.sqrt(COUNT * 15 / 256)


def test_equal_seeds_repeat_a_policy_and_others_differ():
    first, again, other = (draw_mix_params(rng(seed), 64, modes=POLICY, prob=0.7) for seed in (1, 1, 2))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": {}}, r"modes must map mode names \(saliencymix, cutmix, mixup\) to weights, got {}"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
    ],
    ids=str,
)
def test_wrong_policies_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        draw_mix_params(**{"rng": rng(), "batch_size": 4, "modes": POLICY, **options})
