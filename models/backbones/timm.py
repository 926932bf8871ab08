"""Networks of the package timm: DINOv2, DINOv3, EVA02, ConvNeXt, Swin ...

model.backbone: {name: timm.Timm, model: vit_base_patch14_dinov2.lvd142m}
model.backbone:
  {name: timm.Timm, model: convnext_tiny.fb_in22k_ft_in1k, options: {drop_path_rate: 0.2}}
"""

import difflib

from engine.errors import UserError
from engine.weights import check_hub, load_into, read, reason
from models.backbones.base import Backbone
from models.backbones.clip import whole_patches
from models.blocks import Normalize


def create(model, **options):
    """A network of timm; a wrong name or option is a ValueError that says what there is."""
    try:
        import timm
    except ImportError as error:
        raise UserError(f"timm.Timm needs the package timm: pip install timm ({error})") from None
    if not timm.is_model(model):
        near = difflib.get_close_matches(model.split(".")[0], timm.list_models(), n=5)
        raise ValueError(
            f"timm has no model '{model}'; similar: {', '.join(near) or 'resnet50, convnext_tiny'}"
        )
    if options.get("pretrained") and "pretrained_cfg_overlay" not in options:
        check_hub()
    try:
        return timm.create_model(model, **options)
    # Of many types: no features, no such tag or option, no weights, no connection.
    except Exception as error:
        if isinstance(error, TypeError) and options.pop("dynamic_img_size", False):
            return create(model, **options)  # only some vision transformers know it
        hint = "; give a local copy by weights=PATH, or take random weights by weights=none"
        raise ValueError(
            f"timm cannot make {model} "
            f"({reason(error)}){hint if isinstance(error, OSError) else ''}"
        ) from error


class Timm(Backbone):
    """Maps of some stages, or of some blocks of a vision transformer.

    Args:
        model: name in timm; what follows a dot names its weights.
        weights: "pretrained" (timm downloads them once), "none", or a path of a state dict or
            safetensors file with timm's keys, whose classifier is dropped.
        out_indices: stages or blocks; []: the last four.
        options: further ones of the network, such as drop_path_rate, or img_size where it has one
            size only.

    Where all maps have one stride, images are enlarged to whole patches, and sizes of maps are
    rounded up; elsewhere they are rounded as the network does.
    """

    def __init__(
        self,
        *,
        model: str,
        weights: str = "pretrained",
        out_indices: list[int] = (),
        options: dict | None = None,
    ):
        super().__init__()
        settings = {
            "features_only": True,
            "out_indices": tuple(out_indices) or 4,
            "pretrained": weights != "none",
        }
        options = options or {}
        if weights not in ("pretrained", "none"):
            whole = create(model, num_classes=0, **options)
            heads = whole.pretrained_cfg.get("classifier") or ()
            heads = [f"{head}.*" for head in ([heads] if isinstance(heads, str) else heads)]
            load_into(whole, read(weights), source=weights, drop=heads)
            settings["pretrained_cfg_overlay"] = {"state_dict": whole.state_dict()}
        self.net = create(model, **settings, **{"dynamic_img_size": True, **options})
        for module in self.net.modules():  # timm keeps a second copy of given weights there
            getattr(module, "pretrained_cfg", {}).pop("state_dict", None)
        self.normalize = Normalize(self.net.pretrained_cfg["mean"], self.net.pretrained_cfg["std"])
        self.channels, self.strides = (
            self.net.feature_info.channels(),
            self.net.feature_info.reduction(),
        )

    def forward(self, image):
        """(B, 3, H, W) in [0, 1] -> [(B, C_i, H / stride_i, W / stride_i)]."""
        if len({*self.strides}) == 1:
            image = whole_patches(image, self.strides[0])
        return list(self.net(self.normalize(image)))
