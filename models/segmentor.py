"""The network: backbone -> decoder -> heads -> classifier, over all views of a step in one call.

One forward of the DDP module and one backward per micro-batch keep DDP simple: every trainable
parameter of a run lives in the Segmentor, and views (source, target, strongly augmented target ...)
are entries of one dict.
"""

import torch
from torch import nn

from engine import distributed
from engine.errors import UserError
from engine.step import ByView, Output, View
from models.blocks import joined, run, sizes_named, still
from models.compiled import compiles


class Segmentor(nn.Module):
    """Backbone, decoder, classifier, and by name the heads of `model.heads`.

    Args:
        heads: {name: Head}, in the order in which they run. Each becomes a module of its name.
        frozen_bn: names of parts ("backbone", "decoder", "projector") whose batch norm keeps its
            running statistics and its affine parameters: the safe choice for small batches and for
            pretrained weights.
        bn_views: names of the views that move the running statistics of batch norm; none named: all
            do. Every view is normalised by its own batch all the same.
        frozen: names of parts that are not trained: no gradient, no state of the optimiser,
            evaluation mode.
        cache: models.cache.FeatureCache of a frozen backbone; None computes its maps each time.
        compiled: `model.compile`: how the blocks of the backbone and the decoder are compiled in
            training; evaluation, with pictures of many sizes, is not compiled.
    """

    def __init__(
        self,
        backbone,
        decoder,
        classifier,
        heads=None,
        frozen_bn=(),
        bn_views=(),
        frozen=(),
        cache=None,
        compiled=False,
    ):
        super().__init__()
        self.backbone, self.decoder, self.classifier = backbone, decoder, classifier
        self.frozen_bn, self.bn_views = list(frozen_bn), list(bn_views)
        self.frozen, self.cache, self.compiled = list(frozen), cache, compiled
        self.head_names = list(heads or {})
        for name, head in (heads or {}).items():
            self.add_module(name, head)
        for part in self._frozen():
            part.requires_grad_(False)

    @property
    def heads(self):
        """{name: Head}."""
        return {name: self.get_submodule(name) for name in self.head_names}

    def _frozen(self):
        """Parts that are not trained, and batch norms that are not."""
        norms = [
            module
            for name, part in self.named_children()
            if name in self.frozen_bn
            for module in part.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        return [*norms, *map(self.get_submodule, self.frozen)]

    def train(self, mode=True):
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    @compiles(False)
    def segment(self, image, domain="target", heads=False, step=0):
        """One image batch (B, 3, H, W) -> Output. Logits stay at feature size.

        Args:
            heads: run those heads too that otherwise run in training alone.
            step: for parts that ramp.
            compiled: call compiled blocks, as training does, on images of training's size.
        """
        return self.look(View(image, domain), step, heads)

    def look(self, view, step=0, heads=False, maps=None, first=False):
        """View -> Output, as `segment`; `maps` are those of the backbone, if they are there. The
        first of two looks has no heads."""
        output, every = Output(), () if first else self.heads.values()
        running = [head for head in every if head.at_test or heads or self.training]
        if any(head.twice for head in running):
            with torch.no_grad(), still(self):
                output.first = self.look(view, step, first=True)
        given = {"domain": view.domain} if self.backbone.per_domain else {}
        biases = [bias for head in running if (bias := head.bias(output, step))]  # one at most
        given |= {"bias": biases[0]} if biases else {}
        with sizes_named(view.image):
            maps = maps or (self.cache or self.backbone)(view.image, **given)
            output.features = run(self.decoder, False, maps)
        output.maps = maps if first else ()
        for head in running:
            head(view, maps, output, step)
        output.logits = self.classifier(output.features, output)
        return output

    @compiles(True)
    def forward(self, views, step=0):
        """All views of a training step: {name: View} -> {name: Output}."""
        if self.bn_views and not {*self.bn_views} & {*views}:
            raise UserError(
                f"model.bn_views names {', '.join(self.bn_views)}; the views are {', '.join(views)}"
            )
        if (
            self.backbone.per_domain
            and distributed.world_size() > 1
            and len({view.domain for view in views.values()}) < 2
        ):
            raise UserError(
                "stem: per_domain on several processes needs views of both domains in every step"
            )
        outputs, maps = ByView(), joined(self, views, step)
        for name, view in views.items():
            with still(self, when=name not in (self.bn_views or views)):
                outputs[name] = self.look(view, step, heads=True, maps=maps.get(name))
        return outputs
