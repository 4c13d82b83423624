"""The command `regpt2 reshard`. In: a data folder, ours or another project's; out: a new one in another format.

regpt2 reshard data/fineweb fineweb_megatron --to megatron
regpt2 reshard nanoGPT/data/openwebtext data/openwebtext --to native
regpt2 reshard their_megatron data/mine --to native --val-tokens 1000000
"""

from regpt2.base.options import parse
from regpt2.data.tokens.reshard import ReshardOptions, reshard


def main(argv: list[str]) -> int:
    """Write the folder, read it back and compare."""
    reshard(parse(ReshardOptions, argv, "regpt2 reshard"))
    return 0
