"""Small pieces that several networks share."""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from engine.errors import UserError
from engine.step import Output
from engine.weights import reason
from models.compiled import caller

# PyTorch 2.6 cannot tell an export from a compilation.
exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
SMALL = 32  # pixels; up to here maps may have one cell, or attention no key
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """Pictures in [0, 1] -> (x - mean) / std per channel. Not part of the state dict, since the
    weights imply it."""

    def __init__(self, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, image):
        return (image - self.mean) / self.std


def conv_bn_relu(in_channels, out_channels, kernel=3, dilation=1):
    """Convolution without bias, batch norm, ReLU; the size stays."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(
            in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=False
        ),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


def pad_to(x, multiple):
    """Maps (B, C, h, w) with zeros at the bottom and on the right, so that both sides are
    multiples."""
    bottom, right = (-side % multiple for side in x.shape[-2:])
    # An export is for any size: there nothing is asked of it.
    padded = exporting() or bottom or right
    return F.pad(x, (0, right, 0, bottom)) if padded else x


def dilate(stage, dilation, first):
    """Keep a stage at the size of its input: its stride becomes a dilation, of its first block
    `first`. In DeepLab that is the dilation of the stage before, because the block's input was not
    yet thinned out.
    """
    for i, block in enumerate(stage):
        for module in block.modules():
            if isinstance(module, nn.Conv2d):
                module.stride = (1, 1)
                if module.kernel_size != (1, 1):
                    rate = first if i == 0 else dilation
                    module.dilation, module.padding = (
                        (rate, rate),
                        (rate * (module.kernel_size[0] // 2),) * 2,
                    )


@contextlib.contextmanager
def still(module, when=True):
    """Within it, batch norms in training mode normalise by their batch and keep their running
    statistics; if `when` is false, they move as usual."""
    kind = nn.modules.batchnorm._BatchNorm
    norms = [m for m in module.modules() if when and isinstance(m, kind) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, counter) in zip(norms, before):
        # A counter to throw away: nn.SyncBatchNorm refuses to do without one.
        norm.momentum, norm.num_batches_tracked = 0.0, None if counter is None else counter.clone()
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before):
            norm.momentum, norm.num_batches_tracked = momentum, counter


@contextlib.contextmanager
def sizes_named(image):
    """Within it, what PyTorch cannot do with a small image (B, 3, H, W) is a UserError that says
    so."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if min(size := image.shape[-2:]) > SMALL:
            raise
        raise UserError(
            f"the network cannot take {len(image)} x {size[0]}x{size[1]} pixels "
            f"({reason(error)}): set a larger data.augment.crop, eval.crop, eval.short_side or "
            "eval.scales, or in training a larger batch"
        ) from error


def joined(network, views, step):
    """Maps of the backbone for all views of a step, as one batch: half as many launches for two.

    Args:
        network: Segmentor.
        views: {name: View}.
        step: as of Segmentor.forward.
    Returns:
        {name: maps}; empty where a view must go by itself: a backbone that does not `join`, images
        of several sizes, a head that guides the attention by what it finds on a view.
    """
    images = [view.image for view in views.values()]
    guided = any(head.bias(Output(), step) for head in network.heads.values())
    sizes = {image.shape[1:] for image in images}
    if not network.backbone.joins or guided or len(sizes) > 1 or len(images) == 1:
        return {}
    with sizes_named(images[0]):
        maps = (network.cache or network.backbone)(torch.cat(images))
    parts = zip(*(whole.split([*map(len, images)]) for whole in maps))
    return dict(zip(views, parts))


def run(block, checkpointing, *inputs):
    """block(*inputs), by compiled code within `compiled.compiling`. With checkpointing, in
    training, only the inputs are kept: the backward pass computes the block again, with the same
    random numbers, and without moving running statistics a second time."""
    call = caller()
    if not (checkpointing and block.training and torch.is_grad_enabled()):
        return call(block, *inputs)
    contexts = {"context_fn": lambda: (contextlib.nullcontext(), still(block))}
    return checkpoint(call, block, *inputs, use_reentrant=False, **contexts)


def anchored(maps, norms):
    """Maps of which the coarsest, which every decoder reads, also depends on all parameters of the
    norms, times zero: a decoder may leave out other maps, and DistributedDataParallel waits for
    every gradient."""
    zero = 0 * sum(parameter.sum() for norm in norms for parameter in norm.parameters())
    return [*maps[:-1], maps[-1] + zero.to(maps[-1].dtype)]


class Guide(NamedTuple):
    """What a block's attention gets: floats (B, 1, 1, M) added to its logits; a factor (B, 1, M, 1)
    of its values."""

    bias: torch.Tensor | None = None
    values: torch.Tensor | None = None


def guided(guide, v):
    """A Guide, a bias alone or None, and values (B, heads, M, D) -> the bias for the logits and the
    values."""
    bias, factor = guide if isinstance(guide, Guide) else (guide, None)
    return None if bias is None else bias.to(v.dtype), v if factor is None else v * factor.to(
        v.dtype
    )


def received(q, k, guide=None):
    """Queries (B, heads, N, D), keys (B, heads, M, D) -> the attention that each key gets (B, M),
    mean over heads and queries. Only for pictures: it makes the whole matrix."""
    bias, values = guided(guide, torch.ones_like(k[..., :1]))
    logits = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    weights = (logits if bias is None else logits + bias).softmax(3)  # (B, heads, N, M)
    return (weights * values.transpose(2, 3)).mean((1, 2))
