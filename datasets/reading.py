"""Reading image, label and map files, lists and folders. What is wrong with a file is a DataError
that names it.

Pillow says what a file holds, and decodes it, because OpenCV returns truncated JPEGs half filled,
silently, and turns palette indices into colours. Where the header says that there is nothing to
know, a JPEG of 8 bits is decoded by torchvision and a grey PNG by OpenCV, to the same pixels in two
thirds of the time; what they refuse is Pillow's again.
"""

import logging
import os
import re
import struct
import zlib
from contextlib import contextmanager, suppress
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torchvision import io

from engine.errors import UserError
from engine.files import read_text

PICTURES = (".png", ".jpg", ".jpeg")
# What Pillow raises, beside its own OSError and SyntaxError, on bytes that no encoder has written.
BROKEN = (OSError, SyntaxError, ValueError, TypeError, ArithmeticError, LookupError)
BROKEN += (EOFError, RuntimeError, struct.error, zlib.error)
SAMPLES, BITS, PLANES = 277, 258, 284  # tags of TIFF: channels, bits of each, interleaved or not
PHOTOMETRIC = 262  # tag of TIFF: 0 where 0 is white
GREY_DEPTHS = ("I", "I;16", "I;16B", "I;16L", "F")  # modes of Pillow for grey of more than 8 bits
DARK = 4096  # 16 bits with no value above are data of 12 bits or fewer
PIXEL_BYTES = 8  # while a picture is decoded: Pillow's four, the array's three, a grey original
decode_image = getattr(io, "decode_image", None)  # gone some day: Pillow stays
PLAIN = b"IHDR IDAT IEND gAMA cHRM sRGB iCCP sBIT pHYs bKGD tIME".split()  # chunks of PNG
LARGE = 2**28  # bytes; below, memory is not asked for

# Loaders are many; and threads that a fork has lost would be waited for.
cv2.setNumThreads(1)
Image.MAX_IMAGE_PIXELS = None  # `check_header` has a limit that depends on the machine
logger = logging.getLogger("engine")
told = set()  # formats whose further pages have been mentioned


class DataError(UserError):
    """Data that cannot be used as it is; the message names the file and what to do."""


# --- folders and lists ----------------------------------------------------------------------------


def files_below(folder, suffixes, depth=None):
    """Files below a folder whose names end in one of the suffixes, in either case, sorted.

    Hidden files and folders, whose names start with a dot, are left out. Links to folders are
    followed, but not back to a folder that leads to them.

    Args:
        depth: 1 for the files in the folder itself, 2 for those in its sub folders; None: all.
    Raises:
        DataError: a folder that cannot be listed.
    """
    return [Path(folder, name) for name in names_below(folder, suffixes, depth)]


def names_below(folder, suffixes, depth=None):
    """The same as text, relative to the folder and with slashes: a tenth of the time."""
    endings = tuple(suffix.lower() for suffix in suffixes)
    return sorted(walk(folder, endings, depth), key=lambda name: name.split("/"))


