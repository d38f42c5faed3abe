"""Where prompts, demonstrations and pairs come from: one file a task, named in `data.task.name`.

A task is a section of settings with three methods (`task.py`): copy `instructions.py`, change it, and
add its row below; nothing else in the project names a task.
"""

from typing import Annotated

from pydantic import Field

from stages.data.tasks.instructions import InstructionsTask
from stages.data.tasks.pairs import PairsTask
from stages.data.tasks.problems import ProblemsTask
from stages.data.tasks.reviews import ReviewsTask

# One row per task.
TaskConfig = Annotated[
    ReviewsTask  # continue the opening of a review: made here, needs no download
    | PairsTask  # preference pairs of people, from a file or the hub
    | InstructionsTask  # prompts with completions, from a file or the hub
    | ProblemsTask,  # problems with an answer that a rule can check, from a file or the hub
    Field(discriminator="name"),
]
"""The setting `data.task`."""
