"""The embedded data set: street scenes seen from a car, drawn with NumPy and OpenCV. No files, no
download.

    data.train: {name: toy.Toy, domain: synthetic, split: train, length: 400, size: [96, 128]}

The layout of a scene (camera, shapes, labels) depends on (seed, index) alone; the domain changes
nothing but the appearance:

    synthetic   a game: saturated flat colours, hardly any texture or shadow, crisp edges
    real        a camera: muted palette that varies per image, brick, grain and foliage, cast
                shadows, uneven light,
                white balance, sometimes an overexposed sky, slight blur, sensor noise
    night       the real scene in the dark: lit windows, head lights, street lamps with their glow
    fog         the real scene behind a veil that thickens with depth
    rain        the real scene, dark and grey: reflections on the wet ground, streaks, drops on the
                lens
    snow        the real scene, whitened on the ground and on whatever looks up, with flakes

The shapes (`toy_scene.py`) are painted far to near into ONE map of shape numbers; labels, colours
and depth are look-ups in that map, so they agree to the pixel.

    # (240, 320, 3) uint8, (240, 320) uint8
    image, label = draw(seed=0, index=7, domain="real", size=(240, 320))
"""

from functools import cache
from typing import Annotated, Literal, NamedTuple

import cv2
import numpy as np

from datasets.base import IGNORE, SegmentationData
from datasets.camvid import CLASSES, PALETTE
from datasets.toy_scene import POLE, ROAD, SKY, TREE, compose
from engine.errors import UserError
from engine.ranges import Size

DOMAINS = ("synthetic", "real", "night", "fog", "rain", "snow")
# material: (colours in the game, colours in the real world, strength of its grain in the real
# world)
MATERIALS = {
    "sky": ("4fa8f0 6cbcf5 8fcdf2", "8fa9c4 a9bccb c3c9cc b7c4d6", 0.0),
    "cloud": ("eef6fc", "c9d0d6", 0.0),
    "asphalt": ("62656f 6b6d74", "5d5b59 77736e 4d4c4e 86817a 6a6c70", 0.06),
    "paint": ("f4f4ee", "b9b6ab", 0.12),
    "slab": ("c9b8a8 b9b4bd", "8f887d 7d7a77 9c9285 86807c", 0.10),
    "kerb": ("dedad2", "a09b92", 0.08),
    "grass": ("6cc04a 7fc653", "6c7350 5f6b45 7f7b58", 0.22),
    "facade": (
        "e8a46c d9705c f0d08a b8d0c8 e9c2b4 9fb4d8",
        "8d6a55 9a8873 75655b a89c8a 7c7f80 b5a78f 6e5148",
        0.16,
    ),
    "roof": ("b4483c 8a4b4f 5d5f72", "6b4a40 595450 4c4d52 7b5a48", 0.18),
    "frame": ("fdf6ea", "b3aca0", 0.04),
    "glass": ("4d7fa8 5b93b5", "3d454c 4e585f 59626a", 0.04),
    "glass_lit": ("6aa6cc 8cc4dc", "4a5258 69737a", 0.04),
    "shop": ("6aa6cc 8cc4dc", "4a5258 69737a", 0.04),
    "door": ("7a3f2c 2f6a5a 35508c", "4b352b 39443f 2f3644", 0.08),
    "awning": ("e5484d 2fa37c f2b23a 3f74d1", "8c4444 4c6b5c a68a54 4b5c7d", 0.05),
    "trunk": ("7a5236", "5a4c40", 0.25),
    "leaf": ("3f9c4a 57b04c 2f8a55 8bb83f e0a03c", "4c5a38 5d6640 3e4d37 6f6f45 7d6a3f", 0.42),
    "metal": ("6a7080 50586c", "6d6d6a 55575a 80807a", 0.05),
    "fence": ("b5763f f2ead8 3e6f66 8890a6", "7b6a55 9c9384 55605a 6d7175", 0.14),
    "plate": ("d8262c 2458c4 f5f5f0 f0b81e 1f8a5a", "9c3a38 3a5688 c3c1b8 b39544 3f6f58", 0.03),
    "symbol": ("ffffff 22252c", "c9c8c2 3a3a3c", 0.0),
    "case": ("23262e", "34353a", 0.03),
    "red": ("ff4136", "c2473c", 0.0),
    "green": ("35e06a", "5fae7a", 0.0),
    "lamp": ("fff3c4", "cbc6b4", 0.0),
    "car": (
        "e3342f 2779bd f6c945 f8fafc 38a169 4a5568 9f7aea",
        "7a3a38 3f5068 a9a9a6 d0d0cc 55585a 34363a",
        0.03,
    ),
    "windscreen": ("2c3e55", "30363b 454d52", 0.03),
    "tyre": ("23252b", "2b2a2a", 0.05),
    "cloth": (
        "e24a68 3a6fd8 f2a93b 6d48b8 20a39e fafafa",
        "6b4a4c 414d63 857a62 4a4553 3c3d40 a39f98",
        0.06,
    ),
    "trousers": ("2b3a67 4a4a55 6b4a3a", "33384a 403f42 544a42", 0.06),
    "skin": ("f2c29b c98d62 8a5a3c", "b08a70 8f6a52 64493a", 0.03),
    "hair": ("3b2a22 d9a441", "332b27 6d5a45", 0.06),
}
EMISSION = {
    "shop": "966e42",
    "glass_lit": "e4aa5c",
    "lamp": "ffe2a0",
    "red": "ff3c28",
    "green": "50ff8c",
}  # at night


