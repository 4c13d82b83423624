"""Any data set of text on the Hugging Face hub: its id in, its documents out, one for each record.

Only the split that is asked for is taken, and validation is held out of it by --val-fraction, also where the data
set has a validation split of its own.
"""

from regpt2.base.errors import UsageError
from regpt2.data.sources import hub, hub_splits, records
from regpt2.data.sources.plan import Plan, Source
from regpt2.data.sources.published import described, whole_files

DESCRIPTION = "any data set on the Hugging Face hub: --repo OWNER/NAME, and --config, --split, --field, --revision"

documents = records.documents


def plan(source: Source) -> Plan:
    if not source.repo:
        raise UsageError(
            "hub needs --repo OWNER/NAME, the data set's id on the hub, as in --repo roneneldan/TinyStories."
        )
    if source.input is not None:
        raise UsageError(f"hub takes no --input; for the local copy {source.input}, choose text_files.")
    split = source.split or "train"
    commit = hub.resolve(source.repo, source.revision or "main")
    commit, found = hub_splits.files_of(source.repo, commit, source.config, split)
    return Plan(
        parts=whole_files(found[: source.first], source.field),
        source=described(source.repo, source.config, split, first=source.first),
        revision=commit,
    )
