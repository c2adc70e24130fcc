"""Distances between images."""

import math

import numpy as np
import pytest

from gen_turbo.metrics.image import psnr, ssim


def _noise(seed: int = 0, shape: tuple[int, ...] = (24, 20, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_psnr_of_a_known_error() -> None:
    """Catches a PSNR that subtracts bytes and wraps around, or takes the wrong peak."""
    reference = np.full((8, 8, 3), 10, np.uint8)
    assert psnr(reference, reference + 5) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(reference + 5, reference) == pytest.approx(20 * math.log10(255 / 5))


def test_psnr_of_equal_images_is_infinite() -> None:
    """Catches an epsilon under the logarithm, which makes equal images look merely close."""
    assert psnr(_noise(), _noise()) == math.inf


def test_psnr_refuses_another_size() -> None:
    """Catches broadcasting of a gray image over a coloured one."""
    with pytest.raises(ValueError, match="resize"):
        psnr(_noise(), _noise(shape=(24, 20, 1)))


def test_psnr_refuses_floats() -> None:
    """Catches images in [0, 1] measured against a peak of 255."""
    with pytest.raises(ValueError, match="uint8"):
        psnr(_noise(), _noise() / 255)


def test_ssim_is_one_only_for_equal_images() -> None:
    """Catches a similarity of means alone, which a shuffled image passes."""
    shuffled = np.random.default_rng(1).permutation(_noise().reshape(-1, 3)).reshape(24, 20, 3)
    assert ssim(_noise(), _noise()) == pytest.approx(1, abs=1e-12)
    assert ssim(_noise(), shuffled) < 0.2


def test_ssim_agrees_with_the_loop_of_the_paper() -> None:
    """Catches a window that is not normalised, or variances taken about zero."""
    a, b = _noise(0, (12, 13)), _noise(2, (12, 13))
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / 4.5)
    window = np.outer(line, line) / line.sum() ** 2
    values = []
    for y in range(5, 7):
        for x in range(5, 8):
            p, q = (v[y - 5 : y + 6, x - 5 : x + 6].astype(float) for v in (a, b))
            mp, mq = (window * p).sum(), (window * q).sum()
            vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
            cov = (window * (p - mp) * (q - mq)).sum()
            c1, c2 = 2.55**2, 7.65**2
            values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert ssim(a, b) == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_refuses_a_image_below_the_window() -> None:
    """Catches an empty mean that silently gives nan."""
    with pytest.raises(ValueError, match="11 x 11"):
        ssim(_noise(shape=(10, 30, 3)), _noise(shape=(10, 30, 3)))
