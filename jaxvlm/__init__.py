"""Staged GRPO post-training of Qwen-VL models in JAX."""

__version__ = "0.1.0"
