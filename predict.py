"""Label pictures with a checkpoint: those of a folder, or a single one.

    python predict.py runs/camvid/resnet18_cbp_occl/seed0/best.pt PICTURES OUT eval.flip=true

writes for each picture NAME of PICTURES (sub folders too)

    OUT/ids/NAME.png        class ids, 8 bit grey
    OUT/colors/NAME.png     the same ids as a palette PNG
    OUT/overlays/NAME.png   class colours over the picture

NAME has no suffix; pictures whose names differ in the suffix alone keep it, as in a.jpg.png. What
is hidden, and OUT itself, is left out. A picture that cannot be read, or is too small for the
network, is named and skipped.
"""

import logging
import sys
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from datasets.base import DataError, files_below, read_image
from engine import inference, pictures, precision
from engine.errors import UserError
from engine.files import replacing
from engine.log import to_console
from engine.process import run
from eval import load_network

logger = logging.getLogger("engine")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
KINDS = ("ids", "colors", "overlays")


def find_pictures(source, out):
    """PICTURES and OUT -> {path of a picture: path of its results below OUT/ids, OUT/colors and
    OUT/overlays}.

    Raises:
        DataError: no such file or folder, no pictures in it, or results that would overwrite
            pictures.
    """
    if not source.exists():
        raise DataError(f"there is no file or folder {source}")
    if out.resolve() == source.resolve():
        raise DataError(
            f"pictures and results cannot share {out}: choose another folder for the results"
        )
    paths, base = [source], source.parent
    if source.is_dir():
        paths, base = files_below(source, SUFFIXES), source
        if source.resolve() in out.resolve().parents:
            paths = [path for path in paths if out.resolve() not in path.resolve().parents]
    if not paths:
        raise DataError(f"there are no pictures ({', '.join(SUFFIXES)}) in {source}")
    names = {path: path.relative_to(base).with_suffix(".png") for path in paths}
    while shared := {name for name, count in Counter(names.values()).items() if count > 1}:
        names |= {
            path: path.relative_to(base).with_name(f"{path.name}.png")
            for path, name in names.items()
            if name in shared
        }
    results = {(out / kind / name).resolve() for kind in KINDS for name in names.values()}
    if lost := [path for path in paths if path.resolve() in results]:
        raise DataError(
            f"the results would overwrite the picture {lost[0]}: choose another folder than {out}"
        )
    return names


def save_all(out, name, image, ids, palette):
    """Write the three pictures of one image: ids (H, W) uint8."""
    indexed, overlay = Image.fromarray(ids), pictures.overlay(image, ids, palette)
    colored = indexed.copy()
    colored.putpalette([channel for color in palette for channel in color])
    for kind, picture in zip(KINDS, (indexed, colored, Image.fromarray(overlay))):
        with replacing(out / kind / name) as path:
            picture.save(path)


def main(arguments):
    if len(arguments) < 3:
        sys.exit(__doc__)
    out = Path(arguments[2])
    names, skipped = find_pictures(Path(arguments[1]), out), 0
    try:
        for kind in KINDS:
            (out / kind).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {out / kind}: {error.strerror}") from None
    to_console()
    network, cfg, device, saved = load_network(arguments[0], arguments[3:])
    for path, name in tqdm(names.items()):
        try:
            image = read_image(path)
            tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
            tensor = tensor.to(device, torch.get_default_dtype()) / 255
            with precision.autocast(device, cfg.precision):
                scores = inference.predict(network, tensor, cfg.eval)
        except UserError as error:  # unreadable, or too small for the network
            named = str(path) in str(error)
            logger.warning(f"skipped: {error}" if named else f"skipped: {path}: {error}")
            skipped += 1
            continue
        if not scores.isfinite().all():
            raise inference.NonFiniteScores(path)
        save_all(out, name, image, scores.argmax(1)[0].byte().cpu().numpy(), saved["palette"])
    count = len(names) - skipped
    if not count:
        raise DataError(f"none of the {skipped} pictures could be read")
    text = f"{count} picture{'s' * (count > 1)} written{f', {skipped} skipped' if skipped else ''}"
    print(f"{text}: {out}/ids, {out}/colors and {out}/overlays")


if __name__ == "__main__":
    run(main, __doc__)
