"""ACTE's soft regions against naive loops over pixels and regions."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.heads._grouping import (
    assign,
    from_cells,
    group,
    labels_of,
    region_means,
    spread,
    to_cells,
)
from tests.models.heads.test_region import D, maps


def dense(assignment, cell, size):
    """Assignment (B, R, C, 9, c c) -> every pixel's weight of every region (B, R C, h, w)."""
    b, rows, columns = assignment.shape[:3]
    eye = torch.eye(rows * columns, dtype=assignment.dtype).view(rows * columns, rows, columns)
    return torch.stack([spread(assignment, one.expand(b, -1, -1), cell, size) for one in eye], 1)


def naive(x, cell, kappa, rounds):
    """Equations 1 to 3 with loops over pixels and regions: (D, h, w) -> a (h, w, R, C), f (R, C, D)."""
    h, w = x.shape[1:]
    rows, columns = h // cell, w // cell
    a = torch.zeros(h, w, rows, columns, dtype=x.dtype)
    for i in range(h):
        for j in range(w):
            a[i, j, i // cell, j // cell] = 1
    for turn in range(rounds + 1):
        f = torch.einsum("hwrc,dhw->rcd", a, x) / a.sum((0, 1))[..., None]
        if turn == rounds:
            return a, f
        a = torch.zeros_like(a)
        for i in range(h):
            for j in range(w):
                for r in range(max(i // cell - 1, 0), min(i // cell + 2, rows)):
                    for c in range(max(j // cell - 1, 0), min(j // cell + 2, columns)):
                        a[i, j, r, c] = math.exp(
                            kappa * float(F.cosine_similarity(f[r, c], x[:, i, j], dim=0))
                        )
                a[i, j] /= a[i, j].sum()


def test_grouping_is_that_of_the_equations():
    x = maps(12, 8, 1)
    assignment, means = group(x, 4, 5.0, 2)
    a, f = naive(x[0], 4, 5.0, 2)
    torch.testing.assert_close(dense(assignment, 4, (12, 8))[0].permute(1, 2, 0).view(a.shape), a)
    torch.testing.assert_close(means[0].permute(1, 2, 0), f)


def test_assignments_sum_to_one_over_at_most_nine_regions():
    assignment, means = group(maps(), 4, 10.0, 3)
    assert assignment.shape == (2, 4, 5, 9, 16) and means.shape == (2, D, 4, 5)
    torch.testing.assert_close(
        assignment.sum(3), torch.ones(2, 4, 5, 16).double(), rtol=0, atol=1e-6
    )
    full = dense(assignment, 4, (16, 20))
    count = (full > 0).sum(1)
    assert count[:, 0, 0].eq(4).all() and count[:, 0, 8].eq(6).all() and count[:, 8, 8].eq(9).all()


@pytest.mark.parametrize("constant", [False, True])
def test_no_sharpness_or_equal_features_share_a_pixel_equally(constant):
    x = torch.ones(1, D, 12, 12).double() if constant else maps(12, 12, 1)
    full = dense(group(x, 4, 50.0 if constant else 0.0, 1)[0], 4, (12, 12))
    for (row, column), share in {(0, 0): 1 / 4, (0, 5): 1 / 6, (5, 5): 1 / 9}.items():
        assert full[0, :, row, column].max() == pytest.approx(share, abs=1e-12)


def test_great_sharpness_is_one_hot_and_no_round_is_the_grid():
    full = dense(group(maps(), 4, 1e5, 1)[0], 4, (16, 20))
    torch.testing.assert_close(full.amax(1), torch.ones(2, 16, 20).double())
    x = maps()
    assignment, means = group(x, 4, 10.0, 0)
    torch.testing.assert_close(means, F.avg_pool2d(x, 4))
    rows, columns = torch.arange(16)[:, None] // 4, torch.arange(20) // 4
    assert torch.equal(labels_of(assignment, 4, (16, 20))[0], rows * 5 + columns)


def test_regions_never_cross_an_edge_between_two_colours():
    colours = torch.nn.functional.one_hot(torch.tensor([0, 1]), D).double()
    side = (torch.arange(24) >= 10).long()  # off the grid of 4
    x = colours[side].T[None, :, None].expand(1, D, 16, 24)
    labels = labels_of(group(x, 4, 50.0, 3)[0], 4, (16, 24))[0]
    left, right = (set(labels[:, side == s].flatten().tolist()) for s in (0, 1))
    assert not left & right and len(left) > 2 and len(right) > 2


def test_sizes_that_are_no_multiple_are_filled_up_and_cut_again():
    x = maps(13, 18)
    cells = to_cells(x, 4)
    assert cells.shape == (2, 4, 5, D, 16)
    assert torch.equal(from_cells(cells, 4, (13, 18)), x)
    assignment, _ = group(x, 4, 10.0, 2)
    ones = spread(assignment, torch.ones(2, 4, 5).double(), 4, (13, 18))
    torch.testing.assert_close(ones, torch.ones(2, 13, 18).double())
    assert labels_of(assignment, 4, (13, 18)).shape == (2, 13, 18)


def test_grouping_follows_a_mirror_and_looks_only_at_directions():
    x = maps()
    one, other = (dense(group(y, 4, 10.0, 2)[0], 4, (16, 20)) for y in (x, x.flip(-1)))
    mirrored = other.flip(-1).unflatten(1, (4, 5)).flip(2).flatten(1, 2)
    torch.testing.assert_close(one, mirrored)
    means = F.avg_pool2d(x, 4)
    unit, scaled = (
        F.normalize(to_cells(y, 4), dim=3) for y in (x, x * torch.rand(2, 1, 16, 20).double())
    )
    torch.testing.assert_close(assign(means, unit, 10.0), assign(means, scaled, 10.0))


def test_gradients_reach_the_features_through_the_means():
    x = maps().requires_grad_()
    assignment, means = group(x, 4, 10.0, 2)
    means.square().sum().backward()
    assert not assignment.requires_grad and (x.grad != 0).all()
    again = region_means(assignment, to_cells(x.detach(), 4))
    torch.testing.assert_close(again, means.detach())
