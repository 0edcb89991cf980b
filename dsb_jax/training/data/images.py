"""One encoded image (PNG, JPEG, ...) to the uint8 array that its data set declares: exactly, or not at all.

What a Pillow mode becomes (all else, such as I, F and LAB, has no sure scale to 8 bits, and is refused):

    1, L, P, RGB, RGBX, CMYK, YCbCr   the set's channels by Pillow: gray is repeated, color becomes its luminance
    16-bit gray of a PNG              the high byte, value >> 8, as Pillow itself reads color of 16 bits a channel
    LA, PA, RGBA, transparent color   the same if every pixel is opaque; what a transparent pixel hides is no image
"""

import io
from typing import Any

import numpy as np
from jaxtyping import UInt8

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels

_EIGHT_BITS = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr")
_SIXTEEN_BITS = ("I;16", "I;16B", "I")  # of a PNG, whose gray always fills its scale; a TIFF's may have 12 bits
_WITH_ALPHA = ("LA", "PA", "RGBA")


def decode(encoded: bytes, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "H W C"]:
    """Decodes one image.

    Args:
      encoded: a file's bytes, in any format that Pillow reads.
      shape: (H, W, C) that the data set declares; C is 1, 3 or 4.

    Raises:
      ValueError: if the image is damaged, of another size, or cannot become uint8 unchanged. The message begins with
        "its image", for the caller to say whose.
    """
    from PIL import Image  # here because only sets of encoded images need Pillow

    height, width, channels = shape
    try:
        image = Image.open(io.BytesIO(encoded))
        if image.size == (width, height):
            image.load()
    except Exception as error:  # each of Pillow's formats fails in its own way
        raise ValueError(f"its image is damaged ({type(error).__name__}); prepare the set again.") from error
    if image.size != (width, height):
        raise ValueError(
            f"its image has {image.height}x{image.width} pixels, but the set declares {height}x{width}; prepare a copy "
            "of the set with images of one size."
        )
    return np.asarray(_converted(image, MODES[channels])).reshape(shape)


def _converted(image: Any, mode: str) -> Any:
    from PIL import Image

    if image.format == "PNG" and image.mode in _SIXTEEN_BITS and "transparency" not in image.info:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in _WITH_ALPHA or (image.mode in _EIGHT_BITS and "transparency" in image.info):
        image = image.convert("RGBA")
        if mode != "RGBA" and image.getchannel("A").getextrema()[0] < 255:
            raise ValueError(
                f"its image has transparent pixels, but the set declares {Image.getmodebands(mode)} channel(s); paste "
                "the images onto a background and prepare the set again."
            )
    elif image.mode not in _EIGHT_BITS:
        raise ValueError(
            f"its image has pixels of mode {image.mode!r}, which have no sure scale to 8 bits; scale the images to "
            "0..255 and prepare the set again."
        )
    return image.convert(mode)
