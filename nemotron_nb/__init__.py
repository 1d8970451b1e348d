"""The literate lab for training NVIDIA Nemotron 3 on chats."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

__all__ = [
    "Conversation", "Result", "UserError", "answer", "evaluate", "export", "fine_tune", "inspect_chat",
    "load_tokenizer", "open_talk", "pack", "prepare", "read_chats", "reinforce", "render", "say", "serve_command", "train_base", "training_sequences",
]

if TYPE_CHECKING:
    from .api import Result, answer, evaluate, export, fine_tune, prepare, reinforce, train_base
    from .core import UserError
    from .data.inspect import inspect_chat
    from .data.mask import training_sequences
    from .data.pack import pack
    from .data.records import Conversation, read_chats
    from .data.template import render
    from .data.tokenizer import load_tokenizer
    from .stages.chat import open_talk, say
    from .stages.serve import serve_command
else:

    def __getattr__(name):
        """A public name, loaded when it is first asked for."""
        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .api import load_public

        return load_public(name)

    def __dir__():
        """The public names, loaded or not."""
        return sorted({*globals(), *__all__})
