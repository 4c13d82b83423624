"""The 22 tasks of CORE. In: nothing; out: each task's kind, shots, delimiter, data and accuracy by chance.

CORE is DCLM's (arXiv:2406.11794); kinds, shots and delimiters are those of nanochat's task list, in its order. The data
is llm-foundry's at one commit.
"""

from dataclasses import dataclass, replace
from typing import Literal

from regpt2.evals.scoring.assets import Asset
from regpt2.evals.scoring.scenes import HELLASWAG
from regpt2.references.core import TaskScores, core_scores

Kind = Literal["multiple_choice", "schema", "language_modeling"]

COMMIT = "8c8dd48f72168c5d51e2f7b151595892a8fba43d"
HOME = f"https://raw.githubusercontent.com/mosaicml/llm-foundry/{COMMIT}/scripts/eval/local_data"
ANSWER = "\nAnswer: "
_HOW: dict[Kind, str] = {
    "multiple_choice": "lowest mean loss over the tokens that the choices do not share at the beginning",
    "schema": "lowest mean loss over the last tokens, which all contexts share",
    "language_modeling": "every token of the answer the likeliest",
}


@dataclass(frozen=True)
class Task:
    """One task."""

    name: str
    kind: Kind
    shots: int
    delimiter: str
    """Between a question and its answer."""
    asset: Asset

    @property
    def scores(self) -> TaskScores:
        """Its accuracy by chance, and OpenAI's models on it."""
        return core_scores().tasks[self.name]

    @property
    def protocol(self) -> str:
        """How it is measured, in a line."""
        return f"{self.shots}-shot, {self.kind.replace('_', ' ')}: {_HOW[self.kind]}"


def _task(name: str, kind: Kind, shots: int, delimiter: str, path: str, sha256: str, git_sha1: str = "") -> Task:
    file = path.rpartition("/")[2]
    names = (f"{file}.xz", path, f"eval_data/{path}")  # as in a checkout of llm-foundry, as in nanochat's archive
    url = f"{HOME}/{path}"
    return Task(name, kind, shots, delimiter, Asset(file, url, sha256, "Apache-2.0", names, git_sha1, name))


