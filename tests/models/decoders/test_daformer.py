"""DAFormer's decoder: its size, its maps, its context."""

import torch

from models.classifiers.linear import Linear
from models.decoders.daformer import DAFormer


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def test_daformer_decoder_has_its_published_size():
    with torch.device("meta"):
        decoder = DAFormer(in_channels=[64, 128, 320, 512])
        classifier = Linear(in_channels=decoder.channels, num_classes=19)
    assert round(count(decoder, classifier) / 1e6, 1) == 3.7
    # Written out: embedding, 1x1, three times depthwise and pointwise, 3x3; each with the norms behind it.
    embedding = 1024 * 256 + 4 * 256
    branches = (1024 * 256 + 512) + 3 * (1024 * 9 + 2 * 1024 + 1024 * 256 + 512)
    assert count(decoder) == embedding + branches + (1024 * 256 * 9 + 512)


def test_daformer_features_have_the_size_of_the_finest_map():
    maps = [
        torch.randn(2, c, *size)
        for c, size in ((8, (25, 17)), (16, (13, 9)), (24, (7, 5)), (32, (4, 3)))
    ]
    decoder = DAFormer(in_channels=[8, 16, 24, 32], width=12).eval()
    assert decoder(maps).shape == (2, 12, 25, 17) and decoder.channels == 12


def test_daformer_context_reaches_as_far_as_its_largest_rate():
    """From the finest map: 18 cells by the dilated branch and one more by the convolution that joins, per axis."""
    decoder = DAFormer(in_channels=[3, 4], width=8).eval()
    x = torch.randn(1, 3, 51, 51, requires_grad=True)
    decoder([x, torch.randn(1, 4, 26, 26)])[0, :, 25, 25].sum().backward()
    rows = (x.grad.abs().sum((0, 1, 3)) > 0).nonzero().flatten() - 25
    reached = {abs(int(row)) for row in rows}
    assert reached == {n + d for n in (0, 6, 12, 18) for d in (-1, 0, 1)} - {-1}
