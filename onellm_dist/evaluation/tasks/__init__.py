"""What a model is evaluated on: one file per task, found by being here or by an entry point."""

from onellm_dist.evaluation.tasks.base import Task
from onellm_dist.evaluation.tasks.registry import all_tasks, get_task

__all__ = ["Task", "all_tasks", "get_task"]
