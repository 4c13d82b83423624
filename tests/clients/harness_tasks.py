"""lm-evaluation-harness without network: its own task files, of which only the place of the data is changed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FILES = {  # below lm_eval/tasks: the file, and the split that is scored
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "lambada_openai": ("lambada/lambada_openai.yaml", "test"),
    "piqa": ("piqa/piqa.yaml", "validation"),
    "arc_easy": ("arc/arc_easy.yaml", "test"),
}
SPLITS = ("training_split", "validation_split", "test_split")


def write_tasks(folder: Path, examples: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """`folder/tasks/NAME.yaml`, the task NAME_here, for each set of examples in its publisher's layout."""
    import lm_eval.tasks

    (folder / "tasks").mkdir()
    for name, rows in examples.items():
        file, split = FILES[name]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {
            "include": str(Path(lm_eval.tasks.__file__).parent / file),
            "task": f"{name}_here",
            "dataset_path": "json",
            "dataset_name": None,
            **{key: None for key in SPLITS if not key.startswith(split)},
            "dataset_kwargs": {"data_files": {split: str(data)}, "cache_dir": str(folder / "cache")},
        }
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML


def found_by_harness(folder: Path, names: Sequence[str], model: Any) -> dict[str, list[dict[str, Any]]]:
    """What the harness logs for each example of each task that `write_tasks` wrote."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder / "tasks", include_defaults=False)
    tasks = [f"{name}_here" for name in names]
    found = simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0)
    return {name: sorted(found["samples"][f"{name}_here"], key=lambda one: one["doc_id"]) for name in names}


def nats(example: dict[str, Any]) -> list[float]:
    """Of each ending of an example that the harness logged."""
    return [-float(answer[0]) for answer in example["filtered_resps"]]
