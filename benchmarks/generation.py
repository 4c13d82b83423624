"""The sides of generation: ours, and the peers'. In: a job as JSON; out: seconds and the new ids, turn by turn.

All continue the same prompts, greedily, with the same random weights. In fp32 they must find the same tokens. A job is
the work (see works.py), the side (runtime, precision), the number of threads, and the folder with the exports.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sides import serve
from works import PLACES, GenerationWork

Generate = Callable[[], list[list[int]]]


def ours(work: GenerationWork, precision: str, folder: Path) -> Generate:
    """The same `generate` that `regpt2 sample` calls."""
    import torch

    from regpt2.base.device import choose_compute
    from regpt2.model.files.load import load_model
    from regpt2.sampling.generate import generate
    from regpt2.sampling.twins.cpu import in_int8, packed_if_faster

    device = torch.device(work.device)
    compute = choose_compute("fp32" if precision == "int8" else precision, device)
    model = load_model(str(folder / PLACES["native"]), device=device, dtype=compute.dtype).model
    # Packed once, as peers do when they load a model.
    model = in_int8(model) if precision == "int8" else packed_if_faster(model, 1000, rows=work.batch)
    prompts = torch.tensor(work.prompts(), device=device)
    return lambda: generate(model, prompts, work.new_tokens, temperature=0)[:, work.prompt_tokens :].tolist()


def transformers(work: GenerationWork, precision: str, folder: Path) -> Generate:
    """`GPT2LMHeadModel.generate` as shipped."""
    import torch
    from transformers import GPT2LMHeadModel

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = GPT2LMHeadModel.from_pretrained(folder / PLACES["huggingface"], dtype=dtype).eval().to(work.device)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0  # never ends early
    prompts = torch.tensor(work.prompts(), device=work.device)
    seen = torch.ones_like(prompts)

    @torch.no_grad()
    def once() -> list[list[int]]:
        out = model.generate(prompts, attention_mask=seen, do_sample=False, max_new_tokens=work.new_tokens)
        return out[:, work.prompt_tokens :].tolist()

    return once


def ctranslate2(work: GenerationWork, precision: str, folder: Path, threads: int) -> Generate:
    """Its generator, on the converted Hugging Face folder."""
    import ctranslate2 as library

    place = folder / PLACES["ctranslate2"]
    compute_type = {"fp32": "float32", "int8": "int8"}[precision]
    generator = library.Generator(str(place), compute_type=compute_type, intra_threads=threads, inter_threads=1)
    words = json.loads((place / "vocabulary.json").read_text())
    prompts = [[words[i] for i in row] for row in work.prompts()]

    def once() -> list[list[int]]:
        found = generator.generate_batch(
            prompts,
            min_length=work.new_tokens,
            max_length=work.new_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return [result.sequences_ids[0] for result in found]

    return once


def llama_cpp(work: GenerationWork, precision: str, folder: Path, threads: int) -> Generate:
    """llama.cpp's server inside this process, without HTTP."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(folder / PLACES[{"fp32": "gguf-fp32", "bf16": "gguf-bf16", "int8": "gguf-q8_0"}[precision]])
    params.verbosity, params.n_parallel, params.n_gpu_layers, params.cache_ram_mib = -1, 1, 0, 0
    params.n_ctx = work.prompt_tokens + work.new_tokens + 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)
    (prompt,) = work.prompts()
    asked: dict[str, Any] = {"prompt": prompt, "max_tokens": work.new_tokens, "temperature": 0, "cache_prompt": False}
    asked |= {"ignore_eos": True}
    told = server.handle_completions(asked | {"logprobs": 1})["choices"][0]["logprobs"]["content"]
    ids = [token["id"] for token in told]  # it returns ids only together with probabilities, which take time

    def once() -> list[list[int]]:
        made = server.handle_completions(asked)["usage"]["completion_tokens"]
        assert made == work.new_tokens, f"{made} tokens, not {work.new_tokens}"
        return [ids]

    return once


def main() -> None:
    job = json.loads(sys.argv[1])
    work, side, folder = GenerationWork.from_json(job["work"]), job["side"], Path(job["folder"])
    if side["runtime"] == "regpt2":
        generate = ours(work, side["precision"], folder)
    elif side["runtime"] == "transformers":
        generate = transformers(work, side["precision"], folder)
    else:
        make = {"CTranslate2": ctranslate2, "llama.cpp": llama_cpp}[side["runtime"]]
        generate = make(work, side["precision"], folder, job["threads"])

    def once() -> dict[str, Any]:
        figures: dict[str, Any] = {"ids": generate()}
        if work.device == "cuda":
            import torch

            figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        return figures

    serve(once)


if __name__ == "__main__":
    main()
