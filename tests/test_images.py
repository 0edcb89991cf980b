"""Every mode of an encoded image becomes exactly what it should, or is refused: nothing is clipped or uncovered."""

import io

import numpy as np
import pytest
from PIL import Image

from dsb_jax.training.data.images import decode

SIXTEEN = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
GRAY = (SIXTEEN >> 8).astype(np.uint8)
COLOR = np.stack([GRAY, GRAY.T, GRAY[::-1]], axis=-1)
HALF_CLEAR = np.where(GRAY > 127, 255, 100).astype(np.uint8)
OPAQUE = np.full_like(GRAY, 255)


def encoded(image, form="PNG", **options):
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, form, **options)
    return file.getvalue()


def bands(*channels):
    return Image.merge({2: "LA", 4: "RGBA"}[len(channels)], [Image.fromarray(channel) for channel in channels])


def repeated(gray):
    return np.repeat(gray[..., None], 3, axis=-1)


def luminance(color):
    weights = np.array([19595, 38470, 7471])  # of ITU-R 601-2, as Pillow rounds it
    return (color.astype(int) @ weights + 0x8000 >> 16).astype(np.uint8)


PALETTE = Image.fromarray(COLOR).quantize(16)
OF_PALETTE = np.asarray(PALETTE.getpalette(), np.uint8).reshape(-1, 3)[np.asarray(PALETTE)]
CMYK = np.concatenate([COLOR, np.zeros((8, 8, 1), np.uint8)], axis=-1)


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (GRAY, {}, GRAY[..., None]),
        (GRAY, {}, repeated(GRAY)),
        (COLOR, {}, COLOR),
        (COLOR, {}, luminance(COLOR)[..., None]),
        (SIXTEEN, {}, GRAY[..., None]),  # Pillow's own conversion makes 63 of these 64 pixels 255
        (SIXTEEN, {}, repeated(GRAY)),
        (GRAY > 127, {}, np.where(GRAY > 127, 255, 0)[..., None]),
        (PALETTE, {}, OF_PALETTE),
        (PALETTE, {"transparency": bytes([255] * 16)}, OF_PALETTE),
        (bands(GRAY, OPAQUE), {}, GRAY[..., None]),
        (bands(GRAY, HALF_CLEAR), {}, np.dstack([repeated(GRAY), HALF_CLEAR])),
        (bands(*np.moveaxis(COLOR, 2, 0), OPAQUE), {}, COLOR),
        (bands(*np.moveaxis(COLOR, 2, 0), HALF_CLEAR), {}, np.dstack([COLOR, HALF_CLEAR])),
        (COLOR, {"transparency": (1, 2, 3)}, COLOR),  # no pixel has this color
        (Image.frombytes("CMYK", (8, 8), CMYK.tobytes()), {"form": "TIFF"}, 255 - COLOR),
    ],
)
def test_what_fits_8_bits_is_converted_exactly(image, options, expected):
    got = decode(encoded(image, **options), expected.shape)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("image", "options", "channels", "message"),
    [
        (SIXTEEN.astype(np.int32), {"form": "TIFF"}, 1, "mode 'I', which have no sure scale to 8 bits"),
        (SIXTEEN.astype(np.float32), {"form": "TIFF"}, 1, "mode 'F'"),
        (SIXTEEN, {"form": "TIFF"}, 1, "mode 'I;16'"),  # as Pillow opens one of 12 bits, too
        (Image.frombytes("I;16B", (8, 8), SIXTEEN.astype(">u2").tobytes()), {"form": "TIFF"}, 1, "mode 'I;16B'"),
        (SIXTEEN, {"transparency": 0}, 1, "mode 'I;16'"),
        (Image.frombytes("LAB", (8, 8), COLOR.tobytes()), {"form": "TIFF"}, 3, "mode 'LAB'"),
        (bands(GRAY, HALF_CLEAR), {}, 1, "transparent pixels, but the set declares 1 channel"),
        (bands(*np.moveaxis(COLOR, 2, 0), HALF_CLEAR), {}, 3, "transparent pixels, but the set declares 3 channel"),
        (PALETTE, {"transparency": 3}, 3, "transparent pixels"),
        (GRAY > 127, {"transparency": 0}, 1, "transparent pixels"),
        (COLOR, {"transparency": tuple(COLOR[0, 0].tolist())}, 3, "transparent pixels"),
    ],
)
def test_what_does_not_is_refused_with_the_reason(image, options, channels, message):
    with pytest.raises(ValueError, match=f"its image has .*{message}.*; .* prepare the set again"):
        decode(encoded(image, **options), (8, 8, channels))


@pytest.mark.parametrize("data", [b"", b"junk", encoded(COLOR)[:-30], encoded(COLOR, "JPEG")[:-40], None])
def test_damaged_images_are_refused(data):
    with pytest.raises(ValueError, match=r"its image is damaged \(\w+\); prepare"):
        decode(data, (8, 8, 3))


@pytest.mark.parametrize("shape", [(4, 16, 1), (16, 4, 1), (64, 1, 1), (8, 9, 1), (1, 1, 1)])
def test_an_image_of_another_size_is_never_reshaped(shape):
    with pytest.raises(ValueError, match=f"has 8x8 pixels, but the set declares {shape[0]}x{shape[1]}"):
        decode(encoded(GRAY), shape)


def test_height_comes_before_width():
    image = np.arange(12, dtype=np.uint8).reshape(3, 4)
    np.testing.assert_array_equal(decode(encoded(image), (3, 4, 1))[..., 0], image)
    with pytest.raises(ValueError, match="has 3x4 pixels, but the set declares 4x3"):
        decode(encoded(image), (4, 3, 1))
