"""Losses. A term is a module whose forward asks by name for what it needs:

    outputs     {view: Output}
    labels      {view: (B, H, W) ids, 255 = ignore}
    weights     {view: (B, H, W)}, for the views that have any
    valid       {view: 0-dim tensor}: labelled pixels, averaged over processes; of the source over the micro-batches of
                the step too, of pseudo labels, which exist only then, those of the micro-batch
    samples     {view: (B) int64}: number of each sample in the stream, the seed of whatever is drawn at random
    prototypes  {name: member}: the named members, and "classifier"
    step, iters int: step of the stage, and how many it has
    teacher     Output of the teacher on the target images (train_uda.py)
    batch       {"source", "target"} (train_uda.py); a batch (train_dg.py)
    tower       dense features (B, D, h, w) of the frozen image tower (train_dg.py)

and returns a scalar of at least float32. **The loss of a step is the mean over processes and micro-batches of what a
term returns.** A sum over pixels divided by `valid` is then normalised by the global number of labelled pixels,
whatever the number of processes, and on the source whatever that of micro-batches. A term that couples the pixels of a
batch (OCCL) uses sums over all processes, and is averaged over micro-batches. tests/test_accumulation.py lists the
terms that depend on the number of micro-batches.

Terms never log and never wait for the GPU (`.item()`, boolean indexing); a batch without labels gives a zero that keeps
the graph.

A labeler (train_uda.py, `uda.labelers`) lives in the file of its paper: a module without parameters, whose buffers are
saved in the checkpoint. It has what it needs of

    prepare(preparation)                once, before the first step of a stage (engine/prepare.py)
    before(...) after(...)              labels and weights of a micro-batch, {view: (B, H, W)} each, before or after the
                                        student's forward pass; they add to and replace those of the labeler before it
    label(network, image, prototypes)   labels (B, H, W) of whole images by its rule, to export and to measure them
    update()                            after an optimiser step that was taken

and asks by name for the same things as a term. `uda.source_weights` is one more such module, called with the batch.
"""
