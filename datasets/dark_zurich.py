"""Dark Zurich (Sakaridis et al., ICCV 2019): streets of 1920x1080 by day, at twilight and by night,
with the 19 classes of Cityscapes.

    data:
      target: {name: dark_zurich.DarkZurich, split: train, time: night, root: PATH}
      test:
        dark_zurich: {name: dark_zurich.DarkZurich, split: val, root: PATH}

    rgb_anon/train/{day,twilight,night}/<sequence>/*_rgb_anon.png  no labels: a target of adaptation
    rgb_anon/{val,test}/night/<sequence>/*_rgb_anon.png
    rgb_anon/{val_ref,test_ref}/day/<sequence>/*_anon.png     the same places by day, without labels
    gt/val/night/<sequence>/*_gt_labelTrainIds.png                   train ids; where it is missing:
    gt/val/night/<sequence>/*_gt_labelIds.png                         ids of Cityscapes, mapped here

All of this is general knowledge, as are the numbers: for training 3041 images by day, 2920 at
twilight, 2416 by night; 50 of val; the labels of the 151 of test are kept for the benchmark server
(`labels: false`).
"""

from typing import Literal

from datasets.acdc import ACDC
from datasets.cityscapes import Cityscapes
from datasets.reading import DataError, files_below, folders_in

TIMES = ("day", "twilight", "night")


class DarkZurich(Cityscapes):
    """Args:
        split: train | val | test | val_ref | test_ref; only val has labels.
        time: day | twilight | night | all; val and test are by night, their references by day.
    Raises DataError: no such folder, labels of train or of a reference split.
    """

    label_of = ACDC.label_of

    def __init__(self, *, time: Literal["day", "twilight", "night", "all"] = "night", **options):
        self.times = TIMES if time == "all" else (time,)
        super().__init__(**options)

    def images(self):
        if self.labels and (self.split == "train" or self.split.endswith("_ref")):
            raise DataError(
                f"DarkZurich {self.split} has no labels; set labels: false, or use it as "
                "data.target"
            )
        folder = self.split_folder(self.root / "rgb_anon")
        times = [time for time in self.times if (folder / time).is_dir()]
        if not times:
            raise DataError(
                f"DarkZurich {self.split} has no images by {' or '.join(self.times)}: the folders "
                f"in {folder} are {folders_in(folder)}"
            )
        return [path for time in times for path in files_below(folder / time, ["_anon.png"], 2)]
