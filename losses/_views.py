"""Two views of the cells of each class: what OCCL contrasts.

    views = halve(labels, samples, num_classes, seed, "objects", sync=True)

A class is made of units: objects, images or cells. A hash orders its units over the whole batch.
They are dealt out in turn, one to the first view, one to the second. The hash reads the seed, the
sample's number in the stream and the first cell of the unit. So neither the order of the batch, nor
the number of processes, nor a resumed run changes views. Nothing here waits for a GPU.
"""

import torch
import torch.nn.functional as F

from engine import distributed
from engine.statistics import IGNORE, pixel_hash

# A key holds, from the top: class, 32 bits of hash, low bits of the sample. The last tell apart
# equal hashes of two images.
SAMPLE_BITS = 20
CLASS = 1 << (SAMPLE_BITS + 32)


def components(labels):
    """Connected components of equal labels, where the 8 cells around a cell are its neighbours.

    Exact for every shape. Trees of cells start as horizontal runs. In a round, every root takes the
    smallest root that it touches as its parent, if that is smaller than itself. Then every cell
    points at its root again. Two rounds halve the roots of a component, or more: a root that stays
    and that no other took touches a smaller one after the first round, so it goes in the second.
    Hence the number of rounds is fixed, 2 log2 of the runs that an image can have.

    Args:
        labels: (B, h, w) integers from 0.
    Returns:
        (B, h w) int64: the first cell, in raster order, of each cell's component.
    """
    height, width = labels.shape[1:]
    cells = torch.arange(height * width, device=labels.device).view(height, width)
    padded = F.pad(labels, (1, 1, 1, 0), value=-1)
    left = padded[:, 1:, :-2] == labels
    northwest, north, northeast = (
        padded[:, :-1, start : start + width] == labels for start in range(3)
    )
    # The cells above touch each other, so that at most two of the three links are needed.
    first = cells - width * north - (width + 1) * (northwest & ~north)
    second = cells - (width - 1) * (northeast & ~north)
    links = torch.stack([first, second], 1).flatten(2)  # (B, 2, h w)
    parents = torch.where(left, 0, cells).flatten(1).cummax(1).values
    roots = height * ((width + 1) // 2)  # the most that a component can have
    while roots > 1:
        before = parents
        for _ in range(2):
            theirs = parents.gather(1, links.flatten(1)).view_as(links)
            larger = torch.maximum(parents[:, None], theirs).flatten(1)
            smaller = torch.minimum(parents[:, None], theirs).flatten(1)
            parents = parents.scatter_reduce(1, larger, smaller, "amin")
            for _ in range((roots - 1).bit_length()):  # each doubles the reach, up to all roots
                parents = parents.gather(1, parents)
        if parents.device.type == "cpu" and torch.equal(parents, before):
            break  # the rounds that are left change nothing; to ask a GPU would wait for it
        roots //= 2
    return parents


def units(ids, shape, num_classes, split):
    """(B, N): the first cell of the unit that each cell belongs to, of classes ids (B, N)."""
    if split == "objects":
        return components(ids.view(shape))
    cells = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if split == "image":
        nowhere = ids.new_full((len(ids), num_classes + 1), ids.shape[1])
        return nowhere.scatter_reduce(1, ids, cells, "amin").gather(1, ids)
    return cells


def deal(ids, order, heads, num_classes, sync):
    """Deal out the units of each class in turn.

    Args:
        ids: (B, N) class of each cell, K for none.
        order: (B, N) a number below CLASS of each cell.
        heads: (B, N) first cell of its unit, whose number places the unit.
        sync: units of all processes.
    Returns:
        (B, N) 0 or 1, the view of each cell; (K + 1) number of units of each class, 0 for the last.
        The views of a class differ by at most one unit; a bit of the hash says which is the larger.
    """
    head = heads == torch.arange(ids.shape[1], device=ids.device)
    keys = torch.where(head & (ids < num_classes), ids * CLASS + order, num_classes * CLASS)
    keys = distributed.all_gather(keys) if sync else keys[None]  # (processes, B, N)
    drawn, places = keys.flatten().sort()
    ranks = torch.empty_like(places)
    ranks.scatter_(0, places, torch.arange(len(places), device=ids.device))
    ranks = ranks.view_as(keys)[distributed.rank() if sync else 0].gather(1, heads)
    starts = torch.searchsorted(drawn, torch.arange(num_classes + 1, device=ids.device) * CLASS)
    rounding = drawn[starts.clamp_max(len(drawn) - 1)] >> SAMPLE_BITS
    turn = ranks - starts[ids] + rounding[ids]
    return turn % 2, starts.diff(append=starts[-1:])


def halve(labels, samples, num_classes, seed, split="random", sync=False):
    """Split the cells of each class in two.

    Args:
        labels: (B, h, w); values outside 0..K-1 belong to no class.
        samples: (B) int64, number of each sample in the stream; those of a batch differ.
        split: see losses/occl.py.
        sync: over the batch of all processes, which have equally many images of one size.
    Returns:
        (B, h, w) int64: label for the first view, K + label for the second, 255 or more elsewhere.
    """
    known = (labels >= 0) & (labels < num_classes)
    ids = torch.where(known, labels.long(), num_classes).flatten(1)  # (B, N)
    if split == "checkerboard":
        rows, columns = (torch.arange(size, device=labels.device) for size in labels.shape[1:])
        second = (rows[:, None] + columns).flatten() % 2
    else:
        order = pixel_hash(seed, samples, ids.shape[1]) << SAMPLE_BITS
        order = order + (samples % (1 << SAMPLE_BITS))[:, None]
        heads = units(ids, labels.shape, num_classes, split)
        second, counts = deal(ids, order, heads, num_classes, sync)
        if split != "random":
            # The only unit of a class lies in one image: this process deals out its cells.
            cells = units(ids, labels.shape, num_classes, "random")
            by_cell, _ = deal(ids, order, cells, num_classes, sync=False)
            second = torch.where((counts == 1)[ids], by_cell, second)
    views = (ids + num_classes * second).view_as(labels)
    return torch.where(known, views, 2 * num_classes + IGNORE)
