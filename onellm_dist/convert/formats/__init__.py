"""Checkpoint formats, one file each; a new file here is a new format.

A module of this folder is a format if it assigns, as plain literals:
    NAME: what users type: `onellm convert NAME SRC DST`.
    KIND: `llm`, `encoder` or `onellm`: what its checkpoints hold.
    ORDER: its place in `--help` and in recognition; of several that fit, the first is taken.
    ABOUT: one sentence about the format.
    EXAMPLE: a path for the example in `--help`.
    DEFAULT_TARGET: the format that is written where the user names none.
and has these functions:
    is_format(path) -> bool: whether a path looks like such a checkpoint.
    open_checkpoint(path, options) -> OpenedCheckpoint or TrainedWeights.
    plan_output(opened, options) -> OutputPlan: only where the format can be written.
"""
