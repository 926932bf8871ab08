"""Data sets. A new one is one new file: a subclass of `base.SegmentationData` with

    CLASSES, PALETTE    names and colours of the K classes, in the order of the ids that the network
                        learns
    ID_MAP              {id on disk: class id, 255 = ignore}; None when the file holds class ids
                        already
    SCORED              names of the classes that occur, where some do not: means are over them;
                        empty: all
    KNOWN_BAD           {stem: reason}: files of the official release that are left out and reported
    pairs()             [(image path, label path or None)]
    read_image(path)    (H, W, 3) uint8 RGB; files are read, and folders searched, by
                        datasets/reading.py
    read_label(path)    (H, W) ids as they are on disk; the default reads grey and palette PNGs
    is_mapped(path, ids)    whether a file was converted to class ids before, so that ID_MAP does
                            not apply

Everything else is inherited: checks, id mapping, another label space, augmentation. A sample is a
dict

    image (3, H, W) uint8 RGB    label (H, W) uint8, 255 = ignore
    index in the data set        sample: its stream number
    extra {name: (H, W) uint8}: maps that a run has stored, such as pseudo labels

A set without files, such as toy.Toy, fills `samples`, `extra`, `stylised` and `left_out` itself and
overrides `load`, `load_label`, `stem` and `label_key`. Several sets are used as one by
several.Several.
"""
