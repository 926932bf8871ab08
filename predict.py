"""Label pictures with a checkpoint: a file, a folder, a pattern, or the frames of a video.

    python predict.py runs/camvid/resnet18_cbp_occl/seed0/best.pt PICTURES OUT eval.flip=true
    python predict.py CHECKPOINT 'photos/*.jpg' OUT probabilities=true
    python predict.py CHECKPOINT film.mp4 OUT device=cpu precision=bf16

writes for each picture NAME of PICTURES (sub folders too), or frame NAME/000000 of a video,

    OUT/ids/NAME.png              class ids, 8 bit grey
    OUT/colors/NAME.png           the same ids as a palette PNG
    OUT/overlays/NAME.png         class colours over the picture
    OUT/probabilities/NAME.npy    with probabilities=true: (K, H, W) in half precision

NAME has no suffix; pictures whose names differ in the suffix alone keep it, as in a.jpg.png. What
is hidden, and OUT itself, is left out. A picture that cannot be read, or is too small for the
network, is named and skipped. For pictures larger than the memory eval.mode=slide takes windows of
eval.crop.

In Python:

    from predict import load

    model = load("runs/camvid/resnet18_cbp_occl/seed0/best.pt", "device=cpu")
    labels = model("photo.jpg")
"""

import glob
import logging
import re
import sys
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from datasets.base import DataError, files_below, read_image
from engine import distributed, inference, pictures, precision
from engine.config import ConfigError
from engine.errors import UserError
from engine.files import replacing
from engine.log import to_console
from engine.process import run
from eval import load_network

logger = logging.getLogger("engine")
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
KINDS = ("ids", "colors", "overlays")


class Predictor:
    """A trained network: pictures in, class ids or probabilities out, at the pictures' own size.

    A picture is a path, or an array (H, W, 3) uint8 RGB; a list of them, or an array
    (B, H, W, 3), gives a list of results.

    Attributes:
        classes: K names, in the order of the ids.
        palette: K colours [r, g, b].
        cfg: the configuration, whose section `eval` says how a picture is looked at.
        device: torch.device of the network.
    """

    def __init__(self, network, cfg, device, saved):
        self.network, self.cfg, self.device = network, cfg, device
        network.cache = None  # which is for the pictures of data sets, in half precision
        self.classes, self.palette = saved["classes"], saved["palette"]

    def __call__(self, picture, what="the picture"):
        """Class ids (H, W) uint8. `what`: name of an array in errors.

        Raises:
            UserError: a picture that cannot be read, has another form or is too small for the
                network, or scores that are not finite.
        """
        return self._each(picture, what, self._ids)

    def probabilities(self, picture, what="the picture"):
        """Probabilities of the classes (K, H, W) float32."""
        return self._each(picture, what, self._probabilities)

    def colored(self, ids):
        """Class ids (H, W) uint8 -> a palette image of Pillow."""
        image = Image.fromarray(ids, "P")
        image.putpalette([channel for color in self.palette for channel in color])
        return image

    def overlay(self, picture, ids):
        """A picture (H, W, 3) uint8 under the colours of its class ids."""
        return pictures.overlay(picture, ids, self.palette)

    def _each(self, picture, what, function):
        if isinstance(picture, (list, tuple)) or np.ndim(picture) == 4:
            return [self._each(one, what, function) for one in picture]
        if isinstance(picture, (str, Path)):
            picture, what = read_image(picture), picture
        picture = np.ascontiguousarray(picture)  # also of Pillow, or turned by slices
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise UserError(f"{what} must be (H, W, 3) uint8, not {picture.shape} {picture.dtype}")
        image = torch.tensor(picture).permute(2, 0, 1)[None]
        image = image.to(self.device, torch.get_default_dtype()) / 255
        with precision.autocast(self.device, self.cfg.precision):
            return function(image, what).cpu().numpy()

    def _ids(self, image, what):
        ids, finite = inference.classify(self.network, image, self.cfg.eval)
        if not finite:
            raise inference.NonFiniteScores(what)
        return ids.byte()

    def _probabilities(self, image, what):
        scores = inference.predict(self.network, image, self.cfg.eval)
        if not scores.isfinite().all():
            raise inference.NonFiniteScores(what)
        several = self.cfg.eval.flip or len(self.cfg.eval.scales) > 1
        return (scores if several else scores.softmax(1))[0].float()


def load(checkpoint, *overrides):
    """A checkpoint as a Predictor; overrides as on the command line: "device=cpu",
    "precision=bf16", "eval.flip=true". Seeds and threads of the process stay as they are.

    Raises:
        UserError: a file, a key or weights that cannot be used.
    """
    with torch.random.fork_rng(devices=[]):
        found = load_network(checkpoint, overrides, lambda cfg: distributed.init(cfg.device))
    return Predictor(*found)


