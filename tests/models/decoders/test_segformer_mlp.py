"""The all-MLP decoder: the sign of its features."""

import torch

from models.decoders.segformer_mlp import SegFormerMLP


def test_projected_features_have_either_sign_and_others_none_below_zero():
    torch.manual_seed(0)
    maps = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)]
    plain, projected = (
        SegFormerMLP(in_channels=[4, 6], width=16, dropout=0.0, project=project)
        for project in (False, True)
    )
    assert plain(maps).min() == 0
    features = projected(maps)
    assert features.shape == (2, 16, 8, 8) and 0.2 < (features < 0).float().mean() < 0.8
    # The names of older checkpoints.
    assert not [key for key in plain.state_dict() if "project" in key]
