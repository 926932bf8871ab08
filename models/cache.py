"""Maps of a frozen backbone, written once per picture: a head trains on them at many steps a
second.

    model: {backbone: {name: vit.ViT, ...}, frozen: [backbone], cache: runs/features}
    data: {augment: {name: transforms.Whole, size: [560, 392], flip: 0.5}}

A picture that the folder does not hold is computed, in the run's precision, and stored in float16.
So the first pass over a data set takes its usual time, and every later one reads: in this run or in
another, in training or evaluation. Augmentation that draws ever new pictures is refused.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from engine.errors import UserError
from engine.files import read_array, replacing


class FeatureCache:
    """Maps by the content of picture and network.

    A changed pixel, weight, option or precision gives another file. To name it, a picture comes
    back from the GPU.

    Args:
        backbone: frozen.
        spec: `model.backbone` of the configuration.
        folder: of all features; one folder below it per network, a file per picture and map.
    """

    def __init__(self, backbone, spec, folder):
        self.backbone, self.root, self.folder = backbone, Path(folder), None
        self.spec = {key: value for key, value in spec.items() if key != "weights"}

    def _open(self, image):
        """Name the network's folder, at its first picture: only then it has the run's weights."""
        kind = image.device.type
        autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
        about = f"{sorted(self.spec.items())} {image.dtype} {autocast}"
        digest = hashlib.blake2b(about.encode(), digest_size=12)
        for name, value in self.backbone.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
        self.folder = self.root / digest.hexdigest()

    @torch.no_grad()
    def __call__(self, image, **given):
        """What the backbone returns, in half precision.

        Args:
            image: (B, 3, H, W).
            given: what else a backbone would get, a domain or a bias: there must be none.
        Returns:
            [(B, C_i, h_i, w_i)] of the image's type.
        Raises:
            UserError: the maps depend on more than the picture, or are too large for 16 bits.
        """
        if given:
            raise UserError(
                "model.cache holds maps that depend on the picture alone: it goes neither with a "
                "stem per domain nor with a head that guides the attention (region.Region)"
            )
        if self.folder is None:
            self._open(image)
        pictures = image.cpu().numpy()
        paths = [self._paths(picture, len(self.backbone.channels)) for picture in pictures]
        missing = [i for i, files in enumerate(paths) if not files[-1].is_file()]
        if missing:
            new = [maps.half().cpu().numpy() for maps in self.backbone(image[missing])]
            if not all(np.isfinite(maps).all() for maps in new):
                raise UserError(
                    "model.cache stores maps in 16 bits, and one of these is infinite or no number "
                    "there: set model.cache=none"
                )
            for n, i in enumerate(missing):
                for path, maps in zip(paths[i], new, strict=True):
                    with replacing(path) as temporary:
                        np.save(temporary, maps[n])
        maps = [torch.from_numpy(np.stack([read_array(p) for p in one])) for one in zip(*paths)]
        return [values.to(image.device, image.dtype) for values in maps]

    def _paths(self, picture, count):
        """One file per map, the last one written last."""
        content = str(picture.shape).encode() + picture.tobytes()
        name = hashlib.blake2b(content, digest_size=16).hexdigest()
        return [self.folder / name[:2] / f"{name}.{i}.npy" for i in range(count)]
