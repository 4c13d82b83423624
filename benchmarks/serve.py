"""`regpt2 serve` under load. In: a model; out: what clients get, beside a batch in `sample` and llama.cpp's server.

    python benchmarks/serve.py --model runs/demo --out benchmarks/results/DATE_cpu_serving.json
    python benchmarks/serve.py --quick
    python benchmarks/serve.py --table benchmarks/results/DATE_cpu_serving.json

`load`: 64 clients for two minutes with random requests; some leave, some send nonsense. Exit code 1 if a text is wrong,
something leaks, a client starves, or a slot stays taken. `batch`: eight clients beside a batch in `regpt2 sample`.
`llama.cpp`: first tokens beside its server, with the same weights; needs the package xllamacpp. Needs Linux.
"""

import argparse
import asyncio
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from crowd import servers, tables
from crowd.http_client import ask
from crowd.known import Known, known_texts
from crowd.load import Traffic
from crowd.steady import NotServed, Steady, for_rounds, for_seconds, prompts
from crowd.verdict import Watch, result_of
from regpt2.sampling.continue_text import load_in
from regpt2.sampling.tokenizer import tokenizer_of
from run import export, version
from sides import SETTLE_S, Side, SideFailed, keep
from works import GPT2, PLACES, Comparison, GenerationWork, Shape, SideSpec

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "serving.md"
PARTS = ("load", "batch", "llama.cpp")
SLOTS = 8
GGUF = {"fp32": "gguf-fp32", "bf16": "gguf-bf16", "int8": "gguf-q8_0"}
OURS, THEIRS = "regpt2", "llama.cpp"


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured."""

    loads: tuple[tuple[int, float], ...] = ((64, 120.0), (96, 30.0))
    """Clients and seconds; 96 are more than may wait, so some are refused with 429."""
    n_known: int = 96
    turns: int = 5
    """Of each side beside `sample`."""
    turn_s: float = 4.0
    shape: Shape = GPT2
    """Of the random weights that are measured besides the model."""
    at_once: tuple[int, ...] = (1, 4, 8, 16)
    """Clients beside llama.cpp."""
    busy_s: float = 8.0
    busy_turns: int = 2
    prompt_characters: int = 256
    new_tokens: int = 64


QUICK = Size(((16, 5.0),), 24, 1, 0.5, Shape("2 layers, 64 wide", 2, 2, 64, 256), (1, 8), 1.0, 1, 64, 16)


def serving(model: str, dtype: str = "fp32") -> tuple[list[str], int]:
    """The command of our server, and its port."""
    port = servers.free_port()
    options = ("--slots", str(SLOTS), "--dtype", dtype, "--device", "cpu")
    return servers.regpt2_command(model, port, *options), port


def label(model: str) -> str:
    """A name for a table: the path, or the shape of random weights."""
    return f"random weights, {Path(model).parent.name}" if Path(model).name == PLACES["native"] else model


async def served_name(port: int) -> str:
    """The name of the first model."""
    return str((await ask(port, "/v1/models")).json["data"][0]["id"])


def measure_load(model: str, size: Size, options: argparse.Namespace) -> bool:
    """Many clients at once, and then more than may wait, each time at a new server. True if nothing was wrong."""
    loaded = load_in("fp32", model, torch.device("cpu"))
    known = known_texts(loaded, tokenizer_of(loaded), size.n_known, seed=options.seed)
    return all([crowded(model, known, clients, seconds, options) for clients, seconds in size.loads])


def crowded(model: str, known: list[Known], clients: int, seconds: float, options: argparse.Namespace) -> bool:
    """Run the load with this many clients. True if nothing was wrong."""
    command, port = serving(model)
    with servers.started(command, port) as server:
        n_lines = len(server.lines())

        async def whole() -> dict[str, Any]:
            traffic = Traffic(port, await served_name(port), known, seed=options.seed)
            watch = Watch(server.held)
            await watch.during(traffic.run(clients, seconds), warm_s=seconds / 6)
            return await result_of(traffic.seen, watch, port, clients)

        result = asyncio.run(whole())
        written = server.lines()[n_lines:]
    record({"model": label(model), **result, "server_wrote": [len(written), *written[-5:]]}, "load", options)
    return bool(result["passed"])


def measure_batch(model: str, dtype: str, new_tokens: int, size: Size, options: argparse.Namespace) -> None:
    """As many clients as slots, beside a batch of as many prompts in `sample`, turn by turn."""
    texts = prompts(SLOTS, 40, seed=options.seed)
    command, port = serving(model, dtype)
    with servers.started(command, port), ExitStack() as held:
        body = {"model": asyncio.run(served_name(port)), "max_tokens": new_tokens, "temperature": 0}

        def served(rounds: int, stream: bool) -> float:
            elapsed_s, tokens = asyncio.run(for_rounds(port, body, texts, rounds=rounds, stream=stream))
            time.sleep(SETTLE_S)
            return tokens / elapsed_s

        rounds = max(1, round(size.turn_s * served(1, stream=True) / (SLOTS * new_tokens)))
        job = {"model": model, "dtype": dtype, "prompts": texts, "new_tokens": new_tokens, "rounds": rounds}
        side = Side([sys.executable, str(HERE / "crowd" / "batch.py"), json.dumps(job)])
        held.callback(side.end)
        side.turn(1)  # warm up
        rows = []
        for _ in range(size.turns):
            answer = side.turn(1)
            time.sleep(SETTLE_S)
            row = {"sample": answer["tokens"] / answer["wall_s"]}
            rows.append(row | {"streams": served(rounds, stream=True), "whole": served(rounds, stream=False)})
            print("  " + ", ".join(f"{side} {rate:,.0f} tokens/s" for side, rate in rows[-1].items()), flush=True)
    ratios = {name: [row[name] / row["sample"] for row in rows] for name in ("streams", "whole")}
    result = {
        "work": f"8 prompts of 40 characters, {new_tokens} new tokens each",
        "dtype": dtype,
        "tokens_per_s": {name: statistics.median(row[name] for row in rows) for name in rows[0]},
        "ratio": {name: statistics.median(found) for name, found in ratios.items()},
        "ratio_spread": {name: [min(found), max(found)] for name, found in ratios.items()},
        "turns_tokens_per_s": rows,
    }
    record({"model": label(model), **result}, "batch", options)


def measure_llama_cpp(folder: Path, dtype: str, size: Size, options: argparse.Namespace) -> None:
    """First tokens and tokens per second beside llama.cpp's server, at each number of clients, turn by turn."""
    gguf, theirs_at = folder / PLACES[GGUF[dtype]], servers.free_port()
    context = size.prompt_characters // 2 + size.new_tokens  # no token of the prompts is shorter than two characters
    theirs = servers.llama_cpp_command(gguf, theirs_at, slots=SLOTS, context=context, threads=torch.get_num_threads())
    command, port = serving(str(folder / PLACES["native"]), dtype)
    with servers.started(command, port), servers.started(theirs, theirs_at):
        body = {"model": asyncio.run(served_name(port)), "max_tokens": size.new_tokens, "temperature": 0}
        body["stream_options"] = {"include_usage": True}
        bodies = {OURS: body, THEIRS: body | {"ignore_eos": True}}
        ports = {OURS: port, THEIRS: theirs_at}

        def turn(side: str, clients: int, seed: int, seconds: float) -> Steady:
            run = for_seconds(
                ports[side], bodies[side], size.prompt_characters, clients=clients, seconds=seconds, seed=seed
            )
            found = asyncio.run(run)
            time.sleep(SETTLE_S)
            return found

        for side in ports:  # warm up
            turn(side, 2, 0, 1.0)
        for clients in size.at_once:
            turns = [
                {side: turn(side, clients, seed, size.busy_s) for side in ports}
                for seed in range(1, size.busy_turns + 1)
            ]
            record(beside(dtype, clients, size, turns), "llama.cpp", options)


