"""ACTE's soft regions of a map: the grouping of models/heads/region.py, equations 1 to 3."""

import torch
import torch.nn.functional as F

EPSILON = 1e-6
ABSENT = -1e9  # similarity to a cell outside of the map: finite, so that nothing becomes NaN


def to_cells(maps, cell):
    """(B, D, h, w) -> (B, R, C, D, c c); sides that are no multiple of the cell are filled up with
    their last row."""
    bottom, right = (-side % cell for side in maps.shape[-2:])
    maps = F.pad(maps, (0, right, 0, bottom), mode="replicate") if bottom or right else maps
    return (
        maps.unflatten(3, (-1, cell)).unflatten(2, (-1, cell)).permute(0, 2, 4, 1, 3, 5).flatten(4)
    )


def from_cells(values, cell, size):
    """(B, R, C, D, c c) -> (B, D, h, w), without what was filled up."""
    maps = values.unflatten(4, (cell, cell)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
    return maps[..., : size[0], : size[1]]


def neighbours(regions):
    """Values of the regions (B, D, R, C) -> of the 3 x 3 around each (B, R, C, 9, D), zero
    outside."""
    b, d, rows, columns = regions.shape
    return F.unfold(regions, 3, padding=1).view(b, d, 9, rows, columns).permute(0, 3, 4, 2, 1)


def gather(values):
    """The opposite: what each cell gives to the 3 x 3 around it (B, R, C, 9, D) -> sums at the
    regions (B, D, R, C)."""
    b, rows, columns, _, d = values.shape
    return F.fold(
        values.permute(0, 4, 3, 1, 2).reshape(b, 9 * d, -1), (rows, columns), 3, padding=1
    )


def region_means(assignment, cells):
    """Equation 1: assignment (B, R, C, 9, c c), cells (B, R, C, D, c c) -> f (B, D, R, C)."""
    sums = gather(assignment @ cells.transpose(3, 4))
    return sums / gather(assignment.sum(4, keepdim=True)).clamp_min(EPSILON)


def assign(means, cells, kappa):
    """Equations 2 and 3: f (B, D, R, C) and unit features (B, R, C, D, c c) -> a (B, R, C, 9, c c),
    of sum 1."""
    inside = neighbours(torch.ones_like(means[:1, :1]))[..., 0]  # (1, R, C, 9)
    similar = (
        neighbours(F.normalize(means, dim=1, eps=EPSILON)) @ cells
    )  # cosines (B, R, C, 9, c c)
    return torch.where(inside[..., None] > 0, kappa * similar, ABSENT).softmax(3)


def group(maps, cell, kappa, rounds):
    """Soft regions of a map (B, D, h, w) -> (assignment (B, R, C, 9, c c), f (B, D, R, C)).

    With no round every pixel belongs to its own cell. Gradients reach the features through f alone,
    with the assignment
    as it is: nine times the cost for what changes little [R].
    """
    cells = to_cells(maps, cell)
    own = (torch.arange(9, device=maps.device) == 4).to(maps.dtype)  # the middle of the 3 x 3
    assignment = own[:, None].expand(*cells.shape[:3], 9, cell * cell)
    with torch.no_grad():
        unit = F.normalize(cells, dim=3, eps=EPSILON)
        for _ in range(rounds):
            assignment = assign(region_means(assignment, cells), unit, kappa)
    return assignment, region_means(assignment, cells)


def spread(assignment, values, cell, size):
    """Values of the regions (B, R, C) -> of the pixels, sum_r a(p, r) value(r): (B, h, w)."""
    around = neighbours(values[:, None]).transpose(3, 4)  # (B, R, C, 1, 9)
    return from_cells(around @ assignment, cell, size)[:, 0]


def labels_of(assignment, cell, size):
    """Number of the region that each pixel belongs to most, for pictures: (B, h, w)."""
    b, rows, columns = assignment.shape[:3]
    numbers = torch.arange(rows * columns, device=assignment.device, dtype=assignment.dtype).view(
        1, 1, rows, columns
    )
    numbers = neighbours(numbers).expand(b, -1, -1, -1, -1)[..., 0]  # (B, R, C, 9)
    return from_cells(numbers.gather(3, assignment.argmax(3))[:, :, :, None], cell, size)[
        :, 0
    ].long()
