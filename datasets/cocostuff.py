"""COCO-Stuff (Caesar et al., CVPR 2018): 80 things and 91 stuffs, 171 classes, in photographs of
everyday scenes.

    data:
      train: {name: cocostuff.CocoStuff10k, split: train2014, root: PATH}
      val: {name: cocostuff.CocoStuff10k, split: test2014, root: PATH}

CocoStuff10k, 9000 training and 1000 test images, as MMSegmentation's script converts it (the
release has MATLAB files, which are not read):

    images/{train2014,test2014}/*.jpg
    annotations/{train2014,test2014}/*_labelTrainIds.png      0 is unlabelled and ignored, 1 to 171
                                                              are the classes

CocoStuff164k, 118,287 training and 5000 validation images, as released:

    images/{train2017,val2017}/*.jpg          or directly {train2017,val2017}/*.jpg
    stuffthingmaps/{train2017,val2017}/*.png  or
    annotations/{train2017,val2017}/*.png     255 is unlabelled
    .../*_labelTrainIds.png                   converted: 0 to 170 and 255; read where the official
                                              label is missing

COCO counts its ids from 1 to 182, and eleven of them were never annotated (MISSING). The maps of
164k hold the id minus one, 0 to 181; the classes are what remains, in order. From general
knowledge: names, ids and the folders of 164k. The release has no palette; this one is
`folder.distinct_colors`.
"""

from datasets.base import IGNORE, SegmentationData
from datasets.cityscapes import existing, has_train_ids
from datasets.folder import distinct_colors
from datasets.reading import DataError, files_below

THINGS = (
    "person",
    "bicycle",
    "car",
    "motorcycle",
    "airplane",
    "bus",
    "train",
    "truck",
    "boat",
    "traffic light",
    "fire hydrant",
    "stop sign",
    "parking meter",
    "bench",
    "bird",
    "cat",
    "dog",
    "horse",
    "sheep",
    "cow",
    "elephant",
    "bear",
    "zebra",
    "giraffe",
    "backpack",
    "umbrella",
    "handbag",
    "tie",
    "suitcase",
    "frisbee",
    "skis",
    "snowboard",
    "sports ball",
    "kite",
    "baseball bat",
    "baseball glove",
    "skateboard",
    "surfboard",
    "tennis racket",
    "bottle",
    "wine glass",
    "cup",
    "fork",
    "knife",
    "spoon",
    "bowl",
    "banana",
    "apple",
    "sandwich",
    "orange",
    "broccoli",
    "carrot",
    "hot dog",
    "pizza",
    "donut",
    "cake",
    "chair",
    "couch",
    "potted plant",
    "bed",
    "dining table",
    "toilet",
    "tv",
    "laptop",
    "mouse",
    "remote",
    "keyboard",
    "cell phone",
    "microwave",
    "oven",
    "toaster",
    "sink",
    "refrigerator",
    "book",
    "clock",
    "vase",
    "scissors",
    "teddy bear",
    "hair drier",
    "toothbrush",
)
STUFF = (
    "banner",
    "blanket",
    "branch",
    "bridge",
    "building-other",
    "bush",
    "cabinet",
    "cage",
    "cardboard",
    "carpet",
    "ceiling-other",
    "ceiling-tile",
    "cloth",
    "clothes",
    "clouds",
    "counter",
    "cupboard",
    "curtain",
    "desk-stuff",
    "dirt",
    "door-stuff",
    "fence",
    "floor-marble",
    "floor-other",
    "floor-stone",
    "floor-tile",
    "floor-wood",
    "flower",
    "fog",
    "food-other",
    "fruit",
    "furniture-other",
    "grass",
    "gravel",
    "ground-other",
    "hill",
    "house",
    "leaves",
    "light",
    "mat",
    "metal",
    "mirror-stuff",
    "moss",
    "mountain",
    "mud",
    "napkin",
    "net",
    "paper",
    "pavement",
    "pillow",
    "plant-other",
    "plastic",
    "platform",
    "playingfield",
    "railing",
    "railroad",
    "river",
    "road",
    "rock",
    "roof",
    "rug",
    "salad",
    "sand",
    "sea",
    "shelf",
    "sky-other",
    "skyscraper",
    "snow",
    "solid-other",
    "stairs",
    "stone",
    "straw",
    "structural-other",
    "table",
    "tent",
    "textile-other",
    "towel",
    "tree",
    "vegetable",
    "wall-brick",
    "wall-concrete",
    "wall-other",
    "wall-panel",
    "wall-stone",
    "wall-tile",
    "wall-wood",
    "water-other",
    "waterdrops",
    "window-blind",
    "window-other",
    "wood",
)
CLASSES = THINGS + STUFF
PALETTE = distinct_colors(len(CLASSES))
# Street sign, hat, shoe, eye glasses, plate, mirror, window, desk, door, blender, hair brush.
MISSING = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
IDS = [i for i in range(1, 183) if i not in MISSING]  # COCO's id of each class


class CocoStuff10k(SegmentationData):
    """Args: split: train2014 | test2014, or another folder of `images`. Raises DataError: labels
    not yet converted."""

    CLASSES, PALETTE = CLASSES, PALETTE
    ID_MAP = {0: IGNORE, 255: IGNORE} | {i + 1: i for i in range(171)}

    def pairs(self):
        images = files_below(self.split_folder(self.root / "images"), [".jpg"], depth=1)
        if not self.labels:
            return [(image, None) for image in images]
        folder = self.root / "annotations"
        pairs = [
            (image, folder / self.split / f"{image.stem}_labelTrainIds.png") for image in images
        ]
        matlab = files_below(folder, [".mat"]) if folder.is_dir() else []
        if matlab and not any(label.is_file() for _, label in pairs):
            raise DataError(
                f"CocoStuff10k {self.split}: {matlab[0]} is MATLAB's; convert the labels to "
                f"{folder / self.split}/*_labelTrainIds.png: 0 = unlabelled, 1 to 171 "
                "(datasets/cocostuff.py)"
            )
        return pairs


class CocoStuff164k(SegmentationData):
    """Args: split: train2017 | val2017, or another folder of the images."""

    CLASSES, PALETTE = CLASSES, PALETTE
    ID_MAP = {255: IGNORE} | {coco - 1: i for i, coco in enumerate(IDS)}

    def images(self):
        folder = self.root / "images"
        folder = self.split_folder(folder if folder.is_dir() else self.root)
        return files_below(folder, [".jpg"], depth=1)

    def label_of(self, image):
        folders = [self.root / name / self.split for name in ("stuffthingmaps", "annotations")]
        names = [f"{image.stem}{suffix}.png" for suffix in ("", "_labelTrainIds")]
        return existing(*(folder / name for name in names for folder in folders))

    def is_mapped(self, path, ids):
        return has_train_ids(path)
