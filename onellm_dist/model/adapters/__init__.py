"""Adapters: low-rank ones (LoRA), their folders, and several over one base."""
