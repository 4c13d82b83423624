"""The loop as a reader meets it: how far is it from the command to the backward pass?"""

import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch

import regpt2
from regpt2 import cli

OURS = str(Path(regpt2.__file__).parent)
COMMAND = ["--max-steps", "2", "--save-every", "0", "--eval-every", "0", "--sample-every", "0"]


@pytest.mark.parametrize("strategy", ["ddp", "ordered"])
def test_the_backward_pass_is_at_most_eight_frames_from_the_command(
    tmp_path: Path, tiny_recipe: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    backward, stacks = torch.Tensor.backward, list[list[str]]()

    def looking(self: torch.Tensor, *arguments: Any, **options: Any) -> None:
        frames = [
            frame for frame, _ in traceback.walk_stack(sys._getframe()) if frame.f_code.co_filename.startswith(OURS)
        ]
        stacks.append([frame.f_code.co_qualname for frame in reversed(frames)])
        backward(self, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "backward", looking)
    where = ["--data", str(tiny_data), "--run", str(tmp_path / "run")]
    assert cli.main(["train", str(tiny_recipe), *where, *COMMAND, "--parallel.strategy", strategy]) == 0
    assert len(stacks) == 1 + 2 * 4, "one of the rehearsal, four of each update"
    for stack in stacks:
        assert stack[0] == "main"
        assert stack[-1].startswith("accumulate")
        assert len(stack) <= 8, " -> ".join(stack)