def beside(dtype: str, clients: int, size: Size, turns: list[dict[str, Steady]]) -> dict[str, Any]:
    """One number of clients: both sides over all turns, and ours divided by theirs, by neighboring turns."""
    joined = {side: Steady.joined([turn[side] for turn in turns]).figures() for side in (OURS, THEIRS)}
    figures = [{side: turn[side].figures() for side in turn} for turn in turns]
    ratios = {
        name: statistics.median(each[OURS][name] / (each[THEIRS][name] or math.nan) for each in figures)
        for name in ("tokens_per_s", "first_token_p50_s", "first_token_p95_s")
    }
    work = f"{size.shape.name}, prompts of {size.prompt_characters} characters, {size.new_tokens} new tokens"
    return {
        "work": work,
        "dtype": dtype,
        "clients": clients,
        "slots": SLOTS,
        "their_version": f"xllamacpp {version('llama.cpp', None)}, {GGUF[dtype].partition('-')[2].upper()}",
        **joined,
        "ours_of_theirs": ratios,
        "turns": figures,
    }


def record(result: dict[str, Any], what: str, options: argparse.Namespace) -> None:
    """Print a result, and add it to the file."""
    keep(result, what, " ".join(["python", *sys.argv]), options.out)


def exported(shape: Shape, dtype: str, folder: Path) -> Path:
    """The folder with the random weights in both programs' formats."""
    return export(Comparison(GenerationWork(model=shape, batch=SLOTS), (SideSpec(THEIRS, dtype),)), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo", help="what is served in `load` and `batch`")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="these parts alone")
    parser.add_argument("--dtype", choices=list(GGUF), nargs="+", default=["fp32", "int8"], help="beside llama.cpp")
    parser.add_argument("--clients", type=int, help="at once, in `load` (64, then 96)")
    parser.add_argument("--seconds", type=float, help="of `load` (120, then 30)")
    parser.add_argument("--seed", type=int, default=0, help="of all that clients choose")
    parser.add_argument("--quick", action="store_true", help="half a minute, with a tiny model")
    parser.add_argument("--out", type=Path, help="the JSON file to add to")
    parser.add_argument(
        "--table", type=Path, nargs="+", help="only write the tables of docs/serving.md from such files"
    )
    options = parser.parse_args()
    if options.table:
        tables.update(DOCS, options.table)
        return
    size = QUICK if options.quick else Size()
    if options.clients or options.seconds:
        size = dataclasses.replace(size, loads=((options.clients or 64, options.seconds or 120.0),))
    with tempfile.TemporaryDirectory() as folder:
        try:
            passed = measure(size, options, Path(folder))
        except (SideFailed, NotServed, servers.ServerFailed) as failed:
            sys.exit(f"failed: {type(failed).__name__}: {failed}")
    sys.exit(0 if passed else 1)


def measure(size: Size, options: argparse.Namespace, folder: Path) -> bool:
    """The parts that were asked for. True if nothing was wrong under load."""
    model = str(exported(size.shape, "fp32", folder) / PLACES["native"]) if options.quick else options.model
    passed = "load" not in options.only or measure_load(model, size, options)
    if "batch" in options.only:
        if not options.quick:
            measure_batch(model, "fp32", 64, size, options)
        native = exported(size.shape, "fp32", folder) / PLACES["native"]
        measure_batch(str(native), "fp32", size.new_tokens, size, options)
    if "llama.cpp" in options.only:
        if version(THEIRS, None) is None:
            print("xllamacpp is not installed: llama.cpp's server is left out.")
            return passed
        for dtype in options.dtype:
            measure_llama_cpp(exported(size.shape, dtype, folder), dtype, size, options)
    return passed


if __name__ == "__main__":
    main()
