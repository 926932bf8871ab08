"""Networks of tests: random weights, files of them, and what two files have in common."""

import torch

SMALL = {"width": 32, "depths": [2, 1, 2, 1]}  # of ConvNeXt and Swin


def scrambled(module):
    """Also norms, biases and running statistics differ, so that a swap or a wrong shape shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter[0].numel() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=1.5 * parameter[0].numel() ** -0.5)
        for name, buffer in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.2 * torch.rand_like(buffer))
    return module.eval()


def saved(state, folder):
    torch.save(state, folder / "weights.pth")
    return str(folder / "weights.pth")


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def intermediate(network, taps, x):
    maps = []
    for i, layer in enumerate(network.features):
        x = layer(x)
        maps += [x] if i in taps else []
    return maps


def translate(state, table):
    """By plain replacement, in this order: independent of the tables of regular expressions that are tested."""
    renamed = {}
    for key, value in state.items():
        for old, new in table.items():
            key = key.replace(old, new)
        renamed[key] = value
    return renamed


def swin_release(state):
    table = {"features.0.0.": "patch_embed.proj.", "features.0.2.": "patch_embed.norm."}
    for s in range(4):
        table |= {
            f"features.{2 * s + 1}.": f"layers.{s}.blocks.",
            f"features.{2 * s + 2}.": f"layers.{s}.downsample.",
        }
    state = translate(state, table | {".mlp.0.": ".mlp.fc1.", ".mlp.3.": ".mlp.fc2."})
    extra = {
        "norm.weight": torch.ones(3),
        "head.bias": torch.ones(3),
        "layers.0.blocks.1.attn_mask": torch.ones(3),
    }
    extra["layers.0.blocks.1.attn.relative_position_index"] = torch.ones(49, 49)
    return {"model": state | extra}


def swin_mmsegmentation(state):
    table = {
        "layers.": "stages.",
        "patch_embed.proj.": "patch_embed.projection.",
        ".attn.": ".attn.w_msa.",
    }
    table |= {".mlp.fc1.": ".ffn.layers.0.0.", ".mlp.fc2.": ".ffn.layers.1."}
    state = swin_release({k: v for k, v in state.items()})["model"]
    state = translate(
        {
            k: v
            for k, v in state.items()
            if not k.startswith(("norm.", "head.")) and "mask" not in k
        },
        table,
    )
    for key, value in state.items():
        if ".downsample." in key:
            state[key] = torch.empty_like(value)
            channels = value.shape[-1] // 4
            for c in range(channels):
                for row in range(2):
                    for column in range(2):
                        ours = (
                            row + 2 * column
                        ) * channels + c  # all channels of (0, 0), (1, 0), (0, 1), (1, 1)
                        state[key][..., 4 * c + 2 * row + column] = value[..., ours]
    return mmsegmentation(state)


def mmsegmentation(state):
    """A whole network, wrapped."""
    heads = (
        "decode_head.conv_seg.weight",
        "auxiliary_head.convs.0.conv.weight",
        "decode_head.psp_modules.0.1.bn.bias",
    )
    return {
        "meta": {"iter": 3},
        "state_dict": {f"backbone.{k}": v for k, v in state.items()}
        | dict.fromkeys(heads, torch.ones(1)),
    }
