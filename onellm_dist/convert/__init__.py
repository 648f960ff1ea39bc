"""Conversion of checkpoints: any format in, any format out, a block of memory at a time.

Imports point one way:
tensors <- names <- checkpoint <- formats <- registry <- opening <- conversion <- assemble.
"""
