"""Networks. A new part is one new file; the shared tests in tests/test_parts.py find it by themselves.

    Backbone.forward(image (B, 3, H, W) in [0, 1], domain="target", bias=None) -> [maps, fine to coarse]
        .channels  .strides     one number per map. It normalises the image itself.
        bias(stage, block, x, keys): asked before each block of a transformer for a bias of its attention (mit, vit)
    Decoder(in_channels, strides, ...).forward(maps) -> features (B, D, h, w)
        .channels  D
    Classifier(in_channels, num_classes, ...).forward(features) -> logits (B, K, h, w)
        .means() -> (K, D)      the class vectors that the logits compare features with; where they are of an embedding
                                of the classifier's own, .space = "embedding" says so
        .assign(scores (B, K, M, h, w), labels) -> (B, h, w)       of several components per class, whose scores it
                                leaves in `aux` as "cosines" or "densities": which of the K M a pixel belongs to
        .update(batches)        where it follows the features as a prototype does, below
        forward may ask by name for `aux`, a dict for further tensors in training and else None, and for `opens` of
        models/region.py

Prototypes (`models/prototypes`) are interchangeable; state in buffers of at least float32, so a checkpoint holds it:

    score(features (B, D, h, w)) -> (B, K, h, w)    similarity or log-likelihood
    means() -> (K, D)       seen  (K) bool
    update(batches)         after an optimiser step, no grad, one all-reduce; a frozen member does nothing
    fit(batches)            from a function that returns a fresh iterable: several passes, offline
    pair_means(features, labels (B, h, w)) -> (B, K, D), (B, K) bool        optional, with the graph: the class vectors
                            of each image and which it has; without it they are means() and seen for all images alike

`update` and `fit` may ask by name for `prototypes` {name: member}, `update` also for `step` and `iters`.
`batches` is an iterable of (features (B, D, h, w), labels (B, h, w), weights (B, h, w) or None): the micro-batches of
one step in `update`, so that accumulating gradients changes nothing, or the whole data set in `fit`.
"""
