"""Random picture files, whole and damaged, through every reader: each is read or refused by a DataError, soon.

run(seed=0, count=500) -> Counter({"accepted": ..., "DataError": ..., "traceback": 0, "slow": 0})
"""

import io
import struct
import tempfile
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from datasets.base import DataError
from datasets.reading import read_colors, read_ids, read_image, read_map
from datasets.synthia import Synthia

SECONDS = 5  # of processor time: a reader that takes more is slow
COLORS = {(0, 0, 0): 255, (255, 255, 255): 0, (128, 64, 128): 1}
FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16", "F"),
    "TGA": ("L", "RGB", "RGBA"),
    "ICO": ("RGBA",),
    "JPEG2000": ("L", "RGB", "RGBA", "I;16"),
}
DTYPES = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "f2", "f4", "f8")


def pixels(rng, mode):
    """A small picture in a mode of Pillow: noise, ids, or one value."""
    size = tuple(rng.integers(1, 40, 2).tolist())
    grey = rng.integers(0, int(rng.choice([1, 3, 256])), size, dtype=np.uint8)
    if mode in ("I", "F"):
        return Image.fromarray(grey.astype(np.int32 if mode == "I" else np.float32) - 1)
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * int(rng.choice([1, 16, 257])))
    colors = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
    if mode == "LAB":
        return Image.frombytes("LAB", colors.size, colors.tobytes())
    return colors.convert(mode) if rng.random() < 0.5 else Image.fromarray(grey).convert(mode)


def from_pillow(rng):
    """A file that Pillow writes, often with an EXIF tag, a profile, text or further pages."""
    kind = str(rng.choice(list(FORMATS)))
    mode, options, file = str(rng.choice(FORMATS[kind])), {}, io.BytesIO()
    picture = pixels(rng, mode)
    if kind in ("PNG", "JPEG", "TIFF", "WEBP") and rng.random() < 0.5:
        exif = Image.Exif()
        exif[0x112] = int(rng.integers(0, 11))
        options["exif"] = exif.tobytes() if rng.random() < 0.7 else b"Exif\0\0" + rng.bytes(40)
    if kind in ("PNG", "JPEG") and rng.random() < 0.2:
        options["icc_profile"] = rng.bytes(100)
    if kind in ("GIF", "TIFF", "WEBP", "PNG") and rng.random() < 0.2:
        options |= {"save_all": True, "append_images": [picture.copy()]}
    if kind == "PNG" and rng.random() < 0.3:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("comment", "x" * int(rng.integers(1, 10_000)), zip=True)
    if kind == "TIFF" and mode in ("L", "RGB", "RGBA") and rng.random() < 0.5:
        options["compression"] = str(rng.choice(["tiff_lzw", "tiff_deflate", "packbits", "jpeg"]))
    if kind == "PNG" and mode == "P":
        options["bits"] = int(rng.choice([1, 2, 4, 8]))
    try:
        picture.save(file, kind, **options)
    except (
        OSError,
        SyntaxError,
        ValueError,
        TypeError,
        RuntimeError,
    ):  # some formats do not take every mode
        file = io.BytesIO()
        picture.convert("RGB").save(file, "PNG")
    return file.getvalue()


