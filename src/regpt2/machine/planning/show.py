"""A plan on the screen. In: a `RunPlan`; out: lines for a person."""

from textwrap import wrap

from regpt2.base.console import count, duration, say
from regpt2.machine.planning.disk import best_bytes, checkpoint_bytes, most_checkpoints, run_bytes
from regpt2.machine.planning.micro_batch import best
from regpt2.machine.planning.plan import RunPlan
from regpt2.machine.planning.run_time import StepEstimate, eval_tokens, n_evaluations
from regpt2.machine.planning.scaling import LARGER, LOW_EFFICIENCY, Scaling
from regpt2.training.memory import FP32, MARGIN, step_memory, without_lora

COLUMNS = 110
GB = 1e9
GAIN = 0.02  # of efficiency: a larger batch that gains less does not pay


def show(plan: RunPlan) -> None:
    config, batch, ranks = plan.config, plan.config.batch, plan.target.ranks
    say(
        f"{plan.recipe} on {plan.target.name}: {count(batch.tokens_until(config.max_steps))} tokens, "
        f"{config.max_steps:,} updates of {batch.batch_tokens:,}{batch.growth}"
    )
    if plan.other_micro_batch:
        tokens = batch.tokens_of(1)
        each = tokens // (batch.seq_len * ranks)
        say(
            f"  micro_batch {batch.micro_batch} -> {plan.setup.micro_batch}: an update of {tokens:,} tokens on {ranks} "
            f"GPU{'s' * (ranks > 1)} is {each:,} sequence{'s' * (each > 1)} per GPU"
        )
    say()
    if plan.step is None:
        where = f"{plan.target.name} in {plan.target.precision}"
        _row("time", "unknown", f"no published run on {where}; --measure on that machine times real steps")
    else:
        _show_time(plan, plan.step)
    _show_memory(plan)
    _show_disk(plan)
    _show_choices(plan)
    if plan.scaling is not None:
        _show_scaling(plan.scaling, plan.price, batch.batch_tokens)


def _row(name: str, value: str, how: str = "") -> None:
    """A name, its value, and its source, wrapped below itself if it is long."""
    head = f"  {name:<24} {value:>12}   "
    for line in wrap(how, COLUMNS, initial_indent=head, subsequent_indent=" " * len(head)) or [head.rstrip()]:
        say(line)


def _show_time(plan: RunPlan, step: StepEstimate) -> None:
    config, setup, place = plan.config, plan.setup, plan.target.place
    spread = f"+-{step.spread:.0%}"
    _row("time", duration(3600 * plan.hours), spread)
    known = eval_tokens(config)
    left_out = [name for name in config.evals.names if name not in known]
    evaluated = f"{n_evaluations(config)} x {', '.join(f'{name} {count(n)} tokens' for name, n in known.items())}"
    hows = {
        "training": step.how,
        "evaluations": evaluated + (f"; not counted: {', '.join(left_out)}" if left_out else ""),
        "checkpoints": "copied to main memory; written to disk while training continues",
        "start": "imports, the check of the data" + (", the compiler" if plan.target.compiled else ""),
    }
    for name, seconds in plan.seconds.items():
        _row(f"  {name}", duration(seconds), hows[name])
    gpu_hours = plan.hours * plan.target.ranks
    unit = "GPU-hours" if setup.device == "cuda" else "hours"
    if plan.price is not None:
        _row("cost", f"{gpu_hours * plan.price:,.2f}", f"{spread}: {gpu_hours:,.1f} {unit} at {plan.price:g}")
    else:
        _row(unit, f"{gpu_hours:,.1f}", "--price adds the cost")
    parts = ", ".join(f"{name} {1e3 * seconds:,.1f}" for name, seconds in step.parts.items() if seconds)
    _row("an update", f"{1e3 * step.seconds:,.0f} ms", parts)
    tokens_per_s = config.batch.batch_tokens / step.seconds
    flops = tokens_per_s * setup.flops_per_token / plan.target.ranks
    used = f", {flops / place.machine.peak:.0%} of its peak of {place.machine.peak / 1e12:,.0f}" if place else ""
    _row("tokens per second", count(tokens_per_s), f"{flops / 1e12:,.3g} TFLOP/s per rank{used}")


