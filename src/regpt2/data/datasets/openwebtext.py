"""OpenWebText, nanoGPT's data set: pages that Reddit linked to in, its 8,013,769 documents out, a row each.

nanoGPT holds out 0.05 % of the documents at random (seed 2357); here they fall to validation by hash, so give
--val-fraction 0.0005 for as many. The documents held out are others, the text is the same.
"""

from regpt2.data.sources import records
from regpt2.data.sources.plan import Plan, Source
from regpt2.data.sources.published import Publication, plan_of

DESCRIPTION = "OpenWebText, nanoGPT's data set: 24 GB to download, 9.0B tokens; --val-fraction 0.0005 is nanoGPT's"

OPENWEBTEXT = Publication(
    name="openwebtext",
    repo="Skylion007/openwebtext",
    revision="79d93d786212f7344586290adb811d4ae6a1762c",  # 80 files
    configs={"plain_text": "plain_text/*.parquet"},
    n_tokens={"plain_text": 9_040_017_095},  # nanoGPT's train.bin and val.bin, data/openwebtext/readme.md
)

documents = records.documents


def plan(source: Source) -> Plan:
    return plan_of(OPENWEBTEXT, source)
