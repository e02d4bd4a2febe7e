"""Tasks by name."""

from __future__ import annotations

from fedpeat_ray.errors import ConfigError
from fedpeat_ray.own import find
from fedpeat_ray.tasks.task import Task

OURS = {
    "language-modelling": "fedpeat_ray.tasks.language_modelling:LanguageModelling",
    "masked-language-modelling": "fedpeat_ray.tasks.masked:MaskedLanguageModelling",
    "classification": "fedpeat_ray.tasks.classification:TextClassification",
    "sequence-to-sequence": "fedpeat_ray.tasks.sequence_to_sequence:SequenceToSequence",
    "images": "fedpeat_ray.tasks.classification:ImageClassification",
}


def find_task(name: str) -> Task:
    """What `task` names: one of ours, or one of the user's. Raises ConfigError if there is none."""
    found = find("task", name, OURS)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError.of("task", name, "a class that inherits from fedpeat_ray.tasks.task.Task")
    return found()
