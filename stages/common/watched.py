"""Files of the user that DVC sees change, and a word about those that it does not."""

import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def warn_unless_watched(path: Path, folder: Path) -> None:
    """Say that a file lies outside the folder that dvc.yaml names as a dependency."""
    if not path.resolve().is_relative_to(folder.resolve()):
        logger.warning("DVC does not see when this changes; put it into %s path=%s", folder, path)
