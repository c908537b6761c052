"""How it sounds, as a figure for any data set: distances of sets of clips in log-mel frames, and more about them.

`hearing` gathers the running figures of clips, `clips` chooses excerpts and makes noise to compare with, `streams`
generates, `longer` looks at streams beyond the clips' end, `measure` does all of this for a run, and `choose` finds the
temperature and top-p of sampling that sound most like recordings.
"""
