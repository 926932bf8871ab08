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

from datasets.base import SegmentationData
from datasets.cityscapes import CLASSES, ID_MAP, PALETTE, existing, has_train_ids
from datasets.reading import DataError, files_below, folders_in

CONDITIONS = ("fog", "night", "rain", "snow")


class ACDC(SegmentationData):
    """Args:
        split: train | val | test, or train_ref | val_ref | test_ref, which have no labels.
        condition: fog | night | rain | snow | all.
    Raises DataError: no such condition or split, labels of a reference split.
    """

    CLASSES, PALETTE, ID_MAP = CLASSES, PALETTE, ID_MAP

    def __init__(
        self,
        *,
        root,
        split: str = "train",
        condition: str = "all",
        labels: bool = True,
        ignore: list = (),
        augment=None,
        seed=0,
        stylised: str | None = None,
        label_space: dict | None = None,
    ):
        if condition not in (*CONDITIONS, "all"):
            raise DataError(
                f"ACDC has no condition '{condition}'; there are {', '.join(CONDITIONS)}, all"
            )
        if labels and split.endswith("_ref"):
            raise DataError(
                f"ACDC {split} holds reference images, which have no labels; set labels: false"
            )
        self.conditions = CONDITIONS if condition == "all" else (condition,)
        options = {
            "labels": labels,
            "ignore": ignore,
            "augment": augment,
            "seed": seed,
            "stylised": stylised,
        }
        super().__init__(root=root, split=split, label_space=label_space, **options)

    def pairs(self):
        return [pair for condition in self.conditions for pair in self.pairs_of(condition)]

    def pairs_of(self, condition):
        images = self.root / "rgb_anon" / condition
        if not (images / self.split).is_dir():
            raise DataError(
                f"ACDC {condition} has no split '{self.split}': the folders in {images} are "
                f"{folders_in(images)}"
            )
        found = files_below(images / self.split, ["_rgb_anon.png", "_rgb_ref_anon.png"], depth=2)
        return [
            (image, self.label_of(image, condition) if self.labels else None) for image in found
        ]

    def label_of(self, image, condition):
        folder = self.root / "gt" / condition / self.split / image.parent.name
        stem = image.name.removesuffix("_rgb_anon.png")
        return existing(
            *(folder / f"{stem}_gt_{kind}.png" for kind in ("labelTrainIds", "labelIds"))
        )

    def is_mapped(self, path, ids):
        return has_train_ids(path)