def paint(canvas, camera, polygons, values):
    """Fill polygons, a list of (n, k, 3), with their values, one over the other."""
    if polygons:
        points = camera.project(np.concatenate([group.reshape(-1, 3) for group in polygons]))
        points = np.clip(points * len(canvas) * 16, -1e7, 1e7).astype(np.int32)  # 4 fractional bits
        ends = np.cumsum([len(group) * group.shape[1] for group in polygons])
        for group, part, value in zip(polygons, np.split(points, ends[:-1]), values):
            cv2.fillPoly(canvas, part.reshape(*group.shape[:2], 2), value, shift=4)
    return canvas


def paint_by_number(table, parts):
    """Four bytes per shape, looked up as one number: (H, W, 4) uint8."""
    packed = np.frombuffer(b"".join(table), np.uint32)
    return packed[parts].view(np.uint8).reshape(*parts.shape, 4)


class View(NamedTuple):
    """What the weather needs to know about every pixel."""

    label: np.ndarray  # (H, W)
    world: (
        np.ndarray
    )  # (H, W, 3) float32 metres right of the camera's axis, above the ground, ahead (sky: 400)
    ground: np.ndarray  # (H, W, 1) float32, 1 where the surface is level
    sky: np.ndarray  # (H, W, 1) bool
    glow: np.ndarray  # (H, W, 3) uint8, colour of what shines at night
    lamps: list  # (3,) places of the nearest street lamps, like `world`


def labels_of(shapes, parts):
    """Class ids (H, W) uint8 of a map of shape numbers (H, W)."""
    return np.array([shape.label for shape in shapes], np.uint8)[parts]


def look(camera, shapes, parts):
    """Undo the projection: the plane of every pixel's shape gives its place in the world."""
    height, width = parts.shape
    u = ((np.arange(width, dtype=np.float32) + 0.5) / height - camera.vanishing)[None]
    v = ((np.arange(height, dtype=np.float32) + 0.5) / height - camera.horizon)[:, None]
    a, b, c = (
        np.array(column, np.float32)[parts] for column in zip(*(shape.plane for shape in shapes))
    )
    z = 1 / np.clip(a + b * u + c * v, 1 / 400, 1)
    world = np.dstack([u * z / camera.focal, camera.height - v * z / camera.focal, z])
    glow = paint_by_number(
        [bytes.fromhex(EMISSION.get(shape.material, "000000")) + b"\0" for shape in shapes], parts
    )
    lamps = [s.polygons[0].mean(0) for s in shapes if s.label == POLE and s.material == "lamp"][-3:]
    lamps = [np.array([camera.lateral(x, z), y, z], np.float32) for x, y, z in lamps]
    label = labels_of(shapes, parts)
    return View(
        label, world, np.float32(c > 0)[..., None], (label == SKY)[..., None], glow[..., :3], lamps
    )


def blur(image, radius):
    """Gaussian blur; radius in pixels. Large ones are taken at a quarter of the size, which is as
    good and fast."""
    if radius > 2.5:
        small = cv2.resize(image, None, fx=0.25, fy=0.25, interpolation=cv2.INTER_AREA)
        return cv2.resize(cv2.GaussianBlur(small, (0, 0), radius / 4), image.shape[1::-1])
    return cv2.GaussianBlur(image, (0, 0), max(radius, 0.3))


