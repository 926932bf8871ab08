"""Networks. A new part is one new file; the shared tests of every part find it by themselves.

    backbones/    images to maps, fine to coarse            face: backbones/base.py
    decoders/     Decoder(in_channels, strides, ...).forward(maps) -> features (B, D, h, w);
                  .channels is D
    classifiers/  features to logits                        face: classifiers/base.py
    heads/        beside the classifier, in training alone  face: heads/base.py
    prototypes/   class vectors, interchangeable            face: prototypes/base.py

`segmentor.py` puts them together, `build.py` makes them from a configuration.
"""
