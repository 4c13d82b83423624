"""HellaSwag. In: a model, scenes with four endings; out: how often the true one is likeliest, in three protocols."""

from dataclasses import dataclass

from regpt2.base.console import warn
from regpt2.base.errors import DataError
from regpt2.evals.scoring.assets import find
from regpt2.evals.scoring.choices import Example, Line, accuracy, predictions, read_examples
from regpt2.evals.scoring.context import EvalContext, Figures
from regpt2.evals.scoring.endings import Question, Scored, score_endings
from regpt2.evals.scoring.llmc_questions import PackedQuestion, is_packed, read_packed
from regpt2.evals.scoring.questions import question, read_on_all_ranks
from regpt2.evals.scoring.scenes import HELLASWAG, harness_scene, is_processed

DESCRIPTION = "HellaSwag, validation: 10,042 scenes with four endings"
PROTOCOLS = {
    "acc_norm": "completion, mean token loss (the lecture's): the raw context, then each ending after a space",
    "acc": "completion, sum of loss: the same tokens",
    "harness_acc": "EleutherAI harness 0.4, acc: 'ACTIVITY: context' cleaned of [tags], sum of loss",
    "harness_acc_norm": "EleutherAI harness 0.4, acc_norm: the same, loss / characters of the ending",
    "processed_text": "1: the file's text had already been cleaned of [tags], so no figure is exactly comparable",
}
ASSETS = (HELLASWAG,)
FIELDS = "activity_label, ctx_a, ctx_b, ctx, endings, label"


@dataclass(frozen=True)
class _Scene:
    """As each protocol words it."""

    completion: Example
    harness: Example
    processed: bool


def evaluate(context: EvalContext) -> Figures:
    """Four accuracies with their standard errors, and `count`; with context.brief only the completion's two.

    So it is, too, where the file is llm.c's, which has the completion's tokens and no text.
    """
    scenes, packed = read_on_all_ranks(context, "hellaswag", lambda: _read(context))
    if packed:
        return _evaluate_packed(context, packed)
    if any(scene.processed for scene in scenes) and context.world.is_main:
        warn("hellaswag: this file's text is processed; published figures are of the raw text, hellaswag_val.jsonl.")
    tokenizer = context.need_tokenizer()
    questions = []
    for scene in scenes:
        endings = tuple(tokenizer.encode(f" {ending}") for ending in scene.completion.choices)
        questions.append(Question(tokenizer.encode(scene.completion.context) or [tokenizer.start_id], endings))
    if not context.brief:
        harness = (scene.harness for scene in scenes)
        questions += [question(tokenizer, one.context, [f" {ending}" for ending in one.choices]) for one in harness]
    scored = score_endings(context, "hellaswag", questions)
    figures = _figures(scenes, scored, brief=context.brief)
    figures["count"] = len(scenes)
    return figures | ({"processed_text": 1} if any(scene.processed for scene in scenes) else {})


def _read(context: EvalContext) -> tuple[list[_Scene], list[PackedQuestion]]:
    """Of a file of text its scenes, of llm.c's file of tokens its questions."""
    path = find(ASSETS[0], "hellaswag", context.files)
    if not is_packed(path):
        return read_examples(path, _scene, FIELDS, limit=context.limit), []
    if (name := context.need_tokenizer().name) != "gpt2":
        raise DataError(
            f"{path} holds tokens of GPT-2's tokenizer, this model's is {name}; give the text: --files "
            "hellaswag=hellaswag_val.jsonl."
        )
    return [], read_packed(path, context.limit)


def _evaluate_packed(context: EvalContext, packed: list[PackedQuestion]) -> Figures:
    if not context.brief and context.world.is_main:
        warn(
            "hellaswag: this file is llm.c's and holds no text, so only acc_norm and acc can be measured; for the "
            "harness's figures give hellaswag_val.jsonl."
        )
    scored, gold = score_endings(context, "hellaswag", [one.question for one in packed]), [one.gold for one in packed]
    by_mean = accuracy("acc_norm", predictions(scored.nats, scored.n_tokens.tolist()), gold)
    return {**by_mean, **accuracy("acc", predictions(scored.nats), gold), "count": len(packed)}


def _figures(scenes: list[_Scene], scored: Scored, *, brief: bool) -> Figures:
    N, gold = len(scenes), [scene.completion.gold for scene in scenes]
    by_sum, by_mean = predictions(scored.nats), predictions(scored.nats, scored.n_tokens.tolist())
    figures = accuracy("acc_norm", by_mean[:N], gold) | accuracy("acc", by_sum[:N], gold)
    if not brief:
        n_characters = [[len(ending) for ending in scene.harness.choices] for scene in scenes]
        by_characters = predictions(scored.nats[N:], n_characters)
        figures |= accuracy("harness_acc", by_sum[N:], gold) | accuracy("harness_acc_norm", by_characters, gold)
    return figures


def _scene(record: Line) -> _Scene:
    completion = Example(record["ctx"], record["endings"], int(record["label"]))
    return _Scene(completion, harness_scene(record), processed=is_processed(record))
