"""Predict and evaluate: whole image or sliding window, several scales, mirrored image; scored at
label resolution."""

import logging
import weakref

import torch
import torch.nn.functional as F
from tqdm import tqdm

from engine import distributed
from engine.errors import UserError
from engine.metrics import ConfusionMatrix, warnings_about
from engine.process import signals
from engine.statistics import resize_logits

logger = logging.getLogger("engine")
warned = weakref.WeakSet()  # data sets whose labels have been looked at


class NonFiniteScores(UserError):
    """A network whose scores are NaN or infinite: what it says of a picture means nothing."""

    def __init__(self, what):
        super().__init__(
            f"{what}: the network's scores are not finite. Take an earlier checkpoint; with "
            f"precision=fp16 try bf16"
        )


def bands(network, image, options):
    """Logits of an image by a sliding window, from top to bottom: (1, K, h, W), as many rows as no
    later window changes. Overlaps are averaged; memory holds the rows of one window."""
    height, width = image.shape[-2:]
    crop = [min(options.crop[0], height), min(options.crop[1], width)]

    def starts(size, window, stride):
        return [*range(0, size - window, stride), size - window]

    total, count = 0, image.new_zeros(1, 1, crop[0], width)
    tops = starts(height, crop[0], options.stride[0])
    for top, following in zip(tops, [*tops[1:], height]):
        for left in starts(width, crop[1], options.stride[1]):
            columns = (..., slice(left, left + crop[1]))
            window = image[..., top : top + crop[0], :][columns]
            logits = resize_logits(network.segment(window).logits.float(), crop)
            if not torch.is_tensor(total):
                total = logits.new_zeros(1, logits.shape[1], crop[0], width)
            total[columns] += logits
            count[columns] += 1
        done = following - top
        yield total[:, :, :done] / count[:, :, :done]
        total, count = (F.pad(rows[:, :, done:], (0, 0, 0, done)) for rows in (total, count))


def scaled(image, short_side, scale=1.0):
    """Images (B, C, H, W) with their short side at so many pixels, or as they are for 0, and then
    both sides times `scale`."""
    factor = (short_side / min(image.shape[-2:]) if short_side else 1.0) * scale
    if factor == 1.0:
        return image
    size = [max(1, round(side * factor)) for side in image.shape[-2:]]
    return F.interpolate(image, size, mode="bilinear", antialias=True)


@torch.no_grad()
def predict(network, image, options, size=None):
    """Class scores of one image.

    Args:
        network: Segmentor in eval mode.
        image: (1, 3, H, W) in [0, 1].
        options: the `eval` section: mode, crop, stride, short_side, scales, flip.
        size: (H, W) of the result; None keeps the image's.
    Returns:
        (1, K, H, W): logits for one view of the image, mean probabilities for several.
    """
    size = size or image.shape[-2:]
    mirrors = (False, True)[: 1 + options.flip]
    views = [(scale, mirror) for scale in options.scales for mirror in mirrors]
    total = 0
    for scale, mirror in views:
        view = scaled(image, options.short_side, scale)
        view = view.flip(-1) if mirror else view
        logits = (
            torch.cat([*bands(network, view, options)], 2)
            if options.mode == "slide"
            else network.segment(view).logits.float()
        )
        logits = resize_logits(logits, size)
        logits = logits.flip(-1) if mirror else logits
        if len(views) == 1:
            return logits
        total = total + logits.softmax(1) / len(views)
    return total


@torch.no_grad()
def label(network, image, options, what):
    """Class ids (H, W) uint8 of one image, as `predict` scores it. In windows of one view it is
    done by bands: the scores of a large picture need not fit into the memory.

    Args:
        what: name of the image in an error.
    Raises:
        NonFiniteScores: the network's scores are.
    """
    plain = options.scales == [1.0] and not options.flip and not options.short_side
    parts = [predict(network, image, options)] if not plain or options.mode != "slide" else None
    ids = []
    for scores in parts or bands(network, image, options):
        if not scores.isfinite().all():
            raise NonFiniteScores(what)
        ids.append(scores.argmax(1)[0].byte())
    return torch.cat(ids)


@torch.no_grad()
def evaluate(network, dataset, options, device, autocast, title=""):
    """Confusion matrix over a data set; each process takes every n-th image, none is seen twice.

    What is suspicious about the labels is said once for each data set.

    Args:
        network: Segmentor (not DDP); put into eval mode here and back into its mode afterwards.
        dataset: labelled data set without augmentation.
        autocast: context of the forward pass.
    Returns:
        ConfusionMatrix of all processes; None if a signal has cut it short.
    Raises:
        NonFiniteScores: on every process, after the last image.
    """
    mode = network.training
    network.eval()
    broken = torch.zeros((), dtype=torch.int64, device=device)  # images; a GPU does not wait for it
    matrix = ConfusionMatrix(dataset.CLASSES, options.subsets, device, dataset.SCORED)
    indices = range(distributed.rank(), len(dataset), distributed.world_size())
    for index in tqdm(
        indices, desc=title, leave=False, disable=not distributed.is_main(), mininterval=1.0
    ):
        sample = dataset[index]
        image = sample["image"][None].to(device, torch.get_default_dtype()) / 255
        label = sample["label"].to(device)
        try:
            with autocast:
                scores = predict(network, image, options, label.shape[-2:])
        except UserError as error:
            raise UserError(f"{title or 'data set'}, {dataset.stem(index)}: {error}") from error
        if signals.received:  # the run that validates its network stops here, on all processes
            break
        broken += ~scores.isfinite().all()
        matrix.update(scores.argmax(1)[0], label.long())
    network.train(mode)
    if signals.requested():
        return None
    if broken := int(distributed.all_reduce(broken)):
        raise NonFiniteScores(f"{title or 'data set'}, {broken} of {len(dataset)} images")
    matrix.all_reduce()
    if distributed.is_main() and dataset not in warned:
        warned.add(dataset)
        where = f"{type(dataset).__name__} {dataset.split}{f' ({title})' * bool(title)}"
        for sentence in warnings_about(matrix.pixels(), dataset.CLASSES, where, dataset.expected):
            logger.warning(sentence)
    return matrix
