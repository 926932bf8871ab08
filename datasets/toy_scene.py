"""The geometry of the toy scenes: which flat shapes stand where, in metres, in front of a pinhole
camera.

`compose` draws one scene from a random generator: a camera, a sun, and the shapes from far to near.
Appearance is the business of `datasets/toy.py`; here a shape only names its class and its material.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

SKY, BUILDING, POLE, ROAD, PAVEMENT, TREE, SIGN, FENCE, CAR, PEDESTRIAN, BICYCLIST = range(
    11
)  # the CamVid-11 ids

NEAR, FAR = 0.8, 140.0  # metres: nothing is drawn closer than NEAR, the skyline stands at FAR
STOCK = 48  # ready-made objects per kind

ANGLES = np.linspace(0, 2 * np.pi, 14, endpoint=False)
CIRCLE = np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)  # (14, 2)
NO_PLANE = (0.0, 0.0, 0.0)  # infinitely far


class Camera(NamedTuple):
    """Pinhole camera over flat ground; metres, and picture coordinates u, v in units of the
    picture's height."""

    horizon: float  # v
    vanishing: float  # u where a straight road would meet the horizon
    focal: float
    height: float
    x: float  # from the middle of the road
    bend: float  # the road's curvature, 1 / m
    size: tuple  # (H, W) pixels

    def lateral(self, x, z):
        """Metres right of the optical axis, for x metres right of the (curved) middle of the
        road."""
        return x - self.x + 0.5 * self.bend * z * z

    def project(self, points):
        """World points (N, 3): x along the road's width, y up, z ahead -> (N, 2) u, v."""
        x, y, z = points[:, 0], points[:, 1], np.maximum(points[:, 2], NEAR)
        u = self.vanishing + self.focal * self.lateral(x, z) / z
        return np.stack([u, self.horizon + self.focal * (self.height - y) / z], -1)

    def wall(self, x, z0, z1):
        """Upright plane along the road as (a, b, c): of any plane, 1 / z = a + b (u - vanishing) +
        c (v - horizon)."""
        slope = (self.lateral(x, z1) - self.lateral(x, z0)) / (z1 - z0)
        offset = self.lateral(x, z0) - slope * z0
        offset = np.copysign(max(abs(offset), 0.5), offset)  # a plane through the eye has no depth
        return -slope / offset, 1 / (self.focal * offset), 0.0


class Shape(NamedTuple):
    """Polygons of one colour, painted in the order of falling `depth`. In the stock, `plane` is
    "across" or "along"."""

    label: int
    material: str
    polygons: np.ndarray  # (number of polygons, corners, 3) metres
    shade: float = 1.0
    variant: float = 0.0  # in [0, 1): which of the material's colours
    casts: bool = False  # a shadow
    plane: tuple | str = NO_PLANE
    depth: float = 0.0
    extent: float = 9.0  # metres; what is smaller than a pixel is left out


