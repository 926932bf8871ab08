"""CamVid with 11 classes (Brostow et al., 2009): 367 train, 101 val, 233 test frames of street
video from Cambridge.

    data:
      root: PATH
      train: {name: camvid.CamVid, split: train}
      test: {camvid: {name: camvid.CamVid, split: test}}

Three layouts are recognised by what lies in the folder:

    images/<split>/*.jpg  labels/<split>/*.png              ids 0-10, 255 void; a split may be the
                                                            name of a list, lists/<split>.txt
    <split>/*.png  <split>annot/*.png                       the SegNet release: ids 0-10, 11 void
    701_StillsRaw_full/*.png  LabeledApproved_full/*_L.png  the original release: 32 colours,
                                                            grouped into 11 classes

The original release has no lists; frames are assigned to splits by sequence and frame number, which
gives SegNet's split. One sequence, 0001TP, was taken at dusk: train_day has 305 frames, train_dusk
62, val_day 101, test_day 171, test_dusk 62. The grouping of 32 classes (COLORS) is the usual one,
from general knowledge.
"""

import re
from pathlib import Path

from datasets.base import SegmentationData, check_different
from datasets.reading import PICTURES, DataError, files_below, read_colors, read_list

CLASSES = (
    "Sky",
    "Building",
    "Pole",
    "Road",
    "Pavement",
    "Tree",
    "SignSymbol",
    "Fence",
    "Car",
    "Pedestrian",
    "Bicyclist",
)
PALETTE = (
    (128, 128, 128),
    (128, 0, 0),
    (192, 192, 128),
    (128, 64, 128),
    (60, 40, 222),
    (128, 128, 0),
    (192, 128, 128),
    (64, 64, 128),
    (64, 0, 128),
    (64, 64, 0),
    (0, 128, 192),
)
COLORS = {
    (128, 128, 128): 0,  # Sky
    (128, 0, 0): 1,  # Building
    (192, 0, 128): 1,  # Archway
    (0, 128, 64): 1,  # Bridge
    (64, 0, 64): 1,  # Tunnel
    (64, 192, 0): 1,  # Wall
    (192, 192, 128): 2,  # Column_Pole
    (0, 0, 64): 2,  # TrafficCone
    (128, 64, 128): 3,  # Road
    (128, 0, 192): 3,  # LaneMkgsDriv
    (192, 0, 64): 3,  # LaneMkgsNonDriv
    (0, 0, 192): 4,  # Sidewalk
    (64, 192, 128): 4,  # ParkingBlock
    (128, 128, 192): 4,  # RoadShoulder
    (128, 128, 0): 5,  # Tree
    (192, 192, 0): 5,  # VegetationMisc
    (192, 128, 128): 6,  # SignSymbol
    (128, 128, 64): 6,  # Misc_Text
    (0, 64, 64): 6,  # TrafficLight
    (64, 64, 128): 7,  # Fence
    (64, 0, 128): 8,  # Car
    (64, 128, 192): 8,  # SUVPickupTruck
    (192, 128, 192): 8,  # Truck_Bus
    (192, 64, 128): 8,  # Train
    (128, 64, 64): 8,  # OtherMoving
    (64, 64, 0): 9,  # Pedestrian
    (192, 128, 64): 9,  # Child
    (64, 0, 192): 9,  # CartLuggagePram
    (64, 128, 64): 9,  # Animal
    (0, 128, 192): 10,  # Bicyclist
    (192, 0, 192): 10,  # MotorcycleScooter
    (0, 0, 0): 255,  # Void
}


DUSK = "0001TP"  # the sequence that was taken at dusk


def split_of(stem):
    """SegNet's split of a frame of the original release, such as 0016E5_07959."""
    if not (match := re.fullmatch(r"(\w+)_f?(\d+)", stem)):
        raise DataError(f"701_StillsRaw_full/{stem}.png is no frame of CamVid: remove it")
    sequence, frame = match[1], int(match[2])
    if sequence == "0016E5":
        return "val" if 7959 <= frame <= 8159 and frame % 2 else "train"
    if sequence == "0001TP":
        return "train" if frame <= 8520 else "test"
    return {"0006R0": "train", "Seq05VD": "test"}.get(sequence, "train")


class CamVid(SegmentationData):
    """Args: split: train | val | test; of each, the frames of one light, such as train_dusk and
    test_day; or the stem of a file in `lists/`."""

    CLASSES, PALETTE = CLASSES, PALETTE
    ID_MAP = {**{i: i for i in range(11)}, 11: 255, 255: 255}  # noqa: RUF012

    def pairs(self):
        listing = self.root / "lists" / f"{self.split}.txt"
        if listing.is_file() and (self.root / "images").is_dir():
            return self.of_stems(read_list(listing))
        part, _, light = self.split.partition("_")
        if light not in ("day", "dusk"):
            return self.of_part(self.split)
        dusk = light == "dusk"
        return [p for p in self.of_part(part) if p[0].stem.startswith(DUSK) == dusk]

    def of_part(self, part):
        """[(image, label)] of train, val or test, or of another folder of images."""
        if (self.root / "701_StillsRaw_full").is_dir():
            images = files_below(self.root / "701_StillsRaw_full", [".png"], depth=1)
            labels = self.root / "LabeledApproved_full"
            return [(p, labels / f"{p.stem}_L.png") for p in images if split_of(p.stem) == part]
        if (self.root / f"{part}annot").is_dir():
            images = files_below(self.root / part, [".png"], depth=1)
            return [(p, self.root / f"{part}annot" / p.name) for p in images]
        if not (self.root / "images" / part).is_dir():
            lists = sorted(p.stem for p in (self.root / "lists").glob("*.txt"))
            raise DataError(
                f"CamVid in {self.root} has no split '{self.split}'; there are train, val, test, "
                f"each also with _day or _dusk, and the lists {lists}"
            )
        files = files_below(self.root / "images" / part, PICTURES, depth=1)
        return self.of_stems(f"{part}/{p.stem}" for p in files)

    def of_stems(self, stems):
        """[(image, label)] of stems such as train/0001TP_006690."""
        images = self.root / "images"
        files = {p: p.relative_to(images) for p in files_below(images, PICTURES, depth=2)}
        names = {path: below.with_suffix("").as_posix() for path, below in files.items()}
        check_different(names, "the name '{}', under which their label lies; remove one")
        suffixes = {name: path.suffix for path, name in names.items()}
        return [
            (images / f"{s}{suffixes.get(s, '.jpg')}", self.root / "labels" / f"{s}.png")
            for s in stems
        ]

    def read_label(self, path):
        if Path(path).parent.name == "LabeledApproved_full":
            return read_colors(path, COLORS)
        return super().read_label(path)
