"""ACDC (Sakaridis et al., 2021): street scenes of 1920x1080 in fog, night, rain and snow, the 19
classes of Cityscapes.

    data: {root: PATH, test: {acdc_night: {name: acdc.ACDC, split: val, condition: night}}}

    rgb_anon/<condition>/<split>/<sequence>/*_rgb_anon.png
    gt/<condition>/<split>/<sequence>/*_gt_labelTrainIds.png    train ids; where it is missing:
    gt/<condition>/<split>/<sequence>/*_gt_labelIds.png         ids of Cityscapes, mapped here

From general knowledge: 400 train images per condition, 100 val (night 106), 500 test, whose labels
are kept for the benchmark server; the reference splits hold the same places in good weather, named
*_rgb_ref_anon.png, without labels.
"""

from typing import Literal

from datasets.cityscapes import Cityscapes, existing
from datasets.reading import DataError, files_below

CONDITIONS = ("fog", "night", "rain", "snow")


class ACDC(Cityscapes):
    """Args:
        split: train | val | test, or train_ref | val_ref | test_ref, which have no labels.
        condition: fog | night | rain | snow | all.
    Raises DataError: no such split, labels of a reference split.
    """

    def __init__(
        self,
        *,
        condition: Literal["fog", "night", "rain", "snow", "all"] = "all",
        **options,
    ):
        self.conditions = CONDITIONS if condition == "all" else (condition,)
        super().__init__(**options)

    def images(self):
        if self.labels and self.split.endswith("_ref"):
            raise DataError(
                f"ACDC {self.split} holds reference images, which have no labels; set labels: false"
            )
        kinds = ["_rgb_anon.png", "_rgb_ref_anon.png"]
        folders = [self.split_folder(self.root / "rgb_anon" / name) for name in self.conditions]
        return [image for folder in folders for image in files_below(folder, kinds, depth=2)]

    def label_of(self, image):
        folder = self.root / "gt" / image.parent.relative_to(self.root / "rgb_anon")
        stem = image.name.removesuffix("_rgb_anon.png")
        return existing(
            *(folder / f"{stem}_gt_{kind}.png" for kind in ("labelTrainIds", "labelIds"))
        )
