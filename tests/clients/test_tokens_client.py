"""Token folders that we write, in the hands of Megatron's and datatrove's own readers; theirs, in ours."""

from pathlib import Path

import numpy as np
import pytest
import torch

from regpt2.data.tokenizer import load_tokenizer
from regpt2.data.tokens.manifest import Manifest, Split
from regpt2.data.tokens.reshard import ReshardOptions, reshard
from regpt2.data.tokens.shards import open_tokens, write_shard

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]  # theirs
EOT = 50256
RNG = np.random.default_rng(3)
DOCUMENTS = [RNG.integers(0, EOT, RNG.integers(1, 60)).tolist() for _ in range(300)]


@pytest.fixture
def native(tmp_path: Path) -> Path:
    """A prepared folder of the documents, the same ones for training and validation."""
    ids = np.array([token for doc in DOCUMENTS for token in (EOT, *doc)], dtype=np.uint16)
    splits = {}
    for split in ("train", "val"):
        shard = write_shard(tmp_path / "native" / f"made_{split}_000000.bin", len(ids), [ids])
        splits[split] = Split(len(DOCUMENTS), len(ids), 1, (shard,))
    fingerprint = load_tokenizer("gpt2").fingerprint
    Manifest("made", "random", "1", "gpt2", fingerprint, 50257, {}, splits, {}).write(tmp_path / "native")
    return tmp_path / "native"


def test_megatron_reads_our_documents(native: Path, tmp_path: Path) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    reshard(ReshardOptions(native, tmp_path / "out", "megatron"))
    dataset = indexed_dataset.IndexedDataset(str(tmp_path / "out" / "made_train"))
    assert [document.tolist() for document in dataset] == [[*doc, EOT] for doc in DOCUMENTS]
    assert dataset.document_indices.tolist() == list(range(len(DOCUMENTS) + 1))


@pytest.mark.parametrize("kind", [np.uint16, np.int32])
def test_we_read_what_megatron_writes(tmp_path: Path, kind: type) -> None:
    indexed_dataset = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "train_text_document.bin"), dtype=kind)
    for doc in DOCUMENTS:
        builder.add_document(torch.tensor([*doc, EOT]), [len(doc), 1])  # two sequences
    builder.finalize(str(tmp_path / "train_text_document.idx"))
    with open_tokens(tmp_path, "train") as stream:
        assert stream.read(0, stream.n_tokens).tolist() == [token for doc in DOCUMENTS for token in (*doc, EOT)]


def test_datatrove_reads_our_windows_and_where_documents_end(native: Path, tmp_path: Path) -> None:
    dataset_module = pytest.importorskip("datatrove.utils.dataset")
    reshard(ReshardOptions(native, tmp_path / "out", "datatrove"))
    dataset = dataset_module.DatatroveFolderDataset(
        str(tmp_path / "out"), seq_len=31, filename_pattern="*train.ds", return_positions=True
    )
    ids = np.array([token for doc in DOCUMENTS for token in (*doc, EOT)])
    places = np.concatenate([np.arange(len(doc) + 1) for doc in DOCUMENTS])
    assert len(dataset) == len(ids) // 32
    for n in range(len(dataset)):
        window = slice(32 * n, 32 * (n + 1))
        assert dataset[n]["input_ids"].tolist() == ids[window].tolist()
        begins = np.flatnonzero(places[window] == 0)  # a document that goes on from the window before counts anew
        expected = places[window].copy()
        first = begins[0] if len(begins) else 32
        expected[:first] = np.arange(first)
        assert dataset[n]["positions"].tolist() == expected.tolist()


@pytest.mark.parametrize("token_size", [2, 4])
def test_we_read_what_datatrove_writes(tmp_path: Path, token_size: int) -> None:
    tokenizer_module = pytest.importorskip("datatrove.pipeline.tokens.tokenizer")
    file = tokenizer_module.TokenizedFile(
        str(tmp_path), "00000_unshuffled.ds", save_final_metadata=True, token_size=token_size
    )
    for doc in DOCUMENTS:
        file.write([*doc, EOT], None)
    file.close()
    with open_tokens(tmp_path, "train") as stream:
        assert stream.read(0, stream.n_tokens).tolist() == [token for doc in DOCUMENTS for token in (*doc, EOT)]
