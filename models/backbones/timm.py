"""Networks of the package timm: DINOv2, DINOv3, EVA02, ConvNeXt, Swin ...

model.backbone: {name: timm.Timm, model: vit_base_patch14_dinov2.lvd142m}
model.backbone:
  {name: timm.Timm, model: convnext_tiny.fb_in22k_ft_in1k, options: {drop_path_rate: 0.2}}
"""

import difflib

import torch

from engine.errors import UserError
from engine.weights import backbone_of, check_hub, join_qkv, load_into, read, reason, rename, unwrap
from models.backbones.base import Backbone
from models.backbones.clip import whole_patches
from models.blocks import Normalize, run

# Of DINOv3, what timm has not: zeros in the release, and what only its own training needs.
UNUSED = ("q_bias", "v_bias", "bias_mask", "mask_token", "periods")

DINOV3 = {  # names of its release and of Hugging Face, in this order -> timm's
    r"^(embeddings|model)\.": "",
    r"^patch_embeddings\.": "patch_embed.proj.",
    r"^(storage|register)_tokens$": "reg_token",
    r"^layer\.(\d+)\.": r"blocks.\1.",
    r"\.(?:ls|layer_scale)([12])\.(?:gamma|lambda1)$": r".gamma_\1",
    r"\.attention\.o_proj\.": ".attn.proj.",
    r"\.attention\.([qkv])_proj\.": r".attn.\1.",
    r"\.mlp\.(gate_proj|w1)\.": ".mlp.fc1_g.",
    r"\.mlp\.w2\.": ".mlp.fc1_x.",
    r"\.mlp\.(down_proj|w3)\.": ".mlp.fc2.",
}


def timm_names(state, network):
    """A state dict of DINOv3 with the names of others -> with those of a network of timm, which has
    biases of queries and values alone, or none. Others stay as they are."""
    if not {"storage_tokens", "embeddings.register_tokens"} & {*state}:
        return state
    own, state = network.state_dict(), rename(state, DINOV3)
    gated = any(".fc1_g." in key for key in own)
    state = rename(state, {r"\.mlp\.up_proj\.": ".mlp.fc1_x." if gated else ".mlp.fc1."})
    for key in [key for key in state if key.endswith(".attn.q.bias")]:  # keys have no bias
        state.setdefault(key.replace(".q.", ".k."), torch.zeros_like(state[key]))
    for key in [key for key in join_qkv(state) if key.endswith(".attn.qkv.bias")]:
        queries, _, values = state.pop(key).chunk(3)
        state[key.replace("qkv.", "q_")], state[key.replace("qkv.", "v_")] = queries, values
    return {k: v for k, v in state.items() if k in own or not k.endswith(UNUSED)}


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
            safetensors file with timm's keys, whose classifier is dropped; of DINOv3 also with
            those of its release or of Hugging Face.
        out_indices: stages or blocks, in ascending order; []: the last four.
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
        if list(out_indices) != sorted({*out_indices}) or min(out_indices, default=0) < 0:
            raise ValueError(f"out_indices={list(out_indices)} must ascend from 0 on, each once")
        self.model, self.options = model, options or {}
        if fixed := {"features_only", "out_indices", "pretrained"} & {*self.options}:
            raise ValueError(f"options may not hold {', '.join(sorted(fixed))}")
        self.out_indices = tuple(out_indices) or 4
        if weights in ("pretrained", "none"):
            self.net = self.features(pretrained=weights != "none")
        else:
            state = backbone_of(unwrap(read(weights), weights), weights)
            self.net = self.features_of(state, weights)
        self.normalize = Normalize(self.net.pretrained_cfg["mean"], self.net.pretrained_cfg["std"])
        self.channels, self.strides = (
            self.net.feature_info.channels(),
            self.net.feature_info.reduction(),
        )

    def features(self, **settings):
        """The network that returns maps."""
        options = {"dynamic_img_size": True, **self.options, **settings}
        return create(self.model, features_only=True, out_indices=self.out_indices, **options)

    def features_of(self, state, source):
        """The same from a state dict of the whole network."""
        whole = create(self.model, num_classes=0, **self.options)
        heads = whole.pretrained_cfg.get("classifier") or ()
        heads = [f"{head}.*" for head in ([heads] if isinstance(heads, str) else heads)]
        load_into(whole, timm_names(state, whole), source=source, drop=heads)
        overlay = {"state_dict": whole.state_dict()}
        net = self.features(pretrained=True, pretrained_cfg_overlay=overlay)
        for module in net.modules():  # timm keeps a second copy of given weights there
            getattr(module, "pretrained_cfg", {}).pop("state_dict", None)
        return net

    def own_names(self, state):
        net = self.features_of(state, f"weights of {self.model}")
        return {f"net.{key}": value for key, value in net.state_dict().items()}

    def forward(self, image):
        """(B, 3, H, W) in [0, 1] -> [(B, C_i, H / stride_i, W / stride_i)]."""
        if len({*self.strides}) == 1:
            image = whole_patches(image, self.strides[0])
        maps = run(self.net, False, self.normalize(image))
        last = self.net.output_fmt == "NHWC"  # of Swin, MambaOut
        return [values.movedim(-1, 1) if last else values for values in maps]
