"""mapped.Mapped: text turned into the space of a tower keeps its geometry."""

import pytest
import torch
import torch.nn.functional as F

from engine.build import build
from engine.errors import UserError


def cells(means, *labels):
    """What a tower shows: unit features (1, D, 1, N) near the class means, and labels."""
    labels = torch.tensor(labels).view(1, 1, -1)
    return lambda: [(means[labels[0, 0]].T[None, :, None], labels, None)]


def mapped(tmp_path, text, dim, **options):
    path, classes = tmp_path / "rows.pt", [f"c{i}" for i in range(len(text))]
    torch.save({"vectors": text, "classes": classes}, path)
    spec = {"name": "mapped.Mapped", "file": str(path), **options}
    context = {"num_classes": len(text), "in_channels": dim, "classes": classes}
    return build("models.prototypes", spec, **context)


@pytest.mark.parametrize("center", [True, False])
def test_mapped_rows_are_the_class_means_where_the_text_is_a_turned_copy_of_them(tmp_path, center):
    """Also of a class that the tower has not seen, if the others span its text."""
    basis = torch.linalg.qr(torch.randn(20, 3).double())[0].T
    text = F.normalize(torch.randn(6, 3).double() @ basis, dim=1)
    means = text @ torch.linalg.qr(torch.randn(20, 20).double())[0]
    member = mapped(tmp_path, text.float(), 20, center=center, offline=7)
    assert member.offline == 7 and not member.seen.any() and not member.means().any()
    member.fit(cells(means, *range(5), 0, 1), {})
    assert member.seen.all()
    offset = means[:5].mean(0) if center else 0
    expected = F.normalize(means - offset, dim=1).float()
    torch.testing.assert_close(member.means(), expected, atol=1e-3, rtol=0)


def test_mapping_keeps_what_the_text_says_of_classes(tmp_path):
    text = F.normalize(torch.randn(5, 12), dim=1)
    member = mapped(tmp_path, text, 30)
    member.fit(cells(F.normalize(torch.randn(5, 30), dim=1), *range(5)), {})
    rows = F.normalize(text - text.mean(0), dim=1)
    torch.testing.assert_close(member.means() @ member.means().T, rows @ rows.T, atol=1e-5, rtol=0)


def test_mapping_needs_two_classes(tmp_path):
    member = mapped(tmp_path, torch.randn(3, 4), 8)
    with pytest.raises(UserError, match="fewer than two classes: raise offline"):
        member.fit(cells(torch.randn(3, 8), 1, 1), {})
