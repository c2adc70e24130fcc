"""Distances between two images of the same size."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = Image.Image | npt.NDArray[np.uint8]
"""A PIL image, or (height, width) or (height, width, channels) bytes."""

_PEAK = 255.0
_SSIM_SIGMA_PX = 1.5
_SSIM_RADIUS_PX = 5
_SSIM_K1 = 0.01
_SSIM_K2 = 0.03


def psnr(reference: Pixels, candidate: Pixels) -> float:
    """Peak signal-to-noise ratio of an image to its reference in decibels; infinite where they are equal.

    Both are compared as bytes, so what rounding hides is not counted.

    Raises:
        ValueError: If the sizes differ, or an image is not of bytes.
    """
    a, b = _pair(reference, candidate)
    squared_error = float(np.mean((a - b) ** 2))
    return 10 * math.log10(_PEAK**2 / squared_error) if squared_error else math.inf


def ssim(reference: Pixels, candidate: Pixels) -> float:
    """Mean structural similarity of an image to its reference, at most 1, which only equal images reach.

    Wang, Bovik, Sheikh and Simoncelli, 2004, "Image quality assessment", equation 13, with their Gaussian
    window of 11 x 11 pixels (sigma 1.5); the mean over the pixels whose window lies inside the image, and
    over the channels.

    Raises:
        ValueError: If the sizes differ, an image is not of bytes, or one is smaller than the window.
    """
    a, b = _pair(reference, candidate)
    window = 2 * _SSIM_RADIUS_PX + 1
    if min(a.shape[:2]) < window:
        raise ValueError(f"SSIM needs at least {window} x {window} pixels, got {a.shape[1]} x {a.shape[0]}")
    mean_a, mean_b = _blur(a), _blur(b)
    variance_a = _blur(a * a) - mean_a**2
    variance_b = _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = (_SSIM_K1 * _PEAK) ** 2, (_SSIM_K2 * _PEAK) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return float(np.mean(luminance * structure))


def _pair(reference: Pixels, candidate: Pixels) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    a, b = np.asarray(reference), np.asarray(candidate)
    if a.dtype != np.uint8 or b.dtype != np.uint8:
        raise ValueError(f"images are compared as bytes, got {a.dtype} and {b.dtype}; convert to uint8 first")
    if a.shape != b.shape:
        raise ValueError(f"images of one size are compared, got {a.shape} and {b.shape}; resize one of them")
    return a.astype(np.float64), b.astype(np.float64)


def _blur(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Gaussian mean over the window, along both sides, without padding."""
    offsets = np.arange(-_SSIM_RADIUS_PX, _SSIM_RADIUS_PX + 1)
    weights = np.exp(-(offsets**2) / (2 * _SSIM_SIGMA_PX**2))
    weights /= weights.sum()
    for axis in (0, 1):
        views = np.lib.stride_tricks.sliding_window_view(values, len(weights), axis=axis)
        values = views @ weights
    return values
