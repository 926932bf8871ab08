"""BDD100K, semantic segmentation (Yu et al., 2020): 7000 train, 1000 val frames of 1280x720,
Cityscapes' 19 classes.

    data: {root: PATH, test: {bdd100k: {name: bdd100k.BDD100K, split: val}}}

Two layouts, told apart by `images/10k`; labels are train ids in both, 255 is ignore:

    images/<split>/*.jpg        labels/<split>/<name>_train_id.png              the classic release
    images/10k/<split>/*.jpg    labels/sem_seg/masks/<split>/<name>.png         the newer one

The sizes are from general knowledge, as is a test split of 2000 images without labels
(`labels: false`).
"""

from datasets.base import SegmentationData
from datasets.cityscapes import CLASSES, PALETTE, existing
from datasets.reading import files_below


class BDD100K(SegmentationData):
    """Args: split: train | val | test, or another folder of the images."""

    CLASSES, PALETTE = CLASSES, PALETTE

    def pairs(self):
        newer = (self.root / "images" / "10k").is_dir()
        images = self.split_folder(self.root / "images" / "10k" if newer else self.root / "images")
        labels = self.root / "labels" / ("sem_seg/masks" if newer else "") / self.split
        suffixes = (".png", "_train_id.png") if newer else ("_train_id.png", ".png")
        return [
            (
                image,
                existing(*(labels / f"{image.stem}{suffix}" for suffix in suffixes))
                if self.labels
                else None,
            )
            for image in files_below(images, [".jpg"], depth=1)
        ]