def smooth_field(rng, size, cells):
    """Slow random variation over the picture, (H, W, 1) float32 about 0."""
    field = rng.standard_normal((cells, cells), dtype=np.float32)
    return cv2.resize(field, size[::-1], interpolation=cv2.INTER_CUBIC)[..., None]


@cache
def texture_tile():
    """Grain and brickwork that repeat every 512 pixels = 16 metres: (512, 512, 2) float32 about
    0."""
    rng, side = np.random.default_rng(0), 512
    speckle = rng.standard_normal((side, side)) * 0.5
    for cells in (32, 64, 128, 256):
        speckle += cv2.resize(rng.standard_normal((cells, cells)), (side, side)) * 0.6
    row, column = np.mgrid[0:side, 0:side]
    joint = (row % 8 < 1.5) | ((column + row // 8 % 2 * 8) % 16 < 1.5)
    bricks = np.kron(rng.standard_normal((64, 32)), np.ones((8, 16))) * 0.6
    return np.dstack([speckle, np.where(joint, 1.6, bricks)]).astype(np.float32)


def texture(rng, shapes, parts, view):
    """Relative brightness, (H, W, 1): bricks on some facades, grain elsewhere, fading with
    depth."""
    x, y, z = cv2.split(view.world)
    s = (x + z) * 32 + int(
        rng.integers(512)
    )  # runs along every upright plane, be it along or across the road
    t = np.where(view.ground[..., 0] > 0, z, y) * 32
    tile = cv2.remap(
        texture_tile(), np.mod(s, np.float32(511)), np.mod(t, np.float32(511)), cv2.INTER_LINEAR
    )
    strength = np.array([MATERIALS[shape.material][2] for shape in shapes], np.float32)[parts]
    brick = np.array([shape.material == "facade" and shape.variant < 0.6 for shape in shapes])[
        parts
    ]
    return (
        1
        + np.where(brick, tile[..., 1], tile[..., 0])
        * strength
        * (np.minimum(1, 14 / z) * 0.7 + 0.3)
    )[..., None]


def colours(rng, shapes, game):
    """One colour and a spare byte per shape, (shapes, 4) uint8; outside the game every picture has
    its own palette."""
    table = {
        name: np.array([list(bytes.fromhex(code)) for code in row[not game].split()])
        + (rng.normal(0, 2) if game else rng.normal(0, 9) + rng.normal(0, 4, 3))
        for name, row in MATERIALS.items()
    }
    chosen = [table[s.material][int(s.variant * len(table[s.material]))] for s in shapes]
    result = np.array(chosen) * np.array([[shape.shade] for shape in shapes])
    result += rng.normal(0, 1 if game else 5, (len(shapes), 1))
    return np.pad(np.clip(result, 0, 255).astype(np.uint8), ((0, 0), (0, 1)))


def photograph(rng, image, view, light, grain):
    """From flat colours to daylight: shadows, texture, a sky with soft clouds, uneven light."""
    size = view.label.shape
    image = image * (grain * (1 - rng.uniform(0.35, 0.6) * (1 - light) * view.ground))
    high = np.linspace(0, 1, size[0], dtype=np.float32)[:, None, None]
    blue = (
        np.float32([118, 150, 188]) * rng.uniform(0.8, 1.15) * (1 - high)
        + np.float32([205, 210, 212]) * high
    )
    clouds = np.clip(smooth_field(rng, size, 6) * 0.5 + rng.uniform(-0.5, 0.8), 0, 1)
    burnt = int(rng.choice([255, 220]))  # a Python number keeps float32
    return np.where(view.sky, blue + (burnt - blue) * clouds, image) * (
        1 + 0.1 * smooth_field(rng, size, 3)
    )


def night(rng, image, view):
    """Darkness with head lights, street lamps, lit windows and stars."""
    x, y, z = cv2.split(view.world)
    beam = 1.1 * np.exp(-((x / (1.2 + 0.16 * z)) ** 2) - z / 26 - np.maximum(y, 0) * 0.9)
    pool = np.zeros_like(x)
    for lamp in view.lamps:
        pool += 0.75 * np.exp(
            ((x - lamp[0]) ** 2 + 0.35 * (y - 1.5) ** 2 + (z - lamp[2]) ** 2) * np.float32(-1 / 22)
        )
    light = np.float32([0.15, 0.18, 0.29]) + beam[..., None] * np.float32([1, 0.93, 0.75])
    light += pool[..., None] * np.float32([1, 0.78, 0.45])
    high = np.linspace(0, 1, len(x), dtype=np.float32)[:, None, None]
    stars = 130 * (rng.random(view.sky.shape, dtype=np.float32) < 0.002)
    dark = np.float32([10, 14, 36]) + high * np.float32([40, 40, 55]) + stars
    image, glow = np.where(view.sky, dark, image * light), view.glow.astype(np.float32)
    return np.maximum(image, glow) + 0.5 * blur(glow, len(x) / 90) + 0.6 * blur(glow, len(x) / 28)


def veil(image, view, colour, reach):
    """Air that is seen: e-fold per `reach` metres."""
    return colour + (image - colour) * np.exp(view.world[..., 2:] * np.float32(-1 / reach))


def fog(rng, image, view):
    """A veil that swallows what is far."""
    return veil(
        image,
        view,
        np.float32([203, 207, 212]) * np.float32(rng.uniform(0.85, 1.1)),
        rng.uniform(18, 45),
    )


def rain(rng, image, view):
    """Grey air, a wet street that mirrors the scene, streaks, drops on the lens."""
    height, width = view.label.shape
    image = 0.7 * image + 0.3 * image.mean(2, keepdims=True)
    image = veil(image, view, np.float32([132, 138, 146]), 110) * np.float32(0.95)
    horizon = int(view.ground.any((1, 2)).argmax())
    rows = np.clip(2 * horizon - np.arange(height) - height // 50, 0, height - 1)
    mirror = cv2.GaussianBlur(
        image[rows], (0, 0), sigmaX=height / 200 + 0.3, sigmaY=height / 50 + 0.3
    )
    wet = np.clip(0.45 + 0.22 * smooth_field(rng, (height, width), 7), 0.1, 0.75) * view.ground
    image = image * (1 - 0.2 * view.ground) * (1 - wet) + mirror * wet
    streaks = np.zeros((height, width), np.uint8)
    start = rng.random((160, 1, 2)) * (width, height)
    lines = np.concatenate(
        [start, start + rng.uniform(0.02, 0.07, (160, 1, 1)) * (0.22 * height, height)], 1
    )
    cv2.polylines(streaks, (lines * 16).astype(np.int32), False, 56, 1, cv2.LINE_AA, 4)
    drops = dots(rng, view, 12, 0.01, 0.028)
    return (image + streaks[..., None]) * (1 - drops) + (
        blur(image[::-1], height / 60) * 0.6 + 62
    ) * drops


def dots(rng, view, count, smallest, largest):
    """Soft discs, radii in picture heights: (H, W, 1) float32 in 0..1."""
    height, width = view.label.shape
    mask = np.zeros((height, width), np.uint8)
    for x, y, radius in (
        rng.uniform((0, 0, smallest), (width / height, 1, largest), (count, 3)) * height * 16
    ):
        cv2.circle(mask, (int(x), int(y)), int(radius), 225, -1, cv2.LINE_AA, 4)
    return mask[..., None] * np.float32(1 / 255)


def snow(rng, image, view):
    """White ground with wheel tracks, white tops, flakes."""
    size = view.label.shape
    z, step = view.world[..., 2], max(1, size[0] // 100)
    image = veil(image, view, np.float32([196, 202, 210]), 90)
    tracks = (
        np.exp(-(((np.abs(view.world[..., :1]) - 0.8) / 0.3) ** 2))
        * (view.label == ROAD)[..., None]
    )
    cover = np.clip(0.8 + 0.2 * smooth_field(rng, size, 8) - 0.45 * tracks, 0.1, 0.95) * view.ground
    above = np.vstack([z[:1].repeat(step, 0), z[:-step]])
    tops = np.float32(
        (above > 1.15 * z) & ~view.sky[..., 0]
    )  # the edges that look up against something farther
    leaves = (view.label == TREE) * np.clip(
        0.35 + 0.3 * rng.standard_normal(size, dtype=np.float32), 0, 0.8
    )
    cover = np.maximum(cover, np.maximum(0.9 * blur(tops, size[0] / 400), leaves)[..., None])
    flakes = dots(rng, view, 200, 0.002, 0.008)
    return (image + (np.float32([232, 237, 245]) - image) * cover) * (1 - flakes) + 252 * flakes


WEATHER = {"night": night, "fog": fog, "rain": rain, "snow": snow}


def lay_out(seed, index, size):
    """What a scene is in every domain: camera, sun, shapes, and the map of their numbers at twice
    the size."""
    height, width = size
    camera, sun, shapes = compose(np.random.default_rng((seed, index, 1)), (height, width))
    fine = np.zeros(
        (2 * height, 2 * width), np.uint16
    )  # the picture is supersampled; labels take every other pixel
    return (
        camera,
        sun,
        shapes,
        paint(fine, camera, [shape.polygons for shape in shapes], range(len(shapes))),
    )


def draw_label(seed, index, size):
    """The labels that `draw` returns, in a fraction of its time."""
    _, _, shapes, fine = lay_out(seed, index, size)
    return labels_of(shapes, fine[::2, ::2])


def draw(
    seed: int, index: int, domain: str, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Picture `index` of the series `seed`: (H, W, 3) uint8 RGB and (H, W) uint8 ids. Equal
    arguments, equal arrays."""
    if domain not in DOMAINS:
        raise UserError(f"unknown domain {domain!r}; choose one of {', '.join(DOMAINS)}")
    height, width = size
    camera, sun, shapes, fine = lay_out(seed, index, size)
    rng = np.random.default_rng((seed, index, 2 + DOMAINS.index(domain)))
    image = paint_by_number(colours(rng, shapes, domain == "synthetic"), fine)
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)[..., :3].astype(
        np.float32
    )
    parts = np.ascontiguousarray(fine[::2, ::2])
    view = look(camera, shapes, parts)
    fallen = [
        s.polygons + s.polygons[..., 1:2] * (sun[0], -1, sun[1])
        for s in shapes
        if s.casts and s.depth < 40
    ]
    light = blur(
        paint(np.full((height, width), 255, np.uint8), camera, fallen, [0] * len(fallen)),
        height / 240,
    )
    light = light[..., None] * np.float32(1 / 255)
    if domain == "synthetic":
        image *= 1 - 0.16 * (1 - light) * view.ground
    else:
        overcast = domain in WEATHER
        light = 0.8 + 0.2 * light if overcast else light
        image = photograph(rng, image, view, light, texture(rng, shapes, parts, view))
        image = WEATHER[domain](rng, image, view) if overcast else image
        image = blur(
            image, rng.uniform(0.2, 0.6) * height / 240 + 0.15
        )  # lens, white balance, sensor noise
        image *= (rng.uniform(0.85, 1.15) * rng.uniform(0.96, 1.04, 3)).astype(np.float32)
        image += np.float32(rng.uniform(3, 7)) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(image, 0, 255).astype(np.uint8), view.label


SPLITS = ("train", "val", "test")


class Toy(SegmentationData):
    """A series of drawn scenes with the 11 classes of CamVid.

    Training scenes differ between domains, so that a source and a target are never pairs; the
    scenes of `val` and `test` are the same in all domains, so that results differ by the appearance
    alone.

    Args:
        domain: one of DOMAINS.
        split: train, val or test: disjoint series.
        length: number of images.
        size: [H, W] pixels.
        labels, augment, seed, label_space: as in SegmentationData.
    """

    CLASSES, PALETTE = CLASSES, PALETTE

    def __init__(
        self,
        *,
        domain: Literal[DOMAINS] = "synthetic",
        split: Literal[SPLITS] = "train",
        length: Annotated[int, "[1, 1000000]"] = 400,
        size: Size = (96, 128),
        labels: bool = True,
        augment=None,
        seed=0,
        label_space: dict | None = None,
    ):
        self.set_classes(label_space=label_space)
        self.domain, self.split, self.size, self.labels = domain, split, tuple(size), labels
        self.augment, self.seed, self.extra, self.stylised, self.left_out = (
            augment,
            seed,
            {},
            {},
            [],
        )
        self.series = (
            SPLITS.index(split) if split != "train" else len(SPLITS) + DOMAINS.index(domain)
        )
        self.samples = [(f"{domain}/{split}/{index:05d}", None) for index in range(length)]

    def load(self, index):
        image, label = draw(self.series, index, self.domain, self.size)
        return image, self.table[label] if self.labels else np.full_like(label, IGNORE)

    def load_label(self, index):
        return self.table[draw_label(self.series, index, self.size)] if self.labels else None

    def stem(self, index):
        return self.samples[index][0]

    def label_key(self):
        names = [name for name, _ in self.samples]
        return repr(
            (type(self).__name__, self.series, self.size, self.CLASSES, self.table.tobytes(), names)
        )
