"""Predict and evaluate: whole image or sliding window, several scales, mirrored image; scored at
label resolution."""

import functools
import itertools
import logging
import math
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from engine import distributed, process
from engine.errors import UserError
from engine.log import interactive
from engine.metrics import ConfusionMatrix, warnings_about
from engine.statistics import resize_logits

logger = logging.getLogger("engine")
CHUNK = 2**23  # scores that `classify` holds at a time, 32 MiB; of one view at least 16 classes
warned = weakref.WeakSet()  # data sets whose labels have been looked at


class NonFiniteScores(UserError):
    """A network whose scores are NaN or infinite: what it says of a picture means nothing."""

    def __init__(self, what):
        super().__init__(
            f"{what}: the network's scores are not finite. Take an earlier checkpoint; with "
            f"precision=fp16 try bf16"
        )


def scaled(image, short_side, scale=1.0):
    """Images (B, C, H, W) with their short side at so many pixels, or as they are for 0, and then
    both sides times `scale`."""
    factor = (short_side / min(image.shape[-2:]) if short_side else 1.0) * scale
    if factor == 1.0:
        return image
    size = [max(1, round(side * factor)) for side in image.shape[-2:]]
    return F.interpolate(image, size, mode="bilinear", antialias=True)


class View(NamedTuple):
    """One view of an image as the network left it: full size comes later, for some classes at a
    time."""

    logits: list  # (1, K, h, w) of each window, at the network's stride
    windows: list  # (rows, columns) of each: slices of the view; [None]: it is the only one
    size: tuple  # (H, W) of the view
    result: tuple  # (H, W) of the result
    mirror: bool

    def scores(self, classes=slice(None)):
        """Logits of some classes (1, k, H, W); where windows overlap, their mean."""
        # In the layout of the whole: it decides how PyTorch rounds when it resizes.
        last = self.logits[0].is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        parts = [one[:, classes].float().contiguous(memory_format=layout) for one in self.logits]
        scores = parts[0]
        if self.windows[0]:
            scores = scores.new_zeros(1, scores.shape[1], *self.size)
            count = scores.new_zeros(1, 1, *self.size)
            for part, (rows, columns) in zip(parts, self.windows):
                place = (..., rows, columns)
                scores[place] += resize_logits(part, count[place].shape[-2:])
                count[place] += 1
            scores /= count
        if scores.shape[-2:] != self.result:
            scores = resize_logits(scores, self.result)
        return scores.flip(-1) if self.mirror else scores


def _look(network, image, options, result):
    """The views of an image (1, 3, H, W) that `options` ask for, and the number of classes."""
    views = []
    for scale in options.scales:
        for mirror in (False, True)[: 1 + options.flip]:
            view = scaled(image, options.short_side, scale)
            view = view.flip(-1) if mirror else view
            size, windows, images = view.shape[-2:], [None], [view]
            if options.mode == "slide":
                windows = _windows(size, options.crop, options.stride)
                images = [view[..., rows, columns] for rows, columns in windows]
            logits = [network.segment(image).logits for image in images]
            views.append(View(logits, windows, size, result, mirror))
    return views, logits[0].shape[1]


def _windows(size, crop, stride):
    """[(rows, columns)] of windows of the size `crop`; the last ones end at the border."""

    def slices(size, crop, stride):
        crop = min(crop, size)
        starts = [*range(0, size - crop, stride), size - crop]
        return [slice(start, start + crop) for start in starts]

    rows, columns = (slices(*one) for one in zip(size, crop, stride))
    return [*itertools.product(rows, columns)]


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
    views, _ = _look(network, image, options, tuple(size or image.shape[-2:]))
    if len(views) == 1:
        return views[0].scores()
    return sum(view.scores().softmax(1) / len(views) for view in views)


