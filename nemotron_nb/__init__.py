"""The literate lab for training NVIDIA Nemotron 3 on chats."""

__version__ = "0.1.0"
