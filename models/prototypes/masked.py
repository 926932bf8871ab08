"""A file of class means: what a pretrained backbone sees of each class, averaged over the training
set ("masked" in "Frozen is better than learning", Chen et al., PR 2024). A command; `init` of
cbp.CBP reads the file:

    python -m models.prototypes.masked configs/camvid/resnet18_linear.yaml \\
        out=prototypes/masked.pt data.root=PATH
    model.classifier: {name: cbp.CBP, init: prototypes/masked.pt, ortho: false}

Of the configuration it takes data.train, as the images are on the disk, and model.backbone with its
weights, whose last map is averaged in float32 over the cells that each class labels. The file is
like that of models/prototypes/text.py. Which map, and that nothing is normalised, is a
reconstruction [R].
"""

from pathlib import Path

from datasets.build import build_set
from engine import config, distributed
from engine.build import build
from engine.errors import UserError
from engine.prepare import images
from engine.process import run
from engine.statistics import resize_labels
from models.prototypes.centroids import Centroids
from models.prototypes.text import write_rows


def main(arguments):
    path, *rest = arguments
    targets = [argument.removeprefix("out=") for argument in rest if argument.startswith("out=")]
    if not targets:
        raise UserError("out=PATH is needed")
    cfg = config.load(path, [argument for argument in rest if not argument.startswith("out=")])
    device = distributed.setup(cfg)
    dataset = build_set("data.train", cfg.data.train, root=cfg.data.root, seed=cfg.seed)
    backbone = build("models.backbones", cfg.model.backbone).to(device).eval()
    names = list(dataset.CLASSES)
    centroids = Centroids(num_classes=len(names), in_channels=backbone.channels[-1]).to(device)

    def batches():
        for _, image, label in images(dataset, device, cfg.data.workers):
            features = backbone(image, "source")[-1]
            yield features, resize_labels(label, features.shape[-2:]), None

    centroids.fit(batches)
    if missing := [name for name, seen in zip(names, centroids.seen.tolist()) if not seen]:
        raise UserError(
            f"no cell of the training set is labelled {', '.join(missing)}: these classes have no "
            "mean"
        )
    if distributed.is_main():
        out = Path(targets[-1])
        write_rows(out, centroids.means().cpu(), names, config=str(path))
        print(
            f"{out}: {len(names)} rows of {centroids.means().shape[1]} channels, {len(dataset)} "
            "images"
        )


if __name__ == "__main__":
    run(main, __doc__)
