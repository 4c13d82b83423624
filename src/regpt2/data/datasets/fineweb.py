"""FineWeb, the text of llm.c's and modded-nanogpt's runs: pages of the web in, its documents out, a row each."""

from regpt2.data.sources import records
from regpt2.data.sources.plan import Plan, Source
from regpt2.data.sources.published import CRAWLS, Publication, plan_of

DESCRIPTION = (
    "FineWeb, the text of llm.c's runs (ODC-By 1.0); --config sample-10BT (default, 31 GB to download), sample-100BT, "
    "sample-350BT or default (everything)"
)

FINEWEB = Publication(
    name="fineweb",
    repo="HuggingFaceFW/fineweb",
    revision="9bb295ddab0e05d785b879661af7260fed5140fc",  # tag v1.4.0
    configs=CRAWLS,
    n_tokens={
        "sample-10BT": 10_400_000_000,  # at most: the 104 shards of kjj0/fineweb10B-gpt2
        "sample-100BT": 103_100_000_000,  # likewise, kjj0/fineweb100B-gpt2
        "sample-350BT": 350_000_000_000,  # about, says the card
    },
    val_tokens=100_000_000,  # llm.c's first shard
)

documents = records.documents


def plan(source: Source) -> Plan:
    return plan_of(FINEWEB, source)
