"""The network: backbone -> decoder -> classifier, over all views of a training step in one call.

One forward of the DDP module and one backward per micro-batch keep DDP simple: every trainable parameter of a run lives
in the Segmentor, and views (source, target, strongly augmented target ...) are entries of one dict.
"""

import contextlib
import inspect
from typing import NamedTuple

import torch
from torch import nn

from engine import distributed
from engine.errors import UserError
from engine.statistics import unit
from models.blocks import conv_bn_relu, still


class View(NamedTuple):
    """What the network sees.

    image (B, 3, H, W) in [0, 1]; the domain whose stem it takes; for `model.text_attention` text rows (K, D) and dense
    features (B, D, h, w) of a frozen image tower, without which the network's own are taken.
    """

    image: torch.Tensor
    domain: str = "target"
    text: torch.Tensor | None = None
    dense: torch.Tensor | None = None


class Output(NamedTuple):
    """logits (B, K, h, w); features (B, D, h, w), which entered the classifier; aux: further named tensors:
    "embedding" (B, D', h, w) in the joint space of text and images, of any length, and "prototypes" (B, K, D'), the
    text rows as the image changes them, "auxiliary" (B, K, h', w'), logits of the auxiliary head, and "query0" ...,
    those of the layers of a query decoder, all in training alone; what models/region.py finds."""

    logits: torch.Tensor
    features: torch.Tensor
    aux: dict


class Projector(nn.Module):
    """Features (B, D, h, w) -> (B, D', h, w) in a joint space, where only directions count; dropped at test.

    Args:
        in_channels, channels, width: D, D', and the channels between two 1x1 convolutions.
    """

    def __init__(self, in_channels, channels, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, width, 1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, channels, 1),
        )

    def forward(self, features):
        return self.layers(features)


class Auxiliary(nn.Module):
    """FCN head on one map of the backbone, for training alone: (B, C, h, w) -> logits (B, K, h, w).

    Args:
        in_channels, num_classes: C, K.
        stage: number of the map, from 1.
        width, convs: channels and number of the 3x3 convolutions before the 1x1 classifier.
        dropout: of whole feature channels, before the classifier.
    """

    def __init__(self, in_channels, num_classes, stage, width, convs, dropout):
        super().__init__()
        self.stage = stage
        channels = [in_channels, *[width] * convs]
        self.convs = nn.Sequential(*(conv_bn_relu(channels[i], width) for i in range(convs)))
        self.dropout, self.classifier = (
            nn.Dropout2d(dropout),
            nn.Conv2d(channels[-1], num_classes, 1),
        )

    def forward(self, features):
        return self.classifier(self.dropout(self.convs(features)))


class Segmentor(nn.Module):
    """Backbone, decoder and classifier; regions that guide attention; for training alone a projector, an
    attention of text and an auxiliary head.

    Args:
        frozen_bn: names of parts ("backbone", "decoder", "projector") whose batch norm keeps its running statistics and
            its affine parameters: the safe choice for small batches and for pretrained weights.
        bn_views: names of the views that move the running statistics of batch norm; none named: all do. Every view is
            normalised by its own batch all the same.
    """

    def __init__(
        self,
        backbone,
        decoder,
        classifier,
        frozen_bn=(),
        bn_views=(),
        projector=None,
        text_attention=None,
        region=None,
        auxiliary=None,
    ):
        super().__init__()
        self.backbone, self.decoder, self.classifier = backbone, decoder, classifier
        self.classifier_asks = {"opens", "aux"} & {
            *inspect.signature(classifier.forward).parameters
        }
        self.projector, self.text_attention = projector, text_attention
        self.region, self.auxiliary = region, auxiliary
        unknown = set(frozen_bn) - {"backbone", "decoder", "projector"}
        if unknown:
            unknown = ", ".join(sorted(unknown))
            raise ValueError(
                f"model.frozen_bn may name backbone, decoder and projector, not {unknown}"
            )
        self.frozen_bn, self.bn_views = list(frozen_bn), list(bn_views)
        for norm in self._frozen_norms():
            norm.requires_grad_(False)

    def _frozen_norms(self):
        for part in filter(None, (getattr(self, name) for name in self.frozen_bn)):
            yield from (m for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))

    def train(self, mode=True):
        super().train(mode)
        for norm in self._frozen_norms():
            norm.eval()
        return self

    def segment(self, image, domain="target", embed=False, step=0):
        """One view: image (B, 3, H, W) -> Output. Logits stay at feature size; losses and evaluation resize them.

        `embed` runs the projector too, if there is one; `step` is for parts that ramp. The auxiliary head runs in
        training mode.
        """
        aux = {}
        guide = self.region.watch(step, aux) if self.region and self.region.stage > 0 else None
        maps = self.backbone(image, domain, guide)
        features = self.decoder(maps)
        aux |= {"embedding": self.projector(features)} if embed and self.projector else {}
        if self.auxiliary and self.training:
            aux["auxiliary"] = self.auxiliary(maps[self.auxiliary.stage - 1])
        opens = None
        if self.region and self.region.stage < 0:
            aux |= self.region.look(features, step)
            opens = self.region.opening(aux)
        given = {"opens": opens, "aux": aux if self.training else None}
        logits = self.classifier(features, **{name: given[name] for name in self.classifier_asks})
        return Output(logits, features, aux)

    def forward(self, views, step=0):
        """All views of a training step: {name: View} -> {name: Output}. `step` is for parts that ramp."""
        if self.bn_views and not {*self.bn_views} & {*views}:
            raise UserError(
                f"model.bn_views names {', '.join(self.bn_views)}; the views are {', '.join(views)}"
            )
        per_domain = getattr(self.backbone, "source", None) is not None
        domains = {view.domain for view in views.values()}
        if per_domain and distributed.world_size() > 1 and domains != {"source", "target"}:
            raise UserError(
                "stem: per_domain on several processes needs views of both domains in every step"
            )
        outputs = {}
        for name, view in views.items():
            with (
                contextlib.nullcontext()
                if not self.bn_views or name in self.bn_views
                else still(self)
            ):
                output = outputs[name] = self.segment(view.image, view.domain, True, step)
            if self.text_attention and view.text is not None:
                dense = unit(output.aux["embedding"].detach()) if view.dense is None else view.dense
                output.aux["prototypes"] = self.text_attention(view.text, dense)
        return outputs
