"""The network: backbone -> decoder -> classifier, over all views of a training step in one call.

One forward of the DDP module and one backward per micro-batch keep DDP simple: every trainable parameter of a run lives
in the Segmentor, and views (source, target, strongly augmented target ...) are entries of one dict.
"""

import contextlib
from typing import NamedTuple

import torch
from torch import nn

from engine import distributed
from engine.errors import UserError


class View(NamedTuple):
    """What the network sees: image (B, 3, H, W) in [0, 1], and the domain whose stem and statistics it takes."""

    image: torch.Tensor
    domain: str = "target"


class Output(NamedTuple):
    """logits (B, K, h, w); features (B, D, h, w), which entered the classifier; aux: further named tensors."""

    logits: torch.Tensor
    features: torch.Tensor
    aux: dict


class Segmentor(nn.Module):
    """Backbone, decoder and classifier.

    Args:
        frozen_bn: names of parts ("backbone", "decoder") whose batch norm keeps its running statistics and its affine
            parameters: the safe choice for small batches and for pretrained weights.
        bn_views: names of the views that move the running statistics of batch norm; none named: all do. Every view is
            normalised by its own batch all the same.
    """

    def __init__(self, backbone, decoder, classifier, frozen_bn=(), bn_views=()):
        super().__init__()
        self.backbone, self.decoder, self.classifier = backbone, decoder, classifier
        unknown = set(frozen_bn) - {"backbone", "decoder"}
        if unknown:
            raise ValueError(f"model.frozen_bn may name backbone and decoder, not {', '.join(sorted(unknown))}")
        self.frozen_bn, self.bn_views = list(frozen_bn), list(bn_views)
        for norm in self._frozen_norms():
            norm.requires_grad_(False)

    def _frozen_norms(self):
        for part in self.frozen_bn:
            yield from (m for m in getattr(self, part).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))

    def train(self, mode=True):
        super().train(mode)
        for norm in self._frozen_norms():
            norm.eval()
        return self

    def segment(self, image, domain="target"):
        """One view: image (B, 3, H, W) -> Output. Logits stay at feature size; losses and evaluation resize them."""
        features = self.decoder(self.backbone(image, domain))
        return Output(self.classifier(features), features, {})

    def forward(self, views, step=0):
        """All views of a training step: {name: View} -> {name: Output}. `step` is for parts that ramp."""
        if self.bn_views and not {*self.bn_views} & {*views}:
            raise UserError(f"model.bn_views names {', '.join(self.bn_views)}; the views are {', '.join(views)}")
        per_domain = getattr(self.backbone, "source", None) is not None
        domains = {view.domain for view in views.values()}
        if per_domain and distributed.world_size() > 1 and domains != {"source", "target"}:
            raise UserError("stem: per_domain on several processes needs views of both domains in every step")
        outputs = {}
        for name, view in views.items():
            with self.statistics(moving=not self.bn_views or name in self.bn_views):
                outputs[name] = self.segment(view.image, view.domain)
        return outputs

    @contextlib.contextmanager
    def statistics(self, moving):
        """Within it batch norm moves its running statistics or not."""
        norms = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and not moving]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        yield
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
