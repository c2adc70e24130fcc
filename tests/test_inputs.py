"""Images of every mode and number of bits are read as their 8-bit forms, or refused."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from gen_turbo import load_pipeline
from gen_turbo.config import ConfigError
from gen_turbo.inputs import as_rgb, images_of, open_image

VALUES = np.array([[0, 40, 128, 255]], np.uint8).repeat(4, 0)
GREY = Image.fromarray(VALUES)
WIDE = Image.fromarray(VALUES.astype(np.uint16) * 257)


def _levels(image: Image.Image) -> list[int]:
    assert image.mode == "RGB"
    levels = np.asarray(image)
    assert (levels == levels[..., :1]).all()
    return levels[0, :, 0].tolist()


MODES = {
    "L": GREY,
    "LA": GREY.convert("LA"),
    "La": GREY.convert("LA").convert("La"),
    "P": GREY.convert("P"),
    "PA": GREY.convert("P").convert("PA"),
    "RGB": GREY.convert("RGB"),
    "RGBA": GREY.convert("RGBA"),
    "RGBa": GREY.convert("RGBA").convert("RGBa"),
    "RGBX": GREY.convert("RGBX"),
    "CMYK": GREY.convert("CMYK"),
    "YCbCr": GREY.convert("YCbCr"),
    "HSV": GREY.convert("HSV"),
    "I;16": WIDE,
    "I;16B": Image.frombytes("I;16B", (4, 4), (VALUES.astype(">u2") * 257).tobytes()),
    "F": Image.fromarray((VALUES / 255).astype(np.float32)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_its_8_bit_form(mode):
    """Catches 16 bits that become white, floating numbers that become black, and no way out of La.

    In memory, as `images_of` and a captioning pipeline are given them.
    """
    assert MODES[mode].mode == mode
    assert _levels(as_rgb(MODES[mode])) == VALUES[0].tolist()
    assert _levels(images_of([MODES[mode]])[0]) == VALUES[0].tolist()


def test_two_levels_are_black_and_white():
    """Catches bits that are read as numbers."""
    assert set(_levels(as_rgb(GREY.convert("1")))) <= {0, 255}


@pytest.mark.parametrize(("image", "name"), [(WIDE, "a.png"), (WIDE, "a.tif"), (WIDE, "a.pgm"), (MODES["F"], "a.tif")])
def test_files_of_more_bits_are_their_8_bit_forms(tmp_path, image, name):
    """Catches a format whose 16 bits are read as 32, and known white that is refused with them."""
    image.save(tmp_path / name)
    assert _levels(open_image(tmp_path / name)) == VALUES[0].tolist()


def test_a_colour_that_means_transparent_is_white(tmp_path):
    """Catches a transparent colour that is lost with the 16 bits, or stays at another level."""
    WIDE.save(tmp_path / "wide.png", transparency=40 * 257)
    GREY.save(tmp_path / "grey.png", transparency=40)
    for name in ("wide.png", "grey.png"):
        assert _levels(open_image(tmp_path / name)) == [0, 255, 128, 255]


UNKNOWN = {
    "32 bits": Image.fromarray(VALUES.astype(np.int32)),
    "beyond white": Image.fromarray(VALUES.astype(np.float32)),
    "below black": Image.fromarray((VALUES / -255).astype(np.float32)),
    "no number": Image.fromarray(np.full((2, 2), np.nan, np.float32)),
    "infinite": Image.fromarray(np.full((2, 2), np.inf, np.float32)),
}


@pytest.mark.parametrize("image", UNKNOWN.values(), ids=UNKNOWN)
def test_numbers_without_a_known_white_are_refused(tmp_path, image):
    """Catches a guess, which makes a caption of something else in silence."""
    with pytest.raises(ConfigError):
        as_rgb(image)
    image.save(tmp_path / "a.tif")
    with pytest.raises(ConfigError, match="cannot read the image"):
        open_image(tmp_path / "a.tif")


def test_white_as_zero_is_refused(tmp_path):
    """Catches a negative that passes for an image, where the reader does not look at the tag."""
    WIDE.save(tmp_path / "a.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as file:
        is_set = file.tag_v2[262] == 0
    if not is_set:
        content = bytearray((tmp_path / "a.tif").read_bytes())
        place = content.index(bytes([6, 1, 3, 0, 1, 0, 0, 0, 1, 0]))
        content[place + 8] = 0
        (tmp_path / "a.tif").write_bytes(content)
    with pytest.raises(ConfigError, match="white is zero"):
        open_image(tmp_path / "a.tif")


def test_a_pipeline_reads_what_it_is_given_in_memory(vlm):
    """Catches a conversion that is right for files alone."""
    pipe = load_pipeline("caption", checkpoint=str(vlm), processor=None)
    seen, tower = [], pipe.vlm.model.vision_tower
    handle = tower.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    for image in (GREY, WIDE, MODES["F"]):
        pipe(image.resize((16, 16), Image.Resampling.NEAREST), max_new_tokens=1)
    handle.remove()
    assert len(seen) == 3 and all((values == seen[0]).all() for values in seen)
