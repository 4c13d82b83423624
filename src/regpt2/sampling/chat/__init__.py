"""A conversation with a chat model. In: messages; out: answers, in the terminal or to a program."""
