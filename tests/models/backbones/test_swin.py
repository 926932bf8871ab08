"""Swin: how files of others order merged patches."""

import torch
import torch.nn.functional as F

from models.backbones import convnext, swin
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


def test_norms_of_the_maps_have_a_name_of_their_own_on_the_hub():
    """Of UperNet with Swin or ConvNeXt."""
    state = {f"hidden_states_norms.stage{i}.weight": torch.full((1,), i) for i in (1, 2, 3, 4)}
    for module in (swin, convnext):
        found = module.torchvision_names(state, None)
        assert {name: int(v) for name, v in found.items()} == {
            f"norm{i - 1}.weight": i for i in (1, 2, 3, 4)
        }
