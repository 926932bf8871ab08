"""TMT's regions: how well parts of an image transfer between domains, and attention that looks at
those that do not.

    # On a stage of mit.MiT, or on stage 1 of vit.ViT.
    model.heads.region: {name: region.Region, variant: bias, stage: 3, cell: 4}
    # With the classifier queries.Queries.
    model.heads.region: {name: region.Region, variant: mask, stage: -1, cell: 8}
    losses: [..., {name: tmt.RegionAdversarial, weight: 0.1},
             {name: cross_entropy.CrossEntropy, head: region, weight: 0.4}]          # not with mask
    # Guided by nats, from a probe of its own and a first look at the picture.
    model.heads.region: {name: region.Region, stage: 1, blocks: 12, variant: nats, strength: 2,
                         look: twice, estimator: probe, order: rank, cell: 4, cells: [8]}
    losses: [..., {name: tmt.RegionProbe}]

"TMT: Cross-domain Semantic Segmentation with Region-adaptive Transferability Estimation" (Zhang et
al., arXiv 2504.05774). No code is public, and of its text only the abstract and digests of others
were at hand: **the grouping (equations 1 to 3) is quoted there, everything else is a
reconstruction** [R].

ACTE, the adaptive cluster-based transferability estimator, groups a map chi (h, w) softly, from
cells of c x c pixels. A pixel belongs to the 3 x 3 cells around its own, so an assignment is nine
numbers per pixel. `rounds` times:

    (1) f(r)   = sum_p a(p, r) chi(p) / sum_p a(p, r)
    (2) s(p,r) = exp(kappa cos(f(r), chi(p)))     for the nine cells r around p, otherwise 0
    (3) a(p,r) = s(p, r) / sum_r' s(p, r')                          models/heads/_grouping.py

A discriminator D tells the domain of f(r) behind a gradient reversal; transferability is its doubt,
in bits, as in TVT (Yang et al., WACV 2023): tau = H2(D(f(r))), T(p) = sum_r a(p, r) tau(r). TMA,
transferable masked attention, then gives weight to keys that transfer badly and whose class is in
doubt; U is the entropy of the head "region" over log K:

    pi = (1 - T) U          logits + strength log(1/2 + pi / 2)

which is the same as multiplying attention by (1/2 + pi/2)^strength and normalising it again: an
equal pi changes nothing. The sign is TMT's: LOW transferability gains. TVT's gains with HIGH
transferability: `variant: tvt` multiplies the attention by T without normalising, in the last
block.

With this bias a key gains 0.11 nats at most where T is 0.88, and at the optimum of the adversary T
is 1 everywhere. The other way to read the abstract [R], "focus attention on areas with lower
transferability and higher semantic uncertainty", takes the comparatives for an order within the
image: `estimator: probe` is a second discriminator that never moves the features, `order: rank`
makes pi = sqrt(rank(1 - T) rank(U)) of ranks in 0..1, and `variant: nats` adds

    strength (pi(m) - mean pi)                 `queries: all`
    strength pi(n) (pi(m) - mean pi)           `queries: own`: query n as much as its own pi says

to the logits of key m. Grouping "by structural and semantic similarity": `semantic` and
`coordinates` append class probabilities and places to the unit features. At test, an oracle in the
place of pi (`benchmarks/places.py`), `own` helps on both sides of a planted shift, in all blocks
rather than the last ones; `all` harms what lies outside.

What enters the first guided block is grouped, which in all blocks of a ViT are embedded patches:
they tell colours, and hardly classes. `look: twice` [ours] sees the picture without guidance first.
It groups the features of the decoder, or the first map of the backbone (`features: backbone`), and
U is the entropy of the network's own class scores, mean over each region. Nothing but the probe is
trained beside the network, whose losses stay as they are; so with `variant: none` it is the network
without this head. On CamVid by day to dusk a key gets 16 % more or less attention, the probe tells
the domains, and nothing is gained over self-training. After training, an oracle of a planted shift
gains no more than the box of another picture (docs/results.md).

Second-hand texts put TMT after the pixel decoder of a Mask2Former: `stage: -1` groups the features
of the decoder, and `variant: mask` lets every query of models/classifiers/queries.py see the share
`opened` of the pixels where pi is highest, besides those of its own mask; U is then the entropy of
the masks of the layer before.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.pictures import side_by_side
from engine.ranges import Few, Momentum, Natural, NonNegative, Positive, Share
from engine.statistics import precise, resize_logits
from engine.step import Record
from models.blocks import Guide, received
from models.heads._grouping import EPSILON, group, labels_of, region_means, spread, to_cells
from models.heads._transferability import (
    Reversal,
    discriminator,
    doubt,
    ranks,
    reversal,
    uncertainty,
)
from models.heads.base import Head

PRIME = 7919  # n -> n PRIME modulo the number of places is a permutation of them


@dataclass(eq=False)
class Regions(Record):
    """What is found on one view, `output.regions`: R x C regions of a map (h, w)."""

    assignment: (
        Tensor  # (B, R, C, 9, c c): how much each pixel of a cell belongs to the 3 x 3 cells around
    )
    domain: Tensor | None  # (B, N): logits of "source" of all regions, behind the reversal
    transferability: Tensor  # (B, h, w) in 0..1
    logits: Tensor | None = None  # (B, K, h, w) of the region's own classifier
    uncertainty: Tensor | None = None  # (B, h, w) in 0..1
    priority: Tensor | None = None  # (B, h, w) in 0..1: what attention is to look at
    probe: Tensor | None = None  # (B, N): as `domain`, of the probe, which no feature follows
    tokens: tuple | None = None  # grid of the queries of the guided attention
    keys: tuple | None = None  # and of its keys
    opens: Callable | None = (
        None  # logits (B, K, h, w) -> pixels (B, h, w) bool that all queries may see
    )


class Region(Head):
    """ACTE and TMA on one stage of a transformer, or on the features of the decoder ->
    `output.regions`.

    Args:
        stage, blocks: the last `blocks` of stage `stage` are guided; what enters the first of them
            is grouped. -1: the features of the decoder, for mask and none.
        look: "twice": a first look without guidance is grouped; the network has no adversary then,
            and no classifier of the regions.
        features: of this first look, which are grouped and which the probe sees: of the "decoder",
            which tell classes, or the first map of the "backbone", which tells domains better.
        variant: "bias" (TMA), "nats" (the same, stronger), "tvt" (its ancestor), "mask" (TMA on a
            query decoder), or "none": regions and their adversarial loss, attention as it is.
        strength: lambda, or nats; 0 leaves attention as it is.
        queries: which of them `nats` guides: "all", or each by its "own" priority.
        estimator: whose doubt is T: the "adversary" that the features fool, or a "probe" beside it.
        order: pi of "value", (1 - T) U, or of "rank".
        favour: pi of regions of "low" transferability (TMT), or of "high" (TVT's sign).
        shuffle: a control: the priorities of an image change places, the same ones at all times.
        opened: share of the pixels, of highest priority, that `mask` opens to all queries; 0 leaves
            the masks as they are.
        regions: "adaptive", or "patches" for the cells themselves (no round).
        cell, kappa, rounds: c, side of a cell in tokens at the start; sharpness of the assignment;
            L.
        cells: sides of further, coarser or finer, cells; T is the mean over all of them.
        semantic, coordinates: how much class probabilities, and places in -1..1, count in the
            grouping beside unit features.
        detach: the segmentation loss does not train the discriminator.
        ramp: steps over which the reversal grows; 0: 1 at all times.
        dropout: of the discriminator.
        reverse: False makes the discriminator a probe: it learns, and the features do not.
    Raises:
        ValueError: a stage that the backbone does not have, options that contradict each other.
    """

    at_test = True

    def __init__(
        self,
        *,
        in_channels,
        map_channels,
        depths,
        num_classes,
        classifier,
        reductions=(),
        stage: int,
        blocks: Few = 1,
        variant: Literal["bias", "nats", "tvt", "mask", "none"] = "bias",
        strength: NonNegative = 1.0,
        queries: Literal["all", "own"] = "all",
        look: Literal["once", "twice"] = "once",
        features: Literal["decoder", "backbone"] = "decoder",
        estimator: Literal["adversary", "probe"] = "adversary",
        order: Literal["value", "rank"] = "value",
        favour: Literal["low", "high"] = "low",
        shuffle: bool = False,
        opened: Share = 0.1,
        regions: Literal["adaptive", "patches"] = "adaptive",
        cell: Few = 4,
        cells: list[Few] = (),
        semantic: NonNegative = 0.0,
        coordinates: NonNegative = 0.0,
        kappa: Positive = 10.0,
        rounds: Natural = 3,
        detach: bool = True,
        ramp: Natural = 10000,
        dropout: Momentum = 0.5,
        reverse: bool = True,
    ):
        super().__init__()
        if stage != -1 and not 1 <= stage <= len(depths):
            raise ValueError(
                f"stage={stage} must be a stage of a transformer (mit.MiT: 1 to 4, vit.ViT: 1), or "
                "-1 for the features of any decoder"
            )
        on_decoder, self.twice = stage == -1, look == "twice"
        if features == "backbone" and not self.twice:
            raise ValueError("features=backbone needs look: twice")
        self.decoded = on_decoder or (self.twice and features == "decoder")
        channels = in_channels if self.decoded else map_channels[0 if self.twice else stage - 1]
        depth = blocks if on_decoder else depths[stage - 1]
        allowed = "none or mask" if on_decoder else "none, bias, nats or tvt"
        if variant not in allowed:
            raise ValueError(f"on stage {stage} variant must be {allowed}, not {variant}")
        if variant == "mask" and not classifier.takes_masks:
            raise ValueError(
                "variant=mask opens the masks of model.classifier: {name: queries.Queries}"
            )
        if self.twice and (on_decoder or estimator != "probe"):
            raise ValueError(
                "look=twice needs estimator: probe, and a stage whose blocks it guides"
            )
        if blocks > depth:
            raise ValueError(f"blocks={blocks} must be 1 to {depth}")
        if on_decoder and semantic:
            raise ValueError("semantic needs the head of a stage, which stage=-1 has not")
        self.variant, self.stage, self.cells, self.kappa = variant, stage, [cell, *cells], kappa
        self.queries, self.order, self.favour = queries, order, favour
        self.shuffle, self.semantic, self.coordinates = shuffle, semantic, coordinates
        self.reduction = 1 if on_decoder or not reductions else reductions[stage - 1]
        self.first, self.last = depth - blocks, depth - 1
        self.rounds = rounds if regions == "adaptive" else 0
        self.strength, self.opened, self.detach = strength, opened, detach
        self.ramp, self.reverse = ramp, reverse
        self.discriminator = None if self.twice else discriminator(channels, dropout)
        self.probe = discriminator(channels, dropout) if estimator == "probe" else None
        alone = on_decoder or self.twice
        self.head = None if alone else nn.Conv2d(channels, num_classes, 1)
        self.needs = ()
        if self.discriminator:
            self.needs += (("discriminator", "{name: tmt.RegionAdversarial, weight: 0.1}"),)
        if self.probe:
            self.needs += (("probe", "{name: tmt.RegionProbe}"),)
        if self.head:
            entropy = "{name: cross_entropy.CrossEntropy, head: region, weight: 0.4}"
            self.needs += (("region", entropy),)

    def bias(self, output, step):
        """The function that a transformer calls before each of its blocks; the first guided one
        fills `output.regions`."""

        def before(stage, block, x, keys):
            if stage != self.stage or not self.first <= block <= self.last:
                return None
            if block == self.first:
                if first := output.first:
                    seen = first.features if self.decoded else first.maps[0]
                    output.regions = self.find(seen, step, first.logits)
                else:
                    output.regions = self.find(x, step)
                output.regions.tokens, output.regions.keys = x.shape[2:], keys
            guided = self.variant in ("bias", "nats") or (
                self.variant == "tvt" and block == self.last
            )
            return self.guide(output.regions) if guided and self.strength else None

        return None if self.stage == -1 else before

    def forward(self, view, maps, output, step):
        if self.stage == -1:
            regions = output.regions = self.find(output.features, step)
            if self.variant == "mask" and self.opened:
                found = weakref.ref(regions)  # a cycle would keep the maps of many steps
                regions.opens = lambda logits: self.opening(found(), logits)

    def transferability(self, means):
        """tau (B, R, C) without dropout, so that it does not depend on chance."""
        rows = means.permute(0, 2, 3, 1)
        rows = rows.detach() if self.detach or self.probe else rows
        for layer in self.probe or self.discriminator:
            rows = rows if isinstance(layer, nn.Dropout) else layer(rows)
        return doubt(rows[..., 0])

    def grouped(self, maps, logits):
        """What pixels are compared by: the map (B, D, h, w), or its unit features and more."""
        if not (self.semantic or self.coordinates):
            return maps
        parts = [F.normalize(maps.detach(), dim=1, eps=EPSILON)]
        if self.semantic:
            parts.append(self.semantic * logits.detach().softmax(1))
        if self.coordinates:
            axes = [torch.linspace(-1, 1, n, device=maps.device) for n in maps.shape[2:]]
            places = torch.stack(torch.meshgrid(*axes, indexing="ij")).to(maps.dtype)
            parts.append(self.coordinates * places.expand(len(maps), -1, -1, -1))
        return torch.cat(parts, 1)

    def find(self, maps, step, logits=None):
        """The map that is grouped, (B, D, h, w), and class scores (B, K, h, w) of a first look ->
        Regions for losses, pictures and attention."""
        with torch.autocast(maps.device.type, enabled=False):
            maps, found, dense, unsure = precise(maps), [], 0, 0
            logits = self.head(maps) if self.head else logits
            if self.twice:
                logits = resize_logits(precise(logits), maps.shape[2:])
            if logits is not None:
                entropy = uncertainty(logits.detach())[:, None]
            compared = self.grouped(maps, logits)
            for cell in self.cells:
                assignment, means = group(compared, cell, self.kappa, self.rounds)
                if compared is not maps:
                    means = region_means(assignment, to_cells(maps, cell))
                tau = self.transferability(means)
                dense = dense + spread(assignment, tau, cell, maps.shape[-2:]) / len(self.cells)
                if self.twice:
                    mean = region_means(assignment, to_cells(entropy, cell))[:, 0]
                    unsure = unsure + spread(assignment, mean, cell, maps.shape[-2:])
                found.append((assignment, means.flatten(2).mT))  # (B, R C, D)
            dense = dense.detach() if self.detach else dense
            rows = torch.cat([rows for _, rows in found], 1)
            regions = Regions(found[0][0], None, dense)
            if self.discriminator:
                factor = reversal(step, self.ramp)
                turned = Reversal.apply(rows, factor) if self.reverse else rows.detach()
                regions.domain = self.discriminator(turned)[..., 0]
            if self.probe:
                regions.probe = self.probe(rows.detach())[..., 0]
            if self.head:
                regions.logits = logits
            if logits is not None:
                self.prioritise(regions, unsure / len(self.cells) if self.twice else entropy[:, 0])
            return regions

    def prioritise(self, regions, found):
        """Fill in uncertainty (B, h, w), which was found, and priority."""
        wanted = regions.transferability
        wanted = wanted if self.favour == "high" else 1 - wanted
        regions.uncertainty, regions.priority = found, wanted * found
        if self.order == "rank":
            regions.priority = (ranks(wanted) * ranks(found)).sqrt()
        if self.shuffle:
            flat = regions.priority.flatten(1)
            places = torch.arange(flat.shape[1], device=flat.device) * PRIME % flat.shape[1]
            regions.priority = flat[:, places].view_as(regions.priority)

    def guide(self, regions):
        """Regions -> Guide."""
        values = regions.transferability if self.variant == "tvt" else regions.priority
        if self.twice:
            values = F.adaptive_avg_pool2d(values[:, None], regions.tokens)[:, 0]
        # A key is made of reduction x reduction tokens; what is left over at the end enters none.
        small = F.avg_pool2d(values[:, None], self.reduction).flatten(2)  # (B, 1, M)
        if self.variant == "tvt":
            return Guide(values=small[..., None])
        if self.variant == "nats":
            bias = self.strength * (small - small.mean(2, keepdim=True))[:, :, None]
            own = values.flatten(1)[:, None, :, None]  # (B, 1, N, 1)
            return Guide(bias=bias * own if self.queries == "own" else bias)
        bias = self.strength * torch.log(EPSILON + 0.5 + 0.5 * small)
        # Relative to the mean factor, so that an equal priority is 0 for tokens without one too
        # (the class token).
        return Guide(
            bias=(bias - bias.logsumexp(2, keepdim=True) + math.log(bias.shape[2]))[:, :, None]
        )

    def opening(self, regions, logits):
        """Which pixels all queries may see: logits (B, K, h, w) of the layer before -> (B, h, w)
        bool. Pixels that tie are opened together, or not at all."""
        found = uncertainty(logits.detach().to(regions.transferability.dtype))
        self.prioritise(regions, found)
        return ranks(regions.priority) > 1 - self.opened

    @torch.no_grad()
    def draw(self, log, number, network, image):
        """The borders of the regions of one image (1, 3, H, W), transferability, uncertainty,
        priority, and on a transformer the attention that the tokens get in the last guided block
        without and with them."""
        mode, inputs = network.training, []
        if self.stage > 0:
            attention = network.backbone.stage_blocks(self.stage)[self.last].attn
            hook = attention.register_forward_pre_hook(lambda module, given: inputs.append(given))
        regions = network.eval().segment(image, step=number).regions
        network.train(mode)
        shown = {"transferability": regions.transferability}
        if regions.priority is not None:
            shown |= {"uncertainty": regions.uncertainty, "priority": regions.priority}
        if inputs:
            hook.remove()
            x, guide = inputs[0]
            q, k, _ = attention.project(x)
            rows, columns = regions.keys
            before, after = (
                received(q.float(), k.float(), given)[:, -rows * columns :].view(1, rows, columns)
                for given in (None, guide)
            )
            scale = before.quantile(0.9)  # of a ViT's attention a few keys get the most
            shown["attention before"] = (before / scale).clamp_max(1)
            shown["attention after"] = (after / scale).clamp_max(1)
        size = image.shape[-2:]
        shown = {name: resize_logits(v[:, None].float(), size)[0, 0] for name, v in shown.items()}
        labels = labels_of(regions.assignment, self.cells[0], regions.transferability.shape[-2:])
        labels = F.interpolate(labels[None].double(), size)[0, 0]
        border = torch.zeros(size, dtype=torch.bool, device=image.device)
        border[:-1] |= labels.diff(dim=0) != 0
        border[:, :-1] |= labels.diff(dim=1) != 0
        picture = side_by_side(torch.where(border, 1.0, image[0].float()), (), **shown)
        log.picture("regions", picture, number)