def find_pictures(source, out):
    """PICTURES and OUT -> {path of a picture or video: path of its results below OUT/ids,
    OUT/colors and OUT/overlays; of a video a folder}.

    Raises:
        DataError: no such file or folder, no pictures in it, or results that would overwrite
            pictures.
    """
    if out.resolve() == source.resolve():
        raise DataError(
            f"pictures and results cannot share {out}: choose another folder for the results"
        )
    paths, base = [source], source.parent
    if not source.exists() and glob.has_magic(str(source)):
        found = map(Path, sorted(glob.glob(str(source), recursive=True)))
        paths = [path for path in found if path.suffix.lower() in (*SUFFIXES, *VIDEOS)]
        base = Path(re.split(r"[*?\[]", str(source))[0] + "x").parent
    elif not source.exists():
        raise DataError(f"there is no file or folder {source}")
    elif source.is_dir():
        paths, base = files_below(source, SUFFIXES), source
    if base.resolve() in out.resolve().parents:
        paths = [path for path in paths if out.resolve() not in path.resolve().parents]
    if not paths:
        written = "; in a pattern write [[] for a [ of a name" * ("[" in str(source))
        raise DataError(f"there are no pictures ({', '.join(SUFFIXES)}) in {source}{written}")
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


def size(path):
    """How many pictures a file holds; a video says so itself, and not always truly."""
    if path.suffix.lower() not in VIDEOS:
        return 1
    return max(0, int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)))


def frames(path, name):
    """The frames of a video: (what it is, name of its results, the picture (H, W, 3) uint8).

    Raises:
        DataError: after the last frame that can be read, where there should be more.
    """
    video, number = cv2.VideoCapture(str(path)), 0
    while (found := video.read())[0]:
        image = cv2.cvtColor(found[1], cv2.COLOR_BGR2RGB)
        yield f"{path}, frame {number}", name.with_suffix("") / f"{number:06d}.png", image
        number += 1
    if number < size(path) or not number:
        raise DataError(f"{path}: {number} of {size(path)} frames can be read")


def jobs(names):
    """What is to be labelled: (what it is, name of its results, a picture, its path, or an
    error)."""
    for path, name in names.items():
        if path.suffix.lower() not in VIDEOS:
            yield path, name, path
            continue
        try:
            yield from frames(path, name)
        except DataError as error:
            yield path, name, error


def save_all(out, name, image, ids, model):
    """Write the three pictures of one image: ids (H, W) uint8."""
    results = Image.fromarray(ids), model.colored(ids), Image.fromarray(model.overlay(image, ids))
    for kind, picture in zip(KINDS, results):
        with replacing(out / kind / name) as path:
            picture.save(path)


def main(arguments):
    if len(arguments) < 3:
        sys.exit(__doc__)
    own = [a for a in arguments[3:] if a.startswith("probabilities=")]
    overrides = [a for a in arguments[3:] if a not in own]
    if {*own} - {"probabilities=true"}:
        raise ConfigError(f"probabilities must be true, not {own[0].partition('=')[2]}")
    if more := [a for a in overrides if "=" not in a]:
        raise ConfigError(
            f"{more[0]} is one argument too many: name one file, folder or video, or a pattern in "
            "quotes, such as 'photos/*.jpg'"
        )
    out = Path(arguments[2])
    names = find_pictures(Path(arguments[1]), out)
    try:
        for kind in KINDS:
            (out / kind).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {out / kind}: {error.strerror}") from None
    to_console()
    model, count, skipped = Predictor(*load_network(arguments[0], overrides)), 0, 0
    for what, name, picture in tqdm(jobs(names), total=sum(map(size, names))):
        try:
            if isinstance(picture, DataError):
                raise picture
            image = read_image(picture) if picture is what else picture
            chances = model.probabilities(image, what) if own else None
            ids = chances.argmax(0).astype(np.uint8) if own else model(image, what)
        except inference.NonFiniteScores:
            raise
        except UserError as error:  # unreadable, or too small for the network
            named = str(what) in str(error)
            logger.warning(f"skipped: {error}" if named else f"skipped: {what}: {error}")
            skipped += 1
            continue
        save_all(out, name, image, ids, model)
        if own:
            with replacing((out / "probabilities" / name).with_suffix(".npy")) as path:
                np.save(path, chances.astype(np.float16))
        count += 1
    if not count:
        raise DataError(f"none of the {skipped} pictures could be read")
    text = f"{count} picture{'s' * (count > 1)} written{f', {skipped} skipped' if skipped else ''}"
    print(f"{text}: {out}/ids, {out}/colors and {out}/overlays")


if __name__ == "__main__":
    run(main, __doc__)