def _show_memory(plan: RunPlan) -> None:
    free, total = plan.target.free_bytes, sum(plan.memory.values())
    if free is None:
        verdict = "free memory is unknown"
    elif plan.out_of_memory:
        verdict = f"DOES NOT FIT: {free / GB:.1f} GB are free"
    else:
        fitting = any(choice.fits and choice.setup == plan.setup for choice in plan.choices)
        verdict = f"{'fits' if fitting else 'may not fit'} into {free / GB:.1f} GB"
    say()
    of_gpu = "of each GPU" if plan.target.ranks > 1 else "of the GPU"
    where = of_gpu if plan.setup.device == "cuda" else "of this process"
    if plan.setup.lora.rank:
        learning = f"{count(plan.setup.n_adapters)} of {count(plan.setup.n_params)}"
        _row("parameters that train", learning, f"LoRA, rank {plan.setup.lora.rank}; the others have no gradient")
    _row(f"memory {where}", f"{total / GB:.2f} GB", f"+-{MARGIN:.0%} by formula; {verdict}")
    for name, n_bytes in plan.memory.items():
        _row(f"  {name}", f"{n_bytes / GB:.2f} GB")
    if plan.measured:
        peak, predicted = plan.measured["peak_bytes"], plan.measured["predicted_bytes"]
        off = f"predicted {predicted / GB:.2f} GB, {predicted / peak - 1:+.0%}" if peak else "this device reports none"
        _row("  measured here", f"{peak / GB:.2f} GB", f"with micro_batch {plan.measured['micro_batch']}: {off}")


def _show_disk(plan: RunPlan) -> None:
    most, one_bytes = most_checkpoints(plan.config), checkpoint_bytes(plan.setup)
    say()
    _row("disk for data", f"{plan.data.shards_bytes / GB:.2f} GB", f"2 bytes per token; {plan.data.how}")
    if plan.data.missing_bytes:
        _row("  while preparing", f"{plan.data.missing_bytes / GB:.2f} GB", "at most, for files like FineWeb-Edu's")
    each = f"at most {most} of {one_bytes / GB:.2f} GB: {one_bytes / plan.setup.n_params:.3g} bytes per parameter"
    if plan.setup.lora.rank and most:
        each += f"; the frozen weights once, {FP32 * plan.setup.n_params / GB:.2f} GB"
    n_best = best_bytes(plan.config, plan.setup)
    _row("disk for checkpoints", f"{(run_bytes(plan.config, plan.setup) - n_best) / GB:.2f} GB", each)
    if n_best:
        _row("disk for the best", f"{n_best / GB:.2f} GB", "weights alone, twice: a new one before the old one goes")
    for lack in plan.lacks:
        _row("  TOO LITTLE SPACE", "", lack)


def _show_choices(plan: RunPlan) -> None:
    """The micro-batches around the largest that fits."""
    taken = best(plan.choices, plan.setup)
    planned = "planned" if plan.other_micro_batch else "the recipe's"
    fitting = [choice for choice in plan.choices if choice.fits]
    wanted = next(choice for choice in plan.choices if choice.setup == plan.setup)
    near = [*fitting[-5:], *[choice for choice in plan.choices if not choice.fits][:1], wanted]
    shown = [choice for choice in plan.choices if choice in near or choice == taken]
    say()
    say(f"  {'micro_batch':>12} {'micro-steps':>12} {'memory':>10} {'update':>10}")
    for one in shown:
        marks = [planned] * (one == wanted) + ["best"] * (one == taken)
        marks += [] if one.fits else ["may not fit"]
        time = "" if one.step_s is None else f"{1e3 * one.step_s:,.0f} ms"
        memory = f"{sum(step_memory(one.setup).values()) / GB:.2f} GB"
        row = f"  {one.setup.micro_batch:>12} {one.setup.grad_accum_steps:>12} {memory:>10} {time:>10}"
        say(f"{row}   {', '.join(marks)}".rstrip())
    if taken is None:
        say(f"\n  no micro-batch fits: use a smaller model, shorter sequences{without_lora(plan.setup)}")
    elif taken != wanted or plan.other_micro_batch:
        say(f"\n  train with --batch.micro-batch {taken.setup.micro_batch}; the update stays the same")