def walk(folder, endings, depth, above=(), start=""):
    """The same, one by one; `above`: real paths of the folders that lead here, `start`: the path
    from the first of them."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as listed:
            entries = [entry for entry in listed if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"cannot list the folder {folder}: {error.strerror}") from None
    for entry in entries:
        if kind_of(entry) == "folder":
            if depth != 1:
                below = (*above, real), f"{start}{entry.name}/"
                yield from walk(entry.path, endings, depth and depth - 1, *below)
        elif depth in (None, 1) and entry.name.lower().endswith(endings):
            yield start + entry.name


def kind_of(entry):
    """An entry of a folder -> "folder", "file", or nothing where a link leads nowhere."""
    try:
        return "folder" if entry.is_dir() else "file" if entry.is_file() else ""
    except OSError:  # a link to itself
        return ""


def files_in(folder):
    """Names of the files in a folder, none where it cannot be listed: one list takes a fraction of
    the time that asking for each file does."""
    with suppress(OSError), os.scandir(folder) as listed:
        return {entry.name for entry in listed if kind_of(entry) == "file"}
    return set()


def folders_in(folder):
    """Names of the folders in a folder, for messages."""
    return ", ".join(sorted(path.name for path in folder.glob("[!.]*") if path.is_dir())) or "none"


def read_list(path):
    """Text file in UTF-8, with or without a byte order mark -> its lines, without blanks around
    them or empty ones."""
    if not (lines := [line.strip() for line in read_text(path).splitlines() if line.strip()]):
        raise DataError(f"the list {path} is empty")
    return lines


# --- pictures -------------------------------------------------------------------------------------


@contextmanager
def opened(path, kind):
    """An image file whose header was checked. What goes wrong within is a DataError, which calls
    the file a `kind`."""
    try:
        with Image.open(path) as picture:
            check_header(picture, kind)
            yield picture
    except (*BROKEN, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = layout_of(path) or "it is damaged, or no picture"
        raise DataError(f"cannot read the {kind} {path}: {reason}") from None


def check_header(picture, kind):
    """Raise ValueError where decoding takes too much memory, or gives something else than what the
    file holds."""
    (width, height), tags = picture.size, getattr(picture, "tag_v2", {})
    needed = width * height * PIXEL_BYTES
    if needed > LARGE and needed > (free := free_memory()) / 2:
        raise ValueError(
            f"its {width}x{height} pixels take {needed / 1e9:.1f} GB to decode, more than half of "
            f"the {free / 1e9:.1f} GB of free memory; make it smaller, or cut it into tiles"
        )
    # Of 16 bits in separate planes Pillow takes the two bytes for two pixels.
    separate = tags.get(PLANES) == 2 and max(tags.get(BITS, (1,))) > 8
    if tags.get(SAMPLES, 1) > 4 or separate:
        raise ValueError(layout(tags))
    # Pillow turns 8 bits of it around, which makes other ids of ids, and leaves 16 bits inverted.
    if tags.get(PHOTOMETRIC) == 0 and (kind != "image" or max(tags.get(BITS, (1,))) > 8):
        raise ValueError("in this TIFF 0 is white (WhiteIsZero): save it with 0 as black")
    several = getattr(picture, "is_animated", False) and picture.format != "MPO"  # a photograph
    if several and picture.format not in told:
        told.add(picture.format)
        logger.warning(
            f"{picture.filename} holds several pictures: the first is read, in all such files"
        )


def free_memory():
    """Bytes of memory that programs can get; infinity where the system does not say."""
    try:
        return 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    except OSError:
        return float("inf")


def layout(tags):
    """What is wrong with the channels of a TIFF."""
    count, bits = tags.get(SAMPLES, 1), "/".join(map(str, sorted({*tags.get(BITS, (1,))})))
    kind = f"{count} channel{'s' * (count > 1)} of {bits} bits"
    kind += ", not interleaved" * (tags.get(PLANES) == 2)
    return f"TIFFs of {kind} are not read: 1, 3 or 4 channels of 8 or 16 bits are expected"


def layout_of(path):
    """The same of a file that Pillow does not know; empty where it is no TIFF."""
    with suppress(*BROKEN), open(path, "rb") as file:
        tags = ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
        return layout(tags)
    return ""


def depths(picture):
    """Largest value in Pillow's pixels and the file's own; the pixels must not have been read yet.
    (0, 0): unknown.

    Pillow spreads grey of 2 and 4 bits, and PGM files, over its 8 or 16, and keeps the high byte of
    colours of 16 bits.
    """
    codec, _, _, arguments = picture.tile[0] if picture.tile else ("", (), 0, "")
    raw, *rest = (arguments,) if isinstance(arguments, str) else (arguments or ("",))
    raw, mode = str(raw), picture.mode
    if mode == "F":
        return 1, 1
    if mode.startswith("I"):
        if raw == "I;12":
            return 4095, 4095
        if mode == "I" and picture.format not in ("PNG", "PPM"):
            return 0, 0
        return 65535, rest[0] if codec.startswith("ppm") else 65535
    if codec.startswith("ppm") and rest:
        return 255, rest[0]
    if match := re.fullmatch(r"L;([24])R?", raw):
        return 255, 2 ** int(match[1]) - 1
    return 255, 65535 if re.search(r";16[BLN]$", raw) else 255


def plain_png(data):
    """(H, W, 1) of a PNG of 8 bits and grey, of which each chunk is as it was written and none may
    turn it or make it transparent; None for any other. OpenCV looks at neither."""
    start, name, shape = 8, b"", None
    while name != b"IEND":
        length, name = struct.unpack_from(">I4s", data, start)
        body, end = data[start + 8 : start + 8 + length], start + 8 + length
        if (
            name not in PLAIN
            or zlib.crc32(body, zlib.crc32(name)) != struct.unpack_from(">I", data, end)[0]
        ):
            return None
        if name == b"IHDR":
            width, height, bits, kind = struct.unpack_from(">IIBB", body)
            if (bits, kind) != (8, 0):
                return None
            shape = height, width, 1
        start = end + 4
    return shape


def plain_jpeg(data):
    """(H, W, channels) of a JPEG of 8 bits by the segments before its pixels, of which none may
    turn it or hold another picture; None for any other."""
    start, shape = 2, None
    while True:
        mark, code, length = struct.unpack_from(">BBH", data, start)
        body, start = data[start + 4 : start + 2 + length], start + 2 + length
        if mark != 0xFF or code in (0x00, 0x01, 0xFF) or 0xD0 <= code <= 0xD9:  # have no length
            return None
        if code in (0xC0, 0xC1, 0xC2):  # Huffman codes, sequential or progressive
            bits, height, width, channels = struct.unpack_from(">BHHB", body)
            shape = (height, width, channels) if bits == 8 else None
        several = code == 0xE2 and body[:4] == b"MPF\0"
        if several or (code == 0xE1 and not upright(bytes(body))):
            return None
        if code == 0xDA:  # pixels follow
            return shape


def upright(segment):
    """Whether an application segment of a JPEG, EXIF or XMP, leaves the picture as it is."""
    if not segment.startswith(b"Exif\0\0"):
        return b"Orientation" not in segment
    exif = Image.Exif()
    exif.load(segment)
    return exif.get(ExifTags.Base.Orientation, 1) == 1


def plain(path, rgb=False):
    """Pixels of a JPEG of 8 bits, (H, W) or (H, W, 3), or of a grey PNG, (H, W), the right way up;
    None for any other file, and for one that torchvision or OpenCV cannot read.

    `rgb`: none of grey.
    """
    with suppress(*BROKEN, MemoryError), open(path, "rb") as file:
        look = {b"\xff\xd8\xff": plain_jpeg, b"\x89PN": None if rgb else plain_png}.get(
            file.read(3)
        )
        if look is None or os.path.getsize(path) > LARGE:
            return None
        file.seek(0)
        data = np.fromfile(file, np.uint8)
        shape = look(memoryview(data))
        height, width, channels = shape or (0, 0, 0)
        if channels not in (3, 1)[: 2 - rgb] or height * width * PIXEL_BYTES > LARGE:
            return None
        if look is plain_png:  # torchvision would end the process at a broken stream
            pixels = cv2.imdecode(data, cv2.IMREAD_UNCHANGED)
        elif decode_image:
            pixels = decode_image(torch.from_numpy(data)).permute(1, 2, 0).squeeze(2).numpy()
        else:
            return None
        return pixels if pixels is not None and pixels.shape[:2] == shape[:2] else None
    return None


def decode(path, kind, rgb=False):
    """Image file -> pixels as viewers show them, turned by the EXIF tag: (H, W) or (H, W, C), and
    `depths`.

    `rgb`: (H, W, 3) uint8, but for grey of more than 8 bits, which stays (H, W).
    """
    if (pixels := plain(path, rgb)) is not None:
        return pixels, 255, 255
    with opened(path, kind) as picture:
        top, own = depths(picture)
        picture.filename = ""  # or Pillow maps a TIFF into memory, with the sides of the turned one
        picture.load()
        with suppress(*BROKEN):  # damaged tags say nothing, and do no harm
            ImageOps.exif_transpose(picture, in_place=True)
        if rgb and picture.mode not in ("RGB", *GREY_DEPTHS):
            picture = picture.convert("RGB")
        return np.array(picture), top, own


def was_turned(path):
    """Whether the EXIF tag of an image has swapped its width and height."""
    with suppress(DataError), opened(path, "image") as picture:
        return picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    return False


def read_image(path):
    """Image file -> (H, W, 3) uint8 RGB. 16 bits and floats of 0..1 are scaled to 8 bits; alpha is
    dropped.

    Raises:
        DataError: a file that cannot be read, integers of 32 bits, other floats, 12 bits or fewer
        stored as 16.
    """
    pixels, top, own = decode(path, "image", rgb=True)
    if pixels.ndim == 3 and own <= 255:
        return pixels
    if not top:
        raise DataError(
            f"{path} holds integers of 32 bits, or with a sign: 8 or 16 bits, or floats of 0..1, "
            "are expected"
        )
    low, high = pixels.min(), pixels.max()
    if top == 1 and not 0 <= low <= high <= 1:
        raise DataError(
            f"{path} holds floats from {low:g} to {high:g}: floats of 0..1, or 8 or 16 bits, are "
            "expected"
        )
    # All zero is black indeed, but where Pillow has kept the high bytes alone.
    if own == 65535 and int(high) * own < DARK * top and (high or top == 255):
        raise DataError(
            f"{path} has 16 bits a channel and no value above {DARK - 1}: it would be black; scale "
            "the values to 0..65535, or store 8 bits"
        )
    if pixels.ndim == 3:
        return pixels
    return np.repeat(np.rint(pixels * (255 / top)).astype(np.uint8)[..., None], 3, 2)


def read_ids(path):
    """Grey or palette PNG, or another file of one channel -> (H, W) uint8 or uint16 ids, as the
    file holds them."""
    ids, top, own = decode(path, "label")
    if ids.ndim != 2:
        raise DataError(
            f"{path} is a colour picture ({ids.shape[2]} channels), but ids are expected: one "
            "channel, or a palette. For labels stored as colours give the data set a colour table "
            "(folder.Folder: color_labels: true)"
        )
    if ids.dtype.itemsize > 2:  # integers of 32 bits, floats
        wrong = ids[~((ids >= 0) & (ids <= 65535) & (ids == np.rint(ids)))]  # NaN is among them
        if wrong.size:
            some = ", ".join(f"{value:g}" for value in np.unique(wrong)[:5])
            raise DataError(f"{path} holds {some}: ids must be whole numbers of 0 to 65535")
        ids = ids.astype(np.uint16)
    if 0 < own < top:
        ids = ((ids.astype(np.int64) * own + top // 2) // top).astype(ids.dtype)
    return ids.astype(np.uint8) if ids.dtype == bool else ids  # a 1-bit PNG: two classes


def read_map(path):
    """Grey or palette PNG of 8 bits -> (H, W) uint8."""
    values, top, own = decode(path, "map")
    if values.ndim != 2 or values.dtype != np.uint8 or own != top:
        raise DataError(f"{path} is no map: one channel of 8 bits, grey or a palette, is expected")
    return values


def read_colors(path, colors):
    """Colour picture -> (H, W) uint8 ids by a table {(r, g, b): id}; a colour that is not in it is
    an error."""
    pixels = read_image(path).astype(np.int32)
    codes = (pixels[..., 0] << 16) | (pixels[..., 1] << 8) | pixels[..., 2]
    table = sorted((r << 16 | g << 8 | b, value) for (r, g, b), value in colors.items())
    keys, values = (np.array(column) for column in zip(*table, strict=True))
    position = np.searchsorted(keys, codes).clip(max=len(keys) - 1)
    unknown = np.unique(codes[keys[position] != codes]).tolist()
    if unknown:
        named = ", ".join(str((c >> 16, c >> 8 & 255, c & 255)) for c in unknown[:5])
        raise DataError(
            f"{path} holds {len(unknown)} colours that are not in the colour table, such as {named}"
        )
    return values[position].astype(np.uint8)
