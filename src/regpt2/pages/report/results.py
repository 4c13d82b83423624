"""The result of a run. In: a `Record`; out: a line, a row of numbers, and the columns of several runs."""

import math
from collections.abc import Sequence

from regpt2.base.console import count, duration
from regpt2.pages.record import Event, Record, number, smooth
from regpt2.pages.report.scores import shown_as
from regpt2.pages.report.verdicts import state_of
from regpt2.pages.safe_html import Html, fill, join
from regpt2.pages.tables import figure

MOST_CHARACTERS = 60
MOST_DIGITS = 16  # of a value in large letters; the tables below show all of it
DATA_DIFFER = "The data of these runs differ, so their losses cannot be compared."


def headline(record: Record) -> str:
    """The run's result in a line: the last validation, else the last training loss."""
    if not record.validations:
        loss = final_training_loss(record)
        return f"training loss {loss:.3f}" if math.isfinite(loss) else "no result yet"
    last = record.validations[-1]
    bits = number(last.get("bits_per_byte"))
    val_loss, perplexity = (figure(key, last.get(key))[:MOST_CHARACTERS] for key in ("loss", "perplexity"))
    line = f"validation loss {val_loss}, perplexity {perplexity}"
    return f"{line}, {bits:.3f} bits per byte" if math.isfinite(bits) else line


def summary(record: Record) -> str:
    """What was run, and how far: 1,200 of 1,200 steps · 1.84M tokens · 10.3M parameters · finished."""
    steps, max_steps = record.last_step, number(record.start.get("max_steps"))
    planned = f" of {max_steps:,.0f}" if math.isfinite(max_steps) else ""
    parts = [f"{steps:,.0f}{planned} {'step' if steps == 1 and not planned else 'steps'}"]
    parts += [f"{count(record.tokens)} tokens"] if record.tokens else []
    n_params = number(record.start.get("n_params"))
    parts += [f"{count(n_params)} parameters"] if math.isfinite(n_params) else []
    parts += [record.dataset[:MOST_CHARACTERS]] if record.dataset else []
    return " · ".join([*parts, record.status])


def hellaswag(record: Record) -> str:
    """The newest HellaSwag, with its standard error; a dash if there is none."""
    last = (_hellaswags(record) or [{}])[-1]
    value, stderr = last.get("acc_norm"), number(last.get("acc_norm_stderr"))
    shown = shown_as("acc_norm", value)[:MOST_CHARACTERS]
    return f"{shown.removesuffix(' %')} ± {100 * stderr:.2f} %" if math.isfinite(stderr) else shown


def _hellaswags(record: Record) -> list[Event]:
    return [event for event in (*record.measured, *record.evals) if event.get("eval") == "hellaswag"]


def core(record: Record) -> str:
    """The newest CORE, or the mean over the tasks that were measured; a dash if there is none."""
    events = [event for event in (*record.evals, *record.measured) if event.get("eval") == "core"]
    last = (events or [{}])[-1]
    if "core" in last:
        return figure("core", last["core"])
    n_tasks = number(last.get("tasks"))
    mean = figure("core", last.get("centered_mean"))
    return f"{mean} over {n_tasks:.0f} tasks" if math.isfinite(n_tasks) else mean


def results(record: Record) -> Html:
    """The row of numbers at the head of a page."""
    last = record.validations[-1] if record.validations else {}
    training = final_training_loss(record)
    beside = f"best {best_loss(record)}" if record.best.loss < number(last.get("loss")) else ""
    short = figure("loss", last["loss_1024"])[:MOST_DIGITS] if last.get("loss_1024") is not None else ""
    beside = beside or (f"{short} in windows of 1,024" if short else "")
    beside = beside or (f"training {training:.3f}" if math.isfinite(training) else "")
    compressor = min(record.baselines.items(), key=lambda pair: pair[1], default=None)
    step_ms, mfu, speed = (record.typical(column) for column in ("step_ms", "mfu", "tokens_per_s"))
    cells = [
        ("Validation loss", figure("loss", last.get("loss")), "nats" if last else "", beside),
        ("Perplexity", figure("perplexity", last.get("perplexity")), "", "per token"),
        _third(record, last.get("bits_per_byte"), compressor),
        ("Time", _wall_time(record), "", f"{step_ms:,.0f} ms a step" if math.isfinite(step_ms) else ""),
        (
            "Tokens/s",
            count(speed) if math.isfinite(speed) else "–",
            "",
            share_of_peak(record, mfu) or "median",
        ),
    ]
    cell = (
        '<div><dt>{name}</dt><dd><span class="value">{value}</span> <span class="unit">{unit}</span>'
        '<div class="remark">{remark}</div></dd></div>'
    )
    shown = (
        fill(
            cell,
            name=name,
            value=value if len(value) <= MOST_DIGITS else f"{value[:MOST_DIGITS]}…",
            unit=unit,
            remark=remark,
        )
        for name, value, unit, remark in cells
    )
    return fill('<dl class="results">\n{cells}\n</dl>', cells=join(shown))


