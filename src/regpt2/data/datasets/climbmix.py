"""ClimbMix, nanochat's text: NVIDIA's mixture of the web in shuffled shards in, its documents out, a row each.

The last of the 6,543 shards is the validation split, as in nanochat (karpathy/nanochat, nanochat/dataset.py).
"""

from collections.abc import Iterator
from dataclasses import replace

from regpt2.data.sources import records
from regpt2.data.sources.plan import Document, Part, Plan, Skipped, Source
from regpt2.data.sources.published import Publication, plan_of

DESCRIPTION = (
    "ClimbMix, nanochat's text (NVIDIA's, CC BY-NC 4.0): the first 170 shards, 17 GB to download, and the validation "
    "shard; --first N takes N, at most 6542"
)

CLIMBMIX = Publication(
    name="climbmix",
    repo="karpathy/climbmix-400b-shuffle",
    revision="915333b4f8b8684f39aeaafea600fea6f43fb703",  # as others pin it; not compared with the hub yet
    configs={"default": "shard_*.parquet"},
    n_tokens={"default": 400_000_000_000},  # about, by its name: 61M a shard
    val_file="shard_06542.parquet",
    first=170,  # nanochat's runs/speedrun.sh
)


def plan(source: Source) -> Plan:
    return plan_of(CLIMBMIX, source)


def documents(part: Part, skipped: Skipped) -> Iterator[Document]:
    """The rows; those of the last shard are the validation split."""
    split = "val" if part.slices[0].file.name == CLIMBMIX.val_file else "train"
    for document in records.documents(part, skipped):
        yield replace(document, split=split)
