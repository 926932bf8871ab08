"""Losses. A term is a module whose forward asks by name for what it needs:

    outputs     {view: Output}
    labels      {view: (B, H, W) ids, 255 = ignore}
    weights     {view: (B, H, W)}, for the views that have any
    valid       {view: 0-dim tensor}: labelled pixels of the step, averaged over processes and micro-batches; of pseudo
                labels, which exist only then, those of the micro-batch
    samples     {view: (B) int64}: number of each sample in the stream, the seed of whatever is drawn at random
    prototypes  {name: member}: the named members, and "classifier"
    step        int

and returns a scalar of at least float32. **The loss of a step is the mean over processes and micro-batches of what a
term returns.** A sum over pixels divided by `valid` is then normalised by the global number of labelled pixels,
whatever the number of processes and of micro-batches. A term that couples the pixels of a batch (OCCL) uses sums over
all processes, and is averaged over micro-batches.

Terms never log and never wait for the GPU (`.item()`, boolean indexing); a batch without labels gives a zero that keeps
the graph. A labeler (train_uda.py) lives in the file of its paper: `before(batch, teacher, step)` returns the target's
labels and weights.
"""
