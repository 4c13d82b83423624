"""A conversation with a model. In: a chat model, messages from the terminal or a pipe; out: its answers.

regpt2 chat runs/chat --system "Answer briefly." --temperature 0.7
echo "What is the capital of France?" | regpt2 chat runs/chat --temperature 0
"""

from regpt2.base.device import pick_device
from regpt2.base.options import parse
from regpt2.sampling.chat.conversation import Chat, ChatOptions
from regpt2.sampling.chat.terminal import ChatTerminal
from regpt2.sampling.continue_text import load_in
from regpt2.sampling.tokenizer import tokenizer_of


def main(argv: list[str]) -> int:
    """The verb `regpt2 chat`."""
    options = parse(ChatOptions, argv, "regpt2 chat")
    loaded = load_in(options.dtype, options.model, pick_device(options.device))
    ChatTerminal(Chat(loaded, tokenizer_of(loaded), options)).run()
    return 0
