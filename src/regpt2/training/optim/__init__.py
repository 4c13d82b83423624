"""SHELF: one file per optimizer; the file name is the name in a recipe. Own options are in `config.options`."""

from regpt2.base.shelves import Contract

CONTRACT = Contract(
    required={"build": "(named_parameters, config, world, compiled) -> torch.optim.Optimizer"},
    optional={
        "IGNORES": tuple,  # the fields of `OptimConfig` that change nothing for it
        "MEANS": tuple,  # how many running means it keeps for each weight of a block's matrices, and for each other one
        "matmul_flops": "(model, config, ranks) -> float",  # of an update, for the plan
    },
)
