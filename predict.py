"""Label every picture of a folder with a checkpoint.

    python predict.py runs/camvid/resnet18_cbp_occl/seed0/best.pt PICTURES OUT eval.flip=true

writes for each picture NAME of PICTURES (sub folders too)

    OUT/ids/NAME.png        class ids, 8 bit grey
    OUT/colors/NAME.png     the same ids as a palette PNG
    OUT/overlays/NAME.png   class colours over the picture
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from datasets.base import DataError, read_image
from engine import inference, pictures, precision
from engine.log import to_console
from engine.process import run
from eval import load_network

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def save_all(out, name, image, ids, palette):
    """Write the three pictures of one image: ids (H, W) uint8."""
    indexed = Image.fromarray(ids, "L")
    colored = indexed.copy()
    colored.putpalette([channel for color in palette for channel in color])
    for kind, picture in (
        ("ids", indexed),
        ("colors", colored),
        ("overlays", Image.fromarray(pictures.overlay(image, ids, palette))),
    ):
        path = (out / kind / name).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def main(arguments):
    if len(arguments) < 3:
        sys.exit(__doc__)
    folder, out = Path(arguments[1]), Path(arguments[2])
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"there are no pictures ({', '.join(sorted(SUFFIXES))}) in {folder}")
    to_console()
    network, cfg, device, saved = load_network(arguments[0], arguments[3:])
    for path in tqdm(paths):
        image = read_image(path)
        tensor = (
            torch.from_numpy(image).permute(2, 0, 1)[None].to(device, torch.get_default_dtype())
            / 255
        )
        with precision.autocast(device, cfg.precision):
            scores = inference.predict(network, tensor, cfg.eval)
        ids = scores.argmax(1)[0].byte().cpu().numpy()
        save_all(out, path.relative_to(folder), image, ids, saved["palette"])
    print(f"{len(paths)} pictures written to {out}/ids, {out}/colors and {out}/overlays")


if __name__ == "__main__":
    run(main, __doc__)
