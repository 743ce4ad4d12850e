"""``python -m tasks.detection``."""

from tasks.common.cli.process import start

if __name__ == "__main__":
    start("tasks.detection.command:group", prog_name="python -m tasks.detection")
