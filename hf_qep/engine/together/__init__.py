"""Several processes at one job.

`launch` finds those that were started together, `processes` is what they do with each other, `shares` says who has
which rows and linears and adds up their moments, and `streams` makes one file of their activations.
"""