def _show_scaling(found: Scaling, price: float | None, batch_tokens: int) -> None:
    say()
    cost = f" {'cost':>10}" if price is not None else ""
    say(f"  {'GPUs':>5} {'nodes':>6} {'micro-batch':>14} {'update':>12} {'exposed':>10} {'waiting':>9} {'tokens/s':>9} "
        f"{'efficiency':>11} {'hours':>8}{cost}")  # fmt: skip
    for row in found.rows:
        start = f"  {row.place.gpus:>5} {row.place.nodes:>6}"
        if row.setup is None:
            say(f"{start}   no micro-batch fits")
            continue
        passes = f"{row.setup.micro_batch} x {row.setup.grad_accum_steps}"
        times = [f"{1e3 * s:,.1f} ms" for s in (row.step_s, row.exposed_s, row.parts["slowest rank"])]
        cost = f" {row.hours * row.place.gpus * price:>10,.2f}" if price is not None else ""
        say(
            f"{start} {passes:>14} {times[0]:>12} {times[1]:>10} {times[2]:>9} {count(row.tokens_per_s):>9} "
            f"{row.efficiency:>11.0%} {row.hours:>8.2f}{cost}"
        )
    say()
    for line in _conclusions(found, batch_tokens):
        for part in wrap(line, COLUMNS - 2):
            say(f"  {part}")


def _conclusions(found: Scaling, batch_tokens: int) -> list[str]:
    lines = []
    if found.base.setup:
        base = found.base.place.gpus
        lines.append(
            "The tokens of an update stay the same. micro-batch: sequences x micro-steps per GPU. exposed: time of the "
            "exchange that the backward pass does not hide. waiting: for the slowest GPU. efficiency: tokens/s per GPU "
            f"relative to {base} GPU{'s' * (base > 1)}. hours: with evaluations, checkpoints and the start."
        )
    if found.low is not None:
        larger = f"with updates of {LARGER * batch_tokens:,} tokens it would be {found.low_at_larger_batch:.0%}"
        pays = found.low_at_larger_batch > found.low.efficiency + GAIN
        end = "a larger batch begins to pay, if its updates teach as much" if pays else "a larger batch does not help"
        lines.append(
            f"Efficiency first falls below {LOW_EFFICIENCY:.0%} at {found.low.place.gpus} GPUs, to "
            f"{found.low.efficiency:.1%}; {larger}: {end}."
        )
    elif found.base.setup:
        lines.append(f"Efficiency stays above {LOW_EFFICIENCY:.0%}: a larger batch is not needed.")
    if found.fsdp is None or found.ddp_there is None:
        lines.append("FSDP does not pay at any of these numbers: DDP fits and is about as fast, or neither fits.")
    elif found.ddp_there.setup is None:
        gpus = found.fsdp.place.gpus
        lines.append(f"FSDP begins to pay at {gpus} GPUs, where DDP does not fit: --parallel.strategy fsdp.")
    else:
        times = f"{1e3 * found.fsdp.step_s:,.1f} ms an update instead of DDP's {1e3 * found.ddp_there.step_s:,.1f} ms"
        lines.append(f"FSDP begins to pay at {found.fsdp.place.gpus} GPUs: {times}.")
    return lines
