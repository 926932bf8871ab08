"""Pictures: everything that the scripts write as PNG or show in TensorBoard, drawn with NumPy and
Pillow.

    row = strip([("image", image), ("truth", overlay(image, labels, palette)), ("prediction",
    colorize(pred, palette))]) picture = stack([row, legend(names, palette, row.shape[1])])
    confusion = heatmap(matrix, names, names, title="rows: truth, columns: prediction",
    text="{:.0%}")

Every function is pure. A picture is a uint8 RGB array (H, W, 3), also where the arguments ask for
one.
"""

import functools
import math

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, WHITE, GREY, FRAME = (34, 34, 34), (255, 255, 255), (222, 222, 222), (150, 150, 150)
SEQUENTIAL = (
    (36, 18, 72),
    (52, 66, 132),
    (34, 124, 142),
    (72, 180, 120),
    (172, 218, 84),
    (252, 240, 120),
)
DIVERGING = ((24, 66, 140), (92, 152, 204), (248, 248, 248), (232, 124, 98), (150, 20, 42))
GAP, FONT = 8, 14  # pixels: the space between things, the size of most text
CARD = 40  # sizes of text that fit into a strip's width at least: TensorBoard shows it 350 wide
MAX_NAME = (
    200  # pixels: a longer name is shortened, so that one name cannot push a picture out of shape
)
MAX_NUMBERED = 20  # classes: a heatmap with more of them has no room for numbers in its cells


@functools.cache
def _font(size):
    return ImageFont.load_default(size=size)


def _readable(width):
    """Size of text in a picture so many pixels wide, at most twice the usual one."""
    return min(2 * FONT, max(FONT, round(width / CARD)))


