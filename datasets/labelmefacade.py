"""LabelMeFacade (Froehlich et al., 2010): photographs of streets and facades, in the ids of
CamVid's 11 classes.

    data: {root: PATH, test: {facade: {name: labelmefacade.LabelMeFacade, split: test}}}

    images/<split>/NAME.jpg    labels/<split>/NAME.png    ids of CamVid, 255 void

These are converted labels, not those of the release: building, window and door are Building,
vegetation is Tree, various is void. So six classes occur (SCORED), and pixels of poles, signs or
people belong to what is behind them or to void: a coarse test of generalisation. Means are over the
six classes. A prediction of one of the other five is an error where the truth is one of the six,
but these five have no IoU.
"""

from datasets.base import IGNORE, SegmentationData
from datasets.camvid import CLASSES, PALETTE
from datasets.reading import files_below

SCORED = ("Sky", "Building", "Road", "Pavement", "Tree", "Car")


class LabelMeFacade(SegmentationData):
    """Args: split: train | test, or another folder of `images`."""

    CLASSES, PALETTE, SCORED = CLASSES, PALETTE, SCORED
    ID_MAP = {i: i for i in [*map(CLASSES.index, SCORED), IGNORE]}  # noqa: RUF012

    def pairs(self):
        images = files_below(self.split_folder(self.root / "images"), [".jpg"], depth=1)
        labels = self.root / "labels" / self.split
        return [(image, labels / f"{image.stem}.png" if self.labels else None) for image in images]
