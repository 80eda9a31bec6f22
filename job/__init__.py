"""A batch job that fine-tunes language models: environment variables in, a LoRA adapter out."""

__version__ = "0.1.0"
