"""One file from a checkpoint, which runs without this project: torch.export, or ONNX.

    python export.py runs/camvid/resnet18_cbp_occl/seed0/best.pt model.pt2 PICTURES device=cpu
    python export.py CHECKPOINT model.onnx PICTURES
    python export.py CHECKPOINT model.pt2 PICTURES size=1024x2048     for such pictures alone

The file takes pictures (B, H, W, 3) uint8 RGB of any size, as Pillow and OpenCV (after BGR to RGB)
hold them: scaling and normalisation are inside. It returns class ids (B, H, W) uint8 and logits
(B, K, h, w) float32 at the network's own size. Names and colours of the classes are in it too.

    program = torch.export.load("model.pt2").module()
    labels, logits = program(torch.from_numpy(picture)[None])

Before it is called written, the file is read again and labels PICTURES, a picture, a folder or a
pattern in quotes: in a .pt2 every label must be the checkpoint's, in ONNX, whose kernels round
otherwise, 99.9 per cent. Size, seconds a picture and agreement are printed. It is fp32, one view of
the whole picture. A classifier of prototypes with one per class becomes a plain 1x1 convolution.

With `size=HEIGHTxWIDTH` the file takes pictures of this size only, and those of PICTURES that have
another one are left out. swin.Swin needs it: how its windows fill up depends on the size in so many
ways that PyTorch does not come to an end with a free one.
"""

import copy
import json
import logging
import re
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from datasets.base import DataError, read_image
from engine.config import ConfigError
from engine.errors import UserError
from engine.files import replacing
from engine.process import run
from engine.statistics import resize_logits
from engine.weights import reason
from models.classifiers.cbp import CBP
from predict import find_pictures, load

logger = logging.getLogger("engine")

ENOUGH = 0.999  # share of ONNX's labels that must be the checkpoint's


class Whole(nn.Module):
    """Pictures (B, H, W, 3) uint8 -> class ids (B, H, W) uint8 and logits (B, K, h, w)."""

    def __init__(self, network):
        super().__init__()
        self.network = copy.deepcopy(network)
        if isinstance(network.classifier, CBP) and network.classifier.per_class == 1:
            self.network.classifier = PlainConvolution(network.classifier.means())

    def forward(self, picture):
        image = picture.permute(0, 3, 1, 2).to(torch.float32) / 255
        logits = self.network.segment(image).logits
        return resize_logits(logits, image.shape[-2:]).argmax(1).to(torch.uint8), logits


class PlainConvolution(nn.Conv2d):
    """Class vectors (K, D) as the weights of a 1x1 convolution without bias."""

    def __init__(self, vectors):
        super().__init__(*reversed(vectors.shape), 1, bias=False)
        self.weight = nn.Parameter(vectors.detach()[:, :, None, None].clone())

    def forward(self, features, output=None):
        return super().forward(features)


def to_export(whole, example, free, path, about):
    """Write a program of torch.export -> a function of one picture (1, H, W, 3). `free` are the
    dimensions (B, H, W, 3) of any size."""
    free = (dict.fromkeys(free, torch.export.Dim.DYNAMIC),)
    program = torch.export.export(whole, (example,), dynamic_shapes=free, strict=False)
    with warnings.catch_warnings():  # of weights in channels_last, which it stores as they are
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(program, path, extra_files={"about.json": json.dumps(about)})
    return torch.export.load(path).module()