def across(outline, z=0.0):
    """Outlines ([n,] k, 2) of (x, y) -> polygons (n, k, 3) that face the camera."""
    outline = np.asarray(outline, float)
    points = np.full((outline.size // outline.shape[-2] // 2, outline.shape[-2], 3), float(z))
    points[..., :2] = outline
    return points


def along(outline, x=0.0):
    """Outlines ([n,] k, 2) of (z, y) -> polygons (n, k, 3) in an upright plane along the road."""
    return across(outline, x)[..., ::-1]


def flat(outline, y=0.0):
    """Outlines ([n,] k, 2) of (x, z) -> polygons (n, k, 3) on the ground."""
    return across(outline, y)[..., (0, 2, 1)]


def boxes(left, right, bottom, top):
    """Rectangles (n, 4, 2) from edges that broadcast."""
    left, right, bottom, top = (
        edge.ravel() for edge in np.broadcast_arrays(left, right, bottom, top)
    )
    return np.stack([left, bottom, right, bottom, right, top, left, top], -1).reshape(-1, 4, 2)


# Every maker below builds an object around the origin (x to the outside of the street); `stock`
# keeps what it made.


# Of the three layers of a fir: half its width, how much higher than the first it lies, shade.
FIR = ((0.26, 0.0, 0.72), (0.26 - 0.06, 0.24, 0.86), (0.26 - 0.12, 0.48, 1.0))
# Blobs of leaves: middle, radius, shade.
CROWN = (
    (0, 0.62, 0.34, 0.72),
    (-0.17, 0.6, 0.2, 0.8),
    (0.18, 0.58, 0.2, 0.76),
    (0.02, 0.82, 0.2, 0.95),
    (-0.12, 0.74, 0.17, 1.05),
    (0.13, 0.72, 0.13, 0.9),
)


def tree(rng, number):
    """One metre of round tree, made of lobed blobs of leaves, or of fir."""
    tone = rng.random()
    yield Shape(TREE, "trunk", across(boxes(-0.035, 0.035, 0, 0.5)))
    for wide, y, shade in FIR if number % 4 == 0 else ():
        layer = [(-wide, 0.16 + y), (wide, 0.16 + y), (0, 0.55 + y)]
        yield Shape(TREE, "leaf", across(layer), shade, tone * 0.5, True)
    for x, y, radius, shade in CROWN if number % 4 else ():
        lobes = 1 + 0.1 * np.sin(5 * ANGLES + rng.uniform(0, 6))[:, None]
        blob = CIRCLE * lobes * radius * (1, 0.85) + (x, y) + rng.normal(0, 0.02, 2)
        yield Shape(TREE, "leaf", across(blob), shade, tone, radius > 0.3)


def building(rng, number, town=False):
    """Wall along the road and near end: a house with a pitched roof, or (`town`) a block with
    shops."""
    floors = rng.integers(1, 3) + town * rng.integers(2, 6)
    storey, deep, long = 3.1, 11.0, rng.uniform(8, 18)
    top, tone, glazing = floors * storey + 0.6, rng.random(), rng.random()
    yield Shape(BUILDING, "facade", along(boxes(0, long, 0, top)), 1.0, tone, True)
    end = boxes(0, deep, 0, top)
    if not town:
        ridge = (deep / 2, top + rng.uniform(2, 3.5))
        end = [(0, 0), (deep, 0), (deep, top), ridge, (0, top)]
        roof = [(-0.4, top - 0.2, 0), (*ridge, 0), (*ridge, long), (-0.4, top - 0.2, long)]
        yield Shape(BUILDING, "roof", np.array([roof]), 0.9, tone, True)
    shop, wide = town and rng.random() < 0.6, rng.uniform(1.0, 1.5)
    column = np.arange(0.8, long - wide - 0.3, rng.uniform(2.2, 3.2))  # (columns,)
    row = np.arange(1 if shop else 0, floors)[:, None] * storey + 1.0  # (rows, 1)
    panes = boxes(column, column + wide, row, row + 1.55)  # (windows, 4, 2)
    lit = rng.random(len(panes)) < 0.35
    trim = boxes(column - 0.12, column + wide + 0.12, row - 0.15, row + 1.65)
    trim = along(np.concatenate([trim, boxes(0, long, top - 0.35, top)]))
    centre = deep * np.array([0.2, 0.5, 0.8])
    side = across(boxes(centre - 0.6, centre + 0.6, row, row + 1.5))
    yield from (
        Shape(BUILDING, "facade", across(end), 0.88, tone, plane="across"),
        Shape(BUILDING, "frame", trim, extent=0.5),
        Shape(BUILDING, "glass", along(panes[~lit]), 1.0, glazing, extent=1.0),
        Shape(BUILDING, "glass_lit", along(panes[lit]), 1.0, glazing, extent=1.0),
        Shape(BUILDING, "glass", side, 0.9, glazing, plane="across", extent=1.0),
    )
    if shop:
        bar = np.arange(0.7, long - 0.7, 1.7)
        bars = boxes(bar, bar + 0.14, 0.5, 2.3)
        awning = along(boxes(0.5, long - 0.5, 2.2, 2.75), -0.3)
        board = boxes(long * 0.28, long * 0.7, 2.9, 3.65)
        letter = np.arange(long * 0.32, long * 0.65, 0.6)
        letters = boxes(letter, letter + 0.35, 3.1, 3.4)
        yield from (
            Shape(BUILDING, "shop", along(boxes(0.7, long - 0.7, 0.5, 2.3)), 1.0, glazing),
            Shape(BUILDING, "frame", along(bars), 0.8, extent=0.3),
            Shape(BUILDING, "awning", awning, 1.0, rng.random()),
            Shape(SIGN, "plate", along(board), 1.0, rng.random()),
            Shape(SIGN, "symbol", along(letters), extent=0.5),
        )
    door = rng.uniform(0.5, long - 2)
    door = along(boxes(door, door + 1.1, 0, 2.2))
    yield Shape(BUILDING, "door", door, 1.0, rng.random(), extent=1.0)


def block(rng, number):
    """A block of flats."""
    return building(rng, number, town=True)


def fence(rng, number):
    """Six metres of planks in front of a solid ground, for in CamVid a fence's gaps are fence."""
    tone, post = rng.random(), np.arange(0, 5.9, 0.36)
    planks = np.concatenate([boxes(post, post + 0.22, 0.04, 1.06), boxes(0, 6, 0.76, 0.86)])
    return (
        Shape(FENCE, "fence", along(boxes(0, 6, 0, 1)), 0.72, tone, True),
        Shape(FENCE, "fence", along(planks), 1.0, tone, extent=0.2),
    )


# Outlines of a car that shows its back and of one that shows its front: 7 x (z, y).
PROFILES = (
    "0 0.3  0 0.92  0.5 1.4  2.3 1.44  3.1 0.95  4.2 0.75  4.2 0.3",
    "0 0.3  0 0.72  1.0 0.92  1.75 1.4  3.5 1.42  4.1 0.92  4.2 0.3",
)


def shrunk(outline, scale):
    """An outline (k, 3), shrunk towards its middle by a factor per axis, as a polygon (1, k, 3)."""
    middle = outline.mean(0)
    return (middle + (outline - middle) * scale)[None]


def car(rng, number, front=False):
    """Car or van, an extruded profile whose flank at +x is seen; the near end is its `front` or its
    back."""
    half, tall = (1.0, 1.45) if number % 8 == 0 else (0.88, rng.uniform(0.95, 1.1))
    tone = rng.random()
    profile = np.array(PROFILES[front].split(), float).reshape(7, 2)
    profile *= rng.uniform(0.92, 1.1), tall
    # The cabin is narrower than the body.
    inset = half - 0.5 * np.clip(profile[:, 1] / tall - 0.92, 0, 1)
    flank = np.column_stack([inset, profile[:, ::-1]])
    other = flank * (-1, 1, 1)
    under = along(boxes(0.3, 4.0, 0.1, 0.4), half), flat(boxes(-half, half, 0, 4.1), 0.05)
    behind = boxes(np.array([-half, half - 0.22]), np.array([0.22 - half, half]), 0, 0.5)
    cabin = flank[2:6] if front else flank[1:5]
    hubs = np.array([[[0.8, 0.33]], [[3.4, 0.33]]])
    yield from (
        Shape(CAR, "tyre", np.concatenate(under), 0.7, casts=True),
        Shape(CAR, "tyre", across(behind, 0.1)),
        Shape(CAR, "car", flank[None], 0.82, tone, True),
        Shape(CAR, "windscreen", shrunk(cabin, (1, 0.72, 0.84)), extent=0.6),
        Shape(CAR, "tyre", along(CIRCLE * 0.33 + hubs, half), extent=0.6),
        Shape(CAR, "metal", along(CIRCLE * 0.16 + hubs, half), 1.3, extent=0.3),
    )
    for first, shade in ((3, 1.1), (2, 1.0), (1, 1.08), (0, 0.95))[1 - front :]:
        face = np.stack([flank[first], flank[first + 1], other[first + 1], other[first]])
        yield Shape(CAR, "car", face[None], shade, tone)
        if first == 1 + front:
            yield Shape(CAR, "windscreen", shrunk(face, (0.86, 0.8, 0.8)), extent=0.6)
    left, level = np.array([0.05 - half, half - 0.4]), (0.55 if front else 0.66) * tall
    lights = across(boxes(left, left + 0.35, level, level + 0.15))
    yield from (
        Shape(CAR, "lamp" if front else "red", lights, extent=0.3),
        Shape(CAR, "tyre", across(boxes(-half, half, 0.28, 0.4)), 1.4, extent=0.3),
        Shape(CAR, "symbol", across(boxes(-0.25, 0.25, 0.42, 0.54)), extent=0.2),
    )


def oncoming(rng, number):
    """A car that shows its front."""
    return car(rng, number, front=True)


def person(rng, number, label=PEDESTRIAN, size=1.0, lean=0.0, lift=0.0):
    """Legs, arms, torso, head, hair; `lean` bends the upper body forward. Pedestrians are one metre
    high."""
    tone, stride, legs = rng.random(), rng.uniform(-0.14, 0.14), rng.random()
    shoulder, hand, head = np.array([(lean, 0.82), (lean + 0.12, 0.48), (lean * 1.2, 0.92)])
    hand = np.array([lean * 1.9, 0.6]) if lean else hand
    coat = [[*np.add(shoulder, [(-0.11, -0.01), (0.11, -0.01)]), (0.09, 0.44), (-0.09, 0.44)]]
    arms = [[*np.add(shoulder, [(0.04, -0.02), (0.12, -0.03)]), *np.add(hand, [(0.06, 0), (0, 0)])]]
    if not lean:
        arms.append([(-0.06, 0.8), (-0.12, 0.79), (-0.18, 0.5), (-0.12, 0.48)])
    left = [(-0.02, 0.5), (0.07, 0.5), (0.04 - stride, 0), (-0.05 - stride, 0)]
    right = [(-0.08, 0.5), (0.05, 0.5), (0.06 + stride, 0), (-0.03 + stride, 0)]
    for material, outline, shade, variant in (
        ("trousers", left, 0.8, legs),
        ("trousers", right, 1.0, legs),
        ("cloth", coat, 1.0, tone),
        ("cloth", arms, 0.85, tone),
        ("hair", CIRCLE * (0.068, 0.072) + head + (0, 0.012), 1.0, legs),
        ("skin", CIRCLE * (0.052, 0.055) + head + (0.008, -0.015), 1.0, rng.random()),
    ):
        polygons = across(outline) * size + (0, lift, 0)
        yield Shape(label, material, polygons, shade, variant, material != "skin")


FRAME = "-0.53 0.3  -0.53 0.4  -0.1 0.85  0.42 0.85  0.46 1.08  0.53 0.36  0.36 0.78  0 0.3"


def rider(rng, number):
    """A cyclist, from behind (riding along) or from the side (crossing)."""
    if number % 2:
        return (
            Shape(BICYCLIST, "tyre", across(boxes(-0.06, 0.06, 0, 0.75)), casts=True),
            Shape(BICYCLIST, "metal", across(boxes(-0.3, 0.3, 0.98, 1.05))),
            *person(rng, number, BICYCLIST, 1.5, 0.0, 0.35),
        )
    hub = np.array([[[-0.53, 0.34]], [[0.53, 0.34]]])  # (2, 1, 2)
    rim, hole = CIRCLE * 0.35 + hub, CIRCLE * 0.23 + hub
    wheels = np.concatenate([rim, rim[:, :1], hole, hole[:, :1]], 1)
    frame = np.array(FRAME.split(), float).reshape(-1, 2)
    return (
        Shape(BICYCLIST, "tyre", across(wheels), casts=True),
        Shape(BICYCLIST, "plate", across(frame), 1.0, rng.random()),
        *person(rng, number, BICYCLIST, 1.45, 0.17, 0.28),
    )


def post(rng, number):
    """A pole, one metre high."""
    return (Shape(POLE, "metal", across(boxes(-0.05, 0.05, 0, 1)), 1.0, rng.random(), True),)


def lantern(rng, number):
    """Arm and head of a street light, over the road (-x)."""
    return (
        Shape(POLE, "metal", across([(0.0, -0.4), (-1.5, 0.0), (-1.5, 0.12), (0, -0.2)])),
        Shape(POLE, "lamp", across(boxes(-2.2, -1.5, -0.08, 0.12))),
    )


PLATES = (CIRCLE, np.array([(-1, -0.8), (1, -0.8), (0, 0.95)]), boxes(-0.85, 0.85, -0.85, 0.85)[0])


def sign(rng, number):
    """A traffic light, or a round, triangular, square or long plate; its middle at the origin."""
    kind, tone = number % 5, rng.random()
    if kind == 0:
        lights = ("red", "tyre", "tyre") if tone < 0.5 else ("tyre", "tyre", "green")
        return (
            Shape(SIGN, "case", across(boxes(-0.26, 0.26, -0.65, 0.65))),
            *(
                Shape(SIGN, material, across(CIRCLE * 0.15 + (0, level)), extent=0.3)
                for level, material in zip((0.38, 0, -0.38), lights)
            ),
        )
    if kind == 1:
        lines = boxes(-0.75, 0.5, np.array([-0.28, 0.1]), np.array([-0.12, 0.26]))
        return (
            Shape(SIGN, "plate", across(boxes(-0.95, 0.95, -0.5, 0.5)), 1.0, 0.25 + 0.7 * tone),
            Shape(SIGN, "symbol", across(lines), extent=0.3),
        )
    outline = PLATES[kind - 2] * 0.48
    return (
        Shape(SIGN, "plate", across(outline), 1.0, tone * 0.75),
        Shape(SIGN, "symbol", across(outline * 0.55), extent=0.4),
    )


@cache
def stock(maker, number):
    """The shapes of object `number` of a kind, always the same."""
    return tuple(maker(np.random.default_rng((number, len(maker.__name__))), number))


def place(camera, maker, number, x, z, size=(1, 1, 1), y=0.0, order=0.0, light=1.0):
    """Put an object of the stock on the street, mirrored if size[0] < 0; `order`: paint it as if so
    much farther."""
    near, shapes = max(z, NEAR), []
    # Metres of the stock that fill a pixel.
    smallest = near / (camera.focal * camera.size[0] * max(map(abs, size)))
    across_plane = along_plane = 1 / near, 0.0, 0.0
    if maker in (building, block, fence):
        along_plane = camera.wall(x, near, near + 10)
    for shape in stock(maker, number):
        polygons = shape.polygons * size + (x, y, z)
        seen = shape.extent > smallest and len(polygons)
        if seen and (z > NEAR or polygons[..., 2].max() > NEAR):
            plane = across_plane if shape.plane == "across" else along_plane
            look = {"plane": plane, "shade": shape.shade * light, "depth": z + order}
            shapes.append(shape._replace(polygons=polygons, **look))
    return shapes


def scenery(rng, camera):
    """Sky with clouds; houses and woods where the road ends."""
    shapes = [
        Shape(SKY, "sky", across(boxes(-900, 900, -50, 900), FAR), 1.0, rng.random(), depth=999)
    ]
    middle = -camera.bend * FAR * FAR / 2
    for _ in range(rng.integers(0, 5)):
        centre, size = (middle + rng.uniform(-90, 90), rng.uniform(28, 75)), rng.uniform(5, 11)
        for x, radius in ((-1.6, 0.8), (0, 1.3), (1.5, 0.9)):
            puff = (CIRCLE * (1.5 * radius, 0.6 * radius) + (x, 0.3 * radius)) * size + centre
            shapes.append(Shape(SKY, "cloud", across(puff, FAR), depth=998))
    for x in np.arange(middle - 130, middle + 130, 14.0):
        wide, high = rng.uniform(12, 22), rng.uniform(7, 22)
        kind, outline = (
            ((BUILDING, "facade"), boxes(x, x + wide, 0, high))
            if rng.random() < 0.55
            else ((TREE, "leaf"), CIRCLE * (0.75 * wide, 0.5 * wide) + (x + wide / 2, 3))
        )
        shapes.append(
            Shape(
                *kind,
                across(outline, FAR),
                0.85,
                rng.random(),
                False,
                (1 / FAR, 0.0, 0.0),
                FAR + high,
            )
        )
    return shapes


def street(rng, camera, half, outer, green):
    """The ground: road and markings, kerbs, pavements, and beyond them grass (`green`) or slabs;
    two sides each."""
    shapes, surface = [], rng.random()
    far = np.geomspace(NEAR, 300, 20)

    def lay(label, material, outline, shade=1.0, variant=0.0):
        plane = 0.0, 0.0, 1 / (camera.focal * camera.height)
        shapes.append(Shape(label, material, flat(outline), shade, variant, plane=plane, depth=900))

    def strip(left, right):
        return [(left, z) for z in far] + [(right, z) for z in far[::-1]]  # follows the bend

    for side, edge, grass in zip((-1, 1), outer, green):
        lay(
            *((TREE, "grass") if grass else (PAVEMENT, "slab")),
            strip(0, side * 300),
            1.0,
            rng.random(),
        )
        lay(PAVEMENT, "slab", strip(0, side * edge), 1.0, surface)
        joint = np.arange(3, 30, 1.5)
        lay(PAVEMENT, "slab", boxes(side * half, side * edge, joint, joint + 0.06), 0.86, surface)
        lay(PAVEMENT, "kerb", strip(side * half, side * (half + 0.22)))
    lay(ROAD, "asphalt", strip(-half, half), 1.0, surface)
    for side in (-1, 1) if rng.random() < 0.6 else ():
        lay(ROAD, "paint", strip(side * (half - 0.45), side * (half - 0.3)))
    long = rng.uniform(2, 4)
    dash = np.arange(rng.uniform(1, 5), 90, 2 * long)
    lay(ROAD, "paint", boxes(-0.08, 0.08, dash, dash + long))
    if rng.random() < 0.3:  # a zebra crossing
        z, bar = rng.uniform(7, 22), np.arange(0.4 - half, half - 0.6, 1.0)
        lay(ROAD, "paint", boxes(bar, bar + 0.5, z, z + 3))
    if rng.random() < 0.5:  # a manhole
        lay(
            ROAD,
            "asphalt",
            CIRCLE * 0.4 + (rng.uniform(-0.6, 0.6) * half, rng.uniform(5, 12)),
            0.7,
            surface,
        )
    return shapes


def roadside(rng, camera, side, half, edge, kind, sunny):
    """What stands along one side: blocks, houses or a park; fences, trees, street lights, signs,
    people."""
    shapes, z, style = [], rng.uniform(-10, 0), rng.integers(STOCK)

    def put(maker, x, z, tall=1.0, wide=1.0, number=None, **options):
        number = rng.integers(STOCK) if number is None else number
        size = side * wide, tall, 1.0
        shapes.extend(place(camera, maker, int(number), side * x, z, size, **options))

    def mast(x, z, tall):
        put(
            post, x, z, tall, max(1.0, 10 * z / (camera.focal * camera.size[0])), style
        )  # at least a pixel wide

    while z < 110:
        number = int(rng.integers(STOCK))
        if kind == "town" or (kind == "houses" and rng.random() < 0.8):
            maker, back = (block, 0.0) if kind == "town" else (building, rng.uniform(2, 4))
            long = stock(maker, number)[0].polygons[..., 2].max()  # the wall comes first
            put(maker, edge + back, z, number=number, order=long, light=1.0 if sunny else 0.82)
        else:
            long = rng.uniform(8, 16)
            for ahead in np.maximum(z + long * rng.random(rng.integers(2, 5)), 5.0):
                tall = rng.uniform(4.5, 9)
                put(
                    tree,
                    edge + rng.uniform(1.5, 9),
                    ahead,
                    tall,
                    tall * rng.uniform(0.75, 1.2),
                    order=7.0,
                )
        z += long + (rng.uniform(2, 6) if rng.random() < 0.4 else 0)
    railing = kind == "town"  # blocks have no front gardens: at most a guard rail on the kerb
    if rng.random() < (0.25 if railing else 0.75):
        start, tall = rng.uniform(1, 8), rng.uniform(0.9, 1.5)
        for z in np.arange(start, start + rng.uniform(10, 24) if railing else 66, 6.0):
            put(
                fence,
                half + 0.3 if railing else edge,
                z,
                min(tall, 1.0) if railing else tall,
                number=style,
                order=6.0,
            )
    if rng.random() < 0.5:
        for z in np.arange(rng.uniform(7, 15), 70, rng.uniform(9, 15)):
            tall = rng.uniform(4.5, 7)
            put(tree, half + 1.2, z, tall, tall)
    tall, gap = rng.uniform(5, 8), rng.uniform(22, 36)
    for z in np.arange(rng.uniform(7, 7 + gap), 80, gap):
        mast(half + 0.5, z, tall)
        put(lantern, half + 0.5, z, y=tall)
    for z in rng.uniform(7, 35, rng.integers(1, 4)):
        middle = rng.uniform(2.4, 2.9)
        mast(half + 0.6, z, middle)
        put(sign, half + 0.6, z - 0.05, wide=side, y=middle)
    for z in rng.uniform(5, 24, rng.integers(0, 8)):
        tall = rng.uniform(1.5, 1.9)
        put(person, rng.uniform(half + 0.8, edge - 0.3), z, tall, tall)
    return shapes


def compose(rng, size):
    """One scene: camera, sun (metres of shadow per metre of height, along x and z), shapes from far
    to near."""
    parked = rng.random(2) < 0.55
    half, drive = rng.uniform(2.8, 4.1) + 0.8 * parked.sum(), rng.choice([-1, 1])
    camera = Camera(
        horizon=rng.uniform(0.41, 0.56),
        vanishing=0.5 * size[1] / size[0] + rng.uniform(-0.2, 0.2),
        focal=rng.uniform(0.85, 1.15),
        height=rng.uniform(1.4, 1.9),
        x=drive * rng.uniform(0.4, 0.7) * (half - parked.sum()),
        bend=rng.normal() / 350,
        size=size,
    )
    sun = rng.choice([-1, 1], 2) * rng.uniform((0.4, 0.3), (1.3, 0.7))
    kinds = rng.choice(["town", "houses", "park"], 2, p=(0.56, 0.24, 0.2))
    outer = half + rng.uniform(2.4, 6.5, 2)
    shapes = scenery(rng, camera) + street(rng, camera, half, outer, kinds != "town")

    def drop(maker, x, z, size=(1.0, 1.0, 1.0)):
        shapes.extend(place(camera, maker, int(rng.integers(STOCK)), x, z, size))

    for index, side in enumerate((-1, 1)):
        shapes += roadside(rng, camera, side, half, outer[index], kinds[index], side * sun[0] > 0)
        facing_us = oncoming if side != drive else car
        lanes = [(side * 0.45 * (half - parked.sum()), rng.uniform(8, 26), (9, 40))]
        if parked[index]:
            lanes.append((side * (half - 1.05), rng.uniform(5, 14), (5.2, 13)))
        for x, z, gap in lanes:
            while z < 75:
                drop(facing_us, x, z, (-np.sign(camera.lateral(x, z)), 1.0, 1.0))
                z += rng.uniform(*gap)
    for z in rng.uniform(6, 20, rng.integers(0, 5)):
        drop(rider, rng.choice([-1, 1]) * rng.uniform(0.5, 0.9) * (half - 1.9 * parked.max()), z)
    if rng.random() < 0.3:
        drop(person, rng.uniform(-half, half), rng.uniform(8, 22), (1.75, 1.75, 1.0))
    return camera, sun, sorted(shapes, key=lambda shape: -shape.depth)