def share_of_peak(record: Record, mfu: float) -> str:
    """How much of what the device can do was used, in words; empty if unknown."""
    if not math.isfinite(mfu):
        return ""
    share = f"{100 * mfu:.0f}" if mfu >= 0.1 else f"{100 * mfu:.2g}"
    return f"{share} % of {'its matmul rate' if record.has_timed_peak else 'the peak (MFU)'}"


def best_loss(record: Record) -> str:
    """The lowest validation loss and its step; a dash without one."""
    best = record.best
    return "–" if best.step is None else f"{figure('loss', best.loss)} at step {best.step:,}"


def side_by_side(records: Sequence[Record]) -> list[list[str]]:
    """Rows of a table with a column for each run, without the rows that no run has a value for."""
    columns = [_column(record) for record in records]
    rows = [[name, *(values[name] for values in columns)] for name in columns[0]]
    return [row for row in rows if set(row[1:]) != {"–"}]


def _column(record: Record) -> dict[str, str]:
    last = record.validations[-1] if record.validations else {}
    training, speed = final_training_loss(record), record.typical("tokens_per_s")
    n_params, config = number(record.start.get("n_params")), record.start.get("config")
    return {
        "Verdict": state_of(record.verdicts[-1]) if record.verdicts else "–",
        "Validation loss": figure("loss", last.get("loss")),
        "In 1,024 tokens": figure("loss", last.get("loss_1024")),
        "Best validation loss": best_loss(record),
        "Perplexity": figure("perplexity", last.get("perplexity")),
        "Bits per byte": figure("bits_per_byte", last.get("bits_per_byte")),
        "HellaSwag": hellaswag(record),
        "CORE": core(record),
        "Training loss": figure("loss", training if math.isfinite(training) else None),
        "Steps": f"{record.last_step:,.0f}",
        "Tokens": count(record.tokens) if record.tokens else "–",
        "Time": _wall_time(record),
        "Tokens/s": count(speed) if math.isfinite(speed) else "–",
        "Used of its peak": share_of_peak(record, record.typical("mfu")) or "–",
        "Recipe": record.recipe,
        "Parameters": count(n_params) if math.isfinite(n_params) else "–",
        "Data set": record.dataset or "–",
        "Device": str(record.start.get("device") or "–"),
        "Seed": str(config.get("seed", "–") if isinstance(config, dict) else "–"),
        "Commit": str(record.start.get("commit") or "–"),
        "Ended": record.status,
    }


def _wall_time(record: Record) -> str:
    return duration(record.elapsed_s) if math.isfinite(record.elapsed_s) else "–"


def final_training_loss(record: Record) -> float:
    """The training loss at the end, over the last few steps."""
    loss = smooth(record.train["loss"])
    return float(loss[-1]) if len(loss) else math.nan


def _third(record: Record, bits: object, compressor: tuple[str, float] | None) -> tuple[str, str, str, str]:
    """HellaSwag where it was measured, else bits per byte."""
    if _hellaswags(record):
        value, *stderr = hellaswag(record).split(" ± ")
        return ("HellaSwag", value, "%" if stderr else "", f"± {stderr[0]}" if stderr else "acc_norm")
    beside = f"{compressor[0][:40]}: {compressor[1]:.2f}" if compressor else ""
    return ("Bits per byte", figure("bits_per_byte", bits), "", beside)
