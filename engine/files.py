"""Results on the disk: written whole or not at all, and nowhere but in the folder that they belong to."""

import os
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from engine.errors import UserError


@contextmanager
def replacing(path):
    """A temporary path beside `path`. What the block writes there takes the place of `path` when the block has ended,
    and is removed if the block fails or is interrupted. The folder is made if needed.

    Raises:
        UserError: the file cannot be written, because the disk is full, say.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"could not write {path}: {error.strerror or error}") from None
    finally:
        if temporary.is_file():
            temporary.unlink()


def write(path, text):
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_picture(path, picture):
    """Write a picture (H, W, 3) uint8, whole or not at all."""
    with replacing(path) as temporary:
        Image.fromarray(picture).save(temporary)


def inside(folder, name):
    """The path `name` below a folder. The name comes from a configuration, and so perhaps from a stranger's checkpoint.

    Raises:
        UserError: an absolute path, one with `..`, or a link that leads out of the folder.
    """
    path = Path(folder) / name
    if Path(folder).resolve() not in path.resolve().parents:
        raise UserError(f"the name '{name}' leads out of the folder {folder}: choose another name")
    return path
