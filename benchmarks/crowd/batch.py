"""The side without a server: a batch in `regpt2 sample`. In: a job as JSON; out: seconds and tokens, turn by turn."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from regpt2.base.threads import spin_briefly
from sides import serve


def main() -> None:
    spin_briefly()  # as the command does
    import torch

    from regpt2.sampling.continue_text import SampleOptions, completions, load_in
    from regpt2.sampling.tokenizer import tokenizer_of

    job = json.loads(sys.argv[1])
    loaded = load_in(job["dtype"], job["model"], torch.device("cpu"))
    tokenizer = tokenizer_of(loaded)
    options = SampleOptions(job["model"], temperature=0, max_new_tokens=job["new_tokens"], batch=len(job["prompts"]))

    def once() -> dict[str, Any]:
        tokens = 0
        for _ in range(job["rounds"]):
            tokens += sum(len(made.tokens) for made in completions(options, loaded, tokenizer, job["prompts"]))
        return {"tokens": tokens}

    serve(once)


if __name__ == "__main__":
    main()