def _hellaswag(name: str, shots: int) -> Task:
    """From the evaluation hellaswag's file, or llm-foundry's copy of it, already worded."""
    copy = "language_understanding/hellaswag.jsonl"
    names = ("hellaswag_val.processed.jsonl.xz", "hellaswag.jsonl", "hellaswag.jsonl.xz", copy, f"eval_data/{copy}")
    copy_sha1 = "448321079fdc140bd8566b16b24eda9ceacd3501"
    asset = replace(HELLASWAG, other_names=names, git_sha1=copy_sha1, part=name, of="hellaswag")
    return Task(name, "multiple_choice", shots, " ", asset)


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        _hellaswag("hellaswag_zeroshot", 0),
        _task(
            "jeopardy", "language_modeling", 10, ANSWER, "world_knowledge/jeopardy_all.jsonl",
            "187e7f270a440c63d6cf11a57459fdc7e0bce889338225e42cc88e24ee13d52e",
        ),
        _task(
            "bigbench_qa_wikidata", "language_modeling", 10, " ", "world_knowledge/bigbench_qa_wikidata.jsonl",
            "bb0d22727cb25beffb022c8e8c0c3e1159c8b3c7bd7284603c0d6491f8616265",
        ),
        _task(
            "arc_easy", "multiple_choice", 10, ANSWER, "world_knowledge/arc_easy.jsonl",
            "d2d12e59543acf9a5ef6079634a72b30215e36c2fd4236fff3bc855d287b87f5",
        ),
        _task(
            "arc_challenge", "multiple_choice", 10, ANSWER, "world_knowledge/arc_challenge.jsonl",
            "1ae3aeedf1951d881cbd5c2e3a31e78a1993d251479afbe4cb413b6707244636",
        ),
        _task(
            "copa", "multiple_choice", 0, " ", "commonsense_reasoning/copa.jsonl",
            "595dca44dec54c849490bd403a3e24a29e3b944065783222ebb0eb1a55298846",
        ),
        _task(
            "commonsense_qa", "multiple_choice", 10, " ", "commonsense_reasoning/commonsense_qa.jsonl",
            "2771f63f8127c0725b1f6b0ef2cd2ef6469168ae5875fc8d276b25b4f32c8c1a",
        ),
        _task(
            "piqa", "multiple_choice", 10, ANSWER, "commonsense_reasoning/piqa.jsonl",
            "d2870e73aec5154df3faf259b7700876e11608eebdf69e9d6667435673dbe4e0",
        ),
        _task(
            "openbook_qa", "multiple_choice", 0, " ", "commonsense_reasoning/openbook_qa.jsonl",
            "adb2e5c7f8db810ddad4d6b2bf53dcc86dcc545499f7aafcaf42a8e179476c09",
        ),
        _task(
            "lambada_openai", "language_modeling", 0, " ", "language_understanding/lambada_openai.jsonl",
            "411bfbe5b9054346b6a19299c0242670adbefb9162efd958593cbc0290b8c9dc",
        ),
        _hellaswag("hellaswag", 10),
        _task(
            "winograd", "schema", 0, " ", "language_understanding/winograd_wsc.jsonl",
            "746336c27cd2e39a554cb1b8b4869d0f1ae2577ac5bfe799842d26bca5a5bf5e",
        ),
        _task(
            "winogrande", "schema", 0, " ", "language_understanding/winogrande.jsonl",
            "ea1592526f3bfdd0948ed3acb1b4dfa3f83d23698917118688ee1df7f8d4b8d7",
        ),
        _task(
            "bigbench_dyck_languages", "language_modeling", 10, " ",
            "symbolic_problem_solving/bigbench_dyck_languages.jsonl",
            "106ba9ac7507c7ab385c5e59c49cd57aa83025abf080d9b2a2661c0d6c6dbcc5",
        ),
        _task(
            "agi_eval_lsat_ar", "multiple_choice", 3, " ", "symbolic_problem_solving/agi_eval_lsat_ar.jsonl",
            "9ffd73480b51746c11627e56239f8b87035eb255cb92c3a58fd64e2e4b65fb56",
        ),
        _task(
            "bigbench_cs_algorithms", "language_modeling", 10, " ",
            "symbolic_problem_solving/bigbench_cs_algorithms.jsonl",
            "8485683a8c7e7e6c9fc6ca3cc81140fd85edb27f34406a6736d1539cf7ebcb3a",
        ),
        _task(
            "bigbench_operators", "language_modeling", 10, " ", "symbolic_problem_solving/bigbench_operators.jsonl",
            "41e2964ad619c49edd97c22b2c50f922a0241255d906a754bf81a20f4f66b85f",
        ),
        _task(
            "bigbench_repeat_copy_logic", "language_modeling", 10, " ",
            "symbolic_problem_solving/bigbench_repeat_copy_logic.jsonl",
            "8febd2c0080a15680cd17f92bfa30d87abcfac021e646e55d0b8ad69f0cfa767",
        ),
        # Of these two we know git's hash of the file and not its SHA-256.
        _task(
            "squad", "language_modeling", 10, " ", "reading_comprehension/squad.jsonl", "",
            "dc733b8f58ec666c53fd946198c434b819a00680",
        ),
        _task(
            "coqa", "language_modeling", 0, " ", "reading_comprehension/coqa.jsonl", "",
            "028bd4e51326cc43f8394987ae47fbb271aeba9d",
        ),
        _task(
            "boolq", "multiple_choice", 10, ANSWER, "reading_comprehension/boolq.jsonl",
            "454ff101e614370bb1807fe7ebbda6fdb57e794b9662cc1ccae211bf1ff626c8",
        ),
        _task(
            "bigbench_language_identification", "multiple_choice", 10, " ",
            "language_understanding/bigbench_language_identification.jsonl",
            "80c98d8e7ab8213513d1643886229c05c40a6837353b07c19ac7bd860668954e",
        ),
    )
}  # fmt: skip
