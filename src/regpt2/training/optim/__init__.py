"""SHELF: one file per optimizer; the file name is the name in a recipe.

An entry has `build` (see training/optimizer.py), IGNORES: the fields of `OptimConfig` that change nothing for it, and
MEANS: how many running means it keeps for each weight of a block's matrices, and for each other weight. Where an update
multiplies matrices it has `matmul_flops` too, for the plan.
"""
