"""Orthogonal rows against Gram-Schmidt, and that they never move."""

import torch
import torch.nn.functional as F
from torch import nn

from models.prototypes.basis import OrthogonalBasis, orthogonal_rows
from tests.records import a_step


def gram_schmidt(rows):
    """Algorithm 1 of the paper, lines 2 and 3, in plain Python."""
    basis = []
    for row in rows:
        for b in basis:
            row = row - (row @ b) / (b @ b) * b
        basis.append(row)
    return torch.stack(basis)


def test_qr_is_normalised_gram_schmidt_of_the_same_draws():
    torch.manual_seed(3)
    drawn = torch.empty(12, 20, dtype=torch.float64)
    nn.init.kaiming_normal_(drawn)
    expected = F.normalize(gram_schmidt(drawn), dim=1) * 2
    torch.manual_seed(3)
    torch.testing.assert_close(orthogonal_rows(12, 20, 2), expected, atol=1e-12, rtol=0)


def test_frozen_prototypes_ignore_update_and_fit():
    basis = OrthogonalBasis(num_classes=3, in_channels=8)
    before = basis.means().clone()
    batch = (torch.randn(1, 8, 4, 4), torch.randint(3, (1, 4, 4)), None)
    basis.update([batch], a_step())
    basis.fit(lambda: [batch], {})
    assert torch.equal(basis.means(), before) and basis.seen.all()
