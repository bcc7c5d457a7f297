"""A picture of many glyphs with captions. Shapes: M images of H x W."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS, SCALE, CAPTION = 16, 2, 22
BLACK, RED = (60, 60, 60), (200, 0, 0)


def draw_sheet(
    image_MHW: np.ndarray, captions: Sequence[str], colours: Sequence[tuple[int, int, int]]
) -> Image.Image:
    """The images, black on white, in rows of COLUMNS, each with its caption below."""
    height, width = (side * SCALE for side in image_MHW.shape[1:])
    num_rows = -(-len(image_MHW) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + 4), num_rows * (height + CAPTION)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for number, (image_HW, caption, colour) in enumerate(
        zip(image_MHW, captions, colours, strict=True)
    ):
        row, column = divmod(number, COLUMNS)
        x, y = column * (width + 4) + 2, row * (height + CAPTION)
        sheet.paste(Image.fromarray(255 - image_HW).resize((width, height)), (x, y))
        pen.text((x + width // 2, y + height + CAPTION // 2), caption, colour, font, anchor="mm")
    return sheet