def _shorten(text, font, width):
    """The longest beginning of `text` that fits into `width` pixels, ended by dots when something
    is cut off."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def _page(height, width):
    page = Image.new("RGB", (int(width), int(height)), WHITE)
    return page, ImageDraw.Draw(page)


def _known(labels, palette):
    """Class ids (H, W) with one common id, K, for everything that is not a class."""
    return np.where((labels >= 0) & (labels < len(palette)), labels.astype(np.int64), len(palette))


def colorize(labels, palette):
    """Labels (H, W) in the colours of the palette (K, 3); ids outside 0..K-1, such as 255 for
    ignore, become black."""
    return np.array([*palette, (0, 0, 0)], np.uint8)[_known(labels, palette)]


def overlay(image, labels, palette, alpha=0.55):
    """Class colours over the image (H, W, 3), labels (H, W), palette (K, 3); ignored pixels show
    the plain image.

    `alpha` is the share of the class colour, 0..1. Borders between classes are a fine light line.
    """
    ids, border = _known(labels, palette), np.zeros(labels.shape, bool)
    blended = np.rint(alpha * colorize(labels, palette) + (1 - alpha) * image)
    border[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    border[1:] |= ids[1:] != ids[:-1]
    blended[border] = (
        blended[border] + WHITE
    ) / 2  # pure white would hide what is as thin as a pole
    return np.where((ids < len(palette))[..., None], blended, image).astype(np.uint8)


def strip(panels, height=None):
    """Panels (caption, picture) side by side, scaled to the same `height` in pixels, by default
    that of the tallest."""
    height = height or max(picture.shape[0] for _, picture in panels)
    widths = [max(1, round(picture.shape[1] * height / picture.shape[0])) for _, picture in panels]
    whole = sum(widths) + GAP * (len(panels) - 1)
    font = _font(_readable(whole))
    bar = font.size + GAP
    page, draw = _page(bar + height, whole)
    left = 0
    for (caption, picture), width in zip(panels, widths):
        # enlarging by the nearest pixel invents no colours, which in a label map would be colours
        # of other classes
        method = cv2.INTER_AREA if height < picture.shape[0] else cv2.INTER_NEAREST
        page.paste(
            Image.fromarray(cv2.resize(picture, (width, height), interpolation=method)), (left, bar)
        )
        draw.text(
            (left + width / 2, bar / 2), _shorten(caption, font, width), INK, font, anchor="mm"
        )
        left += width + GAP
    return np.array(page)


def stack(rows):
    """Pictures of any size below each other, the narrow ones padded with white on the right."""
    width = max(row.shape[1] for row in rows)
    padded = [
        np.pad(row, ((0, GAP), (0, width - row.shape[1]), (0, 0)), constant_values=255)
        for row in rows
    ]
    return np.concatenate(padded)[:-GAP]


def legend(names, palette, width):
    """A box of colour before each of the K names, palette (K, 3), wrapped to `width` pixels."""
    box = _readable(width)
    font, line = _font(box), box + GAP
    longest = min(MAX_NAME * box // FONT, math.ceil(max(map(font.getlength, names))))
    step = min(width, box + longest + 3 * GAP)
    lines = math.ceil(len(names) / (width // step))
    columns = math.ceil(
        len(names) / lines
    )  # as many names in the last line as in the others, or nearly
    page, draw = _page(lines * line, width)
    for i, name in enumerate(names):
        left, top = i % columns * step, i // columns * line + GAP // 2
        draw.rectangle((left, top, left + box, top + box), tuple(map(int, palette[i])), FRAME)
        draw.text(
            (left + box + GAP, top + box / 2),
            _shorten(name, font, step - box - 2 * GAP),
            INK,
            font,
            anchor="lm",
        )
    return np.array(page)


def _ramp(values, anchors, low, high):
    """Values (...) to colours (..., 3) along the anchors, from `low` to `high`; NaN is grey."""
    missing = np.isnan(values)
    place = np.clip((np.where(missing, low, values) - low) / (high - low), 0, 1)
    stops = np.linspace(0, 1, len(anchors))
    colors = np.stack([np.interp(place, stops, channel) for channel in zip(*anchors)], axis=-1)
    colors[missing] = GREY
    return np.rint(colors).astype(np.uint8)


def _name_list(names, cell, anchor):
    """Names below each other, one per `cell` pixels, FONT spare pixels at both ends; in low cells
    only every nth."""
    font = _font(min(FONT, max(11, cell)))
    step = math.ceil((font.size + 1) / cell)
    shown = {i: _shorten(names[i], font, MAX_NAME) for i in range(0, len(names), step)}
    width = math.ceil(max(map(font.getlength, shown.values())))
    page, draw = _page(cell * len(names) + 2 * FONT, width)
    for i, name in shown.items():
        draw.text(
            (width if anchor == "rm" else 0, FONT + (i + 0.5) * cell),
            name,
            INK,
            font,
            anchor=anchor,
        )
    return np.array(page)


def heatmap(
    matrix, row_names, column_names, *, title="", low=0.0, high=1.0, diverging=False, text="{:.2f}"
):
    """A matrix (R, C) as coloured cells, with R row names on the left, C column names on top and a
    colour bar.

    Colours run from `low` to `high`, values beyond get the end colours, NaN is grey with a dash.
    `diverging` is blue, white halfway, red. `text` formats the numbers (None: none); matrices
    beyond 20 x 20 have them only at the bar.
    """
    matrix = np.asarray(matrix, np.float64)
    anchors, small, font = DIVERGING if diverging else SEQUENTIAL, _font(FONT - 2), _font(FONT)
    rows, columns = matrix.shape
    colors = _ramp(matrix, anchors, low, high)
    numbers, cell = {}, max(2, min(26, 1200 // max(rows, columns)))
    if max(rows, columns) <= MAX_NUMBERED:
        numbers = {
            at: "-" if np.isnan(v) else (text or "").format(v) for at, v in np.ndenumerate(matrix)
        }
        cell = max(cell, math.ceil(max(map(small.getlength, numbers.values()))) + GAP)

    left_names = _name_list(row_names, cell, "rm")
    top_names = np.rot90(
        _name_list(column_names, cell, "lm")
    )  # counter-clockwise: each name starts at its column
    ticks = [(text or "{:g}").format(value) for value in (high, (low + high) / 2, low)]
    left = GAP + left_names.shape[1] + GAP
    top = GAP + (FONT + 2 * GAP if title else 0) + top_names.shape[0] + GAP
    right, bar = left + columns * cell, max(rows * cell, 4 * FONT)
    width = (
        max(right + 5 * GAP + max(map(small.getlength, ticks)), GAP + font.getlength(title)) + GAP
    )
    page, draw = _page(top + bar + FONT + GAP, math.ceil(width))
    draw.text((GAP, GAP), title, INK, font, anchor="lt")

    cells = colors.repeat(cell, axis=0).repeat(cell, axis=1)
    if cell >= 16:  # a white line between cells; smaller ones would lose too much of their colour
        cells[cell - 1 :: cell] = cells[:, cell - 1 :: cell] = 255
    page.paste(Image.fromarray(cells), (left, top))
    for (row, column), number in numbers.items():
        ink = INK if colors[row, column] @ (0.299, 0.587, 0.114) > 128 else WHITE
        draw.text(
            (left + (column + 0.5) * cell, top + (row + 0.5) * cell),
            number,
            ink,
            small,
            anchor="mm",
        )

    scale = _ramp(np.linspace(high, low, bar), anchors, low, high)[:, None]
    page.paste(Image.fromarray(scale.repeat(2 * GAP, axis=1)), (right + 2 * GAP, top))
    for tick, y in zip(ticks, (0, bar / 2, bar)):
        draw.text((right + 4 * GAP + GAP // 2, top + y), tick, INK, small, anchor="lm")

    picture = np.array(page)
    for names, y, x in (
        (left_names, top - FONT, GAP),
        (top_names, top - GAP - top_names.shape[0], left - FONT),
    ):
        # the spare pixels of both lists meet in the corner: the darker pixel keeps the text of both
        region = picture[y : y + names.shape[0], x : x + names.shape[1]]
        np.minimum(region, names, out=region)
    return picture


SMALLEST = 192  # pixels: smaller images are enlarged, so that they can be looked at


def side_by_side(image, palette, **maps):
    """Image (3, H, W) in [0, 1] and maps (H, W) -> one picture. Class ids are laid over the image,
    weights are grey."""
    rgb = (image.detach().float().cpu().clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
    panels = [("image", rgb)]
    for caption, values in maps.items():
        values = values.detach().cpu()
        if values.is_floating_point():
            grey = (values.float().clamp(0, 1) * 255).byte().numpy()
            panels.append(
                (f"{caption}, mean {float(values.mean()):.2f}", grey[..., None].repeat(3, 2))
            )
        else:
            panels.append((caption, overlay(rgb, values.numpy(), palette)))
    return strip(panels, height=max(SMALLEST, len(rgb)))
