"""Contract between a rule and the code that calls it."""

from __future__ import annotations


class TaskError(ValueError):
    """A value of one task that lies outside a rule's domain.

    A rule identifies tasks by index; the stage catches this error and raises it again with the task's name.

    Args:
        task: Index of the task among the losses that the rule got.
        complaint: Message, with ``{task}`` in place of the name of the task.
    """

    def __init__(self, task: int, complaint: str) -> None:
        self.task = task
        self.complaint = complaint
        super().__init__(self.naming(str(task)))

    def naming(self, name: str) -> str:
        """Return the message with the task called ``name``."""
        return self.complaint.replace("{task}", f"'{name}'")
