"""Files of other people are read with care, our own are written whole or not at all, in the folder
where they belong."""

import contextlib
import json
import math
import os
import re
from pathlib import Path

import numpy as np
from PIL import Image

from engine.errors import UserError

NUMBERS = rb"'descr': *'([<>|=]?(?:b1|[iu][1248]|f[248]))'"  # no objects, which would be unpickled
SHAPE = rb"'shape': *\(((?:\d{1,9}(?:, ?\d{1,9}){0,2})?),?\)"


def read_bytes(path):
    """The content of a file.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    if not os.path.isfile(path):
        raise UserError(f"there is no file {path}")
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror})") from None


def read_text(path):
    """A text in UTF-8, with or without a byte order mark.

    Raises:
        UserError: no such file, or another encoding.
    """
    data = read_bytes(path)
    encoding = "UTF-16" if b"\0" in data else "another encoding, such as Latin-1"
    try:
        if b"\0" not in data:
            return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding += f" (line {data[: error.start].count(10) + 1})"
    raise UserError(f"{path} is not text in UTF-8 but in {encoding}: save it as UTF-8")


def read_json(path):
    """The content of a JSON file.

    Raises:
        UserError: no such file, or it is incomplete or damaged.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is incomplete or damaged ({error})") from None


def read_json_lines(path):
    """The mappings of a file with one per line; what a crash has cut is left out."""
    lines = []
    for line in read_text(path).splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            lines.append(json.loads(line))
    return [line for line in lines if isinstance(line, dict)]


def read_array(path):
    """The numbers of a .npy file; its header is compared with its size before anything is
    allocated.

    Raises:
        UserError: no such file, another format, objects instead of numbers, an incomplete or
            damaged file.
    """
    data = read_bytes(path)
    start = 10 + int.from_bytes(data[8:10], "little")
    kind, shape = (re.search(pattern, data[:start]) for pattern in (NUMBERS, SHAPE))
    if data[:7] != b"\x93NUMPY\x01" or not kind or not shape:
        raise UserError(f"{path} is not a NumPy file of one array of numbers: make it by np.save")
    dtype = np.dtype(kind[1].decode())
    shape = [int(number) for number in re.findall(rb"\d+", shape[1])]
    claimed, held = math.prod(shape) * dtype.itemsize, len(data) - start
    if claimed != held:
        raise UserError(
            f"{path} is incomplete or damaged: its header claims {claimed} bytes of numbers, and "
            f"it holds {held}"
        )
    order = "F" if b"'fortran_order': True" in data[:start] else "C"
    return (
        np.frombuffer(data, dtype, offset=start)
        .reshape(shape, order=order)
        .astype(dtype.newbyteorder("="), order="C")
    )


@contextlib.contextmanager
def replacing(path):
    """A temporary path beside `path`. What the block writes there takes the place of `path` when
    the block has ended, and is removed if the block fails or is interrupted. The folder is made if
    needed.

    Raises:
        UserError: the file cannot be written, because the disk is full, say.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror or error}") from None
    finally:
        if temporary.is_file():
            temporary.unlink()


def tidy(folder):
    """Remove what `replacing` leaves in a folder when its process is killed, not what one that is
    alive on this machine is writing."""
    for path in Path(folder).glob(".*.tmp.*"):
        if match := re.fullmatch(r"\..+\.(\d+)\.tmp\.\w+", path.name):
            try:
                os.kill(int(match[1]), 0)
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except OSError:  # it is another user's
                continue


def write(path, text):
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_picture(path, picture):
    """Write a picture (H, W, 3) uint8, whole or not at all."""
    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary)


def inside(folder, name):
    """The path `name` below a folder. The name comes from a configuration, and so perhaps from a
    stranger's checkpoint.

    Raises:
        UserError: an absolute path, one with `..`, or a link that leads out of the folder.
    """
    path = Path(folder) / name
    if Path(folder).resolve() not in path.resolve().parents:
        raise UserError(f"the name '{name}' leads out of the folder {folder}: choose another name")
    return path
