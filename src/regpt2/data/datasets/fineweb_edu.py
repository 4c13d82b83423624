"""FineWeb-Edu, the text of the lecture's run: educational pages of the web in, its documents out, a row each."""

from regpt2.data.sources import records
from regpt2.data.sources.plan import Plan, Source
from regpt2.data.sources.published import CRAWLS, Publication, plan_of

DESCRIPTION = (
    "FineWeb-Edu, the lecture's text (ODC-By 1.0); --config sample-10BT (default, 28.5 GB to download), sample-100BT, "
    "sample-350BT or default (everything)"
)

FINEWEB_EDU = Publication(
    name="fineweb_edu",
    repo="HuggingFaceFW/fineweb-edu",
    revision="87f09149ef4734204d70ed1d046ddc9ca3f2b8f9",  # sample-10BT: 14 files, 28,518,193,415 bytes, 9,672,101 rows
    configs=CRAWLS,
    n_tokens={
        "sample-10BT": 9_953_989_344,  # of kjj0/finewebedu10B-gpt2: 100M to validate, 98 x 100M and 53,989,344 to train
        "sample-100BT": 100_000_000_000,  # about, says the card
        "sample-350BT": 350_000_000_000,
    },
    val_tokens=100_000_000,  # the lecture's first shard
)

documents = records.documents


def plan(source: Source) -> Plan:
    return plan_of(FINEWEB_EDU, source)
