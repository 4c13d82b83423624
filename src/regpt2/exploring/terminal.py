"""The inside of a model for a terminal. In: an `Explored`; out: text."""

from collections.abc import Sequence

from regpt2.base.console import count
from regpt2.exploring.measure import NO_WPE, Explored, TensorFigures


def describe(found: Explored) -> str:
    """Words and tables of at most 120 columns."""
    lines = [f"{found.name}: {found.summary}", "", *_tensor_lines(found.tensors), "", *_part_lines(found), ""]
    if found.wpe is None:
        lines.append(f"wpe: none. {NO_WPE}")
    else:
        cosine = f"{found.smoothness:.3f}"
        lines.append(
            f"wpe: neighboring positions have a mean cosine of {cosine} (0 when untrained, near 1 when well trained)."
        )
    if found.attention is None:
        return "\n".join([*lines, f"Nearest tokens and attention are left out. {found.no_text}"])
    lines += ["", f"{'token':<12} nearest by the cosine of their embeddings"]
    for row in found.neighbors:
        lines.append(f"{row.token:<12} " + "   ".join(f"{token} {cosine:.2f}" for token, cosine in row.nearest))
    lines += ["", f"attention in {found.attention.shown}: {' '.join(found.attention.tokens)}"]
    for habit in found.attention.habits:
        lines.append(
            f"{habit.what:<32} layer {habit.layer:>2}, head {habit.head:>2} gives it {habit.share:>4.0%} of its weight"
            f" (evenly spread {habit.even_share:.0%})"
        )
    return "\n".join(lines)


def _tensor_lines(tensors: Sequence[TensorFigures]) -> list[str]:
    width = max(len(tensor.name) for tensor in tensors)
    title = f"{'tensor':<{width}} {'shape':>14} {'parameters':>12} "
    rows = [
        f"{tensor.name:<{width}} {tensor.shape:>14} {tensor.n_params:>12,} "
        + " ".join(f"{_short(value):>9}" for value in tensor.stats.values())
        for tensor in tensors
    ]
    return [title + " ".join(f"{name:>9}" for name in tensors[0].stats), *rows]


def _short(figure: float) -> str:
    """Four decimals, as long as they fit into the column."""
    return f"{figure:.4f}" if abs(figure) < 1000 else count(figure)


def _part_lines(found: Explored) -> list[str]:
    total = sum(found.parts.values())
    return [
        *(f"{part:<24} {n:>14,} {n / total:>7.1%}" for part, n in found.parts.items()),
        f"{'total':<24} {total:>14,}",
        "",
        found.about_head,
    ]