def to_onnx(whole, example, free, path, about):
    """Write an ONNX file -> the same, by onnxruntime."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  what torch.onnx needs
    except ImportError as error:
        raise UserError(
            "a file of ONNX needs three packages: pip install onnx onnxscript onnxruntime "
            f"({error}); a file .pt2 needs none"
        ) from None
    free = (dict.fromkeys(free, torch.export.Dim.DYNAMIC),)
    torch.onnx.export(
        whole,
        (example,),
        path,
        dynamic_shapes=free,
        input_names=["picture"],
        output_names=["labels", "logits"],
        external_data=False,
        verbose=False,
    )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in about.items()})
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def program(picture):
        return [torch.from_numpy(x) for x in session.run(None, {"picture": picture.numpy()})]

    return program


FORMATS = {".pt2": to_export, ".onnx": to_onnx}


def seconds(function, *inputs):
    """What a function returns, and how long it took."""
    start = time.perf_counter()
    result = function(*inputs)
    return result, time.perf_counter() - start


def readable(paths):
    """(path, picture) of those that can be read; the others are named and skipped."""
    for path in paths:
        try:
            yield path, read_image(path)
        except DataError as error:
            logger.warning(f"skipped: {error}")


@torch.no_grad()
def main(arguments):
    if len(arguments) < 3:
        sys.exit(__doc__)
    out = Path(arguments[1])
    if out.suffix not in FORMATS:
        raise ConfigError(f"{out} must end in {' or '.join(FORMATS)}")
    pictures = [*find_pictures(Path(arguments[2]), out)]
    sizes = [text.removeprefix("size=") for text in arguments[3:] if text.startswith("size=")]
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", sizes[-1]) if sizes else None
    if sizes and not match:
        raise ConfigError(f"size={sizes[-1]} must be HEIGHTxWIDTH in pixels, such as 1024x2048")
    size = tuple(map(int, match.groups())) if match else None
    found = {path: picture.shape[:2] for path, picture in readable(pictures)}
    if not found:
        raise ConfigError(f"none of the {len(pictures)} pictures could be read")
    paths = [path for path in found if not size or found[path] == size]
    if not paths:
        raise ConfigError(
            f"{arguments[2]} has no picture of {sizes[-1]}, by which to check the file"
        )
    rest = [text for text in arguments[3:] if not text.startswith("size=")]
    model = load(arguments[0], *rest, "precision=fp32")
    if not size and not model.network.backbone.any_size:
        raise ConfigError(
            f"a file of {type(model.network.backbone).__name__} is for pictures of one size: add "
            "size=HEIGHTxWIDTH, in pixels"
        )
    views = model.cfg.eval
    if views.mode != "whole" or views.flip or views.scales != [1.0] or views.short_side:
        raise ConfigError(
            "a file takes one view of the whole picture: add eval.mode=whole eval.flip=false "
            "eval.scales=[1.0] eval.short_side=0"
        )
    shape = (2, *(size or (97, 131)), 3)
    example = torch.randint(0, 256, shape, dtype=torch.uint8, device=model.device)
    network, free = Whole(model.network).eval(), range(1 if size else 3)
    about = {"classes": model.classes, "palette": model.palette}
    same, pixels, before, after = 0, 0, 0.0, 0.0
    with replacing(out) as temporary:
        try:
            program = FORMATS[out.suffix](network, example, free, temporary, about)
            for path in paths:
                picture = read_image(path)
                expected, spent = seconds(model, picture)
                before += spent
                given = torch.tensor(picture, device=model.device)[None]
                (labels, _), spent = seconds(program, given)
                after += spent
                same += int((labels[0].cpu() == torch.from_numpy(expected)).sum())
                pixels += expected.size
        except (AssertionError, RuntimeError) as error:  # what PyTorch's own checks raise
            raise UserError(
                f"{type(model.network.backbone).__name__} cannot be exported for pictures of these "
                f"sizes ({reason(error)})"
            ) from error
        if same < pixels * (1 if out.suffix == ".pt2" else ENOUGH):
            raise UserError(
                f"{out} is not written: {pixels - same} of {pixels} labels in {len(paths)} "
                "pictures are not the checkpoint's"
            )
    print(
        f"{out}: {out.stat().st_size / 2**20:.1f} MiB; {same / pixels:.4%} of the labels in "
        f"{len(paths)} pictures are the checkpoint's; {after / len(paths):.3f} s a picture, the "
        f"checkpoint {before / len(paths):.3f} s"
    )


if __name__ == "__main__":
    run(main, __doc__)
