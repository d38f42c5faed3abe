"""Section `data` of params.yaml: where prompts come from and how they are split."""

from pydantic import Field, PositiveInt

from stages.common.config import Section
from stages.data.tasks import TaskConfig


class DataConfig(Section):
    """Prompts, demonstrations and pairs. Sizes count prompts after exact duplicates are dropped."""

    seed: int = Field(ge=0)
    """Decides what a generated task makes and which groups of prompts go to which split."""
    task: TaskConfig
    """Where the data comes from; `name` chooses the task, its other settings follow."""
    num_validation_prompts: PositiveInt
    """Prompts for the reward model's accuracy and the choice of checkpoint."""
    num_heldout_prompts: PositiveInt
    """Prompts for the final evaluation; nothing else ever sees them."""
    max_train_prompts: PositiveInt | None = None
    """Upper limit of training prompts; null keeps all that the other splits leave."""