@torch.no_grad()
def classify(network, image, options, size=None):
    """The arg max of what `predict` returns, without its (1, K, H, W): a few classes at a time.

    Returns:
        class ids (H, W) int64, and whether all scores are finite: a tensor, for which no GPU waits.
    """
    size = tuple(size or image.shape[-2:])
    views, number = _look(network, image, options, size)
    several, step = len(views) > 1, max(1, CHUNK // (size[0] * size[1]))
    if not several:
        # Bit for bit: PyTorch resizes 16 channels at a time, and fewer than 4 by another kernel.
        step = 16 * math.ceil(step / 16)
    edges = [*range(0, max(1, number - 3), step), number]
    chunks = [slice(*pair) for pair in itertools.pairwise(edges)]
    norms = [_log_sum_exp(view, chunks) if several else None for view in views]
    finite, best, ids = True, None, None
    for classes in chunks:
        scores = views[0].scores(classes)
        if several:
            scores = (scores - norms[0]).exp_()
            for view, norm in zip(views[1:], norms[1:]):
                scores += (view.scores(classes) - norm).exp_()
        top, place = scores.max(1)
        finite = top.isfinite().all() & scores.amin(1).isfinite().all() & finite
        del scores  # before the next ones are made
        place += classes.start
        if best is None:
            best, ids = top, place
        else:
            torch.where(top > best, place, ids, out=ids)
            torch.maximum(top, best, out=best)
    return ids[0], finite


def _log_sum_exp(view, chunks):
    """log sum_k exp(score_k) of a view (1, 1, H, W)."""
    parts = (view.scores(classes).logsumexp(1, keepdim=True) for classes in chunks)
    return functools.reduce(torch.logaddexp, parts)


def read(dataset, indices, workers=0, pin=False):
    """Samples of a data set one by one, read ahead by loader processes; an iterable of known
    length."""
    return DataLoader(
        Subset(dataset, indices),
        batch_size=None,
        num_workers=process.loaders(workers),
        worker_init_fn=process.loader,
        pin_memory=pin,
        generator=torch.Generator(),  # none of the process's random numbers
    )


@torch.no_grad()
def evaluate(network, dataset, options, device, autocast, title="", workers=0):
    """Confusion matrix over a data set; each process takes every n-th image, none is seen twice.

    What is suspicious about the labels is said once for each data set.

    Args:
        network: Segmentor (not DDP); put into eval mode here and back into its mode afterwards.
        dataset: labelled data set without augmentation.
        autocast: context of the forward pass.
        workers: loader processes, where a GPU would wait for pictures; on a CPU the network is all.
    Returns:
        ConfusionMatrix of all processes; None if a signal has cut it short.
    Raises:
        NonFiniteScores: on every process, after the last image.
    """
    mode = network.training
    network.eval()
    broken = torch.zeros((), dtype=torch.int64, device=device)  # images; a GPU does not wait for it
    matrix = ConfusionMatrix(dataset.CLASSES, options.subsets, device, dataset.SCORED)
    mine = range(distributed.rank(), len(dataset), distributed.world_size())
    samples = read(dataset, mine, workers if device.type == "cuda" else 0, device.type == "cuda")
    for sample in tqdm(
        samples,
        desc=title,
        leave=False,
        disable=not (distributed.is_main() and interactive()),
        mininterval=1.0,
    ):
        # Bytes travel, and floats are made on the device.
        image = sample["image"][None].to(device, non_blocking=True)
        image = image.to(torch.get_default_dtype()) / 255
        label = sample["label"].to(device, non_blocking=True)
        try:
            with autocast:
                ids, finite = classify(network, image, options, label.shape[-2:])
        except UserError as error:
            raise UserError(
                f"{title or 'data set'}, {dataset.stem(sample['index'])}: {error}"
            ) from error
        if (
            process.signals.received
        ):  # the run that validates its network stops here, on all processes
            break
        broken += ~finite
        matrix.update(ids, label)
    network.train(mode)
    if process.signals.requested():
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
