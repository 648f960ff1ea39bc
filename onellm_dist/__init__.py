"""A distributed trainer for OneLLM: one multimodal LLM for eight modalities (arXiv 2312.03700)."""

__version__ = "0.1.0"