def png(width, height, bits, color, data, *more):
    """A PNG of its parts: `data` are the filtered rows, `more` chunks (name, content) before them."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def odd_png(rng):
    """Depths that Pillow does not write, chunks full of rubbish, giant sizes, zip bombs of text."""
    bits, color = int(rng.choice([1, 2, 4, 8, 16, 3])), int(rng.choice([0, 2, 3, 4, 6, 1]))
    width, height = (int(rng.choice([0, 1, 7, 32, 2**16, 2**20, 2**31 - 1])) for _ in range(2))
    names = (
        b"tEXt",
        b"zTXt",
        b"iTXt",
        b"iCCP",
        b"eXIf",
        b"gAMA",
        b"tRNS",
        b"PLTE",
        b"acTL",
        b"pHYs",
    )
    content = rng.bytes(int(rng.integers(0, 50)))
    if rng.random() < 0.3:
        content = b"name\0\0" + zlib.compress(b"x" * 2**24)
    name = names[rng.integers(len(names))]
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(color, 1)
    size = min(2**16, height * (1 + (width * bits * channels + 7) // 8))
    return png(width, height, bits, color, b"\0" + rng.bytes(size)[1:], (name, content))


def tiff(array, kind=1, photometric=None, planar=1, extra=(), tags=()):
    """An uncompressed little-endian TIFF of an array (H, W[, C]).

    Args:
        kind: 1 unsigned, 2 signed, 3 float.
        extra: meaning of the channels beyond those of the photometric interpretation.
        tags: further (tag, type 3 or 4, values); they replace those of the array.
    """
    height, width, *channels = array.shape
    count, order = (channels or [1])[0], array.dtype.newbyteorder("<")
    data = array.astype(order)
    planes = np.moveaxis(data, -1, 0) if planar == 2 and channels else data[None]
    photometric = (2 if count > 2 else 1) if photometric is None else photometric
    length = planes[0].nbytes
    fields = {256: (4, [width]), 257: (4, [height]), 258: (3, [8 * array.itemsize] * count)}
    fields |= {259: (3, [1]), 262: (3, [photometric]), 277: (3, [count]), 278: (4, [height])}
    fields |= {279: (4, [length] * len(planes)), 284: (3, [planar]), 339: (3, [kind] * count)}
    fields |= {338: (3, list(extra))} if extra else {}
    fields |= {273: (4, [8 + i * length for i in range(len(planes))])}
    fields |= {tag: (sort, values) for tag, sort, values in tags}
    start = 8 + len(planes) * length
    place = start + 2 + 12 * len(fields) + 4  # of values that do not fit into four bytes
    table, values_after = b"", b""
    for tag, (sort, values) in sorted(fields.items()):
        content = struct.pack(f"<{len(values)}{'H' if sort == 3 else 'I'}", *values)
        if len(content) > 4:
            content, more = struct.pack("<I", place + len(values_after)), content
            values_after += more
        table += struct.pack("<HHI", tag, sort, len(values)) + content.ljust(4, b"\0")
    head = b"II*\0" + struct.pack("<I", start) + b"".join(plane.tobytes() for plane in planes)
    return head + struct.pack("<H", len(fields)) + table + bytes(4) + values_after


def odd_tiff(rng):
    """Channels, number types and tags that cameras and satellites write, and some that nobody does."""
    shape = (*rng.integers(1, 20, 2), *(() if rng.random() < 0.4 else [rng.integers(1, 7)]))
    dtype = np.dtype(str(rng.choice(DTYPES)))
    array = np.frombuffer(rng.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)
    if rng.random() < 0.5:
        array = (array % 5 if dtype.kind != "f" else rng.random(shape)).astype(dtype)
    tags = []
    if rng.random() < 0.4:
        tag = int(
            rng.choice([254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 317, 322])
        )
        tags = [(tag, 4, [int(rng.choice([0, 1, 2, 3, 8, 1000, 2**24, 2**32 - 1]))])]
    extra = rng.integers(0, 3, int(rng.integers(0, 4))).tolist()
    photometric = None if rng.random() < 0.6 else int(rng.integers(0, 10))
    planar, kind = int(rng.choice([1, 1, 2])), {"u": 1, "i": 2, "f": 3}[dtype.kind]
    return tiff(array, kind, photometric, planar, extra, tags)


def no_picture(rng):
    """Other files with the name of a picture, and headers without anything behind them."""
    heads = (
        b"",
        b"PK\3\4",
        b"<html>not found</html>",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"II*\0",
    )
    heads += (
        b"GIF89a",
        b"BM",
        b"P5 9999999 9999999 65535\n",
        b"P2 3 1 9\n1 2 x",
        b"RIFF\0\0\0\0WEBP",
    )
    heads += (b"8BPS", b"version https://git-lfs.github.com/spec/v1\n", b"%!PS-Adobe\n", b"MM\0+")
    return heads[rng.integers(len(heads))] + rng.bytes(int(rng.integers(0, 60)))


def damaged(rng, data):
    """Bytes cut off, changed, doubled, or overwritten by large numbers; half of the files stay whole."""
    data, choice = bytearray(data), rng.integers(8)
    position = int(rng.integers(0, max(1, len(data))))
    if choice == 0:
        del data[position:]
    elif choice == 1:
        for place in rng.integers(0, len(data), 3) if data else ():
            data[place] ^= 1 << int(rng.integers(8))
    elif choice == 2:
        data[position : position + 4] = rng.choice([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff"])
    elif choice == 3:
        data[position:position] = data[: int(rng.integers(0, 100))]
    return bytes(data)


def run(seed, count=500):
    """Make `count` files and read each with every reader.

    Returns:
        Counter of the outcomes: "accepted", "DataError", "traceback", "slow" (a reader took more than SECONDS), and
        "traceback KIND: READER" for each kind of exception.
    """
    rng = np.random.default_rng(seed)
    outcomes = Counter(accepted=0, DataError=0, traceback=0, slow=0)
    makers, shares = (from_pillow, odd_png, odd_tiff, no_picture), (0.5, 0.2, 0.2, 0.1)
    readers = {"image": read_image, "label": read_ids, "map": read_map}
    readers["colours"] = lambda path: read_colors(path, COLORS)
    readers["synthia"] = lambda path: Synthia.read_label(Synthia.__new__(Synthia), path)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow mentions much of what is odd
        for number in range(count):
            path = Path(folder) / f"{number}.{rng.choice(['png', 'jpg', 'tif'])}"
            path.write_bytes(damaged(rng, makers[rng.choice(len(makers), p=shares)](rng)))
            for name, reader in readers.items():
                start = time.process_time()
                outcomes.update(outcome(name, reader, path))
                outcomes["slow"] += time.process_time() - start > SECONDS
            path.unlink()
    return outcomes


def outcome(name, reader, path):
    """Read a file -> the names of what happened."""
    try:
        values = reader(path)
        assert values.shape[2:] == ((3,) if name == "image" else ()) and values.size > 0
        assert values.dtype == np.uint8 or (
            name in ("label", "synthia") and values.dtype.kind == "u"
        )
    except DataError as error:
        if "\n" not in str(error) and len(str(error)) < 1000 and str(path) in str(error):
            return ["DataError"]
        return ["traceback", f"traceback: {name} has no clear sentence"]
    except Exception as error:  # whatever it is, it is what is looked for here
        return ["traceback", f"traceback {type(error).__name__}: {name}"]
    return ["accepted"]
