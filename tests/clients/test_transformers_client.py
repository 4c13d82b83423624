"""What we write as huggingface, in the hands of transformers and CTranslate2."""

from pathlib import Path

import pytest
import torch

from regpt2.commands.convert import ConvertOptions, convert
from regpt2.data.tokenizer import find_vocab, load_tokenizer
from regpt2.model.files.contract import Vocabulary
from regpt2.model.files.load import load_model
from regpt2.model.gpt import GPT, GPTConfig
from regpt2.model.weights import native
from regpt2.sampling.generate import generate

pytestmark = pytest.mark.clients
CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with GPT-2's tokenizer, its logits far enough apart that a greedy choice is the same everywhere."""
    tokenizer, model, folder = load_tokenizer("gpt2"), GPT(CONFIG), tmp_path_factory.mktemp("model")
    with torch.no_grad():
        model.ln_f.weight *= 20
    vocabulary = Vocabulary("gpt2", tokenizer.fingerprint, tokenizer.eot, find_vocab().read_bytes())
    native.write(model, folder, vocabulary)
    return folder


def greedy(folder: Path, prompt: str, n: int) -> list[int]:
    ids = load_tokenizer("gpt2").encode(prompt)
    return generate(load_model(folder).model, torch.tensor([ids]), n, temperature=0.0).tolist()[0][len(ids) :]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_convert_asks_transformers_and_its_pipeline_takes_the_folder(
    tmp_path: Path, model_folder: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    convert(ConvertOptions(str(model_folder), tmp_path / "hf", to="huggingface", dtype=dtype))
    assert "transformers computes the same log probabilities" in capsys.readouterr().out
    if dtype == "fp32":
        pipeline = transformers.pipeline("text-generation", str(tmp_path / "hf"))
        (answer,) = pipeline("Hello, I'm", max_new_tokens=8, do_sample=False, return_full_text=False)
        assert answer["generated_text"] == load_tokenizer("gpt2").decode(greedy(model_folder, "Hello, I'm", 8))


@pytest.mark.filterwarnings("ignore")
def test_ctranslate2_converts_our_folder_and_continues_alike(tmp_path: Path, model_folder: Path) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    convert(ConvertOptions(str(model_folder), tmp_path / "hf", to="huggingface"))
    ctranslate2.converters.TransformersConverter(str(tmp_path / "hf")).convert(str(tmp_path / "ct2"))
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), inter_threads=1, intra_threads=1)
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode("Hello, I'm"))
    (result,) = generator.generate_batch([tokens], max_length=8, include_prompt_in_result=False)
    assert result.sequences_ids[0] == greedy(model_folder, "Hello, I'm", 8)
