"""``python -m tasks.classification``."""

from tasks.common.cli.process import start

if __name__ == "__main__":
    start("tasks.classification.command:group", prog_name="python -m tasks.classification")
