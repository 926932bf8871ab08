"""Mixers: from a source and a target batch to the views that the student sees.

    mixer(batch, labels, weights) -> views {name: (image, domain)}, labels {name: (B, H, W)}, weights {name: (B, H, W)}

`batch` is {"source": ..., "target": ...}; `labels` and `weights` are those of the labeler, `labels["source"]` is the
truth. What is drawn depends on the sample's number alone, so it is the same on any number of processes.
"""

import torch
from torchvision.transforms import v2

from engine.statistics import pixel_hash


class Source:
    """The source alone: the lower bound of every comparison."""

    def __call__(self, batch, labels, weights):
        return {"source": (batch["source"]["image"], "source")}, labels, weights


class ClassMix:
    """Paste half of the classes of each source image onto the target image, then colour jitter and blur (Olsson et al.,
    WACV 2021, between domains as in DACS; constants as in DAFormer).

    Views: "source" and "mixed". Pasted pixels have the true label and weight 1, the others what the labeler gave them.

    Args:
        color: largest change of brightness, contrast, saturation, and shift of hue.
        color_p, blur_p: probability of jitter and of blur (sigma 0.15 to 1.15 pixels) for each image.
    """

    def __init__(self, *, seed=0, color: list = (0.2, 0.2, 0.2, 0.2), color_p: float = 0.8, blur_p: float = 0.5):
        self.seed, self.color_p, self.blur_p = seed, color_p, blur_p
        self.color, self.blur = v2.ColorJitter(*color), v2.GaussianBlur(9, (0.15, 1.15))

    def __call__(self, batch, labels, weights):
        source, target = batch["source"], batch["target"]
        pasted = self.choose(source["label"], target["sample"])  # (B, H, W)
        mixed = torch.where(pasted[:, None], source["image"], target["image"])
        mixed = torch.stack([self.augment(image, number) for image, number in zip(mixed, target["numbers"])])
        labels = labels | {"mixed": torch.where(pasted, source["label"], labels["target"])}
        trust = weights.get("target", torch.ones_like(mixed[:, 0]))
        weights = weights | {"mixed": torch.where(pasted, 1.0, trust)}
        return {"source": (source["image"], "source"), "mixed": (mixed, "target")}, labels, weights

    def choose(self, label, samples, num_classes=256):
        """Pixels (B, H, W) of half of the classes, rounded up, that occur in each label (B, H, W)."""
        ids = label.flatten(1)  # (B, N)
        present = torch.zeros(len(ids), num_classes, dtype=torch.bool, device=ids.device)
        present = present.scatter_(1, ids, True)
        present[:, 255] = False
        lots = pixel_hash(self.seed, samples, num_classes).masked_fill(~present, 2**33)
        place = lots.argsort(1).argsort(1)  # (B, K): absent classes come last
        chosen = present & (place < (present.sum(1, keepdim=True) + 1) // 2)
        return chosen.gather(1, ids).view_as(label)

    def augment(self, image, sample):
        """Colour jitter and blur of one image (3, H, W), seeded by its number."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + sample)
            jitter, blur = torch.rand(2) < torch.tensor([self.color_p, self.blur_p])
            image = self.color(image) if jitter else image
            return self.blur(image) if blur else image
