"""Swin: how files of others order merged patches."""

import torch
import torch.nn.functional as F

from models.backbones.swin import Swin
from tests.models.networks import SMALL, saved, scrambled, swin_mmsegmentation


def test_merged_patches_of_mmsegmentation_are_unfolded_ones(tmp_path):
    """Its layer is nn.Unfold, norm and reduction: written out from its tensors, it gives our map."""
    ours = scrambled(Swin(weights="none", **SMALL))
    state = {k: v for k, v in ours.state_dict().items() if not k.startswith("norm")}
    file = swin_mmsegmentation(state)
    other = Swin(weights=saved(file, tmp_path), **SMALL).eval()
    tensors = {
        k.removeprefix("backbone.stages.0.downsample."): v for k, v in file["state_dict"].items()
    }
    x = torch.randn(2, 32, 6, 10)
    y = F.unfold(x, 2, stride=2).mT  # (B, 15, 4 C)
    y = (
        F.layer_norm(y, (128,), tensors["norm.weight"], tensors["norm.bias"])
        @ tensors["reduction.weight"].T
    )
    found = other.features[2](x.permute(0, 2, 3, 1))
    torch.testing.assert_close(found, y.unflatten(1, (3, 5)), rtol=1e-4, atol=1e-4)
