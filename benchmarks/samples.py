"""What a training sample costs, beside albumentations where it is installed.

    python -m benchmarks.samples [--images my_data/images] [--rounds 9]

A picture of 2048 x 1024 pixels as PNG, cut to 512 x 1024, and JPEGs of 480 x 360, cut to 256 x 320:
decoding, label, scale of 0.5 to 2, crop, mirror and colour jitter, which albumentations makes in
every sample too. `--images` takes the first JPEGs of a folder instead of the synthetic ones. Times
are interleaved as in benchmarks/kernels.py; a round is the mean of eight samples.
"""

import itertools
import tempfile
from pathlib import Path

import cv2
import numpy as np

from benchmarks.kernels import arguments, compare
from datasets.folder import Folder
from datasets.transforms import Augment

COLOR, SAMPLES = [0.3, 0.3, 0.3, 0.05], 8


def write(folder, size, suffix, pictures=()):
    """Smooth pictures with noise, or the pictures given, and labels of large areas."""
    rng, (height, width) = np.random.default_rng(0), size
    for number in range(SAMPLES):
        image = rng.integers(0, 255, (32, 64, 3), np.uint8)
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)
        image = np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)
        if number < len(pictures):
            image = cv2.imread(str(pictures[number]))
        label = rng.integers(0, 19, (16, 32), np.uint8)
        label = cv2.resize(label, image.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        for kind, values in (("images", image), ("labels", label)):
            path = folder / kind / f"train/{number}{suffix if kind == 'images' else '.png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "images" and number < len(pictures):
                path.write_bytes(Path(pictures[number]).read_bytes())
            else:
                cv2.imwrite(str(path), values)


def peer(crop):
    """The same augmentation of albumentations, or None."""
    try:
        import albumentations as A
    except ImportError:
        return None
    return A.Compose(
        [
            A.RandomScale((-0.5, 1.0), p=1),
            A.PadIfNeeded(*crop, fill=(124, 116, 104), fill_mask=255),
            A.RandomCrop(*crop),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter((0.7, 1.3), (0.7, 1.3), (0.7, 1.3), (-0.05, 0.05), p=1),
        ]
    )


def main():
    options = arguments("samples", images="", rounds=9)
    cv2.setNumThreads(options.threads)
    pictures = sorted(Path(options.images).rglob("*.jpg"))[:SAMPLES] if options.images else ()
    table = np.arange(256, dtype=np.uint8)
    drawn = itertools.count()  # another augmentation in each sample, as the peer's
    print("| picture | way | ms a sample | ratio to the first |\n|---|---|---|---|")
    for name, size, crop, suffix, given in (
        ("PNG", (1024, 2048), (512, 1024), ".png", ()),
        ("JPEG", (360, 480), (256, 320), ".jpg", pictures),
    ):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), size, suffix, given)
            data = Folder(
                root=folder,
                classes=[str(i) for i in range(19)],
                image_suffix=suffix,
                augment=Augment(crop=crop, color=COLOR),
            )
            theirs = peer(crop)

            def read(index, data=data, theirs=theirs):
                image, label = (str(path) for path in data.samples[index])
                image = cv2.cvtColor(cv2.imread(image), cv2.COLOR_BGR2RGB)
                label = cv2.LUT(cv2.imread(label, cv2.IMREAD_UNCHANGED), table)
                return theirs(image=image, mask=label)

            def own(data=data):
                return [data[index, next(drawn)] for index in range(SAMPLES)]

            ways = {"this project": own}
            if theirs is not None:
                ways["albumentations"] = lambda read=read: [read(i) for i in range(SAMPLES)]
            for way, (ms, ratio) in compare(ways, options.rounds).items():
                print(f"| {name} | {way} | {ms / SAMPLES:.2f} | {ratio:.3g} |", flush=True)


if __name__ == "__main__":
    main()
