"""`python -m stages.send_events`: send MLflow what stages in this folder could not, because it was away then."""

import argparse

from stages.common.entry import run_entry
from stages.common.errors import RunError
from stages.common.tracking_sender import send_everything


def main() -> None:
    """`.slipstream/tracking` -> MLflow. An event that was sent is not sent again."""
    parser = argparse.ArgumentParser(prog="python -m stages.send_events", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="gives up then (default: %(default)s)")
    if not send_everything(parser.parse_args().seconds):
        raise RunError(".slipstream/tracking: not all events were sent; run this again when MLflow answers")


if __name__ == "__main__":
    run_entry(main)
